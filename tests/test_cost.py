import numpy as np
import onnx.defs
import onnx_ir as ir
import onnx_ir.passes.common
import pytest

from onnxcomp import cost
from onnxcomp.cost import NodeCost, Totals, node_costs
from onnxcomp.model import tensor_bytes

FLOAT, INT8 = ir.DataType.FLOAT, ir.DataType.INT8


def parse(body: str, weights: dict[str, ir.TensorProtocol] | None = None, contrib: bool = False) -> ir.Model:
    """A graph in ONNX's text form, with shapes inferred and some of its inputs turned into initializers."""
    domains = '"" : 21, "com.microsoft" : 1' if contrib else '"" : 21'
    model = ir.from_onnx_text(f"<ir_version: 10, opset_import: [{domains}]> agraph {body}")
    for value in list(model.graph.inputs):
        if value.name in (weights or {}):
            value.const_value = (weights or {})[value.name]
            model.graph.inputs.remove(value)
            model.graph.register_initializer(value)
    onnx_ir.passes.common.ShapeInferencePass()(model)
    return model


def only(model: ir.Model, **sizes: int) -> NodeCost:
    """The one node that runs."""
    (single,) = node_costs(model, 1, sizes)
    return single


def zeros(*shape: int, dtype: ir.DataType = FLOAT) -> ir.TensorProtocol:
    return ir.tensor(np.zeros(shape, dtype.numpy()), dtype=dtype)


# Each figure is worked out by hand: 2 x output elements x multiply-accumulates per output element.
@pytest.mark.parametrize(
    ("body", "flops"),
    [
        (
            "(float[2,8,10,10] x, float[16,8,3,3] w, float[16] b) => (float[2,16,5,5] y) "
            "{ y = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (x, w, b) }",
            2 * (2 * 16 * 5 * 5) * (8 * 3 * 3),
        ),
        (
            "(float[1,8,10,10] x, float[8,1,3,3] w) => (float[1,8,8,8] y) { y = Conv <group = 8> (x, w) }",
            2 * (8 * 8 * 8) * 9,
        ),
        (
            "(float[1,4,20] x, float[6,4,5] w) => (float[1,6,16] y) { y = Conv (x, w) }",
            2 * (6 * 16) * (4 * 5),
        ),
        (
            "(float[1,4,5,5] x, float[4,3,2,2] w) => (float[1,6,10,10] y) "
            "{ y = ConvTranspose <group = 2, strides = [2, 2]> (x, w) }",
            2 * (4 * 5 * 5) * (3 * 2 * 2),
        ),
        ("(float[7,3] a, float[7,5] b) => (float[3,5] y) { y = Gemm <transA = 1> (a, b) }", 2 * 3 * 5 * 7),
        ("(float[3,7] a, float[5,7] b) => (float[3,5] y) { y = Gemm <transB = 1> (a, b) }", 2 * 3 * 5 * 7),
        ("(float[2,4,3,7] a, float[7,5] b) => (float[2,4,3,5] y) { y = MatMul (a, b) }", 2 * (2 * 4 * 3 * 5) * 7),
        ("(float[7] a, float[7] b) => (float y) { y = MatMul (a, b) }", 2 * 7),
        ("(uint8[3,7] a, int8[7,5] b) => (int32[3,5] y) { y = MatMulInteger (a, b) }", 2 * 3 * 5 * 7),
        ("(uint8[1,4,6,6] x, uint8[8,4,3,3] w) => (int32[1,8,4,4] y) { y = ConvInteger (x, w) }", 2 * 8 * 16 * 36),
        (
            "(float[6,2,10] x, float[2,32,10] w, float[2,32,8] r) => (y) "
            '{ y = LSTM <hidden_size = 8, direction = "bidirectional"> (x, w, r) }',
            6 * 2 * 2 * (2 * 32 * 10 + 2 * 32 * 8),
        ),
        (
            "(float[6,2,10] x, float[1,24,10] w, float[1,24,8] r) => (y) { y = GRU <hidden_size = 8> (x, w, r) }",
            6 * 2 * 2 * (24 * 10 + 24 * 8),
        ),
        (
            '(float[2,3,4] a, float[2,4,5] b) => (float[2,3,5] y) { y = Einsum <equation = "bij, bjk -> bik"> (a, b) }',
            2 * 2 * 3 * 4 * 5,
        ),
        ("(float[2,3,4] a, float[4] b) => (float[2,3,4] y) { y = Add (a, b) }", 24),
        ("(float[2,3,4] a) => (float[2,3,4] y) { y = Relu (a) }", 24),
        ("(float[2,3,4] a) => (float[2,1,1] y) { y = ReduceMean (a) }", 24),
        (
            "(float[1,3,8,8] x) => (float[1,3,4,4] y) { y = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x) }",
            3 * 4 * 4 * 4,
        ),
        ("(float[1,3,8,8] x) => (float[1,3,1,1] y) { y = GlobalAveragePool (x) }", 3 * 64),
        ("(float[2,3,4] a) => (float[4,3,2] y) { y = Transpose (a) }", 0),
    ],
)
def test_flops_by_hand(body: str, flops: int) -> None:
    figure = only(parse(body))
    assert (figure.flops, figure.note) == (flops, "")


def test_attention_counts_scores_and_values() -> None:
    """4 heads, 5 queries, 3 past and 7 new keys, 16 channels a head: two products of 5 x 10 x 16 for each head."""
    shapes = {0: (1, 4, 5, 16), 1: (1, 4, 7, 16), 2: (1, 4, 7, 16), 4: (1, 4, 3, 16), 5: (1, 4, 3, 16)}
    inputs = [
        ir.Value(name=f"v{i}", type=ir.TensorType(FLOAT), shape=ir.Shape(shapes[i])) if i in shapes else None
        for i in range(6)
    ]
    node = ir.node("Attention", inputs)
    node.outputs[0].shape = ir.Shape((1, 4, 5, 16))
    graph = ir.Graph([v for v in inputs if v is not None], node.outputs, nodes=[node], opset_imports={"": 23})
    assert only(ir.Model(graph, ir_version=10)).flops == 2 * 2 * 4 * (5 * 10 * 16)


def test_qlinear_convolution_counts_scales_as_bytes_only() -> None:
    weights = {
        "w": zeros(8, 4, 3, 3, dtype=INT8),
        "ws": zeros(8),
        "wz": zeros(8, dtype=INT8),
        "s": zeros(),
        "z": zeros(dtype=ir.DataType.UINT8),
        "b": zeros(8, dtype=ir.DataType.INT32),
    }
    model = parse(
        "(uint8[1,4,6,6] x, int8[8,4,3,3] w, float[8] ws, int8[8] wz, float s, uint8 z, int32[8] b) "
        "=> (uint8[1,8,4,4] y) "
        "{ y = QLinearConv (x, s, z, w, ws, wz, s, z, b) }",
        weights,
    )
    figure = only(model)
    assert figure.flops == 2 * (8 * 4 * 4) * (4 * 9)
    assert figure.parameters == 8 * 4 * 9 + 8
    assert figure.bytes == 8 * 4 * 9 + 8 * 4 + 8 + 4 + 1 + 8 * 4 == tensor_bytes(model)


def test_four_bit_blocks() -> None:
    """K=64, N=6, blocks of 32: two elements to a byte, a scale per block."""
    model = parse(
        "(float[3,64] x, uint8[6,2,16] w, float[12] s) => (float[3,6] y) "
        "{ y = com.microsoft.MatMulNBits <K = 64, N = 6, bits = 4, block_size = 32> (x, w, s) }",
        {"w": zeros(6, 2, 16, dtype=ir.DataType.UINT8), "s": zeros(12)},
        contrib=True,
    )
    model.graph.node(0).outputs[0].shape = ir.Shape((3, 6))
    figure = only(model)
    assert (figure.flops, figure.parameters, figure.bytes) == (2 * 3 * 6 * 64, 64 * 6, 64 * 6 // 2 + 12 * 4)


def test_weights_behind_chains_belong_to_the_consumer() -> None:
    """int4 weights, dequantized in blocks, cast and transposed before they are used."""
    model = parse(
        "(float[3,64] x, int4[6,64] w, float[6,2] s) => (float[3,6] y) { "
        "d = DequantizeLinear <axis = 1, block_size = 32> (w, s)\n c = Cast <to = 1> (d)\n i = Identity (c)\n "
        "t = Transpose <perm = [1, 0]> (i)\n y = MatMul (x, t) }",
        {"w": zeros(6, 64, dtype=ir.DataType.INT4), "s": zeros(6, 2)},
    )
    figure = only(model)
    assert (figure.op, figure.parameters, figure.bytes) == ("MatMul", 6 * 64, 6 * 64 // 2 + 12 * 4)
    assert figure.flops == 2 * 3 * 6 * 64


def test_shared_codebook_has_as_many_parameters_as_indices() -> None:
    model = parse(
        "(float[3,64] x, float[16] codebook, uint8[64,8] indices) => (float[3,8] y) { "
        "i = Cast <to = 7> (indices)\n w = Gather (codebook, i)\n y = MatMul (x, w) }",
        {"codebook": zeros(16), "indices": zeros(64, 8, dtype=ir.DataType.UINT8)},
    )
    figure = only(model)
    assert (figure.op, figure.parameters, figure.bytes) == ("MatMul", 64 * 8, 64 * 8 + 16 * 4)


def test_activations_that_are_dequantized_are_no_weights() -> None:
    model = parse(
        "(float[3,4] x, float s, uint8 z) => (float[3,4] y) { "
        "q = QuantizeLinear (x, s, z)\n y = DequantizeLinear (q, s, z) }",
        {"s": zeros(), "z": zeros(dtype=ir.DataType.UINT8)},
    )
    figures = node_costs(model)
    assert [(f.op, f.parameters, f.bytes, f.flops) for f in figures] == [
        ("QuantizeLinear", 0, 5, 12),
        ("DequantizeLinear", 0, 5, 12),
    ]
    assert Totals.of(figures).bytes == 5


def test_shared_weights_count_once_in_total() -> None:
    model = parse(
        "(float[3,4] x, float[4,4] w) => (float[3,4] y) { "
        "a = MatMul (x, w)\n t = Transpose <perm = [1, 0]> (w)\n y = MatMul (a, t) }",
        {"w": zeros(4, 4)},
    )
    figures = node_costs(model)
    assert [figure.parameters for figure in figures] == [16, 16]
    assert Totals.of(figures) == Totals(parameters=16, bytes=64, flops=2 * 2 * 3 * 4 * 4, unknown=0)


def test_constant_nodes_and_shape_tensors() -> None:
    model = parse(
        "(float[2,6] x) => (float[3,4] y) { s = Constant <value = int64[2] {3, 4}> ()\n r = Reshape (x, s)\n "
        "c = Constant <value = float[4] {1., 2., 3., 4.}> ()\n y = Add (r, c) }"
    )
    reshape, add = node_costs(model)
    assert (reshape.op, reshape.parameters, reshape.bytes, reshape.flops) == ("Reshape", 0, 16, 0)
    assert (add.op, add.parameters, add.bytes) == ("Add", 4, 16)


def test_a_constant_result_is_a_node_that_runs() -> None:
    model = parse("(float[4] w) => (float[4] y) { y = Relu (w) }", {"w": zeros(4)})
    assert only(model).parameters == 4


def test_random_numbers_are_not_constants() -> None:
    model = parse("(float[4] x) => (float[4] y) { r = RandomNormal <shape = [4]> ()\n y = Add (x, r) }")
    assert [figure.op for figure in node_costs(model)] == ["RandomNormal", "Add"]


def test_bodies_are_counted_once() -> None:
    model = parse(
        "(int64 n, bool go, float[2,8] x, float[8,8] w) => (float[2,8] y) { y = Loop (n, go, x) <body = b "
        "(int64 i, bool c, float[2,8] h) => (bool k, float[2,8] o) { k = Identity (c)\n o = MatMul (h, w) }> }",
        {"w": zeros(8, 8)},
    )
    figures = {figure.op: figure for figure in node_costs(model)}
    assert figures["Loop"].flops == 0
    assert "one iteration" in figures["Loop"].note
    assert figures["Loop"].weights == ()
    assert (figures["MatMul"].flops, figures["MatMul"].parameters) == (2 * 2 * 8 * 8, 64)


def test_dynamic_axes() -> None:
    model = parse("(float[batch,sequence,8] x, float[8,4] w) => (y) { y = MatMul (x, w) }", {"w": zeros(8, 4)})
    assert only(model).flops == 2 * 8 * 4
    assert only(model).note == "axis 'sequence' taken as 1"
    (stated,) = node_costs(model, batch=3, sizes={"sequence": 5})
    assert (stated.flops, stated.note, stated.output_shape) == (2 * 3 * 5 * 4 * 8, "", (3, 5, 4))


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ((2, "height"), (2, 7)),
        (("N", 3), (4, 3)),
        (("N", None), (4, 1)),
        ((1, "2*height + 1"), (1, 15)),
        ((1, "not an expression"), (1, 1)),
    ],
)
def test_shape_of(axes: tuple[int | str | None, ...], expected: tuple[int, ...]) -> None:
    value = ir.Value(name="x", shape=ir.Shape(axes))
    assert cost.shape_of(value, {"height": 7}, batch=4) == expected


def test_shape_of_unknown_rank() -> None:
    assert cost.shape_of(ir.Value(name="x"), {}) is None


def test_unknown_costs_say_why() -> None:
    custom = parse("(float[2] x) => (y) { y = com.microsoft.Mystery (x) }", contrib=True)
    assert only(custom).flops is None
    assert only(custom).note == "no rule for com.microsoft::Mystery"
    ellipsis = parse('(float[2,3] a, float[3] b) => (y) { y = Einsum <equation = "...i,i->..."> (a, b) }')
    assert "ellipsis" in only(ellipsis).note
    shapeless = parse("(x) => (y) { y = Relu (x) }")
    assert only(shapeless).note == "the shape of 'y' is unknown"
    assert only(shapeless).output_shape is None
    assert Totals.of(node_costs(shapeless)) == Totals(0, 0, 0, unknown=1)


def test_every_standard_operator_with_a_rule_exists() -> None:
    existing = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}
    assert cost._STANDARD.keys() - existing == set()


def test_small_resnet() -> None:
    """Stem 3->8, one residual block of 8->16 at stride 2 with a 1x1 shortcut, pooled into 10 classes; 12x12 images."""
    layers = {"stem": (8, 3, 3, 12), "first": (16, 8, 3, 6), "second": (16, 16, 3, 6), "shortcut": (16, 8, 1, 6)}
    weights = {f"w_{name}": zeros(o, i, k, k) for name, (o, i, k, _) in layers.items()}
    weights |= {f"b_{name}": zeros(o) for name, (o, *_) in layers.items()}
    weights |= {"w_head": zeros(10, 16), "b_head": zeros(10)}
    inputs = ", ".join(f"float[{','.join(map(str, tensor.shape))}] {name}" for name, tensor in weights.items())
    model = parse(
        f"(float[N,3,12,12] x, {inputs}) => (float[N,10] y) {{"
        " s = Conv <pads = [1, 1, 1, 1]> (x, w_stem, b_stem)\n a = Relu (s)\n"
        " f = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (a, w_first, b_first)\n g = Relu (f)\n"
        " h = Conv <pads = [1, 1, 1, 1]> (g, w_second, b_second)\n"
        " c = Conv <strides = [2, 2]> (a, w_shortcut, b_shortcut)\n"
        " r = Add (h, c)\n z = Relu (r)\n p = GlobalAveragePool (z)\n q = Flatten (p)\n"
        " y = Gemm <transB = 1> (q, w_head, b_head) }",
        weights,
    )
    batch = 4
    convolutions = sum(2 * o * side**2 * i * k**2 for o, i, k, side in layers.values())
    elementwise = 8 * 144 + 16 * 36 + 16 * 36 + 16 * 36  # three Relu and the Add
    expected = batch * (convolutions + elementwise + 16 * 36 + 2 * 16 * 10)
    parameters = sum(o * i * k**2 + o for o, i, k, _ in layers.values()) + 170
    totals = Totals.of(node_costs(model, batch))
    assert totals == Totals(parameters, 4 * parameters, expected, unknown=0)
    assert totals.bytes == tensor_bytes(model)
