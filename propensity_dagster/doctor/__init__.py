"""Looking at a campaign and its data before anything is computed: coded findings, profiles, outcome rates.

The same checks run at the start of the training job, on what was ingested.
"""

from propensity_dagster.campaign import Campaign, EventCampaign, TableCampaign
from propensity_dagster.data.engine import Engine
from propensity_dagster.data.lake import Home
from propensity_dagster.doctor.decisions import diagnose_decisions
from propensity_dagster.doctor.events import diagnose_events
from propensity_dagster.doctor.findings import Diagnosis
from propensity_dagster.errors import (
    ConfigError,
    DataContractError,
    InsufficientDataError,
    PropensityError,
    SourceError,
)
from propensity_dagster.models.training import ENSEMBLE, make_estimator

_CODES: dict[type[PropensityError], str] = {
    ConfigError: "P001",
    SourceError: "P002",
    DataContractError: "P003",
    InsufficientDataError: "P103",
}


def diagnose(campaign: Campaign, home: Home, engine: Engine, *, ingested: bool) -> Diagnosis:
    """Everything the doctor finds.

    Args:
        campaign: the campaign.
        home: where the lake is; nothing is written there.
        engine: where to compute.
        ingested: look at the lake, as the training job does, and not at the source.
    """
    try:
        for candidate in campaign.models:
            if candidate.name != ENSEMBLE:
                make_estimator(campaign, candidate)  # does the file state parameters that there are?
        if isinstance(campaign, EventCampaign):
            return diagnose_events(campaign, home, engine, ingested=ingested)
        assert isinstance(campaign, TableCampaign)
        return diagnose_decisions(campaign, home, engine, ingested=ingested)
    except tuple(_CODES) as error:
        code = next(c for kind, c in _CODES.items() if isinstance(error, kind))
        diagnosis = Diagnosis(campaign.name)
        diagnosis.add(code, "source", str(error).removeprefix(f"{campaign.file}: "))
        return diagnosis


__all__ = ["Diagnosis", "diagnose"]
