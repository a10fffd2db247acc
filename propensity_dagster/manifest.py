"""Checksums of a folder: `manifest.json` lists the SHA-256 of every other file. Standard library only.

The batch side and the serving worker, which has few packages, verify folders with the same code.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from propensity_dagster.errors import SavedModelError

MANIFEST = "manifest.json"


def write_manifest(folder: Path, form: int) -> None:
    """List the checksum of every file of `folder` (subfolders too) in its manifest; `form` numbers the format."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    checksums = {str(p.relative_to(folder)): _checksum(p) for p in files}
    manifest = json.dumps({"format": form, "sha256": checksums}, indent=1, sort_keys=True)
    (folder / MANIFEST).write_text(manifest, encoding="utf-8")


def read_verified(folder: Path, form: int, name: str) -> dict[str, Any]:
    """The JSON file `name` of a folder, after every checksum was verified.

    Raises:
        SavedModelError: when a file is missing, cut short or changed, or the format is unknown.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != form:
            raise SavedModelError(f"{folder}: format {manifest['format']} is unknown; this version reads {form}")
        for file, expected in manifest["sha256"].items():
            if _checksum(folder / file) != expected:
                raise SavedModelError(f"{folder / file}: checksum differs: the file was cut short or changed")
        if name not in manifest["sha256"]:
            raise SavedModelError(f"{folder}: not a complete saved model: the manifest does not list {name}")
        content: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    except OSError as error:
        raise SavedModelError(f"{folder}: not a complete saved model: {error.filename}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SavedModelError(f"{folder}: not a saved model: {error!r}") from None
    return content


def folder_identity(folder: Path) -> str:
    """A short content hash: equal folders have equal identities."""
    return _checksum(folder / MANIFEST)[:16]


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
