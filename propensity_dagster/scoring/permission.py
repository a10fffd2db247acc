"""Who may be contacted, and how: consent and suppression as they stand now, and how often somebody was contacted.

What cannot be read permits nobody: a register that is missing or stale is an error, and nothing goes out. Belongs here:
what forbids a contact. Does not: what makes one worth its cost.
"""

# Ibis does not type the arithmetic of columns.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from typing import Any, Literal

import ibis
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from propensity_dagster.campaign import Campaign
from propensity_dagster.campaign_sections import Consent
from propensity_dagster.data import coerce
from propensity_dagster.data.days import pc
from propensity_dagster.data.engine import Engine
from propensity_dagster.data.lake import Home
from propensity_dagster.data.sources import read_register
from propensity_dagster.errors import ConfigError, DataContractError
from propensity_dagster.scoring.audiences import AUDIENCE, contacted_keys

Flags = NDArray[np.bool_]

_EVERY_CHANNEL = ("all", "any", "*")


@dataclass(frozen=True)
class Permission:
    """Which customer may be contacted through which channel (n, C), and why others may not: customers by reason."""

    allowed: Flags
    excluded: dict[str, int] = field(default_factory=dict[str, int])

    def without(self, rows: Flags, reason: str) -> "Permission":
        """The same, but for customers (n,) or contacts (n, C) that may not be for this reason."""
        allowed = self.allowed & ~(rows if rows.ndim == 2 else rows[:, None])
        lost = int((self.allowed.any(axis=1) & ~allowed.any(axis=1)).sum())
        return Permission(allowed, {**self.excluded, reason: lost})


def require_consent(campaign: Campaign) -> Consent | Literal["not_required"]:
    """What the campaign says of consent.

    Raises:
        ConfigError: when it says nothing: then nobody is contacted.
    """
    consent = campaign.contacts.consent
    if consent is None:
        raise ConfigError(
            f"{campaign.file}: contacts.consent is not set, so nobody is contacted: name the table of consents, such "
            "as {table: consents, granted: granted}, or write 'not_required' if the law asks for none"
        )
    return consent


def permission(
    campaign: Campaign, keys: pa.Array, channels: Sequence[str], home: Home, engine: Engine, now: datetime
) -> Permission:
    """What consent and suppression say of customers (n,) at this moment.

    Args:
        campaign: names the registers.
        keys: of the customers, as text.
        channels: names of the C ways to contact them.
        home: of the source, where it is synthetic.
        engine: reads the registers.
        now: against which the age of the consents is judged, UTC.

    Raises:
        ConfigError: when `contacts.consent` is not set, or a register lacks a table or column.
        DataContractError: when the consents are stale, or there is none.
        SourceError: when a register cannot be read.
    """
    consent = require_consent(campaign)
    found = Permission(np.ones((len(keys), len(channels)), dtype=bool))
    if consent != "not_required":
        found = found.without(~_granted(campaign, consent, keys, channels, home, engine, now), "no consent")
    for i, register in enumerate(campaign.contacts.suppression):
        where = f"contacts.suppression.{i}"
        listed = read_register(campaign, where, register, {"key": register.key or campaign.key}, home, engine)
        text = coerce.key_text(listed.key)
        lost = int(engine.arrow(listed.aggregate(n=coerce.lost(listed.key, text).sum()))["n"][0].as_py() or 0)
        if lost:
            raise DataContractError(
                f"{campaign.file}: {where}: {lost:,} keys of table {register.table!r} cannot be read as keys: whom "
                "they are about is not known, and nobody is contacted"
            )
        table = engine.arrow(listed.select(key=text).filter(ibis._.key.notnull()).distinct())
        suppressed = pc.is_in(keys, table["key"].combine_chunks()).to_numpy(zero_copy_only=False)
        found = found.without(np.asarray(suppressed), f"listed in {register.table}")
    return found


def contacted_often(campaign: Campaign, snapshot: date, keys: pa.Array, home: Home) -> Flags:
    """Who had as many contacts (n,) in the days before the snapshot as `contacts.at_most` allows.

    Held customers who would have been contacted count as if they had been: else they would be chosen more often than
    those they are compared with. Other campaigns' count only where they were made.
    """
    cap = campaign.contacts.at_most
    if cap is None:
        return np.zeros(len(keys), dtype=bool)
    counts = np.zeros(len(keys), dtype=np.int64)
    first = snapshot - timedelta(days=cap.days)
    for name in (campaign.name, *cap.campaigns):
        mine = name == campaign.name
        lake = home.lake(name)
        for day in lake.partitions(AUDIENCE, "snapshot"):
            # Another campaign may have contacted somebody this very night.
            if not first < day < (snapshot if mine else snapshot + timedelta(days=1)):
                continue
            contacted = contacted_keys(lake, day, with_held=mine)
            at: Any = pc.index_in(contacted, keys)
            counts += np.bincount(at.drop_null().to_numpy(), minlength=len(keys))
    return counts >= cap.contacts


def _granted(
    campaign: Campaign,
    consent: Consent,
    keys: pa.Array,
    channels: Sequence[str],
    home: Home,
    engine: Engine,
    now: datetime,
) -> Flags:
    """Consents (n, C). The newest row of a customer and channel counts; of equally new ones a refusal."""
    where = "contacts.consent"
    names = {"key": consent.key or campaign.key, "granted": consent.granted}
    names |= {k: v for k, v in (("channel", consent.channel), ("time", consent.time)) if v}
    rows = read_register(campaign, where, consent, names, home, engine)
    granted = coerce.key_text(rows.granted).lower().isin(list(consent.values)).fill_null(False)
    at = ibis.literal(datetime(1970, 1, 1))
    if consent.time:
        at = coerce.utc_time(rows.time, None, f"{campaign.file}: {where}.time")
        at = ibis.ifelse(at > now + timedelta(days=1), ibis.null().cast("timestamp"), at)  # has not been yet
    text = coerce.category(rows.channel).lower() if consent.channel else ibis.literal("")
    text = ibis.ifelse(text.isin(list(_EVERY_CHANNEL)), ibis.null().cast("string"), text)
    table = rows.select(key=coerce.key_text(rows.key), channel=text, granted=granted.cast("int8"), at=at)
    table = engine.cache(table.filter(table.key.notnull()))
    state = engine.arrow(table.aggregate(rows=table.count(), newest=table["at"].max())).to_pylist()[0]
    if not state["rows"]:
        raise DataContractError(f"{campaign.file}: {where}: table {consent.table!r} has no rows: nobody is contacted")
    oldest = now - timedelta(days=consent.max_age_days)
    if consent.time and (state["newest"] is None or state["newest"] < oldest):
        raise DataContractError(
            f"{campaign.file}: {where}: table {consent.table!r} is stale: its newest {consent.time!r} is "
            f"{state['newest']}, {consent.max_age_days} days are allowed (max_age_days); nobody is contacted"
        )
    # Whose time cannot be read, or lies ahead: a refusal counts as the newest, a consent as the oldest.
    known = table["at"].fill_null(ibis.ifelse(table.granted == 0, datetime(9999, 1, 1), datetime(1, 1, 1)))
    order = [known.desc(), table.granted.asc()]
    rank = ibis.row_number().over(group_by=[table.key, table.channel], order_by=order)
    newest = engine.arrow(table.mutate(rank=rank).filter(ibis._.rank == 0).select("key", "channel", "granted"))
    found = np.zeros((len(keys), len(channels)), dtype=bool)
    for i, channel in enumerate(channels):
        of_channel = newest.filter(pc.equal(newest["channel"], channel.lower())) if consent.channel else newest
        found[:, i] = _in(keys, of_channel.filter(pc.equal(of_channel["granted"], 1)))
    if consent.channel:  # a refusal that names no channel is one of all
        general = newest.filter(pc.and_(pc.is_null(newest["channel"]), pc.equal(newest["granted"], 0)))
        found[_in(keys, general)] = False
    return found


def _in(keys: pa.Array, table: pa.Table) -> Flags:
    return np.asarray(pc.is_in(keys, table["key"].combine_chunks()).to_numpy(zero_copy_only=False))
