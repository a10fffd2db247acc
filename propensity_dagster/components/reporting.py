"""The report asset: the page of a training run."""

import dagster as dg

from propensity_dagster.campaign import Campaign, EventCampaign
from propensity_dagster.components.common import key, user_errors
from propensity_dagster.components.explaining import ABLATION, EXPLANATIONS
from propensity_dagster.components.training import EVALUATION
from propensity_dagster.reports.evaluation_report import publish_report, verdict
from propensity_dagster.reports.site import report_url
from propensity_dagster.runtime import Runtime
from propensity_dagster.scoring.candidates import read_evaluation
from propensity_dagster.scoring.promotion import keep_reports

REPORT = "report"


def report_asset(campaign: Campaign) -> dg.AssetsDefinition:
    """evaluation, explanations, ablation -> report."""
    ablated = [ABLATION] if isinstance(campaign, EventCampaign) else []

    @dg.asset(
        key=key(campaign, REPORT),
        deps=[key(campaign, table) for table in ("evaluation", EXPLANATIONS, *ablated)],
        group_name=EVALUATION,
        description="The evaluation as one page to read, print or send: it needs nothing but a browser.",
        kinds={"html"},
    )
    @user_errors
    def report(runtime: dg.ResourceParam[Runtime]) -> dg.MaterializeResult:
        file = publish_report(campaign, runtime.home)
        version = keep_reports(campaign, runtime.home, runtime.store)
        return dg.MaterializeResult(
            metadata={
                "verdict": verdict(read_evaluation(campaign, runtime.home)),
                "page": dg.MetadataValue.url(report_url(campaign.name, file.name)),
                "file": dg.MetadataValue.path(file),
                "kept_with_version": version,
                "bytes": file.stat().st_size,
            }
        )

    return report
