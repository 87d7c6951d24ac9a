"""Binary and ternary weights: signs, or signs and zeros, and a scale for each output channel.

    W'[r, c] = sum_j s[r, j] b_j[r, c],    b in {-1, 1} or {-1, 0, 1}

One bit for each weight and base of signs, 1.6 bits for each ternary weight. The first and the last layers are the most
sensitive: they share values by more bits. A session decodes the weights once, when it loads: the file is smaller, the
model no faster.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxcomp.compression import Matrix, compress
from onnxcomp.constants import Weight
from onnxcomp.core import Context, Outcome, Pass
from onnxcomp.encodings import Codes, Encoded, Sum
from onnxcomp.errors import OptionError
from onnxcomp.layers import end_layers
from onnxcomp.numerics.codebook import share
from onnxcomp.numerics.scaled import TERNARY, fit_scaled, signs


@dataclass(frozen=True)
class Binarize(Pass):
    """Weights of one or a few signs.

    Attributes:
        ternary: signs and zeros instead of signs alone.
        bases: how many patterns of signs are added up, each with scales of its own; 1 where ternary.
        ends: bits by which the first and last layers share values; 0 treats them like the others.
        reconstruct: fit each layer on what those before it now give, before it is encoded.

    Raises:
        OptionError: a setting out of range.
    """

    name: ClassVar[str] = "binarize"
    summary: ClassVar[str] = "binary or ternary weights, decoded when a session loads: smaller, not faster"
    remark: ClassVar[str] = (
        "Binary and ternary weights save bytes in the file on every provider and change neither latency "
        "nor memory: sessions decode them as they load."
    )

    ternary: bool = False
    bases: int = 1
    ends: int = 8
    reconstruct: bool = True

    def __post_init__(self) -> None:
        if not (1 <= self.bases <= 4 and 0 <= self.ends <= 8 and (self.bases == 1 or not self.ternary)):
            raise OptionError(
                f"{self.bases} bases and {self.ends} bits at the ends make no sense here",
                remedy="give 1 to 4 bases, 1 for ternary weights, and 0 to 8 bits",
            )

    def apply(self, model: ir.Model, context: Context) -> Outcome:
        """Encode what becomes smaller."""
        patterns = TERNARY if self.ternary else signs(self.bases)
        ends = end_layers(model) if self.ends else set()

        def encode(weight: Weight, matrix: Matrix, H: Matrix) -> Encoded:
            if any(node.name in ends for node in weight.nodes):
                book = share(matrix, H, 1 << self.ends)
                return Codes(book.indices.astype(np.uint8), book.values[:, :, None].astype(np.float32))
            indices, scales = fit_scaled(matrix, H, patterns)
            wide = scales.astype(np.float32)
            if self.ternary:
                return Codes(indices.astype(np.uint8), TERNARY[None].astype(np.int8), wide[:, 0])
            values = np.array([[[-1], [1]]], np.int8)
            return Sum(tuple(Codes((indices >> j & 1).astype(np.uint8), values, wide[:, j]) for j in range(self.bases)))

        return compress(model, context, encode, self._said, reconstruct=self.reconstruct)

    def _said(self, encoded: Encoded) -> str:
        if isinstance(encoded, Codes) and encoded.scale is None:
            return f"{encoded.values.shape[1]} shared values, {self.ends} bits"
        return "ternary weights" if self.ternary else f"binary weights, {self.bases} bit" + "s" * (self.bases > 1)
