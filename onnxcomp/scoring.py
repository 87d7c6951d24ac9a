"""What each sample contributes to a metric: rows of numbers from outputs and labels, or from two models' outputs.

A row function takes (candidate's outputs, labels or reference outputs), valid samples only, by output name, and gives
(samples, outputs, k) float64.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxcomp.errors import DataError

Arrays = Mapping[str, NDArray[np.generic]]
FloatArray = NDArray[np.float64]

LABEL = "label"
"""The target that accuracy is measured against."""

_TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class Top:
    """Whether the label is among the k highest scores; of equal scores the first class wins, as with argmax."""

    k: int

    def __call__(self, outputs: Arrays, targets: Arrays) -> FloatArray:
        """One hit rate per sample (the mean over its labels).

        Raises:
            DataError: labels that are none of the classes, or outputs that do not fit them.
        """
        labels = integer_labels(targets)
        scores = class_scores(outputs, labels)
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


def likelihoods(outputs: Arrays, targets: Arrays) -> FloatArray:
    """Of each sample its log likelihoods: scores, or logarithms of probabilities, (samples, 1, classes).

    Raises:
        DataError: as for `class_scores`; or samples have several labels each.
    """
    scores = class_scores(outputs, integer_labels(targets))
    if scores.ndim != 2:
        raise DataError("samples have several labels each", remedy="give one label for each sample")
    if _are_probabilities(scores):
        scores = np.log(np.maximum(scores, _TINY))
    return np.asarray(scores[:, np.newaxis])


@dataclass(frozen=True)
class Surprise:
    """-log p(label) in nats, at several temperatures T: p is the softmax of log likelihoods / T.

    The temperature with the least is the one at which a model is as sure as it is right (Guo et al. 2017, "On
    Calibration of Modern Neural Networks", section 4.2).
    """

    temperatures: tuple[float, ...]

    def __call__(self, outputs: Arrays, targets: Arrays) -> FloatArray:
        """Of each sample, (samples, 1, temperatures).

        Raises:
            DataError: as for `likelihoods`.
        """
        scores, labels = likelihoods(outputs, targets), integer_labels(targets).reshape(-1, 1, 1)
        found = [
            -np.take_along_axis(_log_softmax(scores / temperature), labels, -1) for temperature in self.temperatures
        ]
        return np.concatenate(found, axis=-1)


@dataclass(frozen=True)
class Answers:
    """The k classes that a model gives the highest scores."""

    k: int

    def __call__(self, outputs: Arrays, targets: Arrays) -> FloatArray:
        """Of each sample, (samples, 1, k); -1 where a score is no number.

        Raises:
            DataError: as for `likelihoods`.
        """
        scores = likelihoods(outputs, targets)
        answers = np.argsort(-scores, axis=-1, kind="stable")[..., : self.k]
        return np.where(np.isnan(scores).any(-1, keepdims=True), -1.0, answers)


def less_likely(scores: FloatArray, answers: FloatArray, temperature: float) -> FloatArray:
    """How much less likely answers are than as many of the original's own, by the original at some temperature.

    What accuracy is lost, expected without a look at labels: a right answer that became a wrong one counts as one less
    in a score, and as the difference of both likelihoods here, which has a fraction of the noise.

    Args:
        scores: (samples, 1, classes) the original's log likelihoods.
        answers: (samples, 1, k); what is no answer is right with no likelihood.
        temperature: of the softmax.

    Returns:
        Of each sample, (samples, 1, 1).
    """
    likely = np.exp(_log_softmax(scores / temperature))
    own = np.sort(likely, axis=-1)[..., -answers.shape[-1] :].sum(-1, keepdims=True)
    other = np.take_along_axis(likely, answers.astype(np.int64), -1)
    return np.asarray(own - np.where(answers < 0, 0.0, other).sum(-1, keepdims=True))


def squared_error(outputs: Arrays, reference: Arrays) -> FloatArray:
    """Mean square of y' - y per sample and output."""
    return _per_output(outputs, reference, lambda y, error: [(error**2).mean(1)])


def error_and_signal(outputs: Arrays, reference: Arrays) -> FloatArray:
    """Sums of (y' - y)^2 and of y^2 per sample and output."""
    return _per_output(outputs, reference, lambda y, error: [(error**2).sum(1), (y**2).sum(1)])


def cosine_similarity(outputs: Arrays, reference: Arrays) -> FloatArray:
    """Cosine of the angle between y and y' per sample and output."""

    def cosine(y: FloatArray, error: FloatArray) -> list[FloatArray]:
        candidate = y + error
        lengths = np.sqrt((y**2).sum(1) * (candidate**2).sum(1))
        equal = ~error.any(1)  # a zero vector has no direction, yet equals itself
        return [np.where(equal, 1.0, np.where(lengths > 0, (y * candidate).sum(1) / lengths, 0.0))]

    return _per_output(outputs, reference, cosine)


def agreement(outputs: Arrays, reference: Arrays) -> FloatArray:
    """Share of a sample's predictions with the same highest class."""
    candidate, original = _paired_class_scores(outputs, reference)
    same = (candidate.argmax(-1) == original.argmax(-1)) & ~np.isnan(candidate).any(-1)
    return _mean_per_sample(same)


def divergence(outputs: Arrays, reference: Arrays) -> FloatArray:
    """KL(original || candidate) in nats, of softmaxed scores; scores that are probabilities already are kept."""
    candidate, original = _paired_class_scores(outputs, reference)
    if _are_probabilities(original):
        candidate, original = (np.log(np.maximum(scores, _TINY)) for scores in (candidate, original))
    log_q, log_p = _log_softmax(candidate), _log_softmax(original)
    p = np.exp(log_p)
    return _mean_per_sample(np.where(p > 0, p * (log_p - log_q), 0.0).sum(-1))


def _are_probabilities(scores: FloatArray) -> bool:
    return bool((scores >= 0).all() and np.allclose(scores.sum(-1), 1, atol=1e-3))


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
        if original.shape[1] == 0:  # nothing against nothing, which on other samples may be something
            original = candidate = np.zeros((len(original), 1))
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


def integer_labels(targets: Arrays) -> NDArray[np.int64]:
    """The labels.

    Raises:
        DataError: there are none, or they are no integers.
    """
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


def class_scores(outputs: Arrays, labels: NDArray[np.int64]) -> FloatArray:
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
    if not found:  # models that end in ArgMax say the class itself
        told = {name: array for name, array in outputs.items() if array.dtype.kind in "iu" and array.shape in shapes}
        found = {
            name: array[..., None] == np.arange(1 + max(array.max(), labels.max())) for name, array in told.items()
        }
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
