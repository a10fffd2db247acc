"""The notebooks run top to bottom on event logs and on past decisions, and are stored without what they print."""

import importlib.util
import re
from pathlib import Path

import nbformat
import pytest

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
    assert {p["rows"] for p in periods.values()} == {200}
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
