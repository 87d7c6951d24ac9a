"""How good a model is, on labels or against the original, with an interval.

One mechanism serves every metric: each sample gives a short row of numbers, and a score is a function of the mean row.
So samples stream (only the rows stay), intervals come from resampling rows, and two models are compared row by row.
"""

import difflib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol, SupportsFloat, cast

import numpy as np
from numpy.typing import NDArray

from onnxcomp.errors import DataError, OptionError

Arrays = Mapping[str, NDArray[np.generic]]
Predict = Callable[[Arrays], Arrays]
FloatArray = NDArray[np.float64]
Interval = tuple[float, float]

LABEL = "label"
"""The target that accuracy is measured against."""

_RESAMPLES = 1000
_LARGEST_RESAMPLE = 1000


class Batch(Protocol):
    """Samples stacked along the leading axis: `valid` ones, then `padding`; targets are without padding."""

    @property
    def feeds(self) -> Arrays: ...  # noqa: D102
    @property
    def targets(self) -> Arrays: ...  # noqa: D102
    @property
    def valid(self) -> int: ...  # noqa: D102
    @property
    def padding(self) -> int: ...  # noqa: D102


class Dataset(Protocol):
    """Anything that gives its samples in batches."""

    def batches(self, size: int) -> Iterator[Batch]: ...  # noqa: D102


@dataclass(frozen=True)
class Metric:
    """A name, a direction and what is needed to measure it.

    Attributes:
        name: as the user writes it.
        needs: `labels`, the `reference` (the original model's outputs), or `none`.
        best: the value that nothing can beat; the original's own where `needs` is `reference`.
        worst: the value that a candidate gets whose outputs are NaN.
    """

    name: str
    needs: Literal["labels", "reference", "none"]
    best: float
    worst: float

    @property
    def higher_is_better(self) -> bool:
        """The direction."""
        return self.best > self.worst

    def drop(self, baseline: float, candidate: float) -> float:
        """How much worse the candidate is, in the metric's own unit; negative where it is better."""
        if baseline == candidate:  # infinities included
            return 0.0
        return baseline - candidate if self.higher_is_better else candidate - baseline


@dataclass(frozen=True)
class StreamedMetric(Metric):
    """A metric that is a function of the mean over samples.

    Attributes:
        rows: (candidate's outputs, labels or reference outputs) -> (samples, outputs, k) float64. Both hold valid
            samples only, by output name; labels come under `label`.
        combine: mean rows (..., k) -> values (...). Of several outputs the worst counts: a mean would let a large or
            easy one hide a broken one.
        output: compare only this output.
    """

    rows: Callable[[Arrays, Arrays], FloatArray] = field(repr=False)
    combine: Callable[[FloatArray], FloatArray] = field(repr=False)
    output: str | None = None

    def value(self, means: FloatArray) -> FloatArray:
        """The score of mean rows: (..., outputs, k) -> (...)."""
        values = self.combine(means)
        values = np.where(np.isnan(values), self.worst, values)
        return np.asarray(values.min(-1) if self.higher_is_better else values.max(-1))


@dataclass(frozen=True)
class UserMetric(Metric):
    """The user's own `evaluate(predict) -> float`, called whole. Higher is better unless the function says otherwise.

    A function says so with an attribute: `evaluate.higher_is_better = False`.

    Attributes:
        file: where it was defined.
        function: takes `predict(feeds: dict) -> dict`, returns one number.
    """

    file: Path
    function: Callable[[Predict], object]

    def __call__(self, predict: Predict) -> float:
        """Run it.

        Raises:
            OptionError: it raised, or did not return a number.
        """
        try:
            result = self.function(predict)
        except (Exception, SystemExit) as error:
            raise _user_error(f"metric '{self.name}' raised {type(error).__name__}", self.file, error) from error
        if not isinstance(result, SupportsFloat) or np.ndim(cast(float, result)):
            raise OptionError(
                f"metric '{self.name}' returned {type(result).__name__}, not a number",
                "the function has no return statement, or returns several values",
                "return one float",
            )
        value = float(result)
        if np.isnan(value):
            raise OptionError(
                f"metric '{self.name}' returned NaN",
                "the model's outputs are NaN or constant, or the metric divides zero by zero",
                "check the outputs with `onnxcomp eval --metric relative-error`",
            )
        return value


@dataclass(frozen=True)
class Score:
    """A measured metric.

    Attributes:
        metric: what was measured.
        value: the score over all samples.
        interval: 95% bootstrap interval; None for a user's metric and for fewer than two samples. It has no width
            where all samples score alike, as with no error at all.
        rows: (samples, outputs, k), what each sample contributed; None for a user's metric.
    """

    metric: Metric
    value: float
    interval: Interval | None
    rows: FloatArray | None = field(default=None, repr=False, compare=False)

    @property
    def samples(self) -> int | None:
        """How many samples were scored; None for a user's metric."""
        return None if self.rows is None else len(self.rows)


@dataclass(frozen=True)
class Drop:
    """How much worse one model is than another; negative where it is better.

    Attributes:
        value: in the metric's own unit.
        interval: 95% paired bootstrap interval, or None as for `Score`.
    """

    value: float
    interval: Interval | None


def evaluate(
    metric: Metric, predict: Predict, dataset: Dataset, reference: Predict | None = None, batch_size: int = 1
) -> Score:
    """Measure one metric; see `evaluate_all`."""
    return evaluate_all([metric], predict, dataset, reference, batch_size)[0]


def evaluate_all(
    metrics: Sequence[Metric],
    predict: Predict,
    dataset: Dataset,
    reference: Predict | None = None,
    batch_size: int = 1,
) -> list[Score]:
    """Measure several metrics in one pass over the data.

    Args:
        metrics: what to measure.
        predict: runs the candidate: feeds by input name -> outputs by name.
        dataset: the samples; not touched if there are only user's metrics, which bring their own.
        reference: runs the original; needed by fidelity metrics.
        batch_size: samples per run.

    Raises:
        DataError: no samples, no usable label, or outputs that do not fit the metric.
        OptionError: a user's metric failed, or a named output does not exist.
    """
    streamed = [metric for metric in metrics if isinstance(metric, StreamedMetric)]
    rows = iter(_stream(streamed, predict, dataset, reference, batch_size)) if streamed else iter(())
    scores = []
    for metric in metrics:
        if isinstance(metric, UserMetric):
            scores.append(Score(metric, metric(predict), None))
        elif isinstance(metric, StreamedMetric):
            scores.append(_score(metric, next(rows)))
    return scores


def compare(baseline: Score, candidate: Score) -> Drop:
    """The drop from one score to another of the same metric, resampling the same samples in both.

    Pairing removes the noise that both share: the interval is far narrower than the two scores' own.

    Raises:
        ValueError: the metrics or the samples differ.
    """
    metric = baseline.metric
    if metric.name != candidate.metric.name or baseline.samples != candidate.samples:
        raise ValueError(f"cannot pair {baseline} with {candidate}")
    value = metric.drop(baseline.value, candidate.value)
    if baseline.rows is None or candidate.rows is None or not isinstance(metric, StreamedMetric):
        return Drop(value, None)
    outputs = baseline.rows.shape[1]

    def drops(means: FloatArray) -> FloatArray:
        before, after = metric.value(means[..., :outputs, :]), metric.value(means[..., outputs:, :])
        return before - after if metric.higher_is_better else after - before

    both = np.concatenate([baseline.rows, candidate.rows], axis=1)
    return Drop(value, _bootstrap(both, drops))


def parse_metric(text: str) -> Metric:
    """The metric that a user asked for.

    Args:
        text: a name of `METRICS`; `NAME:OUTPUT` to compare one output; or `FILE.py:FUNCTION`, which is imported now.

    Raises:
        OptionError: no such metric, file or function, or the file does not import.
    """
    if match := re.fullmatch(r"(.+\.py):(\w+)", text):
        return _load_user_metric(text, Path(match[1]), match[2])
    name, _, output = text.partition(":")
    plain = {_plain(known): known for known in METRICS}
    if _plain(name) not in plain:
        near = difflib.get_close_matches(_plain(name), plain, n=1)
        raise OptionError(
            f"unknown metric '{text}'",
            f"did you mean '{plain[near[0]]}'?" if near else "",
            f"one of {', '.join(METRICS)}, or FILE.py:FUNCTION",
        )
    metric = METRICS[plain[_plain(name)]]
    if not output:
        return metric
    return replace(metric, name=f"{metric.name}:{output}", output=output)


def default_metric(targets: Arrays, outputs: Arrays) -> tuple[Metric, str]:
    """The metric to use where the user named none, and why.

    Args:
        targets: the data's targets of one batch, valid samples only.
        outputs: the model's outputs for that batch.

    Returns:
        Accuracy if there is an integer label that exactly one output fits, else the relative error; and the reason
        in a few words for the report.
    """
    error = METRICS["relative-error"]
    if LABEL not in targets:
        return error, f"the data have no '{LABEL}'"
    try:
        _class_scores(outputs, _labels(targets))
    except DataError as problem:
        return error, f"'{LABEL}' cannot be used: {problem.fact}"
    return METRICS["accuracy"], f"the data have an integer '{LABEL}'"


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name.lower())


# --- running over data ----------------------------------------------------------------------------------------------


def _stream(
    metrics: Sequence[StreamedMetric],
    predict: Predict,
    dataset: Dataset,
    reference: Predict | None,
    batch_size: int,
) -> list[FloatArray]:
    """The rows of each metric over the whole dataset."""
    parts: list[list[FloatArray]] = [[] for _ in metrics]
    for batch in dataset.batches(batch_size):
        outputs = _valid(predict(batch.feeds), batch)
        expected: Arrays = {}
        if any(metric.needs == "reference" for metric in metrics):
            if reference is None:
                raise OptionError("a fidelity metric needs the original model", remedy="give it as the reference")
            expected = _valid(reference(batch.feeds), batch)
        for metric, part in zip(metrics, parts, strict=True):
            chosen = _select(outputs, metric.output)
            against = batch.targets if metric.needs == "labels" else _select(expected, metric.output)
            with np.errstate(all="ignore"):  # infinities are dealt with where the score is formed
                rows = metric.rows(chosen, against)
            part.append(np.broadcast_to(rows, (batch.valid, *rows.shape[1:])))
    if not parts[0]:
        raise DataError("there are no samples to evaluate on", "the data are empty", "give --eval with samples")
    return [np.concatenate(part) for part in parts]


def _valid(outputs: Arrays, batch: Batch) -> Arrays:
    """Tensor outputs without the padding, each with a leading sample axis.

    An output without that axis (a scalar, or detections of a whole image) is one sample, which `_stream` lets count
    for every sample of its batch.
    """
    size = batch.valid + batch.padding
    arrays = {name: np.asarray(array) for name, array in outputs.items() if isinstance(array, np.ndarray | np.generic)}
    return {
        name: array[: batch.valid] if array.ndim and len(array) == size else array[np.newaxis]
        for name, array in arrays.items()
    }


def _select(outputs: Arrays, name: str | None) -> Arrays:
    if name is None:
        return outputs
    if name not in outputs:
        raise OptionError(f"the model has no output '{name}'", remedy=f"one of {', '.join(outputs)}")
    return {name: outputs[name]}


def _score(metric: StreamedMetric, rows: FloatArray) -> Score:
    with np.errstate(all="ignore"):
        value = float(metric.value(rows.mean(0)))
    return Score(metric, value, _bootstrap(rows, metric.value), rows)


def _bootstrap(rows: FloatArray, statistic: Callable[[FloatArray], FloatArray]) -> Interval | None:
    """95% percentile bootstrap interval (Efron 1979) of a function of the mean row.

    Above 1,000 samples, random groups of equal size are resampled in place of samples: their mean has the same mean
    and variance, so the interval is the same at a fixed cost. Resamples are drawn as counts, so that each mean is one
    row of a matrix product.
    """
    if len(rows) < 2 or not np.isfinite(rows).all():
        return None
    random = np.random.default_rng(0)
    size = -(-len(rows) // _LARGEST_RESAMPLE)
    groups = len(rows) // size
    order = random.permutation(len(rows))[: groups * size]
    grouped = rows[order].reshape(groups, size, *rows.shape[1:]).mean(1)
    counts = random.multinomial(groups, np.full(groups, 1 / groups), _RESAMPLES)
    with np.errstate(all="ignore"):
        values = statistic(np.tensordot(counts, grouped, 1) / groups)
    finite = values[np.isfinite(values)]
    return (float(np.quantile(finite, 0.025)), float(np.quantile(finite, 0.975))) if finite.size else None


# --- what each sample contributes -----------------------------------------------------------------------------------


def _first(means: FloatArray) -> FloatArray:
    return np.asarray(means[..., 0])


def _root_ratio(means: FloatArray) -> FloatArray:
    """sqrt(error / signal), where nothing against nothing is no error."""
    error, signal = means[..., 0], means[..., 1]
    return np.where(error == 0, 0.0, np.sqrt(error / signal))


def _decibel(means: FloatArray) -> FloatArray:
    return np.asarray(-20 * np.log10(_root_ratio(means)))


@dataclass(frozen=True)
class _Top:
    """Whether the label is among the k highest scores; of equal scores the first class wins, as with argmax."""

    k: int

    def __call__(self, outputs: Arrays, targets: Arrays) -> FloatArray:
        labels = _labels(targets)
        scores = _class_scores(outputs, labels)
        classes = scores.shape[-1]
        labels = labels.reshape(scores.shape[:-1])
        if classes <= self.k and self.k > 1:
            raise DataError(f"top{self.k} is always 1 with {classes} classes", remedy="use accuracy")
        if labels.min() < 0 or labels.max() >= classes:
            wrong = labels[(labels < 0) | (labels >= classes)][0]
            raise DataError(
                f"label {wrong} is not one of the model's {classes} classes (0 to {classes - 1})",
                "labels that start at 1, or a marker for 'ignore'",
                "renumber the labels, drop those samples, or use FILE.py:FUNCTION",
            )
        own = np.take_along_axis(scores, labels[..., np.newaxis], -1)
        before = np.arange(classes) < labels[..., np.newaxis]
        rank = ((scores > own) | ((scores == own) & before)).sum(-1)
        hits = (rank < self.k) & ~np.isnan(scores).any(-1)
        return _mean_per_sample(hits)


def _squared_error(outputs: Arrays, reference: Arrays) -> FloatArray:
    return _per_output(outputs, reference, lambda y, error: [(error**2).mean(1)])


def _error_and_signal(outputs: Arrays, reference: Arrays) -> FloatArray:
    return _per_output(outputs, reference, lambda y, error: [(error**2).sum(1), (y**2).sum(1)])


def _cosine(outputs: Arrays, reference: Arrays) -> FloatArray:
    def cosine(y: FloatArray, error: FloatArray) -> list[FloatArray]:
        candidate = y + error
        lengths = np.sqrt((y**2).sum(1) * (candidate**2).sum(1))
        equal = ~error.any(1)  # a zero vector has no direction, yet equals itself
        return [np.where(equal, 1.0, np.where(lengths > 0, (y * candidate).sum(1) / lengths, 0.0))]

    return _per_output(outputs, reference, cosine)


def _agreement(outputs: Arrays, reference: Arrays) -> FloatArray:
    candidate, original = _paired_class_scores(outputs, reference)
    same = (candidate.argmax(-1) == original.argmax(-1)) & ~np.isnan(candidate).any(-1)
    return _mean_per_sample(same)


def _divergence(outputs: Arrays, reference: Arrays) -> FloatArray:
    """KL(original || candidate) in nats, of softmaxed scores; scores that are probabilities already are kept."""
    candidate, original = _paired_class_scores(outputs, reference)
    if (original >= 0).all() and np.allclose(original.sum(-1), 1, atol=1e-3):
        tiny = np.finfo(np.float32).tiny
        candidate, original = np.log(np.maximum(candidate, tiny)), np.log(np.maximum(original, tiny))
    log_q, log_p = _log_softmax(candidate), _log_softmax(original)
    p = np.exp(log_p)
    return _mean_per_sample(np.where(p > 0, p * (log_p - log_q), 0.0).sum(-1))


def _log_softmax(scores: FloatArray) -> FloatArray:
    shifted = scores - scores.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def _mean_per_sample(values: NDArray[np.bool_] | FloatArray) -> FloatArray:
    return np.asarray(values.reshape(len(values), -1).mean(1, dtype=np.float64)[:, np.newaxis, np.newaxis])


def _per_output(
    outputs: Arrays, reference: Arrays, row: Callable[[FloatArray, FloatArray], list[FloatArray]]
) -> FloatArray:
    """Apply `row` to (y, y' - y), each (samples, elements) float64, of every float output.

    Where the original is infinite or NaN (a mask), an equal candidate is no error and any other an infinite one.
    A model without float outputs is compared on its other numbers.
    """
    names = [name for name, y in reference.items() if _is_float(y)]
    names = names or [name for name, y in reference.items() if y.dtype.kind in "biu"]
    columns = []
    for name in names:
        original, candidate = _same_shape(name, outputs, reference)
        original, candidate = (y.reshape(len(y), -1) for y in (original, candidate))
        if original.shape[1] == 0:
            continue
        same = (candidate == original) | (np.isnan(candidate) & np.isnan(original))
        error = np.where(same, 0.0, candidate - original)
        error[np.isnan(error)] = np.inf
        columns.append(np.stack(row(np.where(np.isfinite(original), original, 0.0), error), -1))
    if not columns:
        raise DataError("no output can be compared: none is a tensor of numbers", remedy="use FILE.py:FUNCTION")
    rows = max(len(column) for column in columns)
    return np.stack([np.broadcast_to(column, (rows, column.shape[1])) for column in columns], 1)


def _same_shape(name: str, outputs: Arrays, reference: Arrays) -> tuple[FloatArray, FloatArray]:
    original, candidate = reference[name], outputs.get(name)
    if candidate is None or candidate.shape != original.shape:
        found = "is missing" if candidate is None else f"has shape {candidate.shape}"
        raise DataError(
            f"output '{name}' has shape {original.shape} in the original, but {found} in the candidate",
            "its shape depends on values, as the number of detections does",
            "compare another output with NAME:OUTPUT, or use FILE.py:FUNCTION",
        )
    return original.astype(np.float64), candidate.astype(np.float64)


# --- which output holds class scores --------------------------------------------------------------------------------


def _is_float(array: NDArray[np.generic]) -> bool:
    return "float" in array.dtype.name  # ml_dtypes' bfloat16 and float8 have no NumPy kind of their own


def _labels(targets: Arrays) -> NDArray[np.int64]:
    if LABEL not in targets:
        raise DataError(
            f"accuracy needs an integer '{LABEL}', which the data do not have",
            f"their targets are {', '.join(targets)}" if targets else "the data hold model inputs only",
            f"add an array '{LABEL}', or use a metric without labels: relative-error, agreement",
        )
    labels = targets[LABEL]
    if labels.dtype.kind not in "biu":
        raise DataError(
            f"'{LABEL}' is {labels.dtype}, not an integer",
            "one-hot vectors, scores, or class numbers stored as floats",
            "store class numbers as int64, or use FILE.py:FUNCTION",
        )
    return labels.astype(np.int64)


def _class_axis(shape: tuple[int, ...], label: tuple[int, ...]) -> int | None:
    """The axis of classes, given the label's shape: the last or the second, as in (N, classes, height, width)."""
    for axis in (1, -1) if len(shape) > 3 else (-1, 1):
        if len(shape) > 1 and np.delete(shape, axis).tolist() == list(label) and shape[axis] > 1:
            return axis
    return None


def _class_scores(outputs: Arrays, labels: NDArray[np.int64]) -> FloatArray:
    """The one output that the labels fit, classes moved to the last axis.

    Raises:
        DataError: none fits, or several do.
    """
    shapes = [labels.shape] if labels.ndim < 2 or labels.shape[-1] != 1 else [labels.shape, labels.shape[:-1]]
    found = {}
    for name, array in outputs.items():
        axes = [axis for shape in shapes if (axis := _class_axis(array.shape, shape)) is not None]
        if axes and _is_float(array):
            found[name] = np.moveaxis(array, axes[0], -1)
    if not found:
        seen = ", ".join(f"'{name}' {array.dtype}{list(array.shape)}" for name, array in outputs.items())
        raise DataError(
            f"no output fits '{LABEL}' of shape {list(labels.shape)}: {seen}",
            "accuracy needs float scores with one axis more than the labels, the classes",
            "reshape the labels, or use FILE.py:FUNCTION",
        )
    return _only(found).astype(np.float64)


def _paired_class_scores(outputs: Arrays, reference: Arrays) -> tuple[FloatArray, FloatArray]:
    """The one output that looks like class scores, of candidate and original, classes moved to the last axis.

    Classes are the last axis, or the second in four dimensions and more (N, classes, height, width).
    """
    alone = len(reference) == 1
    found = {
        name: array
        for name, array in reference.items()
        if _is_float(array) and (array.ndim == 2 or (alone and array.ndim > 1)) and array.shape[_scores_axis(array)] > 1
    }
    if not found:
        seen = ", ".join(f"'{name}' {array.dtype}{list(array.shape)}" for name, array in reference.items())
        raise DataError(
            f"no output looks like class scores, float (samples, classes): {seen}",
            remedy="name one with NAME:OUTPUT, or use relative-error",
        )
    _only(found)
    name = next(iter(found))
    original, candidate = _same_shape(name, outputs, reference)
    axis = _scores_axis(original)
    return np.moveaxis(candidate, axis, -1), np.moveaxis(original, axis, -1)


def _scores_axis(array: NDArray[np.generic]) -> int:
    return 1 if array.ndim > 3 else -1


def _only(found: Mapping[str, NDArray[np.generic]]) -> NDArray[np.generic]:
    if len(found) > 1:
        raise DataError(
            f"several outputs could be class scores: {', '.join(found)}",
            "auxiliary heads, or logits beside probabilities",
            f"name one, as in accuracy:{next(iter(found))}",
        )
    return next(iter(found.values()))


# --- the user's own -------------------------------------------------------------------------------------------------


def _load_user_metric(text: str, file: Path, name: str) -> UserMetric:
    if not file.is_file():
        raise OptionError(f"no such file: '{file}'", f"--metric {text} names it", "check the path")
    spec = importlib.util.spec_from_file_location(f"onnxcomp_user_metric_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise OptionError(f"'{file}' cannot be imported", "it is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where dataclasses and pickle look
    folder = str(file.resolve().parent)  # its neighbours import as they do when it runs as a script
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise _user_error(f"'{file}' does not import: {type(error).__name__}", file, error) from error
    finally:
        sys.path.remove(folder)
    function = getattr(module, name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        near = difflib.get_close_matches(name, own, n=1)
        raise OptionError(
            f"'{file}' has no function '{name}'",
            f"did you mean '{near[0]}'?" if near else "",
            f"def {name}(predict) -> float: ...",
        )
    best = np.inf if getattr(function, "higher_is_better", True) else -np.inf
    return UserMetric(text, "none", best, -best, file, function)


def _user_error(fact: str, file: Path, error: BaseException) -> OptionError:
    """Tell an error in the user's file by the line where it happened."""
    message = str(error).splitlines()[0] if str(error) else type(error).__name__
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == file.resolve()]
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).resolve() == file.resolve():
        where = f"{file}:{error.lineno}: {(error.text or '').strip()}: "
    elif frames:
        where = f"{file}:{frames[-1].lineno}, in {frames[-1].name}: {frames[-1].line}: "
    else:
        where = ""
    return OptionError(fact, f"{where}{message}", "mend that line; the function takes predict(feeds: dict) -> dict")


METRICS: dict[str, StreamedMetric] = {
    metric.name: metric
    for metric in (
        StreamedMetric("accuracy", "labels", 1, 0, _Top(1), _first),
        StreamedMetric("top5", "labels", 1, 0, _Top(5), _first),
        StreamedMetric("mse", "reference", 0, np.inf, _squared_error, _first),
        StreamedMetric("cosine", "reference", 1, -1, _cosine, _first),
        StreamedMetric("sqnr", "reference", np.inf, -np.inf, _error_and_signal, _decibel),
        StreamedMetric("kl", "reference", 0, np.inf, _divergence, _first),
        StreamedMetric("agreement", "reference", 1, 0, _agreement, _first),
        StreamedMetric("relative-error", "reference", 0, np.inf, _error_and_signal, _root_ratio),
    )
}
"""Metrics by name. In nats: kl. In dB: sqnr. Shares of 1: accuracy, top5, agreement. Several outputs: the worst."""
