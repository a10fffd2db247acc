"""Rates of API keys, counted across the workers of one server in a small shared file."""

import mmap
import os
import struct
import time
from pathlib import Path

_SLOTS = 4_096
_MAX_COST = 1_000
_ROUNDING = 1e-6  # seconds; sums of intervals are not exact
_TIME = struct.Struct("d")


class RateLimit:
    """The generic cell rate algorithm (ITU-T I.371): per key one number, the time at which it is square again.

    Two workers may in the same microsecond read the same number; then one request too many passes.
    """

    def __init__(self, file: Path) -> None:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(handle, _SLOTS * _TIME.size)
            self._table = mmap.mmap(handle, _SLOTS * _TIME.size)
        finally:
            os.close(handle)

    def wait(self, slot: int, per_second: float, burst: int, cost: int = 1) -> float:
        """Seconds until `cost` requests may come; 0.0 when they may come now, and then they are counted."""
        now = time.monotonic()  # one clock for all processes of a machine
        depth = burst / per_second
        offset = slot * _TIME.size
        (square_at,) = _TIME.unpack_from(self._table, offset)
        if not 0 <= square_at - now <= depth + _MAX_COST / per_second:  # long ago, or of another boot or setting
            square_at = now
        later = square_at + cost / per_second
        # A batch larger than the burst passes once nothing is owed; it then owes for all its rows.
        if later - now > depth + _ROUNDING and square_at > now:
            return min(later - depth, square_at) - now
        _TIME.pack_into(self._table, offset, later)
        return 0.0
