"""Cross-layer equalization: channels of neighbouring layers get ranges alike, without any change of function.

    W1 <- S^-1 W1,   b1 <- S^-1 b1,   W2 <- W2 S,      s_i = sqrt(r1_i r2_i) / r2_i,   r_i = max |weights of channel i|

(Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", eq. 11.) One scale for a
whole activation, or for a whole weight, then serves all channels. Chains, such as those through a depthwise
convolution, are swept over until no scale moves.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxcomp.core import Change, Context, Outcome, Pass, Skip
from onnxcomp.numerics.equalize import cross_layer
from onnxcomp.rescale import Site, sites
from onnxcomp.settings import within

_SETTLED = 0.01
"""Largest |log s| that counts as equal: a range 1% off costs nothing."""


@dataclass(frozen=True)
class Equalize(Pass):
    """Cross-layer equalization, where layers follow each other through what commutes with a positive scale.

    Attributes:
        sweeps: most passes over the chains.
    """

    name: ClassVar[str] = "equalize"
    summary: ClassVar[str] = "cross-layer equalization: neighbouring layers share the range of each channel"
    exact: ClassVar[bool] = True

    sweeps: Annotated[int, within(1)] = 20

    def apply(self, model: ir.Model, context: Context) -> Outcome:
        """Sweep over all pairs of layers until they are equal."""
        pairs, skips, changed = [], [], set()
        for layer, site in sites(model):
            if isinstance(site, str):
                skips.append(Skip(layer.name, site))
            elif site.layer is None:
                skips.append(Skip(layer.name, "a normalisation before it: its ranges come from data, not from weights"))
            elif any(context.excludes(node) for node in (site.layer.node, *(reader.node for reader in site.readers))):
                skips.append(Skip(layer.name, "excluded by the user"))
            else:
                pairs.append(site)
        for _ in range(self.sweeps):
            moved = False
            for pair in pairs:
                scales = _scales(pair)
                if np.abs(np.log(scales)).max() > _SETTLED:
                    pair.rescale(scales)
                    changed.add(pair)
                    moved = True
            if not moved:
                break
        changes = [
            Change(reader.name, f"input channels equalized with '{pair.layer.name}'")
            for pair in pairs
            if pair in changed and pair.layer is not None
            for reader in pair.readers
        ]
        return Outcome(model, tuple(changes), tuple(skips))


def _scales(pair: Site) -> NDArray[np.float64]:
    assert pair.layer is not None
    behind = np.concatenate([reader.by_input() for reader in pair.readers], axis=1)
    return cross_layer(pair.layer.by_output(), pair.bias, behind.T)
