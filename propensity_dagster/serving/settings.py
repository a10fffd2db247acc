"""What an operator may set: `settings.yaml` and `keys.json` of the serving folder, and the environment."""

import hashlib
import hmac
import ipaddress
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import yaml

from propensity_dagster.errors import ConfigError

SETTINGS, KEYS = "settings.yaml", "keys.json"

_PositiveInt = Annotated[int, msgspec.Meta(gt=0)]
_PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]
_VARIABLE = re.compile(r"\$\{(\w+)\}")


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`settings.yaml`; every key may be absent, and a change is seen without a restart.

    Attributes:
        default_campaign: whose answers the plain paths give; the first by name when None.
        max_body_bytes: longest body of one customer.
        max_batch_bytes: longest body of /predict_batch.
        max_concurrency: requests a worker has in hand at most; one more is answered 429 at once.
        timeout_seconds: how long a request may take, its body included.
        requests_per_second: sustained rate of one API key; a batch counts each of its rows.
        burst: how many requests (or rows) of one key may come at once.
        cors_origins: origins whose pages may call; none by default.
        online_store: None for the SQLite file, or redis://...; ${NAME} is taken from the environment.
        log_predictions: whether answers are logged.
    """

    default_campaign: str | None = None
    max_body_bytes: _PositiveInt = 65_536
    max_batch_bytes: _PositiveInt = 4_194_304
    max_concurrency: _PositiveInt = 512
    timeout_seconds: _PositiveFloat = 5.0
    requests_per_second: _PositiveFloat = 1_000.0
    burst: _PositiveInt = 2_000
    cors_origins: tuple[str, ...] = ()
    online_store: str | None = None
    log_predictions: bool = True


class ApiKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of `keys.json`. `slot` is its place in the table of rates, which workers share."""

    name: str
    sha256: str
    slot: Annotated[int, msgspec.Meta(ge=0, lt=4_096)]
    created: str = ""


@dataclass(frozen=True)
class Keys:
    """The API keys that are valid now. Without any, only this machine may call."""

    entries: tuple[ApiKey, ...] = ()

    def find(self, presented: bytes) -> ApiKey | None:
        """The entry of a key. The time it takes does not depend on the key.

        Keys are 256 random bits, so that a plain hash cannot be guessed back.
        """
        digest = hashlib.sha256(presented).hexdigest()
        found = None
        for entry in self.entries:  # no early exit
            if hmac.compare_digest(entry.sha256, digest):
                found = entry
        return found


def read_settings(folder: Path) -> Settings:
    """The settings of a serving folder.

    Raises:
        ConfigError: naming the file and the key that is wrong.
    """
    file = folder / SETTINGS
    if not file.exists():
        return Settings()
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        settings = msgspec.convert(content, Settings)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, msgspec.ValidationError) as error:
        raise ConfigError(f"{file}: {' '.join(str(error).split())}") from None
    if settings.online_store is None:
        return settings
    return msgspec.structs.replace(settings, online_store=_expanded(file, settings.online_store))


def read_keys(folder: Path) -> Keys:
    """The API keys of a serving folder; PROPENSITY_KEYS names another file.

    Raises:
        ConfigError: when the file is not one that `propensity key` wrote.
    """
    file = keys_file(folder)
    if not file.exists():
        return Keys()
    try:
        return Keys(msgspec.convert(json.loads(file.read_text(encoding="utf-8"))["keys"], tuple[ApiKey, ...]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: not a file of API keys: {error}") from None


def keys_file(folder: Path) -> Path:
    """Where the API keys are."""
    stated = os.environ.get("PROPENSITY_KEYS")
    return Path(stated) if stated else folder / KEYS


def is_loopback(address: str) -> bool:
    """Whether an IP address is this machine's own; a name is none."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def serving_folder() -> Path:
    """PROPENSITY_SERVING, else PROPENSITY_HOME/serving, else what a bento brings along, else ./.propensity/serving."""
    stated = os.environ.get("PROPENSITY_SERVING")
    if stated:
        return Path(stated).resolve()
    home = os.environ.get("PROPENSITY_HOME")
    if home:
        return Path(home).resolve() / "serving"
    return (_SOURCE if _in_bento() else Path.cwd()) / ".propensity" / "serving"


def predictions_folder() -> Path | None:
    """PROPENSITY_PREDICTIONS, else beside the serving folder of a home; None in a bento without either."""
    stated = os.environ.get("PROPENSITY_PREDICTIONS")
    if stated:
        return Path(stated).resolve()
    serving = serving_folder()
    return None if serving.is_relative_to(_SOURCE) and _in_bento() else serving.parent / "predictions"


_SOURCE = Path(__file__).parents[2]


def _in_bento() -> bool:
    return (_SOURCE.parent / "bento.yaml").exists()


def _expanded(file: Path, text: str) -> str:
    def value(match: re.Match[str]) -> str:
        name: str = match.group(1)
        if name not in os.environ:
            raise ConfigError(f"{file}: online_store: the environment variable {name} is not set")
        return os.environ[name]

    return _VARIABLE.sub(value, text)
