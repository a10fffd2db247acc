"""Every example on its real data, through Dagster: one table of all models with intervals.

    python -m benchmarks.real [NAME ...] [--home FOLDER]

The data are read where PROPENSITY_DATA says, else from ../shared/data. Each example runs in a process of its
own, as `propensity demo` does; the table is Markdown, the one that the README quotes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from propensity_dagster.evaluation.evaluate import CHAMPION

ROOT = Path(__file__).parents[1]
METRICS = {"log_loss": "{:.4f}", "auc": "{:.3f}", "calibration_error": "{:.4f}", "top_decile_lift": "{:.2f}"}


def run_example(name: str, home: Path) -> tuple[dict[str, Any], float]:
    """The evaluation record of one example, and the seconds it took."""
    environment = {**os.environ, "PROPENSITY_HOME": str(home / name)}
    environment.setdefault("PROPENSITY_DATA", str(ROOT.parent / "shared" / "data"))
    command = [sys.executable, "-m", "propensity_dagster.cli", "demo", str(ROOT / "examples" / f"{name}.yaml")]
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    record = json.loads((home / name / "reports" / name / "evaluation.json").read_text(encoding="utf-8"))
    return record, time.perf_counter() - start


def rows_of(name: str, record: dict[str, Any]) -> list[str]:
    """One Markdown row per model, from the best log loss to the worst."""
    ranked = sorted(record["models"].items(), key=lambda item: item[1]["log_loss"]["value"])
    lines: list[str] = []
    for model, found in ranked:
        if model == CHAMPION:
            continue
        shown = f"**{model}**" if model == record["challenger"] else model
        cells = [cell(found[metric], form) for metric, form in METRICS.items()]
        lines.append(f"| {name if not lines else ''} | {shown.replace('_', ' ')} | {' | '.join(cells)} |")
    return lines


def cell(found: dict[str, float | None], form: str) -> str:
    """Value with its interval."""
    if found["value"] is None:
        return ""
    if found["low"] is None or found["high"] is None:
        return form.format(found["value"])
    return f"{form} ({form} to {form})".format(found["value"], found["low"], found["high"])


def verdict(name: str, record: dict[str, Any], seconds: float) -> str:
    """What the gate said, and whether the challenger beats baseline and constant."""
    beaten = all(record["comparisons"][other]["log_loss"]["high"] < 0 for other in ("baseline", "constant"))
    words = "promoted" if record["decision"]["promoted"] else f"refused ({record['decision']['sentence']})"
    return f"- {name}: {words}; beats baseline and constant on log loss: {'yes' if beaten else 'NO'}; {seconds:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    known = sorted(path.stem for path in (ROOT / "examples").glob("*.yaml"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--home", type=Path, help="keep what is made there")
    stated = parser.parse_args()
    unknown = sorted(set(stated.names) - set(known))
    if unknown:
        parser.error(f"there is no example {unknown[0]!r}; there are {', '.join(known)}")
    with tempfile.TemporaryDirectory() as scratch:
        home = (stated.home or Path(scratch)).resolve()
        verdicts: list[str] = []
        print(f"{date.today()}, {os.cpu_count()} cores, 95% intervals from a bootstrap over entities\n")
        print("| example | model | log loss | AUC | calibration error | top-decile lift |\n|---|---|---|---|---|---|")
        for name in stated.names or known:
            record, seconds = run_example(name, home)
            print("\n".join(rows_of(name, record)), flush=True)
            verdicts.append(verdict(name, record, seconds))
        print("\n" + "\n".join(verdicts))


if __name__ == "__main__":
    main()
