"""The campaign file: one propensity question, frozen and validated.

Belongs here: the two shapes of a campaign, reading the YAML, and its error messages. Does not: reading data.
"""

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from propensity_dagster.campaign_sections import (
    MODEL_NAMES,
    Attribute,
    Candidate,
    ColumnOutcome,
    Contacts,
    Eligibility,
    EventSource,
    Experiment,
    Explanations,
    Features,
    Fraction,
    Frozen,
    Gate,
    Holdout,
    Identifier,
    Monitoring,
    Outcome,
    Prior,
    Schedule,
    Search,
    Snapshots,
    Split,
    TableSource,
    Target,
    Tiers,
    Treatment,
    Value,
    require_known,
)
from propensity_dagster.errors import ConfigError

_ALTERNATIVE = re.compile(r"literal\[.*\]|function-after\[.*\]|Consent|Assignments")

SHIPPED = Path(__file__).parent / "campaigns"
CAMPAIGNS = "PROPENSITY_CAMPAIGNS"
"""Environment variable: a folder of campaign files, or one file."""

ROW_NUMBER = "row_number"
"""Key column of a table that has none."""

NOT_COLUMNS = frozenset(
    {"day", "known_day", "snapshot", "split", "fold", "position", "converted", "decided_at", "reason", "created_day"}
)
"""Names that tables of ours give a meaning of their own."""


class Campaign(Frozen):
    """What both shapes share. `file` says where the campaign was read from; relative paths start there."""

    name: Identifier
    description: str = ""
    contact: str = ""
    source: EventSource | TableSource
    outcome: Outcome | ColumnOutcome
    models: tuple[Candidate, ...] = tuple(Candidate.model_validate({"name": name}) for name in MODEL_NAMES)
    search: Search | None = None
    prior: Prior = Prior()
    value: Value = Value()
    contacts: Contacts = Contacts()
    segments: tuple[str, ...] = ()
    tiers: Tiers = Tiers()
    holdout: Holdout = Holdout()
    experiments: dict[Identifier, Experiment] = Field({})
    treatment: Treatment | None = None
    explanations: Explanations = Explanations()
    target: Target | None = None
    schedule: Schedule = Schedule()
    gate: Gate = Gate()
    monitoring: Monitoring = Monitoring()
    monotone: dict[str, Literal["increasing", "decreasing"]] = Field({})
    min_converters: int = 500
    max_bad_fraction: Fraction = 0.05
    seed: int = 0
    file: Path = Path("campaign.yaml")

    @field_validator("models", mode="before")
    @classmethod
    def _accept_names(cls, value: object) -> object:
        if not isinstance(value, (list, tuple)):
            return value
        return [_candidate(item) for item in value]

    @model_validator(mode="after")
    def _known_models(self) -> "Campaign":
        names = [candidate.name for candidate in self.models]
        if len(set(names)) != len(names) or "baseline" not in names or len(names) < 2:
            raise ValueError(f"models must be different names, 'baseline' and at least one more, got {names}")
        stated = next((c.params for c in self.models if c.name == "ensemble"), {})
        if stated:
            raise ValueError(f"models.ensemble has no parameters, got {', '.join(stated)}")
        if self.key in NOT_COLUMNS:
            raise ValueError(f"the key column must not be one of {sorted(NOT_COLUMNS)}, got {self.key!r}")
        return self

    @property
    def key(self) -> str:
        """The name of the entity key column, in every table."""
        raise NotImplementedError

    @property
    def attributes(self) -> dict[str, Attribute]:
        """What the file says of columns that describe the entity or the decision."""
        raise NotImplementedError

    @property
    def protected(self) -> tuple[str, ...]:
        """Attributes that no model may see; they are segments to judge the models in."""
        return tuple(name for name, attribute in self.attributes.items() if attribute.protected)

    @property
    def monotone_directions(self) -> dict[str, int]:
        """+1 or -1 by feature, by the names that models know."""
        return {name: 1 if direction == "increasing" else -1 for name, direction in self.monotone.items()}

    def check_monotone(self, kinds: Mapping[str, str]) -> None:
        """Raise a ConfigError unless every feature with a monotone constraint is a number that models read.

        Args:
            kinds: "number" or "category" of each feature that models read.
        """
        for name in self.monotone_directions:
            if name not in kinds:
                numbers = ", ".join(sorted(n for n, kind in kinds.items() if kind == "number"))
                raise ConfigError(f"{self.file}: monotone: there is no feature {name!r}; numbers are {numbers}")
            if kinds[name] != "number":
                raise ConfigError(f"{self.file}: monotone: {name!r} is a category, which has no more or less")

    @property
    def all_segments(self) -> tuple[str, ...]:
        """Stated segments, and the protected attributes."""
        return tuple(dict.fromkeys([*self.segments, *self.protected]))


class EventCampaign(Campaign):
    """Event logs: point-in-time snapshots are built from them."""

    source: EventSource  # pyright: ignore[reportIncompatibleVariableOverride] frozen
    outcome: Outcome  # pyright: ignore[reportIncompatibleVariableOverride] frozen
    eligibility: Eligibility = Eligibility()
    snapshots: Snapshots = Snapshots.model_validate({})
    features: Features = Features()

    @model_validator(mode="after")
    def _consistent(self) -> "EventCampaign":
        streams = self.source.streams
        require_known("outcome.stream", self.outcome.stream, streams)
        for name in self.eligibility.streams or ():
            require_known("eligibility.streams", name, streams)
        for name in self.segments:
            require_known("segments", name, self.attributes)
        for limit in self.contacts.limits:
            require_known("contacts.limits", limit.segment, self.attributes)
        for name in self.holdout.strata:
            require_known("holdout.strata", name, self.attributes)
        if self.treatment is not None:
            require_known("treatment.column", self.treatment.column, self.attributes)
            for name in self.treatment.without:
                require_known("treatment.without", name, streams)
        known = measured_sums(self.source)
        for name, experiment in self.experiments.items():
            for metric, stated in experiment.metrics.items():
                for part in (stated.sum, stated.per):
                    require_known(f"experiments.{name}.metrics.{metric}", part, known)
            for segment in experiment.segments or ():
                require_known(f"experiments.{name}.segments", segment, self.attributes)
        for name in self.monitoring.min_rows:
            require_known("monitoring.min_rows", name, streams)
        if self.outcome.minimum_amount is not None and streams[self.outcome.stream].amount is None:
            raise ValueError(f"outcome.minimum_amount needs an 'amount' in streams.{self.outcome.stream}")
        return self

    @property
    def key(self) -> str:
        """The name of the entity key column, in every table."""
        return self.source.entities.key

    @property
    def attributes(self) -> dict[str, Attribute]:
        """Attributes of the entities."""
        return self.source.entities.attributes

    @property
    def monotone_directions(self) -> dict[str, int]:
        """+1 or -1 by feature; an outward name stands for its feature."""
        return {self.features.names.get(name, name): sign for name, sign in super().monotone_directions.items()}

    @property
    def longest_window(self) -> int:
        """Days the longest look-back window covers."""
        return self.features.windows_days[-1]

    @property
    def outcome_end_days(self) -> int:
        """Days from a snapshot to the end of its outcome window."""
        return self.outcome.gap_days + self.outcome.horizon_days


class TableCampaign(Campaign):
    """A table of past decisions. `exclude` names columns that are no features, each with the reason why.

    `missing` says which values of a column, or with the name "*" of every column, stand for a missing one.
    """

    source: TableSource  # pyright: ignore[reportIncompatibleVariableOverride] frozen
    outcome: ColumnOutcome  # pyright: ignore[reportIncompatibleVariableOverride] frozen
    exclude: dict[str, str] = Field({})
    missing: dict[str, tuple[str, ...]] = Field({})
    split: Split = Split()

    @field_validator("missing", mode="before")
    @classmethod
    def _accept_one(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {k: [str(item) for item in (v if isinstance(v, list) else [v])] for k, v in value.items()}

    @model_validator(mode="after")
    def _consistent(self) -> "TableCampaign":
        outcome = self.outcome.column
        for where, names in (("exclude", self.exclude), ("source.attributes", self.attributes)):
            if outcome in names:
                raise ValueError(f"{where}: {outcome!r} is the outcome, which is never a feature")
        both = sorted(set(self.exclude) & set(self.attributes))
        if both:
            raise ValueError(f"exclude: {both[0]!r} is also in source.attributes: is it a feature or not?")
        for name, reason in self.exclude.items():
            if not reason.strip():
                raise ValueError(f"exclude.{name}: say why, for example 'known only after the call'")
        if self.treatment is not None and self.treatment.column in self.exclude:
            raise ValueError(
                f"exclude: {self.treatment.column!r} is treatment.column: no model sees it, leave it out here"
            )
        if self.treatment is not None and self.treatment.without:
            raise ValueError("treatment.without names event logs, which a table of decisions does not have")
        if self.experiments:
            raise ValueError("experiments are for event logs: a table of decisions has no days after an assignment")
        if self.split.folds and self.source.order:
            raise ValueError("split.folds mixes old and new rows: leave out either 'folds' or source.order")
        return self

    @property
    def key(self) -> str:
        """The name of the entity key column; the row number where the table has none."""
        return self.source.key or ROW_NUMBER

    @property
    def attributes(self) -> dict[str, Attribute]:
        """What the file says of some columns."""
        return self.source.attributes

    @property
    def protected(self) -> tuple[str, ...]:
        """Also the arm of a trial: rows to score have none yet."""
        return (*super().protected, *([self.treatment.column] if self.treatment else []))


def measured_sums(source: EventSource) -> dict[str, str]:
    """What an experiment may measure, with its column of the activity table."""
    found: dict[str, str] = {}
    for name, stream in source.streams.items():
        found[f"{name}.count"] = f"{name}__count"
        if stream.amount:
            found[f"{name}.amount"] = f"{name}__amount"
        found |= {f"{name}.{measure}": f"{name}__{measure}" for measure in stream.measures}
        if stream.type:
            found |= {f"{name}.{kind}": f"{name}__type_{kind}" for kind in stream.types}
    return found


_SHAPES: dict[str, type[Campaign]] = {"events": EventCampaign, "table": TableCampaign}


def load_campaign(path: Path) -> Campaign:
    """Read and validate one campaign file.

    Raises:
        ConfigError: naming the file, the key, what came and what was wanted; every problem at once.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read: {error.strerror if isinstance(error, OSError) else error}"
        ) from None
    try:
        content = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must be a mapping of keys, got {type(content).__name__}")
    if "file" in content:
        raise ConfigError(f"{path}: unknown key 'file'")
    shape = _shape(path, content)
    try:
        return shape.model_validate({**content, "file": path.resolve()})
    except ValidationError as error:
        found = [one_of_two(problem) for problem in error.errors(include_url=False)]
        raise ConfigError("\n".join(explain_problem(path, shape, problem) for problem in found if problem)) from None


def load_campaigns(folder: Path) -> list[Campaign]:
    """Read every `*.yaml` of a folder, by file name; or one file.

    Raises:
        ConfigError: for a folder without campaigns, a file that does not parse, or a name used twice.
    """
    if folder.is_file():  # one campaign alone: a broken file beside it is not its business
        return [load_campaign(folder)]
    files = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    if not files:
        raise ConfigError(f"{folder}: no campaign file (*.yaml) in this folder")
    campaigns: dict[str, Campaign] = {}
    for file in files:
        campaign = load_campaign(file)
        if campaign.name in campaigns:
            raise ConfigError(f"{file}: name: {campaign.name!r} is already the name of {campaigns[campaign.name].file}")
        campaigns[campaign.name] = campaign
    return list(campaigns.values())


def find_campaign(campaign: str) -> Campaign:
    """A campaign by the path of its file, or by name among those of PROPENSITY_CAMPAIGNS, else the shipped ones.

    Raises:
        ConfigError: when there is none, or its file is wrong.
    """
    path = Path(campaign)
    if path.suffix in (".yaml", ".yml"):
        return load_campaign(path)
    known = {c.name: c for c in load_campaigns(Path(os.environ.get(CAMPAIGNS) or SHIPPED))}
    if campaign not in known:
        raise ConfigError(
            f"there is no campaign {campaign!r}; there are {', '.join(known)}, or give the path of a YAML file"
        )
    return known[campaign]


def _shape(path: Path, content: dict[Any, Any]) -> "type[Campaign]":
    source = content.get("source")
    kind = source.get("kind") if isinstance(source, dict) else None
    if kind not in _SHAPES:
        raise ConfigError(f"{path}: source.kind: must be one of {', '.join(_SHAPES)}, got {kind!r}")
    return _SHAPES[kind]


class _StrictLoader(yaml.CSafeLoader):
    """YAML in which a key given twice is an error: the second would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # pyright: ignore[reportUnknownVariableType]
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _candidate(item: object) -> object:
    if isinstance(item, str):
        return {"name": item}
    if isinstance(item, dict) and len(item) == 1:
        ((name, params),) = item.items()
        return {"name": name, "params": params or {}} if name != "name" else item
    return item


def one_of_two(problem: Any) -> Any:
    """A problem with a key that takes a word or a section, without pydantic's name for which of the two; None where it
    is about the other one than was written.
    """
    place = [part for part in problem["loc"] if not _ALTERNATIVE.fullmatch(str(part))]
    if len(place) == len(problem["loc"]):
        return problem
    about_words = any(str(part).startswith("literal[") for part in problem["loc"])
    if about_words == isinstance(problem["input"], dict) and problem["type"] in ("literal_error", "model_type"):
        return None
    message = problem["msg"] + " or a section of its own" if about_words else problem["msg"]
    return {**problem, "loc": tuple(place), "msg": message}


def explain_problem(path: Path, shape: type[BaseModel], problem: Any) -> str:
    """One of pydantic's problems with a file, in words: where, what came, what is allowed.

    Args:
        path: of the file.
        shape: what the file should be.
        problem: one of `ValidationError.errors()`. What came is not shown if it holds an address, which may hold a
            password.
    """
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        parent = problem["loc"][:-1]
        allowed = _allowed_keys(shape, parent)
        close = difflib.get_close_matches(str(problem["loc"][-1]), allowed, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        listing = f"; allowed are {', '.join(allowed)}" if allowed else ""
        return f"{path}: {where}: unknown key{hint}{listing}"
    if problem["type"] == "missing":
        return f"{path}: {where}: required key is missing"
    message = problem["msg"].removeprefix("Value error, ")
    got = problem["input"]
    shows_input = "got" not in message and not isinstance(got, dict) and "://" not in str(got)
    prefix = f"{path}: {where}: " if where else f"{path}: "
    return prefix + message + (f", got {got!r}" if shows_input else "")


def _allowed_keys(shape: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Keys the model at this place of the file knows, or none where the place is free."""
    model: Any = shape
    for part in location:
        field = getattr(model, "model_fields", {}).get(part) or next(
            (f for f in getattr(model, "model_fields", {}).values() if f.alias == part), None
        )
        if field is None:  # a mapping's own key, or a list's index
            continue
        model = _model_in(field.annotation)
    fields = getattr(model, "model_fields", {})
    return [info.alias or name for name, info in fields.items() if name != "file"]


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _model_in(argument)
        if found is not None:
            return found
    return None
