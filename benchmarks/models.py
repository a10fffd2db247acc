"""Training, scoring, reasons, drift and the plan of contacts, on made-up rows of 40 features."""

from collections.abc import Callable
from contextlib import ExitStack
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measure import Figure, contest, prepare
from propensity_dagster.campaign import Campaign, find_campaign
from propensity_dagster.data.engine import open_engine
from propensity_dagster.data.lake import Home, publish_table
from propensity_dagster.evaluation.planner import Channel, Limits, SegmentLimit, plan
from propensity_dagster.models.base import FittedModel, threads
from propensity_dagster.models.calibration import Calibrator, Floats
from propensity_dagster.models.dataset import CATEGORY, Dataset, FeatureContract, FeatureSpec
from propensity_dagster.models.ensemble import EnsembleScorer
from propensity_dagster.models.linear import LogisticRegressionEstimator
from propensity_dagster.models.network import NeuralNetworkEstimator
from propensity_dagster.models.population import describe_population, number_buckets
from propensity_dagster.models.saved import load_model, write_model
from propensity_dagster.models.trees import LightGBMEstimator
from propensity_dagster.monitoring.domain import keep_reference
from propensity_dagster.monitoring.drift import publish_drift
from propensity_dagster.monitoring.stability import stability_index
from propensity_dagster.scoring.batch import score_snapshot

FEATURES, CHUNK, TREES = 40, 50_000, 300
CAMPAIGN, SNAPSHOT = "ecommerce_purchase", date(2025, 9, 1)
TRAINED_ON = ["2025-03-01", "2025-04-01", "2025-05-01", "2025-06-01", "2025-07-01"]
TRAINED_ROWS = 100_000
LEARNT = "training_set.parquet"
KINDS = ("lightgbm", "neural_network", "ensemble")


def benchmark(sizes: list[int], folder: Path) -> list[Figure]:
    """Training at these numbers of rows; the others at ten times as many."""
    many = [10 * size for size in sizes]
    prepare_homes(folder, many)
    raw = "raw, of a ready matrix"
    return [
        *contest("train LightGBM", sizes, "rows", {"ours": train_trees, "lightgbm.train": train_lightgbm}, folder),
        *contest(
            "train logistic regression", sizes, "rows", {"ours": train_linear, "scikit-learn": train_sklearn}, folder
        ),
        *contest(
            "train the network", sizes, "rows", {"ours": train_network, "scikit-learn's": train_mlp}, folder, rounds=1
        ),
        *(
            figure
            for kind in KINDS
            for figure in contest(
                f"score, {kind}",
                many,
                "rows",
                {"ours": Score(kind), raw: ScoreRaw(kind)},
                folder,
                rounds=2 if kind == "ensemble" else 3,  # its members are measured alone
            )
        ),
        *contest(
            "score with reasons, lightgbm",
            sizes,
            "rows",
            {"ours": Score("lightgbm", 3), "pred_contrib": contributions},
            folder,
            rounds=2,
        ),
        *contest("drift", many, "rows", {"ours": drift, "pandas, the index alone": drift_in_pandas}, folder),
        *contest(
            "plan contacts, 3 channels, 13 limits",
            many,
            "customers",
            {"ours": plan_contacts, "sorting": sort_customers},
            folder,
        ),
    ]


def training_data(rows: int, seed: int) -> Dataset:
    """Heavy-tailed counts, missing values and two categories; 3% convert."""
    rng = np.random.default_rng(seed)
    X = np.asfortranarray(rng.lognormal(0, 1.5, (rows, FEATURES)).round(1))
    X[rng.random(X.shape) < 0.1] = np.nan
    X[:, -2:] = rng.integers(0, 6, (rows, 2))
    z = -4.3 + 0.5 * np.nan_to_num(np.log1p(X[:, 0])) + 0.6 * (np.nan_to_num(X[:, 1]) > 2) + 0.2 * X[:, -1]
    y = (rng.random(rows) < 1 / (1 + np.exp(-z))).astype(float)
    specs = [FeatureSpec(f"f{i}", "number") for i in range(FEATURES - 2)]
    specs += [FeatureSpec(f"c{i}", "category", tuple("abcdef")) for i in range(2)]
    return Dataset(X, y, rng.integers(0, 5, rows), FeatureContract(tuple(specs)))


def train_trees(_folder: Path, size: int) -> Callable[[], object]:
    import lightgbm  # noqa: F401  here and below: before the clock starts, as its peer does

    train = training_data(size, 1)
    return lambda: LightGBMEstimator().refit(train, TREES)


def train_lightgbm(_folder: Path, size: int) -> Callable[[], object]:
    """LightGBM's own defaults but for the shape of the trees."""
    import lightgbm

    train = training_data(size, 1)
    params = {"objective": "binary", "num_leaves": 15, "learning_rate": 0.05, "verbosity": -1, "num_threads": threads()}
    return lambda: lightgbm.train(params, lightgbm.Dataset(train.X, train.y, categorical_feature=[38, 39]), TREES)


def train_linear(_folder: Path, size: int) -> Callable[[], object]:
    import sklearn.linear_model  # noqa: F401

    train, validate = training_data(size, 1), training_data(size // 5, 2)
    return lambda: LogisticRegressionEstimator().fit(train, validate)


def train_sklearn(_folder: Path, size: int) -> Callable[[], object]:
    """Medians for missing values, scaled, one penalty; ours chooses its own and knows what was missing."""
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train = training_data(size, 1)
    return lambda: make_pipeline(
        SimpleImputer(strategy="median"), StandardScaler(), LogisticRegression(max_iter=1000)
    ).fit(train.X, train.y)


def train_network(_folder: Path, size: int) -> Callable[[], object]:
    import torch  # noqa: F401

    train, validate = training_data(size, 1), training_data(size // 5, 2)
    return lambda: NeuralNetworkEstimator().fit(train, validate)


def train_mlp(_folder: Path, size: int) -> Callable[[], object]:
    """A perceptron of the same width with early stopping."""
    from sklearn.impute import SimpleImputer
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train = training_data(size, 1)
    network = MLPClassifier((128, 64), early_stopping=True, random_state=0)
    return lambda: make_pipeline(SimpleImputer(strategy="median"), StandardScaler(), network).fit(train.X, train.y)


def home_of(folder: Path, rows: int) -> tuple[Campaign, Home]:
    return find_campaign(CAMPAIGN), Home(folder / f"scores-{rows}")


def prepare_homes(folder: Path, sizes: list[int]) -> None:
    """What scoring needs at these numbers of rows. Both sides give the same."""
    prepare(make_models, folder, [TRAINED_ROWS])
    prepare(make_home, folder, sizes)
    prepare(compare_log_odds, folder, sizes[:1])


def shared(folder: Path, name: str) -> Path:
    """One of the models that all homes share, or the rows they learnt from."""
    return folder / "models" / name


def make_models(folder: Path, rows: int) -> None:
    """Models of each kind that is scored, taught so many rows, and these rows, which are written last."""
    if shared(folder, LEARNT).exists():
        return
    train, validate = training_data(rows, 1), training_data(rows // 5, 2)
    table = drift_table(train, find_campaign(CAMPAIGN).key, 0, TRAINED_ON)
    trees = LightGBMEstimator().refit(train, TREES)
    network = NeuralNetworkEstimator(max_epochs=1).fit(train, validate).scorer
    linear = LogisticRegressionEstimator().fit(train, validate).scorer
    alone: dict[str, Any] = {"lightgbm": trees, "neural_network": network, "logistic_regression": linear}
    members = tuple(FittedModel(kind, train.contract, scorer, Calibrator(), {}) for kind, scorer in alone.items())
    scorers = alone | {"ensemble": EnsembleScorer(members, (0.4, 0.3, 0.3))}
    population = describe_population(table, train.contract)
    for kind, scorer in scorers.items():
        known = {**population, "scores": number_buckets(scorer.log_odds(validate.X))}
        facts = {"population": known, "snapshots": {"train": TRAINED_ON}, "calibration_rate": 0.03}
        write_model(FittedModel(kind, train.contract, scorer, Calibrator(), facts), shared(folder, kind))
    publish_table(table.append_column("split", pa.array(["train"] * len(table))), shared(folder, LEARNT))


def make_home(folder: Path, rows: int) -> None:
    """The rows the models learnt from, and a snapshot: its features, its scores, and its ready matrices."""
    campaign, home = home_of(folder, rows)
    campaign = with_reasons(campaign, 0)
    if home.root.exists():
        return
    home.ensure()
    lake, model = home.lake(campaign.name), load_model(shared(folder, "lightgbm"))
    publish_table(pq.read_table(shared(folder, LEARNT)), lake.file("training_set"))
    keep_reference(campaign, model, "1", home)
    file = lake.partition("features", "snapshot", SNAPSHOT)
    file.parent.mkdir(parents=True)
    with ExitStack() as stack:
        writer: pq.ParquetWriter | None = None
        for part in range(rows // CHUNK):
            data = training_data(CHUNK, 10 + part)
            np.save(ready_matrix(home, part), np.ascontiguousarray(data.X))
            chunk = drift_table(data, campaign.key, part, [str(SNAPSHOT)])
            writer = writer or stack.enter_context(pq.ParquetWriter(file, chunk.schema))
            writer.write_table(chunk)
    score(campaign, home, model)


def ready_matrix(home: Home, part: int) -> Path:
    """One chunk of the snapshot, encoded."""
    return home.root / f"matrix-{part}.npy"


def with_reasons(campaign: Campaign, reasons: int, above_percentile: float = 0.0) -> Campaign:
    """The campaign with so many reasons beside a score."""
    asked = {"reasons": reasons, "above_percentile": above_percentile}
    return campaign.model_copy(update={"explanations": campaign.explanations.model_copy(update=asked)})


def score(campaign: Campaign, home: Home, model: FittedModel) -> None:
    """The features to scores."""
    with open_engine() as engine:
        score_snapshot(campaign, SNAPSHOT, model, "1", datetime(2025, 9, 1, 2), home, engine)


def drift_table(data: Dataset, key: str, part: int, snapshots: list[str]) -> pa.Table:
    """Encoded rows as the lake has them."""
    count = len(data.y)
    keys = pa.array(np.char.zfill(np.arange(part * count, (part + 1) * count).astype(str), 9))
    columns: dict[str, Any] = {key: keys}
    for i, spec in enumerate(data.contract.features):
        column = pa.array(data.X[:, i], from_pandas=True)
        if spec.kind == CATEGORY:
            column = pa.DictionaryArray.from_arrays(column.cast("int8"), list(spec.categories)).cast("string")
        columns[spec.name] = column
    days = np.array(snapshots, "datetime64[D]")
    return pa.table({**columns, "snapshot": days[np.arange(count) % len(days)]})


class Score:
    """Parquet in, a table of scores out."""

    def __init__(self, kind: str, reasons: int = 0) -> None:
        self.kind, self.reasons = kind, reasons

    def __call__(self, folder: Path, size: int) -> Callable[[], object]:
        campaign, home = home_of(folder, size if not self.reasons else 10 * size)
        campaign = with_reasons(campaign, self.reasons, 0.9)  # of as many rows as are explained: a tenth of the table
        model = load_model(shared(folder, self.kind))
        model.scorer.log_odds(np.zeros((40_000, FEATURES)))  # compiled, warm
        return lambda: score(campaign, home, model)


class ScoreRaw:
    """What the library that trained a model takes over a matrix in memory: for the ensemble, each of its members'."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, folder: Path, size: int) -> Callable[[], object]:
        _, home = home_of(folder, size)
        scorer: Any = load_model(shared(folder, self.kind)).scorer
        members = [member.scorer for member in scorer.members] if self.kind == "ensemble" else [scorer]
        predict = [RAW[member.kind](member) for member in members]
        parts = [np.load(ready_matrix(home, part)) for part in range(size // CHUNK)]
        return lambda: [raw(part) for part in parts for raw in predict]


def compare_log_odds(folder: Path, rows: int) -> None:
    """Of every member of the ensemble, ours and the raw ones, over a whole part: few rows ours gives to it too."""
    _, home = home_of(folder, rows)
    part = np.load(ready_matrix(home, 0))
    ensemble: Any = load_model(shared(folder, "ensemble")).scorer
    for member in (member.scorer for member in ensemble.members):
        np.testing.assert_allclose(RAW[member.kind](member)(part), member.log_odds(part), rtol=0, atol=1e-9)


def raw_booster(scorer: Any) -> Callable[[Floats], Floats]:
    return lambda X: scorer.booster.predict(X, raw_score=True, num_threads=threads())


def raw_network(scorer: Any) -> Callable[[Floats], Floats]:
    """As torch would, with numbers as precise as ours."""
    import torch

    torch.set_num_threads(threads())
    inputs = torch_inputs(scorer)
    tables = [torch.from_numpy(table) for table in scorer.embeddings]
    layers = [(torch.from_numpy(weights), torch.from_numpy(bias)) for weights, bias in scorer.layers]

    def predict(X: Floats) -> Floats:
        with torch.inference_mode():
            codes = torch.from_numpy(scorer.one_hot.codes(X))
            hidden = torch.cat([inputs(X), *(table[codes[:, i]] for i, table in enumerate(tables))], 1)
            for weights, bias in layers[:-1]:
                hidden = torch.nn.functional.silu(hidden @ weights + bias)
            weights, bias = layers[-1]
            return (hidden @ weights + bias)[:, 0].numpy()

    return predict


def raw_linear(scorer: Any) -> Callable[[Floats], Floats]:
    """A product of the preprocessed matrix."""
    import torch

    torch.set_num_threads(threads())
    inputs, coefficients = torch_inputs(scorer), torch.from_numpy(scorer.coefficients)

    def predict(X: Floats) -> Floats:
        with torch.inference_mode():
            design = torch.cat([inputs(X), torch.from_numpy(scorer.one_hot.apply(X))], 1)
            return (design @ coefficients + scorer.intercept).numpy()

    return predict


def torch_inputs(scorer: Any) -> Callable[[Floats], Any]:
    """Scaled numbers and indicators of what is missing, in torch."""
    import torch

    scaling = scorer.scaling
    mean, scale = torch.from_numpy(scaling.mean), torch.from_numpy(scaling.scale)

    def inputs(X: Floats) -> Any:
        values = torch.from_numpy(X)[:, list(scaling.columns)]
        numbers = (values.abs().log1p().copysign(values) - mean) / scale
        return torch.cat([numbers.clamp(-6, 6).nan_to_num(0.0), values[:, list(scaling.indicators)].isnan()], 1)

    return inputs


RAW = {"lightgbm": raw_booster, "network": raw_network, "linear": raw_linear}


def contributions(folder: Path, size: int) -> Callable[[], object]:
    """LightGBM's own contributions of a matrix in memory."""
    _, home = home_of(folder, 10 * size)
    scorer: Any = load_model(shared(folder, "lightgbm")).scorer
    X = np.load(ready_matrix(home, 0))[:size]
    return lambda: scorer.booster.predict(X, pred_contrib=True, num_threads=threads())


def drift(folder: Path, size: int) -> Callable[[], object]:
    campaign, home = home_of(folder, size)
    model = load_model(shared(folder, "lightgbm"))

    def action() -> None:
        with open_engine() as engine:
            publish_drift(campaign, SNAPSHOT, model, "1", home, engine)

    return action


def drift_in_pandas(folder: Path, size: int) -> Callable[[], object]:
    """What a script would do: all rows in a frame, the index of each column."""
    import pandas

    pd: Any = pandas

    campaign, home = home_of(folder, size)
    features = load_model(shared(folder, "lightgbm")).facts["population"]["features"]

    def action() -> None:
        frame = pd.read_parquet(home.lake(campaign.name).partition("features", "snapshot", SNAPSHOT))
        for name, known in features.items():
            if known["kind"] == CATEGORY:
                counts = frame[name].value_counts(dropna=False)
            else:
                counts = pd.cut(frame[name], [-np.inf, *known["edges"], np.inf]).value_counts(sort=False, dropna=False)
            before = np.array(known["counts"])[: len(counts)]
            stability_index(before, counts.to_numpy())

    return action


def plan_contacts(_folder: Path, size: int) -> Callable[[], object]:
    """With every kind of limit."""
    rng = np.random.default_rng(0)
    probability, segment, allowed = rng.beta(0.6, 12, size), rng.integers(0, 5, size), rng.random((size, 3)) < 0.7
    channels = [Channel("email", 0.05, size // 4), Channel("sms", 0.3), Channel("phone", 2.0)]
    segments = [SegmentLimit(str(k), segment == k, size // 50, size // 20) for k in range(5)]
    return lambda: plan(probability, 22.5, channels, Limits(size // 5, size * 0.06, segments), allowed)


def sort_customers(_folder: Path, size: int) -> Callable[[], object]:
    """The least that any choice of the best costs."""
    probability = np.random.default_rng(0).beta(0.6, 12, size)
    return lambda: np.argsort(-probability, kind="stable")
