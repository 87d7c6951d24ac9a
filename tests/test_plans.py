"""Plans made into candidates by a search, on made-up times and losses."""

import re
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp import appraisal
from onnxcomp import model as models
from onnxcomp.budget import Budget
from onnxcomp.candidates import Candidate
from onnxcomp.core import NOT_NAMED
from onnxcomp.errors import OnnxcompError
from onnxcomp.explanation import explain
from onnxcomp.passes.simplify import Simplify
from onnxcomp.planning import SOURCES, Plan, Planner
from onnxcomp.plans import Lost, Plans, losses_per_error
from onnxcomp.report import Result
from tests.lab import Lab, lab
from tests.lab import network as chain
from tests.passes.small import context
from tests.planned import clock, model

__all__ = ["clock", "lab", "model"]


def searched(lab: Lab, model: ir.Model, count: int = 121, **options: Any) -> Result:
    """What `optimize` makes of a model with so many samples; by default without quantization, at the usual effort."""
    data = context(count).data
    assert data is not None
    given = {"passes": ["simplify", "prune", "prune-depth"], "effort": "default"} | options
    return lab.optimize(model, calib=[batch.feeds for batch in data], **given)


def labelled(lab: Lab, model: ir.Model, passes: Sequence[str] = ("simplify", "prune", "prune-depth")) -> Result:
    """The same with labels, where the smaller is the faster and nothing is lost."""
    lab.latency = lambda made: float(models.tensor_bytes(made))
    data = context(121).data
    assert data is not None
    feeds = next(iter(data.batches(121))).feeds | {"label": np.zeros(121, np.int64)}
    options: dict[str, Any] = {"passes": list(passes), "effort": "default", "budget": Budget(max_drop=0.0002)}
    return lab.optimize(model, calib=feeds, metric="accuracy", **options)


@pytest.mark.parametrize(
    ("loss", "budget", "chosen"), [(0.03, Budget(), False), (0.01, Budget(), True), (0.03, Budget(max_drop=0.05), True)]
)
def test_where_nothing_tells_accuracy_less_goes_and_a_note_says_so(
    lab: Lab, model: ir.Model, loss: float, budget: Budget, chosen: bool
) -> None:
    whole = models.tensor_bytes(Simplify()(model, context(64)).model)
    lab.latency = lambda model: float(models.tensor_bytes(model))
    lab.loss = lambda model: loss if models.tensor_bytes(model) < whole else 0.0
    report = searched(lab, model, budget=budget, count=64).report
    assert any(trial.name.startswith("plan ") for trial in report.trials)
    assert any("an error above 0.02" in trial.verdict for trial in report.trials) != chosen
    assert any("Prune" in step.recipe for step in report.steps) == chosen
    assert any("jointly=True" in step.recipe for step in report.steps) == chosen
    assert any("by the relative-error of the outputs alone" in note for note in report.notes) == chosen


def test_a_plan_that_fails_on_the_final_data_gives_way_to_another(lab: Lab, model: ir.Model) -> None:
    whole = models.tensor_bytes(Simplify()(model, context(64)).model)
    failed: list[int] = []

    def first_fails(made: ir.Model) -> float:
        size = models.tensor_bytes(made)
        if size < whole and not failed:
            failed.append(size)
        return float(size in failed)

    lab.latency, lab.final_loss = lambda made: float(models.tensor_bytes(made)), first_fails
    result = searched(lab, model, budget=Budget(max_drop=0.1))
    verdicts = [trial.verdict for trial in result.report.trials if trial.name.startswith("plan ")]
    assert len(verdicts) > 1
    assert verdicts.count("over the budget on the final data") == 1
    assert verdicts.count("chosen") == 1


def test_where_no_other_plan_is_gentle_enough_one_is_made(lab: Lab, model: ir.Model) -> None:
    def gone(made: ir.Model) -> int:
        return sum(node.op_type == "Add" for node in model.graph) - sum(node.op_type == "Add" for node in made.graph)

    lab.latency = lambda made: float(models.tensor_bytes(made))
    lab.loss = lambda made: 0.018 * gone(made)
    lab.final_loss = lambda made: 2 * lab.loss(made)
    report = searched(lab, model, budget=Budget(max_drop=0.1)).report
    failed, chosen = (
        next(trial for trial in report.trials if trial.verdict == verdict)
        for verdict in ("over the budget on the final data", "chosen")
    )
    assert chosen.name.startswith("plan ")
    assert report.trials.index(chosen) > report.trials.index(failed)
    assert chosen.figures.drop is not None
    assert failed.figures.drop is not None
    assert 0 < chosen.figures.drop < failed.figures.drop


def test_after_a_plan_that_lost_too_much_the_next_one_takes_less(lab: Lab, model: ir.Model) -> None:
    whole = models.tensor_bytes(Simplify()(model, context(64)).model)
    lab.latency = lambda made: float(models.tensor_bytes(made))
    lab.loss = lambda made: 1.0 if models.tensor_bytes(made) < whole else 0.0
    report = searched(lab, model, budget=Budget(max_drop=0.1)).report
    sizes = [trial.figures.size for trial in report.trials if trial.name.startswith("plan ")]
    assert len(sizes) > 1
    assert sizes == sorted(set(sizes))


def test_a_plan_that_lost_too_much_at_next_to_no_error_is_followed_by_one_that_takes_less(
    lab: Lab, model: ir.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = models.tensor_bytes(Simplify()(model, context(64)).model)
    lab.latency = lambda made: float(models.tensor_bytes(made))
    lab.loss = lambda made: max(0.0, 2 * (1 - models.tensor_bytes(made) / whole))
    monkeypatch.setattr(Planner, "compare", lambda self, plan, made, *, quantized=True: 1e-4)
    report = searched(lab, model, budget=Budget(max_drop=0.3)).report
    plans = [trial for trial in report.trials if trial.name.startswith("plan ")]
    assert len(plans) > 1
    assert plans[0].verdict == "over the budget"
    drops = [trial.figures.drop for trial in plans]
    assert drops[1] < drops[0]  # type: ignore[operator]


def test_between_the_best_and_one_that_lost_too_much_there_may_be_another(
    lab: Lab, model: ir.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = models.tensor_bytes(Simplify()(model, context(64)).model)
    lab.latency = lambda made: float(models.tensor_bytes(made))
    lab.loss = lambda made: max(0.0, 2 * (1 - models.tensor_bytes(made) / whole))
    monkeypatch.setattr(Plans, "_aim", lambda self, share=1.0: 0.0 if self._failed else 0.3)
    report = searched(lab, model, budget=Budget(max_drop=0.3)).report
    failed, *others = [trial for trial in report.trials if trial.name.startswith("plan ")]
    assert failed.verdict == "over the budget"
    assert others
    assert others[0].figures.drop < failed.figures.drop  # type: ignore[operator]


def test_a_plan_is_made_even_if_none_promises_anything_before_it_is_known_what_fitting_makes_up_for(
    lab: Lab, model: ir.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    promised = Planner.plan

    def slow(self: Planner, *limits: float, **counts: Any) -> Plan | None:
        plan = promised(self, *limits, **counts)
        return plan if plan is None or self._seen else replace(plan, time=1.0)

    monkeypatch.setattr(Planner, "plan", slow)
    lab.latency = lambda made: float(models.tensor_bytes(made))
    report = searched(lab, model).report
    first, second = [trial for trial in report.trials if trial.name.startswith("plan ")][:2]
    assert first.predicted == pytest.approx(report.trials[0].figures.speedup)
    assert first.predicted is not None
    assert second.predicted is not None
    assert second.predicted > first.predicted


def test_the_result_says_what_each_part_that_was_left_would_have_lost(lab: Lab, model: ir.Model) -> None:
    result = labelled(lab, model)
    assert any(trial.name.startswith("plan ") and trial.verdict == "chosen" for trial in result.report.trials)
    reasons = {skip.reason for step in result.report.steps for skip in step.skips}
    lost = r"the outputs have a relative squared error of [\d.e-]+, too much or for too little time"
    assert any(re.fullmatch(f"the branch at '.*' stays: without it {lost}", reason) for reason in reasons)
    assert any(re.fullmatch(rf"with \d+ of \d+ channels of '.*' {lost}", reason) for reason in reasons)
    assert not any(NOT_NAMED in reason for reason in reasons)
    read = [text for row in explain(result.model).layers for text in row.left]
    assert all(any(text.endswith(reason) for text in read) for reason in reasons)


@pytest.mark.parametrize(
    ("best", "failed", "share"),
    [
        ((0.1, 0.004), (0.4, 0.012), 0.9 * 10 / 12),  # as much by either line, or more by that from nothing
        ((0.2, 0.001), (0.4, 0.012), 0.5 + 0.5 * 8 / 11),  # little at first, and then much
        ((0.5, 0.004), (0.4, 0.012), 0.9 * 10 / 12),  # another kind of plan, which had more error
        ((0.2, 0.001), (0.4, np.inf), 0.5),  # it cannot be said how much too much
        ((0.0, 0.001), (0.4, 0.1), 0.9 * 0.25),
    ],
)
def test_after_a_plan_that_lost_too_much_the_next_one_goes_by_what_that_and_the_best_lost(
    best: tuple[float, float], failed: tuple[float, float], share: float
) -> None:
    """Errors, and losses where 0.01 is allowed; what may be is told as a share of the error of what failed."""
    plans: Any = Plans.__new__(Plans)
    kept, over = (Candidate("", (), chain(), (), drop=loss) for _, loss in (best, failed))
    plans._loss, plans._is_root, plans.best = 0.01, False, kept
    plans._plans = {kept: best[0], over: failed[0]}
    plans._bench = SimpleNamespace(drop=lambda trial: trial.drop)
    plans._planner = SimpleNamespace(again=lambda plan: plan, errors=lambda plan: np.array([plan]))
    assert plans._enough(over, np.ones(1)) == pytest.approx(share * failed[0])


@pytest.mark.parametrize("again", [0.9, 1.0])
def test_what_was_only_lucky_to_be_fast_is_not_what_plans_start_from(lab: Lab, model: ir.Model, again: float) -> None:
    def latency(made: ir.Model) -> float:
        elements = sum(value.const_value.size for value in made.graph.initializers.values() if value.const_value)
        quantized = any(node.op_type == "DequantizeLinear" for node in made.graph)
        return elements * (1.0 if not quantized else 0.9 if len(lab.timed) == 1 else again)

    lab.latency = latency
    report = searched(lab, model, passes=["simplify", "quantize-static", "prune"], budget=Budget(max_drop=0.1)).report
    quantized = [trial for trial in report.trials if trial.name.startswith("static INT8")]
    lucky = any(trial.verdict == "not faster beyond noise when timed again" for trial in quantized)
    assert lucky == (again == 1.0)
    assert any(trial.name.startswith("plan ") for trial in report.trials)
    assert any("QuantizeStatic" in step.recipe for step in report.steps) != lucky


@pytest.mark.parametrize("limit", [23_000, 19_500])
def test_under_a_limit_on_size_weights_are_stored_in_as_many_bytes_as_it_allows(
    lab: Lab, model: ir.Model, limit: int
) -> None:
    """Here static INT8 takes 26,000 bytes, and is as fast whatever its weights are stored in."""
    lab.latency = lambda made: 0.5 if any(node.op_type == "DequantizeLinear" for node in made.graph) else 1.0
    budget, passes = Budget(max_drop=0.5, max_size=limit), ["simplify", "quantize-static", "share"]
    result = searched(lab, model, passes=passes, budget=budget)
    assert result.report.met
    assert result.report.result.size <= limit
    first = next(trial for trial in result.report.trials if trial.name.startswith("plan "))
    assert re.search(r"share of \d weights", first.name)
    assert first.figures.size > 0.8 * limit
    (stored,) = [
        step for step in result.report.steps if step.recipe.startswith("Share(") and "parts=((" in step.recipe
    ][:1]
    bits = {change.what for change in stored.changes}
    assert len(bits) > 1  # by what each layer can bear


@pytest.mark.parametrize("share", [0.9, 0.5])
def test_what_is_clearly_fastest_is_not_timed_again(lab: Lab, model: ir.Model, share: float) -> None:
    smallest: dict[int, int] = {}  # of the models timed side by side, each time

    def latency(made: ir.Model) -> float:
        number, size = len(lab.timed), models.tensor_bytes(made)
        smallest[number] = min(size, smallest.get(number, size))
        return share if any(node.op_type == "DequantizeLinear" for node in made.graph) else 1.0

    lab.latency = latency
    searched(lab, model, passes=["simplify", "quantize-static", "prune"], budget=Budget(max_drop=0.1))
    assert (smallest[2] == smallest[1]) == (share == 0.9)  # else it is a plan's turn, which has fewer channels


def test_plans_go_on_while_each_is_much_faster(lab: Lab, model: ir.Model) -> None:
    lab.latency = lambda made: float(models.tensor_bytes(made))
    report = searched(lab, model, effort="quick", budget=Budget(max_drop=0.1)).report
    first, *others = [trial.figures.speedup or 0.0 for trial in report.trials if trial.name.startswith("plan ")]
    assert others  # one is what `quick` makes of named passes
    assert first > 1.1 * (report.trials[0].figures.speedup or 0.0)


def test_no_plan_follows_one_that_is_foretold_as_fast(
    lab: Lab, model: ir.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Planner, "again", lambda self, plan: replace(plan, time=0.0))
    lab.latency = lambda made: float(models.tensor_bytes(made))
    report = searched(lab, model, effort="quick", budget=Budget(max_drop=0.1)).report
    assert sum(trial.name.startswith("plan ") for trial in report.trials) == 1  # more, as above, if that is not asked


def test_where_nothing_tells_accuracy_what_goes_counts_beside_what_quantization_loses(
    lab: Lab, model: ir.Model
) -> None:
    whole = models.tensor_bytes(Simplify()(model, context(64)).model)
    lab.latency = lambda made: float(models.tensor_bytes(made))
    lab.loss = lambda made: 0.1 if models.tensor_bytes(made) < whole else 0.0
    report = searched(lab, model, passes=["simplify", "quantize-static", "prune", "prune-depth"]).report
    quantized = [trial for trial in report.trials if trial.name.startswith("static INT8") and trial.figures.drop]
    assert quantized
    assert any(trial.name.startswith("plan ") and trial.verdict == "chosen" for trial in report.trials)


def test_plans_are_compared_before_they_are_quantized_too(
    lab: Lab, model: ir.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.latency = lambda made: float(models.tensor_bytes(made))
    compare, seen = Planner.compare, []

    def noted(self: Planner, plan: Plan, made: ir.Model, *, quantized: bool = True) -> float:
        seen.append((quantized, any(node.op_type == "QuantizeLinear" for node in made.graph)))
        return compare(self, plan, made, quantized=quantized)

    monkeypatch.setattr(Planner, "compare", noted)
    report = searched(lab, model, passes=["simplify", "quantize-static", "prune"]).report
    plans = [trial for trial in report.trials if trial.name.startswith("plan ") and trial.figures.speedup]
    assert plans
    assert seen[:2] == [(False, False), (True, True)]


@pytest.mark.parametrize(("factor", "much", "plans"), [(1.0, np.inf, 1), (100.0, np.inf, 3), (1.0, 1.1, 3)])
def test_a_plan_that_failed_and_is_much_faster_or_had_an_error_foretold_far_too_low_is_followed_by_more(
    lab: Lab, model: ir.Model, monkeypatch: pytest.MonkeyPatch, factor: float, much: float, plans: int
) -> None:
    whole = models.tensor_bytes(Simplify()(model, context(64)).model)
    lab.latency = lambda made: float(models.tensor_bytes(made))
    monkeypatch.setattr("onnxcomp.plans._WORTH", much)
    lab.loss = lambda made: 0.11 if models.tensor_bytes(made) < whole else 0.0
    monkeypatch.setattr(Planner, "compare", lambda self, plan, made, *, quantized=True: factor * plan.error)
    report = searched(lab, model, effort="quick", budget=Budget(max_drop=0.1)).report
    assert sum(trial.name.startswith("plan ") for trial in report.trials) == plans


def test_what_no_plan_did_yet_is_tried_alone_where_it_may_lose_less(lab: Lab, model: ir.Model) -> None:
    report = labelled(lab, model).report
    first, alone, both = [trial.name for trial in report.trials if trial.name.startswith("plan ")][:3]
    assert ("narrower" in first, "gone" in first) == (True, False)
    assert ("narrower" in alone, "gone" in alone) == (False, True)
    assert ("narrower" in both, "gone" in both) == (True, True)


@pytest.mark.parametrize("passes", [["prune"], ["prune", "prune-depth"]])
def test_only_what_there_is_to_choose_is_tried_alone(
    lab: Lab, model: ir.Model, monkeypatch: pytest.MonkeyPatch, passes: list[str]
) -> None:
    asked: list[bool] = []
    promised = Planner.plan

    def noted(self: Planner, error: float, size: float = np.inf, counts: Any = 1.0) -> Plan | None:
        asked.append(bool(np.max(counts) > 100 * np.min(counts)))  # some sources count a thousand times
        return promised(self, error, size, counts)

    monkeypatch.setattr(Planner, "plan", noted)
    labelled(lab, model, ["simplify", *passes])
    assert any(asked) == (len(passes) == 2)


def test_a_plan_that_changes_no_output_teaches_nothing_and_ends_nothing(
    lab: Lab, model: ir.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Planner, "errors", lambda self, plan: np.zeros(len(SOURCES)))
    monkeypatch.setattr(Planner, "compare", lambda self, plan, made, *, quantized=True: 1e-12)
    assert any(trial.verdict == "chosen" for trial in labelled(lab, model).report.trials)


USUAL = 0.005 / 0.012
BRANCHES, WIDTHS = (np.eye(len(SOURCES))[SOURCES.index(source)] for source in ("branches", "widths"))


@pytest.mark.parametrize(
    ("noise", "low", "high"),
    [(1e-6, 0.9, 1.1), (0.0035, 0.42, 0.6), (0.1, 0.416, 0.42), (None, 0.5, 0.95)],
    ids=["certain", "judged on thousands", "judged on a few", "not known"],
)
def test_a_noisy_loss_changes_what_the_next_error_is_taken_to_lose_by_little(
    noise: float | None, low: float, high: float
) -> None:
    seen = [Lost(0.001 * WIDTHS, 0.001, noise), Lost(0.004 * WIDTHS, 0.004, noise)]
    assert low < WIDTHS @ losses_per_error(seen, 0.005, USUAL)[0] < high


@pytest.mark.parametrize("seen", [[], [Lost(1e-12 * WIDTHS, 0.0, 0.0)], [Lost(0.004 * WIDTHS, np.inf, 0.001)]], ids=str)
def test_what_tells_nothing_leaves_losses_as_usual(seen: list[Lost]) -> None:
    assert losses_per_error(seen, 0.005, USUAL)[0] == pytest.approx(USUAL, rel=1e-3)


def test_the_least_and_the_most_that_errors_lose_have_limits() -> None:
    fatal = Lost(0.004 * WIDTHS, 1.0, 1e-9)
    harmless = Lost(100 * 0.005 / USUAL * WIDTHS, 0.0, 0.0)  # a hundred times what is taken to lose what is allowed
    slopes = [losses_per_error([lost] * 50, 0.005, USUAL)[0] for lost in (fatal, harmless)]
    assert WIDTHS @ slopes[0] == pytest.approx(4 * USUAL)
    assert WIDTHS @ slopes[1] == pytest.approx(0.005 / (4 * harmless.errors.sum()))


def test_what_one_source_loses_tells_half_of_what_another_does_and_tells_both_apart() -> None:
    plan, other = Lost(0.01 * WIDTHS, 0.0004, 0.0), Lost(0.01 * (WIDTHS + BRANCHES), 0.0024, 0.0)
    slopes, hoped = losses_per_error([plan], 0.005, USUAL)
    assert WIDTHS @ slopes < BRANCHES @ slopes < USUAL
    assert np.log(BRANCHES @ slopes / USUAL) == pytest.approx(np.log(WIDTHS @ slopes / USUAL) / 2, rel=0.01)
    assert BRANCHES @ hoped < 0.6 * BRANCHES @ slopes
    slopes, _ = losses_per_error([plan, other], 0.005, USUAL)
    assert BRANCHES @ slopes > 1.5 * WIDTHS @ slopes


@pytest.mark.parametrize("untraced", [False, True])
def test_where_nothing_can_go_nothing_is_planned(lab: Lab, monkeypatch: pytest.MonkeyPatch, untraced: bool) -> None:
    def nobody_knows(*_: Any) -> None:
        raise OnnxcompError("odd shapes")

    if untraced:
        monkeypatch.setattr(appraisal, "channel_groups", nobody_knows)
    report = lab.optimize(chain(["g0"]), passes=["simplify", "prune", "prune-depth"], effort="default").report
    assert not any(trial.name.startswith("plan ") for trial in report.trials)
    assert any("odd shapes" in trial.verdict for trial in report.trials) == untraced
