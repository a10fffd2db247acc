"""The campaign file: one propensity question, frozen and validated.

Belongs here: the shape of the YAML, its defaults and its error messages. Does not: reading data.
"""

import difflib
import re
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from propensity_dagster.errors import ConfigError

MODEL_NAMES = ("baseline", "logistic_regression", "lightgbm", "neural_network", "ensemble")
SHIPPED = Path(__file__).parent / "campaigns"
SYNTHETIC_SCHEME = "synthetic://"

_IDENTIFIER = re.compile(r"[a-z][a-z0-9_]*")
_RESERVED = frozenset({"day", "known_day", "snapshot", "split", "converted", "reason", "created_day"})


def _check_identifier(value: str) -> str:
    if not _IDENTIFIER.fullmatch(value):
        raise ValueError(f"must be lower-case letters, digits and underscores, got {value!r}")
    return value


def _parse_days(value: object) -> object:
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+)d", value)
        if not match:
            raise ValueError(f"must be a number of days such as 7d, got {value!r}")
        return int(match.group(1))
    return value


Identifier = Annotated[str, AfterValidator(_check_identifier)]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Attribute(_Frozen):
    """A column of the customer table that becomes a feature. Without a type, the source's column decides."""

    type: Literal["number", "category"] | None = None
    minimum: float | None = None
    maximum: float | None = None


class _Table(_Frozen):
    table: str
    key: str | None = None
    where: str | None = None
    derive: dict[str, str] = {}


class Entities(_Frozen):
    """Who is scored: a table of them, or, with `stream`, everybody seen in that event log."""

    table: str | None = None
    stream: str | None = None
    key: str
    created_at: str | None = None
    time_format: str | None = None
    attributes: dict[str, Attribute] = {}
    where: str | None = None
    derive: dict[str, str] = {}

    @field_validator("attributes", mode="before")
    @classmethod
    def _accept_list(cls, value: object) -> object:
        if isinstance(value, list):
            return {name: {} for name in value}
        if isinstance(value, dict):
            return {k: {"type": v} if isinstance(v, str) else (v or {}) for k, v in value.items()}
        return value

    @model_validator(mode="after")
    def _one_origin(self) -> "Entities":
        if (self.table is None) == (self.stream is None):
            raise ValueError("needs exactly one of 'table' and 'stream'")
        if self.table is not None and self.created_at is None:
            raise ValueError("created_at is required with 'table': when did each entity become known?")
        if self.stream is not None and self.created_at is not None:
            raise ValueError("created_at is not allowed with 'stream': the first event says it")
        return self


class Stream(_Table):
    """An event log.

    `lines: true` says that several rows share one id and together are one event. `equal_rows: keep` says that
    rows equal in every column are different events, not one written twice; it is for logs without an id.
    """

    time: str
    time_format: str | None = None
    id: str | None = None
    lines: bool = False
    equal_rows: Literal["drop", "keep"] = "drop"
    amount: str | None = None
    minimum_amount: float | None = 0.0
    measures: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    type: str | None = None
    types: tuple[Identifier, ...] = ("sent", "open", "click")
    ingested_at: str | None = None

    @model_validator(mode="after")
    def _lines_need_an_id(self) -> "Stream":
        if self.lines and self.id is None:
            raise ValueError("lines: true needs an 'id': which rows belong to one event?")
        if self.equal_rows == "keep" and self.id is not None and not self.lines:
            raise ValueError("equal_rows: keep contradicts 'id': rows with one id are one event")
        return self


class EventSource(_Frozen):
    """A customer table and event logs. Days are UTC; `last_day` is stated when the log has ended."""

    kind: Literal["events"]
    connection: str
    entities: Entities
    streams: dict[Identifier, Stream] = Field(min_length=1)
    first_day: date | None = None
    last_day: date | None = None
    late_days: NonNegative = 0

    @model_validator(mode="after")
    def _known_stream(self) -> "EventSource":
        _require_known("entities.stream", self.entities.stream, self.streams)
        if self.first_day is None and not self.connection.startswith(SYNTHETIC_SCHEME):
            raise ValueError("first_day is required: the first day of the event logs, for example 2024-01-01")
        if self.first_day and self.last_day and self.first_day >= self.last_day:
            raise ValueError(f"first_day must be before last_day, got {self.first_day} and {self.last_day}")
        return self


class Outcome(_Frozen):
    """What counts as a conversion: an event of `stream` in [t + gap, t + gap + horizon)."""

    stream: str
    gap_days: NonNegative = 0
    horizon_days: Positive = 30
    where: str | None = None
    minimum_amount: float | None = None


class Eligibility(_Frozen):
    """Who is asked about at t. Activity is an event of `streams` (all, when absent) or the creation itself."""

    active_within_days: Positive | None = None
    min_tenure_days: NonNegative = 0
    streams: tuple[str, ...] | None = None


class Snapshots(_Frozen):
    """How many snapshots each split gets, counted back from `newest` or the newest mature one."""

    every: Annotated[int, Field(gt=0)] = 7
    train: Positive = 26
    validate_: Positive = Field(4, alias="validate")
    test: Positive = 4
    newest: date | None = None

    _days = field_validator("every", mode="before")(_parse_days)


class Features(_Frozen):
    """Look-back windows in days, and names by which people outside know some features."""

    windows_days: tuple[Positive, ...] = (7, 30, 90, 365)
    names: dict[Identifier, str] = {}

    @field_validator("windows_days")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or list(value) != sorted(set(value)):
            raise ValueError(f"must be different numbers of days in ascending order, got {list(value)}")
        return value


class Candidate(_Frozen):
    """A model to train, with parameters that replace the estimator's defaults."""

    name: Literal["baseline", "logistic_regression", "lightgbm", "neural_network", "ensemble"]
    params: dict[str, Any] = {}


class Value(_Frozen):
    """Money of one contact and one conversion, in the campaign's currency; capacity is people per snapshot."""

    margin_per_conversion: Annotated[float, Field(ge=0)] = 1.0
    cost_per_contact: Annotated[float, Field(ge=0)] = 0.0
    capacity: Positive | None = None


class Tiers(_Frozen):
    """Percentiles from which a customer is in the high and the medium tier."""

    high: Fraction = 0.9
    medium: Fraction = 0.6

    @model_validator(mode="after")
    def _ordered(self) -> "Tiers":
        if self.medium >= self.high:
            raise ValueError(f"medium must be below high, got {self.medium} and {self.high}")
        return self


class Holdout(_Frozen):
    """Share of entities deliberately not contacted."""

    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05


class Schedule(_Frozen):
    """Cron lines in UTC, and a folder whose new files start an ingestion."""

    score: str = "0 2 * * *"
    train: str = "0 4 1 * *"
    watch: str | None = None


class Gate(_Frozen):
    """What a challenger must satisfy on out-of-time test snapshots. See evaluation/gate.py."""

    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    lift_margin: Annotated[float, Field(ge=0)] = 0.25
    slope: tuple[float, float] = (0.7, 1.4)
    max_intercept: Annotated[float, Field(gt=0)] = 0.5
    max_calibration_error: Fraction = 0.05
    min_segment_auc: Fraction = 0.5


class Campaign(_Frozen):
    """One propensity question. `file` says where it was read from; relative paths start there."""

    name: Identifier
    description: str = ""
    source: EventSource
    outcome: Outcome
    eligibility: Eligibility = Eligibility()
    snapshots: Snapshots = Snapshots.model_validate({})
    features: Features = Features()
    models: tuple[Candidate, ...] = tuple(Candidate.model_validate({"name": name}) for name in MODEL_NAMES)
    value: Value = Value()
    segments: tuple[str, ...] = ()
    tiers: Tiers = Tiers()
    holdout: Holdout = Holdout()
    schedule: Schedule = Schedule()
    gate: Gate = Gate()
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
    def _consistent(self) -> "Campaign":
        streams = self.source.streams
        _require_known("outcome.stream", self.outcome.stream, streams)
        for name in self.eligibility.streams or ():
            _require_known("eligibility.streams", name, streams)
        for name in self.segments:
            _require_known("segments", name, self.source.entities.attributes)
        names = [candidate.name for candidate in self.models]
        if len(set(names)) != len(names) or "baseline" not in names or len(names) < 2:
            raise ValueError(f"models must be different names, 'baseline' and at least one more, got {names}")
        if self.key in _RESERVED:
            raise ValueError(f"entities.key must not be one of {sorted(_RESERVED)}, got {self.key!r}")
        if self.outcome.minimum_amount is not None and streams[self.outcome.stream].amount is None:
            raise ValueError(f"outcome.minimum_amount needs an 'amount' in streams.{self.outcome.stream}")
        return self

    @property
    def key(self) -> str:
        """The name of the entity key column, in every table."""
        return self.source.entities.key

    @property
    def longest_window(self) -> int:
        """Days the longest look-back window covers."""
        return self.features.windows_days[-1]

    @property
    def outcome_end_days(self) -> int:
        """Days from a snapshot to the end of its outcome window."""
        return self.outcome.gap_days + self.outcome.horizon_days


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
    try:
        return Campaign.model_validate({**content, "file": path.resolve()})
    except ValidationError as error:
        lines = [_explain(path, problem) for problem in error.errors(include_url=False)]
        raise ConfigError("\n".join(lines)) from None


def load_campaigns(folder: Path) -> list[Campaign]:
    """Read every `*.yaml` of a folder, by file name.

    Raises:
        ConfigError: for a folder without campaigns, a file that does not parse, or a name used twice.
    """
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


class _StrictLoader(yaml.SafeLoader):
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


def _require_known(where: str, name: str | None, known: dict[str, Any]) -> None:
    if name is not None and name not in known:
        raise ValueError(f"{where}: {name!r} is not declared; declared are {', '.join(known) or 'none'}")


def _explain(path: Path, problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        parent = problem["loc"][:-1]
        allowed = _allowed_keys(parent)
        close = difflib.get_close_matches(str(problem["loc"][-1]), allowed, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        listing = f"; allowed are {', '.join(allowed)}" if allowed else ""
        return f"{path}: {where}: unknown key{hint}{listing}"
    if problem["type"] == "missing":
        return f"{path}: {where}: required key is missing"
    message = problem["msg"].removeprefix("Value error, ")
    got = problem["input"]
    shows_input = "got" not in message and not isinstance(got, dict)
    prefix = f"{path}: {where}: " if where else f"{path}: "
    return prefix + message + (f", got {got!r}" if shows_input else "")


def _allowed_keys(location: tuple[Any, ...]) -> list[str]:
    """Keys the model at this place of the file knows, or none where the place is free."""
    model: Any = Campaign
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
