"""Every model of the ONNX backend tests goes through every pass and through `optimize`.

Each model comes twice: as it is, and with all inputs but the first made constant, since it is constants that passes
act on. Models that ONNX Runtime refuses must be refused with a ModelError. For all others and each pass:

1. Nothing is raised.
2. The model given stays as it was, and each skip has its reason.
3. The result loads and runs, and its outputs have the same names, types and shapes.
4. Where the pass is exact or changed nothing, outputs equal those of ONNX Runtime on the original.

Outputs cannot be compared where the original itself fails on its data, answers differently each time, or has inputs of
types that numpy lacks. The counts are printed: `pytest -s`.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcomp import model as models
from onnxcomp.core import Context, Outcome
from onnxcomp.data import open_dataset
from onnxcomp.equivalence import unequal
from onnxcomp.errors import InputError, ModelError, OnnxcompError
from onnxcomp.registry import passes
from onnxcomp.runtime import Session, Target
from onnxcomp.samples import Dataset
from tests.backend_suite import BackendCase, cases, ort_loads

TARGET = Target(threads=1)


@dataclass
class Tally:
    """What became of the models so far."""

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        width = max(map(len, self.counts), default=0)
        return "\n".join(f"{what:{width}}  {count:5}" for what, count in sorted(self.counts.items()))


@pytest.fixture(scope="module")
def suite() -> list[BackendCase]:
    return list(cases())


def test_every_ninth_model_through_every_pass(suite: list[BackendCase]) -> None:
    tally = passed(_both(suite[::9]))
    sys.stdout.write(f"\n{tally}\n")
    assert not tally.problems, "\n".join(tally.problems)
    assert tally.counts["loaded"] > 3 * tally.counts["refused"] > 0
    assert tally.counts["simplify: changed"] > 0
    assert tally.counts["quantize-static: changed"] > 0


@pytest.mark.slow
def test_every_model_through_every_pass(suite: list[BackendCase]) -> None:
    tally = passed(_both(suite))
    sys.stdout.write(f"\n{tally}\n")
    assert not tally.problems, "\n".join(tally.problems)
    assert tally.counts["loaded"] > 1500


def passed(suite: Iterable[BackendCase]) -> Tally:
    """All cases through all passes."""
    tally = Tally()
    for case in suite:
        refusal, reason = _refusal(case), ort_loads(case.model)
        tally.counts["loaded" if refusal is None else "refused"] += 1
        if (refusal is None) != (reason is None):
            tally.problems.append(f"{case.name}: onnxcomp says {refusal or 'fine'}, ONNX Runtime {reason or 'fine'}")
        if refusal is None:
            _examine(case, tally)
    return tally


def _examine(case: BackendCase, tally: Tally) -> None:
    model = models.load(case.model)
    expected = _answers(model, case)
    tally.counts["comparable"] += expected is not None
    data = _dataset(model, case)
    tally.counts["with data"] += data is not None
    before = models.to_bytes(model)
    for name, kind in passes().items():
        technique = kind()
        context = Context(None if technique.exact else data, TARGET)
        try:
            outcome = technique(model, context)
        except Exception as error:  # noqa: BLE001  (any error is what this test looks for)
            tally.problems.append(f"{case.name}: {name} raised {type(error).__name__}: {error}")
            continue
        tally.counts[f"{name}: {'changed' if outcome.modified else 'unchanged'}"] += 1
        exact = technique.exact or not outcome.modified
        problem = _problem(outcome, case, expected, exact=exact)
        if models.to_bytes(model) != before:
            problem = "changed the model it was given"
        if problem is not None:
            tally.problems.append(f"{case.name}: {name} {problem}")


def _refusal(case: BackendCase) -> ModelError | None:
    """Why the model cannot be loaded, or None."""
    try:
        Session(models.load(case.model), TARGET)
    except ModelError as error:
        return error
    return None


def _answers(model: ir.Model, case: BackendCase) -> dict[str, Any] | None:
    """What the original answers, or None where that is no answer to compare with."""
    session = Session(model, TARGET)
    try:
        first, second = session.run(case.inputs), session.run(case.inputs)
    except OnnxcompError:
        return None
    random = any(unequal(first[name], second[name]) for name in first)
    return None if random else first


def _dataset(model: ir.Model, case: BackendCase) -> Dataset | None:
    """The case's own inputs as calibration data, where they are finite tensors."""
    try:
        return open_dataset([case.inputs], models.input_specs(model))
    except InputError:
        return None


def _problem(outcome: Outcome, case: BackendCase, expected: dict[str, Any] | None, *, exact: bool) -> str | None:
    """What is wrong with an outcome, or None."""
    if not all(skip.node and skip.reason for skip in outcome.skips):
        return "skipped without a reason"
    try:
        session = Session(models.load(models.to_bytes(outcome.model)), TARGET)
        outputs = session.run(case.inputs) if expected is not None else {}
    except OnnxcompError as error:
        return f"gave a model that does not work: {error}"
    if expected is None:
        return None
    if exact:
        return next((f"{n} {why}" for n in expected if (why := unequal(expected[n], outputs[n])) is not None), None)
    forms = {name: _form(value) for name, value in expected.items()}
    return None if forms == {name: _form(outputs[name]) for name in expected} else "changed the form of outputs"


def _form(value: Any) -> Any:
    return (value.shape, value.dtype) if isinstance(value, np.ndarray) else type(value)


def _both(suite: Iterable[BackendCase]) -> Iterator[BackendCase]:
    """Each case, and its frozen form where it has one."""
    for case in suite:
        yield case
        if len(case.inputs) > 1 and case.feedable and all(case.inputs):
            yield frozen(case)


def frozen(case: BackendCase) -> BackendCase:
    """The case with all inputs but the first as constants."""
    first, *others = case.inputs
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    kept = [info for info in model.graph.input if info.name not in others]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(case.inputs[name], name) for name in others)
    return replace(case, name=f"{case.name}, frozen", model=model, inputs={first: case.inputs[first]})
