"""Assets from the source to daily activity."""

import dagster as dg

from propensity_dagster.campaign import Campaign, EventCampaign
from propensity_dagster.components.common import (
    SOURCE_RETRIES,
    blocking,
    checked,
    column_schema,
    daily,
    key,
    note_partitions,
    partition_days,
    records_table,
    row_counts,
    user_errors,
    warning,
)
from propensity_dagster.contracts import entity_contract, stream_contract
from propensity_dagster.data.ingest import ingest_entities, ingest_stream
from propensity_dagster.data.sources import campaign_calendar
from propensity_dagster.data.validate import (
    ValidationReport,
    entity_violations,
    stream_violations,
    validate_entities,
    validate_stream,
)
from propensity_dagster.features.activity import ACTIVITY, build_activity
from propensity_dagster.features.build import ENTITIES, derive_entities
from propensity_dagster.runtime import Runtime

RAW, VALIDATED, FEATURES = "raw", "validated", "features"


def ingestion_assets(campaign: EventCampaign) -> list[dg.AssetsDefinition]:
    """raw -> validated (+ quarantine) -> activity, and the entities."""
    assets = [_activity(campaign)]
    for name in campaign.source.streams:
        assets += [_raw_stream(campaign, name), _validated_stream(campaign, name)]
    if campaign.source.entities.table:
        assets += [_raw_entities(campaign), _validated_entities(campaign)]
    else:
        assets.append(_derived_entities(campaign))
    return assets


def _raw_stream(campaign: EventCampaign, name: str) -> dg.AssetsDefinition:
    asset = key(campaign, f"raw_{name}")

    @dg.asset(
        key=asset,
        group_name=RAW,
        partitions_def=daily(campaign),
        backfill_policy=dg.BackfillPolicy.single_run(),
        retry_policy=SOURCE_RETRIES,
        description=f"Rows of {campaign.source.streams[name].table}, as they are in the source, by event day.",
        kinds={"parquet"},
    )
    @user_errors
    def raw_stream(context: dg.AssetExecutionContext, runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        days = partition_days(context)
        with runtime.engine() as engine:
            report = ingest_stream(campaign, name, days[0], days[-1], runtime.home.ensure(), engine)
        note_partitions(context, asset, row_counts(report.rows_by_day))
        return dg.MaterializeResult(
            metadata={
                "rows_in_run": report.rows,
                "rows_without_usable_day": report.unplaced,
                "late_rows": report.late,
                "time_zone": report.time_zone,
            }
        )

    return raw_stream


def _validated_stream(campaign: EventCampaign, name: str) -> dg.AssetsDefinition:
    asset = key(campaign, f"validated_{name}")
    calendar = campaign_calendar(campaign)

    @dg.asset(
        key=asset,
        deps=[key(campaign, f"raw_{name}")],
        group_name=VALIDATED,
        partitions_def=daily(campaign),
        backfill_policy=dg.BackfillPolicy.single_run(),
        check_specs=contract_checks(asset),
        description=f"Rows that keep the contract; the others are in quarantine_{name} with the reason.",
        kinds={"parquet"},
    )
    @user_errors
    def validated_stream(context: dg.AssetExecutionContext, runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        days = partition_days(context)
        with runtime.engine() as engine:
            report = validate_stream(campaign, name, days[0], days[-1], runtime.home, engine)
            broken = stream_violations(campaign, name, days[0], days[-1], runtime.home, engine)
        note_partitions(context, asset, row_counts(report.good_by_day))
        schema = stream_contract(campaign, campaign.source.streams[name], calendar.first, days[-1])
        return validation_result(campaign, asset, report, broken, schema)

    return validated_stream


def _raw_entities(campaign: EventCampaign) -> dg.AssetsDefinition:
    table = campaign.source.entities.table

    @dg.asset(
        key=key(campaign, f"raw_{table}"),
        group_name=RAW,
        retry_policy=SOURCE_RETRIES,
        description=f"Rows of {table}, as they are in the source.",
        kinds={"parquet"},
    )
    @user_errors
    def raw_entities(runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        with runtime.engine() as engine:
            report = ingest_entities(campaign, runtime.home.ensure(), engine)
        return dg.MaterializeResult(metadata={"rows": report.rows, "time_zone": report.time_zone})

    return raw_entities


def _validated_entities(campaign: EventCampaign) -> dg.AssetsDefinition:
    table = campaign.source.entities.table
    asset = key(campaign, f"validated_{table}")

    @dg.asset(
        key=asset,
        deps=[key(campaign, f"raw_{table}")],
        group_name=VALIDATED,
        check_specs=contract_checks(asset),
        description=f"Entities that keep the contract; the others are in quarantine_{table} with the reason.",
        kinds={"parquet"},
    )
    @user_errors
    def validated_entities(runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        with runtime.engine() as engine:
            report = validate_entities(campaign, runtime.home, engine)
            broken = entity_violations(campaign, runtime.home, engine)
        attributes = campaign.source.entities.attributes
        types = {name: attribute.type or "category" for name, attribute in attributes.items()}
        schema = entity_contract(campaign, types, campaign_calendar(campaign).first)
        return validation_result(campaign, asset, report, broken, schema)

    return validated_entities


def _derived_entities(campaign: EventCampaign) -> dg.AssetsDefinition:
    stream = campaign.source.entities.stream

    @dg.asset(
        key=key(campaign, ENTITIES),
        deps=[key(campaign, f"validated_{stream}")],
        group_name=VALIDATED,
        description=f"Everybody seen in {stream}, created with the first event.",
        kinds={"parquet"},
    )
    @user_errors
    def derived_entities(runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        with runtime.engine() as engine:
            rows = derive_entities(campaign, runtime.home, engine)
        return dg.MaterializeResult(metadata={"rows": rows})

    return derived_entities


def _activity(campaign: EventCampaign) -> dg.AssetsDefinition:
    asset = key(campaign, ACTIVITY)

    @dg.asset(
        key=asset,
        deps=[key(campaign, f"validated_{name}") for name in campaign.source.streams],
        group_name=FEATURES,
        partitions_def=daily(campaign),
        backfill_policy=dg.BackfillPolicy.single_run(),
        check_specs=[blocking("events_add_up", asset, "every validated event is counted exactly once")],
        description="One integer row per entity and day, from which every feature is a windowed sum.",
        kinds={"parquet", "duckdb"},
    )
    @user_errors
    def activity(context: dg.AssetExecutionContext, runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        days = partition_days(context)
        with runtime.engine() as engine:
            report = build_activity(campaign, days[0], days[-1], runtime.home, engine)
        note_partitions(context, asset, row_counts(report.rows_by_day))
        return dg.MaterializeResult(
            metadata={"rows_in_run": report.rows, "events": report.events},
            check_results=[checked(asset, "events_add_up", report.events == report.events_read, counted=report.events)],
        )

    return activity


def contract_checks(asset: dg.AssetKey) -> list[dg.AssetCheckSpec]:
    """What is asked of every validated table."""
    return [
        blocking("contract", asset, "no published row breaks the table's schema"),
        blocking("rows_add_up", asset, "rows in = good + quarantined + duplicates"),
        blocking("max_bad_fraction", asset, "no more bad rows than the campaign allows"),
        warning("no_bad_rows", asset, "nothing had to be quarantined"),
    ]


def validation_result(
    campaign: Campaign, asset: dg.AssetKey, report: ValidationReport, broken: int, schema: object
) -> dg.MaterializeResult:
    """Where the rows went, with the results of `contract_checks`."""
    reasons = [{"reason": reason, "rows": rows} for reason, rows in report.reasons.items()]
    bad = report.bad_fraction
    return dg.MaterializeResult(
        metadata={
            "rows_in": report.rows_in,
            "good": report.good,
            "quarantined": report.quarantined,
            "duplicates": report.duplicates,
            "bad_fraction": bad,
            "dagster/column_schema": column_schema(schema),
            **({"quarantine_reasons": records_table(reasons)} if reasons else {}),
        },
        check_results=[
            checked(asset, "contract", broken == 0, rows_that_break_it=broken),
            checked(asset, "rows_add_up", report.adds_up, rows_in=report.rows_in),
            checked(asset, "max_bad_fraction", bad <= campaign.max_bad_fraction, bad_fraction=bad),
            checked(asset, "no_bad_rows", report.quarantined == 0, warn=True, quarantined=report.quarantined),
        ],
    )
