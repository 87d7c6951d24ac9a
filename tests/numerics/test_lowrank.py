"""Low rank: what stages in a row compute, and that their errors are the least there are."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.signal import correlate

from onnxcomp.numerics.feedback import layer_error
from onnxcomp.numerics.lowrank import Factors, LowRank

KINDS = {"svd": (5,), "spatial": (5,), "tucker": (4, 5), "cp": (7,)}


def layer(
    out: int = 8, inputs: int = 6, *kernel: int, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A kernel, and the covariance of correlated inputs."""
    random = np.random.default_rng(seed)
    width = inputs * int(np.prod(kernel))
    x = random.normal(size=(500, width)) @ random.normal(size=(width, width))
    return random.normal(size=(out, inputs, *kernel)), x.T @ x / 500


def run(factors: Factors, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The stages, one after another, on (channels, height, width), without padding."""
    for stage in factors.stages:
        groups = np.split(x, stage.groups)
        rows = [
            sum(correlate(plane, tap, "valid") for plane, tap in zip(group, kernel, strict=True))
            for group, part in zip(groups, np.split(stage.kernel, stage.groups), strict=True)
            for kernel in part
        ]
        x = np.stack(rows)
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_stages_compute_what_their_composition_does(kind: str) -> None:
    weight, H = layer(8, 6, 3, 2)
    factors = LowRank(weight, H).form(kind, KINDS[kind])
    x = np.random.default_rng(1).normal(size=(6, 7, 5))
    whole = Factors("svd", (), (type(factors.stages[0])(factors.composed()),))
    np.testing.assert_allclose(run(factors, x), run(whole, x), atol=1e-9)
    assert factors.composed().shape == weight.shape
    assert factors.parameters == sum(stage.kernel.size for stage in factors.stages)


@pytest.mark.parametrize("kind", ["svd", "spatial", "tucker"])
def test_full_rank_loses_nothing(kind: str) -> None:
    weight, H = layer(8, 6, 3, 3)
    factors = LowRank(weight, H).form(kind, {"svd": (8,), "spatial": (18,), "tucker": (6, 8)}[kind])
    assert factors.error(weight, H) < 1e-8 * layer_error(weight.reshape(8, -1), H)


@pytest.mark.parametrize("kernel", [(), (3,), (3, 3)])
def test_the_spectrum_is_the_error_at_every_rank(kernel: tuple[int, ...]) -> None:
    weight, H = layer(8, 6, *kernel)
    forms = LowRank(weight, H)
    for rank in (1, 3, 5):
        assert forms.form("svd", (rank,)).error(weight, H) == pytest.approx(
            forms.spectrum[rank:].sum(), rel=1e-2
        )  # but for damping


def test_svd_is_the_best_of_its_rank() -> None:
    """Least squares on both factors, in turn, from elsewhere, ends there and not below."""
    weight, H = layer(6, 10)
    best = LowRank(weight, H).form("svd", (2,)).error(weight, H)
    B: NDArray[np.floating] = np.random.default_rng(5).normal(size=(2, 10))
    for _ in range(200):  # alternating least squares, each half exact
        A = weight @ H @ B.T @ np.linalg.inv(B @ H @ B.T)
        B = np.linalg.lstsq(A, weight, rcond=None)[0]
    assert best <= layer_error(weight - A @ B, H) * (1 + 1e-6)
    assert layer_error(weight - A @ B, H) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("kind", ["spatial", "tucker"])
def test_the_inputs_matter(kind: str) -> None:
    """With the inputs in view the output error is smaller than without."""
    weight, H = layer(16, 12, 3, 3)
    ranks = {"spatial": (10,), "tucker": (6, 8)}[kind]
    aware = LowRank(weight, H).form(kind, ranks).error(weight, H)
    blind = LowRank(weight, np.eye(len(H))).form(kind, ranks).error(weight, H)
    assert aware < 0.9 * blind


def test_cp_finds_a_kernel_that_is_cp() -> None:
    random = np.random.default_rng(2)
    factors = [random.normal(size=(size, 3)) for size in (8, 6, 3, 3)]
    weight = np.einsum("or,ir,hr,wr->oihw", *factors)
    found = LowRank(weight, np.eye(54)).form("cp", (3,))
    assert found.error(weight, np.eye(54)) < 1e-3 * np.square(weight).sum()


def test_cp_terms_do_not_grow_against_each_other() -> None:
    """A kernel of border rank 2 and rank 3, the usual example, whose best approximation of rank 2 does not exist."""
    a, b = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    weight = sum(np.einsum("o,i,h,w->oihw", x, y, z, np.ones(2)) for x, y, z in [(a, a, b), (a, b, a), (b, a, a)])
    found = LowRank(np.asarray(weight), np.eye(8)).form("cp", (2,))
    assert max(np.abs(stage.kernel).max() for stage in found.stages) < 10


def test_options_are_smaller_than_the_layer_and_get_worse() -> None:
    weight, H = layer(16, 16, 3, 3)
    forms = LowRank(weight, H)
    for kind in KINDS:
        found = list(forms.options([kind]))
        assert len(found) > 5
        assert all(option.parameters < weight.size for option in found)
    errors = [option.error(weight, H) for option in forms.options(["svd"])]
    assert errors == sorted(errors)
    assert all(rank % 4 == 0 for option in forms.options(["svd"], step=4) for rank in option.ranks)
