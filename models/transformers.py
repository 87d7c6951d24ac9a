"""Transformers and their like, written out operator by operator as exporters do."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from models.convnets import image_net
from models.net import INT64, Net

SIZE, HEADS = 64, 4
VOCABULARY = 100
LOWEST = np.finfo(np.float32).min

Hide = Callable[[ir.Value], ir.Value]
"""Maps attention scores to scores that are very low wherever a token must not look."""


def mix(net: Net, query: ir.Value, key: ir.Value, value: ir.Value, hide: Hide) -> ir.Value:
    """Softmax(hide(q k^T / sqrt d)) v, head by head and joined again: three times [batch, length, SIZE] -> once."""
    query, value = (
        net.op("Transpose", net.reshape(x, 0, 0, HEADS, SIZE // HEADS), perm=[0, 2, 1, 3]) for x in (query, value)
    )
    key = net.op("Transpose", net.reshape(key, 0, 0, HEADS, SIZE // HEADS), perm=[0, 2, 3, 1])
    scores = net.op("Div", net.op("MatMul", query, key), net.constant((SIZE // HEADS) ** 0.5, np.float32))
    mixed = net.op("MatMul", net.op("Softmax", hide(scores), axis=-1), value)
    return net.reshape(net.op("Transpose", mixed, perm=[0, 2, 1, 3]), 0, 0, SIZE)


def attention(net: Net, x: ir.Value, hide: Hide = lambda scores: scores) -> ir.Value:
    """Self-attention with a MatMul for each of query, key, value and output."""
    query, key, value = (net.linear(x, SIZE, SIZE) for _ in range(3))
    return net.linear(mix(net, query, key, value, hide), SIZE, SIZE)


def feed_forward(net: Net, x: ir.Value) -> ir.Value:
    """Two linear layers with Gelu between."""
    return net.linear(net.gelu(net.linear(x, SIZE, 4 * SIZE)), 4 * SIZE, SIZE)


def table(net: Net, rows: int) -> ir.Value:
    """An embedding table [rows, SIZE] with values around 1."""
    return net.weight(net.normal(rows, SIZE, fan_in=2), "embedding")


def patches(net: Net, image: ir.Value) -> ir.Value:
    """A 32x32 image as a sequence of 64 patches, [batch, 64, SIZE]."""
    weight = net.weight(net.normal(SIZE, 3, 4, 4, fan_in=48), "patch.weight")
    x = net.op("Conv", image, weight, kernel_shape=[4, 4], strides=[4, 4])
    return net.op("Transpose", net.reshape(x, 0, SIZE, -1), perm=[0, 2, 1])


def vit() -> ir.Model:
    """Image patches and a class token under pre-norm attention (Dosovitskiy et al. 2020); LayerNorm spelt out."""
    net, image = image_net(opset=16)
    shape = net.op("Concat", net.size_of(image, 0), net.constant([1, SIZE]), axis=0)
    token = net.op("Expand", net.weight(net.normal(1, 1, SIZE, fan_in=2), "class_token"), shape)
    x = net.op("Concat", token, patches(net, image), axis=1)
    x = net.op("Add", x, net.weight(net.normal(1, 65, SIZE, fan_in=8), "positions"))
    for _ in range(2):
        x = net.op("Add", x, attention(net, net.layer_norm(x, SIZE)))
        x = net.op("Add", x, feed_forward(net, net.layer_norm(x, SIZE)))
    first = net.op("Gather", net.layer_norm(x, SIZE), net.constant(0), axis=1)
    net.output("logits", net.gemm(first, SIZE, 10), ["batch", 10])
    return net.model()


def bert() -> ir.Model:
    """Token, position and type embeddings, a padding mask of -3.4e38, post-norm layers (Devlin et al. 2018)."""
    net = Net(opset=17)
    names = ("input_ids", "attention_mask", "token_type_ids")
    ids, mask, types = (net.input(name, ["batch", "length"], INT64) for name in names)
    visible = net.op("Cast", net.unsqueeze(mask, 1, 2), to=ir.DataType.FLOAT)
    hidden = net.op("Sub", net.constant(1, np.float32), visible)
    bias = net.op("Mul", hidden, net.constant(LOWEST, np.float32))

    def hide(scores: ir.Value) -> ir.Value:
        return net.op("Add", scores, bias)

    words = net.op("Add", net.op("Gather", table(net, VOCABULARY), ids), net.op("Gather", table(net, 2), types))
    positions = net.op("Slice", table(net, 32), net.constant([0]), net.size_of(ids, 1), net.constant([0]))
    x = net.layer_norm(net.op("Add", words, positions), SIZE)
    for _ in range(2):
        x = net.layer_norm(net.op("Add", x, attention(net, x, hide)), SIZE)
        x = net.layer_norm(net.op("Add", x, feed_forward(net, x)), SIZE)
    pooled = net.op("Tanh", net.gemm(net.op("Gather", x, net.constant(0), axis=1), SIZE, SIZE))
    net.output("last_hidden_state", x, ["batch", "length", SIZE])
    net.output("pooler_output", pooled, ["batch", SIZE])
    return net.model()


def gpt() -> ir.Model:
    """One table embeds and, transposed, decodes; query, key and value come from one Gemm (Radford et al. 2019)."""
    net = Net(opset=18)
    ids = net.input("input_ids", ["batch", "length"], INT64)
    words, length = table(net, VOCABULARY), net.size_of(ids, 1)
    positions = net.op("Slice", table(net, 32), net.constant([0]), length, net.constant([0]))
    x = net.op("Add", net.op("Gather", words, ids), positions)

    triangle = net.weight(np.tri(32, dtype=np.bool_)[None, None], "causal")
    square = net.op("Concat", length, length, axis=0)
    past = net.op("Slice", triangle, net.constant([0, 0]), square, net.constant([2, 3]))

    def hide(scores: ir.Value) -> ir.Value:
        return net.op("Where", past, scores, net.constant(LOWEST, np.float32))

    for _ in range(2):
        flat = net.gemm(net.reshape(net.layer_norm(x, SIZE), -1, SIZE), SIZE, 3 * SIZE)
        shape = net.op("Concat", net.op("Shape", ids), net.constant([3 * SIZE]), axis=0)
        query, key, value = net.ops(3, "Split", net.op("Reshape", flat, shape), net.constant([SIZE] * 3), axis=-1)
        x = net.op("Add", x, net.linear(mix(net, query, key, value, hide), SIZE, SIZE))
        x = net.op("Add", x, feed_forward(net, net.layer_norm(x, SIZE)))
    logits = net.op("MatMul", net.layer_norm(x, SIZE), net.op("Transpose", words, perm=[1, 0]))
    net.output("logits", logits, ["batch", "length", VOCABULARY])
    return net.model()


def mixer() -> ir.Model:
    """Linear layers across patches and across channels in turn (Tolstikhin et al. 2021, Figure 1)."""
    net, image = image_net(opset=19)
    x = patches(net, image)
    for _ in range(2):
        y = net.op("Transpose", net.layer_norm(x, SIZE), perm=[0, 2, 1])
        x = net.op("Add", x, net.op("Transpose", feed_forward(net, y), perm=[0, 2, 1]))
        x = net.op("Add", x, feed_forward(net, net.layer_norm(x, SIZE)))
    net.output("logits", net.gemm(net.mean(net.layer_norm(x, SIZE), 1, keepdims=False), SIZE, 10), ["batch", 10])
    return net.model()
