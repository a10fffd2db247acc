"""The notebooks run top to bottom on event logs and on past decisions, and are stored without what they print."""

import importlib.util
import re
from pathlib import Path

import dagster as dg
import nbformat
import numpy as np
import pytest

from propensity_dagster.campaign import load_campaign
from propensity_dagster.data.lake import Home
from propensity_dagster.errors import ConfigError
from propensity_dagster.reports import exploration

from .conftest import Materialized

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("render", ROOT / "notebooks" / "render.py")
assert _spec
assert _spec.loader
render = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(render)
NOTEBOOKS = render.notebooks()


@pytest.fixture(scope="module")
def decisions(tmp_path_factory) -> Materialized:
    """A table of past decisions in the order of time, run through Dagster."""
    from propensity_dagster.components.campaign_folder import campaign_definitions
    from propensity_dagster.components.launch import run_campaign
    from propensity_dagster.runtime import Runtime

    root = tmp_path_factory.mktemp("decisions")
    rng = np.random.default_rng(0)
    n = 1500
    x, town = rng.normal(size=n).round(2), rng.choice(["Ulm", "Bern", "Graz"], n)
    bought = (rng.random(n) < 1 / (1 + np.exp(1.5 - x - (town == "Ulm")))).astype(int)
    lines = [f"{i},{x[i]},{town[i]},{'' if i % 7 == 0 else i % 90},{bought[i]}" for i in range(n)]
    (root / "data.csv").write_text("\n".join(["id,x,town,age,bought", *lines]))
    (root / "past.yaml").write_text(
        "name: past\nsource: {kind: table, path: data.csv, key: id, order: file}\noutcome: {column: bought}\n"
        "min_converters: 50\nmodels: [baseline, logistic_regression, lightgbm, ensemble]\nsegments: [town]\n"
    )
    campaign, runtime = load_campaign(root / "past.yaml"), Runtime(Home(root / "home").ensure())
    defs = dg.Definitions.merge(campaign_definitions(campaign), dg.Definitions(resources={"runtime": runtime}))
    with dg.DagsterInstance.ephemeral() as instance:
        run_campaign(campaign, runtime, defs, instance)
    return Materialized(campaign, runtime.home, root / "past.yaml")


@pytest.mark.parametrize("shape", ["materialized", "decisions"])
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[n.stem for n in NOTEBOOKS])
def test_a_notebook_runs_on_any_campaign(request, monkeypatch, notebook, shape):
    given: Materialized = request.getfixturevalue(shape)
    monkeypatch.setenv("PROPENSITY_HOME", str(given.home.root))
    content = render.run(notebook, str(given.file), ROOT)
    outputs = [output for cell in content.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [o for o in outputs if o.output_type in ("error", "stream")], "nothing fails, nothing warns"
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 2
    assert sum("text/html" in o.get("data", {}) for o in outputs) >= 2


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[n.stem for n in NOTEBOOKS])
def test_notebooks_are_stored_without_outputs_and_rendered(notebook):
    content = nbformat.read(notebook, as_version=4)
    nbformat.validate(content)
    rendered = (ROOT / "docs" / "notebooks" / f"{notebook.stem}.md").read_text()
    for cell in content.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)
            assert "def " not in cell.source, "the package has the logic"
        elif ".ipynb)" not in cell.source:
            assert cell.source in rendered, "make notebooks"
    for file in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", rendered):
        assert (ROOT / "docs" / "notebooks" / file).stat().st_size > 1000


def test_ordered_decisions_are_judged_in_quarters(decisions):
    from propensity_dagster.scoring.candidates import read_evaluation

    periods = read_evaluation(decisions.campaign, decisions.home)["periods"]
    assert list(periods) == [f"quarter {i} of the test rows" for i in (1, 2, 3, 4)]
    assert {p["rows"] for p in periods.values()} == {75}
    page = (decisions.home.reports("past") / "report.html").read_text()
    assert "quarter 4 of the test rows" in page
    assert "no order in time" not in page


def test_a_campaign_that_has_not_been_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PROPENSITY_HOME", str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"saas_upgrade has not been run in .* run `propensity demo saas_upgrade` first"
    ):
        exploration.open_campaign("saas_upgrade")


def test_the_home_is_found_from_a_notebooks_folder(materialized, tmp_path, monkeypatch):
    monkeypatch.delenv("PROPENSITY_HOME", raising=False)
    (tmp_path / ".propensity").symlink_to(materialized.home.root)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    campaign, home = exploration.open_campaign(str(materialized.file))
    assert (campaign.name, home.root) == ("small", tmp_path / ".propensity")


@pytest.mark.parametrize("shape", ["materialized", "decisions"])
def test_what_notebooks_show_adds_up(request, shape):
    campaign, home = (given := request.getfixturevalue(shape)).campaign, given.home
    rows = exploration.rows_read(campaign, home)
    assert (rows["read"] == rows["good"] + rows["quarantined"] + rows["duplicates"]).all()
    features = exploration.features(campaign, home)
    assert features["AUC alone"].between(0.5, 1).all()
    strongest = exploration.strongest_features(campaign, home, 3)
    assert set(strongest) <= set(features.index)
    assert len(features.loc[strongest, "source"].unique()) == len(strongest)
    curve = exploration.learning_curve(campaign, home, shares=(0.2, 1.0))
    assert curve["training rows"].is_monotonic_increasing
    with pytest.raises(ConfigError, match="there is no feature 'no_such'; there are"):
        exploration.plot_rates(campaign, home, ["no_such"])
    with pytest.raises(ConfigError, match="there is no 'oracle' to train; there are"):
        exploration.learning_curve(campaign, home, "oracle")


def test_a_customers_history_knows_the_past_only(materialized):
    history = exploration.customer_history(materialized.campaign, materialized.home)
    assert history["total_purchases"].is_monotonic_increasing
    assert list(history.index) == sorted(history.index)
