"""Small models of what the format allows and tools trip over; each has real layers around its oddity."""

import numpy as np
import onnx
import onnx_ir as ir

from models.convnets import image_net
from models.net import INT64, Net


def control_flow() -> ir.Model:
    """If and Loop whose bodies hold weights of their own and use values from outside."""
    net = Net(opset=16)
    x = net.input("input", ["batch", 64])
    chosen = net.op("Greater", net.mean(x, 0, 1, keepdims=False), net.constant(0, np.float32))
    x = net.relu(net.gemm(x, 64, 64))

    wide, narrow = net.branch("wide_branch"), net.branch("narrow_branch")
    wide.output("wide_result", wide.gemm(wide.relu(wide.gemm(x, 64, 128)), 128, 64), ["batch", 64])
    narrow.output("narrow_result", narrow.gemm(x, 64, 64), ["batch", 64])
    x = net.op("If", chosen, then_branch=wide.graph, else_branch=narrow.graph)

    body = net.branch("loop_body")
    body.input("turn", [], INT64)
    go_on = body.input("go_on", [], ir.DataType.BOOL)
    state = body.input("state", ["batch", 64])
    body.output("go_on_still", body.op("Identity", go_on), [], ir.DataType.BOOL)
    body.output("next_state", body.op("Tanh", body.op("Add", body.gemm(state, 64, 64), x)), ["batch", 64])
    x = net.op("Loop", net.constant(3), net.constant(True, np.bool_), x, body=body.graph)
    net.output("logits", net.gemm(x, 64, 10), ["batch", 10])
    return net.model()


def functions() -> ir.Model:
    """A model-local function, with a constant inside, called twice with different weights."""
    net = Net(opset=17)
    body = net.branch("dense_gelu")
    x, weight, bias = (ir.Value(name=name) for name in ("x", "weight", "bias"))
    body.graph.inputs.extend([x, weight, bias])
    body.graph.outputs.append(body.gelu(body.op("Add", body.op("MatMul", x, weight), bias)))
    net.functions.append(ir.Function("local", "DenseGelu", graph=body.graph, attributes=[]))
    net.graph.opset_imports["local"] = 1

    y = net.input("input", ["batch", 64])
    for _ in range(2):
        parameters = net.weight(net.normal(64, 64, fan_in=64)), net.weight(net.uniform(-0.1, 0.1, 64))
        y = net.op("DenseGelu", y, *parameters, domain="local")
    net.output("logits", net.gemm(y, 64, 10), ["batch", 10])
    return net.model()


def custom_domain() -> ir.Model:
    """An operator of an unknown domain between two convolutions: it loads only where its kernel is registered."""
    net, x = image_net(opset=17)
    net.graph.opset_imports["com.example"] = 1
    x = net.op("Mystery", net.relu(net.conv(x, 3, 64)), domain="com.example", strength=0.5)
    net.classify(net.relu(net.conv(x, 64, 64)), 64)
    return net.model()


def shared_weights() -> ir.Model:
    """One kernel in two convolutions, and one matrix in a MatMul and a Gemm with transB."""
    net, x = image_net(opset=13)
    x = net.relu(net.conv(x, 3, 64))
    kernel = net.weight(net.normal(64, 64, 3, 3, fan_in=64 * 9), "shared.kernel")
    for _ in range(2):
        x = net.relu(net.op("Conv", x, kernel, kernel_shape=[3, 3], pads=[1, 1, 1, 1]))
    x = net.op("Flatten", net.op("GlobalAveragePool", x))
    matrix = net.weight(net.normal(64, 64, fan_in=64), "shared.matrix")
    x = net.op("Gemm", net.relu(net.op("MatMul", x, matrix)), matrix, transB=1)
    net.output("logits", net.gemm(x, 64, 10), ["batch", 10])
    return net.model()


def weights_as_inputs() -> ir.Model:
    """IR version 3, where every initializer is a graph input too; BatchNorm, Clip with attributes, fixed batch."""
    net = Net(opset=9)
    x = net.input("input", [1, 3, 32, 32])
    x = net.relu6(net.conv_norm(x, 3, 32, stride=2))
    x = net.relu6(net.conv_norm(x, 32, 32, group=32))
    x = net.relu(net.conv_norm(x, 32, 64, 1))
    pooled = net.op("Flatten", net.op("GlobalAveragePool", x), axis=1)
    net.output("logits", net.gemm(pooled, 64, 10), [1, 10])
    net.graph.inputs.extend(net.graph.initializers.values())
    return net.model(ir_version=3)


def fp16_weights() -> ir.Model:
    """Weights stored as float16, each behind a Cast to float32."""
    net, x = image_net(opset=15)

    def stored(*shape: int, fan_in: int) -> ir.Value:
        half = net.weight(net.normal(*shape, fan_in=fan_in).astype(np.float16), "half.weight")
        return net.op("Cast", half, to=ir.DataType.FLOAT)

    x = net.op("Conv", x, stored(64, 3, 3, 3, fan_in=27), kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    x = net.op("Conv", net.relu(x), stored(64, 64, 3, 3, fan_in=576), kernel_shape=[3, 3], strides=[2, 2])
    x = net.op("Flatten", net.op("GlobalAveragePool", net.relu(x)), axis=1)
    net.output("logits", net.op("MatMul", x, stored(64, 10, fan_in=64)), ["batch", 10])
    return net.model()


COLOURS = ("red", "green", "blue")


def string_lookup() -> ir.Model:
    """Strings in (LabelEncoder) and strings out (Gather from a table of strings), layers between."""
    net = Net(opset=13)
    net.graph.opset_imports["ai.onnx.ml"] = 2
    words = net.input("words", ["batch"], ir.DataType.STRING)
    ids = net.op(
        "LabelEncoder", words, domain="ai.onnx.ml",
        keys_strings=COLOURS, values_int64s=range(len(COLOURS)), default_int64=len(COLOURS),
    )  # fmt: skip
    x = net.op("Gather", net.weight(net.normal(len(COLOURS) + 1, 64, fan_in=2), "embedding"), ids)
    logits = net.gemm(net.relu(net.gemm(x, 64, 64)), 64, len(COLOURS))
    names = ir.StringTensor([colour.encode() for colour in COLOURS], shape=ir.Shape([len(COLOURS)]))
    best = net.op("ArgMax", logits, axis=1, keepdims=0)
    net.output("label", net.op("Gather", net.weight(names, "names"), best), ["batch"], ir.DataType.STRING)
    net.output("logits", logits, ["batch", len(COLOURS)])
    return net.model()


def quantized_already() -> ir.Model:
    """QuantizeLinear and DequantizeLinear as other tools place them: int8 weights per channel, uint8 activations."""
    net, x = image_net(opset=13)

    def rounded(x: ir.Value, scale: float, zero_point: int) -> ir.Value:
        parameters = (
            net.weight(np.array(scale, np.float32), "scale"),
            net.weight(np.array(zero_point, np.uint8)),
        )
        return net.op("DequantizeLinear", net.op("QuantizeLinear", x, *parameters), *parameters)

    def stored(matrix: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> ir.Value:
        rows = matrix.reshape(len(matrix), -1)
        scale = np.abs(rows).max(axis=1) / np.float32(127)
        codes = np.rint(rows / scale[:, None]).astype(np.int8).reshape(matrix.shape)
        zero = net.weight(np.zeros(len(matrix), np.int8), "zero_point")
        return net.op("DequantizeLinear", net.weight(codes, "codes"), net.weight(scale, "scale"), zero, axis=0)

    x = rounded(x, 8 / 255, 128)
    for inputs in (3, 64):
        kernel = stored(net.normal(64, inputs, 3, 3, fan_in=inputs * 9))
        x = rounded(net.relu(net.op("Conv", x, kernel, kernel_shape=[3, 3], pads=[1, 1, 1, 1])), 6 / 255, 0)
    x = rounded(net.op("Flatten", net.op("GlobalAveragePool", x), axis=1), 2 / 255, 0)
    net.output("logits", net.op("Gemm", x, stored(net.normal(10, 64, fan_in=64)), transB=1), ["batch", 10])
    return net.model()


def sparse_initializer() -> onnx.ModelProto:
    """A Gemm whose weight is a sparse initializer, one value in eight kept; a ModelProto, since onnx_ir drops these."""
    net = Net(opset=13)
    x = net.relu(net.gemm(net.input("input", ["batch", 64]), 64, 64))
    net.output("logits", net.gemm(x, 64, 10), ["batch", 10])
    model = ir.to_proto(net.model())

    dense = model.graph.initializer[0]
    matrix = onnx.numpy_helper.to_array(dense)
    kept = np.flatnonzero(np.abs(matrix) > np.quantile(np.abs(matrix), 7 / 8))
    model.graph.sparse_initializer.append(
        onnx.helper.make_sparse_tensor(
            onnx.numpy_helper.from_array(matrix.reshape(-1)[kept], dense.name),
            onnx.numpy_helper.from_array(kept.astype(np.int64), f"{dense.name}.indices"),
            matrix.shape,
        )
    )
    del model.graph.initializer[0]
    return model
