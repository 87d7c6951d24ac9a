"""How good a model is, on labels or against the original, with an interval.

One mechanism serves every metric: each sample gives a short row of numbers, and a score is a function of the mean row.
So samples stream (only the rows stay), intervals come from resampling rows, and two models are compared row by row.
"""

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from onnxcomp.errors import DataError, OptionError
from onnxcomp.numerics.stats import Interval, bootstrap_interval
from onnxcomp.scoring import (
    LABEL,
    Answers,
    Arrays,
    FloatArray,
    Surprise,
    Top,
    agreement,
    class_scores,
    cosine_similarity,
    divergence,
    error_and_signal,
    integer_labels,
    less_likely,
    likelihoods,
    squared_error,
)
from onnxcomp.user_metric import UserFunction

Predict = Callable[[Arrays], Arrays]


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
    @property
    def void(self) -> "Void | None": ...  # noqa: D102


class Void(Protocol):
    """Positions of samples that nothing depends on."""

    @property
    def outputs(self) -> Sequence[tuple[str, int]]: ...  # noqa: D102
    def row(self, outputs: Arrays, row: int) -> Arrays: ...  # noqa: D102


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
    """The user's own `evaluate(predict) -> float`, called whole."""

    function: UserFunction


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

    @property
    def standard_error(self) -> float | None:
        """By the interval, as if the drop were normally distributed; None without one."""
        return None if self.interval is None else float(np.ptp(self.interval)) / (2 * 1.96)


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
    rows = iter(rows_of(streamed, predict, dataset, reference, batch_size)) if streamed else iter(())
    scores = []
    for metric in metrics:
        if isinstance(metric, UserMetric):
            scores.append(Score(metric, metric.function(predict), None))
        elif isinstance(metric, StreamedMetric):
            scores.append(scored(metric, next(rows)))
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
    return Drop(value, bootstrap_interval(both, drops))


def parse_metric(text: str | Callable[[Any], float]) -> Metric:
    """The metric that a user asked for.

    Args:
        text: a name of `METRICS`; `NAME:OUTPUT` to compare one output; `FILE.py:FUNCTION`, which is imported now; or
            from Python the function itself.

    Raises:
        OptionError: no such metric, file or function, or the file does not import.
    """
    if callable(text):
        return _user_metric(UserFunction.of(text))
    if match := re.fullmatch(r"(.+\.py):(\w+)", text):
        return _user_metric(UserFunction.load(text, Path(match[1]), match[2]))
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


def _user_metric(function: UserFunction) -> "UserMetric":
    best = np.inf if function.higher_is_better else -np.inf
    return UserMetric(function.text, "none", best, -best, function)


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
        class_scores(outputs, integer_labels(targets))
    except DataError as problem:
        return error, f"'{LABEL}' cannot be used: {problem.fact}"
    return METRICS["accuracy"], f"the data have an integer '{LABEL}'"


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name.lower())


# --- running over data ----------------------------------------------------------------------------------------------


def rows_of(
    metrics: Sequence[StreamedMetric],
    predict: Predict,
    dataset: Dataset,
    reference: Predict | None,
    batch_size: int,
) -> list[FloatArray]:
    """The rows of each metric over the whole dataset, (samples, outputs, k); those of parts of it, put together.

    Raises:
        DataError, OptionError: as for `evaluate_all`.
    """
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
                rows = _rows(metric, chosen, against, batch)
            part.append(np.broadcast_to(rows, (batch.valid, *rows.shape[1:])))
    if not parts[0]:
        raise DataError("there are no samples to evaluate on", "the data are empty", "give --eval with samples")
    return [np.concatenate(part) for part in parts]


def _rows(metric: StreamedMetric, outputs: Arrays, against: Arrays, batch: Batch) -> FloatArray:
    """The rows of a run. Outputs are compared where their positions count, which are as many as each sample has."""
    void = batch.void
    if void is None or metric.needs != "reference" or outputs.keys().isdisjoint(name for name, _ in void.outputs):
        return metric.rows(outputs, against)
    pairs = ((void.row(outputs, row), void.row(against, row)) for row in range(batch.valid))
    return np.concatenate([metric.rows(*pair) for pair in pairs])


def _valid(outputs: Arrays, batch: Batch) -> Arrays:
    """Tensor outputs without the padding, each with a leading sample axis.

    An output without that axis (a scalar, or detections of a whole image) is one sample, which `rows_of` lets count
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


def scored(metric: StreamedMetric, rows: FloatArray) -> Score:
    """The score of the rows that `rows_of` gives."""
    with np.errstate(all="ignore"):
        value = float(metric.value(rows.mean(0)))
    return Score(metric, value, bootstrap_interval(rows, metric.value), rows)


@dataclass(frozen=True)
class Likelihoods:
    """What tells how likely answers are, beside a metric that counts labels.

    Attributes:
        surprise: of a model by the labels, at each temperature.
        scores: its log likelihoods.
        answers: as many as the metric looks at.
    """

    surprise: StreamedMetric
    scores: StreamedMetric
    answers: StreamedMetric

    @classmethod
    def beside(cls, metric: Metric, temperatures: tuple[float, ...]) -> "Likelihoods | None":
        """None where the metric counts no labels."""
        if not isinstance(metric, StreamedMetric) or not isinstance(metric.rows, Top):
            return None
        return cls(
            replace(metric, name="surprise", rows=Surprise(temperatures)),
            replace(metric, name="scores", rows=likelihoods),
            replace(metric, name="answers", rows=Answers(metric.rows.k)),
        )


def expected_drop(scores: FloatArray, answers: FloatArray, temperature: float) -> Drop:
    """What a metric that counts labels loses, by how likely the original at some temperature holds a model's answers.

    Args:
        scores: (samples, 1, classes), rows of `Likelihoods.scores` for the original.
        answers: (samples, 1, k), rows of `Likelihoods.answers` for the other.
        temperature: at which the original is as sure as it is right.
    """
    rows = less_likely(scores, answers, temperature)
    return Drop(float(rows.mean()), bootstrap_interval(rows, lambda means: means[..., 0, 0]))


def _first(means: FloatArray) -> FloatArray:
    return np.asarray(means[..., 0])


def _root_ratio(means: FloatArray) -> FloatArray:
    """sqrt(error / signal), where nothing against nothing is no error."""
    error, signal = means[..., 0], means[..., 1]
    return np.where(error == 0, 0.0, np.sqrt(error / signal))


def _decibel(means: FloatArray) -> FloatArray:
    return np.asarray(-20 * np.log10(_root_ratio(means)))


METRICS: dict[str, StreamedMetric] = {
    metric.name: metric
    for metric in (
        StreamedMetric("accuracy", "labels", 1, 0, Top(1), _first),
        StreamedMetric("top5", "labels", 1, 0, Top(5), _first),
        StreamedMetric("mse", "reference", 0, np.inf, squared_error, _first),
        StreamedMetric("cosine", "reference", 1, -1, cosine_similarity, _first),
        StreamedMetric("sqnr", "reference", np.inf, -np.inf, error_and_signal, _decibel),
        StreamedMetric("kl", "reference", 0, np.inf, divergence, _first),
        StreamedMetric("agreement", "reference", 1, 0, agreement, _first),
        StreamedMetric("relative-error", "reference", 0, np.inf, error_and_signal, _root_ratio),
    )
}
"""Metrics by name. In nats: kl. In dB: sqnr. Shares of 1: accuracy, top5, agreement. Several outputs: the worst."""
