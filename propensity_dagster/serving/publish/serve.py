"""What `propensity serve` starts, after what would go wrong later has been told."""

import logging
import socket
import sys

from propensity_dagster.data.lake import Home
from propensity_dagster.errors import ConfigError
from propensity_dagster.serving.packages import RELEASE
from propensity_dagster.serving.settings import is_loopback, read_keys, read_settings

logger = logging.getLogger(__name__)


def preferred_campaign(home: Home, preferred: str) -> str | None:
    """`preferred` if it is served and the settings name no default; they would not be looked at any more."""
    stated = read_settings(home.serving).default_campaign
    return preferred if stated is None and (home.serving / preferred / RELEASE).exists() else None


def serving_command(home: Home, default_campaign: str | None, host: str, port: int) -> list[str]:
    """The command of the service.

    Raises:
        ConfigError: for broken settings or keys, a campaign that has no release, an address that cannot be had, or
            one beyond this machine without an API key.
    """
    read_settings(home.serving)
    keys = read_keys(home.serving)
    released = sorted(file.parent.name for file in home.serving.glob(f"*/{RELEASE}"))
    if default_campaign is not None and default_campaign not in released:
        raise ConfigError(
            f"{default_campaign}: there is no champion to serve; served are {', '.join(released) or 'none'}: "
            f"run propensity demo {default_campaign}, or its training job"
        )
    if not released:
        logger.warning("there is no champion yet: the service answers 503 until one is promoted")
    if not keys.entries and host != "localhost" and not is_loopback(host):
        raise ConfigError(f"--host {host} is open to other machines: make an API key first: propensity key add NAME")
    _require_free(host, port)
    # `python -m` and not the script: a virtual environment need not be activated.
    service = "propensity_dagster.serving.service:Propensity"
    return [sys.executable, "-m", "bentoml", "serve", service, "--host", host, "--port", str(port)]


def _require_free(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(f"{host}:{port} cannot be had: {error.strerror}; choose another with --port") from None
