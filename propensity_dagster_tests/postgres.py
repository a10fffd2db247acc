"""A real Postgres server of one's own, on a free port, for the tests that need one."""

import os
import shutil
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from .served import free_port

PASSWORD = "correct-horse-battery"  # a test looks for it where it must never be


def binaries() -> Path | None:
    """Folder of initdb and pg_ctl, on the path or where Debian puts them."""
    found = shutil.which("initdb")
    if found:
        return Path(found).parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name))
    return folders[-1] if folders else None


def as_admin(address: str):
    """A connection to a server of ours, with its password."""
    import psycopg

    user, _, rest = address.partition("@")
    return psycopg.connect(f"postgresql://{user}:{PASSWORD}@{rest}", autocommit=True)


@contextmanager
def server(folder: Path) -> Generator[str]:
    """Start a server in `folder`; yields its URL without the password: user@host:port/database."""
    folder.mkdir(parents=True)
    pg = binaries()
    assert pg is not None
    (folder / "password").write_text(PASSWORD)
    prefix: list[str] = []
    if os.geteuid() == 0:  # the server refuses to run as root
        prefix = ["runuser", "-u", "nobody", "--"]
        for parent in [folder, *folder.parents]:
            if parent == Path("/tmp"):
                break
            parent.chmod(parent.stat().st_mode | 0o011)
        shutil.chown(folder, "nobody")
        shutil.chown(folder / "password", "nobody")
    port = free_port()

    def run(*command: str, check: bool = True) -> None:
        subprocess.run([*prefix, *command], check=check, capture_output=True, cwd=folder)

    data = str(folder / "data")
    run(str(pg / "initdb"), "-D", data, "-U", "propensity", "-A", "scram-sha-256", f"--pwfile={folder / 'password'}")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    run(str(pg / "pg_ctl"), "-D", data, "-o", options, "-l", str(folder / "log"), "-w", "start")
    try:
        yield f"propensity@127.0.0.1:{port}/postgres"
    finally:
        run(str(pg / "pg_ctl"), "-D", data, "-m", "immediate", "stop", check=False)
