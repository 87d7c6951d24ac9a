"""Which quantized nodes hurt: the error that each adds to what reaches it, from one run of both models."""

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir

from onnxcomp.graph import single_consumer
from onnxcomp.runtime import Feeds, Session, Target


def ranking(original: ir.Model, candidate: ir.Model, nodes: Collection[str], target: Target, feeds: Feeds) -> list[str]:
    """The nodes, the one that adds most error first.

    A node's error is ||y - y'||^2 / ||y||^2 of its output (behind an activation function that belongs to it) less the
    largest such error among its inputs. Tensors are matched by name, behind a DequantizeLinear where there is one.

    Args:
        original: the float model.
        candidate: the same with nodes quantized.
        nodes: names of the quantized nodes.
        target: where to run.
        feeds: one batch.
    """
    wanted = set(nodes)
    layers = [node for node in original.graph if node.name in wanted]
    outputs = {node.name or "": _unit_output(node) for node in layers}
    tensors = {value.name or "": value for value in outputs.values()}
    for node in layers:
        tensors |= {value.name or "": value for value in node.inputs if value is not None and value.producer()}
    errors = output_errors(original, candidate, tensors, target, feeds)

    def added(node: ir.Node) -> float:
        arriving = max((errors.get(value.name or "", 0.0) for value in node.inputs if value is not None), default=0.0)
        own = errors.get(outputs[node.name or ""].name or "", 0.0)
        return own - arriving if arriving < np.inf else 0.0

    return [node.name or "" for node in sorted(layers, key=added, reverse=True)]


def output_errors(
    original: ir.Model, candidate: ir.Model, tensors: Mapping[str, ir.Value], target: Target, feeds: Feeds
) -> dict[str, float]:
    """||y - y'||^2 / ||y||^2 of each tensor that both models have in the same shape, and not one as integers.

    Args:
        original: the float model.
        candidate: what was made of it.
        tensors: the original's, by name.
        target: where to run.
        feeds: one batch.
    """
    available = {value.name for node in candidate.graph for value in node.outputs}
    twins = {}
    for name, value in tensors.items():
        twin = next((n for n in (f"{name}_dq", name) if n in available), None)
        if twin is not None and value.dtype is not None and value.dtype.is_floating_point():
            twins[name] = twin
    before = observe(original, list(twins), target, feeds)
    after = observe(candidate, list(twins.values()), target, feeds)
    pairs = {name: (before[name], after[twin]) for name, twin in twins.items()}
    alike = {name: (y, z) for name, (y, z) in pairs.items() if y.shape == z.shape and z.dtype.kind not in "iub"}
    return {name: _relative(y, z) for name, (y, z) in alike.items()}


def _unit_output(node: ir.Node) -> ir.Value:
    reader = single_consumer(node.outputs[0])
    return reader.outputs[0] if reader is not None and reader.op_type in {"Relu", "Clip"} else node.outputs[0]


def observe(model: ir.Model, names: list[str], target: Target, feeds: Feeds) -> dict[str, np.ndarray]:
    """What one run gives for tensors of the main graph, by name."""
    if not names:  # ONNX Runtime reads that as all outputs
        return {}
    probe = model.clone()
    values = {value.name: value for node in probe.graph for value in node.outputs}
    known = {value.name for value in probe.graph.outputs}
    for name in dict.fromkeys(names):
        if name not in known:
            if values[name].dtype is None:
                values[name].type = ir.TensorType(ir.DataType.FLOAT)
            probe.graph.outputs.append(values[name])
    return Session(probe, target).run(feeds, list(dict.fromkeys(names)))


def _relative(expected: np.ndarray, actual: np.ndarray) -> float:
    wide = expected.astype(np.float64)
    with np.errstate(all="ignore"):
        signal = float(np.square(wide).sum())
        noise = float(np.square(wide - actual.astype(np.float64)).sum())
    if not np.isfinite(noise):
        return np.inf if np.isfinite(signal) else 0.0
    return noise / signal if signal else float(noise > 0)
