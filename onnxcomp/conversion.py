"""A model made into another by a fixed list of passes, or by a recipe, with proof."""

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypedDict, Unpack

import onnx_ir as ir

from onnxcomp import files, metrics
from onnxcomp import model as models
from onnxcomp.budget import Budget, within
from onnxcomp.core import Context, Pass, name_nodes, no_progress, node_pattern
from onnxcomp.data import ImageOptions, open_dataset
from onnxcomp.errors import BudgetError, ModelError, OptionError, did_you_mean
from onnxcomp.executors import opening
from onnxcomp.graph import prepared
from onnxcomp.layers import refuse_broken_weights
from onnxcomp.measure import circumstances, file_size, paced, side_by_side, usual_metric
from onnxcomp.model import ModelSource
from onnxcomp.padding import noted, notes_on
from onnxcomp.recipe import Recipe
from onnxcomp.record import Origin, Record, stamped
from onnxcomp.report import Figures, Report, Result, Step, source_name
from onnxcomp.runtime import Protocol, Session, Target
from onnxcomp.samples import Dataset
from onnxcomp.synthetic import synthetic

Progress = Callable[[int, int, str], None]

_SYNTHETIC = 32

_JUDGED = 32
"""Samples of the calibration data that the loss is measured on where there are no others: it is an indication."""

_PROTOCOL = Protocol(seconds=0.4)
"""Timing that stays a small part of the work."""


_OPSET = 13
"""What passes convert to, and so name nodes of."""
_GROWTH = 0.003
"""Share of a file that the record may add to it, although that then is larger than the input."""


class Settings(TypedDict, total=False):
    """What every conversion takes that is no part of a recipe, as `convert` documents it."""

    output: str | os.PathLike[str] | None
    calib: Any
    evaluation: Any
    metric: str | Callable[[Any], float] | None
    max_drop: float | None
    target: Target | str
    batch: int
    memory: int
    images: ImageOptions | None
    overwrite: bool
    best_effort: bool
    dry_run: bool
    executor: Executor | str | None
    progress: Progress


class Common(Settings, total=False):
    """What every conversion takes, as `convert` documents it."""

    exclude: str | None
    seed: int


def apply(source: ModelSource, *, recipe: Recipe | ModelSource, **settings: Unpack[Settings]) -> Result:
    """Do again what a recipe says, as on a model that was trained again.

    Args:
        source: a path, bytes, `onnx.ModelProto` or `onnx_ir.Model`; never modified.
        recipe: a `Recipe`, the path of its YAML file, or a model that onnxcomp made.
        **settings: as for `convert`.

    Raises:
        InputError: the recipe, the model, the data or an option cannot be used, or the recipe names nodes that the
            model does not have.
        BudgetError: it loses more than `max_drop`; its `result` is what came out.
    """
    origin = Origin.of(recipe)
    found = origin.recipe
    return convert(source, found.passes, exclude=found.exclude, seed=found.seed, origin=origin, **settings)


@opening
def convert(
    source: ModelSource,
    passes: Sequence[Pass],
    *,
    output: str | os.PathLike[str] | None = None,
    calib: Any = None,
    evaluation: Any = None,
    metric: str | Callable[[Any], float] | None = None,
    max_drop: float | None = None,
    exclude: str | None = None,
    target: Target | str = Target(),
    batch: int = 1,
    seed: int = 0,
    memory: int = 2 * 10**9,
    images: ImageOptions | None = None,
    overwrite: bool = False,
    best_effort: bool = False,
    dry_run: bool = False,
    executor: Executor | str | None = None,
    progress: Progress = no_progress,
    origin: Origin | None = None,
) -> Result:
    """Apply passes in this order, and measure what that cost and brought.

    Args:
        source: a path, bytes, `onnx.ModelProto` or `onnx_ir.Model`; never modified.
        passes: what is done.
        output: where to write the result; None to keep it in memory.
        calib: data to learn from, as `data.open_dataset` takes them.
        evaluation: data to measure the loss on; without them it is the relative output error on `calib`, or on
            synthetic inputs.
        metric: a metric's name, `FILE.py:FUNCTION` or the function itself; by default accuracy where `evaluation` has
            labels, else relative error.
        max_drop: largest loss to accept, in the metric's unit; None accepts any.
        exclude: regular expression of node names to leave alone.
        target: execution provider and threads, or the provider's name.
        batch: samples per run that latency is measured at.
        seed: of everything random.
        memory: cap in bytes on what calibration and fitting keep.
        images: how image files become inputs.
        overwrite: replace an existing output.
        best_effort: write the result even where it loses more than `max_drop`.
        dry_run: measure, but write nothing.
        executor: where calibration and scoring are done, as `executors.opened` takes it; this process by default. The
            result is the same.
        progress: called with (done, total, what).
        origin: the recipe that the passes were read from, see `apply`.

    Raises:
        InputError: the model, the data or an option cannot be used, or a pass names nodes that are not there, or needs
            data without which it would do nothing.
        BudgetError: it loses more than `max_drop`; its `result` is what came out.
    """
    target = Target.of(target)
    recipe = Recipe(tuple(passes), seed, exclude, origin.recipe.places if origin else {})
    recipe.to_yaml()  # refused here, before any work, where it cannot be embedded
    if calib is None:
        _refuse_without_data(recipe)
    read = (calib, evaluation, origin.source if origin else None)
    work = _Conversion(source, output, target, batch, overwrite, dry_run, read)
    specs = models.input_specs(work.model) if calib is not None or evaluation is not None else ()
    original = cache(lambda: Session(work.model, target))
    learn, proof = (
        None if given is None else noted(open_dataset(given, specs, images), original) for given in (calib, evaluation)
    )
    wanted = metrics.parse_metric(metric) if metric else None
    assert not isinstance(executor, str), "opened by `opening`"
    context = Context(learn, target, batch, seed, memory, node_pattern(exclude), progress, executor=executor)
    if origin is not None:
        _refuse_idle(recipe, work.model)
    before = (origin.record if origin else None) or Record()
    return work.run(recipe, before, context, proof, wanted, max_drop, best_effort)


def _node_names(model: ir.Model) -> set[str]:
    """Names of the nodes as passes see them, which convert a model of an old operator set first."""
    clone = model.clone()
    name_nodes(clone)
    names = {node.name or "" for node in models.all_nodes(clone)}
    converted = prepared(clone, _OPSET) if models.opset(clone) < _OPSET else clone
    if isinstance(converted, ir.Model):
        name_nodes(converted)
        names |= {node.name or "" for node in models.all_nodes(converted)}
    return names


def _refuse_without_data(recipe: Recipe) -> None:
    """Refuse passes that would do nothing, for want of data."""
    for number, technique in enumerate(recipe.passes):
        if technique.needs_data:
            error = OptionError(
                f"{technique.name} needs calibration data, and there are none",
                "data are not part of a recipe",
                "add --calib, or leave the pass out",
            )
            raise error.at(recipe.where(number))


def _refuse_unknown(recipe: Recipe, number: int, model: ir.Model) -> None:
    """Refuse a pass that names nodes which the model does not have; a group of channels is a node's name and number."""
    technique = recipe.passes[number]
    with technique.answering():
        named = {str(name): setting for name, setting in technique.named_nodes().items()}
    if not named:
        return
    names = _node_names(model)
    if missing := sorted(name for name in named if name not in names and name.rpartition("#")[0] not in names):
        places = [recipe.where(number, named[name], name) for name in missing]
        said = ", ".join(f"'{name}'" + f" ({place})" * bool(place) for name, place in zip(missing, places, strict=True))
        raise OptionError(
            f"{technique.name} names nodes that the model does not have: {said}",
            did_you_mean(missing[0], names) or "the recipe was made for another model",
            "give the names that `onnxcomp inspect` shows, or leave these out",
        )


def _settled(technique: Pass, context: Context) -> Pass:
    """A pass as it is for a target."""
    with technique.answering():
        settled = technique.settled(context)
        technique.must_be(Pass, settled)
        return settled


def _refuse_idle(recipe: Recipe, model: ir.Model) -> None:
    """Refuse a recipe that excludes nodes which the model does not have."""
    if (text := recipe.exclude) is None:
        return
    pattern, names = re.compile(text), _node_names(model)
    if not any(map(pattern.search, names)):
        error = OptionError(
            f"exclude '{text}' matches no node of the model",
            did_you_mean(text, names) or "the recipe was made for another model",
            "mend the pattern, or leave it out",
        )
        raise error.at(recipe.places.get(("exclude",), ""))


class _Conversion:
    """From a model to another by a fixed list of passes. What can be refused is refused before any work.

    Raises:
        ModelError: the model cannot be read, or the output not be written.
        OptionError: a batch below 1.
        ProviderError: the target is not available.
    """

    def __init__(
        self,
        source: ModelSource,
        output: str | os.PathLike[str] | None,
        target: Target,
        batch: int,
        overwrite: bool,
        dry_run: bool,
        data: Sequence[object],
    ) -> None:
        self._environment = circumstances(target, batch)
        self._output = None if output is None else Path(output)
        self._writes, self._overwrite = not dry_run, overwrite
        if self._output is not None and self._writes:
            files.check_target(self._output, overwrite=overwrite, inputs=(source, *data))
        self._source = source
        self.model = models.load(source)
        refuse_broken_weights(self.model)

    def run(
        self,
        recipe: Recipe,
        before: Record,
        context: Context,
        proof: Dataset | None,
        metric: metrics.Metric | None,
        max_drop: float | None,
        best_effort: bool,
    ) -> Result:
        """Apply the passes, measure, judge and write."""
        recipe = replace(recipe, passes=tuple(_settled(technique, context) for technique in recipe.passes))
        current, steps, remarks = self.model, [], []
        for number, technique in enumerate(recipe.passes):
            _refuse_unknown(recipe, number, current)
            try:
                outcome = technique(current, context)
            except OptionError as refusal:
                raise refusal.at(recipe.where(number, *refusal.setting)) from refusal
            remarks += [technique.remark] * (outcome.modified and bool(technique.remark))
            current = outcome.model
            steps.append(Step.of(technique, outcome))
        fingerprint = models.fingerprint(self._source)
        size = file_size(self._source, self.model)
        record = replace(before, steps=tuple(steps))
        made = stamped(current, self.model, recipe, record, fingerprint, size, _GROWTH)
        sizes = size, file_size(made, made)
        first, after = (Figures(size) for size in sizes)
        protocol, name, data, notes = str(_PROTOCOL), "", "nothing was measured", []
        try:
            loss = _Loss.of(self.model, context, proof, metric)
            first, after, protocol = loss.measure(self.model, made, sizes, context)
            name, data, notes = loss.metric.name, loss.description, loss.notes(after)
        except ModelError:
            if any(models.spec_of(value) is None for value in models.free_inputs(self.model)):
                notes = ["Neither latency nor outputs were measured: an input is no tensor."]
            else:
                raise
        unmet = []
        if max_drop is not None and after.drop is not None and not within(after.drop, max_drop):
            unmet.append(f"{name} drops by {after.drop:.4g}, more than {max_drop:.4g}")
        report = Report(
            source=source_name(self._source),
            output=None if self._output is None else str(self._output),
            fingerprint=fingerprint,
            environment=self._environment | {"seed": context.seed},
            protocol=protocol,
            metric=name,
            data=data,
            budget=Budget(max_drop=max_drop),
            met=not unmet,
            unmet=tuple(unmet),
            original=first,
            result=after,
            steps=tuple(steps),
            notes=(*notes, *notes_on(context.data, proof), *remarks),
            recipe=recipe.to_yaml(),
        )
        result = Result(made, report)
        if unmet and not best_effort:
            error = BudgetError(
                "the result loses too much: " + "; ".join(unmet),
                "the scheme is too coarse for some layers",
                "leave layers out with --exclude, let `onnxcomp optimize` choose them, or write it with --best-effort",
            )
            error.result = result
            raise error
        if self._output is not None and self._writes:
            models.save(made, self._output, overwrite=self._overwrite)
        return result


@dataclass(frozen=True)
class _Loss:
    """What a conversion is judged by, on which samples."""

    metric: metrics.Metric
    data: Dataset
    description: str
    invented: bool

    @classmethod
    def of(cls, model: ir.Model, context: Context, proof: Dataset | None, metric: metrics.Metric | None) -> "_Loss":
        data, where = proof, ""
        if data is None:
            data, where = context.data, ", the calibration data: what was learnt from them is flattered"
            if data is not None:
                data = data.at_most(_JUDGED, context.seed)
        invented = data is None
        if data is None:
            specs = models.input_specs(model)
            data, where = synthetic(specs, _SYNTHETIC, context.seed, models.vocabularies(model)), ""
        reason = "as asked"
        if metric is None and proof is None:
            metric, reason = metrics.METRICS["relative-error"], "no evaluation data"
        elif metric is None:
            metric, reason = usual_metric(Session(model, context.target), data)
        samples = f"{data.samples} samples of {data.origin}{where}"
        return cls(metric, data, f"{metric.name} ({reason}) on {samples}", invented)

    def measure(
        self, original: ir.Model, made: ir.Model, sizes: tuple[int, int], context: Context
    ) -> tuple[Figures, Figures, str]:
        """Both models' figures, and how latency was measured."""
        sessions = Session(original, context.target), Session(made, context.target)
        feeds = next(iter(self.data.batches(context.batch))).feeds
        protocol = paced(_PROTOCOL, sessions[0], feeds)
        before, after = side_by_side(sessions, sizes, feeds, protocol, self.metric, self.data, context=context)
        return before, after, str(protocol)

    def notes(self, result: Figures) -> list[str]:
        """What the figures do not say by themselves."""
        notes = []
        if self.invented:
            notes.append("The loss was measured on synthetic inputs and says little about real ones: give --eval.")
        if result.speedup is not None and result.speedup < 1:
            notes.append("The result is slower than the original on this target.")
        return notes
