"""What passes say that they could do to each layer, against what they then do."""

import functools
from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from onnxcomp.calibration import calibrate
from onnxcomp.constants import decode_weights
from onnxcomp.core import Option, Pass
from onnxcomp.errors import OptionError
from onnxcomp.inspection import inspect
from onnxcomp.layers import Layer, layers
from onnxcomp.numerics.feedback import grouped_error
from onnxcomp.passes.binarize import Binarize
from onnxcomp.passes.equalize import Equalize
from onnxcomp.passes.factorize import Factorize
from onnxcomp.passes.share import Share
from onnxcomp.passes.sparsify import Sparsify
from onnxcomp.splitting import Clock
from tests.passes.small import context, network

STORING: list[Pass] = [
    Share(reconstruct=False),
    Share(method="product", reconstruct=False),  # type: ignore[arg-type]
    Share(method="hash", reconstruct=False),  # type: ignore[arg-type]
    Share(channels=8, reconstruct=False),
    Sparsify(),
    Sparsify(of=4),
    Binarize(reconstruct=False),
]
PASSES = [*STORING, Factorize(reconstruct=False)]


@pytest.fixture(autouse=True)
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timings are no matter of tests."""
    monkeypatch.setattr(Clock, "slowdowns", lambda *given: np.full(len(given[3]), 0.5))


@functools.cache
def by_part(technique: Pass) -> dict[str, list[Option]]:
    found: dict[str, list[Option]] = defaultdict(list)
    for option in technique.options(network(), context()):
        found[option.part].append(option)
    return found


@pytest.mark.parametrize("technique", PASSES, ids=repr)
def test_every_layer_has_a_curve_of_error_bytes_and_latency(technique: Pass) -> None:
    found = by_part(technique)
    stored = {layer.name: layer.matrix().nbytes for layer in layers(network())}
    assert set(found) == set(stored)
    for part, options in found.items():
        assert len({option.setting for option in options}) == len(options) >= 3
        for option in options:
            assert 0 < option.bytes < stored[part]
            assert option.latency == (0.5 if isinstance(technique, Factorize) else 1.0)
        cheapest, dearest = (pick(options, key=lambda option: option.bytes) for pick in (min, max))
        assert 0 <= dearest.error < cheapest.error < 1.1


@pytest.mark.parametrize("technique", PASSES, ids=repr)
def test_a_pass_that_takes_an_option_treats_that_layer_and_no_other(technique: Pass) -> None:
    options = list(by_part(technique).values())[1]
    option = options[len(options) // 2]
    outcome = technique.taking([option])(network(), context())
    assert [change.node for change in outcome.changes if change.what != "fitted again"] == [option.part]
    if not isinstance(technique, Factorize):
        assert {skip.node for skip in outcome.skips} >= set(by_part(technique)) - {option.part}


@pytest.mark.parametrize("technique", [*STORING[:4], STORING[-1]], ids=repr)
def test_what_it_then_loses_is_no_more_than_it_said(technique: Pass) -> None:
    """Errors are fed back only when weights are encoded: before that, each option promises less."""
    for part, options in by_part(technique).items():
        option = options[1]
        assert _error(technique, option, part) <= option.error * (1 + 1e-3)  # values are stored in 32 bits


def test_low_rank_takes_the_bytes_that_it_said() -> None:
    technique = Factorize(reconstruct=False)
    options = [own[0] for own in by_part(technique).values()]
    made = technique.taking(options)(network(), context()).model
    for option in options:
        stages = [layer for layer in layers(made) if layer.name.partition("_factor")[0] == option.part]
        assert sum(layer.matrix().nbytes for layer in stages) == option.bytes


def _layer(model: Any, name: str) -> Layer:
    return next(layer for layer in layers(model) if layer.name == name)


def _error(technique: Pass, option: Option, part: str) -> float:
    """Relative squared error of the layer whose weights a pass decoded, by the moments that the pass saw."""
    data, layer = context(), _layer(network(), part)
    assert data.data is not None
    made = technique.taking([option])(network(), data).model.clone()
    decode_weights(made)
    gram = calibrate(network(), data.data, data, layers=[layer]).grams[part]
    before, after = layer.matrix().astype(np.float64), _layer(made, part).matrix().astype(np.float64)
    return grouped_error(before - after, gram.second_moment) / grouped_error(before, gram.second_moment)


def test_settings_that_a_layer_does_not_have_are_refused() -> None:
    name = next(iter(layers(network()))).name
    for technique in (Share(), Sparsify(), Binarize(), Factorize()):
        with pytest.raises(OptionError):
            technique.taking([Option(name, "svd", 0, 0)])(network(), context())
    with pytest.raises(OptionError, match="as a whole"):
        Equalize().taking([])


def test_inspect_shows_them() -> None:
    shown = inspect(network(), options=["share", "equalize"])
    assert {row.technique for row in shown.options} == {"share"}
    assert any("equalize has no choice to offer" in note for note in shown.notes)
    with pytest.raises(OptionError, match="did you mean 'share'"):
        inspect(network(), options=["shere"])
