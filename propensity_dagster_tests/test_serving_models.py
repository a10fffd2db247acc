"""What a worker computes must be what batch computes: scores, reasons, ranks; and what it may load."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from propensity_dagster.errors import SavedModelError
from propensity_dagster.manifest import write_manifest
from propensity_dagster.models.calibration import METHODS, Calibrator
from propensity_dagster.models.saved import load_model as load_batch_model
from propensity_dagster.serving.packages import Package, Release, ReleaseFile, load_package, load_release
from propensity_dagster.serving.publish.packages import build_package
from propensity_dagster.serving.publish.releases import publish_release, set_rollout
from propensity_dagster.serving.scorers import _CALIBRATORS, load_model

from .conftest import KINDS

TOLERANCE = dict.fromkeys(KINDS, 1e-9) | {"neural_network": 1e-6, "ensemble": 1e-6}


@pytest.fixture(scope="module")
def rows(materialized):
    """Encoded test rows, every kind of missing value among them."""
    home, campaign = materialized.home, materialized.campaign
    snapshot = home.lake(campaign.name).partitions("features", "snapshot")[-1]
    table = pq.read_table(home.lake(campaign.name).partition("features", "snapshot", snapshot)).slice(0, 200)
    X = load_batch_model(home.candidates(campaign.name) / "lightgbm").contract.encode(table)
    X[1::7] = np.nan
    X[2, :] = 0.0
    X[3] = 1e15
    X[4, ::2] = np.nan
    X[3, load_batch_model(home.candidates(campaign.name) / "lightgbm").contract.categorical] = 0
    return X


@pytest.mark.parametrize("kind", KINDS)
def test_single_rows_score_like_a_matrix(materialized, rows, kind):
    folder = materialized.home.candidates(materialized.campaign.name) / kind
    batch, single = load_batch_model(folder), load_model(folder)
    wanted = batch.log_odds(rows)
    found = np.array([single.log_odds(row) for row in rows.tolist()])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_contributions_add_up_to_the_score(materialized, rows, kind):
    model = load_model(materialized.home.candidates(materialized.campaign.name) / kind)
    for row in rows[:40].tolist():
        base, shares = model.contributions(row, rows[50:90])
        assert base + shares.sum() == pytest.approx(model.log_odds(row), abs=1e-9)
        assert len(shares) == rows.shape[1]


@pytest.mark.parametrize("kind", ["baseline", "logistic_regression", "neural_network"])
def test_a_feature_equal_to_the_reference_contributes_nothing(materialized, rows, kind):
    """Against a reference of the row itself there is nothing to explain; where one feature differs, it gets all."""
    model = load_model(materialized.home.candidates(materialized.campaign.name) / kind)
    row = rows[10].tolist()
    base, shares = model.contributions(row, np.array([row]))
    assert base == pytest.approx(model.log_odds(row))
    assert np.abs(shares).max() < 1e-9
    column = next(i for i, f in enumerate(model.features) if f["name"] == "orders_recency_days")
    other = list(row)
    other[column] = 1.0 if math.isnan(row[column]) else row[column] + 200.0
    _, shares = model.contributions(row, np.array([other]))
    assert shares[column] == pytest.approx(model.log_odds(row) - model.log_odds(other))
    assert np.abs(np.delete(shares, column)).max() < 1e-9


CALIBRATORS = {
    "none": (),
    "temperature": ((0.7,),),
    "platt": ((1.3, -0.4),),
    "beta": ((0.9, 1.2, 0.3),),
    "isotonic": ((-3.0, -1.0, 2.0), (-2.5, -1.5, 1.0)),
}


@pytest.mark.parametrize("method", METHODS)
@given(z=st.floats(-40, 40))
def test_calibrators_are_those_of_batch(method, z):
    values = CALIBRATORS[method]
    wanted = float(Calibrator(method, values).apply(np.array([z]))[0])
    assert _CALIBRATORS[method](values)(z) == pytest.approx(wanted, abs=1e-9)


# Packages


@pytest.fixture
def package(registered):
    name = publish_release(registered.campaign, registered.home, registered.store).package
    return registered.home.serving / "small" / "packages" / name


def test_a_package_says_what_it_is(registered, package):
    loaded = load_package(package)
    assert loaded.content["campaign"] == "small"
    assert loaded.content["population"]["source"] == "scores"
    assert loaded.content["population"]["rows"] == len(loaded.population)
    names = {field.feature: field.name for field in loaded.inputs}
    assert names["orders_count_all"] == "total_purchases"
    assert "logistic_regression" in {path.name for path in (package / "model").iterdir()}


def test_no_pickle_in_a_package(package):
    for file in package.rglob("*"):
        if file.is_file():
            assert file.suffix in (".json", ".txt", ".npz", ".f64")
            assert not file.read_bytes().startswith(b"\x80")
    for file in package.rglob("*.npz"):
        with np.load(file, allow_pickle=False) as arrays:
            assert all(arrays[name].dtype == np.float64 or name == "allow_pickle" for name in arrays)


def cut_short(folder: Path) -> None:
    file = folder / "population.f64"
    file.write_bytes(file.read_bytes()[:-8])


def other_weights(folder: Path) -> None:
    """Somebody who changes a weight can also write the checksums anew; the golden rows still know."""
    file = folder / "model" / "logistic_regression" / "model.json"
    content = json.loads(file.read_text())
    content["scorer"]["intercept"] += 0.001
    file.write_text(json.dumps(content))
    for place in (file.parent, folder / "model", folder):
        write_manifest(place, 1)


def without_a_file(folder: Path) -> None:
    (folder / "model" / "lightgbm" / "trees.txt").unlink()


def one_byte(folder: Path) -> None:
    file = folder / "model" / "lightgbm" / "trees.txt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def other_format(folder: Path) -> None:
    file = folder / "manifest.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 99'))


def not_json(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


@pytest.mark.parametrize("spoil", [cut_short, other_weights, without_a_file, one_byte, other_format, not_json])
def test_a_spoiled_package_is_refused(package, spoil):
    load_package(package)
    spoil(package)
    with pytest.raises(SavedModelError):
        load_package(package)


@pytest.mark.parametrize(
    "text", ["", "{", '{"champion": "v9-none"}', '{"champion": "../../x"}', '{"champion": "v1", "mode": "all"}']
)
def test_a_spoiled_release_is_refused(registered, package, text):
    folder = package.parents[1]
    load_release(folder)
    (folder / "release.json").write_text(text)
    with pytest.raises(SavedModelError):
        load_release(folder)


def test_a_package_of_another_campaign_is_refused(registered, package):
    other = package.parents[2] / "other"
    shutil.copytree(package.parents[1], other)
    with pytest.raises(SavedModelError, match="of the campaign 'small'"):
        load_release(other)


@pytest.mark.parametrize("kind", KINDS)
def test_the_population_ranks_as_batch_does(registered, kind, engine):
    """Percentile, decile and tier of every scored customer, found by their probability."""
    from propensity_dagster.scoring.batch import score_snapshot

    campaign, home, store = registered.campaign, registered.home, registered.store
    version = registered.versions[kind]
    snapshot = home.lake("small").partitions("scores", "snapshot")[-1]
    model = load_batch_model(store.folder("small", version))
    from datetime import datetime

    score_snapshot(campaign, snapshot, model, version, datetime(2025, 1, 1), home, engine)
    (found,) = [v for v in store.versions("small") if v.version == version]
    loaded = load_package(home.serving / "small" / "packages" / build_package(campaign, found, home, store))
    scores = pq.read_table(home.lake("small").partition("scores", "snapshot", snapshot)).to_pylist()
    for row in scores:
        percentile, decile, tier = loaded.rank(row["probability"])
        assert percentile == pytest.approx(row["percentile"], abs=1e-12)
        assert (decile, tier) == (row["decile"], row["tier"])


# Rollout


def fake_release(share: float) -> Release:
    packages = [Package(name, {"key": "k"}, None, (), ()) for name in ("v1-a", "v2-a")]  # pyright: ignore
    return Release("c", *packages, ReleaseFile("v1-a", "v2-a", "split", share, "c:2:"), None)  # pyright: ignore


@given(shares=st.tuples(st.floats(0, 1), st.floats(0, 1)), key=st.text(min_size=1, max_size=20))
def test_a_larger_share_only_adds_customers(shares, key):
    small, large = sorted(shares)
    if fake_release(small).choose(key)[1] == "challenger":
        assert fake_release(large).choose(key)[1] == "challenger"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_a_share_is_about_that_share(share):
    release = fake_release(share)
    moved = sum(release.choose(f"customer-{i}")[1] == "challenger" for i in range(20_000)) / 20_000
    assert moved == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 20_000) + 1e-12)


def test_publishing_again_keeps_a_rollout_until_the_challenger_is_promoted(registered):
    campaign, home, store = registered.campaign, registered.home, registered.store
    publish_release(campaign, home, store)
    challenger = registered.versions["lightgbm"]
    champion = store.champion("small").version
    set_rollout(campaign, home, store, "split", 0.3, challenger)
    report = publish_release(campaign, home, store)
    assert (report.champion_version, report.challenger_version, report.mode) == (champion, challenger, "split")
    store.promote("small", challenger, "by hand")
    report = publish_release(campaign, home, store)
    assert (report.champion_version, report.challenger_version, report.mode) == (challenger, None, "off")
    store.roll_back("small", None, "by hand")
    assert publish_release(campaign, home, store).champion_version == champion
