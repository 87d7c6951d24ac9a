"""Sparse weights: masks of the asked pattern, and the exact least squares solution on them."""

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxcomp.numerics.feedback import layer_error
from onnxcomp.numerics.sparse import Pattern, admm_mask, magnitude_mask, obs_mask, refit_on, wanda_mask

PATTERNS = {
    "half": Pattern(0.5),
    "2:4": Pattern(0.5, 4),
    "1:4": Pattern(0.25, 4),
    "blocks": Pattern(0.5, 0, (4, 2)),
    "2:4 in blocks": Pattern(0.5, 4, (1, 2)),
}


def problem(rows: int = 16, width: int = 40) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    random = np.random.default_rng(0)
    x = random.normal(size=(300, width)) @ random.normal(size=(width, width))
    return random.normal(size=(rows, width)), x.T @ x / 300


def test_masks_keep_what_scores_most() -> None:
    scores = np.array([[1.0, 4, 2, 3], [8, 5, 7, 6]])
    assert Pattern(0.5).keep(scores).astype(int).tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]
    assert Pattern(0.5, 4).keep(scores).astype(int).tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]
    assert Pattern(0.5, 2).keep(scores).astype(int).tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]
    assert Pattern(0.25, 0, (2, 2)).keep(scores).all()


@pytest.mark.parametrize("name", PATTERNS)
def test_every_criterion_keeps_the_pattern(name: str) -> None:
    W, H = problem()
    pattern = PATTERNS[name]
    masks = magnitude_mask(W, pattern), wanda_mask(W, H, pattern), obs_mask(W, H, pattern), admm_mask(W, H, pattern)
    for mask in masks:
        assert mask.mean() == pytest.approx(1 - pattern.share, abs=0.01)
        rows, columns = pattern.block
        blocks = mask.reshape(len(mask) // rows, rows, -1, columns)
        whole = np.asarray(blocks.all(axis=(1, 3)))
        assert np.array_equal(whole, blocks.any(axis=(1, 3)))
        if pattern.of:
            kept = whole.reshape(len(whole), -1, pattern.of).sum(axis=2)
            assert np.all(kept == pattern.of - round(pattern.share * pattern.of))


def test_what_a_group_does_not_fill_stays() -> None:
    W, H = problem(4, 10)
    for mask in (magnitude_mask(W, Pattern(0.5, 4)), obs_mask(W, H, Pattern(0.5, 4))):
        assert mask[:, 8:].all()
    assert magnitude_mask(W[:3], Pattern(0.5, 0, (2, 4))).shape == (3, 10)


def test_what_is_left_is_the_least_squares_solution() -> None:
    W, H = problem()
    mask = magnitude_mask(W, Pattern(0.5))
    moment = H + 1e-3 * np.diagonal(H).mean() * np.eye(len(H))
    found = refit_on(W, H, mask)
    for row, kept, got in zip(W, mask, found, strict=True):
        expected = np.linalg.solve(moment[np.ix_(kept, kept)], moment[kept] @ row)
        assert layer_error((got[kept] - expected)[None], moment[np.ix_(kept, kept)]) < 1e-3 * layer_error(row[None], H)
        assert not got[~kept].any()


@pytest.mark.parametrize("name", PATTERNS)
def test_the_inputs_matter(name: str) -> None:
    """Fitted masks lose less than plain ones, and those that see the inputs less than those that do not."""
    W, H = problem(64)
    pattern = PATTERNS[name]
    by_size, together = magnitude_mask(W, pattern), admm_mask(W, H, pattern)
    plain = layer_error(W - np.where(by_size, W, 0), H)
    fitted, best = (layer_error(W - refit_on(W, H, mask), H) for mask in (by_size, together))
    assert fitted < 0.8 * plain
    assert best < 0.9 * fitted


def test_dead_inputs_do_no_harm() -> None:
    W, H = problem()
    H[3], H[:, 3] = 0, 0
    for moment in (H, np.zeros_like(H)):
        for mask in (obs_mask(W, moment, Pattern(0.5)), admm_mask(W, moment, Pattern(0.5))):
            assert np.isfinite(refit_on(W, moment, mask)).all()


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_of_equal_scores_the_first_go(share: float, levels: int) -> None:
    scores = np.random.default_rng(levels).integers(0, levels, (7, 9)).astype(float)
    first = np.argsort(scores, axis=None, kind="stable")[: round(share * scores.size)]
    np.testing.assert_array_equal(np.flatnonzero(~Pattern(share).keep(scores)), np.sort(first))
