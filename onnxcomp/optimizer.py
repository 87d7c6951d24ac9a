"""The main job: a model made faster, then smaller, within a budget, with its proof.

The search decides what is done. Here its result is scored once on data that nothing has seen, timed once more beside
the original, and written.
"""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from onnxcomp import metrics, runtime
from onnxcomp import model as models
from onnxcomp.budget import Budget
from onnxcomp.core import Context, no_progress
from onnxcomp.data import ImageOptions
from onnxcomp.errors import BudgetError, OptionError
from onnxcomp.judges import Judges
from onnxcomp.layers import refuse_broken_weights
from onnxcomp.registry import GROUPS, resolve
from onnxcomp.report import Figures, Report, Result, Trial, environment, source_name, stamped
from onnxcomp.runtime import Protocol, Session, Target
from onnxcomp.search import NOISE, Candidate, Effort, Search

__all__ = ["Effort", "Result", "optimize"]

_PROOF = Protocol(rounds=15)
"""Timing of the result."""


def optimize(
    source: models.ModelSource,
    *,
    output: str | os.PathLike[str] | None = None,
    calib: Any = None,
    evaluation: Any = None,
    metric: str | None = None,
    budget: Budget = Budget(),
    passes: Sequence[str] | None = None,
    exclude: str | None = None,
    target: Target = Target(),
    batch: int = 1,
    effort: Effort = Effort.DEFAULT,
    seed: int = 0,
    memory: int = 2 * 10**9,
    images: ImageOptions | None = None,
    overwrite: bool = False,
    best_effort: bool = False,
    dry_run: bool = False,
    keep_overridable: bool = False,
    progress: Callable[[int, int, str], None] = no_progress,
) -> Result:
    """Make a model faster, then smaller, within a budget, and prove it.

    Args:
        source: a path, bytes, `onnx.ModelProto` or `onnx_ir.Model`; never modified.
        output: where to write the result; None to keep it in memory.
        calib: data that techniques may learn from, as `data.open_dataset` takes them.
        evaluation: data that results are judged on; without it a part of `calib`.
        metric: a metric's name or `FILE.py:FUNCTION`; by default accuracy where there are labels, else relative error.
        budget: limits. Without `max_drop`: 0.5 points with labels, a relative output error of 0.2 without.
        passes: names of the passes to use, or groups; clean-up and quantization by default.
        exclude: regular expression of node names to leave alone.
        target: execution provider and threads.
        batch: samples per run that latency is measured at.
        effort: how long to search.
        seed: of the split of the data and everything random.
        memory: cap in bytes on what calibration keeps.
        images: how image files become inputs.
        overwrite: replace an existing output.
        best_effort: write the best found even where it breaks the budget.
        dry_run: decide and measure, but write nothing.
        keep_overridable: leave weights that are also graph inputs overridable.
        progress: called with (done, total, what).

    Returns:
        The model and its report.

    Raises:
        InputError: the model, the data or an option cannot be used.
        BudgetError: no result within the budget; its `result` is the best effort.
    """
    if output is not None and not dry_run:
        models.check_target(output, overwrite=overwrite, inputs=(source,))
    if batch < 1:
        raise OptionError(f"a batch of {batch} is not possible", remedy="--batch 1 or more")
    allowed = resolve(passes if passes is not None else ["simplify", *GROUPS])
    pattern = _pattern(exclude)
    target.providers  # noqa: B018 - refuse a provider that is not there before any work
    model = models.load(source)
    refuse_broken_weights(model)
    judges = Judges.of(model, models.input_specs(model), calib, evaluation, metric, images, seed, effort.judged)
    context = Context(judges.tune, target, batch, seed, memory, pattern, progress)
    search = Search(model, context, judges, budget, effort, allowed, keep_overridable)
    best = search.run()
    result = _prove(search, best, source, output)
    while best.passes and not search.holds(result.report.result.drop):
        best = search.more_careful(best)
        result = _prove(search, best, source, output)
    if not result.report.met and not best_effort:
        error = BudgetError(
            "no result within the budget: " + "; ".join(result.report.unmet),
            "the limits conflict for this model and target",
            "relax a limit, try --effort extensive, or write the best found with --best-effort",
        )
        error.result = result
        raise error
    if output is not None and not dry_run:
        models.save(result.model, output, overwrite=overwrite)
    return result


def _pattern(exclude: str | None) -> re.Pattern[str] | None:
    try:
        return None if exclude is None else re.compile(exclude)
    except re.error as error:
        raise OptionError(f"--exclude '{exclude}' is not a regular expression: {error}") from error


def _prove(
    search: Search, best: Candidate, source: models.ModelSource, output: str | os.PathLike[str] | None
) -> Result:
    """Score on the final data, time beside the original, and put the recipe into the model."""
    context, judges = search.context, search.judges
    best.verdict = "chosen"
    fingerprint = models.fingerprint(source)
    model = stamped(best.model, best.steps, fingerprint)
    session = Session(model, context.target)
    before, after = runtime.compare([search.original, session], search.feeds, _PROOF)
    baseline = judges.score(search.original, search.original, final=True)
    score = judges.score(session, search.original, final=True)
    original = Figures(
        search.original_bytes, before.median, (before.low, before.high), 1.0, baseline.value, baseline.interval, 0.0
    )
    result = Figures(
        models.file_bytes(model), after.median, (after.low, after.high), after.speedup,
        score.value, score.interval, metrics.compare(baseline, score).value,
    )  # fmt: skip
    notes = list(judges.notes)
    if not best.passes:
        notes.append("No quantization was both faster and within the budget: the cleaned-up model is the result.")
    if after.speedup < 1 - NOISE:
        notes.append("The result is slower than the original on this target.")
    unmet = search.unmet(result)
    report = Report(
        source=source_name(source),
        output=None if output is None else str(output),
        fingerprint=fingerprint,
        environment=environment(context.target, context.batch, context.seed),
        protocol=str(_PROOF),
        metric=judges.metric.name,
        data=judges.description,
        budget=search.budget,
        met=not unmet,
        unmet=tuple(unmet),
        original=original,
        result=result,
        steps=best.steps,
        trials=tuple(Trial(trial.name, trial.figures(), trial.verdict) for trial in search.trials),
        notes=tuple(notes),
    )
    return Result(model, report)
