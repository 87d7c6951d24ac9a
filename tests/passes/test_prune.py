"""Pruning reaches its target, keeps what it can, and says what it left alone."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from models import zoo
from onnxcomp import model as models
from onnxcomp.core import Context, node_pattern
from onnxcomp.data import open_dataset
from onnxcomp.errors import OptionError
from onnxcomp.layers import layers
from onnxcomp.passes.prune import Prune
from onnxcomp.passes.simplify import Simplify
from onnxcomp.runtime import Session
from onnxcomp.widths import Cost, totals

SHIPPED = Path(__file__).parents[2] / "models"


@pytest.fixture(scope="module")
def digits() -> ir.Model:
    return Simplify()(models.load(SHIPPED / "digits.onnx")).model


def context(model: ir.Model, count: int = 128, **settings: object) -> Context:
    data = open_dataset(SHIPPED / "digits_calib.npz", models.input_specs(model))
    return Context(data.select(range(min(count, len(data)))), **settings)  # type: ignore[arg-type]


def error(original: ir.Model, made: ir.Model) -> float:
    """Relative squared error of the outputs on the evaluation file."""
    x = np.load(SHIPPED / "digits_eval.npz")
    feeds = {spec.name: x[spec.name] for spec in models.input_specs(original)}
    answers: list[Any] = [next(iter(Session(model).run(feeds).values())) for model in (original, made)]
    want, got = answers
    return float(np.square(want - got).sum() / np.square(want).sum())


@pytest.mark.parametrize(("cost", "read"), [(Cost.FLOPS, "flops"), (Cost.PARAMS, "parameters"), (Cost.SIZE, "bytes")])
def test_what_remains_is_what_was_asked_for(digits: ir.Model, cost: Cost, read: str) -> None:
    pruned = Prune(0.6, cost, reconstruct=False)(digits, context(digits)).model
    share = getattr(totals(pruned), read) / getattr(totals(digits), read)
    assert 0.55 < share <= 0.61


def test_fitting_again_lowers_the_error(digits: ir.Model) -> None:
    plain = Prune(0.5, reconstruct=False)(digits, context(digits)).model
    fitted = Prune(0.5)(digits, context(digits)).model
    assert error(digits, fitted) < 0.7 * error(digits, plain)
    assert error(digits, fitted) < 0.0025  # twice what was measured, and less than the 0.0029 without fitting
    assert models.file_bytes(fitted) < 0.8 * models.file_bytes(digits)


def test_widths_are_multiples(digits: ir.Model) -> None:
    pruned = Prune(0.6, multiple=16, reconstruct=False)(digits, context(digits)).model
    widths = [len(layer.by_output()) for layer in layers(pruned)]
    assert all(width % 16 == 0 for width in widths[:-1])
    assert widths != [len(layer.by_output()) for layer in layers(digits)]


def test_the_same_seed_gives_the_same_bytes(digits: ir.Model) -> None:
    first, second = (Prune(0.7)(digits, context(digits, 64)).model for _ in range(2))
    assert models.to_bytes(first) == models.to_bytes(second)


def test_excluded_layers_keep_their_channels(digits: ir.Model) -> None:
    names = [layer.name for layer in layers(digits)]
    outcome = Prune(0.5, reconstruct=False)(digits, context(digits, exclude=node_pattern(f"^{names[0]}$")))
    after = {layer.name: layer for layer in layers(outcome.model)}
    assert len(after[names[0]].by_output()) == len(next(iter(layers(digits))).by_output())
    assert any(skip.reason == "excluded by the user" for skip in outcome.skips)


def test_without_data_it_says_so() -> None:
    model = models.load(zoo.build("vgg"))
    outcome = Prune(0.7)(model, Context())
    assert outcome.changes
    assert all("made-up inputs" in change.what for change in outcome.changes)


def test_nothing_to_prune_is_unchanged() -> None:
    model = models.load(zoo.build("quantized_already"))
    assert not Prune(0.5)(model, Context()).modified


@pytest.mark.parametrize("settings", [{"remains": 0}, {"remains": 1.5}, {"multiple": 0}, {"least": 2}])
def test_shares_that_make_no_sense_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(OptionError, match="make no sense"):
        Prune(**settings)  # type: ignore[arg-type]
