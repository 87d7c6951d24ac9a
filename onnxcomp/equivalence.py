"""Do two models compute the same? Asked by running both on the same inputs."""

from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.core import Context
from onnxcomp.errors import OnnxcompError
from onnxcomp.runtime import Feeds, Session

TOLERANCE = {"float16": 5e-3, "bfloat16": 3e-2, "float32": 1e-4, "float64": 1e-6, "complex64": 1e-4, "complex128": 1e-6}
"""Largest error relative to the output's largest value: re-associated sums, not new math. Other types must be equal."""


class Reference:
    """A model and what it answers on a few inputs, to hold rewritten versions against.

    Args:
        model: the original.
        context: its data give the inputs, or synthetic ones where there are none.

    Raises:
        ModelError: ONNX Runtime does not load the original.
    """

    def __init__(self, model: ir.Model, context: Context) -> None:
        self._target = context.target
        session = Session(model, self._target)
        self._cases: list[tuple[Feeds, Feeds]] = []
        for feeds in context.examples(model):
            try:
                self._cases.append((feeds, session.run(feeds)))
            except OnnxcompError:  # the original refuses these inputs: nothing can be learnt from them
                continue

    def difference(self, model: ir.Model) -> str | None:
        """Why the model is not equivalent, or None."""
        try:
            session = Session(model, self._target)
            for feeds, expected in self._cases:
                outputs = session.run(feeds)
                for name, value in expected.items():
                    if (problem := unequal(value, outputs[name])) is not None:
                        return f"output '{name}' {problem}"
        except OnnxcompError as error:
            return error.fact
        return None


def unequal(expected: Any, actual: Any) -> str | None:
    """Why two outputs differ beyond rounding, or None; sequences are compared element by element."""
    if isinstance(expected, (list, tuple)):
        if len(expected) != len(actual):
            return f"has {len(actual)} elements, not {len(expected)}"
        return next((p for a, b in zip(expected, actual, strict=True) if (p := unequal(a, b)) is not None), None)
    if not isinstance(expected, np.ndarray | np.generic):
        return None if expected == actual else "differs"
    expected, actual = np.asarray(expected), np.asarray(actual)
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return f"is {actual.dtype}{list(actual.shape)}, not {expected.dtype}{list(expected.shape)}"
    if expected.dtype.name not in TOLERANCE or expected.size == 0:
        if expected.dtype.kind == "V":  # float8 and the like, where NaN is to equal NaN
            expected, actual = expected.astype(np.float64), actual.astype(np.float64)
        return None if np.array_equal(expected, actual, equal_nan=expected.dtype.kind == "f") else "differs"
    a, b = (np.asarray(v, np.complex128 if expected.dtype.kind == "c" else np.float64) for v in (expected, actual))
    finite = np.isfinite(a)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return "differs in where it is not finite"
    if not finite.any():
        return None
    a, b = a[finite], b[finite]
    bound = TOLERANCE[expected.dtype.name] * max(float(np.abs(a).max()), 1e-6)
    worst = float(np.abs(a - b).max())
    return None if worst <= bound else f"differs by {worst:.3g}, more than {bound:.3g}"
