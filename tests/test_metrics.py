from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
import scipy.stats
from numpy.typing import NDArray

from onnxcomp import metrics
from onnxcomp.errors import DataError, OptionError
from onnxcomp.metrics import METRICS, Metric, Predict, Score, StreamedMetric, UserMetric, parse_metric
from onnxcomp.scoring import Arrays

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class FakeBatch:
    feeds: Arrays
    targets: Arrays
    valid: int
    padding: int
    void: None = None


@dataclass(frozen=True)
class FakeData:
    """Samples `x`, and `label` if given; the last batch is padded by repeating its last sample."""

    x: np.ndarray
    targets: Arrays = field(default_factory=dict)

    def batches(self, size: int) -> Iterator[FakeBatch]:
        for start in range(0, len(self.x), size):
            valid = min(size, len(self.x) - start)
            rows = np.minimum(np.arange(start, start + size), start + valid - 1)
            targets = {name: target[start : start + size] for name, target in self.targets.items()}
            yield FakeBatch({"x": self.x[rows]}, targets, valid, size - valid)


def echo(feeds: Arrays) -> Arrays:
    return {"y": feeds["x"]}


def noise(x: Floats, amplitude: float = 0.3) -> Floats:
    return x + amplitude * np.sin(37 * x)


def noisy(feeds: Arrays) -> Arrays:
    return {"y": noise(feeds["x"].astype(np.float64))}


def first_column(feeds: Arrays) -> Arrays:
    return {"y": feeds["x"][:, :1]}


def constant(array: np.ndarray) -> Predict:
    return lambda feeds: {"y": array}


@pytest.fixture
def scores() -> Floats:
    return np.random.default_rng(1).normal(size=(37, 10))


def measure(name: str, candidate: Arrays, original: Arrays) -> float:
    """The metric of given outputs, as one batch."""
    samples = len(next(iter(original.values())))
    data = FakeData(np.zeros((samples, 1)))
    return metrics.evaluate(METRICS[name], lambda f: candidate, data, lambda f: original, samples).value


# --- values against oracles -----------------------------------------------------------------------------------------


def test_fidelity_metrics_equal_oracles(scores: Floats) -> None:
    y, z = scores, noise(scores)
    p, q = scipy.special.softmax(y, 1), scipy.special.softmax(z, 1)
    oracle = {
        "mse": np.mean((y - z) ** 2),
        "cosine": np.mean([1 - scipy.spatial.distance.cosine(a, b) for a, b in zip(y, z, strict=True)]),
        "sqnr": 10 * np.log10(np.sum(y**2) / np.sum((y - z) ** 2)),
        "kl": np.mean(scipy.stats.entropy(p, q, axis=1)),
        "agreement": np.mean(y.argmax(1) == z.argmax(1)),
        "relative-error": np.linalg.norm(y - z) / np.linalg.norm(y),
    }
    for name, expected in oracle.items():
        score = metrics.evaluate(METRICS[name], noisy, FakeData(y), echo, batch_size=8)
        assert score.value == pytest.approx(expected, rel=1e-12), name
        assert score.samples == 37


@pytest.mark.parametrize(("name", "k"), [("accuracy", 1), ("top5", 5)])
def test_accuracy_equals_sorting(scores: Floats, name: str, k: int) -> None:
    labels = np.random.default_rng(2).integers(0, 10, 37)
    best = np.argsort(-scores, axis=1)[:, :k]
    score = metrics.evaluate(METRICS[name], echo, FakeData(scores, {"label": labels}), batch_size=8)
    assert score.value == np.mean((best == labels[:, None]).any(1))


def test_result_does_not_depend_on_batch_size_or_padding(scores: Floats) -> None:
    data = FakeData(scores, {"label": scores.argmax(1)})
    for name, metric in METRICS.items():
        whole, padded = (metrics.evaluate(metric, noisy, data, echo, size) for size in (37, 5))
        assert padded.value == pytest.approx(whole.value, rel=1e-12), name
        assert padded.rows is not None
        assert whole.rows is not None
        np.testing.assert_allclose(padded.rows, whole.rows, rtol=1e-12)


def test_original_scores_best_against_itself(scores: Floats) -> None:
    for metric in METRICS.values():
        if metric.needs == "reference":
            assert metrics.evaluate(metric, echo, FakeData(scores), echo, 8).value == pytest.approx(metric.best)


def test_nan_outputs_score_worst(scores: Floats) -> None:
    data = FakeData(scores, {"label": scores.argmax(1)})
    broken = np.full((37, 10), np.nan)
    for metric in METRICS.values():
        score = metrics.evaluate(metric, constant(broken), data, echo, 37)
        assert score.value == metric.worst, metric.name


def test_equal_scores_are_no_hit_for_all() -> None:
    labels = np.arange(10)
    data = FakeData(np.zeros((10, 10)), {"label": labels})
    assert metrics.evaluate(METRICS["accuracy"], echo, data, batch_size=10).value == 0.1
    assert metrics.evaluate(METRICS["top5"], echo, data, batch_size=10).value == 0.5


def test_masks_of_infinity_are_no_error() -> None:
    original = np.array([[1.0, -np.inf, 3.0]])
    assert measure("relative-error", {"y": original}, {"y": original}) == 0
    assert measure("kl", {"y": original}, {"y": original}) == 0
    shifted = np.array([[1.0, -np.inf, 4.0]])
    assert measure("relative-error", {"y": shifted}, {"y": original}) == pytest.approx(1 / np.sqrt(10))
    assert measure("relative-error", {"y": np.array([[1.0, -3e38, 3.0]])}, {"y": original}) == np.inf


def test_zero_outputs() -> None:
    zero, one = {"y": np.zeros((2, 3))}, {"y": np.ones((2, 3))}
    assert measure("relative-error", zero, zero) == 0
    assert measure("relative-error", one, zero) == np.inf
    assert measure("cosine", zero, zero) == 1
    assert measure("cosine", zero, one) == 0


def test_probabilities_are_not_softmaxed_again() -> None:
    p, q = np.array([[0.9, 0.1, 0.0]]), np.array([[0.6, 0.3, 0.1]])
    assert measure("kl", {"y": q}, {"y": p}) == pytest.approx(scipy.stats.entropy(p[0], q[0]))


def test_bfloat16_counts_as_float() -> None:
    original = np.ones((2, 4), ml_dtypes.bfloat16)
    assert measure("relative-error", {"y": original * 2}, {"y": original}) == 1


def test_integer_outputs_are_compared_where_there_is_nothing_else() -> None:
    a, b = np.array([[3], [4]]), np.array([[3], [0]])
    assert measure("mse", {"class": b}, {"class": a}) == 8
    assert measure("mse", {"class": b, "y": a / 2}, {"class": a, "y": a / 2}) == 0


def test_the_worst_of_several_outputs_counts() -> None:
    y = np.arange(1.0, 7).reshape(2, 3)
    original, candidate = {"large": 1000 * y, "small": y}, {"large": 1000 * y, "small": 1.5 * y}
    assert measure("relative-error", candidate, original) == pytest.approx(0.5)
    assert measure("sqnr", candidate, original) == pytest.approx(20 * np.log10(2))
    named = parse_metric("relative-error:large")
    assert metrics.evaluate(named, lambda f: candidate, FakeData(y), lambda f: original, 2).value == 0


def test_outputs_without_a_sample_axis() -> None:
    data = FakeData(np.ones((4, 2)))

    def predict(feeds: Arrays) -> Arrays:
        return {"total": np.array(2.0), "sum": np.full((3, 2), 2.0), "y": feeds["x"]}

    def reference(feeds: Arrays) -> Arrays:
        return {"total": np.array(1.0), "sum": np.full((3, 2), 1.0), "y": feeds["x"]}

    score = metrics.evaluate(METRICS["relative-error"], predict, data, reference, 2)
    assert (score.value, score.samples) == (1, 4)


@pytest.mark.parametrize("shape", [(2, 4, 3, 3), (2, 3, 3, 4)])
def test_accuracy_of_segmentation(shape: tuple[int, ...]) -> None:
    scores = np.random.default_rng(3).normal(size=shape)
    labels = scores.argmax(shape.index(4))
    labels[0, 0, 0] = (labels[0, 0, 0] + 1) % 4
    assert metrics.evaluate(METRICS["accuracy"], echo, FakeData(scores, {"label": labels}), batch_size=2).value == (
        pytest.approx(17 / 18)
    )


def test_column_of_labels(scores: Floats) -> None:
    data = FakeData(scores, {"label": scores.argmax(1)[:, None]})
    assert metrics.evaluate(METRICS["accuracy"], echo, data, batch_size=4).value == 1


# --- intervals and differences --------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [300, 2500])
def test_interval_equals_scipys_bootstrap(samples: int) -> None:
    random = np.random.default_rng(4)
    x = random.normal(size=(samples, 3)) * random.exponential(size=(samples, 1))
    score = metrics.evaluate(METRICS["relative-error"], noisy, FakeData(x), echo, 100)
    assert score.rows is not None
    error, signal = score.rows[:, 0].T
    oracle = scipy.stats.bootstrap(
        (error, signal),
        lambda e, s, axis: np.sqrt(e.mean(axis) / s.mean(axis)),
        paired=True,
        method="percentile",
        n_resamples=4000,
        batch=200,
        rng=np.random.default_rng(5),
    ).confidence_interval
    width = oracle.high - oracle.low
    # 1,000 resamples give a 2.5% quantile with a standard error of about 4% of the interval's width
    assert score.interval is not None
    assert score.interval == pytest.approx(tuple(oracle), abs=0.15 * width)
    assert score.interval[0] < score.value < score.interval[1]


def test_interval_is_reproducible_and_absent_for_one_sample(scores: Floats) -> None:
    def interval(x: np.ndarray) -> object:
        return metrics.evaluate(METRICS["mse"], noisy, FakeData(x), echo).interval

    assert interval(scores) == interval(scores)
    assert interval(scores[:1]) is None


def test_paired_drop_is_narrower_than_the_scores(scores: Floats) -> None:
    random = np.random.default_rng(6)
    x = random.normal(size=(2000, 10))
    data = FakeData(x, {"label": np.where(random.random(2000) < 0.8, x.argmax(1), 0)})

    def worse(feeds: Arrays) -> Arrays:
        return {"y": noise(feeds["x"].astype(np.float64), 0.2)}

    before = metrics.evaluate(METRICS["accuracy"], echo, data, batch_size=50)
    after = metrics.evaluate(METRICS["accuracy"], worse, data, batch_size=50)
    drop = metrics.compare(before, after)
    assert drop.value == before.value - after.value > 0
    assert drop.interval is not None
    assert before.interval is not None
    lost = (before.rows - after.rows).ravel()  # type: ignore[operator]
    assert np.diff(drop.interval)[0] == pytest.approx(2 * 1.96 * lost.std() / np.sqrt(2000), rel=0.15)  # normal theory
    assert np.diff(drop.interval)[0] < np.diff(before.interval)[0]
    assert drop.interval[0] < drop.value < drop.interval[1]
    assert metrics.compare(before, before).interval == (0, 0)


def test_scores_of_other_samples_do_not_pair(scores: Floats) -> None:
    long, short = (metrics.evaluate(METRICS["mse"], noisy, FakeData(x), echo) for x in (scores, scores[:9]))
    with pytest.raises(ValueError, match="cannot pair"):
        metrics.compare(long, short)


@pytest.mark.parametrize(
    ("name", "baseline", "candidate", "drop"),
    [
        ("accuracy", 0.9, 0.8, 0.1),
        ("accuracy", 0.8, 0.9, -0.1),
        ("mse", 0.0, 0.5, 0.5),
        ("kl", 0.5, 0.2, -0.3),
        ("sqnr", np.inf, np.inf, 0.0),
        ("sqnr", 40, 30, 10),
    ],
)
def test_drop_is_positive_where_worse(name: str, baseline: float, candidate: float, drop: float) -> None:
    assert METRICS[name].drop(baseline, candidate) == pytest.approx(drop)


def test_several_metrics_run_each_model_once(scores: Floats) -> None:
    calls = []

    def counted(feeds: Arrays) -> Arrays:
        calls.append(len(feeds["x"]))
        return noisy(feeds)

    wanted = [METRICS["mse"], METRICS["agreement"]]
    together = metrics.evaluate_all(wanted, counted, FakeData(scores), echo, 10)
    assert calls == [10, 10, 10, 10]
    assert together == [metrics.evaluate(metric, noisy, FakeData(scores), echo, 10) for metric in wanted]


# --- choosing and naming --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("accuracy", "accuracy"),
        ("Top-5", "top5"),
        ("relative_error", "relative-error"),
        ("SQNR", "sqnr"),
        ("kl:logits:0", "kl:logits:0"),
    ],
)
def test_parse_metric(text: str, name: str) -> None:
    metric = parse_metric(text)
    assert isinstance(metric, StreamedMetric)
    assert metric.name == name
    assert metric.output == (name.partition(":")[2] or None)


def test_unknown_metric_suggests() -> None:
    with pytest.raises(OptionError, match=r"(?s)unknown metric 'acuracy'.*did you mean 'accuracy'.*sqnr, kl"):
        parse_metric("acuracy")
    with pytest.raises(OptionError, match=r"unknown metric 'F1'") as caught:
        parse_metric("F1")
    assert caught.value.cause == ""


def test_default_metric(scores: Floats) -> None:
    labels = scores.argmax(1)
    y, aux = {"y": scores}, {"y": scores, "aux": scores}
    for targets, outputs, name, why in (
        ({"label": labels}, y, "accuracy", "integer 'label'"),
        ({}, y, "relative-error", "no 'label'"),
        ({"label": labels / 2}, y, "relative-error", "not an integer"),
        ({"label": labels[:5]}, y, "relative-error", "no output fits 'label' of shape [5]"),
        ({"label": labels}, aux, "relative-error", "several outputs could be class scores: y, aux"),
    ):
        metric, reason = metrics.default_metric(targets, outputs)
        assert metric.name == name
        assert why in reason


def test_accuracy_names_what_does_not_fit(scores: Floats) -> None:
    def fails(targets: Arrays, predict: Predict = echo, metric: str = "accuracy") -> str:
        with pytest.raises((DataError, OptionError)) as caught:
            metrics.evaluate(parse_metric(metric), predict, FakeData(scores, targets), batch_size=37)
        return str(caught.value)

    labels = scores.argmax(1)
    assert "targets are score" in fails({"score": labels})
    assert "'label' is float64, not an integer" in fails({"label": labels / 1})
    assert "no output fits 'label' of shape [37, 2]: 'y' float64[37, 10]" in fails({"label": np.stack([labels] * 2, 1)})
    assert "label 10 is not one of the model's 10 classes" in fails({"label": labels + (labels == labels.max())})
    two = fails({"label": labels}, lambda f: {"y": f["x"], "aux": f["x"]})
    assert "several outputs could be class scores: y, aux" in two
    assert "accuracy:y" in two
    assert "no output 'z'" in fails({"label": labels}, metric="accuracy:z")
    assert "top5 is always 1 with 4 classes" in fails({"label": labels % 4}, lambda f: {"y": f["x"][:, :4]}, "top5")


def test_a_named_output_settles_several(scores: Floats) -> None:
    data = FakeData(scores, {"label": scores.argmax(1)})
    both = {"y": scores, "aux": -scores}
    assert metrics.evaluate(parse_metric("accuracy:y"), lambda f: both, data, batch_size=37).value == 1
    assert metrics.evaluate(parse_metric("agreement:aux"), lambda f: both, data, lambda f: both, 37).value == 1


@pytest.mark.parametrize("name", ["mse", "cosine", "sqnr", "relative-error"])
def test_an_output_that_is_empty_for_some_samples_counts_for_the_others(name: str) -> None:
    x = np.arange(12.0).reshape(4, 3)
    answers = {start: {"a": x[start:][:2], "b": x[start:][:2, : start // 2]} for start in (0, 2)}

    def reference(feeds: Arrays) -> Arrays:
        return answers[0 if feeds["x"][0, 0] == 0 else 2]

    def candidate(feeds: Arrays) -> Arrays:
        return {"a": reference(feeds)["a"], "b": 2 * reference(feeds)["b"]}

    metric = METRICS[name]
    assert metrics.evaluate(metric, reference, FakeData(x), reference, 2).value == metric.best
    expected = {"mse": (6**2 + 9**2) / 4, "cosine": 1.0, "sqnr": 0.0, "relative-error": 1.0}
    assert metrics.evaluate(metric, candidate, FakeData(x), reference, 2).value == pytest.approx(expected[name])


def test_fidelity_names_what_does_not_fit(scores: Floats) -> None:
    data = FakeData(scores)
    with pytest.raises(DataError, match=r"\(37, 10\) in the original, but has shape \(37, 4\) in the candidate"):
        metrics.evaluate(METRICS["mse"], lambda f: {"y": f["x"][:, :4]}, data, echo, 37)
    with pytest.raises(DataError, match="is missing in the candidate"):
        metrics.evaluate(METRICS["mse"], lambda f: {"z": f["x"]}, data, echo, 37)
    with pytest.raises(DataError, match="no output can be compared"):
        metrics.evaluate(METRICS["mse"], constant(np.array(["a"] * 37)), data, constant(np.array(["a"] * 37)), 37)
    with pytest.raises(DataError, match=r"no output looks like class scores.*'y' float64\[37, 1\]"):
        metrics.evaluate(METRICS["agreement"], first_column, data, first_column, 37)
    with pytest.raises(OptionError, match="needs the original"):
        metrics.evaluate(METRICS["mse"], echo, data)
    with pytest.raises(DataError, match="no samples"):
        metrics.evaluate(METRICS["mse"], echo, FakeData(scores[:0]), echo)


# --- the user's own -------------------------------------------------------------------------------------------------


def user_metric(folder: Path, source: str, function: str = "evaluate") -> Metric:
    file = folder / "mine.py"
    file.write_text(source)
    return parse_metric(f"{file}:{function}")


def run(metric: Metric) -> Score:
    return metrics.evaluate(metric, echo, FakeData(np.zeros((1, 1))))


def test_user_metric_with_a_neighbour_module(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_metric.py").write_text("import numpy as np\nX = np.full((2, 2), 3.0)\n")
    source = "from neighbour_of_metric import X\ndef evaluate(predict):\n    return predict({'x': X})['y'].mean()\n"
    metric = user_metric(tmp_path, source)
    score = run(metric)
    assert (score.value, score.interval, score.samples) == (3.0, None, None)
    assert metric.higher_is_better
    assert metrics.compare(score, score) == metrics.Drop(0.0, None)


def test_user_metric_may_say_that_lower_is_better(tmp_path: Path) -> None:
    metric = user_metric(
        tmp_path, "def perplexity(predict): return 7\nperplexity.higher_is_better = False", "perplexity"
    )
    assert isinstance(metric, UserMetric)
    assert metric.drop(7.0, 9.0) == 2.0


def test_user_metric_and_streamed_metric_together(tmp_path: Path, scores: Floats) -> None:
    mine = user_metric(tmp_path, "def evaluate(predict): return 5")
    both = metrics.evaluate_all([mine, METRICS["mse"]], echo, FakeData(scores), echo, 8)
    assert [score.value for score in both] == [5, 0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "def evaluate(p):\n    x = 1\n    return x / 0\n",
            r"ZeroDivisionError(?s:.*)mine.py:3, in evaluate: return x / 0",
        ),
        ("def evaluate(p):\n    p({'z': 1})\n", r"raised KeyError(?s:.*)mine.py:2, in evaluate: p\({'z': 1}\): 'x'"),
        ("def evaluate(p): raise SystemExit(3)", "raised SystemExit"),
        ("def evaluate(p): pass", "returned NoneType, not a number"),
        ("def evaluate(p): return '0.5'", "returned str, not a number"),
        ("def evaluate(p): return [1.0]", "returned list, not a number"),
        ("import numpy\ndef evaluate(p): return numpy.ones(1)", "returned ndarray, not a number"),
        ("def evaluate(p): return float('nan')", "returned NaN"),
    ],
)
def test_user_metric_that_fails(tmp_path: Path, source: str, message: str) -> None:
    metric = user_metric(tmp_path, source)
    with pytest.raises(OptionError, match=message):
        run(metric)


@pytest.mark.parametrize(
    ("source", "function", "message"),
    [
        (
            "def evaluate(p: return 1",
            "evaluate",
            r"does not import: SyntaxError(?s:.*)mine.py:1: def evaluate\(p: return",
        ),
        ("import no_such_module_here", "evaluate", r"ModuleNotFoundError(?s:.*)mine.py:1, in <module>"),
        ("def evaluate(p): return 1", "evaluat", r"no function 'evaluat'(?s:.*)did you mean 'evaluate'"),
        ("evaluate = 3", "evaluate", "no function 'evaluate'"),
    ],
)
def test_user_metric_that_does_not_load(tmp_path: Path, source: str, function: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        user_metric(tmp_path, source, function)


def test_user_metric_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no such file"):
        parse_metric(f"{tmp_path}/none.py:evaluate")


# --- how likely answers are -----------------------------------------------------------------------------------------

SURE = 2.0
"""By how much the model's scores are too large to be as sure as it is right."""


def sure(samples: int = 4000, classes: int = 8) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """How likely each class is, the scores of a model that is too sure of it, and labels drawn."""
    random = np.random.default_rng(5)
    likely = scipy.special.softmax(random.normal(scale=1.5, size=(samples, classes)), axis=1)
    labels = (random.random((samples, 1)) > likely.cumsum(1)).sum(1)
    return likely, SURE * np.log(likely), labels


def beside(name: str, *temperatures: float) -> metrics.Likelihoods:
    found = metrics.Likelihoods.beside(METRICS[name], temperatures)
    assert found is not None
    return found


def rows(metric: metrics.StreamedMetric, outputs: Floats, labels: NDArray[np.int64]) -> Floats:
    data = FakeData(np.zeros((len(labels), 1)), {"label": labels})
    (found,) = metrics.rows_of([metric], constant(outputs), data, None, len(labels))
    return found


def test_the_least_surprise_tells_how_sure_a_model_may_be() -> None:
    _, scores, labels = sure()
    temperatures = (0.5, 1.0, 1.5, 2.0, 2.5, 4.0)
    for outputs in (scores, scipy.special.softmax(scores, axis=1)):
        means = rows(beside("accuracy", *temperatures).surprise, outputs, labels).mean((0, 1))
        assert temperatures[means.argmin()] == SURE
        oracle = -scipy.special.log_softmax(scores / SURE, axis=1)[np.arange(4000), labels].mean()
        assert means[3] == pytest.approx(oracle, rel=1e-6)


@pytest.mark.parametrize(("name", "k"), [("accuracy", 1), ("top5", 5)])
def test_the_expected_loss_is_the_counted_one_with_less_noise(name: str, k: int) -> None:
    likely, scores, labels = sure()
    worse = scores + np.random.default_rng(6).normal(scale=1.0, size=scores.shape)
    told = beside(name, SURE)
    expected = metrics.expected_drop(rows(told.scores, scores, labels), rows(told.answers, worse, labels), SURE)
    best, other = (np.argsort(-each, axis=1)[:, :k] for each in (scores, worse))
    oracle = (np.take_along_axis(likely, best, 1) - np.take_along_axis(likely, other, 1)).sum(1).mean()
    assert expected.value == pytest.approx(oracle, rel=1e-6)
    data = FakeData(np.zeros((4000, 1)), {"label": labels})
    before, after = (metrics.evaluate(METRICS[name], constant(each), data, None, 4000) for each in (scores, worse))
    counted = metrics.compare(before, after)
    assert counted.standard_error is not None
    assert expected.standard_error is not None
    assert abs(counted.value - expected.value) < 2.5 * counted.standard_error
    assert expected.standard_error < counted.standard_error / 2


def test_what_is_no_answer_is_right_with_no_likelihood() -> None:
    likely, scores, labels = sure(10)
    broken = np.where(np.arange(10)[:, None] == 3, np.nan, scores)
    told = beside("accuracy", SURE)
    found = metrics.expected_drop(rows(told.scores, scores, labels), rows(told.answers, broken, labels), SURE)
    assert found.value == pytest.approx(likely[3].max() / 10)


def test_only_metrics_that_count_labels_have_likelihoods() -> None:
    assert metrics.Likelihoods.beside(METRICS["agreement"], (1.0,)) is None


def test_labels_of_each_pixel_tell_no_likelihood() -> None:
    wanted = beside("accuracy", 1.0).surprise
    data = FakeData(np.zeros((2, 1)), {"label": np.zeros((2, 4, 4), int)})
    with pytest.raises(DataError, match="several labels"):
        metrics.evaluate(wanted, constant(np.random.default_rng(0).normal(size=(2, 3, 4, 4))), data, None, 2)
