"""What the search decides, on made-up latencies and losses."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from scipy.special import softmax

from models import zoo
from onnxcomp import kernels, optimizer, runtime, search, stopwatch
from onnxcomp import model as models
from onnxcomp.budget import Budget
from onnxcomp.candidates import NOISE, Candidate, Effort, Loss, Workbench
from onnxcomp.core import Change, Context, Outcome, Pass
from onnxcomp.errors import BudgetError, DataError, OnnxcompError
from onnxcomp.judges import Judges
from onnxcomp.measure import paced
from onnxcomp.metrics import METRICS
from onnxcomp.passes.quantize_static import QuantizeStatic
from onnxcomp.runtime import Protocol, Session, Target, Timing
from onnxcomp.search import Search, accepted_drop
from tests.lab import LAYERS, WIDTH, Lab, integers, lab, network, operators, samples, trial, wasteful

__all__ = ["lab"]

COSTS = {"g2": 0.3, "g4": 0.15}


def costly(model: ir.Model) -> float:
    return sum(COSTS.get(name, 0.01) for name in integers(model))


# --- what is kept ---------------------------------------------------------------------------------------------------


def test_the_fastest_within_the_budget_is_chosen(lab: Lab) -> None:
    result = lab.optimize()
    assert integers(result.model) == set(LAYERS)
    assert result.report.result.speedup == pytest.approx(2.5)
    assert result.report.met
    assert trial(result, "static INT8").verdict == "chosen"
    assert trial(result, "dynamic INT8").verdict == "not faster"


@pytest.mark.parametrize(
    ("budget", "in_float"),
    [(0.6, set()), (0.5, set()), (0.25, {"g2"}), (0.1, {"g2", "g4"}), (0.035, {"g2", "g4", "g0"})],
)
def test_as_few_nodes_return_to_float_as_keep_the_budget(lab: Lab, budget: float, in_float: set[str]) -> None:
    lab.loss, lab.order = costly, lambda name: COSTS.get(name, 0.01 if name in LAYERS else 0.0)
    result = lab.optimize(budget=Budget(max_drop=budget))
    assert set(LAYERS) - integers(result.model) == in_float
    assert result.report.met
    drop = result.report.result.drop
    assert drop is not None
    assert drop <= budget


def test_over_any_budget_the_clean_model_is_the_result(lab: Lab) -> None:
    lab.loss = lambda model: float(bool(integers(model)))
    result = lab.optimize(wasteful(), passes=["simplify", "quantize-static"])
    assert not integers(result.model)
    assert result.report.met
    assert any("the cleaned-up model is the result" in note for note in result.report.notes)
    assert trial(result, "static INT8").verdict == "over the budget"
    assert trial(result, "clean-up").verdict == "chosen"


def test_products_are_a_draft_beside_the_usual_kernels(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def some(model: ir.Model, technique: QuantizeStatic, *_: Any) -> QuantizeStatic:
        asked.append({node.name for node in model.graph} & set(LAYERS))
        return replace(technique, as_gemm=("g0", "g3"))

    monkeypatch.setattr(kernels, "with_fastest", some)
    result = lab.optimize(wasteful(), passes=["simplify", "quantize-static"])
    assert [t.name for t in result.report.trials[1:3]] == ["static INT8", "static INT8, 2 convolutions as products"]
    assert asked == [set(LAYERS)]


def test_nothing_slower_is_chosen_even_without_any_loss(lab: Lab) -> None:
    lab.latency = lambda model: 1.0 + 0.1 * len(integers(model)) + ("MatMulInteger" in operators(model))
    result = lab.optimize(wasteful(), passes=["simplify", "quantize-static", "quantize-dynamic"])
    assert operators(result.model) == {"MatMul", "Relu"}
    assert {t.verdict for t in result.report.trials[1:]} == {"not faster"}


def test_what_is_faster_only_within_noise_is_not_worth_a_loss(lab: Lab) -> None:
    lab.latency = lambda model: 1.0 - NOISE / 2 * bool(integers(model))
    lab.loss = lambda model: 0.1 * bool(integers(model))
    result = lab.optimize(passes=["simplify", "quantize-static"])
    assert not integers(result.model)
    assert trial(result, "static INT8").verdict == "not faster beyond noise"


def test_backed_off_to_no_gain_is_not_chosen(lab: Lab) -> None:
    lab.latency = lambda model: {0: 1.0, len(LAYERS): 0.5}.get(len(integers(model)), 0.98)
    lab.loss = lambda model: 0.5 if "g0" in integers(model) else 0.0
    lab.order = lambda name: name == "g0"
    result = lab.optimize(passes=["simplify", "quantize-static"])
    assert not integers(result.model)
    assert trial(result, "static INT8, 1 most sensitive node in float").verdict == "not faster beyond noise"


def test_a_slower_draft_wins_where_the_fastest_loses_too_much(lab: Lab) -> None:
    lab.latency = lambda model: 0.4 if integers(model) else 0.6 if "MatMulInteger" in operators(model) else 1.0
    lab.loss = lambda model: float(bool(integers(model)))
    result = lab.optimize()
    assert "MatMulInteger" in operators(result.model)
    assert trial(result, "dynamic INT8").verdict == "chosen"


def test_more_effort_tries_other_ranges_and_equalization(lab: Lab) -> None:
    tries = 0

    def second(model: ir.Model) -> float:
        nonlocal tries
        tries += 1
        return float(tries == 1)

    lab.loss = lambda model: second(model) if integers(model) else 0.0
    result = lab.optimize(effort=Effort.DEFAULT, passes=["simplify", "quantize-static", "equalize"])
    assert trial(result, "static INT8, weights refined").verdict == "over the budget"
    assert trial(result, "static INT8, min-max ranges").verdict == "chosen"
    assert "range=Range.MINMAX" in result.report.steps[-1].recipe


# --- size -----------------------------------------------------------------------------------------------------------


def test_a_limit_on_size_is_met_by_weights_alone_where_nothing_is_faster(lab: Lab) -> None:
    lab.latency = lambda model: 1.0 if operators(model) == {"MatMul", "Relu"} else 1.5
    result = lab.optimize(network(seed=2), budget=Budget(max_size_share=0.5))
    assert not integers(result.model)
    assert result.report.result.size <= 0.5 * result.report.original.size
    assert result.report.met
    assert result.report.steps[-1].recipe.startswith("QuantizeWeights(bits=8")
    assert any("slower" in note for note in result.report.notes)


def test_without_a_limit_weights_are_stored_only_where_that_costs_no_time(lab: Lab) -> None:
    lab.latency = lambda model: 1.0
    smaller = lab.optimize()
    assert smaller.report.steps[-1].recipe.startswith("QuantizeWeights(bits=8")
    assert smaller.report.result.size < 0.6 * smaller.report.original.size
    lab.latency = lambda model: 1.0 if operators(model) == {"MatMul", "Relu"} else 1.1
    slower = lab.optimize()
    assert operators(slower.model) == {"MatMul", "Relu"}
    assert {t.verdict for t in slower.report.trials if "stored" in t.name} == {"slower"}


def test_four_bits_only_where_eight_do_not_suffice(lab: Lab) -> None:
    lab.latency = lambda model: 1.0
    eight = lab.optimize(budget=Budget(max_size_share=0.5)).report
    four = lab.optimize(budget=Budget(max_size=int(0.8 * eight.result.size))).report
    assert "bits=8" in eight.steps[-1].recipe
    assert "bits=4" in four.steps[-1].recipe
    assert eight.met
    assert four.met


@pytest.mark.parametrize(("share", "met"), [(0.9, True), (0.75, False)])
def test_where_four_bits_lose_too_much_and_eight_are_too_many_the_most_sensitive_have_eight(
    lab: Lab, share: float, met: bool
) -> None:
    def in_four_bits(model: ir.Model) -> set[str]:
        found = [node for node in model.graph if node.op_type == "MatMulNBits"]
        return {(node.name or "").removesuffix("_nbits") for node in found if node.attributes.get_int("bits") == 4}

    given: dict[str, Any] = {"passes": ["simplify", "quantize-weights"], "best_effort": True}
    lab.latency, lab.order = lambda model: 1.0, lambda name: float(name in {"g1", "g4"})
    eight = lab.optimize(budget=Budget(max_size_share=0.5), **given).report.result.size
    lab.loss = lambda model: float(bool(in_four_bits(model) & {"g1", "g4"}))
    result = lab.optimize(budget=Budget(max_drop=0.1, max_size=int(share * eight)), **given)
    assert result.report.met == met
    assert in_four_bits(result.model) == ({"g0", "g2", "g3", "g5"} if met else set())
    mixed = trial(result, "clean-up, remaining weights stored in 4 bits, 2 most sensitive nodes in 8 bits")
    assert mixed.verdict == ("chosen" if met else "above the limit on size")


def test_bits_are_mixed_only_where_eight_would_do(lab: Lab) -> None:
    lab.latency, lab.loss = lambda model: 1.0, lambda model: float("MatMulNBits" in operators(model))
    given: dict[str, Any] = {"passes": ["simplify", "quantize-weights"], "best_effort": True}
    report = lab.optimize(budget=Budget(max_drop=0.1, max_size_share=0.3), **given).report
    assert any("4 bits" in trial.name and trial.verdict == "over the budget" for trial in report.trials)
    assert not any("most sensitive" in trial.name for trial in report.trials)


def test_a_limit_on_time_beside_one_on_size_allows_what_costs_no_time(lab: Lab) -> None:
    lab.latency = lambda model: 1.0
    budget = Budget(max_drop=0.1, max_size=100, min_speedup=0.5)
    given: dict[str, Any] = {"passes": ["simplify", "quantize-weights"], "best_effort": True}
    report = lab.optimize(budget=budget, **given).report
    assert "bits=4" in report.steps[-1].recipe
    assert not any("slower" in trial.verdict for trial in report.trials)


@pytest.mark.parametrize("gain", [1.0, 0.5])
def test_a_clean_up_that_makes_it_larger_is_not_kept_however_fast(lab: Lab, gain: float) -> None:
    lab.latency = lambda model: 1.0 if model.functions else gain
    source = zoo.build("functions").SerializeToString()
    result = lab.optimize(source, calib=None, passes=["simplify"])
    clean = trial(result, "clean-up")
    assert clean.figures.speedup == 1 / gain
    assert clean.figures.size > len(source)
    assert clean.verdict == "larger than the original"
    allowed = lab.optimize(source, calib=None, passes=["simplify"], budget=Budget(max_size_share=10.0))
    assert bool(allowed.report.steps) == (gain < 1)
    assert not result.report.steps
    assert result.report.result.size <= len(source)
    assert any("the model as it was" in note for note in result.report.notes)
    assert trial(result, "the model as it was").verdict == "chosen"


def test_a_clean_up_that_gains_neither_time_nor_bytes_is_not_kept(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.latency = lambda model: 1.0
    kept = lab.optimize(wasteful(), passes=["simplify"])
    assert trial(kept, "clean-up").verdict == "chosen"
    monkeypatch.setattr(search, "_LITTLE", 0.99)
    given = lab.optimize(wasteful(), passes=["simplify"])
    assert trial(given, "clean-up").verdict == "neither faster nor smaller"
    assert not given.report.steps
    limited = lab.optimize(wasteful(), passes=["simplify"], budget=Budget(max_size_share=0.9))
    assert limited.report.met
    assert limited.report.steps
    lab.latency = lambda model: float(len(model.graph))
    assert lab.optimize(wasteful(), passes=["simplify"]).report.steps


def test_where_nothing_is_gained_the_result_is_the_input_byte_for_byte(lab: Lab, tmp_path: Path) -> None:
    source, output = tmp_path / "m.onnx", tmp_path / "out.onnx"
    proto = ir.to_proto(network())  # other bytes than `save` gives
    source.write_bytes(proto.SerializeToString())
    assert source.read_bytes() != models.to_bytes(models.load(source))
    lab.latency = lambda model: 1.0
    result = lab.optimize(source, output=output, passes=["simplify", "quantize-static"])
    assert output.read_bytes() == source.read_bytes()
    assert result.report.result.size == source.stat().st_size
    assert trial(result, "clean-up").verdict == "nothing to change"
    assert any("Nothing made it better" in note for note in result.report.notes)
    assert lab.timed[-1] == 1  # the proof


def test_where_nothing_can_change_only_the_proof_takes_time(lab: Lab) -> None:
    result = lab.optimize(network(), passes=["simplify"])
    assert [protocol.rounds for protocol in lab.protocols] == [optimizer._PROOF.rounds]
    assert lab.timed == [1]
    assert not result.report.steps
    assert result.report.result.latency is not None


def test_where_nothing_can_change_a_limit_still_says_what_would_have_to_give_way(lab: Lab) -> None:
    lab.latency = lambda model: 1.0
    report = lab.optimize(network(), passes=["simplify"], budget=Budget(min_speedup=3), best_effort=True).report
    assert not report.met
    assert any("--min-speedup gives way by 2.00x" in note for note in report.notes)


def test_where_time_is_limited_it_is_known_what_the_proof_takes(lab: Lab) -> None:
    lab.optimize(network(), passes=["simplify", "quantize-weights"], time_limit=1e6)
    assert lab.timed[0] == 2


def test_a_result_that_is_the_input_loses_nothing_even_where_the_input_is_random() -> None:
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape(["n", 4]))
    noise = ir.node("RandomNormalLike", [x])
    total = ir.node("Add", [x, noise.outputs[0]])
    total.outputs[0].name, total.outputs[0].dtype = "y", ir.DataType.FLOAT
    total.outputs[0].shape = ir.Shape(["n", 4])
    graph = ir.Graph([x], total.outputs, nodes=[noise, total], opset_imports={"": 17})
    data = [{"x": np.ones((8, 4), np.float32)}]
    report = optimizer.optimize(ir.Model(graph, ir_version=8), calib=data, effort="quick").report
    assert not report.steps
    assert report.result == report.original
    assert report.result.drop == 0


def test_weights_go_to_four_bits_where_accuracy_is_told_or_a_limit_asks(lab: Lab) -> None:
    def tried(labels: bool, budget: Budget = Budget()) -> bool:
        result = lab.optimize(
            calib=samples(labels=labels), passes=["quantize-weights"], budget=budget, best_effort=True
        )
        return any("4 bits" in each.name for each in result.report.trials)

    lab.latency = lambda model: 1.0 + (operators(model) != operators(network()))  # no form is fast enough
    assert not tried(labels=False)
    assert tried(labels=True)
    assert tried(labels=False, budget=Budget(max_drop=0.2))
    assert tried(labels=False, budget=Budget(max_size_share=0.2))


def test_what_proves_slower_at_length_gives_way(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = Effort.QUICK.protocol.rounds
    given = wasteful()

    def apart(models: Sequence[ir.Model], target: Target, feeds: Any, protocol: Protocol) -> list[Timing]:
        ratios = [1.0, *(1.0 if protocol.rounds <= few else 0.9 for _ in models[1:])]
        return [Timing(1 / ratio, 1.0, 1.0, ratio, ratio, ratio) for ratio in ratios]

    monkeypatch.setattr(stopwatch, "time_apart", apart)
    source, output = tmp_path / "m.onnx", tmp_path / "m.opt.onnx"
    models.save(given, source)
    given = models.load(source)
    result = lab.optimize(given, output=output, passes=["simplify", "quantize-weights"])
    verdicts = {each.name: each.verdict for each in result.report.trials}
    assert verdicts["the model as it was"] == "chosen"
    assert (
        verdicts["clean-up"] == verdicts["clean-up, remaining weights stored in 8 bits"] == "slower than the original"
    )
    assert operators(result.model) == operators(given)
    small = lab.optimize(given, passes=["simplify", "quantize-weights"], budget=Budget(max_size_share=0.5))
    assert small.report.met
    assert small.report.result.size < 0.5 * small.report.original.size


@pytest.mark.parametrize("at_length", [1.5, 1.0])
def test_what_seems_faster_but_not_in_most_rounds_is_timed_at_length(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, at_length: float
) -> None:
    few = Effort.QUICK.protocol.rounds

    def apart(models: Sequence[ir.Model], target: Target, feeds: Any, protocol: Protocol) -> list[Timing]:
        fast = 1.5 if protocol.rounds <= few else at_length
        ratios = [fast if integers(model) else 1.0 for model in models]
        return [Timing(1 / ratio, 1.0, 1.0, ratio, 0.8, ratio) for ratio in ratios]

    monkeypatch.setattr(stopwatch, "time_apart", apart)
    result = lab.optimize(passes=["simplify", "quantize-static"])
    assert bool(integers(result.model)) == (at_length > 1)


def test_nothing_larger_than_the_original_is_chosen_unless_that_is_allowed(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.lab.WIDTH", 4)  # so little that scales weigh more than what they save
    result = lab.optimize(passes=["quantize-static"])
    assert trial(result, "static INT8").verdict == "larger than the original"
    assert not integers(result.model)
    assert integers(lab.optimize(passes=["quantize-static"], budget=Budget(max_size_share=10.0)).model)


# --- limits that cannot be kept -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(min_speedup=3), "speed-up is 2.5x, the limit is 3x"),
        (Budget(max_latency=0.25), "latency is 400 ms, the limit is 250 ms"),
        (Budget(max_size=100), r"size is [\d,]+ bytes, the limit is 100"),
    ],
)
def test_the_error_says_which_limit_is_broken_and_carries_the_best_effort(
    lab: Lab, budget: Budget, message: str
) -> None:
    with pytest.raises(BudgetError, match=message) as caught:
        lab.optimize(budget=budget)
    report = caught.value.result.report  # type: ignore[attr-defined]
    assert not report.met
    assert len(report.unmet) == 1
    assert report.result.speedup == 2.5 or report.result.size < report.original.size / 2


# --- unseen data ----------------------------------------------------------------------------------------------------


def test_a_result_that_fails_on_final_data_is_made_with_more_care(lab: Lab) -> None:
    lab.loss = lambda model: 0.15 if "g1" in integers(model) else 0.0
    lab.final_loss = lambda model: 0.5 if "g1" in integers(model) else 0.0
    lab.order = lambda name: name == "g1"
    result = lab.optimize(passes=["simplify", "quantize-static"])
    assert set(LAYERS) - integers(result.model) == {"g1"}
    assert result.report.met
    assert trial(result, "static INT8").verdict == "over the budget on the final data"
    assert trial(result, "static INT8, 1 most sensitive node in float").verdict == "chosen"


def test_a_result_that_holds_on_final_data_is_left_in_peace(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Search, "_back_off", lambda *_: pytest.fail("more work"))
    assert lab.optimize(passes=["simplify", "quantize-static"]).report.met


def test_a_result_that_fails_twice_gives_way_to_the_clean_model(lab: Lab) -> None:
    lab.final_loss = lambda model: float(bool(integers(model)))
    result = lab.optimize(wasteful(), passes=["simplify", "quantize-static"])
    assert not integers(result.model)
    assert result.report.met
    verdicts = [t.verdict for t in result.report.trials]
    assert verdicts.count("over the budget on the final data") == 2
    assert trial(result, "clean-up").verdict == "chosen"


def test_stored_weights_that_fail_on_final_data_give_way_too(lab: Lab) -> None:
    lab.latency = lambda model: 1.0
    lab.final_loss = lambda model: float(operators(model) != {"MatMul", "Relu"})
    result = lab.optimize(passes=["simplify", "quantize-weights"])
    assert operators(result.model) == {"MatMul", "Relu"}
    assert result.report.met


# --- the budget on the metric ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "budget", "drop"),
    [
        ("relative-error", Budget(), 0.2),
        ("accuracy", Budget(), 0.005),
        ("accuracy", Budget(max_drop=0.02), 0.02),
        ("relative-error", Budget(max_drop=0.0), 0.0),
    ],
)
def test_accepted_drop(metric: str, budget: Budget, drop: float) -> None:
    assert accepted_drop(METRICS[metric], budget) == drop


@pytest.mark.parametrize(("labels", "limit"), [(True, 0.005), (False, 0.2)])
def test_default_budgets_hold_at_the_limit_and_not_above(lab: Lab, labels: bool, limit: float) -> None:
    for loss, chosen in ((limit, True), (limit * 1.01, False)):
        lab.loss = lambda model, loss=loss: loss * bool(integers(model))  # type: ignore[misc]
        result = lab.optimize(calib=samples(labels=labels), passes=["simplify", "quantize-static"])
        assert bool(integers(result.model)) == chosen


# --- candidates -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Poison(Pass):
    """Multiplies a weight."""

    name: ClassVar[str] = "poison"
    summary: ClassVar[str] = "for tests"
    factor: float = float("nan")

    def apply(self, model: ir.Model, context: Context) -> Outcome:
        if self.factor == 0:
            raise OnnxcompError("this pass cannot")
        weight = model.graph.initializers["g3_w"]
        assert weight.const_value is not None
        array = weight.const_value.numpy() * np.float32(self.factor)
        weight.const_value = ir.tensor(array, name="g3_w")
        return Outcome(model, (Change("g3", "poisoned"),))


def workbench(calib: Any = None, metric: str | None = None, batch: int = 1) -> Workbench:
    model, target = network(), Target(threads=1)
    original = Session(model, target)
    judges = Judges.of(model, original, calib, None, metric, None, 0, None)
    return Workbench(model, original, Context(judges.tune, target, batch), judges, Effort.QUICK, ())


@pytest.mark.parametrize("metric", ["relative-error", "accuracy", "cosine", "kl", "agreement"])
def test_outputs_that_are_nan_are_worst(metric: str) -> None:
    bench = workbench(samples(labels=True), metric)
    broken = bench.make("broken", (Poison(),))
    assert bench.works(broken)
    assert bench.drop(broken) > accepted_drop(METRICS[metric], Budget())


def test_the_loss_is_measured_against_the_original() -> None:
    bench = workbench(samples())
    worse = bench.make("worse", (Poison(1.5),))
    assert bench.drop(worse) == pytest.approx(0.5, abs=1e-4)  # the error of one factor in a chain of ReLUs
    assert bench.drop(bench.make("same", ())) == 0.0


def test_a_pass_that_fails_rules_its_candidate_out() -> None:
    bench = workbench(samples())
    failed = bench.make("failed", (Poison(0.0),))
    assert not bench.works(failed)
    assert failed.verdict == "not possible: this pass cannot"
    assert bench.trials == [failed]


def test_a_pass_that_fails_for_a_broken_sample_is_the_datas_fault() -> None:
    data = samples(40)
    data["x"][20, 3] = np.nan
    with pytest.raises(DataError, match="holds nan"):
        workbench(data).make("static", (QuantizeStatic(),))


def test_overflow_inside_the_model_is_the_models_fault() -> None:
    bench = workbench({"x": samples(40)["x"] * np.float32(1e30)})
    draft = bench.make("static", (Poison(1e30), QuantizeStatic()))
    assert not bench.works(draft) or bench.drop(draft) > 0.2


def test_what_is_applied_once_is_not_applied_again() -> None:
    bench = workbench()
    first, second = bench.make("a", (Poison(2.0),)), bench.make("b", (Poison(2.0),))
    assert first.model is second.model


def test_a_model_that_takes_seconds_is_timed_in_short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(np.arange(100) * 0.03)
    session = workbench().original
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    protocol = paced(runtime.Protocol(rounds=9), session, {"x": samples(1)["x"]})
    assert (protocol.longest, protocol.warmup, protocol.rounds) == (0.08, 2, 18)
    assert "blocks of up to 20 consecutive runs, begun within 0.08 s" in str(protocol)


def test_a_fast_model_is_timed_as_usual() -> None:
    bench = workbench()
    assert paced(runtime.Protocol(), bench.original, bench.batch.feeds) == runtime.Protocol()


def test_latency_is_of_the_batch_asked_for_although_samples_are_fewer() -> None:
    bench = workbench(samples(5), batch=16)
    assert bench.rows == 16
    assert bench.batch.feeds["x"].shape == (16, 32)


def test_a_loss_is_believed_by_its_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = workbench()

    def lost(drop: float, noise: float | None) -> Loss:
        expected = Loss(0.002, 0.001)
        return bench.loss(Candidate("c", (), network(), (), drop=drop, noise=noise, expected=expected))

    value, noise = lost(0.006, 0.003)
    variances = np.array([0.003**2, 0.001**2 + (0.3 * 0.006) ** 2])
    assert value == pytest.approx(np.average([0.006, 0.002], weights=1 / variances))
    assert noise == pytest.approx((1 / variances).sum() ** -0.5)
    assert lost(0.09, 0.01).value > 0.075  # however certain likelihoods are of something else
    for certain in (Loss(0.0, 0.0), Loss(0.006, None), Loss(float("inf"), 0.003)):
        assert lost(*certain) == certain
    same = Candidate("c", (), network(), (), drop=0.0, noise=0.01, expected=Loss(0.0, 0.0))
    assert bench.loss(same) == (0.0, 0.01)  # hits and misses that cancel, likelihoods that are equal


def answered() -> dict[str, Any]:
    """Samples whose labels are as likely as the network says."""
    given = samples(2000)
    (scores,) = Session(network(), Target(threads=1)).run(given).values()
    likely = softmax(np.asarray(scores, np.float64), axis=1)
    labels = (np.random.default_rng(0).random((2000, 1)) > likely.cumsum(1)).sum(1)
    return given | {"label": np.minimum(labels, scores.shape[1] - 1)}


def test_scores_that_have_nothing_to_do_with_labels_tell_no_loss() -> None:
    assert workbench(samples(400, labels=True)).baseline.temperature is None


def test_the_loss_of_a_classifier_is_told_by_likelihoods_too() -> None:
    bench = workbench(answered())
    assert bench.baseline.temperature == pytest.approx(1, rel=0.3)
    worse = bench.make("worse", (Poison(-1.0),))
    assert worse.noise is None
    loss = bench.loss(worse)
    assert loss.noise is not None
    assert worse.noise is not None
    assert loss.noise < worse.noise
    assert abs(loss.value - bench.drop(worse)) < 3 * worse.noise


def timed(speedup: float, low: float) -> Candidate:
    return Candidate("c", (), network(), (), timing=Timing(1.0, 1.0, 1.0, speedup, low, speedup))


def test_faster_means_beyond_noise_and_in_three_of_four_rounds() -> None:
    reference = timed(1.0, 1.0)
    assert timed(1.1, 1.05).faster(reference)
    assert not timed(1.02, 1.01).faster(reference)
    assert not timed(1.5, 0.9).faster(reference)  # the wild figures of a model of microseconds
    assert not Candidate("c", (), network(), ()).faster(reference)


def test_sums_stay_apart_from_normalizations_in_all_candidates(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    x, first = model.graph.inputs[0], model.graph[0]
    scale = ir.val("scale", const_value=ir.tensor(np.ones(WIDTH, np.float32), name="scale"))
    model.graph.register_initializer(scale)
    joined = ir.node("Add", [x, x], name="join")
    norm = ir.node("LayerNormalization", [joined.outputs[0], scale], name="norm")
    joined.outputs[0].name, norm.outputs[0].name = "joined", "normed"
    first.replace_input_with(0, norm.outputs[0])
    model.graph.insert_before(first, [joined, norm])
    monkeypatch.setattr(kernels, "fuses_slowly", lambda *_: True)
    result = lab.optimize(model)
    assert integers(result.model) == set(LAYERS)
    assert {"Sum"} == operators(result.model) & {"Add", "Sum"}
    assert "- unfuse: {parts: []}\n" in result.report.recipe
    assert [t.name for t in result.report.trials].count("clean-up") == 1
    kept = lab.optimize(model, passes=["simplify", "quantize-static"])
    assert {"Add"} == operators(kept.model) & {"Add", "Sum"}
