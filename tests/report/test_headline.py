"""The headline of a report, and the descriptions of its arms."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
from test_steps_saved import CURVE, cells

from atdiff.report.headline import headline
from atdiff.report.links import load_code
from atdiff.report.statistics import compare, ranked
from atdiff.report.steps_saved import saved_where_known
from atdiff.study.recipe import bundled_recipes, load_recipe, resolve
from atdiff.training.words import describe_arms


def said(figures: dict[str, list[dict[int, float]]], metric: str = "fd") -> str:
    found = cells(figures, metric)
    line = headline(compare(found, metric=metric), saved_where_known(found, metric=metric))
    assert line is not None
    return f"{line.text} {line.more}".strip()


def scaled(*factors: float) -> list[dict[int, float]]:
    return [{steps: figure * factor for steps, figure in CURVE.items()} for factor in factors]


def test_headline_names_the_best_arm_its_cell_and_steps_saved() -> None:
    at = [{**curve, 4: 8.0 * factor} for curve, factor in zip(scaled(0.9, 0.91), (1.0, 1.01), strict=True)]
    plain = scaled(1.0, 1.0)
    text = said({"plain": plain, "ip": scaled(0.99, 1.02), "at": at})
    # plain reaches 8 in 8 steps, and 8.08 in slightly fewer.
    assert text.startswith(
        "at lowers FD by 75% against plain with ddim at 4 steps (8.04 against 32; 95% t interval of the change [−76%, "
        "−73%], 2 seeds): plain needs 7.98 steps to match this, so 3.98 steps are saved. Of 3 cells (sampler and "
        "steps) it is clearly better than plain in"
    )
    assert "clearly worse in none" in text


def test_unmeasured_steps_give_a_lower_bound() -> None:
    text = said({"plain": scaled(1.0, 1.0), "at": scaled(0.01, 0.0101)})
    assert ": plain does not match this in 16 steps, so more than" in text


def test_upper_bound_reports_no_steps_saved() -> None:
    """One seed of the arm is worse than the baseline at the fewest steps that were measured."""
    at = [{**curve, 4: 32.0 * factor} for curve, factor in zip(scaled(*6 * [1.0]), [1.001, *5 * [0.5]], strict=True)]
    found = cells({"plain": scaled(*6 * [1.0]), "at": at}, "fd")
    (row,) = (one for one in saved_where_known(found, metric="fd") if one.steps == 4)
    assert (row.bound, row.needed > 4) == ("<", True)
    text = said({"plain": scaled(*6 * [1.0]), "at": at})
    assert text.startswith("at lowers FD by")
    assert "saved" not in text


def test_rising_metric_reports_no_steps_saved() -> None:
    text = said({"plain": scaled(0.01, 0.01), "at": scaled(0.02, 0.0201)}, "recall")
    assert text.startswith("at raises recall by 100% against plain with ddim at")
    assert "saved" not in text


def test_headline_says_if_nothing_is_clear() -> None:
    text = said({"plain": scaled(1.0, 1.0), "at": scaled(0.8, 1.1)})
    assert text.startswith("No arm is clearly better than plain in any of 3 cells")
    assert text.endswith("an interval that includes zero.")
    one = said({"plain": scaled(1.0), "at": scaled(0.5)})
    assert "a lead, not a result" in one
    assert headline(compare(cells({"plain": scaled(1.0, 1.1)}))) is None


def test_arms_are_ranked_by_wins_then_by_change() -> None:
    mixed = [{4: 16.0, 8: 8.8, 16: 2.2}, {4: 16.1, 8: 8.9, 16: 2.21}]
    rows = compare(cells({"at": mixed, "worse": scaled(1.5, 1.6), "plain": scaled(1.0, 1.0), "ip": scaled(0.98, 1.0)}))
    assert ranked(rows) == ["plain", "at", "ip", "worse"]


def test_load_code_matches_the_run(tmp_path: Any) -> None:
    run = tmp_path / "seed-0" / "at"
    (run / "pipeline").mkdir(parents=True)
    (run / "pipeline" / "model_index.json").write_text('{"unet": ["atdiff.models.mlp", "MLP2DModel"]}')
    found = [{**cell, "run": str(run)} for cell in cells({"plain": scaled(1.0), "at": scaled(0.5)})]
    row = compare(found)[-1]
    code = load_code(found, row)
    assert f"atdiff sample {run} --sampler ddim --steps 16 --out samples.png" in code
    how = {"guidance_scale": 5.0, "variant": "fp16", "correction": "dcw:search", "correction_value": 0.05}
    asked = [{**cell, **how} for cell in found]
    words = "--sampler ddim --steps 16 --correction dcw:0.05 --guidance-scale 5.0 --variant fp16 --out samples.png"
    assert f"atdiff sample {run} {words}" in load_code(asked, compare(asked, correction="dcw:search")[-1])
    assert "import atdiff.models.mlp  #" in code
    assert f'DiffusionPipeline.from_pretrained("{run}/pipeline")' in code
    (run / "lora").mkdir()
    assert f'pipeline.load_lora_weights("{run}/lora")' in load_code(found, row)
    assert load_code([{**cell, "run": "owner/name"} for cell in found], row).endswith('from_pretrained("owner/name")')
    assert load_code(cells({"plain": scaled(1.0), "at": scaled(0.5)}), row) == ""


@pytest.mark.parametrize("name", sorted(bundled_recipes()))
def test_arm_descriptions_are_unique_within_a_recipe(name: str) -> None:
    recipe = load_recipe(name)
    words = describe_arms({arm: asdict(resolve(recipe, arm)) for arm in recipe.arms})
    assert list(words) == list(recipe.arms)
    assert len(set(words.values())) == len(words), words


def test_arm_descriptions() -> None:
    recipe = load_recipe("digits-couplings")
    words = describe_arms({arm: asdict(resolve(recipe, arm)) for arm in recipe.arms})
    assert words["plain"] == "plain training, no perturbation"
    assert words["at"] == (
        "input moved along the gradient of the loss (the authors' direction) by 0.5 × σ(1 − α) in the l2 norm, every "
        "sample 2 times, staggered"
    )
    assert words["auto8-ot"] == (
        "input moved along the residual of the predicted noise by an automatic dose for 8 steps, with a "
        "look-ahead, on fresh samples; noise and images paired by optimal transport"
    )
    recipe = load_recipe("text-digits-turbo")
    words = describe_arms({arm: asdict(resolve(recipe, arm)) for arm in recipe.arms})
    assert words["plain"] == "plain training, no perturbation"
    assert words["lcd"] == "consistency distillation with the model itself as the teacher"
    assert words["ct"] == "consistency training without a teacher"
    assert words["turbo"] == "not trained (learning rate 0)"
    assert describe_arms({"a": {}, "b": {"adversary": {"passes": 2, "step_size": 0.0}}}) == {
        "b": "every batch used 2 times, no perturbation"
    }
