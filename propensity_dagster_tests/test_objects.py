"""The lake in an object store: whole versions only, whoever is killed and whoever reads meanwhile."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import date, timedelta
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from propensity_dagster.campaign import load_campaign
from propensity_dagster.data import objects
from propensity_dagster.data.lake import Home, publish_table, publish_text
from propensity_dagster.data.objects import bind, move_lake, store_of
from propensity_dagster.erasure import erase_person, find_person
from propensity_dagster.errors import ConfigError, DataContractError, StorageError
from propensity_dagster.registry.mlflow_store import MlflowStore
from propensity_dagster_tests.conftest import run_through_dagster
from propensity_dagster_tests.moto_server import BUCKET, object_server
from propensity_dagster_tests.pipeline import require_equal_lakes, run_pipeline

DAY = date(2024, 3, 1)


@pytest.fixture(scope="module")
def server():
    with object_server() as (environment, process):
        yield environment, process


@pytest.fixture
def url(server, request) -> str:
    """A place of its own for each test."""
    return f"s3://{BUCKET}/{abs(hash(request.node.nodeid))}/lake"


def machine(root: Path, url: str) -> Home:
    """A home on a machine of its own whose lake is in the store."""
    home = Home(root).ensure()
    bind(home.lakes, url)
    return home


def objects_at(url: str) -> list[str]:
    filesystem, root = fsspec.url_to_fs(url)
    filesystem.invalidate_cache()
    return sorted(filesystem.find(root))


def version(number: int, rows: int = 1000) -> pa.Table:
    return pa.table({"customer_id": pa.array(["ann"] * rows), "version": np.full(rows, number)})


def test_what_one_machine_publishes_the_other_reads(tmp_path, url):
    here, there = (machine(tmp_path / name, url).lake("shop") for name in ("here", "there"))
    publish_table(version(1), here.partition("scores", "snapshot", DAY))
    publish_table(version(2), here.partition("scores", "snapshot", DAY + timedelta(days=1)))
    publish_table(version(3), here.file("scores_of_others"))  # a table whose name begins alike
    publish_text("{}", here.document("raw_orders", "source.json"))
    assert there.partitions("scores", "snapshot") == [DAY, DAY + timedelta(days=1)]
    assert there.tables() == ["raw_orders", "scores", "scores_of_others"]
    assert Home(tmp_path / "there").campaigns() == {"shop"}
    assert [f.parent.name for f in there.glob("scores/snapshot=*/part.parquet")] == [
        "snapshot=2024-03-01",
        "snapshot=2024-03-02",
    ]
    assert there.document("raw_orders", "source.json").read_text() == "{}"
    assert len(there.files_of("scores")) == 2
    file = there.existing_partition("scores", "snapshot", DAY)
    assert pq.read_table(file).equals(version(1))
    publish_table(version(4), here.partition("scores", "snapshot", DAY))
    assert pq.read_table(file).equals(version(1))  # whoever has named a file keeps it
    assert pq.read_table(there.partition("scores", "snapshot", DAY)).equals(version(4))
    names = [place.rpartition("/")[2] for place in objects_at(url) if "2024-03-01" in place]
    assert len(names) == 2  # the version before is gone: data and manifest of the newest
    assert names[1] == f"{names[0]}.manifest"
    with pytest.raises(DataContractError, match="scores snapshot=2030-01-01 has not been materialized yet"):
        there.existing_partition("scores", "snapshot", date(2030, 1, 1))
    publish_table(version(1), here.target("activity", "day", DAY))
    with pytest.raises(DataContractError, match="1 of 2 days from 2024-03-01 to 2024-03-02 have not been"):
        there.existing_days("activity", [DAY, DAY + timedelta(days=1)])


def test_a_copy_that_is_the_newest_is_not_fetched_again(tmp_path, url, monkeypatch):
    home = machine(tmp_path / "here", url)
    publish_table(version(1), home.lake("shop").file("scores"))
    filesystem, _ = home.lake("shop").store._opened
    monkeypatch.setattr(filesystem, "get_file", None)
    assert pq.read_table(home.lake("shop").existing("scores")).equals(version(1))


def test_a_clock_that_is_behind_publishes_all_the_same(tmp_path, url, monkeypatch):
    ahead, behind = (machine(tmp_path / name, url).lake("shop") for name in ("ahead", "behind"))
    now = time.time_ns()
    monkeypatch.setattr(objects.time, "time_ns", lambda: now + 3600 * 10**9)
    publish_table(version(1), ahead.file("scores"))
    monkeypatch.setattr(objects.time, "time_ns", lambda: now)
    publish_table(version(2), behind.file("scores"))
    for lake in (ahead, behind):
        assert pq.read_table(lake.file("scores")).equals(version(2))


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np, pyarrow as pa
import s3fs
from propensity_dagster.data import objects
from propensity_dagster.data.lake import Home, publish_table

def killed(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

async def killed_in_the_loop(*arguments, **options):
    killed()

patched = {
    "data": (s3fs.S3FileSystem, "_put_file", killed_in_the_loop),
    "manifest": (s3fs.S3FileSystem, "_pipe_file", killed_in_the_loop),
    "rename": (os, "replace", killed),
}
setattr(*patched[sys.argv[2]])
file = Home(Path(sys.argv[1])).lake("shop").file("scores")
publish_table(pa.table({"customer_id": pa.array(["ann"] * 1000), "version": np.full(1000, 2)}), file)
"""


@pytest.mark.parametrize("moment", ["data", "manifest", "rename"])
def test_a_writer_killed_while_it_publishes(tmp_path, url, moment):
    """Before the data are there, before the manifest is, and before its own copy is: old or new, never neither."""
    lake, other = (machine(tmp_path / name, url).lake("shop") for name in ("here", "there"))
    publish_table(version(1), lake.file("scores"))

    process = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "here"), moment], check=False)
    assert process.returncode == -signal.SIGKILL
    expected = version(2 if moment == "rename" else 1)
    for reader in (lake, other):
        assert pq.read_table(reader.file("scores")).equals(expected)
    left = [place for place in objects_at(url) if not place.endswith(".manifest")]
    assert len(left) == {"data": 1, "manifest": 2, "rename": 1}[moment]
    publish_table(version(3), lake.file("scores"))
    assert pq.read_table(other.file("scores")).equals(version(3))


def test_what_the_killed_leave_is_removed_a_day_later(tmp_path, url, monkeypatch):
    home = machine(tmp_path / "here", url)
    lake = home.lake("shop")
    publish_table(version(1), lake.file("scores"))
    (data,) = [place for place in objects_at(url) if place.endswith(".parquet")]
    abandoned = data.replace("/part.1", "/part.0")
    fsspec.url_to_fs(url)[0].pipe_file(abandoned, b"half")
    young = f"{data.rpartition('/')[0]}/part.{time.time_ns() // 1000}-{'0' * 16}.parquet"
    fsspec.url_to_fs(url)[0].pipe_file(young, b"of a living one")
    assert pq.read_table(lake.file("scores")).equals(version(1))
    assert lake.store.sweep() == 1
    assert abandoned not in objects_at(url)
    assert young in objects_at(url)
    fsspec.url_to_fs(url)[0].pipe_file(abandoned, b"half")
    publish_table(version(2), lake.file("scores"))
    assert abandoned not in objects_at(url)
    assert young in objects_at(url)


WRITER = """
import sys
from pathlib import Path
import numpy as np, pyarrow as pa
from propensity_dagster.data.lake import Home, publish_table
file = Home(Path(sys.argv[1])).lake("shop").target("scores", "snapshot", "2024-03-01")
number = int(sys.argv[2])
while True:
    number += 1
    rows = 1000 + 997 * (number % 50)
    publish_table(pa.table({"customer_id": pa.array(["ann"] * rows), "version": np.full(rows, number)}), file)
"""


def test_readers_beside_writers_that_are_killed_see_whole_versions_in_order(tmp_path, url):
    """Writers in processes of their own, killed at any moment; readers on two other machines."""
    homes = {name: machine(tmp_path / name, url) for name in ("writer", "one", "two")}
    publish_table(version(1, 1997), homes["writer"].lake("shop").target("scores", "snapshot", DAY))
    seen: dict[str, list[int]] = {"one": [], "two": []}
    stop, trouble = threading.Event(), []

    def read(name: str) -> None:
        try:
            while not stop.is_set():
                table = pq.read_table(homes[name].lake("shop").existing_partition("scores", "snapshot", DAY))
                (number,) = set(table["version"].to_pylist())
                assert table.num_rows == 1000 + 997 * (number % 50)
                seen[name].append(number)
        except BaseException as error:  # of whatever kind: the test must see it
            trouble.append(error)

    readers = [threading.Thread(target=read, args=[name]) for name in seen]
    for reader in readers:
        reader.start()
    rng = np.random.default_rng(0)
    for run in range(4):
        arguments = [str(homes["writer"].root), str(1000 * (run + 1))]
        writer = subprocess.Popen([sys.executable, "-c", WRITER, *arguments])
        begun = 1000 * (run + 1)
        deadline = time.monotonic() + 60
        while not trouble and time.monotonic() < deadline and not any(n > begun for n in seen["one"][-3:]):
            time.sleep(0.02)
        time.sleep(float(rng.uniform(0.2, 0.6)))
        writer.kill()
        writer.wait()
    stop.set()
    for reader in readers:
        reader.join()
    assert trouble == []
    for numbers in seen.values():
        assert numbers == sorted(numbers)
        assert len({n // 1000 for n in numbers}) >= 4
    last = pq.read_table(homes["two"].lake("shop").existing_partition("scores", "snapshot", DAY))
    publish_table(version(9000), homes["writer"].lake("shop").target("scores", "snapshot", DAY))
    assert last.num_rows
    assert pq.read_table(homes["one"].lake("shop").partition("scores", "snapshot", DAY)).equals(version(9000))


def test_data_that_are_not_what_was_published_are_refused(tmp_path, url):
    here, there = (machine(tmp_path / name, url).lake("shop") for name in ("here", "there"))
    publish_table(version(1), here.file("scores"))
    (data,) = [place for place in objects_at(url) if place.endswith(".parquet")]
    filesystem = fsspec.url_to_fs(url)[0]
    content = filesystem.cat_file(data)
    for damaged in (content[:-100], content[:200] + b"\0" + content[201:]):
        filesystem.pipe_file(data, damaged)
        with pytest.raises(StorageError, match=r"shop/scores/part\.parquet cannot be had whole"):
            there.file("scores")
    assert not (there.root / "scores" / "part.parquet").exists()
    filesystem.pipe_file(data, content)
    assert pq.read_table(there.file("scores")).equals(version(1))


def test_a_working_copy_that_lost_or_changed_a_file(tmp_path, url):
    lake = machine(tmp_path / "here", url).lake("shop")
    publish_table(version(1), lake.file("scores"))
    file = lake.root / "scores" / "part.parquet"
    file.unlink()
    assert pq.read_table(lake.existing("scores")).equals(version(1))
    file.write_bytes(b"somebody's hand")
    assert pq.read_table(lake.existing("scores")).equals(version(1))


def test_a_store_that_is_gone(tmp_path):
    """A clear error, and the table stays what it was."""
    with object_server() as (_, process):
        lake = machine(tmp_path / "here", f"s3://{BUCKET}/gone").lake("shop")
        publish_table(version(1), lake.file("scores"))
        target = lake.root / "scores" / "part.parquet"
        process.kill()
        process.wait()
        with pytest.raises(StorageError, match=f"s3://{BUCKET}/gone: the store does not do what was asked: .*connect"):
            publish_table(version(2), target)
        with pytest.raises(StorageError, match="the store does not do what was asked"):
            lake.existing("scores")
        assert pq.read_table(target).equals(version(1))
        assert [f.name for f in target.parent.iterdir()] == ["part.parquet"]


def test_a_home_belongs_to_one_store(tmp_path, server, url, monkeypatch):
    home = machine(tmp_path / "here", url)
    bind(home.lakes, url + "/")
    with pytest.raises(ConfigError, match=r"here/lake is the working copy of s3://.*; set PROPENSITY_HOME"):
        bind(home.lakes, f"{url}2")
    with pytest.raises(ConfigError, match=r"is the working copy of s3://.* already"):
        move_lake(home.lakes, f"{url}2")
    other = Home(tmp_path / "other").ensure()
    for wrong in (str(tmp_path), "file:///somewhere", "bucket/lake", "ftp://bucket/lake"):
        with pytest.raises(ConfigError, match=r"must be the URL of an object store .*, like s3://BUCKET/PREFIX, got"):
            bind(other.lakes, wrong)
    with pytest.raises(ConfigError, match="The specified bucket does not exist; make the bucket first"):
        bind(other.lakes, "s3://nobodys-bucket/lake")
    with pytest.raises(ConfigError, match="the store cannot be opened"):
        bind(other.lakes, "gs://bucket/lake")  # its package is not installed
    assert not other.lakes.exists()
    monkeypatch.setenv("PROPENSITY_HOME", str(other.root))
    monkeypatch.setenv("PROPENSITY_LAKE", url)
    assert store_of(Home.from_environment().lakes).url == url
    monkeypatch.delenv("PROPENSITY_LAKE")
    assert store_of(Home.from_environment().lakes).url == url  # a home does not forget


def test_a_lake_is_moved_and_not_lost(tmp_path, url, monkeypatch):
    home = Home(tmp_path / "here").ensure()
    publish_table(version(1), home.lake("shop").partition("scores", "snapshot", DAY))
    publish_text("{}", home.lake("shop").document("raw_orders", "source.json"))
    with pytest.raises(ConfigError, match=f"holds a lake of its own; move it with `propensity move-lake {url}`"):
        bind(home.lakes, url)
    command = [sys.executable, "-m", "propensity_dagster.cli", "move-lake", url]
    environment = {**os.environ, "PROPENSITY_HOME": str(home.root), "PROPENSITY_LAKE": url}
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.startswith(f"2 files are in {url}")
    there = machine(tmp_path / "there", url).lake("shop")
    assert pq.read_table(there.partition("scores", "snapshot", DAY)).equals(version(1))
    publish_table(version(2), there.partition("scores", "snapshot", DAY))
    assert pq.read_table(home.lake("shop").partition("scores", "snapshot", DAY)).equals(version(2))
    other = Home(tmp_path / "other").ensure()
    publish_table(version(3), other.lake("shop").file("scores"))
    with pytest.raises(
        ConfigError, match=r"holds another lake, in which shop/raw_orders/source\.json is not what it is in"
    ):
        move_lake(other.lakes, url)
    publish_table(version(3), other.lake("shop").document("raw_orders", "source.json"))
    publish_table(version(3), other.lake("shop").partition("scores", "snapshot", DAY))
    with pytest.raises(ConfigError, match="holds another lake, in which shop/"):
        move_lake(other.lakes, url)
    assert pq.read_table(home.lake("shop").partition("scores", "snapshot", DAY)).equals(version(2))
    stray = home.lakes / "shop" / "stray" / "part.parquet"  # written by a run that did not know of the move yet
    stray.parent.mkdir()
    pq.write_table(version(5), stray)
    with pytest.raises(StorageError, match=r"stray/part\.parquet is not in s3://.*: it was written before the lake"):
        home.lake("shop").file("stray")
    assert move_lake(home.lakes, url) == 1
    assert pq.read_table(there.file("stray")).equals(version(5))


def test_a_replaced_version_whose_removal_was_refused_is_swept(tmp_path, url, monkeypatch):
    """Else a person who was erased would stay in it."""
    home = machine(tmp_path / "here", url)
    lake = home.lake("shop")
    publish_table(version(1), lake.file("scores"))
    with monkeypatch.context() as patch:
        patch.setattr(objects.ObjectStore, "_remove", lambda *_: (_ for _ in ()).throw(PermissionError("no")))
        with pytest.raises(StorageError, match="the store does not do what was asked: no"):
            publish_table(version(2), lake.file("scores"))
    assert len(objects_at(url)) == 4
    assert pq.read_table(lake.file("scores")).equals(version(2))
    assert lake.store.sweep() == 0
    assert len(objects_at(url)) == 2
    assert pq.read_table(lake.file("scores")).equals(version(2))


def test_features_of_event_logs_are_the_same(make_shop, tmp_path, url, engine):
    """Every stage from source to training set, on a lake of files and on one in the store."""
    rng = np.random.default_rng(0)
    days = [date(2024, 1, 1) + timedelta(days=int(d)) for d in np.sort(rng.integers(0, 50, 3000))]
    orders = [
        {"order_id": i, "customer_id": int(rng.integers(1, 200)), "ordered_at": f"{day}T12:00:00", "amount": 2.5 * i}
        | {"category": "toys"}
        for i, day in enumerate(days)
    ]
    customers = [
        {"customer_id": i, "signup_at": "2023-12-01T00:00:00", "age": i % 60, "country": "DE"} for i in range(1, 200)
    ]
    shop = make_shop(customers, orders)
    content = (
        shop.campaign.file.read_text()
        .replace("2024-12-31", "2024-02-19")
        .replace("horizon_days: 30", "horizon_days: 7")
    )
    shop.campaign.file.write_text(content + "snapshots: {every: 7d, train: 2, validate: 1, test: 1}\n")
    campaign = load_campaign(shop.campaign.file)
    homes = Home(tmp_path / "files"), machine(tmp_path / "store", url)
    said = [run_pipeline(campaign, home, engine) for home in homes]
    assert said[0] == said[1]
    assert require_equal_lakes(homes[0].lakes, homes[1].lakes) > 150


def test_a_campaign_runs_on_the_store_and_another_machine_goes_on(decisions, tmp_path, url):
    """Dagster from source to champion; then a person is erased on a machine that has never held the tables."""
    home = machine(tmp_path / "here", url)
    campaign = run_through_dagster(decisions.file, home)
    assert require_equal_lakes(decisions.home.lakes, home.lakes) >= 5
    other = Home(tmp_path / "there")
    shutil.copytree(home.root, other.root, ignore=shutil.ignore_patterns("lake"))
    bind(other.lakes, url)
    trained = pq.read_table(home.lake("past").existing("training_set"))
    key = trained[campaign.key][0].as_py()
    found = erase_person(str(key), [campaign], other, MlflowStore(other))
    assert {place.table for place in found.places} >= {"raw_decisions", "validated_decisions", "training_set"}
    assert find_person(str(key), [campaign], home, MlflowStore(home)).rows == 0
    left = pq.read_table(home.lake("past").existing("training_set"))
    assert left.num_rows == trained.num_rows - 1
    filesystem = fsspec.url_to_fs(url)[0]
    data = [place for place in objects_at(url) if "/training_set/" in place and place.endswith(".parquet")]
    (stored,) = [pq.read_table(pa.BufferReader(filesystem.cat_file(place))) for place in data]
    assert stored.equals(left)
