"""The audience assets: whom to contact, and sending it."""

from datetime import date
from typing import Any

import dagster as dg
from pydantic import Field

from propensity_dagster.campaign import Campaign
from propensity_dagster.components.common import (
    SOURCE_RETRIES,
    blocking,
    checked,
    column_schema,
    daily,
    key,
    note_partitions,
    partition_days,
    user_errors,
    warning,
)
from propensity_dagster.contracts import audience_contract
from propensity_dagster.data.days import now_utc
from propensity_dagster.runtime import Runtime
from propensity_dagster.scoring.audiences import AUDIENCE
from propensity_dagster.scoring.batch import SCORES
from propensity_dagster.scoring.contacts import audience_violations, publish_audience
from propensity_dagster.scoring.exports import export_audience, export_problem

CONTACTING = "contacting"
EXPORTED_AUDIENCE = "exported_audience"


class AudienceConfig(dg.Config):
    """What replaces the campaign file's limits in this run."""

    capacity: int | None = Field(default=None, ge=0, description="contacts")
    budget: float | None = Field(default=None, ge=0, description="money")


def contacting_assets(campaign: Campaign) -> list[dg.AssetsDefinition]:
    """scores + consent -> audience (-> files, tables, webhooks)."""
    return [_audience(campaign), *([_exported(campaign)] if campaign.contacts.exports else [])]


def contacting_tables(campaign: Campaign) -> list[str]:
    """What a night materializes: nothing, unless the campaign says who may be contacted."""
    if campaign.contacts.consent is None:
        return []
    return [AUDIENCE, *([EXPORTED_AUDIENCE] if campaign.contacts.exports else [])]


def _audience(campaign: Campaign) -> dg.AssetsDefinition:
    asset = key(campaign, AUDIENCE)

    @dg.asset(
        key=asset,
        deps=[key(campaign, SCORES)],
        group_name=CONTACTING,
        partitions_def=daily(campaign),
        backfill_policy=dg.BackfillPolicy.single_run(),
        check_specs=[
            blocking("holdout_is_not_contacted", asset, "nobody who is held back, and nobody twice"),
            warning("limits_have_an_effect", asset, "every limit of the campaign file is about somebody"),
        ],
        description="Whom to contact for the highest expected profit, as consent stands now; and the holdout.",
        kinds={"parquet"},
    )
    @user_errors
    def audience(
        context: dg.AssetExecutionContext, config: AudienceConfig, runtime: dg.ResourceParam[Runtime]
    ) -> dg.MaterializeResult:
        broken: dict[str, int] = {}
        notes: list[str] = []
        shown: dict[date, dict[str, Any]] = {}
        with runtime.local_engine() as engine:
            for snapshot in partition_days(context):
                plan = publish_audience(
                    campaign, snapshot, runtime.home, engine, now_utc(), config.capacity, config.budget
                )
                notes += [f"{snapshot}: {note}" for note in plan["notes"]]
                shown[snapshot] = _shown(plan)
                for name, rows in audience_violations(campaign, snapshot, runtime.home).items():
                    broken[name] = broken.get(name, 0) + rows
        note_partitions(context, asset, shown)
        return dg.MaterializeResult(
            metadata={"dagster/column_schema": column_schema(audience_contract(campaign))},
            check_results=[
                checked(asset, "holdout_is_not_contacted", not any(broken.values()), **broken),
                checked(asset, "limits_have_an_effect", not notes, warn=True, notes="; ".join(notes)),
            ],
        )

    return audience


def _exported(campaign: Campaign) -> dg.AssetsDefinition:
    asset = key(campaign, EXPORTED_AUDIENCE)

    @dg.asset(
        key=asset,
        deps=[key(campaign, AUDIENCE)],
        group_name=CONTACTING,
        partitions_def=daily(campaign),
        backfill_policy=dg.BackfillPolicy.single_run(),
        retry_policy=SOURCE_RETRIES,
        description="The contacts of the newest snapshot, sent once; an older audience is history, and not sent.",
    )
    @user_errors
    def exported_audience(
        context: dg.AssetExecutionContext, runtime: dg.ResourceParam[Runtime]
    ) -> dg.MaterializeResult:
        shown: dict[date, dict[str, Any]] = {}
        with runtime.local_engine() as engine:
            for snapshot in partition_days(context):
                now = now_utc()
                problem = export_problem(campaign, snapshot, runtime.home, now)
                shown[snapshot] = {"not_sent": problem} if problem else {}
                for export in () if problem else campaign.contacts.exports:
                    report = export_audience(campaign, export, snapshot, runtime.home, engine, now)
                    shown[snapshot] |= {
                        f"{export.name}_sent": report.sent,
                        f"{export.name}_sent_before": report.before,
                        f"{export.name}_withdrawn": report.withdrawn,
                    }
        note_partitions(context, asset, shown)
        return dg.MaterializeResult()

    return exported_audience


def _shown(plan: dict[str, Any]) -> dict[str, Any]:
    numbers = ("contacted", "random", "held", "held_chosen", "cost")
    expected = {name: plan[name]["value"] for name in ("expected_conversions", "expected_profit")}
    return {
        **{name: plan[name] for name in numbers},
        **expected,
        **{f"excluded: {k}": v for k, v in plan["excluded"].items()},
    }
