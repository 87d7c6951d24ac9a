"""Every model of the ONNX backend tests goes through every pass and through `optimize`.

Each model comes twice: as it is, and with all inputs but the first made constant, since it is constants that passes
act on. Models that ONNX Runtime refuses must be refused with a ModelError. For all others and each pass:

1. Nothing is raised.
2. The model given stays as it was, and each skip has its reason.
3. The result loads and runs, and its outputs have the same names, types and shapes.
4. Where the pass is exact or changed nothing, outputs equal those of ONNX Runtime on the original.

Outputs cannot be compared where the original itself fails on its data or answers differently each time. The counts are
printed: `pytest -s`.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcomp import model as models
from onnxcomp import optimizer
from onnxcomp.candidates import Effort
from onnxcomp.core import Context
from onnxcomp.data import open_dataset
from onnxcomp.equivalence import unequal
from onnxcomp.errors import InputError, ModelError, OnnxcompError
from onnxcomp.registry import passes
from onnxcomp.runtime import Protocol, Session, Target
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


def test_every_fortieth_model_through_every_pass(suite: list[BackendCase]) -> None:
    small = [case for case in suite[::40] if case.kind != "light"]  # one DenseNet takes longer than all others
    tally = examined(_both(small), _through_passes)
    assert tally.counts["loaded"] > 3 * tally.counts["refused"] > 0
    assert tally.counts["simplify: changed"] > 0
    assert tally.counts["quantize-static: changed"] > 0


def test_every_two_hundredth_model_through_optimize(suite: list[BackendCase], monkeypatch: pytest.MonkeyPatch) -> None:
    moment = Protocol(block=1, rounds=1, warmup=1)
    monkeypatch.setattr(Effort, "protocol", moment)
    monkeypatch.setattr(optimizer, "_PROOF", moment)
    tally = examined(suite[::200], _through_optimize)
    assert tally.counts["optimize: nothing lossy"] > 5


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_model_through_every_pass(suite: list[BackendCase]) -> None:
    assert examined(_both(suite), _through_passes).counts["loaded"] > 2500


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_model_through_optimize(suite: list[BackendCase]) -> None:
    assert examined(suite, _through_optimize).counts["loaded"] > 1500


def examined(suite: Iterable[BackendCase], check: Callable[["Example", Tally], None]) -> Tally:
    """All cases that load, checked; counts are printed, and each problem makes the test fail."""
    tally = Tally()
    for case in suite:
        refusal, reason = _refusal(case), ort_loads(case.model)
        tally.counts["loaded" if refusal is None else "refused"] += 1
        if (refusal is None) != (reason is None):
            tally.problems.append(f"{case.name}: onnxcomp says {refusal or 'fine'}, ONNX Runtime {reason or 'fine'}")
        if refusal is None:
            example = Example.of(case)
            tally.counts["comparable"] += example.expected is not None
            tally.counts["with data"] += example.data is not None
            check(example, tally)
    sys.stdout.write(f"\n{tally}\n")
    assert not tally.problems, "\n".join(tally.problems)
    return tally


@dataclass(frozen=True)
class Example:
    """A model that loads, what it answers (None where that is no answer to compare with), and its inputs as data."""

    case: BackendCase
    model: ir.Model
    content: bytes
    expected: dict[str, Any] | None
    data: Dataset | None

    @classmethod
    def of(cls, case: BackendCase) -> "Example":
        model = models.load(case.model)
        return cls(case, model, models.to_bytes(model), _answers(model, case), _dataset(model, case))

    def problem(self, result: ir.Model, *, exact: bool) -> str | None:
        """What is wrong with a result, or None."""
        if models.to_bytes(self.model) != self.content:
            return "changed the model it was given"
        content = self.content if result is self.model else models.to_bytes(result)
        if content == self.content:
            return None  # the original runs, and answers the same again
        try:
            session = Session(models.load(content), TARGET)
            outputs = session.run(self.case.inputs) if self.expected is not None else {}
        except OnnxcompError as error:
            return f"gave a model that does not work: {error}"
        for name, value in (self.expected or {}).items():
            if exact and (why := unequal(value, outputs[name])) is not None:
                return f"changed output '{name}', which {why}"
            if _form(value) != _form(outputs[name]):
                return f"changed the form of output '{name}'"
        return None


def _through_passes(example: Example, tally: Tally) -> None:
    for name, kind in passes().items():
        technique = kind()
        context = Context(None if technique.exact else example.data, TARGET)  # exact on inputs that it has not seen too
        try:
            outcome = technique(example.model, context)
        except Exception as error:  # noqa: BLE001  (any error is what this test looks for)
            tally.problems.append(f"{example.case.name}: {name} raised {type(error).__name__}: {error}")
            continue
        tally.counts[f"{name}: {'changed' if outcome.modified else 'unchanged'}"] += 1
        problem = example.problem(outcome.model, exact=technique.exact or not outcome.modified)
        if not all(skip.node and skip.reason for skip in outcome.skips):
            problem = "skipped without a reason"
        if problem is not None:
            tally.problems.append(f"{example.case.name}: {name} {problem}")


def _through_optimize(example: Example, tally: Tally) -> None:
    calib = None if example.data is None else [example.case.inputs]
    try:
        result = optimizer.optimize(example.model, calib=calib, target=TARGET, effort=Effort.QUICK)
    except OnnxcompError as error:
        tally.counts[f"optimize: declined, {type(error).__name__}"] += 1
        # Only what cannot be measured may be declined: it does not run, no numbers come out, or no data fit it: then
        # inputs are made up, which the model need not take.
        numbers = example.expected is not None and all(map(_is_number, example.expected.values()))
        measurable = example.data is not None and numbers
        if measurable or not (error.cause or error.remedy):
            tally.problems.append(f"{example.case.name}: optimize declined: {error}")
        return
    except Exception as error:  # noqa: BLE001
        tally.problems.append(f"{example.case.name}: optimize raised {type(error).__name__}: {error}")
        return
    exact = [repr(kind()).partition("(")[0] for kind in passes().values() if kind.exact]
    lossy = any(step.changes and step.recipe.partition("(")[0] not in exact for step in result.report.steps)
    tally.counts["optimize: quantized" if lossy else "optimize: nothing lossy"] += 1
    if (problem := example.problem(result.model, exact=not lossy)) is not None:
        tally.problems.append(f"{example.case.name}: optimize {problem}")


def _is_number(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.size > 0


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
