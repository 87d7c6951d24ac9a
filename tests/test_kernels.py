"""Which convolutions become matrix products: those that took clearly less time so, on ONNX Runtime's CPU provider."""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import pytest

from models import zoo
from onnxcomp import kernels
from onnxcomp.core import Context
from onnxcomp.data import open_dataset
from onnxcomp.layers import layers
from onnxcomp.model import input_specs, load
from onnxcomp.passes.quantize_static import QuantizeStatic
from onnxcomp.profiling import Profile
from onnxcomp.runtime import Target

TECHNIQUE = QuantizeStatic(weight_bits=8, as_gemm=("of another model",))


def setting() -> tuple[ir.Model, Context, dict[str, Any], list[str]]:
    proto = zoo.build("resnet")
    model, feeds = load(proto), zoo.feeds(proto, 2)
    context = Context(data=open_dataset([zoo.feeds(proto, 1, seed) for seed in range(4)], input_specs(model)))
    return model, context, feeds, sorted(layer.name for layer in layers(model) if layer.node.op_type == "Conv")


def test_those_that_took_clearly_less(monkeypatch: pytest.MonkeyPatch) -> None:
    model, context, feeds, names = setting()
    shares = dict(zip(names, (0.5, 0.94, 0.96, 2.0), strict=False))

    def made_up(pair: Sequence[ir.Model], *_: Any) -> list[Profile]:
        direct, products = ({layer.name for layer in layers(each)} for each in pair)
        assert direct == products == set()  # both are quantized
        return [Profile(dict.fromkeys(names, 100.0), {}), Profile({name: 100 * shares[name] for name in shares}, {})]

    monkeypatch.setattr(kernels, "profiles", made_up)
    assert kernels.with_fastest(model, TECHNIQUE, context, feeds).as_gemm == tuple(names[:2])


def test_measured_for_real() -> None:
    model, context, feeds, names = setting()
    found = kernels.with_fastest(model, TECHNIQUE, context, feeds)
    assert set(found.as_gemm) <= set(names)
    assert found(model, context).modified


def test_no_other_provider_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, context, feeds, _ = setting()
    monkeypatch.setattr(kernels, "profiles", None)
    other = Context(data=context.data, target=Target("cuda"))
    assert kernels.with_fastest(model, TECHNIQUE, other, feeds).as_gemm == ()


def test_nothing_is_measured_where_nothing_is_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, feeds, _ = setting()
    monkeypatch.setattr(kernels, "profiles", None)
    assert kernels.with_fastest(model, TECHNIQUE, Context(), feeds).as_gemm == ()
