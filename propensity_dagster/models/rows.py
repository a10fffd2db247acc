"""A model that scores a stream of rows, here or on the executors of a cluster.

It travels as its saved files, so that what is needed there is numpy, pyarrow and lightgbm, and is verified on arrival.
"""

import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from propensity_dagster.models.base import FittedModel
from propensity_dagster.models.saved import load_model, write_model

Item = TypeVar("Item")
LOG_ODDS = "log_odds"


class RowScorer:
    """Adds the log-odds of each row, calibrated, and drops the features."""

    def __init__(self, model: FittedModel) -> None:
        self.model = model

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """For each batch the columns that are no features, and `log_odds`."""
        contract = self.model.contract
        features = set(contract.names)
        for batch, X in ahead((batch, contract.encode(batch)) for batch in batches):
            kept = [name for name in batch.schema.names if name not in features]
            columns = [*(batch.column(name) for name in kept), pa.array(self.model.log_odds(X))]
            yield pa.RecordBatch.from_arrays(columns, names=[*kept, LOG_ODDS])

    def __getstate__(self) -> dict[str, bytes]:
        """The saved files."""
        with tempfile.TemporaryDirectory(prefix="propensity-model-") as name:
            folder = Path(name) / "model"
            write_model(self.model, folder)
            return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}

    def __setstate__(self, files: dict[str, bytes]) -> None:
        """Load them.

        Raises:
            SavedModelError: when they do not score as they did where they come from.
        """
        with tempfile.TemporaryDirectory(prefix="propensity-model-") as name:
            for path, content in files.items():
                file = Path(name) / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
            self.model: Any = load_model(Path(name))


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The items, each made while the one before is in use: reading and computing keep two cores busy."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1, "ahead") as pool:
        coming = pool.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, iterator, end)
            yield item  # pyright: ignore[reportReturnType]
