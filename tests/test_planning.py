"""The planner: branches, widths and precision chosen together, on made-up times."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from models import zoo
from onnxcomp import appraisal, latency, planning, table
from onnxcomp import model as models
from onnxcomp.appraisal import Appraisal
from onnxcomp.core import Change, Context, Option, Outcome, Parts, Pass, node_pattern
from onnxcomp.deadline import TimeIsUp
from onnxcomp.errors import OnnxcompError
from onnxcomp.executors import Processes
from onnxcomp.layers import layers
from onnxcomp.model import free_inputs, spec_of
from onnxcomp.passes.binarize import Binarize
from onnxcomp.passes.prune import Prune
from onnxcomp.passes.prune_depth import PruneDepth
from onnxcomp.passes.share import Share
from onnxcomp.passes.simplify import Simplify
from onnxcomp.placement import Crossing
from onnxcomp.planning import Planner
from onnxcomp.profiling import Profile
from onnxcomp.runtime import Session, Target
from onnxcomp.store import Store
from onnxcomp.table import FLOAT
from tests.passes.small import context, network
from tests.passes.test_prune_depth import joins
from tests.planned import CROSSING, INT8, STRENGTHS, clock, flops, made_up, model, planner
from tests.slices import sliced

__all__ = ["clock", "model"]


@functools.cache
def usual(model: ir.Model) -> Planner:
    """For tests that only plan."""
    return planner(model)


def test_more_error_buys_less_time(model: ir.Model) -> None:
    found = usual(model)
    plans = [found.plan(error) for error in (0.01, 0.05, 0.2, 0.5)]
    times = [plan.time for plan in plans if plan is not None]
    assert len(times) == 4
    assert times == sorted(times, reverse=True)
    assert len(set(times)) > 1
    for plan, error in zip(plans, (0.01, 0.05, 0.2, 0.5), strict=True):
        assert plan is not None
        assert plan.error <= error * (1 + 1e-6)
    assert found.plan(-1.0) is None


def test_everything_that_gains_by_it_is_quantized_and_the_weakest_branch_goes_first(model: ir.Model) -> None:
    found = planner(model, prune=False)
    plans = (found.plan(error) for error in np.geomspace(1e-5, 1, 60))
    plan = next(plan for plan in plans if plan is not None and plan.branches)
    assert [name for name, _ in plan.branches] == [joins(model)[1]]
    assert isinstance(plan.passes(jointly=False)[0], PruneDepth)
    whole = found.plan(10.0)
    assert whole is not None
    gone = {
        name for branch in found.branches if (branch.join, branch.operand) in whole.branches for name in branch.nodes
    }
    assert all(whole.forms[layer.name] == "INT8" for layer in layers(model) if layer.name not in gone)
    assert gone.issuperset(whole.floats)


def test_the_groups_of_a_branch_that_goes_are_left_alone(model: ir.Model) -> None:
    plan = usual(model).plan(0.3)
    assert plan is not None
    gone = {name for name, _ in plan.branches}
    assert gone
    narrow = dict(plan.widths)
    inside = {joins(model)[place]: list(layers(model))[1 + 2 * place].name for place in range(3)}
    assert not any(inside[name] in narrow for name in gone)


def test_what_goes_with_a_branch_has_neither_width_nor_precision_nor_error_of_its_own(model: ir.Model) -> None:
    found = planner(model)
    plan = found.plan(np.inf)
    assert plan is not None
    assert plan.branches
    gone = {found._units.of(name) for branch in found.branches for name in branch.nodes} - plan.forms.keys()
    assert gone
    program = found._program()
    flipped = list(plan.found)
    for unit in gone:
        place = program.units[unit]
        flipped[place] = (flipped[place] + 1) % len(program.options[unit])
    for place, row in enumerate(found._rows, len(found.branches)):
        if row.touched <= gone:
            flipped[place] = (flipped[place] + 1) % len(row.settings)
    assert flipped != list(plan.found)
    other = found.again(replace(plan, found=tuple(flipped)))
    assert other.same(plan)
    assert other.error == pytest.approx(plan.error)
    assert other.sources == pytest.approx(plan.sources)
    assert not any(near.same(plan) for near in found.near(plan))


@pytest.mark.parametrize(
    ("shares", "kept"),
    [
        ((1.0, 0.93, 0.86, 0.79), (0, 0, 1, 0)),
        ((1.0, 0.91, 0.82, 0.73), (0, 1, 1, 1)),
        ((1.0, 0.9, 1.1, 0.88), (0, 1, 0, 0)),
        ((1.0, 1.0, 0.5, 0.45), (0, 0, 1, 0)),
    ],
)
def test_a_width_is_worth_a_thought_if_it_saves_enough_beside_the_last_one_that_was(
    shares: tuple[float, ...], kept: tuple[int, ...]
) -> None:
    assert appraisal._saving(np.array(shares)).tolist() == [bool(own) for own in kept]


@pytest.mark.parametrize(
    ("errors", "shares"),
    [((0.0, 0.0), (1.0, 1.0)), ((0.0, 0.02), (0.0, 1.0)), ((1e-15, 0.02), (0.0, 1.0)), ((0.01, 0.02), (0.5, 1.0))],
)
def test_what_an_option_loses_is_what_was_measured_where_its_own_figure_says_nothing(
    model: ir.Model, errors: tuple[float, ...], shares: tuple[float, ...]
) -> None:
    known = offered(model, prune=False, prune_depth=False)
    options = [Option(second(model), amount, error, 0, 0.5) for amount, error in zip((0.01, 0.02), errors, strict=True)]
    found = known._row(Offer(second(model)), options).errors
    assert found[0] == 0
    assert found[2] > 0
    assert found[1:] / found[2] == pytest.approx(shares, abs=1e-9)


def test_conversions_cost_what_most_drafts_say_and_the_usual_at_least(model: ir.Model) -> None:
    found = planner(model)
    kept = {second(model)}
    for taken, least in ((0.0, planning._LAYOUT), (50.0, planning._LAYOUT), (51.0, 2 * planning._LAYOUT)):
        found.learn_crossings(kept, taken)
        assert found._layout >= least
    assert found._layout == pytest.approx(np.median(found._layouts))


def test_a_plan_can_be_carried_out(model: ir.Model) -> None:
    plan = usual(model).plan(0.2)
    assert plan is not None
    made = model
    for technique in plan.passes(jointly=False):
        outcome = technique(made, context())
        assert outcome.modified
        made = outcome.model
    assert sum(flops(_sized(made)).values()) < sum(flops(_sized(model)).values())
    widths = [
        kept for technique in plan.passes(jointly=False) if isinstance(technique, Prune) for _, kept in technique.parts
    ]
    assert all(kept % 4 == 0 for kept in widths)


def _sized(model: ir.Model) -> ir.Model:
    sized = model.clone()
    ir.passes.common.ShapeInferencePass()(sized)
    return sized


def test_what_is_not_allowed_is_not_planned(model: ir.Model) -> None:
    floats = planner(model, quantize=False, prune_depth=False).plan(0.3)
    assert floats is not None
    assert not floats.branches
    assert set(floats.forms.values()) == {FLOAT}
    names = "|".join(f"^{node.name}$" for node in model.graph)
    nothing = planner(model, quantize=False, exclude=node_pattern(names))
    assert not nothing.branches
    assert not nothing._rows


def test_narrow_layers_run_in_the_precision_that_is_best_for_their_width(
    model: ir.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Integers gain half at full width, and nothing more by narrower layers."""

    def wide_integers(made: Sequence[ir.Model], *_: Any, **__: Any) -> list[Profile]:
        integers = [any(node.op_type == "DequantizeLinear" for node in each.graph) for each in made]
        floats = made_up([model])[0].times
        own = zip(integers, made_up(made), strict=True)
        return [Profile({n: floats[n] / 1.5 for n in floats} if is_int else p.times, {}) for is_int, p in own]

    for module in (table, latency):
        monkeypatch.setattr(module, "profiles", wide_integers)
    found = planner(model, prune_depth=False)
    whole = found.plan(np.inf)
    assert whole is not None
    narrow = {unit for row in found._rows if row.part in dict(whole.widths) for unit in row.touched}
    assert narrow
    assert {whole.forms[unit] for unit in narrow} == {FLOAT}
    wide = planner(model, prune=False, prune_depth=False).plan(np.inf)
    assert wide is not None
    assert {wide.forms[unit] for unit in narrow} == {"INT8"}


def test_dear_conversions_keep_neighbours_in_one_precision(model: ir.Model) -> None:
    found = planner(model, prune=False, prune_depth=False)
    cheap = found.plan(np.inf)
    assert cheap is not None
    assert "INT8" in cheap.forms.values()
    found._crossing = Crossing((1, 10), (1e6, 1e6), (1e6, 1e6))
    dear = found.plan(np.inf)
    assert dear is not None
    assert len({dear.forms[layer.name] for layer in layers(model)}) == 1


def test_what_was_measured_rescales_what_is_predicted(model: ir.Model) -> None:
    found = planner(model)
    before = found.plan(0.1)
    assert before is not None
    found.learn(before, 2 * before.time)
    after = found.plan(0.1)
    assert after is not None
    assert after.time == pytest.approx(2 * before.time)
    assert after.same(before)
    assert after.error == before.error
    assert found.share(FLOAT) == pytest.approx(2.0)


def test_what_took_about_as_long_tells_most(model: ir.Model) -> None:
    """Of two plans the slow one took what was foretold, the fast one twice that."""
    found = planner(model)
    slow, fast = found.plan(0.01), found.plan(0.5)
    assert slow is not None
    assert fast is not None
    assert fast.time < 0.8 * slow.time
    found.learn(slow, slow.time)
    found.learn(fast, 2 * fast.time)
    scales = [found.again(plan).time / plan.time for plan in (slow, fast)]
    assert 1 < scales[0] < 2**0.5 < scales[1] < 2


def test_what_takes_its_time_whatever_is_done_is_foretold_to_weigh_more_in_what_is_faster(model: ir.Model) -> None:
    found = planner(model)
    *known, fastest = [plan for error in (1e-5, 2e-5, 5e-5, 2e-4) if (plan := found.plan(error)) is not None]
    assert [plan.time for plan in (*known, fastest)] == sorted({plan.time for plan in (*known, fastest)}, reverse=True)
    for plan in known:
        found.learn(plan, 0.05 + 0.9 * plan.time)
    taken = 0.05 + 0.9 * fastest.time
    mean = np.mean([0.05 / plan.time + 0.9 for plan in known]) * fastest.time
    assert abs(found.again(fastest).time - taken) < 0.4 * abs(mean - taken)


def test_a_sum_of_two_branches_loses_one_at_most() -> None:
    """The second sum of the small network has a convolution on both sides."""
    plan = planner(network(), prune=False).plan(10.0)
    assert plan is not None
    joined = [name for name, _ in plan.branches]
    assert len(joined) == len(set(joined)) == 2
    PruneDepth(parts=plan.branches, reconstruct=False)(network(), context())


@pytest.mark.parametrize("name", sliced(sorted(zoo.BUILDERS), 3))
def test_any_model_can_be_planned_or_says_why_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up times, real errors, few widths: what is planned can be made, and runs."""
    monkeypatch.setattr(appraisal, "_LEVELS", 2)
    monkeypatch.setattr(appraisal, "_PROBES", 1)
    given = Context(None, Target(threads=1), seed=1)
    model = zoo.BUILDERS[name]()
    if any(spec_of(value) is None for value in free_inputs(model)):
        return
    try:
        model = Simplify()(model, given).model
    except OnnxcompError:  # made of an operator that nobody knows
        return
    data = given.samples(model).at_most(4)
    given = replace(given, data=data)
    feeds = next(iter(data.batches(1))).feeds
    try:
        found = Planner(Appraisal(model, {"INT8": INT8}, data, given, feeds, prune=True, prune_depth=True), CROSSING)
    except OnnxcompError:
        return
    plan = found.plan(0.5)
    if plan is None:
        return
    made = model
    for technique in plan.passes(jointly=False):
        made = technique(made, given).model
    Session(made, given.target).run(feeds)


@dataclass(frozen=True)
class Offer(Pass):
    """Scales the weights of layers; a pass of others might do anything."""

    name: ClassVar[str] = "offer"
    summary: ClassVar[str] = "for tests"
    layer: str = ""
    parts: Parts = ()

    def apply(self, model: ir.Model, context: Context) -> Outcome:
        scales = dict(self.parts)
        for layer in layers(model):
            if layer.name in scales:
                layer.set_matrix(layer.matrix() * np.float32(1 - float(scales[layer.name])))
        return Outcome(model, tuple(Change(name, "scaled") for name in scales))

    def options(self, model: ir.Model, context: Context) -> Iterator[Option]:
        for part in (self.layer, "no such part"):
            for scale, taken in ((0.01, 0.5), (0.02, 0.25), (0.03, 0.6), (0.0, 0.99), (0.0, 1.5)):
                yield Option(part, scale, scale**2, 0, taken)


def second(model: ir.Model) -> str:
    """Name of the second layer."""
    return [layer.name for layer in layers(model)][1]


class Fails(Offer):
    name = "fails"

    def apply(self, model: ir.Model, context: Context) -> Outcome:
        raise ValueError("an odd layer")


class Mute(Offer):
    name = "mute"

    def options(self, model: ir.Model, context: Context) -> Iterator[Option]:
        raise KeyError("nothing")


class NoOption(Offer):
    name = "no-option"

    def options(self, model: ir.Model, context: Context) -> Iterator[Option]:
        yield (self.layer, 0.01, 0.0001, 0, 0.5)  # type: ignore[misc]


class NoOutcome(Offer):
    name = "no-outcome"

    def apply(self, model: ir.Model, context: Context) -> Outcome:
        return None  # type: ignore[return-value]


class NoDraft(Offer):
    name = "no-draft"

    def drafted(self) -> "NoDraft":
        raise ValueError("an odd draft")


class TakesOne(Offer):
    """One layer at a time, and of two it does not say that it cannot."""

    name = "takes-one"

    def options(self, model: ir.Model, context: Context) -> Iterator[Option]:
        for layer in list(layers(model))[1:3]:
            yield Option(layer.name, 0.01, 0.0001, 0, 0.5)

    def taking(self, options: Iterable[Option]) -> "TakesOne":
        (option,) = options
        return replace(self, parts=((option.part, option.setting),))


def offered(model: ir.Model, kind: type[Offer] = Offer, **settings: Any) -> Appraisal:
    given = context(64)
    assert given.data is not None
    feeds = next(iter(given.data.batches(1))).feeds
    others = [kind(second(model))]
    return Appraisal(model, {"INT8": INT8}, given.data, given, feeds, others=others, **settings)


def test_options_of_any_pass_are_choices_where_they_save_time(model: ir.Model) -> None:
    known = offered(model, prune=False, prune_depth=False)
    name = second(model)
    assert known.has_choices
    found = Planner(known, CROSSING)
    careful, daring = found.plan(1e-9), found.plan(1.0)
    assert careful is not None
    assert daring is not None
    assert not careful.others
    assert [getattr(technique, "parts", ()) for technique in daring.others] == [((name, 0.02),)]
    assert daring.time < careful.time
    made = daring.passes(jointly=False)[0](model, context(64)).model
    assert found._answers.error(made) == pytest.approx(daring.sources[planning.SOURCES.index("other passes")], rel=0.2)


def test_what_a_pass_offers_and_cannot_do_is_told(model: ir.Model) -> None:
    name = second(model)
    fails, mute = (offered(model, kind, prune=False, prune_depth=False) for kind in (Fails, Mute))
    assert fails.refused == [(f"fails on {name}", "pass 'fails' raised ValueError: an odd layer")]
    assert mute.refused == [("mute", "pass 'mute' raised KeyError: 'nothing'")]
    assert not fails.has_choices
    assert not mute.has_choices


@pytest.mark.parametrize(
    ("kind", "where", "fact"),
    [
        (NoOption, "", "gave something of type tuple, not Option"),
        (NoOutcome, " on {}", "gave something of type NoneType, not Outcome"),
        (NoDraft, " on {}", "raised ValueError: an odd draft"),
        (TakesOne, "", "raised ValueError: too many values to unpack (expected 1)"),
    ],
)
def test_one_that_breaks_the_contract_is_no_choice(model: ir.Model, kind: type[Offer], where: str, fact: str) -> None:
    known = offered(model, kind, prune=False, prune_depth=False)
    assert known.refused == [(kind.name + where.format(second(model)), f"pass '{kind.name}' {fact}")]
    assert not known.has_choices


def test_the_time_limit_stops_passes_of_others_too(model: ir.Model) -> None:
    class Slow(Offer):
        def apply(self, model: ir.Model, context: Context) -> Outcome:
            raise TimeIsUp

    with pytest.raises(TimeIsUp):
        Slow()(model, context())


def test_a_layer_is_narrower_or_otherwise_treated_not_both(model: ir.Model) -> None:
    found = Planner(offered(model, prune=True, prune_depth=True), CROSSING)
    plans = [plan for error in np.geomspace(1e-4, 1, 12) if (plan := found.plan(error)) is not None]
    assert any(plan.others for plan in plans)
    for plan in plans:
        groups = {name for name, _ in plan.widths}
        touched = {unit for row in found._rows if row.part in groups for unit in row.touched}
        assert not plan.others or second(model) not in touched


def test_branches_are_measured_by_other_processes_too(model: ir.Model) -> None:
    alone = planner(model, prune=False)
    with Processes(2, patience=0) as executor:
        given = replace(context(64), executor=executor)
        assert given.data is not None
        feeds = next(iter(given.data.batches(1))).feeds
        spread = Planner(Appraisal(model, {}, given.data, given, feeds, prune=False, prune_depth=True), CROSSING)
    assert len(alone.branches) == len(STRENGTHS)
    assert spread._branch_errors == alone._branch_errors


def slow_integers(models: Sequence[ir.Model], *_: Any, **__: Any) -> list[Profile]:
    """Three times as slow as floats."""
    return [
        Profile({name: 9 * time if model is not models[0] else time for name, time in found.times.items()}, {})
        for model, found in zip(models, made_up(models), strict=True)
    ]


@pytest.mark.parametrize("prune", [True, False], ids=["widths", "options of others"])
def test_what_one_search_kept_serves_another_with_more_precisions(
    model: ir.Model, tmp_path: Path, prune: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if prune:  # so that the same precision is timed with fewer channels
        monkeypatch.setattr(table, "profiles", slow_integers)
    given = replace(context(64), store=Store(tmp_path))
    assert given.data is not None
    feeds = next(iter(given.data.batches(1))).feeds
    others = [] if prune else [Offer(second(model))]
    for quantizers in ({}, {"INT8": INT8}):
        found = Planner(
            Appraisal(model, quantizers, given.data, given, feeds, prune=prune, prune_depth=False, others=others),
            CROSSING,
        )
        plan = found.plan(np.inf)
        assert plan is not None
        assert plan.decides
        assert len(found.forms) == 1 + len(quantizers)


def test_a_limit_on_size_is_kept_at_the_price_of_time(model: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "profiles", slow_integers)
    found = planner(model, prune=False, prune_depth=False)
    free = found.plan(0.2)
    assert free is not None
    assert set(free.forms.values()) == {FLOAT}
    assert free.bytes == models.file_bytes(model)
    limited = found.plan(0.2, size=0.8 * free.bytes)
    assert limited is not None
    assert limited.bytes <= 0.8 * free.bytes
    assert limited.time > free.time
    made = replace(INT8, keep=limited.floats)(model, context(64)).model
    unread = 3 * 9280  # bytes of weights that nothing reads, which go with the first pass
    nodes = models.file_bytes(model) - models.tensor_bytes(model)  # in the float model, without those that convert
    assert models.tensor_bytes(made) == pytest.approx(limited.bytes - nodes - unread, rel=0.01)
    assert found.plan(0.2, size=100) is None


def storing(model: ir.Model, *, prune: bool = False, quantize: bool = True) -> Planner:
    given = context(64)
    assert given.data is not None
    feeds = next(iter(given.data.batches(1))).feeds
    quantizers = {"INT8": INT8} if quantize else {}
    known = Appraisal(
        model, quantizers, given.data, given, feeds, prune=prune, prune_depth=False, storing=[Share(), Binarize()],
        sized=True,
    )  # fmt: skip
    return Planner(known, CROSSING)


@pytest.mark.parametrize("quantize", [True, False])
def test_a_limit_on_size_has_weights_stored_in_few_bytes(model: ir.Model, quantize: bool) -> None:
    model = Simplify()(model, context(64)).model
    found = storing(model, quantize=quantize)
    free = found.plan(0.3)
    assert free is not None
    assert free.stored == ()
    limited = found.plan(0.3, size=0.7 * free.bytes)
    assert limited is not None
    assert limited.decides
    assert limited.bytes <= 0.7 * free.bytes
    assert limited.time == pytest.approx(free.time)
    made = INT8(model, context(64)).model if quantize else model
    before, names = models.tensor_bytes(made), found.stored_in(made)
    for technique, parts in limited.stored:
        options = [Option(names[unit], own, 0.0, 0) for unit, own in parts]
        made = technique.drafted().taken(options)(made, context(64)).model
    said = planning._SAYING * sum(len(parts) for _, parts in limited.stored)  # by nodes, which are no tensors
    assert before - models.tensor_bytes(made) == pytest.approx(free.bytes - limited.bytes + said, rel=0.1)
    assert limited.error / 10 < found.compare(limited, made) < 10 * limited.error  # one bit was told from four
    treated = [unit for _, parts in limited.stored for unit, _ in parts]
    assert len(treated) == len(set(treated))
    tighter = found.plan(0.3, size=0.95 * limited.bytes)
    assert tighter is None or tighter.error > limited.error or tighter.time >= limited.time


def test_few_channels_and_few_bytes_of_each_go_together(model: ir.Model) -> None:
    found = storing(Simplify()(model, context(64)).model, prune=True, quantize=False)
    free = found.plan(np.inf)
    assert free is not None
    limit = 0.2 * found._rest() + 0.8 * free.bytes  # four fifths of what the weights take
    plan = found.plan(np.inf, size=limit)
    assert plan is not None
    assert plan.bytes < limit < free.bytes
    narrow = {found.origin(maker) for part, _ in plan.widths for maker in found._makers[part]}
    assert narrow & {unit for _, parts in plan.stored for unit, _ in parts}
    made = found._model
    assert all("too much or for too few bytes" in skip.reason for skip in found.left_as_stored(plan, made))
    count = sum(len(parts) for _, parts in plan.stored)
    left = found.left_as_stored(plan, made)
    assert len(left) + count == sum(bool(row.stored) for row in found._rows)
    assert {skip.node for skip in left} < {layer.name for layer in layers(made)}
    found.learn_size(plan, plan.bytes + 100 * count)
    assert found.again(plan).bytes == plan.bytes + 100 * count
    assert found.again(free).bytes == free.bytes  # it stores nothing
    found.learn_size(plan, plan.bytes)
    assert found.again(plan).bytes == plan.bytes


@pytest.mark.parametrize("values", [0.0, 0.5])
def test_weights_that_lose_nothing_by_it_can_be_stored(model: ir.Model, values: float) -> None:
    """All of one layer are alike."""
    model = Simplify()(model, context(64)).model
    layer = list(layers(model))[3]
    layer.set_matrix(np.full_like(layer.matrix(), values))
    found = storing(model, quantize=False)
    (row,) = [row for row in found._rows if row.part == found.origin(layer.name)]
    assert row.errors.tolist() == [0.0] * len(row.errors)


def test_neighbours_of_a_plan_decide_otherwise_once(model: ir.Model) -> None:
    found = usual(model)
    plan = found.plan(0.1)
    assert plan is not None
    near = found.near(plan)
    assert near
    assert [other.time for other in near] == sorted(other.time for other in near)
    for other in near:
        assert sum(a != b for a, b in zip(plan.found, other.found, strict=True)) == 1
        assert len({join for join, _ in other.branches}) == len(other.branches)


def test_errors_and_conversions_are_rescaled_by_what_was_measured(model: ir.Model) -> None:
    found = usual(model)
    plan = found.plan(0.2)
    assert plan is not None
    made = model
    for technique in plan.passes(jointly=False):
        made = technique(made, context()).model
    measured = found.compare(plan, made)
    again = found.plan(0.2)
    assert again is not None
    weights = found._weights
    assert float(weights @ np.array(plan.sources)) == pytest.approx(measured, rel=0.5)
    kept = {layer.name for layer in list(layers(model))[1::2]}
    found.learn_crossings(kept, 50.0)
    whole = found.plan(np.inf)
    assert whole is not None
    assert len({whole.forms[layer.name] for layer in layers(model) if layer.name in whole.forms}) == 1


@pytest.mark.parametrize("factor", [0.01, 1.0, 100.0])
def test_errors_far_from_what_was_foretold_are_learnt_either_way(
    model: ir.Model, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    found = planner(model)
    plan = found.plan(0.02)
    assert plan is not None
    monkeypatch.setattr(found._answers, "error", lambda _: factor * plan.error)
    found.compare(plan, model)
    # The usual weights of three sources hold back 0.3 / 1.3 of the logarithm: 100 ** (0.3 / 1.3) is 2.9.
    assert abs(np.log(found.again(plan).error / (factor * plan.error))) < np.log(3)
    monkeypatch.setattr(found._answers, "error", lambda _: 0.0)
    found.compare(plan, model)
    assert found.again(plan).error > 0


def test_conversions_of_what_the_best_leaves_in_float_count_once(model: ir.Model) -> None:
    given = context(64)
    assert given.data is not None
    feeds = next(iter(given.data.batches(1))).feeds
    kept = replace(INT8, keep=(second(model),))
    known = Appraisal(model, {"INT8": kept}, given.data, given, feeds, prune=False, prune_depth=True)
    found = Planner(known, CROSSING)
    parts = sum(known.forms["INT8"].times.values()) / known.total
    assert found.share("INT8") > parts  # into float and back
    for layout in (2.0, 8.0):
        found._layouts = [layout]
        found.learn_form("INT8", 0.4)
        assert found.share("INT8") == pytest.approx(0.4)


def test_what_fitting_makes_up_for_is_told_before_integers_hide_it(model: ir.Model) -> None:
    found = planner(model)
    plan = found.plan(0.2)
    assert plan is not None
    made = model
    for technique in plan.passes(jointly=False):
        made = technique(made, context(64)).model
    plan = replace(plan, sources=(*plan.sources[:-1], 1.0))  # as if integers lost as much as there is
    lost = found.compare(plan, made, quantized=False)
    assert found._weights @ np.array([*plan.sources[:-1], 0.0]) == pytest.approx(lost, rel=0.2)
    assert found._weights[-1] == pytest.approx(1.0)
