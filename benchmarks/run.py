"""Everything that is promised about time, as ratios of one run. `make benchmark`.

    python -m benchmarks.run [--customers 1000 2000 5000] [--rows 5000 10000 20000] [--out FOLDER]

`--customers` are the sizes of the shop, `--rows` those of training; scoring, drift and the plan take ten times as many.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks import models, orchestration, pipeline
from benchmarks.measure import write_results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--customers", type=int, nargs="+", default=[1_000, 2_000, 5_000])
    parser.add_argument("--rows", type=int, nargs="+", default=[5_000, 10_000, 20_000])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    stated = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="propensity-benchmarks-") as folder:
        figures = [
            *pipeline.benchmark(stated.customers, Path(folder)),
            *models.benchmark(stated.rows, Path(folder)),
            *orchestration.benchmark(stated.customers, Path(folder)),
        ]
    options = " ".join(sys.argv[1:])
    print("\n" + write_results(figures, f"python -m benchmarks.run {options}".strip(), stated.out))


if __name__ == "__main__":
    main()
