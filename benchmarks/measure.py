"""How a figure is made: contenders in turn, each in a process of its own, as ratios of one run.

Machines differ and are shared, so absolute times are shown but compared with nothing outside their run.
"""

import json
import math
import multiprocessing
import os
import platform
import resource
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

Work = Callable[[Path, int], Callable[[], object]]
"""From a folder and a size to what is timed: whatever comes before that is preparation."""

_PRELOADED = [
    *(f"benchmarks.{name}" for name in ("pipeline", "models", "orchestration", "spark")),
    "lightgbm",
    "pandera.pandas",
]
"""Imported before a contender is forked: it takes a second, and is not what is timed."""
_LIBRARIES = ("duckdb", "ibis-framework", "pyarrow", "lightgbm", "torch", "numba", "dagster", "pandas")


@dataclass(frozen=True)
class Timing:
    """One run: wall seconds, CPU seconds of the process and its children, peak memory in GB."""

    seconds: float
    cpu: float
    peak_gb: float


@dataclass
class Figure:
    """What was measured at one size. The first contender is ours; `times` multiplies a peer: twelve of one, say."""

    what: str
    size: int
    unit: str
    timings: dict[str, list[Timing]]
    times: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def ours(self) -> list[Timing]:
        return next(iter(self.timings.values()))

    def ratios(self) -> dict[str, float]:
        """CPU time of ours over that of each peer: the median over the rounds."""
        return {
            name: median(
                a.cpu / (b.cpu * self.times.get(name, 1)) for a, b in zip(self.ours, other, strict=True) if b.cpu
            )
            for name, other in list(self.timings.items())[1:]
        }


def contest(
    what: str,
    sizes: Sequence[int],
    unit: str,
    contenders: Mapping[str, Work],
    folder: Path,
    rounds: int = 3,
    times: Mapping[str, int] | None = None,
) -> list[Figure]:
    """Measure every contender at every size, in turn. `unit` says of what a size is the number."""
    figures: list[Figure] = []
    for size in sizes:
        figure = Figure(what, size, unit, {name: [] for name in contenders}, times or {})
        for _ in range(rounds):
            for name, work in contenders.items():
                figure.timings[name].append(in_a_process(_timed, work, folder, size))
        figures.append(figure)
        print(_line(figure, ""), flush=True)
    return figures


def prepare(function: Callable[[Path, int], None], folder: Path, sizes: Sequence[int]) -> None:
    """What is needed at each size, made at the same time, each in a process of its own."""
    with ProcessPoolExecutor(os.cpu_count(), _forkserver()) as pool:
        list(pool.map(function, [folder] * len(sizes), sizes))


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a fresh process, forked from one that has imported the benchmarks."""
    with ProcessPoolExecutor(1, _forkserver()) as pool:
        return pool.submit(function, *arguments).result()


def _forkserver() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _timed(work: Work, folder: Path, size: int) -> Timing:
    warnings.simplefilter("ignore")  # Dagster's, of what it calls beta
    action = work(folder, size)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    cpu, start = _cpu(), time.perf_counter()
    action()
    seconds = time.perf_counter() - start
    return Timing(seconds, _cpu() - cpu, peak_gb())


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used) + sum(_cpu_of(pid) for pid in _descendants(os.getpid()))


def _descendants(pid: int) -> list[int]:
    """Processes that are alive, a JVM and its workers for example."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *_descendants(int(child))]
    return found


def _cpu_of(pid: int) -> float:
    """CPU seconds of a process and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(ticks) for ticks in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def peak_gb() -> float:
    """Peak memory of this process, in GB."""
    (line,) = [row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM")]
    return int(line.split()[1]) / 1e6


def exponents(figures: Sequence[Figure]) -> dict[str, float]:
    """By what is measured, how CPU time grows with size: 1 is linear. The slope of the logarithms, least squares."""
    found: dict[str, float] = {}
    for what in dict.fromkeys(f.what for f in figures):
        mine = [f for f in figures if f.what == what]
        if len(mine) > 1:
            cpu = [math.log(median(t.cpu for t in f.ours)) for f in mine]
            found[what] = linear_regression([math.log(f.size) for f in mine], cpu).slope
    return found


def write_results(figures: Sequence[Figure], command: str, folder: Path) -> str:
    """`results.json` and `results.md` in a folder; returns the table."""
    growth = exponents(figures)
    machine = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
    }
    rows = [
        {
            "what": f.what,
            "size": f.size,
            "unit": f.unit,
            "contenders": {
                name: {
                    "seconds": _spread([t.seconds for t in timings]),
                    "cpu_seconds": _spread([t.cpu for t in timings]),
                    "peak_gb": max(t.peak_gb for t in timings),
                }
                for name, timings in f.timings.items()
            },
            "cpu_ratio": f.ratios(),
            "growth_exponent": growth.get(f.what),
        }
        for f in figures
    ]
    content = {"date": str(date.today()), "command": command, "machine": machine, "figures": rows}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    head = f"{date.today()}, `{command}`, {machine['processor']}, {machine['cores']} cores\n\n"
    head += "| what | size | seconds (min to max) | CPU s | peak GB | CPU time over that of | growth |\n"
    head += "|---|---|---|---|---|---|---|\n"
    table = head + "".join(_line(f, f"{growth[f.what]:.2f}" if f.what in growth else "") + "\n" for f in figures)
    (folder / "results.md").write_text(table)
    return table


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": median(values), "max": max(values)}


def _line(figure: Figure, growth: str) -> str:
    seconds = [t.seconds for t in figure.ours]
    against = "; ".join(f"{name}: {ratio:.2f}" for name, ratio in figure.ratios().items())
    cpu, peak = median(t.cpu for t in figure.ours), max(t.peak_gb for t in figure.ours)
    shown = f"{median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
    return (
        f"| {figure.what} | {figure.size:,} {figure.unit} | {shown} | {cpu:.2f} | {peak:.2f} | {against} | {growth} |"
    )


def _processor() -> str:
    names = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return names[0] if names else platform.machine()
