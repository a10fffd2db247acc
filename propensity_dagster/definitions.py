"""The Dagster code location."""

from pathlib import Path

import dagster as dg


@dg.definitions
def defs() -> dg.Definitions:
    """Everything below `defs/`."""
    import propensity_dagster.defs

    return dg.load_defs(propensity_dagster.defs, project_root=Path(__file__).parent.parent)
