"""Out-of-time splits. Belongs here: which snapshot is in which split, and the proof that none overlaps."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, timedelta

import numpy as np
from numpy.typing import NDArray

from propensity_dagster.campaign import EventCampaign
from propensity_dagster.errors import InsufficientDataError, LeakageError

TRAIN, VALIDATE, TEST, EMBARGO = "train", "validate", "test", "embargo"


@dataclass(frozen=True)
class SnapshotSplit:
    """One snapshot of the grid; its outcome counts days in [outcome_start, outcome_end)."""

    snapshot: date
    split: str
    outcome_start: date
    outcome_end: date


def plan_splits(campaign: EventCampaign, newest: date, first_day: date) -> list[SnapshotSplit]:
    """Assign the snapshots of the campaign's grid, oldest first, embargoed ones included.

    Counted back from `newest`: test snapshots, then an embargo until an outcome window ends at or before the
    first test snapshot, then validation, an embargo again, then training.

    Args:
        campaign: gives the grid and the outcome window.
        newest: the newest snapshot whose labels exist.
        first_day: the first day of the event logs.

    Raises:
        InsufficientDataError: when the grid reaches back to before the first day.
    """
    grid = campaign.snapshots
    step = timedelta(days=grid.every)
    outcome = timedelta(days=campaign.outcome_end_days)
    plan: list[SnapshotSplit] = []
    snapshot, limit = newest, None
    for split, count in ((TEST, grid.test), (VALIDATE, grid.validate_), (TRAIN, grid.train)):
        while limit is not None and snapshot + outcome > limit:
            plan.append(_assign(campaign, snapshot, EMBARGO))
            snapshot -= step
        for _ in range(count):
            plan.append(_assign(campaign, snapshot, split))
            limit = snapshot
            snapshot -= step
    oldest = plan[-1].snapshot
    if oldest <= first_day:
        raise InsufficientDataError(
            f"{campaign.file}: snapshots: {grid.train} training, {grid.validate_} validation and {grid.test} "
            f"test snapshots every {grid.every} days, with embargoes of {campaign.outcome_end_days} days, reach "
            f"back to {oldest}, but the event logs start on {first_day}; use fewer snapshots, a smaller "
            f"'every' or a shorter horizon (newest mature snapshot: {newest})"
        )
    return plan[::-1]


def require_out_of_time(plan: list[SnapshotSplit]) -> None:
    """Raise unless every split's outcome windows end at or before the next split's first snapshot.

    Raises:
        LeakageError: naming the two snapshots.
    """
    for earlier, later in ((TRAIN, VALIDATE), (VALIDATE, TEST), (TRAIN, TEST)):
        before = [s for s in plan if s.split == earlier]
        after = [s for s in plan if s.split == later]
        last = max(before, key=lambda s: s.outcome_end)
        first = min(after, key=lambda s: s.snapshot)
        if last.outcome_end > first.snapshot:
            raise LeakageError(
                f"the outcome window of {earlier} snapshot {last.snapshot} ends on {last.outcome_end}, after "
                f"{later} snapshot {first.snapshot}"
            )


def _assign(campaign: EventCampaign, snapshot: date, split: str) -> SnapshotSplit:
    start = snapshot + timedelta(days=campaign.outcome.gap_days)
    return SnapshotSplit(snapshot, split, start, start + timedelta(days=campaign.outcome.horizon_days))


def hash_fractions(keys: Iterable[str], salt: str = "split") -> NDArray[np.float64]:
    """A number in [0, 1) for each key, the same on every machine and in every year; another one for another salt."""
    digests = (hashlib.blake2b(f"{salt}:{key}".encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.float64) / 2.0**64
