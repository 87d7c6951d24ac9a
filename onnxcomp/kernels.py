"""Which kernels of ONNX Runtime compute a node, where there are several, by time."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from onnxcomp.core import Context, name_nodes
from onnxcomp.errors import OnnxcompError
from onnxcomp.passes.quantize_static import QuantizeStatic
from onnxcomp.passes.unfuse import Unfuse
from onnxcomp.profiling import Profile
from onnxcomp.runtime import Feeds
from onnxcomp.timing import for_timing, profiles

_CLEARLY = 0.9
"""Share of a node's time that another kernel must not exceed to be taken."""
_ROUNDS = 2
"""Of profiles of sums that are fused and of the same apart: the difference is a multiple, or there is none."""


def fuses_slowly(model: ir.Model, context: Context, feeds: Feeds) -> bool:
    """Whether a model's sums and the normalizations behind them clearly take less time apart than fused into one.

    Both are profiled side by side, on the CPU alone: other providers' fused kernels compute many numbers at once.

    Args:
        model: in float.
        context: target.
        feeds: one run at the batch size that counts.
    """
    if context.target.short != "cpu":
        return False
    try:
        outcome = Unfuse()(model, context)
        if not outcome.modified:
            return False
        context.progress(0, 0, "timing fused kernels")
        named = model.clone()
        name_nodes(named)
        fused, apart = profiles([named, outcome.model], context, feeds, _ROUNDS)
    except OnnxcompError:  # what fails here fails, and is told, where it is to be the result
        return False
    was_fused = apart.times.keys() - fused.times.keys()
    return bool(was_fused) and _apart(apart, fused) < _CLEARLY * _apart(fused, apart)


def _apart(profile: Profile, other: Profile) -> float:
    """Microseconds of the nodes that only one of two models has: kernels that several were fused into lead to none."""
    return profile.untraced + sum(time for name, time in profile.times.items() if name not in other.times)


def with_fastest(model: ir.Model, technique: QuantizeStatic, context: Context, feeds: Feeds) -> QuantizeStatic:
    """The same quantization with those convolutions as matrix products that clearly take less time so.

    Both ways are profiled side by side. Only ONNX Runtime's CPU provider has them; where neither can be profiled, none
    is one.

    Args:
        model: in float, with names on its nodes.
        technique: how it is quantized.
        context: target, and samples, few of which are used.
        feeds: one run at the batch size that counts.
    """
    usual = replace(technique, as_gemm=())
    names = tuple(node.name or "" for node in model.graph if node.op_type == "Conv")
    if context.target.short != "cpu" or not names:
        return usual
    drafts = [replace(technique, as_gemm=each).drafted() for each in ((), names)]
    few = for_timing(context)
    try:
        outcomes = [draft(model, few) for draft in drafts]
        able = {change.node for change in set(outcomes[1].changes) - set(outcomes[0].changes)}
        if not able:
            return usual
        direct, products = profiles([outcome.model for outcome in outcomes], context, feeds)
    except OnnxcompError:  # what fails here fails, and is told, where it is to be the result
        return usual
    faster = (name for name in able if products.times.get(name, np.inf) < _CLEARLY * direct.times.get(name, 0.0))
    return replace(technique, as_gemm=tuple(sorted(faster)))
