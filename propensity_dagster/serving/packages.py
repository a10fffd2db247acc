"""What is served: a package (one model version with all it takes to answer) and a release (who answers).

Belongs here: their formats, loading and verifying them, and choosing the version that answers a customer.
"""

import hashlib
import math
import mmap
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import UNSET

from propensity_dagster.errors import SavedModelError
from propensity_dagster.manifest import read_verified
from propensity_dagster.serving.inputs import Input, Inputs
from propensity_dagster.serving.scorers import Floats, Model, load_model

FORMAT, CAMPAIGN, POPULATION, MODEL = 1, "campaign.json", "population.f64", "model"
RELEASE, PACKAGES = "release.json", "packages"
CHAMPION, CHALLENGER = "champion", "challenger"

_NAN = math.nan


class ReleaseFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`release.json`: which packages answer. Replaced atomically; workers look at it four times a second."""

    champion: str
    challenger: str | None = None
    mode: Literal["off", "shadow", "split"] = "off"
    share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    salt: str = ""


@dataclass(frozen=True)
class Package:
    """One version of a campaign's model, ready to answer. `content` is `campaign.json`."""

    name: str
    content: dict[str, Any]
    model: Model
    inputs: tuple[Input, ...]
    population: Sequence[float]

    @cached_property
    def codes(self) -> tuple[tuple[int, dict[str, float]], ...]:
        """Position and codes of each category."""
        return tuple(
            (i, {value: float(code) for code, value in enumerate(field.categories)})
            for i, field in enumerate(self.inputs)
            if field.kind == "category"
        )

    @cached_property
    def tiers(self) -> tuple[float, float]:
        """Percentiles above which the high and the medium tier begin."""
        return self.content["tiers"]["high"], self.content["tiers"]["medium"]

    @cached_property
    def money(self) -> tuple[float, float, float]:
        """Margin of a conversion, cost of a contact, and the probability above which one pays (infinite if none)."""
        value, threshold = self.content["value"], self.content["threshold"]
        return value["margin_per_conversion"], value["cost_per_contact"], math.inf if threshold is None else threshold

    @cached_property
    def prior_shift(self) -> float:
        """What suits log-odds to the newest scored population."""
        return self.content["prior_shift"]

    @cached_property
    def version(self) -> str:
        """Version in the registry."""
        return self.content["version"]

    @cached_property
    def reference(self) -> Floats:
        """Encoded rows (m, p) of the population."""
        rows = [[_NAN if v is None else v for v in row] for row in self.content["reference"]]
        return np.array(rows, dtype=np.float64)

    def encode(self, values: Sequence[Any]) -> tuple[list[float], list[str]]:
        """The model's row of values in the order of the inputs; and the names of categories training never saw."""
        row = list(values)
        unseen: list[str] = []
        for i, codes in self.codes:
            value = row[i]
            if value is not None and value is not UNSET:
                code = codes.get(value)
                if code is None:
                    unseen.append(self.inputs[i].name)
                row[i] = code
        if None in row or UNSET in row:
            row = [_NAN if v is None or v is UNSET else v for v in row]
        return row, unseen

    def probability(self, row: list[float]) -> float:
        """Calibrated probability of an encoded row, suited to the newest scored population."""
        return 1 / (1 + math.exp(-self.model.log_odds(row) - self.prior_shift))

    def rank(self, p: float) -> tuple[float, int, str]:
        """Percentile, decile and tier of a probability in the newest scored population."""
        n = len(self.population)
        # Equal scores may differ in their last digits when they are computed one at a time.
        rank = bisect_right(self.population, p + 1e-9 * p * (1 - p))
        percentile = rank / n
        high, medium = self.tiers
        tier = "high" if percentile > high else "medium" if percentile > medium else "low"
        return percentile, min(11 - -(-10 * rank // n), 10), tier


@dataclass(frozen=True)
class Release:
    """A campaign as it is served now. Immutable: a request keeps the one it began with."""

    campaign: str
    champion: Package
    challenger: Package | None
    file: ReleaseFile
    inputs: Inputs

    @cached_property
    def positions(self) -> dict[str, list[int] | None]:
        """For each package, where its inputs are among the release's; None when they are the same."""
        names = self.inputs.names
        found: dict[str, list[int] | None] = {}
        for package in self.packages:
            own = [field.name for field in package.inputs]
            found[package.name] = None if own == names else [names.index(name) for name in own]
        return found

    @property
    def packages(self) -> list[Package]:
        """Champion, and challenger if there is one."""
        return [self.champion, *([self.challenger] if self.challenger else [])]

    def choose(self, key: str | None) -> tuple[Package, str]:
        """Who answers this customer. A larger share keeps everybody whom the smaller one had moved."""
        if self.challenger is not None and self.file.mode == "split" and key is not None:
            digest = hashlib.blake2b((self.file.salt + key).encode(), digest_size=8).digest()
            if int.from_bytes(digest) < self.file.share * 2.0**64:
                return self.challenger, CHALLENGER
        return self.champion, CHAMPION

    def own_values(self, package: Package, values: Sequence[Any]) -> Sequence[Any]:
        """The values that a package reads, in its order."""
        positions = self.positions[package.name]
        return values if positions is None else [values[i] for i in positions]


def read_release_file(folder: Path) -> ReleaseFile:
    """`release.json` of a campaign's serving folder.

    Raises:
        SavedModelError: when it is no such file.
    """
    file = folder / RELEASE
    try:
        return msgspec.json.decode(file.read_bytes(), type=ReleaseFile)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SavedModelError(f"{file}: not a release: {error}") from None


def load_release(folder: Path, known: Sequence[Package] = ()) -> Release:
    """Load what `release.json` names, verifying checksums and golden rows. Packages in `known` are not read again.

    Raises:
        SavedModelError: when a package is missing, cut short, tampered with or of another campaign.
    """
    file = read_release_file(folder)
    loaded = {package.name: package for package in known}

    def package(name: str) -> Package:
        if Path(name).name != name:
            raise SavedModelError(f"{folder / RELEASE}: {name!r} is not the name of a package")
        return loaded.get(name) or load_package(folder / PACKAGES / name)

    champion = package(file.champion)
    challenger = package(file.challenger) if file.challenger and file.mode != "off" else None
    if challenger is not None and challenger.content["key"] != champion.content["key"]:
        raise SavedModelError(f"{folder}: champion and challenger have different keys")
    if champion.content["campaign"] != folder.name:
        raise SavedModelError(f"{folder}: the package is of the campaign {champion.content['campaign']!r}")
    fields = {field.name: field for p in (champion, challenger) if p for field in p.inputs}
    return Release(folder.name, champion, challenger, file, Inputs(champion.content["key"], list(fields.values())))


def load_package(folder: Path) -> Package:
    """Read one package.

    Raises:
        SavedModelError: when a file is missing, cut short, changed, or of an unknown format or kind.
    """
    if not folder.is_dir():
        raise SavedModelError(f"{folder}: there is no such package")
    content = read_verified(folder, FORMAT, CAMPAIGN)
    model = load_model(folder / MODEL)
    try:
        population = _population(folder / POPULATION)
        stated = {f["feature"]: f for f in content["features"]}
        inputs = tuple(_input(spec, stated[spec["name"]]) for spec in model.features)
        package = Package(folder.name, content, model, inputs, population)
        width = package.reference.shape[1]
        missing = {"campaign", "version", "key", "tiers", "value", "prior_shift", "population"} - set(content)
    except (KeyError, ValueError, TypeError, IndexError, OSError) as error:
        raise SavedModelError(f"{folder}: not a package: {error!r}") from None
    if missing or width != len(inputs) or not population:
        raise SavedModelError(f"{folder}: not a package: {sorted(missing)} missing, or rows of another width")
    return package


def _input(spec: dict[str, Any], stated: dict[str, Any]) -> Input:
    return Input(
        stated["name"],
        spec["name"],
        spec["kind"],
        stated["meaning"],
        stated["window"],
        stated["minimum"],
        stated["maximum"],
        tuple(spec["categories"]),
        stated["typical"],
        stated.get("template", ""),
        stated.get("hidden", False),
        stated.get("source", ""),
    )


def _population(file: Path) -> Sequence[float]:
    """Probabilities in ascending order, mapped: workers share the memory."""
    with file.open("rb") as handle:
        mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    return memoryview(mapped).cast("d")
