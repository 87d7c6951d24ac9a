"""What is padding in data, by a mask and by what the model says without it."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from onnxcomp import model as models
from onnxcomp.budget import Budget
from onnxcomp.calibration import calibrate
from onnxcomp.conversion import convert
from onnxcomp.core import Context
from onnxcomp.data import open_dataset
from onnxcomp.effects import Answers
from onnxcomp.layers import layers
from onnxcomp.measure import evaluate
from onnxcomp.padding import noted, notes_on
from onnxcomp.passes.prune import Prune
from onnxcomp.passes.quantize_dynamic import QuantizeDynamic
from onnxcomp.runtime import Session, Target
from onnxcomp.samples import Dataset
from onnxcomp.verification import verify

LENGTH = 10
COUNT = 40
CPU = Target(threads=1)

SUMS = "masked = Mul(x, mask3) y = ReduceSum <keepdims=0> (masked, axis)"
"""Of what the mask leaves, over all positions."""
MEANS = "y = ReduceMean <axes=[1], keepdims=0> (h)"
EACH = "y = Relu(h)"


def model(last: str, length: int | str = "length", outputs: str = "n, 6") -> Any:
    text = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[n, {length}, 4] x0, float[n, {length}] mask) => (float[{outputs}] y)
    <float[4, 6] w = {{{", ".join(f"{number:.3f}" for number in np.random.default_rng(0).normal(size=24))}}},
     int64[1] axis = {{1}}, int64[1] end = {{2}}>
    {{ h = MatMul(x0, w) mask3 = Unsqueeze(mask, end) x = Identity(h) {last} }}
    """
    return onnx.parser.parse_model(text)


def columns(*, left: bool = False, masked: bool = True, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Sequences of two to ten positions; behind them, or before, there are large numbers."""
    random = np.random.default_rng(seed)
    lengths = np.where(np.arange(COUNT) % 4, random.integers(2, LENGTH, COUNT), LENGTH)
    mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.float32)
    mask = mask[:, ::-1].copy() if left else mask
    x = random.normal(size=(COUNT, LENGTH, 4)).astype(np.float32) + 50 * (1 - mask)[:, :, None]
    return {"x0": x, "mask": mask if masked else np.ones_like(mask)}


def opened(proto: Any, data: Any) -> Dataset:
    loaded = models.load(proto)
    return noted(open_dataset(data, models.input_specs(loaded)), lambda: Session(loaded, CPU))


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(("last", "outputs"), [(SUMS, "n, 6"), (EACH, "n, length, 6")])
def test_what_a_mask_leaves_out_and_nothing_depends_on_is_padding(last: str, outputs: str, left: bool) -> None:
    given = columns(left=left)
    found = opened(model(last, outputs=outputs), given)
    assert found.padding is not None
    assert found.padding.share == pytest.approx(1 - given["mask"].mean())
    assert [batch.feeds["x0"].shape[1] for batch in found] == [LENGTH] * COUNT
    left_over = list(found.unpadded)
    assert all((batch.feeds["mask"] == 1).all() for batch in left_over)
    assert all(batch.feeds["x0"].max() < 20 for batch in left_over)
    assert sum(batch.feeds["x0"].shape[1] for batch in left_over) == given["mask"].sum()
    assert "'mask'" in notes_on(None, found)[0]


@pytest.mark.parametrize(
    ("proto", "given"),
    [
        (model(MEANS), columns()),
        (model(SUMS), columns(masked=False)),
        (model(SUMS), columns() | {"mask": columns()["mask"] * 0.5}),
        (model(SUMS, LENGTH), columns()),
    ],
    ids=["outputs depend on it", "nothing is masked", "weights", "fixed length"],
)
def test_all_else_stays(proto: Any, given: Any) -> None:
    found = opened(proto, given)
    assert found.padding is None
    assert found.unpadded is found
    assert notes_on(found) == []


def test_what_the_model_cannot_run_without_is_no_padding() -> None:
    """A window of five positions."""
    window = "p = Transpose <perm=[0, 2, 1]> (x) q = AveragePool <kernel_shape=[5]> (p) s = Shape(q) " + SUMS
    assert opened(model(window), columns()).padding is None


def test_samples_of_one_length_share_runs_and_views_keep_their_padding() -> None:
    found = opened(model(SUMS), columns())
    whole = columns()["mask"].sum(1).astype(int)
    runs = [(batch.valid, batch.feeds["x0"].shape[1]) for batch in found.unpadded.batches(64)]
    assert len(runs) == len(set(whole.tolist()))
    assert dict(map(reversed, runs)) == {length: int((whole == length).sum()) for length in whole.tolist()}  # type: ignore[arg-type]
    some = found.select([7, 3, 5])
    assert some.padding is not None
    assert [stop - start for start, stop, _ in some.padding.spans] == whole[[3, 5, 7]].tolist()
    assert sorted(batch.feeds["x0"].shape[1] for batch in some.unpadded) == sorted(whole[[3, 5, 7]].tolist())
    assert found.fingerprint() != open_dataset(columns(), found.specs).fingerprint()


def test_whole_runs_are_cut_to_their_longest_sequence() -> None:
    """Their source says what a run is."""
    given = columns()
    lengths = given["mask"].sum(1).astype(int)
    runs = [{name: array[start : start + 3] for name, array in given.items()} for start in (1, 5, 9)]
    found = opened(model(SUMS), runs)
    wanted = sorted(int(lengths[start : start + 3].max()) for start in (1, 5, 9))
    assert sorted(batch.feeds["x0"].shape[1] for batch in found.unpadded) == wanted
    assert found.unpadded.samples == 9


def test_statistics_are_those_of_what_is_left() -> None:
    proto = model(SUMS)
    loaded, data = models.load(proto), opened(proto, columns())
    (layer,) = layers(loaded)
    gram = calibrate(loaded, data, Context(data, CPU), layers=[layer]).grams[layer.name]
    rows = np.concatenate([batch.feeds["x0"].reshape(-1, 4) for batch in data.unpadded])
    assert np.allclose(gram.second_moment[0], rows.T @ rows / len(rows), rtol=1e-4)


def test_outputs_are_compared_without_it() -> None:
    """Here another model differs in what it says of padding, and only there."""
    original, other = (model(last, outputs="n, length, 6") for last in (EACH, "r = Relu(h) y = Mul(r, mask3)"))
    loaded = models.load(original)
    data = opened(original, columns())
    assert Answers(loaded, data, Context(data, CPU)).error(models.load(other)) == 0
    assert evaluate([original, other], columns(), target=CPU).models[1].score == 0
    beside = evaluate([original, other], columns(), metric=lambda predict: 0.5, target=CPU).models[1]
    assert (beside.score, beside.relative_error) == (0.5, 0)
    told = verify(other, against=original, evaluation=columns(), budget=Budget(max_drop=0.01), target=CPU)
    assert told.passed
    assert told.notes[0].startswith("Padding is left out of what is compared: ")


def test_a_model_that_depends_on_it_is_compared_with_it() -> None:
    """Dynamic INT8 scales by what there is in a run, padding included."""
    original, given = models.load(model(SUMS)), columns()
    made = QuantizeDynamic()(original, Context(None, CPU)).model
    wanted, found = (np.concatenate([Session(m, CPU).run({k: v[i : i + 16] for k, v in given.items()})["y"]
                                     for i in range(0, COUNT, 16)]) for m in (original, made))  # fmt: skip
    error = float(np.sqrt(np.square(wanted - found).sum() / np.square(wanted).sum()))
    told = verify(made, against=original, evaluation=given, budget=Budget(max_drop=1.0), target=CPU)
    assert told.result.score == pytest.approx(error, rel=1e-4)
    assert error > 2 * np.sqrt(Answers(original, opened(original, given), Context(None, CPU)).error(made))
    assert told.notes == ()


def test_a_conversion_learns_without_it_and_says_so() -> None:
    proto = model(SUMS)
    prune = Prune(0.9)
    told = convert(proto, [prune], calib=columns(), target=CPU).report.notes
    assert any("Padding is left out" in note for note in told)
    other = convert(proto, [prune], calib=columns(masked=False), target=CPU).report.notes
    assert not any("Padding" in note for note in other)


def test_a_trained_model_of_letters_has_padding() -> None:
    folder = Path(__file__).parents[1] / "models"
    found = opened(folder / "letters.onnx", folder / "letters_calib.npz")
    assert found.padding is not None
    assert found.padding.mask == "attention_mask"
    assert {name for name, _ in found.padding.axes} == {"input_ids", "attention_mask"}
