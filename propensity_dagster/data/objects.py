"""A lake whose files are in an object store, reached through fsspec; its folder in the home is a working copy of them.

A file goes to the store under a name of its own, `part.<stamp>-<checksum>.parquet`, and then a manifest which says that
it is whole: `part.<stamp>-<checksum>.parquet.manifest`. A file is what its newest manifest names. Data are never
overwritten, so a reader gets one version or the other and never parts of both; a writer that is killed leaves data
without a manifest, which nobody reads and a later writer removes. The copy of a version carries the version's stamp as
its time of change: whether it is still the newest is known without reading it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from propensity_dagster.errors import ConfigError, StorageError

MARKER = ".store.json"
_OBJECT = re.compile(r"(?P<stem>.+)\.(?P<stamp>\d{16})-(?P<checksum>[0-9a-f]{16})(?P<suffix>\.\w+)")
_MANIFEST = ".manifest"
_URL = re.compile(r"(s3|gs|az|abfss?)://.+")
AT_ONCE = 16
"""Files that travel at once: each waits for the store."""
_ATTEMPTS = 5
_ABANDONED = 24 * 3600 * 1_000_000
"""Microseconds after which data without a manifest are taken for those of a killed writer."""


@dataclass(frozen=True)
class _Version:
    """One version of a file.

    Attributes:
        file: the working copy's place.
        stamp: when it was published, in microseconds since 1970.
        checksum: the first letters of its SHA-256.
        data: its place in the store.
        size: in bytes.
        whole: whether it has a manifest.
    """

    file: Path
    stamp: int
    checksum: str
    data: str
    size: int
    whole: bool

    @property
    def is_here(self) -> bool:
        """Whether the working copy is of this version."""
        try:
            stat = self.file.stat()
        except FileNotFoundError:
            return False
        return (stat.st_size, stat.st_mtime_ns) == (self.size, self.stamp * 1000)


@dataclass(frozen=True)
class ObjectStore:
    """The files of all campaigns in an object store.

    Attributes:
        url: of the store, for fsspec: `s3://bucket/prefix`.
        folder: the working copy.
    """

    url: str
    folder: Path

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        import fsspec

        if not _URL.fullmatch(self.url):
            raise ConfigError(
                "PROPENSITY_LAKE must be the URL of an object store (s3, gs, az or abfs), like s3://BUCKET/PREFIX, "
                f"got {self.url!r}; a folder is given by PROPENSITY_HOME"
            )
        logging.getLogger("aiobotocore").setLevel(logging.WARNING)  # every process would tell where credentials are
        try:
            filesystem, root = fsspec.url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:
            what = f"PROPENSITY_LAKE={self.url}: the store cannot be opened: {error}"
            raise ConfigError(f"{what}; for s3:// pip install 'propensity_dagster[s3]'") from None
        except Exception as error:  # each store's package has its own
            raise ConfigError(f"PROPENSITY_LAKE={self.url}: the store cannot be opened: {error}") from None
        return filesystem, root.rstrip("/")

    def require(self) -> None:
        """Raise unless the store answers.

        Raises:
            ConfigError: for a protocol whose package is not installed, or a bucket that is not there.
            StorageError: when it cannot be reached, or refuses.
        """
        filesystem, root = self._opened
        with _store_errors(self.url):
            try:
                filesystem.find(f"{root}/{MARKER}")
            except FileNotFoundError as error:
                raise ConfigError(f"PROPENSITY_LAKE={self.url}: {error}; make the bucket first") from None

    def publish(self, temporary: Path, file: Path) -> None:
        """Make a finished local file the newest version of `file`. The caller renames it to `file` afterwards.

        Raises:
            StorageError: when the store cannot be reached or refuses. The version before is the newest then, unless
                only its removal was refused.
        """
        filesystem, _ = self._opened
        checksum = _checksum(temporary)
        with _store_errors(self.url):
            found = self._objects(file.parent, file.name)
            # Later than what it replaces, even if that was written by a machine whose clock is ahead.
            stamp = max([time.time_ns() // 1000, *(version.stamp + 1 for version in found)])
            size = temporary.stat().st_size
            name = f"{file.stem}.{stamp:016d}-{checksum[:16]}{file.suffix}"
            data = f"{self._place(file.parent)}/{name}"
            # An upload cut into parts leaves them behind when it is killed; the store must be told to drop those.
            filesystem.put_file(str(temporary), data)
            manifest = json.dumps({"file": name, "bytes": size, "sha256": checksum}, indent=1)
            filesystem.pipe_file(f"{data}{_MANIFEST}", manifest.encode())
            os.utime(temporary, ns=(stamp * 1000, stamp * 1000))
            for version in found:
                if version.whole or version.stamp < stamp - _ABANDONED:
                    self._remove(version)

    def bring(self, files: Sequence[Path]) -> None:
        """Bring the working copies of these files up to date.

        Raises:
            StorageError: when the store cannot be reached, a file cannot be had whole, or one is in the working copy
                and not in the store: it is nowhere else, so it is neither used nor removed.
        """
        if not files:
            return
        with _store_errors(self.url):
            if len(files) == 1:
                newest = self._newest(files[0].parent, files[0].name)
            else:
                newest = self._newest(Path(os.path.commonpath([file.parent for file in files])))
            stale = [(f, newest.get(f)) for f in files if not _is_current(f, newest.get(f))]
            if len(stale) == 1:
                self._bring(*stale[0])
            elif stale:
                with ThreadPoolExecutor(AT_ONCE) as pool:
                    list(pool.map(lambda one: self._bring(*one), stale))

    def files(self, folder: Path) -> list[Path]:
        """Where the working copies of all files below a folder are, or would be; sorted.

        Raises:
            StorageError: when the store cannot be reached.
        """
        with _store_errors(self.url):
            return sorted(self._newest(folder))

    def sweep(self) -> int:
        """Remove what killed writers left, and versions that were replaced. Returns how many are too young, and stay.

        Raises:
            StorageError: when the store cannot be reached or refuses.
        """
        staying = 0
        with _store_errors(self.url):
            objects = self._objects(self.folder)
            newest = _newest_of(objects)
            for version in objects:
                replaced = version.whole and newest[version.file] != version
                if replaced or (not version.whole and version.stamp < time.time_ns() // 1000 - _ABANDONED):
                    self._remove(version)
                elif not version.whole:
                    staying += 1
        for leftover in self.folder.rglob(".*.fetch"):
            remove_of_dead(leftover)
        return staying

    def lacking(self) -> list[Path]:
        """Local files of which the store does not have this very content under this stamp; sorted.

        Raises:
            StorageError: when the store cannot be reached.
        """
        with _store_errors(self.url):
            newest = self._newest(self.folder)
        return [file for file in _files_in(self.folder) if not _is_current(file, newest.get(file))]

    def strange(self) -> list[Path]:
        """Files that the store has and the folder has not, or with other content; sorted.

        Raises:
            StorageError: when the store cannot be reached.
        """
        with _store_errors(self.url):
            newest = self._newest(self.folder)
        return sorted(
            file for file, v in newest.items() if not (file.exists() and _checksum(file).startswith(v.checksum))
        )

    def _bring(self, file: Path, version: _Version | None) -> None:
        """A writer may publish another version, and remove this one, while it is being copied."""
        for _ in range(_ATTEMPTS):
            if version is not None and self._copied(version, file):
                return
            version = self._newest(file.parent, file.name).get(file)
            if _is_current(file, version):
                return
            if version is None:
                raise StorageError(
                    f"{file} is not in {self.url}: it was written before the lake was moved there, or removed there by "
                    f"hand; publish it with `propensity move-lake {self.url}`, or delete it"
                )
        raise StorageError(f"{self.url}: {file.relative_to(self.folder)} cannot be had whole: {version}")

    def _copied(self, version: _Version, file: Path) -> bool:
        filesystem, _ = self._opened
        file.parent.mkdir(parents=True, exist_ok=True)
        for leftover in file.parent.glob(f".{file.name}.*.fetch"):
            remove_of_dead(leftover)
        temporary = unfinished(file, "fetch")
        try:
            filesystem.get_file(version.data, str(temporary))
            if temporary.stat().st_size != version.size or not _checksum(temporary).startswith(version.checksum):
                return False
            os.utime(temporary, ns=(version.stamp * 1000, version.stamp * 1000))
            sync(temporary)
            later = file.exists() and file.stat().st_mtime_ns > version.stamp * 1000
            # Somebody published here meanwhile, or wrote into the copy by hand.
            if later and self._newest(file.parent, file.name).get(file) != version:
                return False
            os.replace(temporary, file)
        except FileNotFoundError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _newest(self, folder: Path, name: str | None = None) -> dict[Path, _Version]:
        return _newest_of(self._objects(folder, name))

    def _objects(self, folder: Path, name: str | None = None) -> list[_Version]:
        """All versions of the files below a folder, or of one file in it."""
        filesystem, root = self._opened
        found = filesystem.find(self._place(folder), detail=True)
        versions: list[_Version] = []
        for data, info in found.items():
            place, _, object_name = data.rpartition("/")
            named = _OBJECT.fullmatch(object_name)
            if named is None or (name is not None and named["stem"] + named["suffix"] != name):
                continue
            file = self.folder / place.removeprefix(root).strip("/") / (named["stem"] + named["suffix"])
            whole = f"{data}{_MANIFEST}" in found
            versions.append(_Version(file, int(named["stamp"]), named["checksum"], data, info["size"], whole))
        return versions

    def _remove(self, version: _Version) -> None:
        """The manifest goes first: nobody shall be sent to data that are gone."""
        filesystem, _ = self._opened
        for place in [*([f"{version.data}{_MANIFEST}"] if version.whole else []), version.data]:
            with suppress(FileNotFoundError):  # another writer of the same file was here
                filesystem.rm_file(place)

    def _place(self, folder: Path) -> str:
        return "/".join([self._opened[1], *folder.relative_to(self.folder).parts])


def bind(folder: Path, url: str) -> None:
    """Make a folder the working copy of a store, for good.

    Raises:
        ConfigError: when it is that of another store already, or a lake of its own: its files would be lost.
        StorageError: when the store cannot be reached.
    """
    url = url.rstrip("/")
    bound = store_of(folder)
    if bound is not None and bound.url != url:
        raise ConfigError(
            f"PROPENSITY_LAKE={url}: {folder} is the working copy of {bound.url}; set PROPENSITY_HOME to another folder"
        )
    if bound is None:
        if any(folder.glob("*/*")):
            raise ConfigError(
                f"PROPENSITY_LAKE={url}: {folder} holds a lake of its own; move it with `propensity move-lake {url}`, "
                "or set PROPENSITY_HOME to another folder"
            )
        ObjectStore(url, folder).require()
        _mark(folder, url)


def move_lake(folder: Path, url: str) -> int:
    """Publish every file of a local lake to a store, and make the folder its working copy. Nothing else may run.

    Interrupted, it is run again, and goes on: the folder is a lake of its own until the last file is there.

    Returns:
        The number of files.

    Raises:
        ConfigError: when the folder is bound to another store, or another lake is at the URL.
        StorageError: when the store cannot be reached or refuses.
    """
    store = ObjectStore(url.rstrip("/"), folder)
    bound = store_of(folder)
    if bound is not None and bound.url != store.url:
        raise ConfigError(f"{folder} is the working copy of {bound.url} already")
    store.require()
    if bound is None and (strange := store.strange()):
        raise ConfigError(
            f"{store.url} holds another lake, in which {strange[0].relative_to(folder)} is not what it is in {folder}; "
            "name a place of its own, or set PROPENSITY_HOME to a new folder to read that one"
        )
    there = set(store.files(folder)) if bound else set[Path]()
    moved = 0
    # Again, until nothing was written meanwhile. What a working copy only has of another version is not published.
    while lacking := [file for file in store.lacking() if file not in there]:
        for file in lacking:
            store.publish(file, file)
        moved += len(lacking)
    _mark(folder, store.url)
    return moved


def store_of(folder: Path) -> ObjectStore | None:
    """The store whose working copy a folder is; None for a lake of its own."""
    try:
        text = (folder / MARKER).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    return ObjectStore(json.loads(text)["url"], folder)


def store_above(file: Path) -> ObjectStore | None:
    """The store whose working copy a file lies in, if it does."""
    return next((store for folder in file.parents if (store := store_of(folder)) is not None), None)


def is_alive(pid: int) -> bool:
    """Whether a process of this machine is running."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def sync(path: Path) -> None:
    """Wait until a file, or what is in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _mark(folder: Path, url: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{MARKER}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps({"url": url}), encoding="utf-8")
    sync(temporary)
    os.replace(temporary, folder / MARKER)


def _newest_of(versions: Sequence[_Version]) -> dict[Path, _Version]:
    whole = [version for version in versions if version.whole]
    return {version.file: version for version in sorted(whole, key=lambda version: version.stamp)}


def unfinished(file: Path, suffix: str) -> Path:
    """Where this thread writes what is to become a file or a folder."""
    return file.with_name(f".{file.name}.{os.getpid()}-{threading.get_ident()}.{suffix}")


def remove_of_dead(leftover: Path) -> None:
    """Remove an unfinished file or folder whose writer is gone. Those of others who write it at this moment stay."""
    pid, _, thread = leftover.name.split(".")[-2].partition("-")
    if int(pid) == os.getpid():  # or a dead one had this number: in a container it often has
        lives = thread in {str(one.ident) for one in threading.enumerate()}
    else:
        lives = is_alive(int(pid))
    if lives:
        return
    if leftover.is_dir():
        shutil.rmtree(leftover, ignore_errors=True)
    else:
        leftover.unlink(missing_ok=True)


def _is_current(file: Path, version: _Version | None) -> bool:
    return not file.exists() if version is None else version.is_here


def _files_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))


def _checksum(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@contextmanager
def _store_errors(url: str) -> Generator[None]:
    """What the store's own package says, in one line."""
    try:
        yield
    except (ConfigError, StorageError):
        raise
    except Exception as error:  # of the operating system, of aiohttp, of botocore: they share no base
        raise StorageError(f"{url}: the store does not do what was asked: {' '.join(str(error).split())}") from None
