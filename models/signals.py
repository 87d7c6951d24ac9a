"""Models of sequences and volumes: recurrent taggers, one- and three-dimensional convolutions."""

from typing import Any

import onnx_ir as ir

from models.net import INT64, Net

HIDDEN = 64


def recurrent(net: Net, op_type: str, gates: int, x: ir.Value, inputs: int, directions: int = 1) -> ir.Value:
    """An LSTM or GRU over [length, batch, inputs]; returns [length, directions, batch, HIDDEN]."""
    weights = [
        net.weight(net.normal(directions, gates * HIDDEN, inputs, fan_in=2 * inputs), "recurrent.W"),
        net.weight(net.normal(directions, gates * HIDDEN, HIDDEN, fan_in=2 * HIDDEN), "recurrent.R"),
        net.weight(net.uniform(-0.1, 0.1, directions, 2 * gates * HIDDEN), "recurrent.B"),
    ]
    # Only PyTorch's GRU multiplies by the reset gate after the matrix product; ONNX's default is before.
    settings: dict[str, Any] = {"linear_before_reset": 1} if op_type == "GRU" else {}
    direction = "bidirectional" if directions == 2 else "forward"
    return net.op(op_type, x, *weights, hidden_size=HIDDEN, direction=direction, **settings)


def lstm_tagger() -> ir.Model:
    """A tag per token: embedding, bidirectional LSTM, linear layer (Huang et al. 2015)."""
    net = Net(opset=14)
    ids = net.input("input_ids", ["batch", "length"], INT64)
    x = net.op("Gather", net.weight(net.normal(100, HIDDEN, fan_in=2), "embedding"), ids)
    x = net.op("Transpose", x, perm=[1, 0, 2])
    x = net.op("Transpose", recurrent(net, "LSTM", 4, x, HIDDEN, directions=2), perm=[2, 0, 1, 3])
    net.output("tags", net.linear(net.reshape(x, 0, 0, 2 * HIDDEN), 2 * HIDDEN, 9), ["batch", "length", 9])
    return net.model()


def gru_tagger() -> ir.Model:
    """A tag per frame of 40 features: two stacked GRUs and a linear layer."""
    net = Net(opset=11)
    x = net.op("Transpose", net.input("frames", ["batch", "length", 40]), perm=[1, 0, 2])
    for inputs in (40, HIDDEN):
        x = net.op("Squeeze", recurrent(net, "GRU", 3, x, inputs), axes=[1])
    x = net.linear(net.op("Transpose", x, perm=[1, 0, 2]), HIDDEN, 9)
    net.output("tags", net.op("LogSoftmax", x, axis=2), ["batch", "length", 9])
    return net.model()


def conv1d() -> ir.Model:
    """Sound: a strided convolution, then causal dilated ones behind a Pad (van den Oord et al. 2016, Figure 3)."""
    net = Net(opset=18)
    x = net.relu(net.conv(net.input("audio", ["batch", 1, "samples"]), 1, 64, 9, stride=4, rank=1))
    for dilation in (1, 2, 4):
        padded = net.op("Pad", x, net.constant([0, 0, 2 * dilation, 0, 0, 0]))
        weight, bias = net.weight(net.normal(64, 64, 3, fan_in=64 * 3)), net.weight(net.uniform(-0.1, 0.1, 64))
        x = net.op("Add", x, net.relu(net.op("Conv", padded, weight, bias, kernel_shape=[3], dilations=[dilation])))
    net.output("logits", net.gemm(net.mean(x, 2, keepdims=False), 64, 10), ["batch", 10])
    return net.model()


def conv3d() -> ir.Model:
    """Video: convolutions over time, height and width (Tran et al. 2014)."""
    net = Net(opset=21)
    x = net.input("video", ["batch", 1, 8, 16, 16])
    for inputs, outputs in [(1, 16), (16, 32), (32, 64)]:
        x = net.relu(net.batch_norm(net.conv(x, inputs, outputs, bias=False, rank=3), outputs))
        x = net.op("MaxPool", x, kernel_shape=[2, 2, 2], strides=[2, 2, 2])
    net.classify(x, 64)
    return net.model()
