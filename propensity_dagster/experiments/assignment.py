"""Who gets which variant, by a salted hash: the same for a unit for ever, independent of every other experiment."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from propensity_dagster.campaign_sections import Experiment
from propensity_dagster.evaluation.splits import hash_fractions


def assign(name: str, experiment: Experiment, keys: Iterable[str]) -> NDArray[np.object_]:
    """The variant of each unit (n,).

    Args:
        name: of the experiment; salts the hash where the experiment states no salt.
        experiment: gives variants and shares. Their order matters: each has a piece of [0, 1).
        keys: of the units (n,), as text.
    """
    edges = np.cumsum(list(experiment.variants.values()))[:-1]
    place = np.searchsorted(edges, hash_fractions(keys, f"experiment:{experiment.salt or name}"), side="right")
    return np.array(list(experiment.variants), dtype=object)[place]
