"""API keys of the service: made here, kept as hashes. The file is replaced whole; workers see it within a second."""

import hashlib
import json
import re
import secrets
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from propensity_dagster.data.lake import publish_text
from propensity_dagster.errors import ConfigError
from propensity_dagster.serving.settings import ApiKey, keys_file, read_keys

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def add_key(folder: Path, name: str) -> str:
    """Make a key and return it; it is shown once and kept nowhere.

    Raises:
        ConfigError: for a name that is taken or not a plain word.
    """
    entries = list(read_keys(folder).entries)
    if not _NAME.fullmatch(name):
        raise ConfigError(f"a key's name must be 1 to 64 letters, digits, '.', '_' or '-', got {name!r}")
    if any(entry.name == name for entry in entries):
        raise ConfigError(f"there is a key {name!r} already; to rotate it, add another, change callers, then remove it")
    key = f"pk_{secrets.token_urlsafe(32)}"
    slot = min(set(range(len(entries) + 1)) - {entry.slot for entry in entries})
    created = datetime.now(UTC).isoformat(timespec="seconds")
    entries.append(ApiKey(name, hashlib.sha256(key.encode()).hexdigest(), slot, created))
    _write(folder, entries)
    return key


def remove_key(folder: Path, name: str) -> None:
    """Make a key worthless.

    Raises:
        ConfigError: when there is none of that name.
    """
    entries = read_keys(folder).entries
    kept = [entry for entry in entries if entry.name != name]
    if len(kept) == len(entries):
        known = ", ".join(entry.name for entry in entries) or "none"
        raise ConfigError(f"there is no key {name!r}; there are {known}")
    _write(folder, kept)


def _write(folder: Path, entries: list[ApiKey]) -> None:
    content = {"keys": [msgspec.to_builtins(entry) for entry in entries]}
    file = keys_file(folder)
    publish_text(json.dumps(content, indent=1), file)
    file.chmod(0o600)
