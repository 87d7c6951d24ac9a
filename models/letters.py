"""Train the small text model of the tests: a two-layer BERT that counts how often a letter occurs.

Run `python -m models.letters` (after `pip install -e .[train]`; a minute on two cores) to write, beside this file:

- `letters.onnx`: opset 17, `input_ids` and `attention_mask` [batch, length] int64 -> `logits` [batch, 16];
- `letters_calib.npz`: 512 questions, padded to 32 tokens;
- `letters_eval.npz`: 1,000 other questions and their `label`.

A question is `[CLS] q [SEP] s [SEP] [PAD]...`: s is 4 to 28 letters out of six; the answer is how many of them are q
(15 stands for fifteen or more).
Measured: 977 of those 1,000 right (97.7%) with torch 2.13.0; always giving the commonest answer gets 119.

The graph has what makes static quantization of such models fail: padding hidden by adding the lowest float before
each Softmax, LayerNormalization, Gelu by Erf, and embeddings.
"""
# torch is needed only to train, so the type checker may not find it.
# mypy: disable-error-code="import-not-found, unused-ignore"
# mypy: allow-subclassing-any

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

HERE = Path(__file__).parent
PAD, CLS, SEP, FIRST_LETTER = 0, 1, 2, 3
LETTERS, ANSWERS = 6, 16
LENGTH = 32  # [CLS] q [SEP] + 28 letters + [SEP]
HIDDEN, HEADS, LAYERS = 64, 4, 2
STEPS, BATCH = 500, 128


def questions(count: int, generator: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random questions: ids and mask [count, LENGTH] int64, answers [count] in 0..15."""
    ids = np.full((count, LENGTH), PAD, np.int64)
    answers = np.zeros(count, np.int64)
    for row in range(count):
        length, asked = generator.integers(4, LENGTH - 3), generator.integers(LETTERS)
        letters = generator.integers(LETTERS, size=length)
        # Some strings are rich in the letter asked for; otherwise nearly every answer would be 0 to 6.
        letters[generator.random(length) < generator.uniform(0, 0.6)] = asked
        ids[row, : length + 4] = [CLS, asked + FIRST_LETTER, SEP, *(letters + FIRST_LETTER), SEP]
        answers[row] = min(int(np.count_nonzero(letters == asked)), ANSWERS - 1)
    return torch.from_numpy(ids), torch.from_numpy((ids != PAD).astype(np.int64)), torch.from_numpy(answers)


class Attention(nn.Module):
    """Multi-head self-attention written out, so that the exporter emits MatMul, Add and Softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """[batch, length, HIDDEN]; bias [batch, 1, 1, length] is added to the scores."""

        def split(y: Tensor) -> Tensor:
            return y.reshape(y.shape[0], y.shape[1], HEADS, HIDDEN // HEADS).transpose(1, 2)

        query, key, value = split(self.query(x)), split(self.key(x)), split(self.value(x))
        scores = query @ key.transpose(2, 3) / (HIDDEN // HEADS) ** 0.5 + bias
        mixed: Tensor = functional.softmax(scores, dim=-1) @ value
        return self.out(mixed.transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention and a feed-forward network, each added to its input and then normalised, as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.feed = nn.Sequential(nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU(), nn.Linear(4 * HIDDEN, HIDDEN))
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """[batch, length, HIDDEN] -> the same."""
        x = self.norm1(x + self.attention(x, bias))
        return self.norm2(x + self.feed(x))  # type: ignore[no-any-return]


class Letters(nn.Module):
    """Token and position embeddings, the layers, and an answer read at [CLS]; 0.1 million weights."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(FIRST_LETTER + LETTERS, HIDDEN)
        self.positions = nn.Embedding(LENGTH, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.answer = nn.Linear(HIDDEN, ANSWERS)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Ids and mask [batch, length] -> logits [batch, ANSWERS]."""
        bias = (1 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        x = self.norm(self.tokens(ids) + self.positions(torch.arange(ids.shape[1])))
        for layer in self.layers:
            x = layer(x, bias)
        return self.answer(x[:, 0])  # type: ignore[no-any-return]


def train(model: nn.Module, generator: np.random.Generator) -> None:
    """Minimise cross-entropy on fresh questions with AdamW and one learning-rate cycle."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=STEPS)
    model.train()
    for step in range(STEPS):
        ids, mask, answers = questions(BATCH, generator)
        loss = functional.cross_entropy(model(ids, mask), answers)
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def export(model: nn.Module, example: tuple[Tensor, Tensor], path: Path) -> None:
    """Write the ONNX file with dynamic batch and length."""
    torch.onnx.export(
        model,
        example,
        path,
        input_names=["input_ids", "attention_mask"],
        output_names=["logits"],
        dynamic_axes={
            "input_ids": {0: "batch", 1: "length"},
            "attention_mask": {0: "batch", 1: "length"},
            "logits": {0: "batch"},
        },
        opset_version=17,
        dynamo=False,
    )


def main() -> None:
    """Train, measure and write the three files."""
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    model = Letters()
    train(model, generator)
    ids, mask, answers = questions(1000, generator)
    with torch.no_grad():
        right = (model(ids, mask).argmax(1) == answers).sum().item()
    print(f"{right} of 1000 right, {answers.bincount().max()} by the commonest answer")
    export(model, (ids[:2], mask[:2]), HERE / "letters.onnx")
    np.savez_compressed(HERE / "letters_eval.npz", input_ids=ids, attention_mask=mask, label=answers)
    ids, mask, _ = questions(512, generator)
    np.savez_compressed(HERE / "letters_calib.npz", input_ids=ids, attention_mask=mask)


if __name__ == "__main__":
    main()
