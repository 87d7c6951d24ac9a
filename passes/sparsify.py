"""Sparse weights: some become zero, the others make up for it, and only those are stored.

A bit for each weight says which are there; a session puts the zeros back when it loads. ONNX Runtime multiplies by
zeros as by other numbers, so sparse weights make the file smaller and nothing faster, but for 2:4 on TensorRT, which
uses the sparse units of recent NVIDIA GPUs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, TypeAlias

import numpy as np
import onnx_ir as ir

from onnxcomp.compression import Encode, Matrix, by_part, compress, options
from onnxcomp.constants import Weight
from onnxcomp.core import Choice, Context, Option, Outcome, Pass
from onnxcomp.encodings import Encoded, Masked
from onnxcomp.errors import OptionError
from onnxcomp.numerics.sparse import Mask, Pattern, admm_mask, magnitude_mask, obs_mask, refit_on, wanda_mask
from onnxcomp.settings import within

_SHARES = tuple(tenths / 10 for tenths in range(1, 10))

Sparsity: TypeAlias = Annotated[float, within(above=0, below=1)]
Side: TypeAlias = Annotated[int, within(1)]


class Choose(Choice):
    """What makes a weight worth keeping."""

    MAGNITUDE = "magnitude"
    """|w|."""
    WANDA = "wanda"
    """|w| ||x|| (Sun et al. 2024)."""
    SPARSEGPT = "sparsegpt"
    """What its loss costs when the others make up for it (Frantar and Alistarh 2023)."""
    ADMM = "admm"
    """What is worth most together, by alternating directions (Boza 2024)."""


@dataclass(frozen=True)
class Sparsify(Pass):
    """Weights that are zero.

    Attributes:
        sparsity: share that becomes zero.
        of: that share of every so many consecutive inputs (4 for 2:4); 0 for anywhere in the weight.
        block: (outputs, inputs) that become zero together.
        choose: what makes a weight worth keeping.
        reconstruct: least squares on those that are left, on what the layers before now give.
        parts: sparsity by the name of a node; where any is named, no other is treated.

    Raises:
        OptionError: a setting out of range.
    """

    name: ClassVar[str] = "sparsify"
    summary: ClassVar[str] = "sparse weights, stored without their zeros: smaller; faster only as 2:4 on TensorRT"
    stores: ClassVar[bool] = True
    remark: ClassVar[str] = (
        "Sparse weights save bytes in the file on every provider; none runs them faster, but TensorRT "
        "where they are 2:4, on NVIDIA GPUs from Ampere on."
    )

    sparsity: Sparsity = 0.5
    of: Annotated[int, within(0)] = 0
    block: tuple[Side, Side] = (1, 1)
    choose: Choose = Choose.ADMM
    reconstruct: bool = True
    parts: tuple[tuple[str, Sparsity], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for setting, share in (("sparsity",), self.sparsity), *((("parts", name), share) for name, share in self.parts):
            if not (share * self.of).is_integer():
                raise OptionError(
                    f"a sparsity of {share:.4g} of every {self.of} makes no sense",
                    "it is no whole number of zeros",
                    "give a share N/M of every M, or no M",
                    setting,
                )

    def drafted(self) -> "Sparsify":  # noqa: D102
        return replace(self, choose=Choose.WANDA, reconstruct=False)

    def apply(self, model: ir.Model, context: Context) -> Outcome:
        """Encode what becomes smaller."""
        encode = by_part(lambda share: self._with(share)._encode(), self.parts) if self.parts else self._encode()
        return compress(model, context, encode, self._said, reconstruct=self.reconstruct)

    def options(self, model: ir.Model, context: Context) -> Iterator[Option]:
        """Every sparsity, with masks by |w| ||x||: an upper bound where the pass chooses more carefully."""
        shares = [zeros / self.of for zeros in range(1, self.of)] if self.of else _SHARES
        quick = Choose.WANDA if self.choose in {Choose.ADMM, Choose.SPARSEGPT} else self.choose
        return options(model, context, shares, lambda share: replace(self._with(share), choose=quick)._encode())

    def _with(self, share: float) -> "Sparsify":
        return replace(self, sparsity=share, parts=())

    def _encode(self) -> Encode:
        pattern = Pattern(self.sparsity, self.of, self.block)

        def encode(weight: Weight, matrix: Matrix, H: Matrix) -> Encoded:
            order = _channels_last(weight, matrix.shape[1])
            parts = [
                self._sparse(rows[:, order], moment[np.ix_(order, order)], pattern)
                for rows, moment in zip(np.split(matrix, len(H)), H, strict=True)
            ]
            sparse = np.concatenate(parts)[:, np.argsort(order)]
            mask = sparse != 0
            return Masked(mask, sparse[mask].astype(weight.array.dtype))

        return encode

    def _sparse(self, W: Matrix, H: Matrix, pattern: Pattern) -> Matrix:
        mask: Mask
        match self.choose:
            case Choose.MAGNITUDE:
                mask = magnitude_mask(W, pattern)
            case Choose.WANDA:
                mask = wanda_mask(W, H, pattern)
            case Choose.SPARSEGPT:
                mask = obs_mask(W, H, pattern)
            case Choose.ADMM:
                mask = admm_mask(W, H, pattern)
        return refit_on(W, H, mask) if self.reconstruct else np.where(mask, W, 0.0)

    def _said(self, encoded: Encoded) -> str:
        assert isinstance(encoded, Masked)
        zeros = float(1 - encoded.mask.mean())
        how = f"{round(zeros * self.of)} of {self.of} zero" if self.of else f"{zeros:.0%} zero"
        return how + (f", in blocks of {self.block[0]}x{self.block[1]}" if self.block != (1, 1) else "")


def _channels_last(weight: Weight, columns: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Columns with the channels of each kernel tap side by side, as kernels for N:M take them."""
    layer = weight.layer
    taps = int(np.prod(layer.kernel)) if layer is not None and layer.node.op_type == "Conv" else 1
    return np.arange(columns).reshape(-1, taps).T.ravel()
