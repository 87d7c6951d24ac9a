"""Batches, views, padding and the checks against the model's inputs."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcomp.errors import DataError
from onnxcomp.model import TensorSpec
from onnxcomp.samples import Batch, Dataset, checked_sample


def spec(name: str, *shape: int | str | None, dtype: Any = np.float32) -> TensorSpec:
    return TensorSpec(name, np.dtype(dtype), shape)


def rows(specs: tuple[TensorSpec, ...], array: np.ndarray, **settings: Any) -> Dataset:
    """A dataset of the rows of one array, with their numbers as targets."""

    def read(index: int) -> Batch:
        raw, targets = {specs[0].name: array[index : index + 1]}, {"row": np.array([index])}
        return checked_sample(raw, targets, specs, f"row {index}", pads=True)

    return Dataset(specs, len(array), read, **settings)


def refusal(raw: Mapping[str, Any], *specs: TensorSpec, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        checked_sample(raw, {}, specs, "sample 7", **settings)
    assert caught.value.fact.startswith("sample 7 does not fit the model")
    assert caught.value.remedy
    return str(caught.value)


@given(
    count=st.integers(1, 20), fixed=st.sampled_from([1, 3, 4, "batch", None]), size=st.sampled_from([None, 1, 5, 32])
)
def test_batches_hold_every_row_once_and_in_order(count: int, fixed: int | str | None, size: int | None) -> None:
    array = np.arange(count * 2, dtype=np.float32).reshape(count, 2)
    batches = list(rows((spec("x", fixed, 2),), array).batches(size))
    seen = np.concatenate([batch.trim({"y": batch.feeds["x"]})["y"] for batch in batches])
    assert np.array_equal(seen, array)
    assert np.array_equal(np.concatenate([batch.targets["row"] for batch in batches]), np.arange(count))
    limit = fixed if isinstance(fixed, int) else size or 1
    assert [batch.valid for batch in batches[:-1]] == [limit] * (len(batches) - 1)
    if isinstance(fixed, int):
        assert {len(batch.feeds["x"]) for batch in batches} == {fixed}
        assert batches[-1].padding == -count % fixed
    else:
        assert not any(batch.padding for batch in batches)


def test_padding_repeats_the_last_row() -> None:
    (batch,) = rows((spec("x", 4, 1),), np.array([[1.0], [2.0]], np.float32)).batches()
    assert batch.feeds["x"].tolist() == [[1], [2], [2], [2]]
    assert (batch.valid, batch.padding) == (2, 2)


def test_trim_leaves_outputs_without_a_batch_axis() -> None:
    batch = Batch({}, {}, valid=2, padding=2)
    trimmed = batch.trim({"rows": np.arange(4), "scalar": np.array(5.0), "other": np.arange(3)})
    assert trimmed["rows"].tolist() == [0, 1]
    assert trimmed["scalar"] == 5
    assert trimmed["other"].tolist() == [0, 1, 2]


def test_unlike_shapes_do_not_share_a_batch() -> None:
    specs = (spec("ids", "batch", "length"),)
    lengths = [3, 3, 5, 5, 5, 3]
    data = Dataset(
        specs, 6, lambda index: checked_sample({"ids": np.ones((1, lengths[index]), "f4")}, {}, specs, "sample")
    )
    assert [batch.feeds["ids"].shape for batch in data.batches(2)] == [(2, 3), (2, 5), (1, 5), (1, 3)]


def test_runs_of_several_rows_and_of_no_common_axis_stay_as_they_are() -> None:
    specs = (spec("x", "batch", 2),)
    runs = Dataset(specs, 2, lambda _: checked_sample({"x": np.ones((3, 2), "f4")}, {}, specs, "run"), stackable=False)
    assert [(len(batch.feeds["x"]), batch.valid) for batch in runs.batches(8)] == [(3, 3)] * 2
    scalars = (spec("x", 1, 2), spec("s"))
    sample = checked_sample({"x": np.ones((1, 2), "f4"), "s": np.array(1, "f4")}, {}, scalars, "run")
    assert [batch.valid for batch in Dataset(scalars, 2, lambda _: sample).batches(2)] == [1, 1]


def test_select_is_a_sorted_view_of_a_view() -> None:
    data = rows((spec("x", None, 1),), np.arange(10, dtype="f4")[:, None], constants={"c": np.ones(3)})
    view = data.select([9, 2, 5]).select([2, 0])
    assert [float(batch.feeds["x"][0, 0]) for batch in view.batches()] == [2, 9]
    assert len(view) == 2
    assert view.targets == ("row",)
    assert "c" in view.constants


def test_fingerprint_depends_on_content_alone() -> None:
    specs, array = (spec("x", None, 2),), np.arange(8, dtype="f4").reshape(4, 2)
    whole = rows(specs, array)
    assert whole.fingerprint() == rows(specs, array.copy(), origin="elsewhere").fingerprint()
    changed = array.copy()
    changed[3, 1] += 1
    others = [rows(specs, changed), whole.select([0, 1, 2]), rows(specs, array, constants={"c": np.ones(1)})]
    assert len({whole.fingerprint(), *(other.fingerprint() for other in others)}) == 4


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (">i8", "i8"),
        (">f4", "f4"),
        ("f4", ml_dtypes.bfloat16),
        ("?", "?"),
        ("c8", "c8"),
    ],
)
def test_the_same_type_in_another_guise(given: Any, wanted: Any) -> None:
    array = np.array([[0, 1, 1]]).astype(given)
    feed = checked_sample({"x": array}, {}, (spec("x", None, 3, dtype=wanted),), "sample").feeds["x"]
    assert feed.dtype == np.dtype(wanted)
    assert np.array_equal(feed.astype("c8"), array.astype("c8"))


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("i8", "i4"),
        ("i4", "i8"),
        ("f8", "f4"),
        ("f4", "f2"),
        ("u1", "f4"),
        ("f4", "i8"),
        ("?", "i8"),
        ("i4", "u8"),
        ("U1", "f4"),
        ("i8", "O"),
    ],
)
def test_other_types_are_refused(given: str, wanted: str) -> None:
    message = refusal({"x": np.array(["1"]).astype(given)}, spec("x", None, dtype=wanted))
    assert f"the model takes {'str' if wanted == 'O' else np.dtype(wanted).name}" in message


@pytest.mark.parametrize(
    "text", [np.array(["ä", "b"]), np.char.encode(["ä", "b"], "utf-8"), np.array(["ä", "b"], object)]
)
def test_strings(text: np.ndarray) -> None:
    feed = checked_sample({"x": text}, {}, (spec("x", None, dtype=object),), "sample").feeds["x"]
    assert feed.dtype == object
    assert feed.tolist() == ["ä", "b"]


def test_bytes_that_are_no_text_are_refused() -> None:
    assert "the model takes str" in refusal({"x": np.array([b"\xff"])}, spec("x", None, dtype=object))


def test_values_beyond_the_range_are_named() -> None:
    message = refusal({"x": np.array([1.0, -1e6], "f4")}, spec("x", None, dtype=ml_dtypes.float8_e5m2))
    assert "holds -1000000.0 at [1], beyond the range of float8_e5m2" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named(value: float) -> None:
    array = np.zeros((1, 2, 3), np.float32)
    array[0, 1, 2] = value
    assert f"'x' holds {value} at [0, 1, 2]" in refusal({"x": array}, spec("x", None, 2, 3))
    assert f"'s' holds {value} at []" in refusal({"s": np.array(value, "f4")}, spec("s"))


def test_every_mismatch_is_named_at_once() -> None:
    message = refusal(
        {"input_id": np.ones((1, 4), "i8"), "image": np.ones((1, 3, 8), "f4"), "wide": np.ones((1, 5), "f4")},
        spec("input_ids", "batch", "length", dtype="i8"),
        spec("image", "batch", 3, 8, None),
        spec("wide", "batch", 4),
    )
    assert "no key for input 'input_ids'; did you mean 'input_id'?" in message
    assert "'image' has shape [1, 3, 8], the model takes [batch, 3, 8, ?]" in message
    assert "'wide' has shape [1, 5], the model takes [batch, 4]: axis 1 differs" in message


def test_a_short_run_fits_a_fixed_batch_only_where_it_is_padded() -> None:
    raw = {"x": np.ones((2, 3), "f4")}
    assert checked_sample(raw, {}, (spec("x", 4, 3),), "sample", pads=True).valid == 2
    assert "axis 0 differs" in refusal(raw, spec("x", 4, 3))
    assert "axis 0 differs" in refusal({"x": np.ones((5, 3), "f4")}, spec("x", 4, 3), pads=True)


def test_empty_arrays_are_refused_unless_the_model_takes_them() -> None:
    assert "is empty" in refusal({"x": np.ones((1, 0), "f4")}, spec("x", None, None))
    assert checked_sample({"x": np.ones((1, 0), "f4")}, {}, (spec("x", None, 0),), "sample").valid == 1


def test_inputs_of_unknown_rank_take_anything() -> None:
    unknown = TensorSpec("x", np.dtype("f4"), None)
    assert checked_sample({"x": np.ones((2, 3, 4), "f4")}, {}, (unknown,), "sample").valid == 2
