"""The Dagster component and its asset factories. Only this package, `defs` and `definitions` import dagster."""

from propensity_dagster.components.campaign_folder import CampaignFolder

__all__ = ["CampaignFolder"]
