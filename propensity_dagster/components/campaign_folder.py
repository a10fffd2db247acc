"""The component: a folder of campaign files becomes assets, checks, jobs, schedules and sensors."""

import os
from pathlib import Path
from typing import Any

import dagster as dg
from dagster_shared.record import as_dict

from propensity_dagster.campaign import CAMPAIGNS, Campaign, EventCampaign, TableCampaign, load_campaigns
from propensity_dagster.components.automation import campaign_automation
from propensity_dagster.components.contacting import contacting_assets
from propensity_dagster.components.decisions import decision_assets
from propensity_dagster.components.experiments import experiment_assets
from propensity_dagster.components.explaining import ablation_asset, explanations_asset
from propensity_dagster.components.ingestion import ingestion_assets
from propensity_dagster.components.monitoring import monitoring_assets
from propensity_dagster.components.reporting import report_asset
from propensity_dagster.components.scoring import scoring_assets
from propensity_dagster.components.serving import serving_assets, serving_automation
from propensity_dagster.components.training import model_assets, snapshot_assets
from propensity_dagster.data.lake import require_folder


class CampaignFolder(dg.Component, dg.Model, dg.Resolvable):
    """Every `*.yaml` of `path`, or of the folder that PROPENSITY_CAMPAIGNS names, is one campaign."""

    path: str

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        """Definitions of every campaign of the folder.

        Raises:
            ConfigError: naming file and key, when a campaign file does not parse.
        """
        folder = campaigns_folder(
            context.path.parent / self.path if context.path.is_file() else context.path / self.path
        )
        merged = dg.Definitions.merge(*(campaign_definitions(campaign) for campaign in load_campaigns(folder)))
        return _Definitions(**as_dict(merged))


class _Definitions(dg.Definitions):
    """Definitions that are not copied to note the `defs.yaml` they come from, the same for every campaign.

    That takes a fifteenth of the time in which a hundred campaign files are loaded.
    """

    def with_definition_metadata_update(self, update: Any) -> dg.Definitions:
        """These definitions."""
        del update
        return self


def campaigns_folder(default: Path) -> Path:
    """The folder of campaign files, or one file: PROPENSITY_CAMPAIGNS, else `default`."""
    stated = os.environ.get(CAMPAIGNS)
    path = Path(stated) if stated else default.resolve()
    return path if path.is_file() else require_folder(path, CAMPAIGNS)


def campaign_definitions(campaign: Campaign) -> dg.Definitions:
    """Everything of one campaign but the resources, which are the deployment's."""
    if isinstance(campaign, EventCampaign):
        assets = [*ingestion_assets(campaign), *snapshot_assets(campaign)]
    else:
        assert isinstance(campaign, TableCampaign)
        assets = decision_assets(campaign)
    assets += [*model_assets(campaign), explanations_asset(campaign), report_asset(campaign)]
    if isinstance(campaign, EventCampaign):
        assets.append(ablation_asset(campaign))
    assets += [
        *scoring_assets(campaign),
        *contacting_assets(campaign),
        *serving_assets(campaign),
        *monitoring_assets(campaign),
    ]
    assets += experiment_assets(campaign)
    return dg.Definitions.merge(
        dg.Definitions(assets=assets), campaign_automation(campaign), serving_automation(campaign)
    )
