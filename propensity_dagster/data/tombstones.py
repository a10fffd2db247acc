"""Who was erased: salted hashes, so that ingestion does not bring a person back and nobody can read who it was."""

import hashlib
import json
import re
import secrets
from typing import Any

import ibis

from propensity_dagster.data import coerce
from propensity_dagster.data.lake import Home, locked, publish_text

_FILE = "erased.json"


def same_key(text: str) -> str:
    """A key as the lake holds it: see `coerce.key_text`."""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", text.strip())


def bury(key: str, home: Home) -> None:
    """Remember a key as erased."""
    home.ensure()
    with locked(home.root / ".erased.lock"):
        salt, hashes = _read(home)
        salt = salt or secrets.token_hex(16)
        found = sorted({*hashes, _hash(salt, key)})
        publish_text(json.dumps({"salt": salt, "hashes": found}, indent=1), home.root / _FILE)


def is_buried(key: str, home: Home) -> bool:
    """Whether a key was erased."""
    salt, hashes = _read(home)
    return _hash(salt, key) in hashes


def without_erased(table: ibis.Table, key: str, home: Home) -> ibis.Table:
    """The rows of a source whose key, in this column, was not erased."""
    salt, hashes = _read(home)
    if not hashes:
        return table
    text = coerce.key_text(table[key])
    hashed: Any = (ibis.literal(salt) + text).hexdigest("sha256")
    return table.filter(text.isnull() | ~hashed.isin(hashes))


def _hash(salt: str, key: str) -> str:
    return hashlib.sha256(f"{salt}{key}".encode()).hexdigest()


def _read(home: Home) -> tuple[str, list[str]]:
    file = home.root / _FILE
    if not file.exists():
        return "", []
    content = json.loads(file.read_text(encoding="utf-8"))
    return content["salt"], content["hashes"]
