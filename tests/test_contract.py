"""What every pass must keep, on every model of the zoo. A new pass is covered as soon as its file is there."""

import dataclasses
import functools
import re
import sys
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import pytest

from models import zoo
from onnxcomp import model as models
from onnxcomp.core import Context, Outcome, Pass
from onnxcomp.data import open_dataset
from onnxcomp.equivalence import unequal
from onnxcomp.errors import ModelError
from onnxcomp.passes.sparsify import Choose
from onnxcomp.registry import passes
from onnxcomp.runtime import Session, Target
from onnxcomp.weights import Rounding
from tests.slices import sliced

PASSES = passes()
MODELS = [*zoo.BUILDERS, *zoo.PROTO_BUILDERS]
RUNNABLE = [name for name in MODELS if name not in zoo.UNRUNNABLE]
TARGET = Target(threads=1)

DEFAULT = "shufflenet"
"""The model that passes treat with all their defaults; elsewhere weights are rounded to the nearest, become zero
by their size and are not fitted again, for speed."""

LONG = ("binarize", "factorize", "prune", "share")
"""Passes that learn whatever their settings are, and take seconds: a third of the models each, but every model."""

every_pass = pytest.mark.parametrize("technique", PASSES)


class Case(NamedTuple):
    """A model, its bytes, data for it, and what it says of other data."""

    model: ir.Model
    content: bytes
    context: Context
    feeds: dict[str, Any]
    outputs: dict[str, Any]


@functools.cache
def case(name: str) -> Case:
    proto = zoo.build(name)
    model = models.load(proto)
    fixed = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    samples = [zoo.feeds(proto, fixed or 1, seed) for seed in range(1, 7)]
    context = Context(open_dataset(samples, models.input_specs(model)), TARGET, batch=fixed or 2)
    feeds = zoo.feeds(proto, fixed or 2)
    outputs = dict(Session(model, TARGET).run(feeds)) if name in RUNNABLE else {}
    return Case(model, models.to_bytes(model), context, feeds, outputs)


def made(technique: str, name: str) -> Pass:
    """The pass for a model."""
    kind = PASSES[technique]
    cheap: dict[str, object] = {
        "rounding": Rounding(gptq=False, sweeps=0, bias_correction=False),
        "choose": Choose.WANDA,
        "reconstruct": False,
    }
    fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind() if name == DEFAULT else kind(**{key: cheap[key] for key in cheap.keys() & fields})


@pytest.mark.parametrize(
    ("technique", "name"),
    [(technique, name) for technique in sorted(PASSES.keys() - set(LONG)) for name in RUNNABLE]
    + sliced([(technique, name) for name in RUNNABLE for technique in LONG], 3),
)
def test_a_result_keeps_the_contract(technique: str, name: str) -> None:
    before = case(name).content
    outcome = made(technique, name)(case(name).model, case(name).context)
    assert models.to_bytes(case(name).model) == before, "the model given was modified"
    assert outcome.modified == (models.to_bytes(outcome.model) != before), "changes are not reported truthfully"
    assert all(change.node and change.what for change in outcome.changes)
    assert all(skip.node and len(skip.reason.split()) > 1 for skip in outcome.skips)
    assert unread(outcome.model) <= unread(case(name).model), "constants that nothing reads are left"
    assert_same_signature(case(name).model, outcome)
    assert_answers_alike(case(name), outcome, exact=PASSES[technique].exact or not outcome.modified)


def unread(model: ir.Model) -> set[str | None]:
    """Names of constants that nothing reads."""
    constants = [value for graph in model.graphs() for value in graph.initializers.values()]
    return {value.name for value in constants if not value.uses() and not value.is_graph_output()}


def assert_same_signature(model: ir.Model, outcome: Outcome) -> None:
    assert models.input_specs(outcome.model) == models.input_specs(model)
    before, after = ([models.spec_of(value) for value in m.graph.outputs] for m in (model, outcome.model))
    assert after == before
    assert outcome.model.metadata_props == model.metadata_props
    if outcome.modified:
        names = [node.name for node in models.all_nodes(outcome.model)]
        assert all(names)
        assert len(set(names)) == len(names)


def assert_answers_alike(case: Case, outcome: Outcome, *, exact: bool) -> None:
    outputs = Session(outcome.model, TARGET).run(case.feeds)
    assert outputs.keys() == case.outputs.keys()
    for name, expected in case.outputs.items():
        actual = np.asarray(outputs[name])
        assert (actual.shape, actual.dtype) == (np.shape(expected), np.asarray(expected).dtype)
        if exact:
            assert unequal(expected, outputs[name]) is None
        elif actual.dtype.kind == "f":
            assert np.isfinite(actual).all()


@pytest.mark.parametrize("name", [DEFAULT, "bert", "control_flow", "weights_as_inputs"])
@every_pass
def test_the_same_again_gives_the_same_bytes(technique: str, name: str) -> None:
    model, context = case(name).model, case(name).context
    first = made(technique, name)(model, dataclasses.replace(context, cache={}))
    again = made(technique, name)(models.load(zoo.build(name)), dataclasses.replace(context, cache={}))
    assert models.to_bytes(again.model) == models.to_bytes(first.model)
    assert (again.changes, again.skips) == (first.changes, first.skips)


@pytest.mark.parametrize(
    "technique", [name for name, kind in PASSES.items() if kind().drafted() != kind() and name not in LONG]
)
@pytest.mark.parametrize("name", ["resnet", "bert", "control_flow"])
def test_a_draft_has_the_same_graph(technique: str, name: str) -> None:
    """Bytes of the constants are as many, and what runs them is the same."""
    full, draft = (
        each(case(name).model, dataclasses.replace(case(name).context, cache={}))
        for each in (made(technique, name), PASSES[technique]().drafted())
    )
    assert draft.changes == full.changes
    nodes = [[(node.name, node.op_type) for node in models.all_nodes(outcome.model)] for outcome in (full, draft)]
    assert nodes[0] == nodes[1]
    assert models.tensor_bytes(draft.model) == models.tensor_bytes(full.model)


@every_pass
@pytest.mark.parametrize("name", zoo.UNRUNNABLE)
def test_models_that_do_not_run_are_refused_or_treated(technique: str, name: str) -> None:
    before = case(name).content
    try:
        model = made(technique, name)(case(name).model, case(name).context).model
    except ModelError as error:
        assert "Mystery" in error.fact  # noqa: PT017  (either is right)
    else:
        assert any(node.op_type == "Mystery" for node in model.graph)
    assert models.to_bytes(case(name).model) == before


@pytest.mark.parametrize("technique", sorted(PASSES.keys() - {"simplify"}))  # clean-up keeps every function as it is
def test_excluded_nodes_stay_as_they_are(technique: str) -> None:
    context = dataclasses.replace(case("resnet").context, exclude=re.compile("."))
    outcome = made(technique, "resnet")(case("resnet").model, context)
    assert not outcome.modified


@every_pass
def test_without_data_a_pass_works_or_says_why_not(technique: str) -> None:
    outcome = made(technique, "conv1d")(case("conv1d").model, Context(target=TARGET))
    assert outcome.modified or outcome.skips
    Session(outcome.model, TARGET).run(case("conv1d").feeds)


@every_pass
def test_a_pass_is_described_and_its_repr_is_a_recipe(technique: str) -> None:
    kind = PASSES[technique]
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", technique)
    assert kind.summary
    assert not kind.summary.endswith(".")
    instance = kind()
    with pytest.raises(dataclasses.FrozenInstanceError):
        instance.anything = 1  # type: ignore[attr-defined]
    # Enums are the exception that Python makes: their repr is <Class.NAME: value>.
    text = re.sub(r"<(\w+\.\w+): [^>]*>", r"\1", repr(instance))
    again: Pass = eval(text, vars(sys.modules[kind.__module__]))
    assert again == instance
    assert hash(again) == hash(instance)
