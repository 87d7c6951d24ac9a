"""Convolutional models that answer with pictures or maps: segmentation, detection, super-resolution."""

import onnx_ir as ir

from models.convnets import image_net
from models.net import Net


def unet() -> ir.Model:
    """Encoder, decoder, Concat between; one step up by ConvTranspose, one by Resize (Ronneberger et al. 2015)."""
    net, x = image_net(opset=15)

    def block(x: ir.Value, inputs: int, outputs: int) -> ir.Value:
        return net.relu(net.conv_norm(net.relu(net.conv_norm(x, inputs, outputs)), outputs, outputs))

    def halve(x: ir.Value) -> ir.Value:
        return net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])

    fine = block(x, 3, 16)
    middle = block(halve(fine), 16, 32)
    coarse = block(halve(middle), 32, 64)
    weight = net.weight(net.normal(64, 32, 2, 2, fan_in=64), "up.weight")
    up = net.op("ConvTranspose", coarse, weight, kernel_shape=[2, 2], strides=[2, 2])
    middle = block(net.op("Concat", up, middle, axis=1), 64, 32)
    up = net.upsample(middle, 2, "linear")
    fine = block(net.op("Concat", up, fine, axis=1), 48, 16)
    net.output("mask", net.op("Sigmoid", net.conv(fine, 16, 1, 1)), ["batch", 1, 32, 32])
    return net.model()


def detector() -> ir.Model:
    """A feature pyramid of two levels under heads whose weights the levels share (Lin et al. 2016, Figure 3)."""
    net, x = image_net(opset=12, size=64)
    x = net.relu(net.conv_norm(net.relu(net.conv_norm(x, 3, 16, stride=2)), 16, 32, stride=2))
    fine = net.relu(net.conv_norm(x, 32, 64, stride=2))
    coarse = net.relu(net.conv_norm(fine, 64, 96, stride=2))
    top = net.conv(coarse, 96, 64, 1)
    merged = net.op("Add", net.conv(fine, 64, 64, 1), net.upsample(top, 2, "nearest"))
    levels = {8: net.conv(merged, 64, 64), 16: net.conv(top, 64, 64)}

    tower = net.weight(net.normal(64, 64, 3, 3, fan_in=64 * 9), "tower.weight")
    heads = {
        name: (width, net.weight(net.normal(width, 64, 1, 1, fan_in=64), f"{name}.weight"))
        for name, width in (("scores", 5), ("boxes", 4))
    }
    for stride, features in levels.items():
        shared = net.relu(net.op("Conv", features, tower, kernel_shape=[3, 3], pads=[1, 1, 1, 1]))
        for name, (width, weight) in heads.items():
            answer = net.op("Transpose", net.op("Conv", shared, weight, kernel_shape=[1, 1]), perm=[0, 2, 3, 1])
            answer = net.reshape(net.op("Sigmoid", answer) if name == "scores" else answer, 0, -1, width)
            net.output(f"{name}_{stride}", answer, ["batch", (64 // stride) ** 2, width])
    return net.model()


def superres() -> ir.Model:
    """Convolutions at low resolution, then DepthToSpace; height and width are dynamic (Shi et al. 2016)."""
    net = Net(opset=20)
    x = net.input("input", ["batch", 1, "height", "width"])
    x = net.relu(net.conv(x, 1, 64, 5))
    x = net.relu(net.conv(x, 64, 64))
    x = net.relu(net.conv(x, 64, 32))
    x = net.op("DepthToSpace", net.conv(x, 32, 4), blocksize=2, mode="CRD")
    net.output("output", x, ["batch", 1, "height_2", "width_2"])
    return net.model()
