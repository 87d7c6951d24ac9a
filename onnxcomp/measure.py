"""The commands `bench` and `eval`: models timed and scored side by side."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxcomp import metrics, runtime
from onnxcomp import model as models
from onnxcomp.core import Context, no_progress
from onnxcomp.data import ImageOptions, open_dataset
from onnxcomp.errors import DataError, ModelError, OptionError
from onnxcomp.executors import mapped
from onnxcomp.footprint import Footprint, footprint
from onnxcomp.layers import refuse_broken_weights
from onnxcomp.model import ModelSource
from onnxcomp.padding import noted
from onnxcomp.report import Benchmark, Evaluation, Figures, Quality, Speed, Spread, environment, source_name
from onnxcomp.runtime import Feeds, Protocol, Session, Target, Timing
from onnxcomp.samples import Batch, Dataset, Shard, shards
from onnxcomp.scoring import LABEL, FloatArray
from onnxcomp.synthetic import synthetic

Progress = Callable[[int, int, str], None]

SCORING_ROWS = 16
"""Rows per run when scoring; some ONNX Runtime kernels differ by batch, so neither 1 nor hundreds."""

_SHARD = 256
"""Samples that are scored at a time by an executor: seconds for a slow model, and rows are few bytes to send."""


def bench(
    sources: ModelSource | Sequence[ModelSource],
    *,
    calib: Any = None,
    target: Target | str = Target(),
    batch: int = 1,
    protocol: Protocol = Protocol(),
    processes: int = 3,
    seed: int = 0,
    images: ImageOptions | None = None,
    progress: Progress = no_progress,
) -> Benchmark:
    """Time models side by side on the same inputs.

    Args:
        sources: the models; ratios are to the first.
        calib: data whose first batch is the input; synthetic inputs without.
        target: execution provider and threads.
        batch: rows per run, where the model leaves that open.
        protocol: how often, in which order.
        processes: fresh processes that load each model, for load time and memory.
        seed: of synthetic inputs.
        images: how image files become inputs.
        progress: called with (done, total, what).

    Raises:
        InputError: a model, the data or an option cannot be used, or the models take different inputs.
    """
    target, sources = Target.of(target), _several(sources)
    about = circumstances(target, batch)
    loaded = _load_alike(sources)
    data = inputs_for(_strictest(loaded), calib, batch, seed, images)
    first = next(iter(data.batches(batch)))
    rows = first.valid + first.padding
    notes = [] if rows == batch else [f"Runs have {rows} rows: the model or its data fix that."]
    with _files(sources, loaded) as paths:
        sessions = [Session(path, target) for path in paths]
        timings = runtime.compare(sessions, first.feeds, protocol)
        del sessions
        prints: list[list[Footprint]] = [[] for _ in paths]
        for done in range(processes * len(paths)):
            progress(done, processes * len(paths), "loading in fresh processes")
            place = done % len(paths)
            prints[place].append(footprint(paths[place], target, first.feeds))
    speeds = tuple(
        Speed(
            source_name(source),
            file_size(source, model),
            timing,
            rows / timing.median,
            _spread([item.load_seconds for item in taken]),
            _memory(taken),
        )
        for source, model, timing, taken in zip(sources, loaded, timings, prints, strict=True)
    )
    return Benchmark(speeds, about | {"batch": rows}, str(protocol), data.origin, processes, tuple(notes))


def inputs_for(model: ir.Model, data: Any, batch: int, seed: int, images: ImageOptions | None) -> Dataset:
    """Data to run on: those given, or synthetic ones."""
    specs = models.input_specs(model)
    if data is not None:
        return open_dataset(data, specs, images)
    return synthetic(specs, batch, seed, models.vocabularies(model))


def _several(sources: ModelSource | Sequence[ModelSource]) -> Sequence[ModelSource]:
    """One model is a list of one."""
    alone = isinstance(sources, str | os.PathLike | bytes | onnx.ModelProto | ir.Model)
    return [sources] if alone else sources  # type: ignore[list-item, return-value]


def _strictest(loaded: Sequence[ir.Model]) -> ir.Model:
    """The model that fixes most axes of its inputs: what it takes, the others take."""
    return max(
        loaded, key=lambda model: sum(isinstance(a, int) for s in models.input_specs(model) for a in s.shape or ())
    )


def _load_alike(sources: Sequence[ModelSource]) -> list[ir.Model]:
    """The models, which must take the same inputs."""
    if not sources:
        raise OptionError("no model was given", remedy="give one or more")
    loaded = [models.load(source) for source in sources]
    for model in loaded:
        refuse_broken_weights(model)
    forms = [{spec.name: spec.dtype.name for spec in models.input_specs(model)} for model in loaded]
    for source, form in zip(sources, forms, strict=True):
        if form != forms[0]:
            raise ModelError(
                f"'{source_name(source)}' takes {_words(form)}, '{source_name(sources[0])}' takes {_words(forms[0])}",
                "they are not versions of one model",
                "compare models with the same inputs",
            )
    return loaded


def _words(form: dict[str, str]) -> str:
    return ", ".join(f"'{name}' {dtype}" for name, dtype in form.items()) or "no inputs"


@contextmanager
def _files(sources: Sequence[ModelSource], loaded: Sequence[ir.Model]) -> Iterator[list[Path]]:
    """A path for each model: its own, or a temporary file's."""
    with TemporaryDirectory(prefix="onnxcomp-") as folder:
        yield [
            Path(source)
            if isinstance(source, str | os.PathLike)
            else models.save(model, Path(folder) / f"{place}.onnx")[0]
            for place, (source, model) in enumerate(zip(sources, loaded, strict=True))
        ]


def _spread(values: Sequence[float]) -> Spread:
    return Spread(float(np.median(values)), float(min(values)), float(max(values)))


def _memory(taken: Sequence[Footprint]) -> Spread | None:
    known = [item.memory for item in taken if item.memory is not None]
    return _spread(known) if known else None


def evaluate(
    sources: ModelSource | Sequence[ModelSource],
    evaluation: Any,
    *,
    metric: str | Callable[[Any], float] | None = None,
    target: Target | str = Target(),
    batch: int = SCORING_ROWS,
    images: ImageOptions | None = None,
    progress: Progress = no_progress,
) -> Evaluation:
    """Score models on the same samples, and compare their outputs with the first model's.

    Args:
        sources: the models.
        evaluation: the samples, as `data.open_dataset` takes them.
        metric: a metric's name or `FILE.py:FUNCTION`; by default accuracy where there are labels, else relative error.
        target: execution provider and threads.
        batch: rows per run, where the model leaves that open.
        images: how image files become inputs.
        progress: called with (done, total, what).

    Raises:
        InputError: a model, the data or an option cannot be used, or the models take different inputs.
    """
    target, sources = Target.of(target), _several(sources)
    about = circumstances(target, batch)
    loaded = _load_alike(sources)
    chosen = metrics.parse_metric(metric) if metric else None
    given = open_dataset(evaluation, models.input_specs(_strictest(loaded)), images)
    with _files(sources, loaded) as paths:
        reference = Session(paths[0], target)
        data, reason = noted(given, lambda: reference), "as asked"
        if chosen is None:
            chosen, reason = usual_metric(reference, data)
        fidelity = _fidelity(reference, data)
        qualities, baseline = [], None
        for place, path in enumerate(paths):
            session = Session(path, target)
            counted = _Counted(data, progress, f"scoring {place + 1} of {len(paths)}")
            measured = [chosen] if baseline is None else [chosen, *fidelity]
            score, *faith = metrics.evaluate_all(measured, session.run, counted, reference.run, batch)
            baseline = baseline or score
            drop = None if score is baseline else metrics.compare(baseline, score)
            error, agreement = (*(item.value for item in faith), None, None)[:2]
            qualities.append(
                Quality(
                    source_name(sources[place]),
                    score.value,
                    score.interval,
                    None if drop is None else drop.value,
                    None if drop is None else drop.interval,
                    error,
                    agreement,
                )
            )
    return Evaluation(tuple(qualities), about, chosen.name, f"{reason}; {data.samples} samples of {data.origin}")


def _fidelity(reference: Session, data: Dataset) -> list[metrics.Metric]:
    """Relative error, and agreement where an output looks like class scores."""
    error, agreement = metrics.METRICS["relative-error"], metrics.METRICS["agreement"]
    batch = next(iter(data.batches(SCORING_ROWS)))
    outputs = batch.trim(reference.run(batch.feeds))
    try:
        agreement.rows(outputs, outputs)
    except DataError:
        return [error]
    return [error, agreement]


@dataclass(frozen=True)
class _Counted:
    """A dataset that reports how far it was read."""

    data: Dataset
    progress: Progress
    what: str

    def batches(self, size: int) -> Iterator[Batch]:
        done = 0
        for batch in self.data.batches(size):
            yield batch
            done += batch.valid
            self.progress(done, self.data.samples, self.what)


def circumstances(target: Target, batch: int) -> dict[str, str | int]:
    """What figures depend on beside the models, refused where it cannot be.

    Raises:
        OptionError: a batch below 1.
        ProviderError: the target is not available.
    """
    if batch < 1:
        raise OptionError(f"a batch of {batch} is not possible", remedy="--batch 1 or more")
    return environment(target, batch)


def file_size(source: ModelSource, model: ir.Model) -> int:
    """Bytes on disk with external data, or as they would be."""
    if isinstance(source, str | os.PathLike):
        stored = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
        files = {Path(tensor.path) for tensor in stored if isinstance(tensor, ir.ExternalTensor)}
        return sum(file.stat().st_size for file in {Path(source), *files})
    return len(source) if isinstance(source, bytes) else models.file_bytes(model)


_LONGEST_BLOCK = 0.08
"""Seconds. A model whose runs take as long evicts its own caches, however many follow each other."""


def paced(protocol: Protocol, session: Session, feeds: Feeds) -> Protocol:
    """The protocol with blocks that a slow model can get through, and up to twice as many; runs it once.

    Machines were seen that ran a third faster for a second, every few seconds: short blocks in turn see the same of it.
    They end by time, so that what is made much faster has more runs: a first one, which finds the caches full of the
    original's weights, would be most of it.
    """
    start = time.perf_counter()
    session.run(feeds)
    runs = max(1, int(_LONGEST_BLOCK / max(time.perf_counter() - start, 1e-9)))
    if runs >= protocol.block:
        return protocol
    rounds = round(protocol.rounds * min(2.0, protocol.block / runs))
    return replace(protocol, longest=_LONGEST_BLOCK, rounds=rounds, warmup=min(runs, protocol.warmup))


def side_by_side(
    sessions: Sequence[Session],
    sizes: Sequence[int],
    feeds: Feeds,
    protocol: Protocol,
    metric: metrics.Metric,
    data: Dataset,
    timings: Sequence[Timing] | None = None,
    context: Context = Context(),
    baseline: metrics.Score | None = None,
) -> list[Figures]:
    """Latency and score of a model and of what was made of it.

    Args:
        sessions: the original first.
        sizes: their bytes.
        feeds: one run, for latency.
        protocol: how latency is measured.
        metric: what is scored.
        data: on which samples.
        timings: of all, where they were taken elsewhere.
        context: whose executor scores.
        baseline: the original's score, where that is known.
    """
    timings = timings or runtime.compare(sessions, feeds, protocol)
    baseline = baseline or evaluated(metric, sessions[0], data, sessions[0], context)
    others = [evaluated(metric, session, data, sessions[0], context) for session in sessions[1:]]
    drops = [metrics.Drop(0.0, None), *(metrics.compare(baseline, score) for score in others)]
    return [
        Figures(
            size,
            timing.median,
            (timing.low, timing.high),
            timing.speedup,
            score.value,
            score.interval,
            drop.value,
            speedup_interval=timing.quartiles,
            drop_interval=drop.interval,
        )
        for size, timing, score, drop in zip(sizes, timings, (baseline, *others), drops, strict=True)
    ]


def evaluated(
    metric: metrics.Metric, session: Session, data: Dataset, reference: Session, context: Context
) -> metrics.Score:
    """Measure a metric as `metrics.evaluate` does, on shards of the data where the context has an executor.

    Raises:
        DataError, OptionError: as for `metrics.evaluate_all`.
        OnnxcompError: the model fails on the data.
    """
    if context.executor is None or not isinstance(metric, metrics.StreamedMetric):
        return metrics.evaluate(metric, session.run, data, reference.run, SCORING_ROWS)
    return metrics.scored(metric, rows_of([metric], session, data, reference, context)[0])


def rows_of(
    wanted: Sequence[metrics.StreamedMetric], session: Session, data: Dataset, reference: Session, context: Context
) -> list[FloatArray]:
    """What each sample gives for several metrics, as `metrics.rows_of` does, on shards where `evaluated` uses them."""
    travels = all(each.travels for each in (session, reference))
    if context.executor is None or not (travels and len(data)):
        return metrics.rows_of(wanted, session.run, data, reference.run, SCORING_ROWS)
    sample = sum(array.nbytes for array in data.read(0).feeds.values())
    room = context.memory // (sample * _SHARD + 1)
    compares = any(metric.needs == "reference" for metric in wanted)
    work = partial(_rows, wanted, session, reference if compares else None)
    parts = mapped(work, shards(data.batches(SCORING_ROWS), _SHARD), context.executor, room)
    return [np.concatenate(rows) for rows in zip(*parts, strict=True)]


def _rows(
    wanted: Sequence[metrics.StreamedMetric], session: Session, reference: Session | None, shard: Shard
) -> list[FloatArray]:
    predict = None if reference is None else reference.run
    return metrics.rows_of(wanted, session.run, shard, predict, SCORING_ROWS)


def usual_metric(session: Session, data: Dataset) -> tuple[metrics.Metric, str]:
    """The metric to use where the user named none, and why, from the first samples."""
    batch = next(iter(data.batches(SCORING_ROWS)))
    metric, reason = metrics.default_metric(batch.targets, batch.trim(session.run(batch.feeds)))
    if LABEL in data.constants:
        reason = f"'{LABEL}' is not as long as the samples are many"
    return metric, reason
