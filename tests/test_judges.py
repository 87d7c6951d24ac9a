from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest

from onnxcomp import model as models
from onnxcomp.core import Context
from onnxcomp.errors import DataError, ModelError, OptionError
from onnxcomp.judges import Judges
from onnxcomp.runtime import Session, Target
from onnxcomp.samples import Dataset
from tests.commands import mlp, weights

TARGET = Target(threads=1)


def data(count: int, labels: bool = True, start: int = 0) -> dict[str, Any]:
    """Samples that begin with their own number."""
    x = np.random.default_rng(0).standard_normal((count, 8)).astype("f4")
    x[:, 0] = np.arange(start, start + count)
    return {"x": x} | ({"label": np.arange(count) % 4} if labels else {})


@pytest.fixture
def judges(tmp_path: Path) -> Any:
    model = models.load(mlp(tmp_path / "m.onnx"))

    def build(calib: Any = None, evaluation: Any = None, metric: str | None = None, **options: Any) -> Judges:
        options = {"images": None, "seed": 0, "most": None} | options
        return Judges.of(model, Session(model, TARGET), calib, evaluation, metric, **options)

    return build


def numbers(dataset: Dataset | None) -> set[int]:
    assert dataset is not None
    return {int(sample.feeds["x"][0, 0]) for sample in dataset}


def test_one_dataset_is_dealt_out_in_three_parts(judges: Any) -> None:
    made = judges(data(120))
    parts = [numbers(part) for part in (made.tune, made.judge, made.final)]
    assert [len(part) for part in parts] == [60, 30, 30]
    assert set.union(*parts) == set(range(120))
    assert "accuracy (the data have an integer 'label') on 30 samples held out" in made.description
    assert "judged on 30 others" in made.description
    assert made.notes == ()
    again, other = judges(data(120)), judges(data(120), seed=1)
    assert numbers(again.final) == parts[2] != numbers(other.final)


def test_evaluation_data_are_halved_and_never_learnt_from(judges: Any) -> None:
    made = judges(data(50), data(200, start=1000))
    assert numbers(made.tune) == set(range(50))
    assert numbers(made.judge) | numbers(made.final) == set(range(1000, 1200))
    assert len(numbers(made.judge)) == len(numbers(made.final)) == 100
    assert made.notes == ()


def test_few_evaluation_samples_judge_and_score(judges: Any) -> None:
    made = judges(data(50), data(99, start=1000), most=10)
    assert made.judge is made.final
    assert len(made.final) == 99
    assert "99 samples, too few to split (judge = final)" in made.description
    assert made.notes == ()


def test_few_samples_serve_in_every_role_and_the_note_says_so(judges: Any) -> None:
    made = judges(data(99))
    assert made.tune is made.judge is made.final
    assert "judge = final" in made.description
    assert "flattered" in made.notes[0]


def test_evaluation_data_alone_are_also_learnt_from_and_the_note_says_so(judges: Any) -> None:
    made = judges(evaluation=data(120))
    assert len(made.tune) == 60
    assert not numbers(made.tune) & numbers(made.final)
    assert "no --calib" in made.notes[0]


def test_effort_limits_what_judges_but_not_the_final_score(judges: Any) -> None:
    made = judges(data(400), most=10)
    assert (len(made.judge), len(made.final)) == (10, 100)
    assert "judged on 10 others" in made.description


def test_without_data_it_says_loudly_that_it_guessed(judges: Any) -> None:
    made = judges()
    assert made.tune is None
    assert made.judge is made.final
    assert made.metric.name == "relative-error"
    assert "made-up inputs" in made.notes[0]
    assert "--calib" in made.notes[0]


def test_the_default_metric_follows_the_labels(judges: Any) -> None:
    assert judges(data(20)).metric.name == "accuracy"
    assert judges(data(20, labels=False)).metric.name == "relative-error"
    assert judges(data(20), metric="mse").description.startswith("mse (as asked)")


def test_a_users_metric_is_called_whole(judges: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import numpy as np\ndef evaluate(predict): return predict({'x': np.ones((2, 8), 'f4')})['y'].size\n"
    )
    made = judges(data(304), metric=f"{file}:evaluate")
    assert made.description == f"{file}:evaluate, called whole (judge = final)"
    assert made.tune is not None
    assert (len(made.tune), len(made.judge)) == (266, 38)  # what is not scored is there to learn from
    assert made.final is made.judge
    rows = {float(sample.feeds["x"][0, 0]) for part in (made.tune, made.judge) for sample in part}
    assert len(rows) == 304
    model = models.load(mlp(tmp_path / "m.onnx"))
    session = Session(model, TARGET)
    assert made.score(session, session).value == 8.0
    assert made.score(session, session, final=True).value == 8.0


def test_scores_come_from_the_part_that_is_asked_for(judges: Any, tmp_path: Path) -> None:
    made = judges(data(50), data(200, start=1000))
    session = Session(models.load(mlp(tmp_path / "m.onnx")), TARGET)
    for part, final in ((made.judge, False), (made.final, True)):
        feeds = np.concatenate([sample.feeds["x"] for sample in part])
        labels = np.concatenate([sample.targets["label"] for sample in part])
        hits = session.run({"x": feeds})["y"].argmax(1) == labels
        assert made.score(session, session, final=final).value == pytest.approx(hits.mean())


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_a_run_has_the_rows_asked_for_although_samples_are_few(judges: Any, rows: int) -> None:
    assert judges(data(5)).run_of(rows).feeds["x"].shape == (rows, 8)
    assert judges().run_of(rows).feeds["x"].shape == (rows, 8)


def test_a_run_keeps_a_fixed_batch_and_what_the_source_calls_a_run(judges: Any) -> None:
    runs = [{"x": data(4)["x"]} for _ in range(3)]
    assert judges(runs).run_of(16).feeds["x"].shape == (4, 8)


def test_bad_data_and_metrics_are_refused(judges: Any) -> None:
    with pytest.raises(DataError, match="no key for input 'x'"):
        judges({"z": np.ones((3, 8), "f4")})
    with pytest.raises(OptionError, match="unknown metric"):
        judges(data(5), metric="acuracy")


def test_accuracy_without_labels_is_refused(judges: Any, tmp_path: Path) -> None:
    session = Session(models.load(mlp(tmp_path / "m.onnx")), TARGET)
    made = judges(data(5, labels=False), metric="accuracy")
    with pytest.raises(DataError, match="accuracy needs an integer 'label'"):
        made.score(session, session)


def test_inputs_that_are_no_tensors_are_refused() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (seq(float[N]) s) => (float[M] y) { y = ConcatFromSequence <axis = 0> (s) }"""
    )
    model = models.load(proto)
    with pytest.raises(ModelError, match="not a tensor"):
        Judges.of(model, Session(model, TARGET), None, None, None, None, 0, None)


def answered(original: Session, count: int = 400) -> dict[str, Any]:
    """Samples whose labels are as likely as the model says."""
    given = data(count, labels=False)
    given["x"][:, 0] = 0
    (scores,) = original.run(given).values()
    noisy = np.asarray(scores, np.float64) + np.random.default_rng(1).gumbel(size=np.shape(scores))
    return given | {"label": noisy.argmax(1)}


@pytest.fixture
def original(tmp_path: Path) -> Session:
    return Session(models.load(mlp(tmp_path / "original.onnx")), TARGET)


@pytest.fixture
def other(tmp_path: Path) -> Session:
    negated = {name: -array for name, array in weights().items()}
    return Session(models.load(mlp(tmp_path / "other.onnx", negated)), TARGET)


def test_labels_and_scores_tell_losses_by_likelihoods_too(judges: Any, original: Session, other: Session) -> None:
    made = judges(answered(original))
    baseline = made.baseline(original)
    assert 0.25 < baseline.temperature < 16
    assert len(baseline.scores) == baseline.score.samples == 100
    counted, expected = made.compared(other, original, baseline)
    assert expected.value > 0
    assert expected.standard_error < counted.standard_error
    assert abs(expected.value - counted.value) < 3 * counted.standard_error
    assert made.compared(original, original, baseline)[1].value == 0


@pytest.mark.parametrize(("labels", "metric"), [(True, "agreement"), (False, None)])
def test_without_labels_that_count_nothing_is_likely(
    judges: Any, original: Session, other: Session, labels: bool, metric: str | None
) -> None:
    made = judges(data(120, labels), metric=metric)
    baseline = made.baseline(original)
    assert baseline.temperature is baseline.scores is None
    counted, expected = made.compared(other, original, baseline)
    assert counted.value > 0
    assert expected is None


def test_likelihoods_above_the_memory_cap_are_left_out(judges: Any, original: Session) -> None:
    made = judges(answered(original))
    needed = 100 * 4 * 8 * 8  # samples, classes, bytes, and an eighth of the cap
    assert made.baseline(original, Context(memory=needed)).scores is not None
    assert made.baseline(original, Context(memory=needed - 1)).scores is None


def test_labels_of_each_position_tell_no_likelihood(judges: Any, tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> g (float[N, 3, 4] x) => (float[N, 3, 4] y) { y = Relu(x) }"""
    )
    session = Session(models.load(proto), TARGET)
    x = np.random.default_rng(0).standard_normal((80, 3, 4)).astype("f4")
    made = Judges.of(models.load(proto), session, {"x": x, "label": x.argmax(2)}, None, None, None, 0, None)
    baseline = made.baseline(session)
    assert baseline.score.value == pytest.approx(1, abs=0.2)
    assert baseline.temperature is None
