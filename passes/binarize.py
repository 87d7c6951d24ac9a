"""Binary and ternary weights: signs, or signs and zeros, and a scale for each output channel.

    W'[r, c] = sum_j s[r, j] b_j[r, c],    b in {-1, 1} or {-1, 0, 1}

One bit for each weight and base of signs, 1.6 bits for each ternary weight. The first and the last layers are the most
sensitive: they share values by more bits. A session decodes the weights once, when it loads: the file is smaller, the
model no faster.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, TypeAlias

import numpy as np
import onnx_ir as ir

from onnxcomp.compression import Encode, Matrix, by_part, compress, options
from onnxcomp.constants import Weight
from onnxcomp.core import Context, Option, Outcome, Pass
from onnxcomp.encodings import Codes, Encoded, Sum
from onnxcomp.errors import OptionError
from onnxcomp.layers import end_layers
from onnxcomp.numerics.codebook import Indices, share
from onnxcomp.numerics.scaled import TERNARY, fit_scaled, plain_scaled, signs
from onnxcomp.settings import like, within

_BASES = 4
_TERNARY = "ternary"

Bases: TypeAlias = Annotated[int, within(1, _BASES)]


@dataclass(frozen=True)
class Binarize(Pass):
    """Weights of one or a few signs.

    Attributes:
        ternary: signs and zeros instead of signs alone.
        bases: how many patterns of signs are added up, each with scales of its own; 1 where ternary.
        ends: bits by which the first and last layers share values; 0 treats them like the others.
        reconstruct: fit each layer on what those before it now give, before it is encoded.
        parts: bases by the name of a node, or `ternary`; where any is named, no other is treated.

    Raises:
        OptionError: a setting out of range.
    """

    name: ClassVar[str] = "binarize"
    summary: ClassVar[str] = "binary or ternary weights, decoded when a session loads: smaller, not faster"
    stores: ClassVar[bool] = True
    remark: ClassVar[str] = (
        "Binary and ternary weights save bytes in the file on every provider and change neither latency "
        "nor memory: sessions decode them as they load."
    )

    ternary: bool = False
    bases: Bases = 1
    ends: Annotated[int, within(0, 8)] = 8
    reconstruct: bool = True
    parts: tuple[tuple[str, Bases | Annotated[str, like(_TERNARY, _TERNARY)]], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ternary and self.bases > 1:
            raise OptionError(
                f"ternary weights of {self.bases} bases make no sense",
                remedy="give 1 base, or signs alone",
                setting=("bases",),
            )

    def drafted(self) -> "Binarize":  # noqa: D102
        return replace(self, reconstruct=False)

    def apply(self, model: ir.Model, context: Context) -> Outcome:
        """Encode what becomes smaller."""
        encode = self._encode(end_layers(model) if self.ends else set(), fit_scaled)
        if self.parts:
            encode = by_part(lambda signs: self._with(signs)._encode(set(), fit_scaled), self.parts)
        return compress(model, context, encode, self._said, reconstruct=self.reconstruct)

    def options(self, model: ir.Model, context: Context) -> Iterator[Option]:
        """Ternary weights and every number of bases, by thresholds: an upper bound, for the pass feeds errors back."""
        settings: list[int | str] = [1, _TERNARY, *range(2, _BASES + 1)]
        return options(model, context, settings, lambda setting: self._with(setting)._encode(set(), _by_thresholds))

    def _with(self, setting: int | str) -> "Binarize":
        bases = 1 if isinstance(setting, str) else setting
        return replace(self, ternary=setting == _TERNARY, bases=bases, parts=())

    def _encode(self, ends: Collection[str], fit: Callable[[Matrix, Matrix, Matrix], tuple[Indices, Matrix]]) -> Encode:
        patterns = TERNARY if self.ternary else signs(self.bases)

        def encode(weight: Weight, matrix: Matrix, H: Matrix) -> Encoded:
            if any(node.name in ends for node in weight.nodes):
                book = share(matrix, H, 1 << self.ends)
                return Codes(book.indices.astype(np.uint8), book.values[:, :, None].astype(np.float32))
            indices, scales = fit(matrix, H, patterns)
            wide = scales.astype(np.float32)
            if self.ternary:
                return Codes(indices.astype(np.uint8), TERNARY[None].astype(np.int8), wide[:, 0])
            values = np.array([[[-1], [1]]], np.int8)
            return Sum(tuple(Codes((indices >> j & 1).astype(np.uint8), values, wide[:, j]) for j in range(self.bases)))

        return encode

    def _said(self, encoded: Encoded) -> str:
        if isinstance(encoded, Codes) and encoded.scale is None:
            return f"{encoded.values.shape[1]} shared values, {self.ends} bits"
        if isinstance(encoded, Codes):
            return "ternary weights"
        assert isinstance(encoded, Sum)
        return f"binary weights, {len(encoded.parts)} bit" + "s" * (len(encoded.parts) > 1)


def _by_thresholds(W: Matrix, H: Matrix, patterns: Matrix) -> tuple[Indices, Matrix]:
    return plain_scaled(W, patterns)
