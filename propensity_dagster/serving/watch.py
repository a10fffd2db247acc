"""What a worker serves now, and the thread that keeps it so: releases, settings, keys and online features.

A change on disk is seen within a quarter of a second, loaded beside what serves, verified, and put in its place by
one assignment. What cannot be loaded is refused and told; the last good one stays.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from propensity_dagster.errors import ConfigError, PropensityError
from propensity_dagster.serving.online import FILE, OnlineStore, RedisStore, open_sqlite
from propensity_dagster.serving.packages import RELEASE, Package, Release, load_release
from propensity_dagster.serving.settings import SETTINGS, Keys, Settings, keys_file, read_keys, read_settings

logger = logging.getLogger("propensity.serving")

POLL_SECONDS = 0.25

_Stamp = tuple[int, int, int] | None


@dataclass
class State:
    """Everything a request reads. Each attribute is replaced as a whole, never changed."""

    settings: Settings = field(default_factory=Settings)
    keys: Keys = field(default_factory=Keys)
    releases: dict[str, Release] = field(default_factory=dict[str, Release])
    stores: dict[str, OnlineStore] = field(default_factory=dict[str, OnlineStore])
    refused: dict[str, str] = field(default_factory=dict[str, str])
    refusals: dict[str, int] = field(default_factory=dict[str, int])

    @property
    def default_campaign(self) -> str | None:
        """Whose answers the plain paths give."""
        return self.settings.default_campaign or min(self.releases, default=None)


class Watcher:
    """Loads a serving folder, and again whatever changes in it."""

    def __init__(self, folder: Path, default_campaign: str | None = None) -> None:
        self.state = State()
        self._folder = folder
        self._default = default_campaign
        self._stamps: dict[str, _Stamp] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)

    def start(self) -> None:
        """Load what is there, then watch."""
        self.look()
        if not self.state.releases:
            logger.warning(
                "%s: nothing has been released yet; the service answers 503 until a campaign is", self._folder
            )
        self._thread.start()

    def stop(self) -> None:
        """Stop watching."""
        self._stopping.set()
        self._thread.join()

    def look(self) -> None:
        """Load what has changed since the last look."""
        self._if_changed("settings", self._folder / SETTINGS, self._load_settings)
        self._if_changed("keys", keys_file(self._folder), self._load_keys)
        for file in sorted(self._folder.glob(f"*/{RELEASE}")):
            self._if_changed(f"release of {file.parent.name}", file, lambda f=file.parent: self._load_release(f))
        for name in self.state.releases:
            self._open_store(name)

    def _run(self) -> None:
        while not self._stopping.wait(POLL_SECONDS):
            try:
                self.look()
            except Exception as error:  # whatever it is, the watcher goes on
                logger.error("watching %s: %s", self._folder, type(error).__name__)

    def _if_changed(self, what: str, file: Path, load: Callable[[], None]) -> None:
        stamp = _stamp(file)
        if what in self._stamps and self._stamps[what] == stamp:
            return
        self._stamps[what] = stamp
        state = self.state
        try:
            load()
        except PropensityError as error:
            state.refused = {**state.refused, what: str(error)}
            state.refusals = {**state.refusals, what: state.refusals.get(what, 0) + 1}
            logger.error("refused, the last good one stays: %s", error)
        else:
            state.refused = {k: v for k, v in state.refused.items() if k != what}

    def _load_settings(self) -> None:
        settings = read_settings(self._folder)
        if self._default:
            settings = msgspec.structs.replace(settings, default_campaign=self._default)
        if settings.online_store != self.state.settings.online_store:
            self.state.stores = {}
            self._stamps = {k: v for k, v in self._stamps.items() if not k.startswith("online")}
        self.state.settings = settings

    def _load_keys(self) -> None:
        self.state.keys = read_keys(self._folder)

    def _load_release(self, folder: Path) -> None:
        before = self.state.releases.get(folder.name)
        known: list[Package] = before.packages if before else []
        release = load_release(folder, known)
        _ = release.positions  # computed here, not by the first request
        for package in release.packages:
            _ = package.codes, package.reference
        self.state.releases = {**self.state.releases, folder.name: release}
        versions = ", ".join(f"version {p.version} ({p.name})" for p in release.packages)
        logger.info("%s: serving %s, mode %s", folder.name, versions, release.file.mode)

    def _open_store(self, name: str) -> None:
        url = self.state.settings.online_store
        if url is not None:
            if name not in self.state.stores:
                self._add_store(name, _open_redis(url, name))
            return
        file = self._folder / name / FILE
        if file.exists():
            self._if_changed(f"online features of {name}", file, lambda: self._add_store(name, open_sqlite(file)))

    def _add_store(self, name: str, store: OnlineStore) -> None:
        self.state.stores = {**self.state.stores, name: store}


def _open_redis(url: str, name: str) -> Any:
    try:
        return RedisStore(url, name)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{SETTINGS}: online_store: {error}") from None


def _stamp(file: Path) -> _Stamp:
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ino, stat.st_size
