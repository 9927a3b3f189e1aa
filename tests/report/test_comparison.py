"""Comparisons of arms against scipy's t tests, worked examples and simulations of pairing."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from atdiff.core.errors import UserError
from atdiff.core.specs import correction_label
from atdiff.report.statistics import Row, compare, compare_corrected, corrections_of, holm, winners
from atdiff.report.words import conclusions, corrected_conclusions, metric_label, percent, scores

Cell = dict[str, Any]


def cell(arm: str, seed: int, value: float | None, sampler: str = "ddim", steps: int = 5, **more: object) -> Cell:
    metric = more.pop("metric", "fd")
    return {
        "arm": arm, "seed": seed, "sampler": sampler, "steps": steps, "num": 1024, "sample_seed": 0,
        "metrics": {metric: value}, **more,
    }  # fmt: skip


def cells_of(values: dict[str, list[float]], **more: object) -> list[Cell]:
    return [cell(arm, seed, v, **more) for arm, vs in values.items() for seed, v in enumerate(vs)]


def test_intervals_and_p_value_match_scipy() -> None:
    a, b = [20.0, 26.0, 21.5, 30.0], [31.0, 35.0, 36.0, 44.0]
    row = compare(cells_of({"plain": b, "at": a}), confidence=0.9)[1]
    mean_interval = stats.ttest_1samp(a, 0).confidence_interval(0.9)
    assert row.mean == pytest.approx(np.mean(a))
    assert row.half_width == pytest.approx((mean_interval.high - mean_interval.low) / 2)
    paired = stats.ttest_rel(np.log(a), np.log(b))
    interval = paired.confidence_interval(0.9)
    assert row.p_value == pytest.approx(paired.pvalue)
    assert row.change == pytest.approx(100 * (stats.gmean(np.divide(a, b)) - 1))
    assert row.change_low == pytest.approx(100 * (math.exp(interval.low) - 1))
    assert row.change_high == pytest.approx(100 * (math.exp(interval.high) - 1))
    assert (row.n, row.pairs, row.verdict) == (4, 4, "better")


def test_two_seeds_by_hand() -> None:
    # ratios 1/2 and 1/8: geometric mean 1/4; log2 ratios -1 and -3, deviation sqrt(2), error 1;
    # t_1 at 75 % (a 50 % interval) is tan(pi / 4) = 1, so the interval is 2^-3 .. 2^-1.
    row = compare(cells_of({"plain": [2.0, 8.0], "at": [1.0, 1.0]}), confidence=0.5)[1]
    assert (row.change, row.change_low, row.change_high) == pytest.approx((-75.0, -87.5, -50.0))
    baseline = compare(cells_of({"plain": [2.0, 8.0]}), confidence=0.5)[0]
    assert (baseline.mean, baseline.half_width) == pytest.approx((5.0, 3.0))  # std 3 sqrt(2), error 3


@pytest.mark.parametrize(
    ("ratios", "lower", "higher"),
    [
        ([0.80, 0.82, 0.81], "better", "worse"),
        ([1.20, 1.22, 1.21], "worse", "better"),
        ([0.80, 0.95, 1.10], "unclear", "unclear"),
        ([1.0, 1.0, 1.0], "unclear", "unclear"),
    ],
)
def test_verdict_needs_an_interval_clear_of_zero(ratios: list[float], lower: str, higher: str) -> None:
    values = {"plain": [0.4, 0.5, 0.6], "at": [0.4 * ratios[0], 0.5 * ratios[1], 0.6 * ratios[2]]}
    for metric, verdict in (("fd", lower), ("recall", higher)):
        row = compare(cells_of(values, metric=metric), metric=metric)[1]
        assert row.verdict == verdict
        assert (row.change_low <= 0 <= row.change_high) == (verdict == "unclear")


def test_pairing_finds_a_constant_gain_under_seed_noise() -> None:
    rng = np.random.default_rng(0)
    base = 30 * np.exp(rng.normal(0, 0.4, 5))
    arm = 0.9 * base * np.exp(rng.normal(0, 0.01, 5))
    row = compare(cells_of({"plain": list(base), "at": list(arm)}))[1]
    assert row.verdict == "better"
    assert row.change == pytest.approx(-10, abs=2)
    assert stats.ttest_ind(np.log(arm), np.log(base)).pvalue > 0.3  # unpaired, the same gain is lost in the noise


def test_pairs_do_not_depend_on_the_order_of_cells() -> None:
    cells = cells_of({"plain": [10.0, 20.0, 40.0], "at": [9.0, 18.5, 35.0]})
    assert compare(cells[:3] + cells[:2:-1])[1] == compare(cells)[1]


def test_interval_has_its_nominal_coverage() -> None:
    rng = np.random.default_rng(1)
    trials, hits = 400, 0
    for _ in range(trials):
        base = np.exp(rng.normal(2, 0.3, 3))
        row = compare(
            cells_of({"plain": list(base), "at": list(base * 0.8 * np.exp(rng.normal(0, 0.1, 3)))}),
            confidence=0.8,
        )[1]
        hits += row.change_low <= -20 <= row.change_high
    assert hits / trials == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / trials))


def test_holm_by_hand() -> None:
    # sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04 -> running maximum
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.7, 0.6]) == [1.0, 1.0]
    with_gap = holm([0.01, math.nan, 0.04])  # nan does not belong to the family
    assert with_gap[0] == pytest.approx(0.02)
    assert math.isnan(with_gap[1])
    assert with_gap[2] == pytest.approx(0.04)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.2))
def test_holm_matches_the_step_down_procedure(p_values: list[float], level: float) -> None:
    rejected = set()
    for position, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[index] * (len(p_values) - position) > level:
            break
        rejected.add(index)
    assert {i for i, p in enumerate(holm(p_values)) if p <= level} == rejected


def test_holm_corrects_over_the_cells_of_one_arm() -> None:
    cells = [
        cell(arm, seed, value * seed**0.5, steps=steps)
        for seed in (1, 2, 3)
        for steps in (5, 10)
        for arm, value in (("plain", 10.0), ("at", 8.0 + 0.1 * seed * steps), ("ip", 9.0 + 0.3 * seed))
    ]
    rows = compare(cells)
    for arm in ("at", "ip"):
        mine = [row for row in rows if row.arm == arm]
        assert [row.p_holm for row in mine] == pytest.approx(holm([row.p_value for row in mine]))


def test_only_common_seeds_are_paired() -> None:
    cells = cells_of({"plain": [10.0, 20.0, 40.0], "at": [9.0, 18.2, 999.0]})
    cells = [c for c in cells if (c["arm"], c["seed"]) != ("plain", 2)]
    row = compare(cells)[1]
    assert (row.n, row.pairs) == (3, 2)
    assert row.mean == pytest.approx((9 + 18.2 + 999) / 3)
    assert row.change == pytest.approx(100 * (math.sqrt(0.9 * 0.91) - 1))


CONDITIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dtype bfloat16 but another arm with float32": ({}, {"dtype": "bfloat16"}),
    "extractor b but another arm with a": ({"extractor": "a"}, {"extractor": "b"}),
    "(search_num, search_seed) (20, 1) but another arm with (10, 1)": (
        {"search_num": 10, "search_seed": 1},
        {"search_num": 20, "search_seed": 1},
    ),
    "weights of the feature networks b but another arm with a": (
        {"asked": ["fid"], "fingerprints": {"features": "a"}},
        {"asked": ["fid"], "fingerprints": {"features": "b"}},
    ),
}


@pytest.mark.parametrize("message", CONDITIONS)
def test_arms_evaluated_differently_are_not_compared(message: str) -> None:
    """The same holds for the seeds of an arm, since their mean is taken."""
    first, then = CONDITIONS[message]
    plain = [{**one, **first} for one in cells_of({"plain": [10.0, 20.0]})]
    at = cells_of({"at": [9.0, 18.0]})
    for cells in ([*plain, *({**one, **then} for one in at)], [*plain, {**at[0], **first}, {**at[1], **then}]):
        with pytest.raises(UserError, match=re.escape(message)):
            compare(cells)
    assert len(compare([*plain, *({**one, **first} for one in at)])) == 2


def test_extractor_does_not_matter_for_pixel_distances() -> None:
    cells = cells_of({"plain": [10.0, 20.0], "at": [9.0, 18.0]}, metric="energy")
    assert len(compare([{**one, "extractor": one["arm"]} for one in cells], metric="energy")) == 2


def test_one_seed_gives_an_estimate_without_a_verdict() -> None:
    rows = compare(cells_of({"plain": [10.0], "at": [5.0]}))
    row = rows[1]
    assert (row.mean, row.verdict) == (5.0, "unclear")
    assert row.change == pytest.approx(-50)
    assert all(math.isnan(v) for v in (row.half_width, row.change_low, row.change_high, row.p_value))
    assert winners(rows) == {("ddim", 5): None}
    assert "one seed" in conclusions(rows)[0]
    assert conclusions(rows)[1] == "at: FD changes by −50% to −50% against plain; one seed allows no test."


@pytest.mark.parametrize("bad", [math.nan, None, math.inf, 0.0, -1.0])
def test_diverged_seed_is_not_dropped(bad: float | None) -> None:
    row = compare(cells_of({"plain": [10.0, 20.0, 40.0], "at": [5.0, 10.0, bad]}))[1]
    assert (row.n, row.pairs, row.verdict) == (3, 3, "unclear")
    assert math.isnan(row.change)


def test_rows_start_with_the_baseline_and_are_sorted_by_steps() -> None:
    cells = [
        cell(arm, seed, 5.0 + seed + steps, sampler, steps)
        for arm in ("at", "plain")
        for sampler, steps in (("iddpm", 20), ("ddim", 10), ("iddpm", 5))
        for seed in (0, 1)
    ]
    order = [("iddpm", 5), ("iddpm", 20), ("ddim", 10)]
    assert [(r.arm, *r.setting) for r in compare(cells)] == [(a, *s) for a in ("plain", "at") for s in order]


def test_cell_missing_from_the_baseline_is_unclear() -> None:
    cells = cells_of({"plain": [10.0, 20.0], "at": [9.0, 18.0]}) + cells_of({"at": [5.0, 6.0]}, steps=10)
    row = compare(cells)[2]
    assert (row.steps, row.n, row.pairs, row.verdict) == (10, 2, 0, "unclear")
    assert row.mean == 5.5
    assert conclusions(compare(cells))[0].startswith("0 to 2 seeds, 2 cells")


@pytest.mark.parametrize("metric", ["fd", "recall"])
def test_winner_is_the_best_mean_among_the_clear_arms(metric: str) -> None:
    # "wild" has the best mean but varies too much; of the clear ones "b" is the best.
    sign = -1 if metric == "fd" else 1
    base = np.array([1.0, 1.2, 1.4])
    gains = {
        "plain": [0, 0, 0], "a": [0.1, 0.11, 0.12], "b": [0.3, 0.31, 0.32], "wild": [0.05, 2.0, -0.02],
        "bad": [-0.3, -0.31, -0.32],
    }  # fmt: skip
    values = {arm: list(base * np.exp(sign * np.array(gain))) for arm, gain in gains.items()}
    rows = compare(cells_of(values, metric=metric), metric=metric)
    assert max(rows, key=lambda row: sign * row.mean).arm == "wild"
    assert winners(rows) == {("ddim", 5): "b"}
    assert winners([row for row in rows if row.verdict != "better"]) == {("ddim", 5): None}


def test_conclusions_name_gains_and_losses() -> None:
    factors = {5: 0.5, 10: 0.6, 20: 0.7, 50: 1.04}
    cells = []
    for steps, factor in factors.items():
        for seed in range(3):
            jitter = 1 + 0.001 * seed
            cells += [
                cell("plain", seed, 10.0 + seed, steps=steps),
                cell("at", seed, (10.0 + seed) * factor * jitter, steps=steps),
                cell("random", seed, (10.0 + seed) * (1.2 * jitter), steps=steps),
                cell("ip", seed, (10.0 + seed) * (0.9, 1.0, 1.1)[seed], steps=steps),
            ]
    said = conclusions(compare(cells))
    assert said == [
        "3 seeds, 4 cells (sampler and steps): a difference is clear if the 95% t interval of the paired "
        "change excludes zero.",
        "at lowers FD against plain in 3 of 4 cells (ddim 5: −50%, ddim 10: −40%, ddim 20: −30%), raises it "
        "in 1 (ddim 50: +4.1%); none unclear. Holm's correction over its cells leaves 4 of 4.",
        "random lowers FD against plain in none of 4 cells, raises it in 4 "
        "(+20% on ddim 5 to +20% on ddim 5); "
        "none unclear. Holm's correction over its cells leaves 4 of 4.",
        "ip makes no clear difference to FD against plain in any of 4 cells (estimates −0.3% to −0.3%).",
        "Winners by cell: at 3; in the other 1, no arm is clearly better than plain.",
    ]


def test_conclusions_adapt_to_metrics_that_should_rise() -> None:
    values = {"plain": [0.5, 0.6, 0.7], "at": [0.4, 0.481, 0.562]}
    said = conclusions(compare(cells_of(values, metric="recall"), metric="recall"))
    assert said[1].startswith("at raises recall against plain in none of 1 cell, lowers it in 1 (ddim 5: −20%)")
    assert said[2] == "No arm is clearly better than plain in any cell."


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (-31.4, "−31%"),
        (4.24, "+4.2%"),
        (-9.97, "−10%"),
        (1e6, ">999%"),
        (math.inf, ">999%"),
        (math.nan, "n/a"),
    ],
)
def test_percent_formatting(value: float, text: str) -> None:
    assert percent(value) == text


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({}, {"baseline": "plane"}, "baseline 'plane' is not among the arms 'plain', 'at'"),
        ({}, {"metric": "kid"}, "no cell has the metric 'kid'"),
        ({}, {"metric": "beauty"}, "metric 'beauty' is unknown"),
        ({}, {"confidence": 95}, "confidence is 95"),
        ({}, {"interval": "bca"}, "interval 'bca' is unknown, expected t or bootstrap"),
        ({}, {"correction": "time-shift:40"}, "no cell has the correction 'time-shift:40', expected one of 'none'"),
        ({"correction": "time-shift:40", "num": 256}, {}, "evaluate all arms alike"),
        ({"seed": 0}, {}, "is given twice"),
        ({"num": 256}, {}, "evaluate all arms alike"),
        ({"sample_seed": 7}, {}, "evaluate all arms alike"),
    ],
)
def test_invalid_arguments_are_rejected(change: Cell, options: dict[str, Any], words: str) -> None:
    cells = cells_of({"plain": [10.0, 20.0], "at": [9.0, 18.0]})
    cells[-1] = {**cells[-1], **change}
    with pytest.raises(UserError, match=words):
        compare(cells, **options)


def test_conclusions_need_the_baseline() -> None:
    rows = compare(cells_of({"plain": [10.0, 20.0], "at": [9.0, 18.0]}))
    with pytest.raises(UserError, match="no baseline"):
        conclusions(rows[1:])


def bootstrap_by_hand(values: list[float], confidence: float) -> tuple[float, float]:
    """Return the exact interval of the mean of a resample, by listing all n^n of them."""
    means = np.array([np.mean(resample) for resample in itertools.product(values, repeat=len(values))])
    tail = (1 - confidence) / 2
    return float(np.quantile(means, tail)), float(np.quantile(means, 1 - tail))


def test_bootstrap_interval_matches_all_resamples() -> None:
    ratios = [0.7, 0.75, 0.9, 0.78, 1.1, 0.85]
    base = [10.0, 12.0, 9.0, 20.0, 15.0, 11.0]
    cells = cells_of({"plain": base, "at": list(np.multiply(ratios, base))})
    row = compare(cells, interval="bootstrap", confidence=0.8)[1]
    low, high = bootstrap_by_hand(list(np.log(ratios)), 0.8)
    assert row.change_low == pytest.approx(100 * math.expm1(low), abs=0.7)  # 9,999 of 46,656 resamples
    assert row.change_high == pytest.approx(100 * math.expm1(high), abs=0.7)
    t_row = compare(cells, confidence=0.8)[1]
    assert (row.interval, t_row.interval) == ("bootstrap", "t")
    assert (row.change, row.p_value) == (t_row.change, t_row.p_value)
    assert row.change_high - row.change_low < t_row.change_high - t_row.change_low
    low, high = bootstrap_by_hand(base, 0.8)
    assert compare(cells, interval="bootstrap", confidence=0.8)[0].half_width == pytest.approx(
        (high - low) / 2, rel=0.05
    )
    assert compare(cells[::-1], baseline="plain", interval="bootstrap", confidence=0.8)[1] == row


@pytest.mark.parametrize(("seeds", "warned"), [(3, True), (5, False)])
def test_bootstrap_warns_on_few_seeds(seeds: int, warned: bool) -> None:
    values = {"plain": [10.0 + i for i in range(seeds)], "at": [9.0 + i * 1.1 for i in range(seeds)]}
    said = conclusions(compare(cells_of(values), interval="bootstrap"))[0]
    assert "95% bootstrap interval" in said
    assert "paired t test" in said
    assert ("With fewer than 5 seeds, bootstrap intervals are too narrow" in said) == warned
    assert "bootstrap" not in conclusions(compare(cells_of(values)))[0]


def test_bootstrap_of_degenerate_seeds() -> None:
    def row(base: list[float], arm: list[float]) -> Row:
        return compare(cells_of({"plain": base, "at": arm}), interval="bootstrap")[1]

    assert math.isnan(row([10.0], [5.0]).change_low)
    assert (row([10.0, 20.0], [5.0, 10.0]).change_low, row([10.0, 20.0], [5.0, 10.0]).verdict) == (
        pytest.approx(-50),
        "better",
    )
    assert row([10.0, 20.0], [5.0, math.nan]).verdict == "unclear"


@pytest.mark.parametrize(("metric", "best"), [("fd", 3.0), ("recall", 7.0)])
def test_minimum_is_the_best_finite_seed(metric: str, best: float) -> None:
    values = {"plain": [1.0, 1.0, 1.0, 1.0], "at": [5.0, 3.0, 7.0, math.nan]}
    assert compare(cells_of(values, metric=metric), metric=metric)[1].minimum == best


def corrected_cells() -> list[Cell]:
    """One cell of two arms: plain 10, 20, 40; at 0.8 of it; epsilon scaling brings both to 0.9 of plain."""
    base = np.array([10.0, 20.0, 40.0])
    jitter = np.array([0.99, 1.0, 1.01])
    cells = cells_of({"plain": list(base), "at": list(0.8 * base * jitter)})
    for seed, value in enumerate((1.02, 1.0, 1.01)):
        shared = {"correction": "epsilon-scaling:search", "correction_value": value}
        cells.append(cell("plain", seed, 0.9 * base[seed] * jitter[2 - seed], **shared))
        cells.append(cell("at", seed, 0.9 * base[seed] * jitter[seed] * (0.9, 1.0, 1.2)[seed], **shared))
    return cells


def test_corrections_are_compared_with_the_same_and_with_none() -> None:
    cells = corrected_cells()
    assert corrections_of(cells[::-1]) == ["none", "epsilon-scaling:search"]
    rows = {(one.row.correction, one.row.arm): one for one in compare_corrected(cells)}
    assert list(rows) == [
        ("none", "plain"), ("none", "at"), ("epsilon-scaling:search", "plain"), ("epsilon-scaling:search", "at")
    ]  # fmt: skip
    for correction in corrections_of(cells):
        expected = compare(cells, correction=correction)
        found = [one.row for one in rows.values() if one.row.correction == correction]
        assert str(found) == str(expected)  # nan equals itself only as text
    none, alone = rows["none", "at"], rows["epsilon-scaling:search", "plain"]
    assert (none.uncorrected, none.values) == (none.row, ())
    assert (alone.row.verdict, alone.uncorrected.verdict, alone.values) == ("baseline", "better", (1.0, 1.01, 1.02))
    # Renaming the columns by hand gives the same comparison across corrections.
    renamed = [c for c in cells if "correction" not in c and c["arm"] == "plain"]
    renamed += [{**c, "correction": "none", "arm": f"{c['arm']}+"} for c in cells if "correction" in c]
    for arm in ("plain", "at"):
        by_hand = next(row for row in compare(renamed) if row.arm == f"{arm}+")
        found = rows["epsilon-scaling:search", arm].uncorrected
        assert (found.change, found.change_low, found.p_holm) == (by_hand.change, by_hand.change_low, by_hand.p_holm)


def test_conclusions_cover_corrections() -> None:
    cells = corrected_cells()
    label = "searched epsilon-scaling"
    said = corrected_conclusions(compare_corrected(cells))
    assert said == [
        f"plain with {label} lowers FD against plain without in 1 of 1 cell (ddim 5: −10%), raises it in none; none "
        "unclear. Holm's correction over its cells leaves 1 of 1.",
        f"With {label} on both, at makes no clear difference to FD against plain in any of 1 cell (estimates +2.6% to "
        "+2.6%).",
        f"With {label} on both, no arm is clearly better than plain in any cell.",
    ]
    rows = compare(cells, correction="epsilon-scaling:search")
    assert conclusions(rows)[1:] == said[1:]
    known = "umber of cells (of 1) where FD is clearly better / worse than plain's: at"
    assert scores(rows) == f"With {label} on both, n{known} 0 / 0."
    assert scores(compare(cells)) == f"N{known} 1 / 0."
    assert scores(compare(cells_of({"plain": [1.0], "at": [2.0]}))).startswith("One seed")


def test_corrections_without_an_uncorrected_column() -> None:
    cells = [c for c in corrected_cells() if "correction" in c]
    assert corrections_of(cells) == ["epsilon-scaling:search"]
    assert all(one.uncorrected.pairs == 0 for one in compare_corrected(cells))
    assert corrected_conclusions(compare_corrected(cells))[0].startswith("With searched epsilon-scaling on both, at")


@pytest.mark.parametrize(
    ("correction", "label"),
    [
        ("none", "no correction"), ("epsilon-scaling:1.01", "epsilon-scaling 1.01"),
        ("time-shift:search", "searched time-shift"), ("time-shift:40:300", "time-shift 40, 300"),
    ],
)  # fmt: skip
def test_correction_label_formatting(correction: str, label: str) -> None:
    assert correction_label(correction) == label


@pytest.mark.parametrize(
    ("metric", "better"),
    [("sliced_wasserstein", 0.5), ("energy", 0.5), ("clip_fid", 0.5), ("on_mode", 2), ("clip_score", 2)],
)  # fmt: skip
def test_metrics_have_a_direction_and_a_label(metric: str, better: float) -> None:
    values = {"plain": [10.0, 20.0, 40.0], "at": [10.0 * better, 20.0 * better, 40.1 * better]}
    assert compare(cells_of(values, metric=metric), metric=metric)[1].verdict == "better"
    assert "_" not in metric_label(metric)
