"""Materializes a campaign asset by asset; each is killed in the middle of its writing, then run again.

    python killer.py CAMPAIGN_FILE HOME

A process of its own, because it forks: the parent only imports, so that no child inherits a thread's lock.
"""

import os
import signal
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

import dagster as dg

from propensity_dagster.campaign import load_campaign
from propensity_dagster.components.automation import range_tags
from propensity_dagster.components.campaign_folder import campaign_definitions
from propensity_dagster.data.lake import Home
from propensity_dagster.runtime import Runtime

STREAMS = [
    "raw_orders",
    "raw_visits",
    "raw_emails",
    "validated_orders",
    "validated_visits",
    "validated_emails",
    "activity",
]
CANDIDATES = [f"candidate_{n}" for n in ("baseline", "logistic_regression", "lightgbm", "neural_network", "ensemble")]


def in_a_child(work: Callable[[], None]) -> int:
    """Exit status of `work` run in a fork; negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dying_after(publications: int, work: Callable[[], None]) -> Callable[[], None]:
    """`work`, killed between writing a file and publishing it, after so many were published."""

    def doomed() -> None:
        replace, left = os.replace, publications

        def deadly(source, target, *args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(source, target, *args, **kwargs)

        os.replace = deadly
        work()

    return doomed


def main(file: Path, home: Path) -> None:
    campaign = load_campaign(file)
    definitions = dg.Definitions.merge(
        campaign_definitions(campaign), dg.Definitions(resources={"runtime": Runtime(Home(home))})
    )

    def step(job: str, asset: str, tags: dict[str, str]) -> Callable[[], None]:
        def work() -> None:
            with dg.DagsterInstance.ephemeral() as instance:
                definitions.resolve_job_def(job).execute_in_process(
                    instance=instance, tags=tags, asset_selection=[dg.AssetKey([campaign.name, asset])]
                )

        return work

    days, newest = range_tags(date(2024, 1, 1), date(2024, 8, 27)), range_tags(date(2024, 8, 28), date(2024, 8, 28))
    stages = [("small__ingest", a, days) for a in ("raw_customers", "validated_customers", *STREAMS)]
    stages += [("small__train", a, {}) for a in ("diagnosis", "training_set", *CANDIDATES, "evaluation")]
    stages += [("small__train", a, {}) for a in ("champion", "explanations", "report")]
    stages += [("small__score", a, newest) for a in ("features", "scores", "audience", "exported_audience")]
    stages += [("small__monitor", "drift", newest)]
    stages += [("small__monitor", a, newest) for a in ("earned", "experiment_wording")]
    for job, asset, tags in stages:
        work = step(job, asset, tags)
        if asset != "champion":  # MLflow writes that one
            killed = in_a_child(dying_after(100 if asset in STREAMS else 0, work))
            assert killed == -signal.SIGKILL, f"{asset} was not killed in its work: {killed}"
        assert in_a_child(work) == 0, f"{asset} failed after it had been killed"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
