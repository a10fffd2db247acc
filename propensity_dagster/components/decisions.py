"""Assets of a table of past decisions: up to its training set, and the rows to score."""

import dagster as dg
from pydantic import Field

from propensity_dagster.campaign import TableCampaign
from propensity_dagster.components.common import (
    SOURCE_RETRIES,
    blocking,
    checked,
    daily,
    key,
    note_partitions,
    partition_days,
    records_table,
    row_counts,
    user_errors,
    warning,
)
from propensity_dagster.components.ingestion import contract_checks, validation_result
from propensity_dagster.components.training import (
    DIAGNOSIS,
    FEATURES,
    FEW_OUTCOMES,
    RATE_WORDS,
    diagnosis_asset,
    training_set_result,
)
from propensity_dagster.contracts import decision_contract
from propensity_dagster.data.decisions import (
    DECISIONS,
    decision_violations,
    ingest_decisions,
    publish_new_rows,
    rows_to_score,
    stored_types,
    validate_decisions,
)
from propensity_dagster.features.past_decisions import publish_decision_training_set
from propensity_dagster.features.snapshots import TRAINING_SET
from propensity_dagster.runtime import Runtime

RAW, VALIDATED = "raw", "validated"


class RowsToScore(dg.Config):
    """Where the rows to score are: files, folders, or a table of the source's connection."""

    rows: list[str] = Field(default=[])


def decision_assets(campaign: TableCampaign) -> list[dg.AssetsDefinition]:
    """raw -> validated -> diagnosis -> training set; and the features of rows to score."""
    diagnosis = diagnosis_asset(campaign, [f"raw_{DECISIONS}", f"validated_{DECISIONS}"])
    return [_raw(campaign), _validated(campaign), diagnosis, _training_set(campaign), _features(campaign)]


def _raw(campaign: TableCampaign) -> dg.AssetsDefinition:
    @dg.asset(
        key=key(campaign, f"raw_{DECISIONS}"),
        group_name=RAW,
        retry_policy=SOURCE_RETRIES,
        description="Past decisions, as they are in the source, numbered.",
        kinds={"parquet"},
    )
    @user_errors
    def raw_decisions(runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        with runtime.local_engine() as engine:
            rows = ingest_decisions(campaign, runtime.home.ensure(), engine)
        return dg.MaterializeResult(metadata={"rows": rows})

    return raw_decisions


def _validated(campaign: TableCampaign) -> dg.AssetsDefinition:
    asset = key(campaign, f"validated_{DECISIONS}")

    @dg.asset(
        key=asset,
        deps=[key(campaign, f"raw_{DECISIONS}")],
        group_name=VALIDATED,
        check_specs=contract_checks(asset),
        description=f"Decisions that keep the contract; the others are in quarantine_{DECISIONS} with the reason.",
        kinds={"parquet"},
    )
    @user_errors
    def validated_decisions(runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        with runtime.local_engine() as engine:
            report = validate_decisions(campaign, runtime.home, engine)
            broken = decision_violations(campaign, runtime.home, engine)
        file = runtime.home.lake(campaign.name).file(f"validated_{DECISIONS}")
        schema = decision_contract(campaign, stored_types(campaign, file), labelled=True)
        return validation_result(campaign, asset, report, broken, schema)

    return validated_decisions


def _training_set(campaign: TableCampaign) -> dg.AssetsDefinition:
    asset = key(campaign, TRAINING_SET)

    @dg.asset(
        key=asset,
        deps=[key(campaign, DIAGNOSIS), key(campaign, f"validated_{DECISIONS}")],
        group_name=FEATURES,
        check_specs=[
            warning("enough_outcomes", asset, f"at least {FEW_OUTCOMES:,} converters and others to learn from"),
            warning("outcome_rate", asset, RATE_WORDS),
        ],
        description="Training and test rows: the newest test where there is an order, else a hash of the key decides.",
        kinds={"parquet"},
    )
    @user_errors
    def training_set(runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        with runtime.local_engine() as engine:
            report = publish_decision_training_set(campaign, runtime.home, engine)
        return training_set_result(asset, report)

    return training_set


def _features(campaign: TableCampaign) -> dg.AssetsDefinition:
    asset = key(campaign, "features")

    @dg.asset(
        key=asset,
        deps=[key(campaign, f"validated_{DECISIONS}")],
        group_name=FEATURES,
        partitions_def=daily(campaign),
        backfill_policy=dg.BackfillPolicy.single_run(),
        retry_policy=SOURCE_RETRIES,
        check_specs=[
            blocking("rows_add_up", asset, "rows in = good + quarantined"),
            warning("no_bad_rows", asset, "nothing had to be quarantined"),
            warning("no_column_missing", asset, "the rows have every column of the past decisions"),
        ],
        description="Rows to score on that day, in the columns of the past decisions.",
        kinds={"parquet"},
    )
    @user_errors
    def features(
        context: dg.AssetExecutionContext, config: RowsToScore, runtime: dg.ResourceParam[Runtime]
    ) -> dg.MaterializeResult:
        reports = {}
        with runtime.local_engine() as engine:
            for snapshot in partition_days(context):
                places = rows_to_score(campaign, snapshot, config.rows)
                reports[snapshot] = publish_new_rows(campaign, snapshot, places, runtime.home, engine)
        note_partitions(context, asset, row_counts({d: report.good for d, report in reports.items()}))
        rows_in, good, bad = (sum(getattr(r, n) for r in reports.values()) for n in ("rows_in", "good", "quarantined"))
        absent = sorted({name for report in reports.values() for name in report.absent})
        reasons = [
            {"snapshot": str(d), "reason": reason, "rows": n}
            for d, r in reports.items()
            for reason, n in r.reasons.items()
        ]
        return dg.MaterializeResult(
            metadata={
                "rows_in": rows_in,
                "read_from": ", ".join(dict.fromkeys(place for r in reports.values() for place in r.places)),
                "entity_key": campaign.source.key or "row number: the source has no key column",
                **({"quarantine_reasons": records_table(reasons)} if reasons else {}),
            },
            check_results=[
                checked(asset, "rows_add_up", rows_in == good + bad),
                checked(asset, "no_bad_rows", bad == 0, warn=True, quarantined=bad),
                checked(
                    asset, "no_column_missing", not absent, warn=True, columns=", ".join(absent), count=len(absent)
                ),
            ],
        )

    return features
