"""The sections of a campaign file. Belongs here: their keys, defaults and what is allowed in each."""

import re
from collections.abc import Iterable
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

MODEL_NAMES = ("baseline", "logistic_regression", "lightgbm", "neural_network", "ensemble")
SYNTHETIC_SCHEME = "synthetic://"

_IDENTIFIER = re.compile(r"[a-z][a-z0-9_]*")


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


def _accept_attributes(value: object) -> object:
    """A list of names, or names with a type, stands for the full form."""
    if isinstance(value, list):
        return {name: {} for name in value}
    if isinstance(value, dict):
        return {k: {"type": v} if isinstance(v, str) else (v or {}) for k, v in value.items()}
    return value


def _check_connection(value: str) -> str:
    """A password may come from the environment only: the file is kept, shown and logged."""
    if re.search(r"://[^:/@]*:(?!\$\{)[^/]*@|[?&]password=", value):
        raise ValueError(
            "got a password in clear; it must come from the environment: scheme://user:${NAME}@host/database"
        )
    return value


Connection = Annotated[str, AfterValidator(_check_connection)]


def require_known(where: str, name: str | None, known: Iterable[str]) -> None:
    """Raise a ValueError unless `name` is one of `known`."""
    if name is not None and name not in known:
        raise ValueError(f"{where}: {name!r} is not declared; declared are {', '.join(known) or 'none'}")


class Frozen(BaseModel):
    """A section: unchangeable, and refusing unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Csv(Frozen):
    """How CSV files are written, where looking at them is not enough to tell."""

    separator: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    quote: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    encoding: Literal["utf-8", "latin-1", "utf-16"] | None = None


class Attribute(Frozen):
    """A column of the customer table that becomes a feature. Without a type, the source's column decides.

    A protected attribute is no feature: models never see it, and it is a segment, so that they can be judged in it.
    """

    type: Literal["number", "category"] | None = None
    minimum: float | None = None
    maximum: float | None = None
    protected: bool = False


class Entities(Frozen):
    """Who is scored: a table of them, or, with `stream`, everybody seen in that event log."""

    table: str | None = None
    stream: str | None = None
    key: str
    created_at: str | None = None
    time_format: str | None = None
    attributes: dict[str, Attribute] = {}
    where: str | None = None
    derive: dict[str, str] = {}

    _forms = field_validator("attributes", mode="before")(_accept_attributes)

    @model_validator(mode="after")
    def _one_origin(self) -> "Entities":
        if (self.table is None) == (self.stream is None):
            raise ValueError("needs exactly one of 'table' and 'stream'")
        if self.table is not None and self.created_at is None:
            raise ValueError("created_at is required with 'table': when did each entity become known?")
        if self.stream is not None and self.created_at is not None:
            raise ValueError("created_at is not allowed with 'stream': the first event says it")
        return self


class Stream(Frozen):
    """An event log.

    `lines: true` says that several rows share one id and together are one event. `equal_rows: keep` says that
    rows equal in every column are different events, not one written twice; it is for logs without an id.
    """

    table: str
    time: str
    key: str | None = None
    where: str | None = None
    derive: dict[str, str] = {}
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

    @model_validator(mode="after")
    def _one_name_each(self) -> "Stream":
        """Of what a day of an entity is described by."""
        names = ["count", *(["amount", "amount_max"] if self.amount else [])]
        names += [f"type_{kind}" for kind in self.types] if self.type else []
        for measure in self.measures:
            taken = next((name for name in (measure, f"{measure}_max") if name in names), None)
            if taken:
                raise ValueError(
                    f"measures: {measure!r} cannot be told from the {taken!r} of a day; give the column another name "
                    f"with derive, for example derive: {{{measure}_value: {measure}}}"
                )
            names += [measure, f"{measure}_max"]
        return self


class EventSource(Frozen):
    """A customer table and event logs. Days are UTC; `last_day` is stated when the log has ended."""

    kind: Literal["events"]
    connection: Connection
    csv: Csv = Csv()
    entities: Entities
    streams: dict[Identifier, Stream] = Field(min_length=1)
    first_day: date | None = None
    last_day: date | None = None
    late_days: NonNegative = 0

    @model_validator(mode="after")
    def _known_stream(self) -> "EventSource":
        require_known("entities.stream", self.entities.stream, self.streams)
        if self.first_day is None and not self.connection.startswith(SYNTHETIC_SCHEME):
            raise ValueError("first_day is required: the first day of the event logs, for example 2024-01-01")
        if self.first_day and self.last_day and self.first_day >= self.last_day:
            raise ValueError(f"first_day must be before last_day, got {self.first_day} and {self.last_day}")
        return self


class TableSource(Frozen):
    """One row per past decision, with its outcome in a column.

    Attributes:
        path: a CSV or parquet file, or a folder of them; or else
        connection: a database (or folder), with `table`.
        key: column of the entity; without one the row number is the key.
        order: "file", or a column of times: the newest rows are the test rows. Without it a hash of the key decides.
        attributes: what to say of some columns; every other column is a feature too, its type as it is found.
        where: which past decisions to learn from; rows to score are all scored.
        new_rows: path or table of rows to score; the score job may be pointed elsewhere.
        first_day: the oldest day that can be scored.
    """

    kind: Literal["table"]
    path: str | None = None
    connection: Connection | None = None
    table: str | None = None
    csv: Csv = Csv()
    key: str | None = None
    order: str | None = None
    time_format: str | None = None
    attributes: dict[str, Attribute] = {}
    where: str | None = None
    derive: dict[str, str] = {}
    new_rows: str | None = None
    first_day: date = date(2024, 1, 1)

    _forms = field_validator("attributes", mode="before")(_accept_attributes)

    @model_validator(mode="after")
    def _one_place(self) -> "TableSource":
        if (self.path is None) == (self.connection is None) or (self.connection is None) != (self.table is None):
            raise ValueError("needs either 'path' (a file or folder) or 'connection' and 'table'")
        if self.order == "file" and self.path is None:
            raise ValueError("order: file needs a 'path': rows of a database have no order of their own")
        return self


class Outcome(Frozen):
    """What counts as a conversion: an event of `stream` in [t + gap, t + gap + horizon)."""

    stream: str
    gap_days: NonNegative = 0
    horizon_days: Positive = 30
    where: str | None = None
    minimum_amount: float | None = None


class ColumnOutcome(Frozen):
    """The column that says what came of a decision.

    `positive` is the value of a conversion; it may be left out where the two values are a known pair, such as
    yes and no. `negative` lists the other values; it is needed only where there is more than one.
    """

    column: str
    positive: bool | str | None = None
    negative: tuple[bool | str, ...] | None = None

    @field_validator("positive", mode="before")
    @classmethod
    def _as_written(cls, value: object) -> object:
        return value if isinstance(value, bool) or value is None else str(value)

    @field_validator("negative", mode="before")
    @classmethod
    def _accept_one(cls, value: object) -> object:
        values = value if isinstance(value, (list, tuple)) else [value]
        return None if value is None else [v if isinstance(v, bool) else str(v) for v in values]


class Eligibility(Frozen):
    """Who is asked about at t. Activity is an event of `streams` (all, when absent) or the creation itself."""

    active_within_days: Positive | None = None
    min_tenure_days: NonNegative = 0
    streams: tuple[str, ...] | None = None


class Snapshots(Frozen):
    """How many snapshots each split gets, counted back from `newest` or the newest mature one.

    Of the training rows without the outcome only the share `keep_negatives` is learnt from, which is corrected for;
    validation and test rows are never left out.
    """

    every: Annotated[int, Field(gt=0)] = 7
    train: Positive = 26
    validate_: Positive = Field(4, alias="validate")
    test: Positive = 4
    newest: date | None = None
    keep_negatives: Annotated[float, Field(gt=0, le=1)] = 1.0

    _days = field_validator("every", mode="before")(_parse_days)


class Features(Frozen):
    """Look-back windows in days, and names by which people outside know some features."""

    windows_days: tuple[Positive, ...] = (7, 30, 90, 365)
    names: dict[Identifier, str] = {}

    @field_validator("windows_days")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or list(value) != sorted(set(value)):
            raise ValueError(f"must be different numbers of days in ascending order, got {list(value)}")
        return value


class Split(Frozen):
    """Test rows of a table: a fraction, the newest where there is an order; or every row once, in `folds`.

    All other rows train. They are cross-validated in five folds of entities: early stopping, calibration and
    blending see only scores of rows that the scoring model was not trained on.
    """

    test: Annotated[float, Field(gt=0, lt=1)] = 0.2
    folds: Annotated[int, Field(ge=2, le=20)] | None = None


class Prior(Frozen):
    """Whether scores follow the outcome rate of the rows they are for. See models/prior.py."""

    adapt: bool = False
    max_odds_ratio: Annotated[float, Field(gt=1)] = 4.0


class Search(Frozen):
    """Search for better parameters, for at most `seconds` a model, judged on validation rows only."""

    seconds: Annotated[float, Field(gt=0)]
    trials: Positive = 100
    models: tuple[Literal["logistic_regression", "lightgbm", "neural_network"], ...] = ("lightgbm",)


class Target(Frozen):
    """A database table that the scores are written to, besides the lake."""

    connection: Connection
    table: Identifier = "scores"


class Candidate(Frozen):
    """A model to train, with parameters that replace the estimator's defaults."""

    name: Literal["baseline", "logistic_regression", "lightgbm", "neural_network", "ensemble"]
    params: dict[str, Any] = {}


class Value(Frozen):
    """Money of one contact and one conversion, in the campaign's currency; capacity and budget are per snapshot."""

    margin_per_conversion: Annotated[float, Field(ge=0)] = 1.0
    cost_per_contact: Annotated[float, Field(ge=0)] = 0.0
    capacity: Positive | None = None
    budget: Annotated[float, Field(ge=0)] | None = None


class ContactChannel(Frozen):
    """What one contact costs, and how many there may be."""

    cost: Annotated[float, Field(ge=0)]
    capacity: NonNegative | None = None


class ContactLimit(Frozen):
    """How many customers with this `value` of a `segment` are contacted at least and at most."""

    segment: str
    value: str
    minimum: NonNegative = 0
    maximum: NonNegative | None = None


class Register(Frozen):
    """A table of customers, of the source or of another connection; `key` is the campaign's, if absent."""

    table: str
    connection: Connection | None = None
    key: str | None = None


class Consent(Register):
    """Who may be contacted. Who is not in the table may not.

    Attributes:
        granted: column that says so.
        values: of that column that mean yes.
        channel: column with the name of the channel that a row is about; every channel, if absent.
        time: column of when it was given or withdrawn: the newest row of a customer counts.
        max_age_days: the table is stale when its newest `time` is older, and then nobody is contacted.
    """

    granted: str
    values: tuple[str, ...] = ("true", "yes", "1", "t", "y")
    channel: str | None = None
    time: str | None = None
    max_age_days: Positive = 7

    @model_validator(mode="after")
    def _age_by_time(self) -> "Consent":
        if "max_age_days" in self.model_fields_set and self.time is None:
            raise ValueError("max_age_days needs 'time': without it nobody can tell how old the consents are")
        return self

    @field_validator("values", mode="before")
    @classmethod
    def _accept_one(cls, value: object) -> object:
        values = value if isinstance(value, (list, tuple)) else [value]
        return [str(v).lower() for v in values]


class FrequencyCap(Frozen):
    """At most so many `contacts` of a customer within `days`, those of other `campaigns` among them."""

    contacts: Positive = 1
    days: Positive = 30
    campaigns: tuple[Identifier, ...] = ()


class Export(Frozen):
    """Where an audience goes. `folder`: of files; `connection` and `table`: of a database; `url`: of a webhook.

    A webhook gets `batch` contacts a request; `headers` may hold secrets as ${NAME} only.
    """

    name: Identifier
    kind: Literal["csv", "parquet", "table", "webhook"]
    folder: str | None = None
    connection: Connection | None = None
    table: Identifier | None = None
    url: Connection | None = None
    headers: dict[str, str] = {}
    batch: Annotated[int, Field(gt=0, le=10_000)] = 500

    @model_validator(mode="after")
    def _of_its_kind(self) -> "Export":
        needed = {"table": ("connection", "table"), "webhook": ("url",)}.get(self.kind, ())
        allowed = {*needed, *({"headers", "batch"} if self.kind == "webhook" else ())}
        allowed |= {"folder"} if self.kind in ("csv", "parquet") else set()
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(f"an export of kind {self.kind} needs {' and '.join(map(repr, needed))}")
        for name in sorted(self.model_fields_set - allowed - {"name", "kind"}):
            raise ValueError(f"an export of kind {self.kind} has no {name!r}")
        for name, text in self.headers.items():
            if re.search("auth|key|token|secret", name, re.IGNORECASE) and "${" not in text:
                raise ValueError(
                    f"headers.{name}: a secret must come from the environment, as ${{NAME}}; got clear text"
                )
        return self


class Contacts(Frozen):
    """Who may be contacted, how, how often, and where the audience goes.

    Attributes:
        channels: ways to contact customers, instead of `value.cost_per_contact`.
        limits: by segment.
        consent: the register, or "not_required". Without it nobody is contacted.
        suppression: registers of customers who are never contacted.
        at_most: how often.
        random: so many customers below the cut-off are contacted by lot, to measure what the model is worth.
        exports: where the audience goes.
    """

    channels: dict[Identifier, ContactChannel] = {}
    limits: tuple[ContactLimit, ...] = ()
    consent: Literal["not_required"] | Consent | None = None
    suppression: tuple[Register, ...] = ()
    at_most: FrequencyCap | None = None
    random: NonNegative = 0
    exports: tuple[Export, ...] = ()

    @field_validator("channels", mode="before")
    @classmethod
    def _accept_costs(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {name: {"cost": c} if isinstance(c, int | float) else c for name, c in value.items()}

    @field_validator("suppression", mode="before")
    @classmethod
    def _accept_names(cls, value: object) -> object:
        values = value if isinstance(value, (list, tuple)) else [value]
        return [{"table": v} if isinstance(v, str) else v for v in values]

    @model_validator(mode="after")
    def _different_names(self) -> "Contacts":
        names = [export.name for export in self.exports]
        if len(set(names)) != len(names):
            raise ValueError(f"exports must have different names, got {names}")
        if isinstance(self.consent, Consent) and self.consent.channel and not self.channels:
            raise ValueError("consent.channel needs 'channels': without them there is one way to contact, 'contact'")
        return self


class Metric(Frozen):
    """What is measured of a unit in the days after its assignment.

    `sum` names what is added up, as stream.count, stream.amount, stream.<measure> or stream.<type>; with `per`, another
    of these, it is the ratio of the two sums over all units of a variant.
    """

    sum: str
    per: str | None = None
    better: Literal["more", "less"] = "more"


class Assignments(Register):
    """A table of who was assigned to what, and when; one row a unit."""

    variant: str
    time: str


CONVERSION = "conversion"


class Experiment(Frozen):
    """Variants that units get by lot, and what is to be compared. See experiments/.

    Attributes:
        units: whom it is about: contacts of an `audience`, all `scored` customers, customers whom the service answers
            (`predictions`, whose variants are champion and challenger), or a table of assignments made elsewhere.
        variants: with their shares; the first is the control.
        starts: first day on which units are assigned.
        ends: first day on which none is any more.
        horizon_days: how long after its assignment a unit is measured; the outcome's, if absent.
        metrics: besides `conversion`, the campaign's own outcome.
        primary: the metric that decides.
        guardrails: metrics that must not become worse.
        minimum_effect: relative change of the primary metric that is worth finding.
        planned_units: how many are expected; the always-valid intervals are tightest there.
        alpha: chance of a false alarm.
        power: chance of finding the minimum effect.
        salt: of the assignment; the experiment's name, if absent.
        segments: columns in whose values the effect is shown too; the campaign's, if absent.
    """

    units: Literal["audience", "scored", "predictions"] | Assignments
    variants: dict[str, Annotated[float, Field(gt=0, lt=1)]]
    starts: date
    ends: date
    horizon_days: Annotated[int, Field(gt=0)] | None = None
    metrics: dict[Identifier, Metric] = {}
    primary: Identifier = CONVERSION
    guardrails: tuple[Identifier, ...] = ()
    minimum_effect: Annotated[float, Field(gt=0)] = 0.05
    planned_units: Positive = 10_000
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    power: Annotated[float, Field(gt=0.5, lt=1)] = 0.8
    salt: str | None = None
    segments: tuple[str, ...] | None = None

    @field_validator("metrics", mode="before")
    @classmethod
    def _accept_sums(cls, value: object) -> object:
        return (
            {k: {"sum": v} if isinstance(v, str) else v for k, v in value.items()} if isinstance(value, dict) else value
        )

    @model_validator(mode="after")
    def _consistent(self) -> "Experiment":
        if len(self.variants) < 2 or abs(sum(self.variants.values()) - 1) > 1e-9:
            raise ValueError(f"variants must be two or more whose shares sum to 1, got {self.variants}")
        if self.ends <= self.starts:
            raise ValueError(f"ends must be after starts, got {self.starts} and {self.ends}")
        if CONVERSION in self.metrics:
            raise ValueError(f"metrics: {CONVERSION!r} is the campaign's own outcome: choose another name")
        for name in (self.primary, *self.guardrails):
            require_known("primary and guardrails", name, [CONVERSION, *self.metrics])
        if self.primary in self.guardrails:
            raise ValueError(f"guardrails: {self.primary!r} is the primary metric")
        return self

    @property
    def control(self) -> str:
        """The variant that the others are compared with."""
        return next(iter(self.variants))


class Treatment(Frozen):
    """A treatment that was drawn by lot: what `uplift` is learnt from. See experiments/uplift.py.

    Attributes:
        column: of the arm of each row, an attribute or a column of the table.
        control: its value for the untreated; rows with other values than the two are left out.
        treated: its value for the treated.
        share: of the treated, as it was drawn.
        without: event logs that the treatment itself writes to: what is known from them is a consequence.
    """

    column: str
    control: str
    treated: str
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    without: tuple[str, ...] = ()


class Tiers(Frozen):
    """Percentiles from which a customer is in the high and the medium tier."""

    high: Fraction = 0.9
    medium: Fraction = 0.6

    @model_validator(mode="after")
    def _ordered(self) -> "Tiers":
        if self.medium >= self.high:
            raise ValueError(f"medium must be below high, got {self.medium} and {self.high}")
        return self


class Explanations(Frozen):
    """Reasons beside every score: how many, for whom, in which words. See explain/reasons.py.

    `sentences` are the campaign's own, by feature, with `{value}` and `{typical}`; `hidden` features are not for
    customers' eyes and never become a reason.
    """

    reasons: Annotated[int, Field(ge=0, le=5)] = 5
    above_percentile: Fraction = 0.0
    sentences: dict[str, str] = {}
    hidden: tuple[str, ...] = ()

    @field_validator("sentences")
    @classmethod
    def _known_places(cls, value: dict[str, str]) -> dict[str, str]:
        for feature, sentence in value.items():
            wrong = [p for p in re.findall(r"\{[^{}]*\}", sentence) if p not in ("{value}", "{typical}")]
            if wrong or "\n" in sentence or not 0 < len(sentence) <= 200:
                raise ValueError(
                    f"sentences.{feature}: must be one line of at most 200 characters with {{value}} and {{typical}}, "
                    f"got {sentence[:60]!r}"
                )
        return value


class Holdout(Frozen):
    """Entities deliberately not contacted: which share, for how long each, and alike in which segments.

    See experiments/holdout.py.
    """

    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    keep_days: Positive = 90
    strata: tuple[str, ...] = ()


class Schedule(Frozen):
    """Cron lines in UTC, and a folder whose new files start an ingestion."""

    score: str = "0 2 * * *"
    train: str = "0 4 1 * *"
    watch: str | None = None


class Monitoring(Frozen):
    """What is worth an alert, and what the system may do about it by itself. See monitoring/.

    Attributes:
        min_rows: by event log, rows a day below which there is an alert, whatever its history says.
        max_gap: how far conversions may be from what was promised: 0.25 is a quarter more, or as many times less.
        max_auc_loss: how far the AUC may be below what was promised.
        persist: mature snapshots in a row with the same problem that make it concept drift.
        react: whether models are recalibrated and trained again without being asked; the gate decides all the same.
        react_every_days: an automatic act is the only one for so many days.
        retrain_after_days: age of the champion's newest training snapshot at which it is trained again; null: never.
    """

    min_rows: dict[Identifier, NonNegative] = {}
    max_gap: Annotated[float, Field(gt=0)] = 0.25
    max_auc_loss: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    persist: Positive = 3
    react: bool = True
    react_every_days: Positive = 7
    retrain_after_days: Positive | None = None


class Gate(Frozen):
    """What a challenger must satisfy on out-of-time test snapshots. See evaluation/gate.py."""

    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    lift_margin: Annotated[float, Field(ge=0)] = 0.25
    slope: tuple[float, float] = (0.7, 1.4)
    max_intercept: Annotated[float, Field(gt=0)] = 0.5
    max_calibration_error: Fraction = 0.05
    min_segment_auc: Fraction = 0.5
