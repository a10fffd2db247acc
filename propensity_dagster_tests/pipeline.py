"""From a source to a training set, features and labels of snapshots and scores, as plain calls on one engine.

`python -m propensity_dagster_tests.pipeline CAMPAIGN.yaml [MODEL_FOLDER]` does it on the engine of the environment.
"""

import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from propensity_dagster.campaign import EventCampaign, load_campaign
from propensity_dagster.data.engine import Engine
from propensity_dagster.data.ingest import ingest_entities, ingest_stream
from propensity_dagster.data.lake import Home
from propensity_dagster.data.sources import campaign_calendar
from propensity_dagster.data.validate import entity_violations, stream_violations, validate_entities, validate_stream
from propensity_dagster.features.activity import build_activity
from propensity_dagster.features.audit import audit_features, audit_labels
from propensity_dagster.features.build import derive_entities, newest_mature
from propensity_dagster.features.snapshots import publish_training_set
from propensity_dagster.models.saved import load_model
from propensity_dagster.monitoring.drift import publish_drift
from propensity_dagster.runtime import Runtime
from propensity_dagster.scoring.batch import score_snapshot, score_violations


def run_pipeline(campaign: EventCampaign, home: Home, engine: Engine) -> list[object]:
    """Every stage in turn. Returns what the stages report."""
    calendar = campaign_calendar(campaign)
    first, last = calendar.first, calendar.newest
    said: list[object] = []
    for name in campaign.source.streams:
        said.append(ingest_stream(campaign, name, first, last, home, engine))
        said.append(validate_stream(campaign, name, first, last, home, engine))
        said.append(stream_violations(campaign, name, first, last, home, engine))
    if campaign.source.entities.table:
        said.append(ingest_entities(campaign, home, engine))
        said.append(validate_entities(campaign, home, engine))
        said.append(entity_violations(campaign, home, engine))
    else:
        said.append(derive_entities(campaign, home, engine))
    said.append(build_activity(campaign, first, last, home, engine))
    said.append(publish_training_set(campaign, home, engine))
    snapshots = home.lake(campaign.name).partitions("labels", "snapshot")[-2:]
    said.append(audit_features(campaign, snapshots, home, engine))
    said.append(audit_labels(campaign, snapshots, home, engine))
    return said


def score_newest(campaign: EventCampaign, model_folder: Path, home: Home, engine: Engine) -> list[object]:
    """Scores and drift of the newest mature snapshot."""
    model, snapshot = load_model(model_folder), newest_mature(campaign, home)
    said: list[object] = [score_snapshot(campaign, snapshot, model, "1", datetime(2030, 1, 1), home, engine)]
    said.append(score_violations(campaign, snapshot, home, engine))
    if model.facts.get("population"):
        said.append(publish_drift(campaign, snapshot, model, "1", home, engine))
    return said


def require_equal_lakes(one: Path, other: Path) -> int:
    """Keys, words and whole numbers equal, floating-point numbers to 1e-9. Returns how many files there are."""
    files = [sorted(f.relative_to(root) for f in root.rglob("*.parquet")) for root in (one, other)]
    assert files[0] == files[1]
    for name in files[0]:
        require_equal_tables(pq.read_table(one / name), pq.read_table(other / name), str(name))
    return len(files[0])


def require_equal_tables(expected: pa.Table, found: pa.Table, what: str) -> None:
    """The same columns of the same types with the same values."""
    assert found.schema.remove_metadata() == expected.schema.remove_metadata(), what
    assert found.num_rows == expected.num_rows, what
    for name in expected.schema.names:
        a, b = expected[name].combine_chunks(), found[name].combine_chunks()
        if pa.types.is_floating(a.type):
            assert a.is_valid().equals(b.is_valid()), (what, name)
            x, y = (np.nan_to_num(c.to_numpy(zero_copy_only=False)) for c in (a, b))
            np.testing.assert_allclose(y, x, rtol=1e-9, atol=1e-9, err_msg=f"{what}: {name}")
        elif not a.equals(b):
            assert what.startswith("quarantine_"), (
                what,
                name,
            )  # it shows numbers as each engine writes them: 1e-05, 1.0E-5
            for x, y in zip(a.to_pylist(), b.to_pylist(), strict=True):
                assert x == y or float(x) == float(y) or x.lower() == "nan" == y.lower(), (what, name, x, y)


if __name__ == "__main__":
    runtime = Runtime.from_environment()
    chosen = load_campaign(Path(sys.argv[1]))
    with runtime.engine() as opened:
        run_pipeline(chosen, runtime.home, opened)
        if len(sys.argv) > 2:
            score_newest(chosen, Path(sys.argv[2]), runtime.home, opened)
