"""The reports folder over HTTP, so that Dagster's pages can link to ours: a browser follows no link to a file."""

import os
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from propensity_dagster.errors import ConfigError

URL = "PROPENSITY_REPORTS_URL"
"""Where the reports folder can be read; set it when a web server of yours shows the folder."""

DEFAULT_PORT = 3002


def report_url(*path: str) -> str:
    """Address of a file below the reports folder."""
    base = os.environ.get(URL) or f"http://127.0.0.1:{DEFAULT_PORT}"
    return "/".join([base.rstrip("/"), *path])


def serve_reports(folder: Path, port: int) -> str:
    """Show the folder on 127.0.0.1 from a thread that ends with the process; return the address.

    Raises:
        ConfigError: when the port is taken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), partial(_Quiet, directory=str(folder)))
    except OSError as error:
        raise ConfigError(f"--reports-port: port {port} cannot be used: {error.strerror}; choose another") from None
    Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: Dagster's log has the terminal."""
