"""What the benchmarks compare is equal, and what they write can be read."""

import json

import pytest

from benchmarks.measure import Figure, Timing, exponents, write_results
from benchmarks.pipeline import check_by_hand, make_lake


def test_features_by_hand_are_ours(tmp_path):
    """The query that features are measured against computes all of them, of everybody."""
    make_lake(tmp_path, 300)
    check_by_hand(tmp_path, 300)


def test_results_are_ratios_and_growth(tmp_path):
    ours = [[Timing(2.0 * n, 3.0 * n, 0.5)] * 3 for n in (1, 2, 4)]
    figures = [
        Figure("work", 100 * n, "rows", {"ours": mine, "by hand": [Timing(1.0, 1.5 * n, 0.1)] * 3}, {"by hand": 4})
        for n, mine in zip((1, 2, 4), ours, strict=True)
    ]
    assert exponents(figures)["work"] == pytest.approx(1.0)
    table = write_results(figures, "a command", tmp_path)
    assert "| work | 400 rows | 8.00 (8.00 to 8.00) | 12.00 | 0.50 | by hand: 0.50 | 1.00 |" in table
    assert (tmp_path / "results.md").read_text() == table
    found = json.loads((tmp_path / "results.json").read_text())
    assert [figure["cpu_ratio"] for figure in found["figures"]] == [{"by hand": 0.5}] * 3
    assert found["command"] == "a command"
    assert found["machine"]["cores"] >= 1
