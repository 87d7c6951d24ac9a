"""The command `verify`: whether a model is fit to take the place of another, as the gate of a deployment pipeline."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar
from xml.etree import ElementTree

import onnx_ir as ir

from onnxcomp import metrics
from onnxcomp import model as models
from onnxcomp.budget import Budget, Check
from onnxcomp.core import no_progress
from onnxcomp.data import ImageOptions, open_dataset
from onnxcomp.errors import ModelError, OptionError
from onnxcomp.footprint import memory_of
from onnxcomp.judges import gate_of, must_run, one_run
from onnxcomp.layers import refuse_broken_weights
from onnxcomp.measure import Progress, circumstances, file_size, paced, side_by_side, usual_metric
from onnxcomp.model import ModelSource, TensorSpec
from onnxcomp.padding import noted, notes_on
from onnxcomp.report import Document, Figures, source_name
from onnxcomp.runtime import Protocol, Session, Target
from onnxcomp.wording import check_in_words

JUNIT = '<?xml version="1.0" encoding="UTF-8"?>\n<testsuites'
"""How `junit` begins."""

_PROTOCOL = Protocol(rounds=15)


@dataclass(frozen=True)
class Verification(Document):
    """Whether a model keeps its limits beside the one whose place it is to take.

    Attributes:
        source, against: the two models.
        passed: whether all limits hold.
        checks: one for each limit.
        original, result: the two models' figures, `against` being the original.
        metric: name of what was scored.
        data: the samples, and why this metric.
        protocol: how latency was measured.
        environment: as in a report.
        notes: what the user should know.
    """

    kind: ClassVar[str] = "verification"

    source: str
    against: str
    passed: bool
    checks: tuple[Check, ...]
    original: Figures
    result: Figures
    metric: str
    data: str
    protocol: str
    environment: Mapping[str, str | int]
    notes: tuple[str, ...] = ()


def verify(
    source: ModelSource,
    *,
    against: ModelSource,
    evaluation: Any,
    budget: Budget,
    metric: str | Callable[[Any], float] | None = None,
    target: Target | str = Target(),
    batch: int = 1,
    images: ImageOptions | None = None,
    progress: Progress = no_progress,
) -> Verification:
    """Measure a model beside the one whose place it is to take, and judge it by limits.

    Args:
        source: the model: a path, bytes, `onnx.ModelProto` or `onnx_ir.Model`.
        against: the one that it was made from.
        evaluation: data, as `data.open_dataset` takes them; all of them are scored.
        budget: limits, at least one.
        metric: a metric's name, `FILE.py:FUNCTION` or the function itself; by default accuracy where there are labels,
            else relative error.
        target: execution provider and threads, or the provider's name.
        batch: samples per run that latency is measured at.
        images: how image files become inputs.
        progress: called with (done, total, what).

    Raises:
        InputError: a model, the data or an option cannot be used, or the models' inputs or outputs differ.
    """
    if budget == Budget():
        raise OptionError(
            "no limit was given",
            remedy="one or more of --max-drop, --min-speedup, --max-latency, --max-size, --max-memory",
        )
    target = Target.of(target)
    about = circumstances(target, batch)
    wanted = metrics.parse_metric(metric) if metric else None
    original, made = (models.load(item) for item in (against, source))
    refuse_broken_weights(original)
    names = source_name(against), source_name(source)
    for what, given in (("takes", models.free_inputs), ("gives", lambda model: list(model.graph.outputs))):
        _refuse_unlike(what, names, given(original), given(made))
    sessions = Session(original, target), Session(made, target)
    data = noted(open_dataset(evaluation, models.input_specs(original), images), lambda: sessions[0])
    run = one_run(data, batch)
    must_run(sessions[0], run.feeds, invented=False)
    reason, notes = "as asked", []
    if wanted is None:
        wanted, reason = usual_metric(sessions[0], data)
    gate = gate_of(wanted)
    if gate is not wanted:
        notes.append(f"The limit is on the {gate.name}: {wanted.name} of the original is infinite.")
    notes += notes_on(data, learns=False) if gate.needs == "reference" else []
    rows = run.valid + run.padding
    if rows != batch:
        notes.append(f"Runs have {rows} rows: the model or its data fix that.")
    progress(0, 0, "measuring side by side")
    sizes = file_size(against, original), file_size(source, made)
    protocol = paced(_PROTOCOL, sessions[0], run.feeds)
    before, after = side_by_side(sessions, sizes, run.feeds, protocol, gate, data)
    if budget.limits_memory:
        memory = [memory_of(model, target, run.feeds) for model in (original, made)]
        before, after = replace(before, memory=memory[0]), replace(after, memory=memory[1])
    checks = tuple(budget.checks(before, after))
    return Verification(
        source=names[1],
        against=names[0],
        passed=all(check.passed for check in checks),
        checks=checks,
        original=before,
        result=after,
        metric=gate.name,
        data=f"{reason}; {data.samples} samples of {data.origin}",
        protocol=str(protocol),
        environment=about | {"batch": rows},
        notes=tuple(notes),
    )


def _refuse_unlike(what: str, names: tuple[str, str], first: list[ir.Value], second: list[ir.Value]) -> None:
    """Refuse models that do not take or give the same.

    Raises:
        ModelError: names, types or fixed axes differ.
    """
    ours, others = ({value.name or "": models.spec_of(value) for value in values} for values in (first, second))
    if ours.keys() == others.keys() and all(_alike(spec, others[name]) for name, spec in ours.items()):
        return
    raise ModelError(
        f"'{names[1]}' {what} {_words(others)}, '{names[0]}' {what} {_words(ours)}",
        "they are not versions of one model",
        "give the model that it was made from to --against",
    )


def _alike(first: TensorSpec | None, second: TensorSpec | None) -> bool:
    if first is None or second is None:
        return first is second
    if first.dtype != second.dtype:
        return False
    if first.shape is None or second.shape is None:
        return True
    fixed = (
        a == b for a, b in zip(first.shape, second.shape, strict=False) if isinstance(a, int) and isinstance(b, int)
    )
    return len(first.shape) == len(second.shape) and all(fixed)


def _words(specs: Mapping[str, TensorSpec | None]) -> str:
    def said(spec: TensorSpec | None) -> str:
        if spec is None:
            return "no tensor"
        shape = "" if spec.shape is None else "[" + ", ".join("?" if d is None else str(d) for d in spec.shape) + "]"
        return f"{spec.dtype.name}{shape}"

    return ", ".join(f"'{name}' {said(spec)}" for name, spec in specs.items()) or "nothing"


# --- for other tools ------------------------------------------------------------------------------------------------


def junit(verification: Verification) -> str:
    """JUnit XML with one test case for each limit, as build servers read it."""
    checks = verification.checks
    failures = str(sum(not check.passed for check in checks))
    counts = {"tests": str(len(checks)), "failures": failures, "errors": "0"}
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": "onnxcomp verify", **counts})
    properties = ElementTree.SubElement(suite, "properties")
    about = {"source": verification.source, "against": verification.against, "data": verification.data}
    for name, value in {**about, "protocol": verification.protocol, **verification.environment}.items():
        ElementTree.SubElement(properties, "property", {"name": name, "value": _xml(str(value))})
    for check in checks:
        case = ElementTree.SubElement(suite, "testcase", {"classname": "onnxcomp.verify", "name": check.limit})
        words = _xml(check_in_words(check, verification.metric))
        if check.passed:
            ElementTree.SubElement(case, "system-out").text = words
        else:
            ElementTree.SubElement(case, "failure", {"message": words, "type": check.limit}).text = words
    ElementTree.indent(root)
    return JUNIT.removesuffix("<testsuites") + ElementTree.tostring(root, encoding="unicode") + "\n"


def _xml(text: str) -> str:
    """The text with what XML cannot hold escaped."""
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", lambda match: ascii(match[0])[1:-1], text)
