"""Made-up inputs have the right form and are the same for the same seed."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnxcomp.model import TensorSpec
from onnxcomp.synthetic import synthetic


def spec(name: str, *shape: int | str | None, dtype: Any = np.float32) -> TensorSpec:
    return TensorSpec(name, np.dtype(dtype), shape)


def test_a_language_model() -> None:
    ids, mask, types, positions = (
        spec(name, "batch", "sequence", dtype="i8")
        for name in ("input_ids", "attention_mask", "token_type_ids", "position_ids")
    )
    past = spec("past", "batch", 2, "sequence", 4)
    data = synthetic([ids, mask, types, positions, past], 9, seed=1, vocabulary={"input_ids": 30})
    (batch,) = data.batches(9)
    length = batch.feeds["input_ids"].shape[1]
    assert batch.valid == 9
    assert batch.feeds["past"].shape == (9, 2, length, 4)
    assert 2 < batch.feeds["input_ids"].max() < 30
    assert batch.feeds["input_ids"].min() >= 0
    assert np.all(batch.feeds["attention_mask"] == 1)
    assert np.all(batch.feeds["token_type_ids"] == 0)
    assert np.array_equal(batch.feeds["position_ids"][3], np.arange(length))


def test_the_seed_decides() -> None:
    specs = [spec("x", "batch", 8), spec("text", "batch", dtype=object)]
    assert synthetic(specs, 5, seed=3).fingerprint() == synthetic(specs, 5, seed=3).fingerprint()
    assert synthetic(specs, 5, seed=3).fingerprint() != synthetic(specs, 5, seed=4).fingerprint()
    first, second = synthetic(specs, 2)
    assert not np.array_equal(first.feeds["x"], second.feeds["x"])


def test_floats_are_standard_normal() -> None:
    values = np.concatenate([batch.feeds["x"] for batch in synthetic([spec("x", None, 1000)], 20)])
    # 20,000 draws: the mean has a standard error of 0.007, the standard deviation of 0.005.
    assert abs(values.mean()) < 0.03
    assert abs(values.std() - 1) < 0.02


@pytest.mark.parametrize(
    "dtype",
    [
        *("f2", "f4", "f8", "i1", "u2", "i8", "?", "c8", object),
        *(ml_dtypes.bfloat16, ml_dtypes.int4, ml_dtypes.float8_e8m0fnu),
    ],
)
def test_every_dtype(dtype: Any) -> None:
    (sample,) = synthetic([spec("x", 30, dtype=dtype)], 1)
    assert sample.feeds["x"].dtype == np.dtype(dtype)
    assert sample.feeds["x"].shape == (30,)


def test_images_of_unknown_size_are_large_enough_to_shrink() -> None:
    (sample,) = synthetic([spec("image", "n", 3, "h", "w", dtype=np.uint8)], 1)
    assert sample.feeds["image"].shape == (1, 3, 64, 64)
    assert sample.feeds["image"].max() > 200


def test_the_same_axis_has_one_length_and_is_not_batched_when_it_is_none() -> None:
    data = synthetic([spec("a", "m", "k"), spec("b", "k", "n"), spec("s")], 2)
    for batch in data.batches(2):
        assert batch.feeds["a"].shape[1] == batch.feeds["b"].shape[0]
        assert batch.feeds["s"].shape == ()
    assert [batch.feeds["x"].shape for batch in synthetic([spec("x", "n", "n")], 2).batches(2)] == [(1, 1)] * 2


def test_fixed_shapes_and_unknown_ranks() -> None:
    specs = [spec("x", 4, 2), TensorSpec("y", np.dtype("f4"), None)]
    for batch in synthetic(specs, 3).batches(16):
        assert batch.feeds["x"].shape == (4, 2)
        assert batch.feeds["y"].shape == (1,)
    assert len(list(synthetic([], 3).batches())) == 3
