"""Train the demo's model: a residual CNN on scikit-learn's handwritten digits.

Run `python -m models.digits` (after `pip install -e .[train]`; about a minute on two cores) to write, beside this file:

- `digits.onnx`: opset 17, `input` [batch, 1, 16, 16] float32 in 0..1 -> `logits` [batch, 10];
- `digits_calib.npz`: `input` of 512 training images;
- `digits_eval.npz`: `input` and `label` of the 597 images that training never saw.

Measured: 593 of those 597 right (99.3%) with torch 2.13.0.

The 8x8 images are scaled to 16x16, and every stage is at least 64 channels wide, so that convolutions weigh what they
weigh in a real network. BatchNorm stays unfolded in the file: folding it is the optimizer's work.
"""
# torch is needed only to train, so the type checker may not find it.
# mypy: disable-error-code="import-not-found, unused-ignore"
# mypy: allow-subclassing-any

from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

HERE = Path(__file__).parent
EPOCHS = 12
BATCH = 50
TEST_IMAGES = 597
CALIBRATION_IMAGES = 512


def conv_norm(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution and BatchNorm."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs))


class Block(nn.Module):
    """Two convolutions and a shortcut, as in ResNet (He et al. 2015, Figure 2)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first, self.second = conv_norm(inputs, outputs, stride), conv_norm(outputs, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs or stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, inputs, h, w] -> [batch, outputs, h / stride, w / stride]."""
        return torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))


def network() -> nn.Sequential:
    """The CNN: 1x16x16 -> 64x16x16 -> 128x8x8 -> 10 logits, 0.37 million weights."""
    return nn.Sequential(
        conv_norm(1, 64), nn.ReLU(), Block(64, 64), Block(64, 64), Block(64, 128, stride=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def load_images() -> tuple[Tensor, Tensor]:
    """All 1,797 images as [1797, 1, 16, 16] in 0..1, and their labels."""
    images, labels = load_digits(return_X_y=True)
    small = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return functional.interpolate(small, scale_factor=2, mode="bilinear"), torch.tensor(labels)


def shift(images: Tensor) -> Tensor:
    """The batch moved by up to two pixels each way, the only augmentation."""
    down, right = torch.randint(0, 5, (2,)).tolist()
    return functional.pad(images, (2, 2, 2, 2))[:, :, down : down + 16, right : right + 16]


def train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Minimise cross-entropy with AdamW and one learning-rate cycle."""
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    model.train()
    for step in range(steps):
        if step % (len(images) // BATCH) == 0:
            batches = torch.randperm(len(images)).split(BATCH)
        chosen = batches[step % (len(images) // BATCH)]
        loss = functional.cross_entropy(model(shift(images[chosen])), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def export(model: nn.Module, example: Tensor, path: Path) -> None:
    """Write the ONNX file; PRESERVE keeps the exporter from folding BatchNorm."""
    torch.onnx.export(
        model,
        (example,),
        path,
        input_names=["input"],
        output_names=["logits"],
        dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
        opset_version=17,
        training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
        dynamo=False,
    )


def main() -> None:
    """Train, measure and write the three files."""
    torch.manual_seed(0)
    images, labels = load_images()
    train_rows, test_rows = train_test_split(
        np.arange(len(labels)), test_size=TEST_IMAGES, random_state=0, stratify=labels
    )
    model = network()
    train(model, images[train_rows], labels[train_rows])
    with torch.no_grad():
        right = (model(images[test_rows]).argmax(1) == labels[test_rows]).sum().item()
    print(f"{right} of {len(test_rows)} right: {right / len(test_rows):.2%}")
    export(model, images[:2], HERE / "digits.onnx")
    np.savez_compressed(HERE / "digits_calib.npz", input=images[train_rows[:CALIBRATION_IMAGES]])
    np.savez_compressed(HERE / "digits_eval.npz", input=images[test_rows], label=labels[test_rows])


if __name__ == "__main__":
    main()
