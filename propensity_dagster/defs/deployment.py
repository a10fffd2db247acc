"""Resources and sensors that belong to the deployment, not to a campaign."""

from pathlib import Path
from typing import Any

import dagster as dg

from propensity_dagster.components.failures import deliver, record_failures
from propensity_dagster.data.lake import Home
from propensity_dagster.runtime import DEFAULT_MEMORY_GB, DUCKDB, Runtime


class RuntimeResource(dg.ConfigurableResource[Runtime]):
    """Hands out a plain `Runtime`; an empty home means all of it from the environment."""

    home: str = ""
    memory_gb: float = DEFAULT_MEMORY_GB
    threads: int | None = None
    engine: str = DUCKDB

    def create_resource(self, context: dg.InitResourceContext) -> Any:
        """The object that assets receive."""
        del context
        if not self.home:
            return Runtime.from_environment()
        return Runtime(Home(Path(self.home).resolve()), self.memory_gb, self.threads, self.engine)


@dg.definitions
def deployment() -> dg.Definitions:
    """The runtime resource and the sensors for failures and alerts."""
    return dg.Definitions(resources={"runtime": RuntimeResource()}, sensors=[record_failures, deliver])
