"""Layers in a row fitted together to what the last one is to give, on part of the samples.

They stay so if that helps on others.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxcomp.core import Context
from onnxcomp.errors import OnnxcompError
from onnxcomp.numerics import joint
from onnxcomp.prefix import part_between
from onnxcomp.runtime import Session
from onnxcomp.twins import Pair, Twins

_ROWS = 65536
_SAMPLES = 32
"""At least, even where fewer have as many rows."""
_HELD_OUT = 0.2
"""Share of them on which it is judged whether fitting layers together helped."""


def fit_together(block: list[Pair], changed: ir.Model, twins: Twins, samples: int, context: Context) -> str | bool:
    """Fit layers in a row to what the last one is to give, where that helps on samples held out.

    Returns:
        Whether it does, or why that cannot be tried.
    """
    row = [pair.after for pair in block]
    parts = _parts(block, twins, samples, context)
    if isinstance(parts, str):
        return parts
    try:
        links = _links(block, changed, context)
        fitted = joint.fit(links, *parts, seed=context.seed)
    except OnnxcompError as error:
        return f"what lies between it and its neighbours does not run by itself: {error.fact}"
    except np.linalg.LinAlgError:
        return "its inputs do not vary"
    helped = any(not np.array_equal(weight, link.weight) for link, (weight, _) in zip(links, fitted, strict=True))
    for layer, (weight, bias) in zip(row, fitted, strict=True) if helped else ():
        layer.set_matrix(weight.reshape(-1, weight.shape[2]))
        if bias is not None:
            layer.set_bias(bias.ravel())
    return helped


def _parts(
    block: list[Pair], twins: Twins, samples: int, context: Context
) -> tuple[list[joint.Part], list[joint.Part]] | str:
    """What the block reads and is to give, on samples to fit and on others; or why that cannot be had."""
    first, last, before = block[0].after, block[-1], block[-1].before
    assert before is not None
    everything = np.iinfo(np.int64).max
    random = np.random.default_rng(context.seed)
    uses: NDArray[np.int64] | None = None  # by sample: 0 to fit, 1 held out, 2 not at all
    parts: tuple[list[joint.Part], list[joint.Part]] = [], []
    seen = 0
    for run in twins.runs(last, first):
        arrays = [run.data, run.wanted, *([] if run.added is None else [run.added])]
        valid = run.batch.valid
        if any(array.dtype != np.float32 or array.shape[:1] != (valid,) for array in arrays):
            return "its activations are not float32 with one row for each sample"
        if uses is None:
            rows = run.wanted.size // before.outputs / valid
            room = context.memory / 8 / (4 * rows * sum(pair.after.input_width * pair.after.groups for pair in block))
            count = int(min(max(_ROWS / rows, _SAMPLES), room, samples * (1 - _HELD_OUT)))
            if count < min(_SAMPLES, samples * (1 - _HELD_OUT) - 1):
                return "the memory cap leaves no room for enough samples"
            held_out = max(int(count * _HELD_OUT), 1)
            uses = np.repeat([0, 1, 2], [count, held_out, max(samples - count - held_out, 0)])
            random.shuffle(uses)
        for use, found in enumerate(parts):
            chosen = np.flatnonzero(uses[seen : seen + valid] == use)
            if len(chosen):
                part = run._replace(wanted=run.wanted[chosen], added=None if run.added is None else run.added[chosen])
                found.append(joint.Part(run.data[chosen], part.target(last, everything, lambda: random)))
        seen += valid
    return parts if all(parts) else "there are too few samples"


def _links(block: list[Pair], model: ir.Model, context: Context) -> list[joint.Link]:
    result = []
    row = [pair.after for pair in block]
    for pair, layer, follower in zip(block, row, [*row[1:], None], strict=True):
        matrix = layer.matrix().astype(np.float64)
        bias = layer.bias_vector().reshape(layer.groups, -1) if layer.adds_bias and pair.before is not None else None
        function = _identity if follower is None else _function(layer.node.outputs[0], follower.data, model, context)
        everything = np.iinfo(np.int64).max
        drawn = np.random.default_rng(0)  # nothing is drawn where all rows are taken
        result.append(
            joint.Link(
                matrix.reshape(layer.groups, -1, matrix.shape[1]),
                bias,
                partial(layer.rows, count=everything, generator=drawn),
                layer.from_rows,
                layer.from_output_rows,
                partial(layer.output_rows, count=everything, generator=drawn),
                function,
            )
        )
    return result


def _identity(array: joint.Tensor) -> joint.Tensor:
    return array


def _function(source: ir.Value, result: ir.Value, model: ir.Model, context: Context) -> Callable[[joint.Tensor], Any]:
    """What leads from one value to another."""
    if source is result:
        return _identity
    given, made = source.name or "", result.name or ""
    session = Session(part_between(model, {given}, [made]), replace(context.target, threads=1), spinning=False)
    return lambda array: session.run({given: np.ascontiguousarray(array)})[made]
