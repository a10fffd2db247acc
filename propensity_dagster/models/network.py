"""A torch network with embeddings. Trained with torch, scored with numpy: serving never imports torch."""

import logging
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Self

import numpy as np

from propensity_dagster.models.base import Fit, by_blocks, compiled
from propensity_dagster.models.calibration import Floats, Ints, log_loss
from propensity_dagster.models.dataset import Dataset
from propensity_dagster.models.preprocess import OneHot, Scaling

logger = logging.getLogger(__name__)

_FILE = "weights.npz"
_CHUNK = 65_536
_SMALLEST_BATCH, _STEPS = 64, 40
_BLAS_ALONE = 1 << 18


@dataclass(frozen=True)
class NetworkScorer:
    """Embeddings of categories beside scaled numbers, then fully connected layers with SiLU in between.

    Attributes:
        scaling: preprocessing of numbers.
        one_hot: sizes of the categories.
        embeddings: one (size + 1, width) array per category column.
        layers: (weights (in, out), bias (out,)) of each layer.
    """

    scaling: Scaling
    one_hot: OneHot
    embeddings: tuple[Floats, ...]
    layers: tuple[tuple[Floats, Floats], ...]
    kind: ClassVar[str] = "network"

    def log_odds(self, X: Floats) -> Floats:
        """Log-odds (n,)."""
        kernels = compiled(len(X))
        return by_blocks(lambda rows: self.output(self.inputs(rows, kernels), kernels), X)

    def forward(self, numbers: Floats, codes: Ints) -> Floats:
        """Log-odds (n,) of scaled numbers (n, k) and category codes (n, c)."""
        return self.output(self._joined(numbers, codes))

    def inputs(self, X: Floats, kernels: ModuleType | None = None) -> Floats:
        """What the first layer reads (n, i): scaled numbers and indicators, then embeddings."""
        return self._joined(self.scaling.apply(X, kernels), self.one_hot.codes(X))

    def _joined(self, numbers: Floats, codes: Ints) -> Floats:
        embedded = [table[codes[:, i]] for i, table in enumerate(self.embeddings)]
        out = np.empty((len(numbers), len(self.layers[0][0])))  # row by row, whatever the order of the numbers
        return np.concatenate([numbers, *embedded], axis=1, out=out)

    def output(self, hidden: Floats, kernels: ModuleType | None = None) -> Floats:
        """Log-odds (n,) of the first layer's inputs (n, i)."""
        activate = _silu if kernels is None else kernels.silu
        for weights, bias in self.layers[:-1]:
            hidden = _product(hidden, weights)
            activate(hidden, bias)
        weights, bias = self.layers[-1]
        return (_product(hidden, weights) + bias)[:, 0]

    def save(self, folder: Path) -> dict[str, Any]:
        """Arrays go to an .npz file, read back without pickle."""
        arrays = {f"embedding_{i}": table for i, table in enumerate(self.embeddings)}
        for i, (weights, bias) in enumerate(self.layers):
            arrays |= {f"weights_{i}": weights, f"bias_{i}": bias}
        np.savez(folder / _FILE, allow_pickle=False, **arrays)
        return {
            "scaling": self.scaling.to_json(),
            "one_hot": self.one_hot.to_json(),
            "embeddings": len(self.embeddings),
            "layers": len(self.layers),
        }

    @classmethod
    def load(cls, folder: Path, state: dict[str, Any]) -> Self:
        """Inverse of `save`."""
        with np.load(folder / _FILE, allow_pickle=False) as arrays:
            embeddings = tuple(arrays[f"embedding_{i}"] for i in range(state["embeddings"]))
            layers = tuple((arrays[f"weights_{i}"], arrays[f"bias_{i}"]) for i in range(state["layers"]))
        return cls(Scaling.from_json(state["scaling"]), OneHot.from_json(state["one_hot"]), embeddings, layers)


@dataclass(frozen=True)
class NeuralNetworkEstimator:
    """AdamW with a one-cycle learning rate; the epoch with the lowest validation log loss is kept."""

    hidden: tuple[int, ...] = (64, 32)
    embedding_width: int = 4
    dropout: float = 0.2
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    batch_rows: int = 4096
    max_epochs: int = 10
    patience: int = 3
    seed: int = 0

    def fit(self, train: Dataset, validate: Dataset) -> Fit:
        """Train until the validation log loss has not fallen for `patience` epochs."""
        best_loss, best, stale = np.inf, None, 0
        held: tuple[Floats, Any] | None = None
        for epoch, scorer in self._epochs(train, self.max_epochs):
            held = held or (scorer.scaling.apply(validate.X), scorer.one_hot.codes(validate.X))
            z = scorer.forward(*held)
            loss = log_loss(z, validate.y)
            logger.info("neural_network: epoch %d of %d, validation log loss %.5f", epoch, self.max_epochs, loss)
            if loss < best_loss:
                best_loss, best, stale = loss, Fit(scorer, z, epoch), 0
            else:
                stale += 1
                if stale == self.patience:
                    break
        if best is None:
            raise FloatingPointError("the network's validation loss was never a number: lower learning_rate")
        return best

    def refit(self, train: Dataset, rounds: int) -> NetworkScorer:
        """Train for `rounds` epochs, on the same schedule of learning rates."""
        return [scorer for _, scorer in self._epochs(train, min(rounds, self.max_epochs))][-1]

    def _epochs(self, train: Dataset, epochs: int) -> Iterator[tuple[int, NetworkScorer]]:
        """The network after each epoch."""
        import torch

        scaling, one_hot = Scaling.fit(train.X, train.contract), OneHot.fit(train.contract)
        torch.manual_seed(self.seed)
        network = self._build(torch, scaling, one_hot)
        numbers = torch.from_numpy(_scaled(scaling, train.X))
        codes = torch.from_numpy(one_hot.codes(train.X))
        labels = torch.from_numpy(train.y.astype(np.float32))
        # The output starts at the base rate: the first epochs need not learn it.
        with torch.no_grad():
            network["layers"][-1].bias.fill_(float(np.log(train.y.mean() / (1 - train.y.mean()))))
        optimizer = torch.optim.AdamW(network.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        # A small table must not be swallowed in two or three steps an epoch.
        batch = min(self.batch_rows, max(_SMALLEST_BATCH, len(labels) // _STEPS))
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.learning_rate, total_steps=-(-len(labels) // batch) * self.max_epochs
        )
        for epoch in range(1, epochs + 1):
            network.train()
            order = torch.randperm(len(labels))
            with _one_thread(torch):
                for start in range(0, len(labels), batch):
                    rows = order[start : start + batch]
                    z = self._forward(torch, network, numbers[rows], codes[rows], training=True)
                    loss = torch.nn.functional.binary_cross_entropy_with_logits(z, labels[rows])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
            yield epoch, self._export(network, scaling, one_hot, train.correction)

    def _build(self, torch: Any, scaling: Scaling, one_hot: OneHot) -> Any:
        width = len(scaling.columns) + len(scaling.indicators) + self.embedding_width * len(one_hot.columns)
        sizes = [width, *self.hidden, 1]
        return torch.nn.ModuleDict(
            {
                "embeddings": torch.nn.ModuleList(
                    torch.nn.Embedding(size + 1, self.embedding_width) for size in one_hot.sizes
                ),
                "layers": torch.nn.ModuleList(torch.nn.Linear(a, b) for a, b in pairwise(sizes)),
            }
        )

    def _forward(self, torch: Any, network: Any, numbers: Any, codes: Any, *, training: bool) -> Any:
        embedded = [table(codes[:, i]) for i, table in enumerate(network["embeddings"])]
        hidden = torch.cat([numbers, *embedded], dim=1)
        for layer in network["layers"][:-1]:
            hidden = torch.nn.functional.silu(layer(hidden))
            hidden = torch.nn.functional.dropout(hidden, self.dropout, training=training)
        return network["layers"][-1](hidden)[:, 0]

    def _export(self, network: Any, scaling: Scaling, one_hot: OneHot, correction: float) -> NetworkScorer:
        def array(parameter: Any) -> Floats:
            return parameter.detach().numpy().astype(np.float64)

        embeddings = tuple(array(table.weight) for table in network["embeddings"])
        layers = tuple((array(layer.weight).T.copy(), array(layer.bias)) for layer in network["layers"])
        layers[-1][1][:] += correction
        return NetworkScorer(scaling, one_hot, embeddings, layers)


def _silu(hidden: Floats, bias: Floats) -> None:
    """x / (1 + exp(-x)) of x = hidden + bias, in place of hidden."""
    hidden += bias
    growth = np.negative(hidden)
    np.exp(growth, out=growth)
    growth += 1
    hidden /= growth


def _product(rows: Floats, weights: Floats) -> Floats:
    """`rows @ weights`, in pieces so small that BLAS starts no threads for them: its threads burn time waiting."""
    out = np.empty((len(rows), weights.shape[1]))
    piece = max(1, _BLAS_ALONE // weights.size)
    whole = len(rows) // piece * piece
    pieces = rows[:whole].reshape(-1, piece, len(weights))
    np.matmul(pieces, weights, out=out[:whole].reshape(-1, piece, weights.shape[1]))
    np.matmul(rows[whole:], weights, out=out[whole:])
    return out


@contextmanager
def _one_thread(torch: Any) -> Generator[None]:
    """The same data give the same bytes: how many threads torch has depends on the machine, and on what ran before.

    Numba shares its OpenMP with torch, and leaves another number of threads behind. Two threads add up in another order
    than one, and save a tenth of the time for half as much CPU time again.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _scaled(scaling: Scaling, X: Floats) -> Any:
    """What the network reads (n, numbers + indicators), in its precision; made in pieces: ours is twice as large."""
    out = np.empty((len(X), len(scaling.columns) + len(scaling.indicators)), dtype=np.float32)
    for start in range(0, len(X), _CHUNK):
        out[start : start + _CHUNK] = scaling.apply(X[start : start + _CHUNK])
    return out
