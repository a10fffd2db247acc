"""The holdout: customers who are not contacted for a while, so that contacts can be compared with them.

A register says of every customer who was ever scored whether they are held, and until when. Customers who are new to
it, or whose time is over, are drawn in one batch a snapshot: within each stratum (tenth of the score, and the
campaign's `strata`) the share is exact but for one customer, by the order of a hash that is salted with the campaign's
name. So the holdout is balanced on the score, keeps its members whatever a later night scores them, and two campaigns'
are independent. Belongs here: the draw and its register. Does not: what is compared, which is the readout's.
"""

from datetime import date, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from propensity_dagster.campaign import Campaign
from propensity_dagster.data.days import pc
from propensity_dagster.data.lake import Home, Lake, locked, publish_table
from propensity_dagster.evaluation.splits import hash_fractions

HOLDOUT = "holdout"
_SCHEMA = [("held", pa.bool_()), ("stratum", pa.string()), ("since", pa.date32()), ("until", pa.date32())]


def hold_out(
    campaign: Campaign, snapshot: date, keys: pa.Array, strata: NDArray[np.object_], home: Home, *, keep: bool
) -> NDArray[np.bool_]:
    """Who is held (n,) on this snapshot.

    Args:
        campaign: gives the share, how long a customer stays, and the salt.
        snapshot: from which on new customers are drawn.
        keys: of all scored customers (n,), each once.
        strata: the stratum of each (n,), used for those who are drawn now.
        home: where the register is.
        keep: whether the draw is written down; a plan that only looks does not.
    """
    lake = home.lake(campaign.name)
    if not keep:
        return _drawn(campaign, snapshot, keys, strata, _register(campaign, lake))[0]
    lake.root.mkdir(parents=True, exist_ok=True)
    with locked(lake.root / ".holdout.lock"):
        register = _register(campaign, lake)
        held, renewed = _drawn(campaign, snapshot, keys, strata, register)
        if renewed.num_rows:
            others = register.filter(
                pc.invert(pc.is_in(register[campaign.key], renewed[campaign.key].combine_chunks()))
            )
            table = pa.concat_tables([others, renewed]).sort_by(campaign.key)
            publish_table(table, lake.file(HOLDOUT))
    return held


def _register(campaign: Campaign, lake: Lake) -> pa.Table:
    file = lake.file(HOLDOUT)
    return pq.read_table(file) if file.exists() else pa.schema([(campaign.key, pa.string()), *_SCHEMA]).empty_table()


def _drawn(
    campaign: Campaign, snapshot: date, keys: pa.Array, strata: NDArray[np.object_], register: pa.Table
) -> tuple[NDArray[np.bool_], pa.Table]:
    """Who is held (n,), and the rows that are new to the register."""
    at: Any = pc.index_in(keys, register[campaign.key].combine_chunks())
    until: Any = register["until"].combine_chunks().take(at)
    known = np.asarray(pc.fill_null(pc.greater(until, pa.scalar(snapshot)), False).to_numpy(zero_copy_only=False))
    held = np.asarray(pc.fill_null(register["held"].combine_chunks().take(at), False).to_numpy(zero_copy_only=False))
    held = held & known
    fresh = np.flatnonzero(~known)
    held[fresh] = _draw(campaign, snapshot, keys.take(pa.array(fresh)), strata[fresh])
    n, last = len(fresh), snapshot + timedelta(days=campaign.holdout.keep_days)
    renewed = pa.table(
        {
            campaign.key: keys.take(pa.array(fresh)),
            "held": pa.array(held[fresh]),
            "stratum": pa.array(strata[fresh], pa.string()),
            "since": pa.repeat(pa.scalar(snapshot, pa.date32()), n),
            "until": pa.repeat(pa.scalar(last, pa.date32()), n),
        }
    )
    return held, renewed


def _draw(campaign: Campaign, snapshot: date, keys: pa.Array, strata: NDArray[np.object_]) -> NDArray[np.bool_]:
    """In each stratum of m customers the first floor(share x m + u) of the hash's order, u uniform: everybody has the
    same chance, however small the stratum (systematic sampling; Madow and Madow 1944).
    """
    salt = f"holdout:{campaign.name}:{snapshot}"
    order_of = hash_fractions(keys.to_pylist(), salt)
    names, member = np.unique(strata.astype(str), return_inverse=True)
    shift = hash_fractions(names.tolist(), f"{salt}:stratum")
    held = np.zeros(len(order_of), dtype=bool)
    order = np.lexsort((order_of, member))
    sizes = np.bincount(member, minlength=len(names))
    wanted = np.floor(campaign.holdout.fraction * sizes + shift).astype(np.int64)
    place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # within the stratum
    held[order[place < np.repeat(wanted, sizes)]] = True
    return held
