"""What GET /model and GET /campaigns say: the contract, the judgement and the card of what serves."""

from typing import Any

import msgspec

from propensity_dagster.serving.inputs import Input
from propensity_dagster.serving.packages import Release
from propensity_dagster.serving.watch import State

_SHOWN = (
    "campaign",
    "description",
    "version",
    "model",
    "identity",
    "key",
    "outcome",
    "trained_on",
    "population",
    "tiers",
    "value",
    "threshold",
    "metrics",
    "model_card",
)


def model_body(release: Release, state: State) -> bytes:
    """The champion of one campaign, who else answers, and what was refused since."""
    package = release.champion
    problem = state.refused.get(f"release of {release.campaign}")
    content = {name: package.content.get(name) for name in _SHOWN}
    content |= {
        "package": package.name,
        "features": [_feature(field) for field in package.inputs],
        "rollout": {
            "mode": release.file.mode,
            "share": release.file.share if release.file.mode == "split" else None,
            "challenger_version": release.challenger.version if release.challenger else None,
        },
        "refused": "a newer release could not be loaded; the server's log says why" if problem else None,
    }
    return msgspec.json.encode(content)


def campaigns_body(state: State) -> bytes:
    """The campaigns that are served."""
    return msgspec.json.encode(
        {
            "default": state.default_campaign,
            "campaigns": [
                {
                    "name": name,
                    "description": release.champion.content["description"],
                    "model_version": release.champion.version,
                    "key": release.inputs.key,
                    "paths": [f"/campaigns/{name}/{path}" for path in ("predict", "predict_batch", "explain", "model")],
                }
                for name, release in sorted(state.releases.items())
            ],
        }
    )


def _feature(field: Input) -> dict[str, Any]:
    if field.kind == "category":
        limits: dict[str, Any] = {"categories": field.categories}
    else:
        limits = {"minimum": field.minimum, "maximum": field.maximum}
    return {
        "name": field.name,
        "feature": field.feature,
        "kind": field.kind,
        "meaning": field.meaning,
        "window_days": field.window or None,
        "typical": field.typical,
        **limits,
    }
