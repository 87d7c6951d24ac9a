"""Every criterion against its formula spelt out in loops."""

from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxcomp.numerics import saliency
from onnxcomp.numerics.arrays import Floats
from onnxcomp.numerics.moments import Moments
from onnxcomp.numerics.obs import Consumer, eliminate

CHANNELS = 6

rng = np.random.default_rng(0)
WEIGHTS = rng.normal(size=(CHANNELS, 10)) * (rng.random((CHANNELS, 10)) < 0.7)
WEIGHTS[4] = 0
ACTIVATION = np.maximum(rng.normal(size=(8, CHANNELS, 5)), 0)
ACTIVATION[:, 4] = 0
MOMENTS = Moments.of(
    5,
    sums=ACTIVATION.sum(axis=2),
    squares=np.square(ACTIVATION).sum(axis=2),
    magnitudes=ACTIVATION.sum(axis=2),
    nonzeros=np.count_nonzero(ACTIVATION, axis=2).astype(float),
)


def consumer(seed: int = 0) -> Consumer:
    """A layer with four outputs, each channel two of its inputs, out of order."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(100, 12)) @ random.normal(size=(12, 12))
    return Consumer(random.normal(size=(4, 12)), x.T @ x / 100, random.permutation(12).reshape(CHANNELS, 2))


def test_magnitudes() -> None:
    for c, row in enumerate(WEIGHTS):
        total, squares = sum(abs(w) for w in row), sum(w * w for w in row)
        nonzero = sum(w != 0 for w in row)
        assert saliency.l1(WEIGHTS)[c] == pytest.approx(total)
        assert saliency.l2(WEIGHTS)[c] == pytest.approx(squares**0.5)
        assert saliency.l1_nonzero(WEIGHTS)[c] == pytest.approx(total / nonzero if nonzero else 0)
        assert saliency.l2_nonzero(WEIGHTS)[c] == pytest.approx(squares**0.5 / nonzero if nonzero else 0)
        assert saliency.gamma(WEIGHTS[:, :1])[c] == abs(row[0])


def test_the_distance_to_the_geometric_median() -> None:
    for c, row in enumerate(WEIGHTS):
        expected = sum(np.linalg.norm(row - other) for other in WEIGHTS)
        assert saliency.fpgm(WEIGHTS)[c] == pytest.approx(expected, rel=1e-7)


def test_a_filter_that_others_replace_is_the_first_to_go_by_fpgm() -> None:
    spread = rng.normal(size=(5, 3))
    assert np.argmin(saliency.fpgm(np.vstack([spread, spread.mean(axis=0)]))) == 5


def test_chance_depends_on_seed_and_name_alone() -> None:
    scores = saliency.random(CHANNELS, 3, "Conv_1")
    np.testing.assert_array_equal(scores, saliency.random(CHANNELS, 3, "Conv_1"))
    assert not set(scores) & {*saliency.random(CHANNELS, 4, "Conv_1"), *saliency.random(CHANNELS, 3, "Conv_2")}


def test_activations() -> None:
    for c in range(CHANNELS):
        values = [float(x) for x in ACTIVATION[:, c].ravel()]
        nonzero = sum(x != 0 for x in values)
        levels = [float(np.abs(sample).mean()) for sample in ACTIVATION[:, c]]
        assert saliency.activation(MOMENTS)[c] == pytest.approx(sum(values) / len(values))
        assert saliency.activation_std(MOMENTS)[c] == pytest.approx(np.std(levels))
        assert saliency.feature_map(MOMENTS)[c] == pytest.approx(sum(values) / nonzero if nonzero else 0)
        assert saliency.apoz(MOMENTS)[c] == pytest.approx(1 - sum(x == 0 for x in values) / len(values))


@pytest.mark.parametrize("score", [saliency.activation, saliency.activation_std, saliency.feature_map, saliency.apoz])
def test_of_nothing_nothing_is_known(score: object) -> None:
    assert callable(score)
    np.testing.assert_array_equal(score(Moments.empty(3)), np.zeros(3))


def test_wanda() -> None:
    layer, norms = consumer(), rng.random(12)
    for c, columns in enumerate(layer.columns):
        expected = sum(abs(layer.weight[o, j]) * norms[j] for o, j in product(range(4), columns))
        assert saliency.wanda(layer.weight, norms, layer.columns)[c] == pytest.approx(expected)


def error_without(layer: Consumer, columns: NDArray[np.int64], H: Floats, *, fitted: bool) -> float:
    """tr(dW H dW^T) when columns become zero, the others as they are or by the normal equations."""
    V = np.array(layer.weight)
    V[:, columns] = 0
    if fitted:
        kept = np.setdiff1d(np.arange(12), columns)
        V[:, kept] = np.linalg.solve(H[np.ix_(kept, kept)], H[kept] @ layer.weight.T).T
    dW = layer.weight - V
    return float(np.trace(dW @ H @ dW.T))


def test_brain_damage_is_the_error_with_uncorrelated_inputs() -> None:
    layer = consumer()
    for c, columns in enumerate(layer.columns):
        diagonal = np.diag(np.diagonal(layer.second_moment))
        assert saliency.obd(layer)[c] == pytest.approx(error_without(layer, columns, diagonal, fitted=False))


def test_brain_surgeon_is_the_error_once_the_others_make_up_for_it() -> None:
    layer = consumer()
    for c, columns in enumerate(layer.columns):
        expected = error_without(layer, columns, layer.second_moment, fitted=True)
        assert saliency.obs(layer, damping=0)[c] == pytest.approx(expected, rel=1e-6)


def test_elimination_starts_where_brain_surgeon_points() -> None:
    consumers = [consumer(seed) for seed in range(3)]
    scores = saliency.combine([saliency.obs(layer) / layer.energy for layer in consumers], "sum", normalised=False)
    found = eliminate(consumers)
    assert found.order[0] == np.argmin(scores)
    assert found.errors[1] == pytest.approx(scores.min())


@pytest.mark.parametrize("normalised", [False, True])
def test_coupled_layers_are_combined(normalised: bool) -> None:
    members = [saliency.l1(WEIGHTS), 100 * saliency.l2(WEIGHTS), np.zeros(CHANNELS)]
    for c in range(CHANNELS):
        scores = [float(m[c] / (m.mean() or 1)) if normalised else float(m[c]) for m in members]
        assert saliency.combine(members, "mean", normalised)[c] == pytest.approx(sum(scores) / 3)
        assert saliency.combine(members, "max", normalised)[c] == pytest.approx(max(scores))
        assert saliency.combine(members, "sum", normalised)[c] == pytest.approx(sum(scores))


def test_scale_does_not_matter_when_normalised() -> None:
    first, second = saliency.l1(WEIGHTS), saliency.l2(WEIGHTS)
    np.testing.assert_allclose(
        saliency.combine([first, second], "sum", normalised=True),
        saliency.combine([1e6 * first, second], "sum", normalised=True),
    )


def test_cost_is_deducted() -> None:
    scores = saliency.l1(WEIGHTS)
    np.testing.assert_allclose(saliency.penalised(scores, 2e3, 1e-3), scores - 2)
    each = np.arange(CHANNELS) * 1e3
    np.testing.assert_allclose(saliency.penalised(scores, each, 1e-3), scores - np.arange(CHANNELS))
