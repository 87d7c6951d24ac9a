"""The main job: a model made faster, then smaller, within a budget, with its proof.

The search decides what is done. Here its result is scored once on data that nothing has seen, timed once more beside
the original, and written.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxcomp import family, files, metrics, page, registry, stopwatch
from onnxcomp import model as models
from onnxcomp.anatomy import layer_rows
from onnxcomp.budget import Budget
from onnxcomp.candidates import NOISE, Candidate, Effort, Workbench
from onnxcomp.core import Context, Pass, chosen, no_progress, node_pattern
from onnxcomp.data import ImageOptions
from onnxcomp.deadline import Deadline
from onnxcomp.errors import BudgetError, OnnxcompError, OptionError
from onnxcomp.executors import opening, text_of
from onnxcomp.family import Family, Member
from onnxcomp.footprint import memory_of
from onnxcomp.invocation import Invocation
from onnxcomp.judges import Judges
from onnxcomp.layers import refuse_broken_weights
from onnxcomp.measure import circumstances, evaluated, file_size, paced, side_by_side
from onnxcomp.passes.simplify import Simplify
from onnxcomp.plans import PLANNED, optional
from onnxcomp.record import Record, stamped
from onnxcomp.registry import GROUPS, resolve
from onnxcomp.report import Figures, Report, Result, Trial, source_name
from onnxcomp.runtime import Protocol, Session, Target
from onnxcomp.search import Search
from onnxcomp.store import Store
from onnxcomp.tradeoffs import giving_way, undominated
from onnxcomp.wording import check_in_words

__all__ = ["Effort", "Result", "optimize"]

_PROOF = Protocol(rounds=15)
"""Timing of the result."""

_FAMILY = 12
"""Results that are offered for a choice, at most."""

_ENOUGH = 256
"""Samples to learn from that pruning asks for, where nobody asked for pruning."""

_SAMPLES = 8
"""On which the error of each layer's output is measured."""


@opening
def optimize(
    source: models.ModelSource,
    *,
    output: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    calib: Any = None,
    evaluation: Any = None,
    metric: str | Callable[[Any], float] | None = None,
    budget: Budget = Budget(),
    passes: Sequence[str] | None = None,
    exclude: str | None = None,
    target: Target | str = Target(),
    batch: int = 1,
    effort: Effort | str = Effort.DEFAULT,
    seed: int = 0,
    memory: int = 2 * 10**9,
    images: ImageOptions | None = None,
    overwrite: bool = False,
    best_effort: bool = False,
    time_limit: float | None = None,
    cache: str | os.PathLike[str] | None = None,
    pareto: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
    keep_overridable: bool = False,
    executor: Executor | str | None = None,
    progress: Callable[[int, int, str], None] = no_progress,
) -> Result:
    """Make a model faster, then smaller, within a budget, and prove it.

    Args:
        source: a path, bytes, `onnx.ModelProto` or `onnx_ir.Model`; never modified.
        output: where to write the result; None to keep it in memory.
        report: where to write a page of HTML that shows it all; needs the extra `report`.
        calib: data that techniques may learn from, as `data.open_dataset` takes them.
        evaluation: data that results are judged on; without it a part of `calib`.
        metric: a metric's name, `FILE.py:FUNCTION` or the function itself; by default accuracy where there are labels,
            else relative error.
        budget: limits. Without `max_drop`: 0.5 points with labels, a relative output error of 0.2 without.
        passes: names of the passes to use, or groups; by default clean-up and quantization, and where the metric tells
            accuracy and there are enough samples, fewer branches and channels, under a limit on size also weights that
            are stored in few bytes; at `--effort extensive` also what other passes offer for parts of a model, such as
            low ranks.
        exclude: regular expression of node names to leave alone.
        target: execution provider and threads, or the provider's name.
        batch: samples per run that latency is measured at.
        effort: how long to search.
        seed: of the split of the data and everything random.
        memory: cap in bytes on what calibration keeps.
        images: how image files become inputs.
        overwrite: replace an existing output, page and family.
        best_effort: write the best found even where it breaks the budget.
        time_limit: seconds after which the search ends with the best so far.
        cache: folder of what was made and measured before, see `store`; None for none. The same call with the same
            cache goes on where another was cut short, and gives the same bytes.
        pareto: folder for every result that is worth a choice between accuracy, latency and size.
        dry_run: decide and measure, but write no model.
        keep_overridable: leave weights that are also graph inputs overridable.
        executor: where calibration and judging are done, as `executors.opened` takes it; this process by default. The
            result is the same. What is timed is timed here.
        progress: called with (done, total, what).

    Returns:
        The model and its report.

    Raises:
        InputError: the model, the data or an option cannot be used.
        BudgetError: no result within the budget; its `result` is the best effort.
    """
    deadline, target, effort = Deadline(time_limit), Target.of(target), chosen(Effort, effort)
    if output is not None and not dry_run:
        files.check_target(output, overwrite=overwrite, inputs=(source, calib, evaluation))
    if report is not None:
        page.require()
        files.check_target(report, overwrite=overwrite, inputs=(source, calib, evaluation), option="--report")
        if output is not None and Path(report).resolve() == Path(output).resolve():
            raise OptionError(
                f"the model and the page are both to be '{report}'", remedy="give another name to --report"
            )
    if pareto is not None:
        family.check_apart(pareto, (source, calib, evaluation, output, report))
        if not dry_run:
            family.check_folder(pareto, overwrite=overwrite)
    about = circumstances(target, batch)
    names = [*GROUPS] if passes is None else list(passes)
    if not names:
        raise OptionError("no pass was named", remedy="name one or more: `onnxcomp passes` lists them")
    allowed = resolve(names)
    pattern = node_pattern(exclude)
    model = models.load(source)
    refuse_broken_weights(model)
    original = Session(model, target)
    judges = Judges.of(model, original, calib, evaluation, metric, images, seed, effort.judged)
    store = None if cache is None else Store(cache)
    assert not isinstance(executor, str), "opened by `opening`"
    context = Context(judges.tune, target, batch, seed, memory, pattern, progress, store=store, executor=executor)
    if passes is None and judges.tell_accuracy and context.data is not None and context.data.samples >= _ENOUGH:
        allowed |= {*PLANNED, *(registry.storing() if budget.limits_size else ())}
        if effort is Effort.EXTENSIVE:
            allowed |= {technique.name for technique in optional(frozenset(registry.passes()))}
    prefix: tuple[Pass, ...] = (Simplify(keep_overridable),) if "simplify" in allowed else ()
    bench = Workbench(model, original, context, judges, effort, prefix, deadline)
    figures = bench.original_figures(file_size(source, model), memory=budget.limits_memory)
    search = Search(bench, budget, effort, allowed, figures, tuple(name for name in names if name not in GROUPS))
    about |= {"batch": bench.rows, "seed": seed}
    command = Invocation(
        source, output, calib, evaluation, metric, budget, passes, exclude, target, batch, effort, seed, memory, images,
        best_effort, keep_overridable, time_limit, text_of(executor),
    )  # fmt: skip
    fingerprint = models.fingerprint(source)
    proof = _Proof(bench, search, figures, source, fingerprint, budget, output, about, str(command))
    best = search.run()
    result = proof.of(best)
    fallbacks = search.fallbacks(best)
    while not search.holds(result.report.result.drop) and (fallback := next(fallbacks, None)) is not None:
        best, result = fallback, proof.of(fallback)
    if pareto is not None:
        others, made = proof.family(best)
        result = Result(result.model, result.report, others)
        if not dry_run:
            family.write(others, made, pareto)
    refused = not result.report.met and not best_effort
    if output is not None and not dry_run and not refused:
        if result.report.steps:
            models.save(result.model, output, overwrite=overwrite)
        else:
            models.save_as_given(source, result.model, output, overwrite=overwrite)
    if report is not None:
        result = replace(result, report=_with_layers(result, bench))
        files.write_text(page.html_of(result.report), report)
    if refused:
        error = BudgetError(
            "no result within the budget: " + "; ".join(result.report.unmet),
            "the limits conflict for this model and target",
            "relax a limit, try --effort extensive, or write the best found with --best-effort",
        )
        error.result = result
        raise error
    return result


def _with_layers(result: Result, bench: Workbench) -> Report:
    """The report with what became of each layer, or a note why that is not known."""
    report, context, samples = result.report, bench.context, bench.judges.run_of(_SAMPLES)
    context.progress(0, 0, "looking at each layer")
    try:
        rows = layer_rows(bench.model, result.model, report.steps, context.target, bench.batch.feeds, samples.feeds)
    except OnnxcompError as error:
        return replace(report, notes=(*report.notes, f"Layers not looked at. {error.fact}"))
    return replace(report, layers=rows)


@dataclass(frozen=True)
class _Proof:
    """Scores on the final data, times beside the original, and puts the recipe into the model."""

    bench: Workbench
    search: Search
    original: Figures
    source: models.ModelSource
    fingerprint: str
    budget: Budget
    output: str | os.PathLike[str] | None
    about: Mapping[str, str | int]
    command: str

    def of(self, best: Candidate) -> Result:
        """The candidate as a result."""
        bench, judges = self.bench, self.bench.judges
        best.verdict = "chosen"
        trials = tuple(trial.trial() for trial in bench.trials)
        model = self._stamped(best)
        before, after = self._measured([model])
        broken = self.search.unmet(before, after)
        known = trials if best.timing else (*trials, Trial(best.name, after, best.verdict))
        conflicts = giving_way(self.search.asked, before, known, judges.gate.name) if broken else ()
        report = Report(
            source=source_name(self.source),
            output=None if self.output is None else str(self.output),
            fingerprint=self.fingerprint,
            environment=self.about,
            protocol=str(self._protocol()),
            metric=judges.metric.name,
            data=judges.description,
            budget=self.budget,
            met=not broken,
            unmet=tuple(check_in_words(check, judges.gate.name) for check in broken),
            original=before,
            result=after,
            steps=self.search.explained(best),
            trials=trials,
            notes=(*judges.notes, *self._notes(best, before, after), *conflicts),
            command=self.command,
            recipe=self.bench.recipe(best.passes).to_yaml() if best.steps else "",
        )
        return Result(model, report)

    def family(self, best: Candidate) -> tuple[Family, list[ir.Model]]:
        """All that is worth a choice beside the result."""
        judges = self.bench.judges
        candidates = [best, *(trial for trial in self.search.others() if trial is not best)]
        kept = [candidates[place] for place in undominated([each.figures() for each in candidates])]
        kept = [best, *(each for each in kept if each is not best)][:_FAMILY]
        made = [self._stamped(each) for each in kept]
        original, *figures = self._measured(made)
        order = undominated(figures)
        members = tuple(
            Member(f"{number:02d}.onnx", kept[place].name, figures[place], kept[place] is best)
            for number, place in enumerate(order, 1)
        )
        family = Family(
            source_name(self.source), original, members, judges.metric.name, judges.description,
            str(self._protocol()), self.about,
        )  # fmt: skip
        return family, [made[place] for place in order]

    def _stamped(self, best: Candidate) -> ir.Model:
        if not best.steps:
            return best.model
        trials = tuple(trial.trial() for trial in self.bench.trials)
        record = Record(self.search.explained(best), trials, self.bench.judges.gate.name)
        recipe = self.bench.recipe(best.passes)
        limit = self.budget.size_limit(self.original.size)
        room = self.original.size if limit is None or best.size > limit else min(limit, self.original.size)
        return stamped(best.model, self.bench.model, recipe, record, self.fingerprint, room)

    def _protocol(self) -> Protocol:
        return paced(_PROOF, self.bench.original, self.bench.batch.feeds)

    def _measured(self, made: Sequence[ir.Model]) -> list[Figures]:
        """Figures of the original and of results, side by side; a result that is the original has the same."""
        original, *figures = self._side_by_side([model for model in made if model is not self.bench.model])
        others = iter(figures)
        return [original, *(original if model is self.bench.model else next(others) for model in made)]

    @cached_property
    def _baseline(self) -> metrics.Score:
        """Of the original on the final data: the same for every proof, and where those judged too, known."""
        bench, judges = self.bench, self.bench.judges
        if judges.final is judges.judge and judges.gate is judges.metric:
            return bench.baseline.score
        return evaluated(judges.metric, bench.original, judges.final, bench.original, bench.context)

    @cached_property
    def _gate_baseline(self) -> metrics.Score:
        """The same by what the budget is on, where that is not the metric."""
        bench = self.bench
        return bench.judges.score(bench.original, bench.original, bench.context, final=True)

    def _side_by_side(self, made: Sequence[ir.Model]) -> list[Figures]:
        bench, judges, feeds, target = self.bench, self.bench.judges, self.bench.batch.feeds, self.bench.context.target
        protocol = self._protocol()
        sessions = [bench.original, *(Session(model, target) for model in made)]
        sizes = [self.original.size, *map(models.file_bytes, made)]
        timings = stopwatch.time_apart([bench.model, *made], target, feeds, protocol)
        figures = side_by_side(
            sessions, sizes, feeds, protocol, judges.metric, judges.final, timings, bench.context, self._baseline
        )
        if judges.gate is not judges.metric:
            scores = [judges.score(session, bench.original, bench.context, final=True) for session in sessions[1:]]
            drops = [metrics.Drop(0.0, None), *(metrics.compare(self._gate_baseline, score) for score in scores)]
            figures = [
                replace(each, drop=drop.value, drop_interval=drop.interval)
                for each, drop in zip(figures, drops, strict=True)
            ]
        if self.original.memory is not None:
            memory = [self.original.memory, *(memory_of(model, target, feeds) for model in made)]
            figures = [replace(each, memory=used) for each, used in zip(figures, memory, strict=True)]
        return figures

    def _notes(self, best: Candidate, before: Figures, after: Figures) -> list[str]:
        notes, speedup, metric = [], after.speedup or 0.0, self.bench.judges.metric
        if self.bench.judges.gate is not metric:
            notes.append(
                f"The budget is on the {self.bench.judges.gate.name}: {metric.name} of the original is infinite."
            )
        if metric.needs == "reference" and before.score != metric.best:
            notes.append("The original answers differently each time, so that errors say little.")
        if self.bench.rows != self.bench.context.batch:
            notes.append(f"Runs have {self.bench.rows} rows: the model or its data fix that.")
        if self.bench.deadline.passed:
            notes.append("The time limit ended the search before all that might help was tried.")
        if not self.bench.judges.tell_accuracy and any(technique.name in PLANNED for technique in best.passes):
            notes.append(
                f"Channels or branches went by the {metric.name} of the outputs alone, which can hide what is lost "
                "where it matters: give labels, or --metric FILE.py:FUNCTION."
            )
        if not best.steps:
            notes.append("Nothing made it better: the result is the model as it was.")
        elif not best.passes and self.bench.deadline.passed:
            notes.append("There was no time for more than clean-up.")
        elif not best.passes and self.search.drafted:
            notes.append("No quantization was both faster and within the budget: the cleaned-up model is the result.")
        elif not best.passes and self.search.allows_integers:
            notes.append("Nothing here can be quantized for this target: the cleaned-up model is the result.")
        elif not best.passes and self.search.allows_more:
            notes.append("Nothing that was allowed gained anything: the cleaned-up model is the result.")
        if speedup < 1 - NOISE:
            notes.append("The result is slower than the original on this target.")
        notes += [technique.remark for technique in best.passes if technique.remark]
        return notes
