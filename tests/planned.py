"""A small residual network, and what its plans go by: times that are made up."""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import pytest

from onnxcomp import latency, table
from onnxcomp.appraisal import Appraisal
from onnxcomp.cost import node_costs
from onnxcomp.passes.quantize_static import QuantizeStatic
from onnxcomp.placement import Crossing
from onnxcomp.planning import Planner
from onnxcomp.profiling import Profile
from onnxcomp.weights import NEAREST
from tests.passes.small import context
from tests.passes.test_prune_depth import residual

STRENGTHS = (1.0, 0.05, 0.5)
CROSSING = Crossing((1, 10), (1.0, 1.0), (1.0, 1.0))
INT8 = QuantizeStatic(rounding=NEAREST)


def flops(model: ir.Model) -> dict[str, float]:
    return {cost.name: float(cost.flops or 0) for cost in node_costs(model, 1, {"batch": 1})}


def made_up(models: Sequence[ir.Model], *_: Any, **__: Any) -> list[Profile]:
    """A microsecond for a thousand FLOPs, a third of that where weights are integers."""
    found = []
    for model in models:
        integers = any(node.op_type == "DequantizeLinear" for node in model.graph)
        sized = model.clone()
        ir.passes.common.ShapeInferencePass()(sized)
        names = {node.name for node in model.graph if node.op_type in {"Conv", "Gemm"}}
        times = {name: taken / (3e3 if integers else 1e3) for name, taken in flops(sized).items() if name in names}
        found.append(Profile(times, {}))
    return found


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (table, latency):
        monkeypatch.setattr(module, "profiles", made_up)


def planner(
    model: ir.Model, *, quantize: bool = True, prune: bool = True, prune_depth: bool = True, **settings: Any
) -> Planner:
    given = context(64, **settings)
    assert given.data is not None
    feeds = next(iter(given.data.batches(1))).feeds
    quantizers = {"INT8": INT8} if quantize else {}
    return Planner(
        Appraisal(model, quantizers, given.data, given, feeds, prune=prune, prune_depth=prune_depth), CROSSING
    )


@pytest.fixture(scope="module")
def model() -> ir.Model:
    return residual(*STRENGTHS)
