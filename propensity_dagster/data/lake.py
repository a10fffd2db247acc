"""The home folder and its parquet lake. Belongs here: where files are and how they are published.

Every write goes to a temporary name in the same folder, is synced and renamed: readers see the old file or
the new one, and a killed writer leaves a hidden temporary file that the next writer of that place removes.
Where the lake is in an object store, its folder is a working copy, which this module keeps up to date: see objects.py.
"""

import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from propensity_dagster.data.objects import (
    ObjectStore,
    bind,
    is_alive,
    remove_of_dead,
    store_above,
    store_of,
    sync,
    unfinished,
)
from propensity_dagster.errors import ConfigError, DataContractError, StorageError

ROW_GROUP = 131_072
LAKE = "PROPENSITY_LAKE"
UNPLACED = "unplaced"
"""Partition of an event log for rows whose day cannot be read or lies outside the calendar."""


@dataclass(frozen=True)
class Home:
    """PROPENSITY_HOME: everything the system writes lies below `root`."""

    root: Path

    @classmethod
    def from_environment(cls) -> "Home":
        """The folder named by PROPENSITY_HOME, else ./.propensity; its lake in the store of PROPENSITY_LAKE, if any.

        Raises:
            ConfigError: when its lake is elsewhere.
            StorageError: when the store cannot be reached.
        """
        home = cls(Path(os.environ.get("PROPENSITY_HOME") or ".propensity").resolve())
        url = os.environ.get(LAKE)
        if url:
            bind(home.ensure().lakes, url)
        return home

    def ensure(self) -> "Home":
        """Create the folder and prove that it can be written.

        Raises:
            StorageError: when it cannot.
        """
        probe = self.root / f".probe-{os.getpid()}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise StorageError(
                f"{self.root}: the home folder must be a folder that can be written to: {error.strerror}; "
                "mend that, or set PROPENSITY_HOME to another folder"
            ) from None
        return self

    def lake(self, campaign: str) -> "Lake":
        """The tables of one campaign."""
        return Lake(self.lakes / campaign, store_of(self.lakes))

    @property
    def lakes(self) -> Path:
        """Folder of the tables of all campaigns, or of their working copy."""
        return self.root / "lake"

    def campaigns(self) -> set[str]:
        """Names of the campaigns that have tables."""
        store = store_of(self.lakes)
        files = store.files(self.lakes) if store else self.lakes.glob("*/*")
        return {file.relative_to(self.lakes).parts[0] for file in files}

    def reports(self, campaign: str) -> Path:
        """Folder of the evaluation, its curves and plots."""
        return self.root / "reports" / campaign

    def candidates(self, campaign: str) -> Path:
        """Folder of the models of the newest training run, one folder each."""
        return self.root / "candidates" / campaign

    @property
    def serving(self) -> Path:
        """Folder of what is served: releases, settings, API keys."""
        return self.root / "serving"

    @property
    def predictions(self) -> Path:
        """Folder of the log of answers."""
        return self.root / "predictions"

    @property
    def synthetic(self) -> Path:
        """Folder of generated worlds."""
        return self.root / "synthetic"


@dataclass(frozen=True)
class Lake:
    """The tables of one campaign: `<table>/day=2025-01-31/part.parquet`, one file per partition.

    `column` is the partition's name: "day" for event logs, "snapshot" for snapshots.

    Whatever names a file here brings it up to date first, where `root` is the working copy of a store.
    """

    root: Path
    store: ObjectStore | None = None

    def file(self, table: str) -> Path:
        """File of a table without partitions."""
        return self._current(self.root / table / "part.parquet")

    def partition(self, table: str, column: str, value: date | str) -> Path:
        """File of one partition."""
        return self._current(self.target(table, column, value))

    def target(self, table: str, column: str, value: date | str) -> Path:
        """Where one partition is to be published: what is there now is of no interest."""
        return self.root / table / f"{column}={value}" / "part.parquet"

    def document(self, *place: str) -> Path:
        """File beside the tables, by its folders and name."""
        return self._current(self.root.joinpath(*place))

    def partitions(self, table: str, column: str) -> list[date]:
        """Dates of the partitions that exist, ascending."""
        found = (path.parent.name.partition("=") for path in self._listed(f"{table}/{column}=*/part.parquet"))
        return sorted(date.fromisoformat(value) for _, _, value in found if value != UNPLACED)

    def glob(self, pattern: str) -> list[Path]:
        """Files that match a pattern of as many parts as their place below `root`, sorted."""
        return self._all_current(self._listed(pattern))

    def tables(self) -> list[str]:
        """Names of the folders of tables that exist, sorted."""
        files = self.store.files(self.root) if self.store else self.root.glob("*/*")
        return sorted({file.relative_to(self.root).parts[0] for file in files})

    def files_of(self, table: str) -> list[Path]:
        """Parquet files of a table, all partitions, sorted."""
        folder = self.root / table
        files = self.store.files(folder) if self.store else folder.rglob("*.parquet")
        return self._all_current(sorted(file for file in files if file.suffix == ".parquet"))

    def existing(self, table: str) -> Path:
        """File of a table without partitions.

        Raises:
            DataContractError: when it has not been published yet.
        """
        return _existing(self.file(table), table)

    def existing_partition(self, table: str, column: str, value: date | str) -> Path:
        """File of one partition.

        Raises:
            DataContractError: when it has not been published yet.
        """
        return _existing(self.partition(table, column, value), f"{table} {column}={value}")

    def existing_partitions(self, table: str, column: str, values: Sequence[date | str]) -> list[Path]:
        """Files of those partitions that exist."""
        files = self._all_current([self.target(table, column, value) for value in values])
        return [file for file in files if file.exists()]

    def existing_days(self, table: str, days: Sequence[date]) -> list[Path]:
        """Files of these days.

        Raises:
            DataContractError: naming the missing days; a gap would silently lower every count.
        """
        files = self._all_current([self.target(table, "day", day) for day in days])
        missing = [day for day, file in zip(days, files, strict=True) if not file.exists()]
        if missing:
            some = ", ".join(map(str, missing[:3])) + (" ..." if len(missing) > 3 else "")
            raise DataContractError(
                f"{table}: {len(missing)} of {len(days)} days from {days[0]} to {days[-1]} have not been "
                f"ingested: {some}. Materialize {table} for them first"
            )
        return files

    def _listed(self, pattern: str) -> list[Path]:
        if self.store is None:
            return sorted(self.root.glob(pattern))
        certain = next((i for i, part in enumerate(Path(pattern).parts) if "*" in part), -1)
        folder = self.root.joinpath(*Path(pattern).parts[:certain])
        return [file for file in self.store.files(folder) if file.relative_to(self.root).match(pattern)]

    def _current(self, file: Path) -> Path:
        return self._all_current([file])[0]

    def _all_current(self, files: list[Path]) -> list[Path]:
        if self.store is not None:
            self.store.bring(files)
        return files


def _existing(file: Path, what: str) -> Path:
    if not file.exists():
        raise DataContractError(f"{what} has not been materialized yet: there is no {file}")
    return file


@contextmanager
def publishing(file: Path) -> Generator[Path]:
    """Yield a temporary path; on success sync it and rename it to `file`, else remove it.

    Raises:
        StorageError: when the disk is full or not writable; `file` is then unchanged. Or when the store of the lake
            refuses: see `ObjectStore.publish`.
    """
    temporary = unfinished(file, "tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        for leftover in file.parent.glob(f".{file.name}.*.tmp"):  # of a killed writer
            remove_of_dead(leftover)
        yield temporary
        sync(temporary)
        store = store_above(file)
        if store is not None:
            store.publish(temporary, file)
        os.replace(temporary, file)
        sync(file.parent)
    except OSError as error:
        raise StorageError(f"{file}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def publishing_folder(folder: Path) -> Generator[Path]:
    """Yield a temporary folder; on success it takes the place of `folder`, else it is removed."""
    staging, retired = unfinished(folder, "tmp"), unfinished(folder, "old")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for leftover in [
            *folder.parent.glob(f".{folder.name}.*.tmp"),
            *folder.parent.glob(f".{folder.name}.*.old"),
        ]:
            remove_of_dead(leftover)
        staging.mkdir()
        yield staging
        for path in [*staging.rglob("*"), staging]:
            sync(path)
        if folder.exists():
            os.replace(folder, retired)
        os.replace(staging, folder)
        sync(folder.parent)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)


@contextmanager
def scratch_folder(what: str, place: Path | None = None) -> Generator[Path]:
    """A folder for one process, in `place` or where temporary files go; gone afterwards.

    Those of killed processes of this machine go too: they may hold gigabytes.

    Raises:
        StorageError: when it cannot be made.
    """
    place = place or Path(tempfile.gettempdir())
    mine = f"propensity-{what}-{socket.gethostname()}-"
    try:
        place.mkdir(parents=True, exist_ok=True)
        for leftover in place.glob(f"{mine}*"):
            if not is_alive(int(leftover.name.removeprefix(mine).partition("-")[0])):
                shutil.rmtree(leftover, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{mine}{os.getpid()}-", dir=place))
    except OSError as error:
        raise StorageError(f"{place}: cannot be written: {error.strerror}") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish_table(table: pa.Table, file: Path) -> None:
    """Write one Arrow table as one parquet file. Equal tables give equal bytes."""
    with publishing(file) as temporary:
        write_parquet(table, temporary)


def version_of(file: Path) -> tuple[int, int]:
    """Size and time of change: they differ from what they were whenever a file has been published anew."""
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of a small table; none before it has been published."""
    return pq.read_table(file).to_pylist() if file.exists() else []


def write_parquet(table: pa.Table, file: Path) -> None:
    """Write one Arrow table with the lake's compression and row groups."""
    pq.write_table(table, file, compression="zstd", row_group_size=ROW_GROUP)


def publish_text(text: str, file: Path) -> None:
    """Write one text file."""
    with publishing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def locked(file: Path) -> Generator[None]:
    """Hold the lock of a file, which is created; another process waits."""
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield  # closing the file gives the lock back


def require_folder(path: Path, what: str) -> Path:
    """Return `path` if it is a folder.

    Raises:
        ConfigError: when it is not.
    """
    if not path.is_dir():
        raise ConfigError(f"{what}: there is no folder {path}")
    return path
