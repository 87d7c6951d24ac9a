"""Equal up to rounding, and not a bit more."""

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from models import zoo
from onnxcomp import model as models
from onnxcomp.core import Context
from onnxcomp.equivalence import TOLERANCE, Reference, unequal
from onnxcomp.errors import ModelError

GENERATOR = np.random.default_rng(0)
FLOATS = GENERATOR.normal(size=(4, 5))
DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in TOLERANCE}


@pytest.mark.parametrize("name", DTYPES)
def test_rounding_of_the_type_is_granted(name: str) -> None:
    values = FLOATS.astype(DTYPES[name])
    # A sum of ten terms in another order: an error of a few units in the last place of the largest.
    epsilon = float(ml_dtypes.finfo(values.real.dtype).eps)  # type: ignore[no-untyped-call]
    assert TOLERANCE[name] > 3 * epsilon
    assert unequal(values, values) is None
    assert unequal(values, (values + np.abs(values).max() * 2 * epsilon).astype(values.dtype)) is None


@pytest.mark.parametrize("name", DTYPES)
def test_more_than_rounding_is_not(name: str) -> None:
    values = FLOATS.astype(DTYPES[name])
    other = values.copy()
    other[2, 3] += np.abs(values).max() * 4 * TOLERANCE[name]
    assert "differs by" in (unequal(values, other) or "")


def test_tolerance_is_relative_to_the_largest_value() -> None:
    small = (FLOATS * 1e-3).astype(np.float32)
    other = small + np.float32(1e-5)
    assert unequal(small, other) is not None
    assert unequal(np.append(small, np.float32(1)), np.append(other, np.float32(1))) is None


INF, NAN = np.inf, np.nan


def floats(values: Any) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def ints(values: Any) -> NDArray[np.int64]:
    return np.array(values, np.int64)


@pytest.mark.parametrize(
    ("expected", "actual", "equal"),
    [
        (floats([1, NAN, INF]), floats([1, NAN, INF]), True),
        (floats([1, NAN, INF]), floats([1, NAN, -INF]), False),
        (floats([1, NAN]), floats([1, 2]), False),
        (floats([1, 2]), floats([1, NAN]), False),
        (floats([1, 2]), floats([1, INF]), False),
        (floats([NAN, NAN]), floats([NAN, NAN]), True),
        (floats([]), floats([]), True),
        (floats(1), floats([1]), False),
        (np.float32(1), np.float32(1 + 1e-6), True),
        (floats([0, 0]), floats([0, 1e-3]), False),
        (ints([1, 2]), ints([1, 2]), True),
        (ints([1, 2]), ints([1, 3]), False),
        (ints([1, 2]), np.array([1, 2], np.int32), False),
        (np.array([1, 2], ml_dtypes.int4), np.array([1, 3], ml_dtypes.int4), False),
        (np.array([True, False]), np.array([True, True]), False),
        (np.array(["a", "b"], object), np.array(["a", "b"], object), True),
        (np.array(["a", "b"], object), np.array(["a", "c"], object), False),
        ([ints([1]), floats([2])], [ints([1]), floats([2])], True),
        ([ints([1]), floats([2])], [ints([1]), floats([3])], False),
        ([ints([1])], [], False),
        ([{"a": 1.0}], [{"a": 1.0}], True),
        ([{"a": 1.0}], [{"a": 2.0}], False),
        (None, None, True),
    ],
)
def test_values_of_every_kind(expected: Any, actual: Any, equal: bool) -> None:
    assert (unequal(expected, actual) is None) == equal


def test_differences_are_told() -> None:
    assert unequal(np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32)) == "is float32[3, 2], not float32[2, 3]"
    assert unequal([1, 2], [1]) == "has 1 elements, not 2"
    assert unequal(floats([1, 2]), floats([1, 2.5])) == "differs by 0.5, more than 0.0002"


def scaled(model: ir.Model, factor: float) -> ir.Model:
    """The model with its last bias multiplied."""
    clone = model.clone()
    bias = clone.graph.outputs[0].producer().inputs[2]  # type: ignore[union-attr]
    assert bias is not None
    assert bias.const_value is not None
    bias.const_value = ir.tensor(bias.const_value.numpy() * np.float32(factor), name=bias.name)
    return clone


def test_a_model_equals_itself_and_not_another() -> None:
    model = models.load(zoo.build("resnet"))
    reference = Reference(model, Context(batch=2))
    assert reference.difference(model) is None
    assert reference.difference(scaled(model, 1 + 1e-6)) is None
    assert "output 'logits' differs by" in (reference.difference(scaled(model, 1.5)) or "")


def test_a_broken_rewrite_is_a_difference() -> None:
    model = models.load(zoo.build("resnet"))
    broken = model.clone()
    next(node for node in broken.graph if node.op_type == "Relu").op_type = "Mystery"
    assert "does not load" in (Reference(model, Context()).difference(broken) or "")


def test_an_original_that_does_not_load_is_refused() -> None:
    with pytest.raises(ModelError, match="does not load"):
        Reference(models.load(zoo.build("custom_domain")), Context())
