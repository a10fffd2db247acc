"""The BentoML service: `bentoml serve propensity_dagster.serving.service:Propensity`, or of a built bento.

It has no `@bentoml.api` and no `depends()`: typed endpoints repeat a body in their errors and logs, and inner services
accept pickled bodies. The gateway answers; BentoML runs the workers, the documentation page and the packaging.
"""

import gc
import os
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before LightGBM's library loads: threads that spin cost milliseconds
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "true")
gc.disable()  # until the end of the module: collections are a tenth of the time that importing BentoML takes

import bentoml  # noqa: E402


class _GatewayService(bentoml.Service):  # pyright: ignore[reportMissingTypeArgument, reportUntypedBaseClass]
    """A service whose application is the gateway, without BentoML's own and its middleware."""

    def to_asgi(self, is_main: bool = True) -> Any:
        # Not above: the parent process imports this module too, and never answers.
        from propensity_dagster.serving.gateway import Gateway
        from propensity_dagster.serving.protocol import use_quick_protocol

        use_quick_protocol()
        return Gateway()


def _workers() -> int:
    stated = os.environ.get("PROPENSITY_WORKERS", "")
    return int(stated) if stated.isdigit() and int(stated) > 0 else min(os.cpu_count() or 1, 8)


@bentoml.service(
    name="propensity",
    service_class=_GatewayService,
    workers=_workers(),
    traffic={"timeout": 60},  # of the documentation page; the gateway has its own
    tracing={"excluded_urls": "."},
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},  # labels every path that is asked for; the gateway's are bounded
)
class Propensity:
    """Everything is in the gateway."""


gc.enable()
