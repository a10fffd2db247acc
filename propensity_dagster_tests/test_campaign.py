"""The campaign file: what parses, and what every mistake is told."""

from pathlib import Path

import pytest

from propensity_dagster.campaign import SHIPPED, load_campaign, load_campaigns
from propensity_dagster.errors import ConfigError

ECOMMERCE = (SHIPPED / "ecommerce_purchase.yaml").read_text()
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    "file", [*sorted(SHIPPED.glob("*.yaml")), *sorted(EXAMPLES.glob("*.yaml"))], ids=lambda f: f.stem
)
def test_shipped_campaigns_and_examples_parse(file):
    assert load_campaign(file).name == file.stem


def test_a_file_alone_does_not_mind_a_broken_neighbour(tmp_path):
    (tmp_path / "good.yaml").write_text(ECOMMERCE)
    (tmp_path / "broken.yaml").write_text("name: [")
    assert [c.name for c in load_campaigns(tmp_path / "good.yaml")] == ["ecommerce_purchase"]
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_campaigns(tmp_path)


def test_short_form_of_the_design(tmp_path):
    text = ECOMMERCE
    start, end = text.index("    attributes:"), text.index("  streams:")
    text = text[:start] + "    attributes: [age, country, channel]\n" + text[end:]
    text = text.replace(", types: [sent, open, click]", "")
    file = tmp_path / "short.yaml"
    file.write_text(text)
    campaign = load_campaign(file)
    assert list(campaign.source.entities.attributes) == ["age", "country", "channel"]
    assert campaign.source.streams["emails"].types == ("sent", "open", "click")


MISTAKES = [
    ("horizon_days: 30", "horizon_dayz: 30", "outcome.horizon_dayz: unknown key; did you mean 'horizon_days'?"),
    ("horizon_days: 30", "horizon_days: -3", "outcome.horizon_days: Input should be greater than 0, got -3"),
    ("horizon_days: 30", "horizon_days: soon", "outcome.horizon_days"),
    ("every: 7d", "every: 7w", "snapshots.every: must be a number of days such as 7d, got '7w'"),
    ("segments: [country, channel]", "segments: [city]", "segments: 'city' is not declared; declared are age, country"),
    ("outcome: {stream: orders", "outcome: {stream: sales", "outcome.stream: 'sales' is not declared"),
    ("lightgbm, neural", "lightgmb, neural", "models.2.name"),
    ("network, ensemble]", "network, {ensemble: {depth: 3}}]", "models.ensemble has no parameters, got depth"),
    ("models: [baseline, ", "models: [", "'baseline' and at least one more"),
    ("tiers: {high: 0.9, medium: 0.6}", "tiers: {high: 0.5, medium: 0.6}", "medium must be below high"),
    ("windows_days: [7, 30", "windows_days: [30, 7", "ascending order, got [30, 7, 90, 365]"),
    ("name: ecommerce_purchase", "name: E-Commerce", "name: must be lower-case letters, digits and underscores"),
    ("holdout: {fraction: 0.05}", "holdout: {fraction: 1}", "holdout.fraction"),
    ("key: customer_id", "key: day", "the key column must not be one of"),
    ("connection: synthetic://ecommerce?customers=20000", "connection: data", "first_day is required"),
    ("segments: [country, channel]", "segments: []\nsegments: [country]", "key 'segments' given twice"),
    ("    table: customers\n", "", "needs exactly one of 'table' and 'stream'"),
    ("name: ecommerce_purchase", "name: [", "not valid YAML"),
    ("[pages, seconds]", "[pages, count]", "measures: 'count' cannot be told from the 'count' of a day"),
    ("[pages, seconds]", "[pages, pages_max]", "'pages_max' cannot be told from the 'pages_max' of a day"),
]


@pytest.mark.parametrize(("old", "new", "message"), MISTAKES, ids=[m[1][:30].strip() or m[2][:30] for m in MISTAKES])
def test_a_mistake_names_file_key_and_what_is_allowed(tmp_path, old, new, message):
    assert old in ECOMMERCE
    file = tmp_path / "campaign.yaml"
    file.write_text(ECOMMERCE.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_campaign(file)
    assert str(file) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "just text"])
def test_a_file_that_is_no_mapping(tmp_path, content):
    file = tmp_path / "campaign.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match="must be a mapping"):
        load_campaign(file)


def test_folders(tmp_path):
    with pytest.raises(ConfigError, match="no campaign file"):
        load_campaigns(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(ECOMMERCE)
    with pytest.raises(ConfigError, match=r"b\.yaml: name: 'ecommerce_purchase' is already the name of .*a\.yaml"):
        load_campaigns(tmp_path)
