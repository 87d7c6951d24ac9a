"""Weights of low rank, so that tr((W - W') H (W - W')^T) is small: one layer becomes several smaller ones in a row.

With H = S S^T and the singular value decomposition W S = U diag(s) V^T, the best W' of rank r is A B with
A = U_r diag(s_r)^1/2 and B = diag(s_r)^1/2 V_r^T S^-1, and the error is the sum of the other s_i^2 (Wang et al. 2025,
"SVD-LLM", equation 3). So every rank is known from one decomposition. Kernels (out, in, height, width) have more ways:

- SVD: in -> r by the whole kernel, r -> out by 1x1 (Zhang et al. 2016, section 3.1).
- Spatial: in -> r by height x 1, r -> out by 1 x width (Jaderberg et al. 2014, section 3.2).
- Tucker-2: in -> r by 1x1, r -> q by the whole kernel, q -> out by 1x1 (Kim et al. 2016, section 3.1).
- CP: in -> r by 1x1, height x 1 and 1 x width channel by channel, r -> out by 1x1 (Lebedev et al. 2015, equation 8).

Their unfoldings see the inputs' covariance only along their own axes: H is replaced there by its partial trace, for the
decomposition alone; `Factors.error` counts with all of H.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxcomp.numerics.arrays import Floats
from onnxcomp.numerics.feedback import layer_error

_DAMPING = 1e-6
_SWEEPS = 40
_RIDGE = 1e-3
"""Of CP's least squares, relative to their mean diagonal: keeps terms from growing against each other."""

Kernel = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Stage:
    """One of the layers in a row.

    Attributes:
        kernel: (out, in / groups, *kernel).
        groups: 1, or as many as channels.
        axes: spatial axes whose stride, padding and dilation it takes from the layer.
    """

    kernel: Kernel
    groups: int = 1
    axes: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Factors:
    """A layer as several in a row.

    Attributes:
        kind: svd, spatial, tucker or cp.
        ranks: one, or those of Tucker's input and output side.
        stages: from the input on.
    """

    kind: str
    ranks: tuple[int, ...]
    stages: tuple[Stage, ...]

    @property
    def title(self) -> str:
        """Kind and ranks."""
        return " ".join(map(str, (self.kind, *self.ranks)))

    @property
    def parameters(self) -> int:
        """Weights of all stages."""
        return sum(stage.kernel.size for stage in self.stages)

    def composed(self) -> Kernel:
        """(out, in, *kernel) the one layer that does the same."""
        first, *others = self.stages
        result = first.kernel
        for stage in others:
            by_channel = stage.groups > 1
            result = _spread(result, stage.kernel[:, 0] if by_channel else stage.kernel, "r" if by_channel else "or")
        return result

    def error(self, weight: Kernel, H: Floats) -> float:
        """The squared error of the layer's output."""
        return layer_error((weight - self.composed()).reshape(len(weight), -1), H)


def _spread(first: Kernel, second: Kernel, axes: str) -> Kernel:
    """The kernel of two in a row, where at each spatial axis one of them has size 1."""
    letters = "abcdef"[: first.ndim - 2]
    upper = letters.upper()
    pairs = "".join(a + b for a, b in zip(letters, upper, strict=True))
    found = _einsum(f"{axes}{upper},ri{letters}->{axes[0]}i{pairs}", second, first)
    sides = [a * b for a, b in zip(first.shape[2:], second.shape[len(axes) :], strict=True)]
    return np.asarray(found.reshape(*found.shape[:2], *sides))


class LowRank:
    """All low-rank forms of one layer.

    Args:
        weight: (out, in, *kernel).
        H: (in * kernel, in * kernel) covariance of its inputs.

    Attributes:
        weight, H: the same; H slightly damped.
    """

    def __init__(self, weight: Floats, H: Floats) -> None:
        self.weight = np.array(weight, np.float64)
        self.H = _damped(H)
        self._known: dict[str, tuple[NDArray[np.float64], ...]] = {}

    @property
    def spectrum(self) -> NDArray[np.float64]:
        """Squared singular values: what the rank r leaves out is the sum of those from r on."""
        return np.asarray(self._svd()[1] ** 2)

    def options(self, kinds: Sequence[str], step: int = 1) -> Iterator[Factors]:
        """Forms with fewer weights than the layer, at about a dozen ranks of each kind, multiples of a step."""
        for kind in kinds:
            ranks = [self._ranks(kind, float(share), step) for share in np.linspace(1, 0, 16, endpoint=False)]
            for each in dict.fromkeys(ranks):
                found = None if each is None else self.form(kind, each)
                if found is not None and found.parameters < self.weight.size:
                    yield found

    def kinds(self) -> dict[str, int]:
        """The forms that the layer has, and how many ranks each takes."""
        _, _, *kernel = self.weight.shape
        found = {"svd": 1}
        if len(kernel) == 2 and min(kernel) > 1:
            found |= {"spatial": 1, "cp": 1}
        return found | ({"tucker": 2} if int(np.prod(kernel)) > 1 else {})

    def _ranks(self, kind: str, share: float, step: int) -> tuple[int, ...] | None:
        """Ranks at which about a share of the weights is left."""
        out, inputs, *kernel = self.weight.shape
        taps = int(np.prod(kernel))
        goal = share * self.weight.size
        match kind:
            case "svd":
                rank = goal / (out + inputs * taps)
            case "spatial" if len(kernel) == 2 and min(kernel) > 1:
                rank = goal / (inputs * kernel[0] + out * kernel[1])
            case "cp" if len(kernel) == 2 and min(kernel) > 1:
                rank = goal / (inputs + sum(kernel) + out)
            case "tucker" if taps > 1:
                # r = f in, q = f out: taps in out f^2 + (in^2 + out^2) f = goal
                square, linear = taps * inputs * out, inputs**2 + out**2
                f = (np.sqrt(linear**2 + 4 * square * goal) - linear) / (2 * square)
                ranks = tuple(int(f * side) // step * step for side in (inputs, out))
                return ranks if min(ranks) else None
            case _:
                return None
        whole = int(rank) // step * step
        return (whole,) if whole else None

    def form(self, kind: str, ranks: tuple[int, ...]) -> Factors:
        """The layer at some ranks."""
        match kind:
            case "svd":
                return self._by_svd(ranks[0])
            case "spatial":
                return self._by_axes(ranks[0])
            case "tucker":
                return self._by_tucker(*ranks)
            case _:
                return self._by_cp(ranks[0])

    def _svd(self) -> tuple[NDArray[np.float64], ...]:
        if "svd" not in self._known:
            S, inverse = self._whole()
            U, s, Vt = np.linalg.svd(self.weight.reshape(len(self.weight), -1) @ S, full_matrices=False)
            self._known["svd"] = U, s, Vt @ inverse
        return self._known["svd"]

    def _whole(self) -> tuple[NDArray[np.float64], ...]:
        if "root" not in self._known:
            self._known["root"] = _root(self.H)
        return self._known["root"]

    def _by_svd(self, rank: int) -> Factors:
        U, s, right = self._svd()
        rank, scale = min(rank, len(s)), np.sqrt(s)[:rank]
        _, inputs, *kernel = self.weight.shape
        axes = tuple(range(len(kernel)))
        first = (scale[:, None] * right[:rank]).reshape(rank, inputs, *kernel)
        last = (U[:, :rank] * scale).reshape(-1, rank, *[1] * len(kernel))
        return Factors("svd", (rank,), (Stage(first, axes=axes), Stage(last)))

    def _by_axes(self, rank: int) -> Factors:
        out, inputs, height, width = self.weight.shape
        if "spatial" not in self._known:
            moment = self.H.reshape(inputs, height, width, inputs, height, width)
            down = _einsum("ijkabk->ijab", moment).reshape(inputs * height, -1)
            across = _einsum("ijkijb->kb", moment)
            (S, inverse), (T, back) = _root(down / np.trace(across)), _root(across)
            wide = _einsum("oijk,kt->ijot", self.weight, T).reshape(inputs * height, -1)
            U, s, Vt = np.linalg.svd(S.T @ wide, full_matrices=False)
            right = _einsum("rot,tk->rok", Vt.reshape(len(s), out, -1), back)
            self._known["spatial"] = inverse.T @ U, s, right.reshape(len(s), -1)
        left, s, right = self._known["spatial"]
        rank, scale = min(rank, len(s)), np.sqrt(s)[: min(rank, len(s))]
        first = (left[:, :rank] * scale).T.reshape(rank, inputs, height, 1)
        last = (scale[:, None] * right[:rank]).reshape(rank, out, 1, width).swapaxes(0, 1)
        return Factors("spatial", (rank,), (Stage(first, axes=(0,)), Stage(np.ascontiguousarray(last), axes=(1,))))

    def _by_tucker(self, inner: int, outer: int) -> Factors:
        out, inputs, *kernel = self.weight.shape
        ones = [1] * len(kernel)
        if "tucker" not in self._known:
            taps = int(np.prod(kernel))
            channels = _einsum("itjt->ij", self.H.reshape(inputs, taps, inputs, taps))
            S, inverse = _root(channels)
            whole, _ = self._whole()
            outputs = np.linalg.svd(self.weight.reshape(out, -1) @ whole, full_matrices=False)[0]
            unfolded = _einsum("is,oit->sot", S, self.weight.reshape(out, inputs, taps)).reshape(inputs, -1)
            directions = np.linalg.svd(unfolded, full_matrices=False)[0]
            self._known["tucker"] = outputs, directions.T @ inverse, S @ directions
        outputs, project, back = self._known["tucker"]
        inner, outer = min(inner, inputs, project.shape[0]), min(outer, outputs.shape[1])
        core = _einsum("oq,oi...,ir->qr...", outputs[:, :outer], self.weight, back[:, :inner])
        stages = (
            Stage(project[:inner].reshape(inner, inputs, *ones)),
            Stage(core, axes=tuple(range(len(kernel)))),
            Stage(outputs[:, :outer].reshape(out, outer, *ones)),
        )
        return Factors("tucker", (inner, outer), stages)

    def _by_cp(self, rank: int) -> Factors:
        """Alternating least squares with a ridge that shrinks, norms spread evenly over the factors after each sweep.

        Without it two terms may grow without bound against each other (de Silva and Lim 2008).
        """
        out, inputs, height, width = self.weight.shape
        taps = height * width
        S, inverse = _root(_einsum("itjt->ij", self.H.reshape(inputs, taps, inputs, taps)) / taps)
        tensor = _einsum("oihw,is->oshw", self.weight, S)
        random = np.random.default_rng(0)
        factors = [random.normal(size=(size, rank)) / np.sqrt(size) for size in tensor.shape]
        for sweep in range(_SWEEPS):
            ridge = _RIDGE * 0.8**sweep + 1e-7
            for axis in range(4):
                others = [factor for number, factor in enumerate(factors) if number != axis]
                gram = np.prod([factor.T @ factor for factor in others], axis=0)
                unfolded = np.moveaxis(tensor, axis, 0)
                right = _einsum("nabc,ar,br,cr->nr", unfolded, *others)
                level = ridge * (np.trace(gram) / rank or 1.0)
                factors[axis] = np.linalg.solve(gram + level * np.eye(rank), right.T).T
            norms = [np.linalg.norm(factor, axis=0) + np.finfo(float).tiny for factor in factors]
            even = np.prod(norms, axis=0) ** 0.25
            factors = [factor / norm * even for factor, norm in zip(factors, norms, strict=True)]
        outer, channel, down, across = factors
        stages = (
            Stage((inverse.T @ channel).T.reshape(rank, inputs, 1, 1)),
            Stage(down.T.reshape(rank, 1, height, 1), rank, (0,)),
            Stage(across.T.reshape(rank, 1, 1, width), rank, (1,)),
            Stage(outer.reshape(out, rank, 1, 1)),
        )
        return Factors("cp", (rank,), stages)


def _einsum(path: str, *arrays: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.einsum(path, *arrays, optimize=True))  # by matrix products, not by plain loops


def _damped(H: Floats) -> NDArray[np.float64]:
    moment = np.array(H, np.float64)
    moment[np.diag_indices(len(moment))] += _DAMPING * (float(np.diagonal(moment).mean()) or 1.0)
    return moment


def _root(H: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """S with S S^T = H, and its inverse."""
    values, vectors = np.linalg.eigh(H)
    sides = np.sqrt(np.maximum(values, values[-1] * 1e-12 + np.finfo(float).tiny))
    return vectors * sides, (vectors / sides).T
