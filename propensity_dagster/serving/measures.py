"""Prometheus metrics, summed over the workers of one server. Labels come from bounded sets only."""

import os
import shutil
import tempfile
from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from propensity_dagster.serving.prediction_log import PredictionLog
from propensity_dagster.serving.watch import State

_BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5)


def run_folder() -> Path:
    """A folder that the workers of one server share while it runs: they have one parent.

    BentoML's own is shared by all servers of a user, and emptied by each that starts.
    """
    root = Path(tempfile.gettempdir())
    owner = os.getuid()
    for other in root.glob(f"propensity-{owner}-*"):  # of servers that were killed
        parent = other.name.rpartition("-")[2]
        if parent.isdigit() and not Path(f"/proc/{parent}").exists() and Path("/proc/self").exists():
            shutil.rmtree(other, ignore_errors=True)
    folder = root / f"propensity-{owner}-{os.getppid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != owner:
        return Path(tempfile.mkdtemp(prefix="propensity-"))
    return folder


@dataclass
class _Tally:
    """Answers of one kind since they were last moved; `within` counts by bucket, the last for all that were slower."""

    seconds: float = 0.0
    within: list[int] = field(default_factory=lambda: [0] * (len(_BUCKETS) + 1))


class Measures:
    """What the worker counts."""

    def __init__(self, folder: Path, state: State) -> None:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)  # read when prometheus_client is first imported
        import prometheus_client
        from prometheus_client import multiprocess

        self._folder, self._state = folder, state
        self._client: Any = prometheus_client
        self._registry: Any = prometheus_client.CollectorRegistry()
        multiprocess.MultiProcessCollector(self._registry, path=str(folder))  # pyright: ignore[reportArgumentType]
        own = prometheus_client.CollectorRegistry()
        labels = ["endpoint", "campaign"]
        self._requests = prometheus_client.Counter(
            "propensity_requests", "requests answered", [*labels, "status"], registry=own
        )
        self._seconds = prometheus_client.Counter(
            "propensity_request_seconds", "seconds from a request's head to its answer", labels, registry=own
        )
        self._within = prometheus_client.Counter(
            "propensity_requests_within",
            "requests answered within so many seconds; histogram_quantile() reads it",
            [*labels, "le"],
            registry=own,
        )
        gauges: dict[str, tuple[str, Any]] = {
            "requests_in_hand": ("requests that are being answered", "livesum"),
            "predictions_logged": ("answers written to the log", "sum"),
            "predictions_dropped": ("answers that did not fit the log's buffer, or could not be written", "sum"),
        }
        self._gauges = {
            name: prometheus_client.Gauge(f"propensity_{name}", words, registry=own, multiprocess_mode=mode)
            for name, (words, mode) in gauges.items()
        }
        self._refused = prometheus_client.Gauge(
            "propensity_refusals",
            "releases, settings or keys that were refused because they are broken",
            ["what"],
            registry=own,
            multiprocess_mode="max",
        )
        self._version = prometheus_client.Gauge(
            "propensity_champion_version",
            "version that serves; the oldest, where workers differ",
            ["campaign"],
            registry=own,
            multiprocess_mode="min",
        )
        self._tallies: dict[tuple[str, str | None, int], _Tally] = {}
        self._log: PredictionLog | None = None

    def follow(self, log: PredictionLog) -> None:
        """Count what this log writes."""
        self._log = log

    def request(self, endpoint: str, campaign: str | None, status: int, seconds: float) -> None:
        """Count one answer. A shared counter costs microseconds: here it is a tally, moved there once a second."""
        tally = self._tallies.get((endpoint, campaign, status))
        if tally is None:
            if campaign is not None and campaign not in self._state.releases:
                campaign = "unknown"  # only campaigns that are served become a label
            tally = self._tallies.setdefault((endpoint, campaign, status), _Tally())
        tally.seconds += seconds
        tally.within[bisect_left(_BUCKETS, seconds)] += 1

    def _move_tallies(self) -> None:
        for (endpoint, campaign, status), tally in self._tallies.items():
            labels, count = (endpoint, campaign or ""), sum(tally.within)
            if not count:
                continue
            self._requests.labels(*labels, str(status)).inc(count)
            self._seconds.labels(*labels).inc(tally.seconds)
            for bound, within in zip([*map(str, _BUCKETS), "+Inf"], accumulate(tally.within), strict=True):
                self._within.labels(*labels, bound).inc(within)
            tally.seconds, tally.within = 0.0, [0] * (len(_BUCKETS) + 1)

    def text(self) -> bytes:
        """The metrics of all workers."""
        return self._client.generate_latest(self._registry)

    def update(self, in_hand: int) -> None:
        """Bring this worker's gauges up to date; called once a second, whoever is asked for the metrics."""
        self._move_tallies()
        self._gauges["requests_in_hand"].set(in_hand)
        if self._log is not None:
            self._gauges["predictions_logged"].set(self._log.written)
            self._gauges["predictions_dropped"].set(self._log.dropped)
        for what, count in self._state.refusals.items():
            self._refused.labels(what).set(count)
        for name, release in self._state.releases.items():
            if release.champion.version.isdigit():
                self._version.labels(name).set(int(release.champion.version))

    def stop(self) -> None:
        """Leave the last values, and tell that this worker is gone."""
        from prometheus_client import multiprocess

        self.update(0)
        multiprocess.mark_process_dead(os.getpid(), path=str(self._folder))
