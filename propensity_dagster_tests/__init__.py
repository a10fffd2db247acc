"""The environment of the tests, set before anything is imported that reads it once."""

import os
import shutil
from pathlib import Path

_MEMORY, _ROOM = Path("/dev/shm"), 12 << 30

os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# Two workers that each start as many threads as there are cores wait for each other, spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Queries over a few rows end before Java's second compiler is done with them: half of Spark's time went to it.
os.environ.setdefault("SPARK_SUBMIT_OPTS", "-XX:TieredStopAtLevel=1")
# Every published file is synced to the disk, and a suite publishes hundreds of thousands: memory takes that at once.
if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > _ROOM:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_MEMORY))
