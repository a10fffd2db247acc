"""Releases: which packages of a campaign answer. Written by promotion, rollback, the nightly run and the operator."""

import json
import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from propensity_dagster.campaign import ROW_NUMBER, Campaign
from propensity_dagster.data.lake import Home, locked, publish_text
from propensity_dagster.errors import ConfigError, SavedModelError
from propensity_dagster.registry.store import ModelStore, Version
from propensity_dagster.serving.packages import PACKAGES, RELEASE, ReleaseFile, read_release_file
from propensity_dagster.serving.publish.packages import build_package

_KEPT_PACKAGES = 10

Mode = Literal["off", "shadow", "split"]
MODES: dict[str, Mode] = {"off": "off", "shadow": "shadow", "split": "split"}


@dataclass(frozen=True)
class ReleaseReport:
    """What is served now."""

    champion_version: str
    package: str
    challenger_version: str | None
    mode: str


def publish_release(campaign: Campaign, home: Home, store: ModelStore) -> ReleaseReport | None:
    """Let the champion answer, ranked in the newest population. None when there is no champion.

    A package of that version that is there already answers at once, before the new one is built: a rollback does not
    wait. A challenger of the rollout stays, unless it has become the champion.
    """
    with _alone(campaign, home):
        champion = store.champion(campaign.name)
        if champion is None:
            return None
        before = _present(campaign, home)
        ready = _newest_package(campaign, home, champion.version)
        if before is not None and ready is not None and version_of(before.champion) != champion.version:
            _write(campaign, home, _with_champion(before, ready))
        name = build_package(campaign, champion, home, store)
        release = _with_champion(before or ReleaseFile(name), name)
        if release.challenger is not None:
            challenger = store.version(campaign.name, version_of(release.challenger))
            release = msgspec.structs.replace(release, challenger=build_package(campaign, challenger, home, store))
        return _write(campaign, home, release)


def set_rollout(
    campaign: Campaign, home: Home, store: ModelStore, mode: Mode, share: float, version: str | None
) -> ReleaseReport:
    """Serve a challenger beside the champion, or stop it.

    Args:
        campaign: the campaign.
        home: where the release is.
        store: gives the challenger.
        mode: off, shadow (scored and logged, never answered) or split (answers `share` of the customers).
        share: of the customers, in split.
        version: the challenger; the registry's newest one when None.

    Raises:
        ConfigError: when there is no release, no such version, or the challenger is the champion.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"--share must be between 0 and 1, got {share}")
    if mode == "split" and campaign.key == ROW_NUMBER:
        raise ConfigError(f"{campaign.name}: a split needs customer ids, and the table has no key column")
    with _alone(campaign, home):
        release = _present(campaign, home)
        if release is None:
            raise ConfigError(f"{campaign.name}: nothing is served yet: train and promote a champion first")
        if mode == "off":
            return _write(campaign, home, ReleaseFile(release.champion))
        challenger = _challenger(campaign, store, version)
        if challenger.version == version_of(release.champion):
            raise ConfigError(f"{campaign.name}: version {challenger.version} is the champion; name another --version")
        name = build_package(campaign, challenger, home, store)
        # The salt belongs to the challenger: a new share moves only those whom it must.
        salt = f"{campaign.name}:{challenger.version}:"
        return _write(
            campaign, home, ReleaseFile(release.champion, name, mode, share if mode == "split" else 0.0, salt)
        )


def champion_version(campaign: str, home: Home) -> str | None:
    """The version that is served; None when none is."""
    folder = home.serving / campaign
    return version_of(read_release_file(folder).champion) if (folder / RELEASE).exists() else None


def version_of(package: str) -> str:
    """The version in a package's name."""
    return package.removeprefix("v").partition("-")[0]


def _with_champion(release: ReleaseFile, name: str) -> ReleaseFile:
    if release.challenger is not None and version_of(release.challenger) == version_of(name):
        return ReleaseFile(name)
    return msgspec.structs.replace(release, champion=name)


def _challenger(campaign: Campaign, store: ModelStore, version: str | None) -> Version:
    if version is not None:
        return store.version(campaign.name, version)
    found = [v for v in store.versions(campaign.name) if "champion" not in v.aliases]
    if not found:
        raise ConfigError(f"{campaign.name}: there is no version beside the champion; train one first")
    return found[-1]


def _present(campaign: Campaign, home: Home) -> ReleaseFile | None:
    folder = home.serving / campaign.name
    if not (folder / RELEASE).exists():
        return None
    try:
        return read_release_file(folder)
    except SavedModelError:  # it is written anew
        return None


def _newest_package(campaign: Campaign, home: Home, version: str) -> str | None:
    return next((path.name for path in reversed(_packages(campaign, home)) if version_of(path.name) == version), None)


def _packages(campaign: Campaign, home: Home) -> list[Path]:
    """Oldest first."""
    folder = home.serving / campaign.name / PACKAGES
    found = (path for path in folder.glob("v*-*") if path.is_dir())
    return sorted(found, key=lambda path: path.stat().st_mtime)


def _write(campaign: Campaign, home: Home, release: ReleaseFile) -> ReleaseReport:
    text = json.dumps(msgspec.to_builtins(release), indent=1)
    publish_text(text, home.serving / campaign.name / RELEASE)
    used = {release.champion, release.challenger}
    for path in [p for p in _packages(campaign, home) if p.name not in used][:-_KEPT_PACKAGES]:
        shutil.rmtree(path, ignore_errors=True)
    challenger = version_of(release.challenger) if release.challenger else None
    return ReleaseReport(version_of(release.champion), release.champion, challenger, release.mode)


def _alone(campaign: Campaign, home: Home) -> AbstractContextManager[None]:
    folder = home.serving / campaign.name
    folder.mkdir(parents=True, exist_ok=True)
    return locked(folder / ".lock")
