"""Which integer kernels compute convolutions: the direct ones, or matrix products over gathered patches, by time."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from onnxcomp.core import Context
from onnxcomp.errors import OnnxcompError
from onnxcomp.passes.quantize_static import QuantizeStatic
from onnxcomp.runtime import Feeds
from onnxcomp.timing import for_timing, profiles

_CLEARLY = 0.9
"""Share of a node's time that another kernel must not exceed to be taken."""


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
