"""What a row costs on Spark, and on DuckDB beside it: the figures that docs/scale.md works with.

    python -m benchmarks.spark [--customers 10000 30000 100000] [--out FOLDER]

Spark runs on this machine, warm: every stage once before it is timed. CPU time counts the JVM and its Python workers.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

from benchmarks import models
from benchmarks.measure import Figure, contest, prepare, write_results
from benchmarks.pipeline import SNAPSHOT, days_of, make_lake, shop
from propensity_dagster.data.ingest import ingest_stream
from propensity_dagster.data.validate import validate_stream
from propensity_dagster.features.activity import build_activity
from propensity_dagster.features.snapshots import publish_features
from propensity_dagster.models.saved import load_model
from propensity_dagster.runtime import DUCKDB, Runtime
from propensity_dagster.scoring.batch import score_snapshot

ROWS_A_CUSTOMER = 10


class Stage:
    """One stage on one engine. A class, for a process can be sent it."""

    def __init__(self, name: str, engine_url: str) -> None:
        self.name, self.engine_url = name, engine_url

    def __call__(self, folder: Path, size: int) -> Callable[[], object]:
        campaign, home = shop(folder, size)
        first, last = days_of(campaign)
        opened = ExitStack()  # as long as the process
        engine = opened.enter_context(Runtime(home, engine_url=self.engine_url).engine())

        def ingest() -> None:
            ingest_stream(campaign, "visits", first, last, home, engine)
            validate_stream(campaign, "visits", first, last, home, engine)

        def score() -> None:
            plain, scored = models.home_of(folder, ROWS_A_CUSTOMER * size)
            model = load_model(models.shared(folder, "lightgbm"))
            score_snapshot(
                models.with_reasons(plain, 0), models.SNAPSHOT, model, "1", datetime(2025, 8, 1, 2), scored, engine
            )

        action: Callable[[], object] = {
            "ingest": ingest,
            "activity": lambda: build_activity(campaign, first, last, home, engine),
            "features": lambda: publish_features(campaign, [SNAPSHOT], home, engine),
            "score": score,
        }[self.name]
        action()
        return lambda: (action(), opened)[0]


def benchmark(sizes: list[int], folder: Path) -> list[Figure]:
    """Each stage at these numbers of customers."""
    prepare(make_lake, folder, sizes)
    models.prepare_homes(folder, [ROWS_A_CUSTOMER * size for size in sizes])
    words = {
        "ingest": "ingest and validate the visits",
        "activity": "activity of all days",
        "features": "features of one snapshot",
        "score": f"score {ROWS_A_CUSTOMER} rows a customer, 40 features, 300 trees",
    }
    return [
        figure
        for name, what in words.items()
        for figure in contest(
            what, sizes, "customers", {"Spark": Stage(name, "spark"), "DuckDB": Stage(name, DUCKDB)}, folder, rounds=2
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--customers", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/spark"))
    stated = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="propensity-benchmarks-") as folder:
        figures = benchmark(stated.customers, Path(folder))
    print("\n" + write_results(figures, f"python -m benchmarks.spark {' '.join(sys.argv[1:])}".strip(), stated.out))


if __name__ == "__main__":
    main()
