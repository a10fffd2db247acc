"""The Dagster code location."""

import gc
from pathlib import Path

import dagster as dg

from propensity_dagster.errors import PropensityError


@dg.definitions
def defs() -> dg.Definitions:
    """Everything below `defs/`."""
    import propensity_dagster.defs

    gc.disable()  # what is made here stays: looking for garbage in it, again and again, is a fifth of the time
    try:
        return dg.load_defs(propensity_dagster.defs, project_root=Path(__file__).parent.parent)
    except Exception as error:  # Dagster wraps ours in errors of its own; any other is raised again
        # Dagster says which component failed; which campaign file and key is further down the chain.
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, PropensityError):
                raise type(cause)(str(cause)) from None
            cause = cause.__cause__ or cause.__context__
        raise
    finally:
        gc.enable()
        gc.freeze()
        gc.set_threshold(100_000, 20, 50)
