"""Low rank: what remains is what was asked for, stages compute what they should, refusals are reasons."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from models import zoo
from onnxcomp import model as models
from onnxcomp import splitting
from onnxcomp.core import Context, node_pattern
from onnxcomp.errors import OptionError
from onnxcomp.layers import layers
from onnxcomp.numerics.lowrank import LowRank
from onnxcomp.passes.factorize import Factorize, Method
from onnxcomp.passes.prune import Prune
from onnxcomp.runtime import Session
from onnxcomp.saliency import Criterion
from onnxcomp.widths import Cost, Rates, totals
from tests.passes.small import context, error, network
from tests.slices import sliced


@pytest.mark.parametrize("method", [Method.AUTO, Method.SVD, Method.SPATIAL, Method.TUCKER])
def test_what_remains_is_what_was_asked_for(method: Method) -> None:
    made = Factorize(0.7, method=method, reconstruct=False)(network(), context())
    assert 0.6 < totals(made.model).parameters / totals(network()).parameters <= 0.7
    assert models.file_bytes(made.model) < 0.76 * models.file_bytes(network())
    assert all(method is Method.AUTO or method.value in change.what for change in made.changes)


def test_fitting_again_lowers_the_error() -> None:
    plain, fitted = (Factorize(0.5, reconstruct=again)(network(), context()).model for again in (False, True))
    assert error(network(), fitted) < 0.7 * error(network(), plain)


def test_energy_in_place_of_a_target() -> None:
    errors = [
        error(network(), Factorize(energy=energy, reconstruct=False)(network(), context()).model)
        for energy in (0.99, 0.9)
    ]
    assert errors[0] < errors[1]
    kept = [
        totals(Factorize(energy=energy, reconstruct=False)(network(), context()).model).parameters
        for energy in (0.99, 0.9)
    ]
    assert kept[0] > kept[1]


@pytest.mark.parametrize("slower", [0.5, 2.0])
@pytest.mark.parametrize("cost", [Cost.FLOPS, Cost.LATENCY, Cost.SIZE])
def test_what_is_slower_is_used_for_bytes_alone(cost: Cost, slower: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine measures: the times are given."""
    monkeypatch.setattr(splitting.Clock, "slowdowns", lambda *given: np.full(len(given[3]), slower))
    made = Factorize(0.7, cost, reconstruct=False)(network(), context(8))
    assert made.modified == (slower < 1 or cost is Cost.SIZE)
    if not made.modified:
        assert any("runs faster" in skip.reason for skip in made.skips)
    elif cost is Cost.FLOPS:
        assert totals(made.model).flops <= 0.7 * totals(network()).flops


X = {"Conv": (2, 6, 9, 10), "Gemm": (7, 12), "MatMul": (2, 7, 12)}
SHAPES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "padded": ("Conv", (8, 6, 3, 3), {"pads": [1, 0, 2, 1]}),
    "strided": ("Conv", (8, 6, 3, 5), {"strides": [2, 3], "pads": [1, 2, 1, 2]}),
    "dilated": ("Conv", (8, 6, 3, 3), {"dilations": [2, 1]}),
    "same upper": ("Conv", (8, 6, 3, 4), {"auto_pad": "SAME_UPPER", "strides": [2, 1]}),
    "same lower": ("Conv", (8, 6, 4, 3), {"auto_pad": "SAME_LOWER"}),
    "valid": ("Conv", (8, 6, 3, 3), {"auto_pad": "VALID"}),
    "pointwise": ("Conv", (8, 6, 1, 1), {"strides": [2, 2]}),
    "Gemm": ("Gemm", (12, 8), {}),
    "Gemm, weight transposed": ("Gemm", (8, 12), {"transB": 1}),
    "MatMul": ("MatMul", (12, 8), {}),
}


def one(operator: str, shape: tuple[int, ...], attributes: dict[str, Any]) -> ir.Model:
    """A model of one layer with random weights, and a bias where the operator has one."""
    random = np.random.default_rng(0)
    outputs = shape[0] if operator == "Conv" or "transB" in attributes else shape[1]
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=X[operator])
    arrays = [random.normal(size=shape), random.normal(size=outputs)][: 1 if operator == "MatMul" else 2]
    weights = [
        ir.val(f"w{number}", const_value=ir.tensor(array.astype(np.float32), name=f"w{number}"))
        for number, array in enumerate(arrays)
    ]
    node = ir.node(operator, [x, *weights], attributes, name="layer")
    node.outputs[0].name, node.outputs[0].dtype = "y", ir.DataType.FLOAT
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=weights, opset_imports={"": 17}, name="main")
    model = models.load(ir.Model(graph, ir_version=8))
    ShapeInferencePass()(model)
    return model


FORMS = [
    (name, kind)
    for name, (operator, shape, _) in SHAPES.items()
    for kind in ("svd", "spatial", "tucker", "cp")
    if kind == "svd" or (operator == "Conv" and min(shape[2:]) > 1)
]


@pytest.mark.parametrize(("name", "kind"), FORMS)
def test_stages_do_what_the_layer_of_their_product_does(name: str, kind: str) -> None:
    model = one(*SHAPES[name])
    (layer,) = layers(model)
    kernel = splitting.kernel_of(layer)
    factors = LowRank(kernel, np.eye(kernel[0].size)).form(kind, (3, 4) if kind == "tucker" else (4,))
    whole, parts = model.clone(), model.clone()
    next(iter(layers(whole))).set_matrix(factors.composed().reshape(len(kernel), -1))
    splitting.split(next(iter(layers(parts))), factors)
    x = np.random.default_rng(1).normal(size=X[SHAPES[name][0]]).astype(np.float32)
    want, got = (np.asarray(Session(each).run({"x": x})["y"], np.float64) for each in (whole, parts))
    np.testing.assert_allclose(got, want, atol=1e-4)  # sums of some hundred float32 products of size 1


@pytest.mark.parametrize(
    "name", sliced(["bert", "gpt", "conv1d", "unet", "mobilenetv2", "conv3d", "shared_weights", "control_flow"], 2)
)
def test_networks_of_every_kind(name: str) -> None:
    model = models.load(zoo.build(name))
    ShapeInferencePass()(model)
    made = Factorize(0.8, reconstruct=False)(model, Context())
    treated = {change.node for change in made.changes} | {skip.node for skip in made.skips}
    assert {layer.name for layer in layers(model) if layer.name} <= treated
    assert made.modified
    assert totals(made.model).parameters < totals(model).parameters
    assert error(model, made.model) < 1.5  # of random weights, half of which may belong to layers that cannot go


def test_excluded_layers_stay() -> None:
    first = next(iter(layers(network()))).name
    made = Factorize(0.7, reconstruct=False)(network(), context(8, exclude=node_pattern(f"^{first}$")))
    assert any(skip.node == first and "excluded" in skip.reason for skip in made.skips)
    assert first not in {change.node for change in made.changes}


def test_a_target_out_of_reach_goes_as_far_as_it_can() -> None:
    made = Factorize(0.01, reconstruct=False)(network(), context(8))
    assert totals(made.model).parameters < 0.2 * totals(network()).parameters


def test_after_pruning() -> None:
    pruned = Prune(0.8, criterion=Criterion.L1, rates=Rates.LOCAL, reconstruct=False)(network(), context(8)).model
    made = Factorize(0.8, reconstruct=False)(pruned, context(8)).model
    assert totals(made).parameters <= 0.8 * totals(pruned).parameters


@pytest.mark.parametrize("settings", [{"remains": 0}, {"remains": 1.1}, {"energy": 1.0}, {"multiple": 0}])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=f"'{next(iter(settings))}' of factorize: expected"):
        Factorize(**settings)  # type: ignore[arg-type]


ROWS = {
    "Conv": ("float[2,4,6,6]", "Conv(x, v, b)", "Conv(h, w, c)", "6,4,1,1", "5,6,3,3"),
    "padded Conv": ("float[2,4,6,6]", "Conv(x, v)", "Conv <pads = [1,1,1,1]> (h, w, c)", "6,4,1,1", "5,6,3,3"),
    "Gemm": ("float[3,4]", "Gemm <transB = 1> (x, v, b)", "Gemm <transB = 1> (h, w, c)", "6,4", "5,6"),
    "MatMul": ("float[3,7,4]", "MatMul(x, v)", "MatMul(h, w)", "4,6", "6,5"),
}
APART = {
    "bias before padding": ("float[2,4,6,6]", "Conv(x, v, b)", "Conv <pads = [1,1,1,1]> (h, w)", "6,4,1,1", "5,6,3,3"),
    "strided": ("float[2,4,6,6]", "Conv <strides = [2,2]> (x, v)", "Conv(h, w)", "6,4,1,1", "5,6,3,3"),
    "not pointwise": ("float[2,4,6,6]", "Conv(x, v)", "Conv(h, w)", "6,4,2,2", "5,6,3,3"),
    "scaled": ("float[3,4]", "Gemm <alpha = 0.5> (x, v)", "Gemm(h, w)", "4,6", "6,5"),
}


def row(name: str) -> ir.Model:
    """Two layers in a row."""
    given, first, second, v, w = (ROWS | APART)[name]
    random = np.random.default_rng(0)

    def constant(name: str, shape: str) -> str:
        size = int(np.prod([int(side) for side in shape.split(",")]))
        return f"float[{shape}] {name} = {{{', '.join(f'{value:.3f}' for value in random.normal(size=size))}}}"

    constants = ", ".join([constant("v", v), constant("b", "6"), constant("w", w), constant("c", "5")])
    model = ir.from_onnx_text(f"""<ir_version: 8, opset_import: ["" : 17]>
        agraph ({given} x) => (float y) <{constants}> {{ h = {first} y = {second} }}""")
    model.graph.outputs[0].shape = None
    for node in model.graph:
        node.name = node.outputs[0].name
    return models.load(model)


@pytest.mark.parametrize("name", [*ROWS, *APART])
def test_a_factor_goes_into_the_linear_layer_behind_it_where_that_is_exact(name: str) -> None:
    model = row(name)
    made = model.clone()
    merged = splitting.merge_into_followers(made, {"h"})
    assert merged == ({"h": "y"} if name in ROWS else {})
    (spec,) = models.input_specs(model)
    x = np.random.default_rng(1).normal(size=[int(str(side)) for side in spec.shape or ()])
    want, got = (np.asarray(Session(each).run({"x": x.astype(np.float32)})["y"], np.float64) for each in (model, made))
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert len(list(made.graph)) == (1 if name in ROWS else 2)
