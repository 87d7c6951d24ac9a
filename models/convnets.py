"""Convolutional classifiers: `input` [batch, 3, size, size] -> `logits` [batch, classes]."""

import onnx_ir as ir

from models.net import Net


def image_net(opset: int, size: int = 32) -> tuple[Net, ir.Value]:
    """A net with an image as its input."""
    net = Net(opset)
    return net, net.input("input", ["batch", 3, size, size])


def resnet() -> ir.Model:
    """Residual blocks of 64 and 96 channels (He et al. 2015)."""
    net, x = image_net(opset=13)
    x = net.relu(net.conv_norm(x, 3, 64))
    for inputs, outputs, stride in [(64, 64, 1), (64, 64, 1), (64, 96, 2)]:
        branch = net.relu(net.conv_norm(x, inputs, outputs, stride=stride))
        branch = net.conv_norm(branch, outputs, outputs, gain=0.5)
        shortcut = x if stride == 1 else net.conv_norm(x, inputs, outputs, 1, stride)
        x = net.relu(net.op("Add", branch, shortcut))
    net.classify(x, 96)
    return net.model()


def preact_resnet() -> ir.Model:
    """BatchNorm and ReLU before each convolution, where BatchNorm folds into nothing before it (He et al. 2016)."""
    net, x = image_net(opset=11)
    x = net.conv(x, 3, 32, bias=False)
    for inputs, outputs, stride in [(32, 32, 1), (32, 64, 2), (64, 64, 1)]:
        active = net.relu(net.batch_norm(x, inputs))
        branch = net.relu(net.conv_norm(active, inputs, outputs, stride=stride))
        branch = net.conv(branch, outputs, outputs, bias=False)
        shortcut = x if inputs == outputs else net.conv(active, inputs, outputs, 1, stride, bias=False)
        x = net.op("Add", branch, shortcut)
    net.classify(net.relu(net.batch_norm(x, 64)), 64)
    return net.model()


def inverted_residual(net: Net, x: ir.Value, inputs: int, outputs: int, expand: int, stride: int) -> ir.Value:
    """Widen, filter each channel, narrow; the block of MobileNetV2 (Sandler et al. 2018, Table 1)."""
    wide, y = inputs * expand, x
    if expand > 1:
        y = net.relu6(net.conv_norm(x, inputs, wide, 1))
    y = net.relu6(net.conv_norm(y, wide, wide, stride=stride, group=wide))
    y = net.conv_norm(y, wide, outputs, 1)
    return net.op("Add", x, y) if inputs == outputs and stride == 1 else y


def mobilenetv2() -> ir.Model:
    """Four inverted residuals with ReLU6."""
    net, x = image_net(opset=11)
    x = net.relu6(net.conv_norm(x, 3, 16, stride=2))
    for inputs, outputs, expand, stride in [(16, 16, 1, 1), (16, 24, 6, 2), (24, 24, 6, 1), (24, 32, 6, 2)]:
        x = inverted_residual(net, x, inputs, outputs, expand, stride)
    net.classify(net.relu6(net.conv_norm(x, 32, 192, 1)), 192)
    return net.model()


def shufflenet() -> ir.Model:
    """Grouped 1x1 convolutions with the channels shuffled between them (Zhang et al. 2017, Figure 2b)."""
    net, x = image_net(opset=12)
    x = net.op("MaxPool", net.relu(net.conv_norm(x, 3, 64)), kernel_shape=[2, 2], strides=[2, 2])
    for _ in range(2):
        y = net.relu(net.conv_norm(x, 64, 64, 1, group=4))
        y = net.op("Transpose", net.reshape(y, 0, 4, 16, 16, 16), perm=[0, 2, 1, 3, 4])
        y = net.conv_norm(net.reshape(y, 0, 64, 16, 16), 64, 64, group=64)
        x = net.relu(net.op("Add", x, net.conv_norm(y, 64, 64, 1, group=4, gain=0.5)))
    net.classify(x, 64)
    return net.model()


def densenet() -> ir.Model:
    """Each layer sees the Concat of all before it (Huang et al. 2016)."""
    net, x = image_net(opset=9)
    x, channels = net.conv(x, 3, 32, bias=False), 32
    for stage in range(2):
        for _ in range(3):
            new = net.conv(net.relu(net.batch_norm(x, channels)), channels, 16, bias=False)
            x, channels = net.op("Concat", x, new, axis=1), channels + 16
        if stage == 0:
            x = net.conv(net.relu(net.batch_norm(x, channels)), channels, channels // 2, 1, bias=False)
            x, channels = net.op("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2]), channels // 2
    net.classify(net.relu(net.batch_norm(x, channels)), channels)
    return net.model()


def inception() -> ir.Model:
    """Four parallel branches per block, and local response normalization (Szegedy et al. 2014, Figure 2b)."""
    net, x = image_net(opset=10)
    x = net.op("MaxPool", net.relu(net.conv(x, 3, 64)), kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    x = net.op("LRN", x, size=5, alpha=1e-4, beta=0.75)
    for inputs in (64, 96):
        pooled = net.op("MaxPool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        branches = [
            net.relu(net.conv(x, inputs, 24, 1)),
            net.relu(net.conv(net.relu(net.conv(x, inputs, 32, 1)), 32, 48)),
            net.relu(net.conv(net.relu(net.conv(x, inputs, 8, 1)), 8, 12, 5)),
            net.relu(net.conv(pooled, inputs, 12, 1)),
        ]
        x = net.op("Concat", *branches, axis=1)
    net.classify(x, 96)
    return net.model()


def vgg() -> ir.Model:
    """Convolutions, then Flatten into Gemm, so that one channel owns many columns (Simonyan and Zisserman 2014)."""
    net, x = image_net(opset=12)
    channels = 3
    for width in (32, 64, 64):
        x, channels = net.relu(net.conv(x, channels, width)), width
        x = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = net.relu(net.gemm(net.op("Flatten", x, axis=1), 64 * 4 * 4, 128))
    net.output("logits", net.gemm(net.op("Dropout", x), 128, 10), ["batch", 10])
    return net.model()


def senet() -> ir.Model:
    """Swish, and channels weighted by a gate (Hu et al. 2017, Figure 3)."""
    net, x = image_net(opset=14)
    channels = 3
    for width in (32, 64):
        x = net.conv_norm(x, channels, width, stride=2)
        x = net.op("Mul", x, net.op("Sigmoid", x))
        squeezed = net.relu(net.conv(net.op("GlobalAveragePool", x), width, width // 4, 1))
        x = net.op("Mul", x, net.op("Sigmoid", net.conv(squeezed, width // 4, width, 1)))
        channels = width
    net.classify(x, channels)
    return net.model()


def convnext() -> ir.Model:
    """Depthwise 7x7, then LayerNorm and two linear layers in channels-last order (Liu et al. 2022, Figure 4)."""
    net, x = image_net(opset=17)
    x = net.op("Conv", x, net.weight(net.normal(64, 3, 4, 4, fan_in=48)), kernel_shape=[4, 4], strides=[4, 4])
    for _ in range(2):
        y = net.op("Transpose", net.conv(x, 64, 64, 7, group=64), perm=[0, 2, 3, 1])
        y = net.linear(net.gelu(net.linear(net.layer_norm(y, 64), 64, 256)), 256, 64)
        y = net.op("Mul", y, net.weight(net.uniform(0.1, 0.5, 64), "layer_scale"))
        x = net.op("Add", x, net.op("Transpose", y, perm=[0, 3, 1, 2]))
    pooled = net.layer_norm(net.mean(x, 2, 3, keepdims=False), 64)
    net.output("logits", net.gemm(pooled, 64, 10), ["batch", 10])
    return net.model()


def imagenet_resnet50() -> ir.Model:
    """ResNet-50 at its full size: 224x224, 25.6 million weights, 102 MB (He et al. 2015, Table 1)."""
    net, x = image_net(opset=17, size=224)
    x = net.relu(net.conv_norm(x, 3, 64, 7, 2))
    x = net.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    inputs = 64
    for width, blocks, first_stride in [(64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)]:
        for block in range(blocks):
            stride = first_stride if block == 0 else 1
            branch = net.relu(net.conv_norm(x, inputs, width, 1))
            branch = net.relu(net.conv_norm(branch, width, width, stride=stride))
            branch = net.conv_norm(branch, width, 4 * width, 1, gain=0.5)
            shortcut = net.conv_norm(x, inputs, 4 * width, 1, stride) if block == 0 else x
            x, inputs = net.relu(net.op("Add", branch, shortcut)), 4 * width
    net.classify(x, 2048, classes=1000)
    return net.model()


def imagenet_mobilenetv2() -> ir.Model:
    """MobileNetV2 at its full size: 224x224, 3.5 million weights, 14 MB (Sandler et al. 2018, Table 2)."""
    net, x = image_net(opset=17, size=224)
    x, inputs = net.relu6(net.conv_norm(x, 3, 32, stride=2)), 32
    stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for expand, width, blocks, first_stride in stages:
        for block in range(blocks):
            x = inverted_residual(net, x, inputs, width, expand, first_stride if block == 0 else 1)
            inputs = width
    net.classify(net.relu6(net.conv_norm(x, 320, 1280, 1)), 1280, classes=1000)
    return net.model()
