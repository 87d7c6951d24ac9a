"""Which convolutions become matrix products: those that took clearly less time so, on ONNX Runtime's CPU provider."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from models import zoo
from onnxcomp import kernels
from onnxcomp.core import Context
from onnxcomp.data import open_dataset
from onnxcomp.errors import OnnxcompError
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


def zeros(model: ir.Model) -> set[int]:
    """Zero points of the weights of convolutions."""
    found = set()
    for node in (node for node in model.graph if node.op_type == "Conv"):
        zero = node.inputs[1].producer().inputs[2].const_value  # type: ignore[union-attr]
        found |= set(zero.numpy().tolist())  # type: ignore[union-attr]
    return found


def test_those_that_took_clearly_less(monkeypatch: pytest.MonkeyPatch) -> None:
    model, context, feeds, names = setting()
    shares = dict(zip(names, (0.5, 0.89, 0.91, 2.0), strict=False))

    def made_up(pair: Sequence[ir.Model], *_: Any) -> list[Profile]:
        assert [zeros(model) for model in pair] == [{0}, {-1}]
        return [Profile(dict.fromkeys(names, 100.0), {}), Profile({name: 100 * shares[name] for name in shares}, {})]

    monkeypatch.setattr(kernels, "profiles", made_up)
    assert kernels.with_fastest(model, TECHNIQUE, context, feeds).as_gemm == tuple(names[:2])


def test_only_what_becomes_integers_can_be_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    model, context, feeds, names = setting()
    all_faster = [Profile(dict.fromkeys(names, time), {}) for time in (100.0, 10.0)]
    monkeypatch.setattr(kernels, "profiles", lambda *_: all_faster)
    kept = replace(TECHNIQUE, keep=tuple(names[1:]))
    assert kernels.with_fastest(model, kept, context, feeds).as_gemm == tuple(names[:1])
    signed = replace(TECHNIQUE, signed=True)
    assert kernels.with_fastest(model, signed, context, feeds).as_gemm == ()


def test_what_cannot_be_profiled_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise OnnxcompError("no clock")

    model, context, feeds, _ = setting()
    monkeypatch.setattr(kernels, "profiles", fails)
    assert kernels.with_fastest(model, TECHNIQUE, context, feeds).as_gemm == ()


def test_profiles_name_the_convolutions_of_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    model, context, feeds, names = setting()
    monkeypatch.setattr(kernels, "_CLEARLY", np.inf)  # so that whatever has a time in both is taken
    found = kernels.with_fastest(model, TECHNIQUE, context, feeds)
    assert found.as_gemm == tuple(names)


def test_no_other_provider_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, context, feeds, _ = setting()
    monkeypatch.setattr(kernels, "profiles", None)
    other = Context(data=context.data, target=Target("cuda"))
    assert kernels.with_fastest(model, TECHNIQUE, other, feeds).as_gemm == ()


def test_nothing_is_measured_where_nothing_is_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, feeds, _ = setting()
    monkeypatch.setattr(kernels, "profiles", None)
    assert kernels.with_fastest(model, TECHNIQUE, Context(), feeds).as_gemm == ()
