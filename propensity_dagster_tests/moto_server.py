"""A real S3-compatible server, moto's, for tests and benchmarks of a lake in an object store."""

import os
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager

from propensity_dagster_tests.served import free_port, wait_until

BUCKET = "lakes"


@contextmanager
def object_server() -> Generator[tuple[dict[str, str], subprocess.Popen]]:
    """The environment that leads to a server with one bucket, and its process, which is gone afterwards."""
    import fsspec

    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    environment = {
        "AWS_ACCESS_KEY_ID": "anybody",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        # A server that is gone is noticed soon.
        "AWS_MAX_ATTEMPTS": "1",
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    try:
        wait_until(lambda: _makes_bucket(fsspec.filesystem("s3", skip_instance_cache=True)))
        yield environment, process
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _makes_bucket(filesystem) -> bool:
    try:
        filesystem.mkdir(BUCKET)
    except Exception:  # of botocore, while nobody listens
        return False
    return True
