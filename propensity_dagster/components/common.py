"""What the asset factories share: keys, partitions, user errors, metadata."""

from collections.abc import Callable, Mapping, Sequence
from datetime import date, timedelta
from functools import lru_cache, wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar

import dagster as dg
from dagster._core.definitions.assets.graph.asset_graph import AssetGraph
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

from propensity_dagster.campaign import Campaign
from propensity_dagster.data.days import days_between
from propensity_dagster.data.sources import campaign_calendar
from propensity_dagster.errors import PropensityError, SourceError

P = ParamSpec("P")
T = TypeVar("T")
_CAMPAIGN = "propensity/campaign"

SOURCE_RETRIES = dg.RetryPolicy(max_retries=3, delay=5, backoff=dg.Backoff.EXPONENTIAL, jitter=dg.Jitter.PLUS_MINUS)


def key(campaign: Campaign, table: str) -> dg.AssetKey:
    """Asset key of a table: campaign, then table."""
    return dg.AssetKey([campaign.name, table])


def daily(campaign: Campaign) -> dg.DailyPartitionsDefinition:
    """Days of events and instants of snapshots: one definition, so that any day can be scored.

    The day after the last event day is a snapshot too: it sees all events.
    """
    calendar = campaign_calendar(campaign)
    if calendar.last is None:
        return dg.DailyPartitionsDefinition(start_date=str(calendar.first), end_offset=1)
    end = calendar.last + timedelta(days=2)
    return dg.DailyPartitionsDefinition(start_date=str(calendar.first), end_date=str(end))


def asset_job(
    campaign: Campaign,
    name: str,
    tables: Sequence[str],
    description: str,
    partitions: dg.PartitionsDefinition | None = None,
) -> Any:
    """A job that materializes these tables of a campaign."""
    return _CampaignJob(
        name,
        selection=dg.AssetSelection.assets(*(key(campaign, table) for table in tables)),
        partitions_def=partitions,
        description=description,
        # One process: each more costs seconds of imports. Override in the launchpad on a large server.
        executor_def=dg.in_process_executor,
        tags={_CAMPAIGN: campaign.name},
    )


class _CampaignJob(UnresolvedAssetJobDefinition):
    """A job that is resolved among the assets of its own campaign.

    Dagster looks twice at every asset of the code location for each job: with 100 campaign files that takes longer than
    all the rest.
    """

    def resolve(self, asset_graph: AssetGraph, *args: Any, **kwargs: Any) -> dg.JobDefinition:
        """The job with its operations."""
        campaign = (self.tags or {})[_CAMPAIGN]
        return super().resolve(_by_campaign(asset_graph)[campaign], *args, **kwargs)


@lru_cache(maxsize=1)
def _by_campaign(asset_graph: AssetGraph) -> dict[str, AssetGraph]:
    assets: dict[str, list[dg.AssetsDefinition]] = {}
    for asset in asset_graph.assets_defs:
        campaign = next(iter(asset.keys or {k.asset_key for k in asset.check_keys})).path[0]
        assets.setdefault(campaign, []).append(asset)
    return {campaign: AssetGraph.from_assets(of_campaign) for campaign, of_campaign in assets.items()}


def partition_days(context: dg.AssetExecutionContext) -> list[date]:
    """The days this run materializes: one, or every day of a range."""
    window = context.partition_key_range
    return days_between(date.fromisoformat(window.start), date.fromisoformat(window.end))


def window_dependency(asset: dg.AssetKey, first: int, last: int) -> dg.AssetDep:
    """A snapshot's dependency on days relative to it, from `first` to `last`."""
    mapping = dg.TimeWindowPartitionMapping(
        start_offset=first, end_offset=last, allow_nonexistent_upstream_partitions=True
    )
    return dg.AssetDep(asset, partition_mapping=mapping)


def user_errors(function: Callable[P, T]) -> Callable[P, T]:
    """Turn our errors into Dagster failures that say what to mend; only a source is worth another attempt."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except PropensityError as error:
            raise dg.Failure(
                description=str(error),
                metadata={"error": type(error).__name__},
                allow_retries=isinstance(error, SourceError),
            ) from error

    # Dagster asks for it 19 times: with a hundred campaign files that takes seconds, unless the answer is at hand.
    wrapped.__dict__["__signature__"] = signature(function)
    return wrapped


def blocking(name: str, asset: dg.AssetKey, description: str) -> dg.AssetCheckSpec:
    """A check whose failure stops what is downstream."""
    return dg.AssetCheckSpec(name, asset=asset, blocking=True, description=description)


def warning(name: str, asset: dg.AssetKey, description: str) -> dg.AssetCheckSpec:
    """A check whose failure is shown and stops nothing."""
    return dg.AssetCheckSpec(name, asset=asset, blocking=False, description=description)


def checked(asset: dg.AssetKey, name: str, passed: bool, *, warn: bool = False, **metadata: Any) -> dg.AssetCheckResult:
    """The result of a check."""
    severity = dg.AssetCheckSeverity.WARN if warn else dg.AssetCheckSeverity.ERROR
    return dg.AssetCheckResult(
        passed=bool(passed), asset_key=asset, check_name=name, severity=severity, metadata=metadata
    )


def note_partitions(
    context: dg.AssetExecutionContext, asset: dg.AssetKey, rows: Mapping[date, Mapping[str, Any]]
) -> None:
    """Numbers of each partition, which the UI plots over time."""
    for day, metadata in rows.items():
        context.add_asset_metadata(metadata, asset_key=asset, partition_key=str(day))


def row_counts(counts: Mapping[date, int], name: str = "rows") -> dict[date, dict[str, Any]]:
    """Metadata of row counts per partition."""
    return {day: {name: count} for day, count in counts.items()}


def column_schema(contract: Any) -> dg.TableSchema:
    """The columns of a table as its pandera schema states them."""
    return dg.TableSchema(
        columns=[
            dg.TableColumn(name, type=str(column.dtype), description=column.description)
            for name, column in contract.columns.items()
        ]
    )


def records_table(rows: Sequence[Mapping[str, Any]]) -> dg.TableMetadataValue:
    """A small table in the UI."""
    records = [
        dg.TableRecord({k: v if isinstance(v, int | float | bool) else str(v) for k, v in r.items()}) for r in rows
    ]
    columns = [dg.TableColumn(name) for name in (rows[0] if rows else {})]
    return dg.MetadataValue.table(records=records, schema=dg.TableSchema(columns=columns))
