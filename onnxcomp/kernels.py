"""Which integer kernels compute convolutions: the direct ones, or matrix products over gathered patches, by time."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from onnxcomp.core import Context
from onnxcomp.passes.quantize_static import QuantizeStatic
from onnxcomp.runtime import Feeds
from onnxcomp.timing import for_timing, profiles

_CLEARLY = 0.95
"""Share of a node's time that another kernel must not exceed to be taken."""


def with_fastest(model: ir.Model, technique: QuantizeStatic, context: Context, feeds: Feeds) -> QuantizeStatic:
    """The same quantization with those convolutions as matrix products that clearly take less time so.

    Both ways are profiled side by side. Only ONNX Runtime's CPU provider has them.

    Args:
        model: in float, with names on its nodes.
        technique: how it is quantized.
        context: target, and samples, few of which are used.
        feeds: one run at the batch size that counts.
    """
    names = tuple(sorted(node.name or "" for node in model.graph if node.op_type == "Conv"))
    if context.target.short != "cpu" or not names:
        return replace(technique, as_gemm=())
    drafts = [replace(technique, as_gemm=each).drafted() for each in ((), names)]
    outcomes = [draft(model, for_timing(context)) for draft in drafts]
    if not outcomes[0].modified:
        return replace(technique, as_gemm=())
    direct, products = profiles([outcome.model for outcome in outcomes], context, feeds)
    usual = direct.times
    faster = (name for name in names if products.times.get(name, np.inf) < _CLEARLY * usual.get(name, 0.0))
    return replace(technique, as_gemm=tuple(faster))
