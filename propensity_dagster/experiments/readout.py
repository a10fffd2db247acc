"""What an experiment showed: are the arms comparable, by how much do they differ, how sure is that, what to do.

The difference of means and of ratios, with intervals, is tea-tasting's (Welch; CUPED: Deng et al. 2013; ratios by the
delta method: Deng et al. 2018). Ours is what surrounds it: the check of the sample ratio that comes first and blocks,
intervals that are valid at every look, shrinkage of segments, and the words. Belongs here: units with their measures
in, plain data out. Does not: where units and measures come from, or the page.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.special import ndtri

from propensity_dagster.campaign_sections import CONVERSION, Experiment, Metric
from propensity_dagster.data.days import pc
from propensity_dagster.errors import DataContractError, InsufficientDataError
from propensity_dagster.evaluation.bootstrap import Estimate
from propensity_dagster.experiments.sequential import always_valid_factor

Floats = NDArray[np.float64]

SRM_ALPHA = 0.001
MIN_UNITS = 100
"""In each variant, with `MIN_POSITIVE` whose metric is not 0: below it the normal approximation says nothing."""
MIN_POSITIVE = 10
_MIN_SEGMENT = 100


def sample_ratio(experiment: Experiment, counts: Mapping[str, int]) -> dict[str, Any]:
    """Whether units fell into the variants as their shares say (chi-squared; Fabijan et al. 2019).

    Raises:
        DataContractError: for a variant that the experiment does not have.
    """
    from scipy.stats import chisquare

    unknown = sorted(set(counts) - set(experiment.variants))
    if unknown:
        raise DataContractError(
            f"units have the variant {unknown[0]!r}, which the experiment does not have; it has "
            f"{', '.join(experiment.variants)}: a variant must not be renamed while units are assigned"
        )
    observed = np.array([counts.get(name, 0) for name in experiment.variants], dtype=np.float64)
    total = observed.sum()
    shares = np.array(list(experiment.variants.values()))
    p = float(chisquare(observed, total * shares / shares.sum()).pvalue) if total else 1.0
    return {
        "p_value": p,
        "passed": p >= SRM_ALPHA,
        "variants": [
            {"variant": name, "units": int(n), "expected": float(total * share)}
            for name, n, share in zip(experiment.variants, observed, shares, strict=True)
        ],
    }


def read_out(experiment: Experiment, units: pa.Table, covariate: bool) -> dict[str, Any]:
    """Compare every variant with the control.

    Args:
        experiment: gives variants, metrics and limits.
        units: measured units (n): `variant`; per metric `<name>` and, of a ratio, `<name>__per`; `covariate`, known
            before the assignment, if `covariate`; segment columns as `segment__<name>`.
        covariate: whether the differences are adjusted by it.

    Returns:
        Plain data: `srm`, and unless it fails `metrics` (by metric and variant), `segments`, `recommendation`.

    Raises:
        InsufficientDataError: when a variant has too few units, or the primary metric is 0 for all.
        DataContractError: for a variant that the experiment does not have.
    """
    counts = {str(v["values"]): int(v["counts"]) for v in pc.value_counts(units["variant"]).to_pylist()}
    found: dict[str, Any] = {"units": units.num_rows, "srm": sample_ratio(experiment, counts)}
    if not found["srm"]["passed"]:
        return {**found, "recommendation": _recommend_srm(found["srm"])}
    few = {name: counts.get(name, 0) for name in experiment.variants if counts.get(name, 0) < MIN_UNITS}
    if few:
        name, n = next(iter(few.items()))
        raise InsufficientDataError(f"variant {name!r} has {n} measured units, {MIN_UNITS} are needed")
    metrics = {CONVERSION: Metric(sum=CONVERSION), **experiment.metrics}
    compared = _compare(experiment, units, metrics, covariate)
    primary = compared[experiment.primary]
    if primary is None:
        raise InsufficientDataError(
            f"the primary metric {experiment.primary!r} is 0 for nearly all of {units.num_rows:,} units: fewer than "
            f"{MIN_POSITIVE} in a variant have any"
        )
    _adjust(experiment, compared)
    found["metrics"] = compared
    found["segments"] = _segments(experiment, units, metrics[experiment.primary], covariate)
    found["recommendation"] = _recommend(experiment, metrics, compared)
    return found


def _compare(
    experiment: Experiment, units: pa.Table, metrics: Mapping[str, Metric], covariate: bool
) -> dict[str, dict[str, Any] | None]:
    """Each metric in each variant, and each variant's difference to the control; None where there is nothing."""
    enough = {name: metric for name, metric in metrics.items() if _has_enough(experiment, units, name)}
    results = _tea(experiment, units, enough, covariate) if enough else {}
    found: dict[str, dict[str, Any] | None] = dict.fromkeys(metrics)
    for name, metric in enough.items():
        variants: dict[str, Any] = {}
        control = 0.0
        for variant, result in ((v, r[name]) for v, r in results.items()):
            pair = int(pc.sum(pc.is_in(units["variant"], pa.array([experiment.control, variant]))).as_py())
            factor = always_valid_factor(pair, experiment.planned_units, experiment.alpha)
            widen = float(factor) / float(ndtri(1 - experiment.alpha / 2))
            absolute = Estimate(result.effect_size, result.effect_size_ci_lower, result.effect_size_ci_upper)
            relative = Estimate(
                result.rel_effect_size, result.rel_effect_size_ci_lower, result.rel_effect_size_ci_upper
            )
            control = float(result.control)
            variants[variant] = {
                "mean": float(result.treatment),
                "difference": absolute.to_json(),
                "lift": relative.to_json(),
                "difference_always": _widened(absolute, widen).to_json(),
                "lift_always": _widened(relative, widen).to_json(),
                "p_value": float(result.pvalue),
            }
        found[name] = {"better": metric.better, "control": control, "variants": variants}
    return found


def _has_enough(experiment: Experiment, units: pa.Table, name: str) -> bool:
    for variant in experiment.variants:
        rows = units.filter(pc.equal(units["variant"], variant))
        if int((rows[name].to_numpy() != 0).sum()) < MIN_POSITIVE:
            return False
        if f"{name}__per" in units.column_names and int((rows[f"{name}__per"].to_numpy() != 0).sum()) < MIN_POSITIVE:
            return False
    return True


def _tea(experiment: Experiment, units: pa.Table, metrics: Mapping[str, Metric], covariate: bool) -> dict[str, Any]:
    """By variant, tea-tasting's result of each metric."""
    import tea_tasting

    options: dict[str, Any] = {"confidence_level": 1 - experiment.alpha, "use_t": False}
    measured: dict[str, Any] = {}
    columns = ["variant", *(["covariate"] if covariate else [])]
    for name, metric in metrics.items():
        if metric.per is None:
            measured[name] = tea_tasting.Mean(name, "covariate" if covariate else None, **options)
            columns.append(name)
        else:
            # A ratio's covariate must be a ratio too: the covariate over one a unit.
            over = {"numer_covariate": "covariate", "denom_covariate": "one"} if covariate else {}
            measured[name] = tea_tasting.RatioOfMeans(name, f"{name}__per", **over, **options)
            columns += [name, f"{name}__per"]
    table = units.select(columns).append_column("one", pa.array(np.ones(units.num_rows)))
    results: Any = tea_tasting.Experiment(measured, variant="variant").analyze(
        table, control=experiment.control, all_variants=True
    )
    return {v: results[(experiment.control, v)] for v in experiment.variants if v != experiment.control}


def _adjust(experiment: Experiment, compared: Mapping[str, dict[str, Any] | None]) -> None:
    """Holm's correction over the variants and the metrics that could be claimed; guardrails warn, and claim nothing."""
    from statsmodels.stats.multitest import multipletests

    claims = [
        (metric, variant)
        for metric, found in compared.items()
        if found is not None and metric not in experiment.guardrails
        for variant in found["variants"]
    ]
    p = [compared[m]["variants"][v]["p_value"] for m, v in claims]  # pyright: ignore[reportOptionalSubscript]
    adjusted: Any = multipletests(p, experiment.alpha, method="holm")[1]
    for (metric, variant), value in zip(claims, adjusted, strict=True):
        compared[metric]["variants"][variant]["p_adjusted"] = float(value)  # pyright: ignore[reportOptionalSubscript]


def _segments(experiment: Experiment, units: pa.Table, metric: Metric, covariate: bool) -> list[dict[str, Any]]:
    """The primary metric's difference within each value of each segment column, shrunk towards all of them.

    Normal empirical Bayes with the between-segment variance of DerSimonian and Laird (1986): what the segments differ
    by chance is not shown as if it were real.
    """
    found: list[dict[str, Any]] = []
    z = float(ndtri(1 - experiment.alpha / 2))
    for column in (c for c in units.column_names if c.startswith("segment__")):
        rows: list[dict[str, Any]] = []
        for value in sorted(str(v) for v in pc.unique(units[column]).to_pylist()):
            part = units.filter(pc.equal(units[column], value))
            sizes = {v: int(pc.sum(pc.equal(part["variant"], v)).as_py() or 0) for v in experiment.variants}
            if min(sizes.values()) < _MIN_SEGMENT or not _has_enough(experiment, part, experiment.primary):
                continue
            for variant, results in _tea(experiment, part, {experiment.primary: metric}, covariate).items():
                result = results[experiment.primary]
                error = (result.effect_size_ci_upper - result.effect_size_ci_lower) / 2 / z
                rows.append(
                    {
                        "segment": column.removeprefix("segment__"),
                        "value": value,
                        "variant": variant,
                        "units": part.num_rows,
                        "difference": float(result.effect_size),
                        "error": float(error),
                    }
                )
        for variant in experiment.variants:
            of_variant = [row for row in rows if row["variant"] == variant]
            if len(of_variant) > 1:
                d, s = (np.array([row[k] for row in of_variant]) for k in ("difference", "error"))
                for row, middle, spread in zip(of_variant, *shrink(d, s), strict=True):
                    row["shrunk"] = Estimate(middle, middle - z * spread, middle + z * spread).to_json()
                found += of_variant
    return found


def shrink(difference: Floats, error: Floats) -> tuple[Floats, Floats]:
    """Means and standard deviations (k,) of k true effects, given their estimates and standard errors (k,).

    The effects are taken as draws from one normal distribution, whose variance is DerSimonian and Laird's (1986).
    """
    w = 1 / error**2
    middle = (w @ difference) / w.sum()
    q = w @ (difference - middle) ** 2
    between = max((q - (len(w) - 1)) / (w.sum() - (w @ w) / w.sum()), 0.0)
    if between == 0:
        return np.full(len(w), middle), np.full(len(w), np.sqrt(1 / w.sum()))
    total = 1 / (error**2 + between)
    middle = (total @ difference) / total.sum()
    keep = between / (between + error**2)
    # The spread has two parts: what is left of the segment's own, and what is not known of the common mean.
    spread = np.sqrt(keep * error**2 + (1 - keep) ** 2 / total.sum())
    return keep * difference + (1 - keep) * middle, spread


def _recommend_srm(srm: Mapping[str, Any]) -> dict[str, str]:
    parts = "; ".join(f"{v['variant']}: {v['units']:,} units, {v['expected']:,.0f} expected" for v in srm["variants"])
    return {
        "answer": "invalid",
        "happened": f"Units did not fall into the variants as planned ({parts}; p = {srm['p_value']:.1g}).",
        "sure": "No effect is shown: whatever kept units out of a variant may have made the difference.",
        "do": "Find what loses or doubles units (filters, redirects, errors of one variant), mend it, and start anew.",
    }


def _recommend(
    experiment: Experiment, metrics: Mapping[str, Metric], compared: Mapping[str, dict[str, Any] | None]
) -> dict[str, str]:
    """What happened, how sure, what to do: of the best variant by the primary metric."""
    primary = compared[experiment.primary]
    assert primary is not None  # required before
    sign = 1 if metrics[experiment.primary].better == "more" else -1
    best = max(primary["variants"], key=lambda v: sign * primary["variants"][v]["difference"]["value"])
    row = primary["variants"][best]
    lift, always = row["lift"], row["lift_always"]
    confidence = f"{1 - experiment.alpha:.0%}"
    name = experiment.primary.replace("_", " ")
    if experiment.primary == CONVERSION:
        with_best, without = f"{row['mean']:.2%} of the units converted", f"{primary['control']:.2%}"
    else:
        with_best, without = f"{name} was {row['mean']:.4g} a unit", f"{primary['control']:.4g}"
    happened = (
        f"With {best} {with_best}, {abs(lift['value']):.1%} {'more' if lift['value'] > 0 else 'less'} than the "
        f"{without} with {experiment.control}."
    )
    sure = (
        f"The true change is between {lift['low']:+.1%} and {lift['high']:+.1%} with {confidence} confidence if this "
        f"is the only look; {always['low']:+.1%} to {always['high']:+.1%} holds however often you look."
    )
    broken = _broken_guardrails(experiment, metrics, compared, best)
    good = sign * row["difference_always"]["low" if sign > 0 else "high"] > 0
    bad = sign * row["difference_always"]["high" if sign > 0 else "low"] < 0
    if broken:
        answer, do = "no", f"Do not roll out {best}: {'; '.join(broken)}."
    elif good and row["p_adjusted"] <= experiment.alpha:
        answer, do = "yes", f"Roll out {best}: it is better, whatever day you had looked."
    elif bad:
        answer, do = "no", f"Keep {experiment.control}: {best}, the best of the others, is worse."
    elif sign * always["high" if sign > 0 else "low"] < experiment.minimum_effect:
        answer = "no"
        do = (
            f"Keep {experiment.control}, or choose by cost: an improvement of {experiment.minimum_effect:.0%}, which "
            "was to be found, is ruled out."
        )
    else:
        answer = "wait"
        do = f"Not decided: both no change and one of {experiment.minimum_effect:.0%} are possible. Let it run on."
    return {"answer": answer, "variant": best, "happened": happened, "sure": sure, "do": do}


def _broken_guardrails(
    experiment: Experiment, metrics: Mapping[str, Metric], compared: Mapping[str, dict[str, Any] | None], variant: str
) -> list[str]:
    broken: list[str] = []
    for name in experiment.guardrails:
        found = compared[name]
        if found is None:
            continue
        row = found["variants"][variant]
        worse = row["difference"]["high"] < 0 if metrics[name].better == "more" else row["difference"]["low"] > 0
        if worse:
            broken.append(f"{name.replace('_', ' ')} became worse ({row['lift']['value']:+.1%})")
    return broken


def _widened(interval: Estimate, factor: float) -> Estimate:
    below, above = interval.value - interval.low, interval.high - interval.value
    return Estimate(interval.value, interval.value - factor * below, interval.value + factor * above)


def segment_names(experiment: Experiment, campaign_segments: Sequence[str]) -> list[str]:
    """Columns in whose values the effect is shown."""
    return list(campaign_segments if experiment.segments is None else experiment.segments)
