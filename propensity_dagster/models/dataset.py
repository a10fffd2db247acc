"""Model matrices. Belongs here: the feature contract, and turning Arrow rows into numbers."""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import compute

from propensity_dagster.errors import DataContractError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
pc: Any = compute  # its functions are made at import, which no type checker sees

NUMBER, CATEGORY = "number", "category"
MAX_CATEGORIES = 200
_BATCH_ROWS = 65_536
_LEAVING_OUT = 17  # beside the seed: the same draws must not also have made the data
NOT_FEATURES = frozenset({"snapshot", "split", "fold", "converted"})


class Columns(Protocol):
    """Rows that are looked at column by column: a table in memory, or a split of a file."""

    @property
    def schema(self) -> pa.Schema:
        """Names and types."""
        ...

    def column(self, i: str) -> pa.ChunkedArray:
        """The column of that name."""
        ...


@dataclass(frozen=True)
class FeatureSpec:
    """One input of a model. A category not in `categories` (and a missing value) is encoded as NaN."""

    name: str
    kind: str
    categories: tuple[str, ...] = ()


@dataclass(frozen=True)
class FeatureContract:
    """The inputs of a model, in the order of its matrix columns."""

    features: tuple[FeatureSpec, ...]

    @property
    def names(self) -> list[str]:
        """Feature names in matrix order."""
        return [feature.name for feature in self.features]

    @property
    def categorical(self) -> list[int]:
        """Matrix columns that hold category codes."""
        return [i for i, feature in enumerate(self.features) if feature.kind == CATEGORY]

    def lacking(self, columns: Iterable[str]) -> list[str]:
        """Features that are not among these columns."""
        present = set(columns)
        return [name for name in self.names if name not in present]

    def require(self, columns: Iterable[str]) -> None:
        """Raise a DataContractError naming the features that are not among these columns."""
        missing = self.lacking(columns)
        if missing:
            raise DataContractError(
                f"the model needs {len(missing)} features that the data lack: {', '.join(missing[:5])}"
                + (" ..." if len(missing) > 5 else "")
                + "; were features changed since it was trained?"
            )

    def encode(self, rows: pa.Table | pa.RecordBatch) -> Floats:
        """Matrix of shape (rows, features), column by column; missing values are NaN.

        Raises:
            DataContractError: naming the features that the rows lack.
        """
        self.require(rows.schema.names)
        matrix = np.empty((rows.num_rows, len(self.features)), order="F")
        for i, feature in enumerate(self.features):
            column = rows.column(feature.name)
            if feature.kind == CATEGORY:
                values = column.cast(pa.string())
                codes = pc.index_in(values, pa.array(feature.categories, pa.string()))
                column = codes if not values.null_count else pc.if_else(pc.is_null(values), None, codes)
            column = column.cast(pa.float64())  # of which Arrow makes numpy's with NaN for what is missing
            matrix[:, i] = column.to_numpy(zero_copy_only=False) if isinstance(column, pa.Array) else column.to_numpy()
        return matrix

    def to_json(self) -> list[dict[str, Any]]:
        """Plain data for the saved model."""
        return [{"name": f.name, "kind": f.kind, "categories": list(f.categories)} for f in self.features]

    @classmethod
    def from_json(cls, data: Iterable[dict[str, Any]]) -> "FeatureContract":
        """Inverse of `to_json`."""
        return cls(tuple(FeatureSpec(d["name"], d["kind"], tuple(d["categories"])) for d in data))

    @classmethod
    def fit(cls, table: Columns, key: str, protected: Sequence[str] = ()) -> "FeatureContract":
        """Every column but the key, the protected, the split and the label; categories are those of these rows, sorted.

        Of more than 200 categories the most frequent are kept; the others count as missing.
        """
        specs: list[FeatureSpec] = []
        for column in table.schema:
            if column.name in (key, *protected) or column.name in NOT_FEATURES:
                continue
            if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                counts = pc.value_counts(table.column(column.name).combine_chunks().drop_null()).to_pylist()
                frequent = sorted(counts, key=lambda c: (-c["counts"], c["values"]))[:MAX_CATEGORIES]
                specs.append(FeatureSpec(column.name, CATEGORY, tuple(sorted(c["values"] for c in frequent))))
            else:
                specs.append(FeatureSpec(column.name, NUMBER))
        return cls(tuple(specs))


@dataclass(frozen=True)
class Dataset:
    """Rows of one split: matrix (n, p), outcome (n,) of 0 and 1, and a fold in 0..4 by hash of the entity.

    `population` says what the training rows looked like (see models/population.py); empty for other rows. Where only a
    share w of the rows without the outcome is here, `correction` is log w: log-odds that are learnt from them are too
    high by its negative (King and Zeng 2001, "Logistic Regression in Rare Events Data", prior correction), that is
    q = p / (p + (1 - p) / w). Estimators add it to what they learn.
    """

    X: Floats
    y: Floats
    fold: Ints
    contract: FeatureContract
    population: Mapping[str, Any] = field(default_factory=dict[str, Any])
    correction: float = 0.0

    def rows(self, chosen: NDArray[np.bool_]) -> "Dataset":
        """The chosen (n,) rows."""
        X = np.empty((int(chosen.sum()), self.X.shape[1]), order="F")
        for column in range(self.X.shape[1]):  # column by column: the matrix is column-major
            X[:, column] = self.X[chosen, column]
        return Dataset(X, self.y[chosen], self.fold[chosen], self.contract, correction=self.correction)


def read_split(file: Path, split: str, fold: int | None = None) -> pa.Table:
    """The rows of one split of a training set; with `fold`, as if that fold alone were the test rows."""
    rows = SplitFile(file, split, fold)
    return rows.scanner(rows.schema.names).to_table()


@dataclass(frozen=True)
class SplitFile:
    """The rows of one split of a training set, where they are: memory holds a column, or a few batches, of them."""

    file: Path
    split: str
    fold: int | None = None

    @property
    def schema(self) -> pa.Schema:
        """Names and types."""
        return pq.read_schema(self.file)

    def column(self, i: str) -> pa.ChunkedArray:
        """The column of that name."""
        return self.scanner([i]).to_table().column(i)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """These columns, batch by batch, in the order of the file."""
        yield from self.scanner(columns).to_batches()

    def scanner(self, columns: Sequence[str]) -> Any:
        """Reads these columns."""
        import pyarrow.dataset as ds  # imports pandas

        of_fold = ds.field("fold") == self.fold if self.split == "test" else ds.field("fold") != self.fold
        wanted = ds.field("split") == self.split if self.fold is None else of_fold
        options: Any = {"batch_size": _BATCH_ROWS, "batch_readahead": 2, "fragment_readahead": 1}
        return ds.dataset(self.file).scanner(columns=list(columns), filter=wanted, **options)


def read_dataset(
    rows: SplitFile, contract: FeatureContract, key: str, keep_negatives: float = 1.0, seed: int = 0
) -> Dataset:
    """Encode the rows of a split batch by batch, into the matrix and nothing else.

    Args:
        rows: where they are.
        contract: fitted on training rows.
        key: the entity key column.
        keep_negatives: share of the rows without the outcome that is read, the same rows for the same seed.
        seed: of their choice.
    """
    y = rows.column("converted").cast(pa.float64()).to_numpy()
    kept = (y > 0) | (np.random.default_rng([seed, _LEAVING_OUT]).random(len(y)) < keep_negatives)
    count = int(kept.sum())
    X, fold = np.empty((count, len(contract.features)), order="F"), np.empty(count, dtype=np.int64)
    seen = done = 0
    for batch in rows.batches([key, *contract.names]):
        chosen = kept[seen : seen + batch.num_rows]
        seen += batch.num_rows
        part = batch if chosen.all() else batch.filter(pa.array(chosen))
        to = slice(done, done + part.num_rows)
        X[to] = contract.encode(part)
        fold[to] = entity_folds(pa.chunked_array([part.column(key)]))
        done += part.num_rows
    return Dataset(X, y[kept], fold, contract, correction=float(np.log(keep_negatives)))


def make_dataset(table: pa.Table, contract: FeatureContract, key: str) -> Dataset:
    """Encode a table with a `converted` column."""
    labels = table["converted"].cast(pa.float64()).to_numpy()
    return Dataset(contract.encode(table), labels, entity_folds(table[key]), contract)


def entity_folds(keys: pa.ChunkedArray, folds: int = 5) -> Ints:
    """A fold per row by a stable hash of the entity: all rows of one entity share a fold."""
    encoded = keys.combine_chunks().dictionary_encode()
    hashed = np.array([zlib.crc32(key.encode()) % folds for key in encoded.dictionary.to_pylist()], dtype=np.int64)
    return hashed[encoded.indices.to_numpy(zero_copy_only=False)]
