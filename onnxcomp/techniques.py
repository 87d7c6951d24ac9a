"""The techniques one at a time: `simplify`, `quantize`, `prune`, `share`, `sparsify`, `binarize`, `factorize`.

Each cleans the model up, applies its passes and measures what came of it. What they all take is documented at
`convert.convert`.
"""

from dataclasses import replace
from enum import StrEnum
from typing import Unpack

from onnxcomp.conversion import Common, convert
from onnxcomp.core import Pass, chosen
from onnxcomp.errors import OptionError
from onnxcomp.model import ModelSource
from onnxcomp.passes.binarize import Binarize
from onnxcomp.passes.convert_float import ConvertFloat, Float
from onnxcomp.passes.equalize import Equalize
from onnxcomp.passes.factorize import Factorize
from onnxcomp.passes.factorize import Method as Form
from onnxcomp.passes.prune import Prune
from onnxcomp.passes.quantize_dynamic import QuantizeDynamic
from onnxcomp.passes.quantize_static import QuantizeStatic, Range
from onnxcomp.passes.quantize_weights import QuantizeWeights
from onnxcomp.passes.share import Method, Share
from onnxcomp.passes.simplify import Simplify
from onnxcomp.passes.smooth import Smooth
from onnxcomp.passes.sparsify import Choose, Sparsify
from onnxcomp.report import Result
from onnxcomp.runtime import Target
from onnxcomp.saliency import Aggregate, Criterion
from onnxcomp.weights import Rounding
from onnxcomp.widths import Cost, Rates


class Scheme(StrEnum):
    """What `quantize` makes of weights and activations."""

    INT8 = "int8"
    """Both, with ranges from calibration data."""
    INT8_DYNAMIC = "int8-dynamic"
    """Both, with ranges taken at run time."""
    INT8_WEIGHTS = "int8-weights"
    INT4_WEIGHTS = "int4-weights"
    FP16 = "fp16"
    BF16 = "bf16"


def simplify(source: ModelSource, *, keep_overridable: bool = False, **common: Unpack[Common]) -> Result:
    """Clean a model up: the same function from fewer, cheaper nodes.

    Args:
        source: a path, bytes, `onnx.ModelProto` or `onnx_ir.Model`; never modified.
        keep_overridable: leave weights that are also graph inputs overridable.
        **common: as for `convert`.

    Raises:
        InputError: the model or an option cannot be used.
    """
    return convert(source, [Simplify(keep_overridable)], **common)


def quantize(
    source: ModelSource,
    *,
    scheme: Scheme | str = Scheme.INT8,
    range: Range | str = Range.MSE,  # noqa: A002  (the word for it)
    gptq: bool = True,
    polish: bool = True,
    bias_correction: bool = True,
    equalize: bool = True,
    smooth: bool = True,
    keep_overridable: bool = False,
    **common: Unpack[Common],
) -> Result:
    """Clean up and quantize as asked, wherever the scheme can, and measure what it cost and brought.

    Args:
        source: a path, bytes, `onnx.ModelProto` or `onnx_ir.Model`; never modified.
        scheme: what becomes of weights and activations.
        range: how activation ranges are chosen; for `Scheme.INT8`.
        gptq: round weights with error feedback instead of to the nearest.
        polish: follow with coordinate descent.
        bias_correction: put the mean of what rounding does to a layer's output into its bias.
        equalize: equalize neighbouring layers first; for `Scheme.INT8`.
        smooth: move activation outliers into weights first; for `Scheme.INT8`, and `INT8_DYNAMIC` with `calib`.
        keep_overridable: leave weights that are also graph inputs overridable.
        **common: as for `convert`; `Scheme.INT8` needs `calib`.

    Raises:
        InputError: the model, the data or an option cannot be used.
        BudgetError: it loses more than `max_drop`; its `result` is what came out.
    """
    scheme, method = chosen(Scheme, scheme), chosen(Range, range)
    if scheme is Scheme.INT8 and common.get("calib") is None:
        raise OptionError(
            "scheme int8 needs calibration data", "activation ranges come from data", "add --calib, or use int8-dynamic"
        )
    rounding = Rounding(gptq, Rounding.sweeps if polish else 0, bias_correction)
    target = Target.of(common.get("target", Target()))
    passes = _quantization(scheme, method, rounding, equalize, smooth and common.get("calib") is not None, target)
    return convert(source, [Simplify(keep_overridable), *passes], **common)


def prune(
    source: ModelSource,
    *,
    remains: float = 0.7,
    cost: Cost | str = Cost.FLOPS,
    criterion: Criterion | str = Criterion.OBS,
    aggregate: Aggregate | str = Aggregate.MEAN,
    normalised: bool = True,
    rates: Rates | str = Rates.MEASURED,
    penalty: float = 0.0,
    threshold: float | None = None,
    rounds: int = 1,
    reconstruct: bool = True,
    multiple: int = 2,
    least: float = 0.1,
    keep_overridable: bool = False,
    **common: Unpack[Common],
) -> Result:
    """Clean up, remove channels until a share of a cost remains, fit the others again, and measure what came of it.

    Args:
        source: a path, bytes, `onnx.ModelProto` or `onnx_ir.Model`; never modified.
        remains: share of the cost that is to remain.
        cost: FLOPs, parameters, bytes, or the latency on the target at `batch`.
        criterion: what makes a channel worth keeping.
        aggregate: how the scores of the layers that share channels become one.
        normalised: divide each layer's scores by their mean first.
        rates: least measured error for the cost, lowest scores of the model, or the same share everywhere.
        penalty: lambda in score - lambda cost.
        threshold: channels that score less go, in place of a target.
        rounds: in how many rounds, each ranking what is left anew.
        reconstruct: least squares on what is left, and every layer fitted again.
        multiple: widths are multiples of this.
        least: share of its channels that every group keeps.
        keep_overridable: leave weights that are also graph inputs overridable.
        **common: as for `convert`; without `calib`, layers are fitted on made-up inputs.

    Raises:
        InputError: the model, the data or an option cannot be used.
        BudgetError: it loses more than `max_drop`; its `result` is what came out.
    """
    technique = Prune(
        remains,
        chosen(Cost, cost),
        chosen(Criterion, criterion),
        chosen(Aggregate, aggregate),
        normalised,
        chosen(Rates, rates),
        penalty,
        threshold,
        rounds,
        reconstruct,
        multiple=multiple,
        least=least,
    )
    return convert(source, [Simplify(keep_overridable), technique], **common)


def share(
    source: ModelSource,
    *,
    bits: int = 4,
    method: Method | str = Method.KMEANS,
    channels: int | None = None,
    reconstruct: bool = True,
    keep_overridable: bool = False,
    **common: Unpack[Common],
) -> Result:
    """Clean up, let weights share values, so that the file holds little more than which has which, and measure.

    Args:
        source: a path, bytes, `onnx.ModelProto` or `onnx_ir.Model`; never modified.
        bits: per weight, 1 to 8, beside the codebooks.
        method: single values by a codebook or by hash, or vectors by a codebook.
        channels: output channels that have a codebook of their own; None for one codebook per tensor.
        reconstruct: fit each layer on what those before it now give, before it is encoded.
        keep_overridable: leave weights that are also graph inputs overridable.
        **common: as for `convert`; without `calib`, weights alone are approximated.

    Raises:
        InputError: the model, the data or an option cannot be used.
        BudgetError: it loses more than `max_drop`; its `result` is what came out.
    """
    return convert(
        source, [Simplify(keep_overridable), Share(bits, chosen(Method, method), channels, reconstruct)], **common
    )


def sparsify(
    source: ModelSource,
    *,
    sparsity: float = 0.5,
    of: int = 0,
    block: tuple[int, int] = (1, 1),
    choose: Choose | str = Choose.ADMM,
    reconstruct: bool = True,
    keep_overridable: bool = False,
    **common: Unpack[Common],
) -> Result:
    """Clean up, make weights zero and store the others alone, and measure.

    Args:
        source: a path, bytes, `onnx.ModelProto` or `onnx_ir.Model`; never modified.
        sparsity: share that becomes zero.
        of: that share of every so many consecutive inputs (4 for 2:4); 0 for anywhere in the weight.
        block: (outputs, inputs) that become zero together.
        choose: what makes a weight worth keeping.
        reconstruct: least squares on those that are left.
        keep_overridable: leave weights that are also graph inputs overridable.
        **common: as for `convert`; without `calib`, weights alone are approximated.

    Raises:
        InputError: the model, the data or an option cannot be used.
        BudgetError: it loses more than `max_drop`; its `result` is what came out.
    """
    technique = Sparsify(sparsity, of, block, chosen(Choose, choose), reconstruct)
    return convert(source, [Simplify(keep_overridable), technique], **common)


def binarize(
    source: ModelSource,
    *,
    ternary: bool = False,
    bases: int = 1,
    ends: int = 8,
    reconstruct: bool = True,
    keep_overridable: bool = False,
    **common: Unpack[Common],
) -> Result:
    """Clean up, make weights signs with a scale for each output channel, and measure.

    Args:
        source: a path, bytes, `onnx.ModelProto` or `onnx_ir.Model`; never modified.
        ternary: signs and zeros instead of signs alone.
        bases: how many patterns of signs are added up.
        ends: bits by which the first and last layers share values; 0 treats them like the others.
        reconstruct: fit each layer on what those before it now give, before it is encoded.
        keep_overridable: leave weights that are also graph inputs overridable.
        **common: as for `convert`; without `calib`, weights alone are approximated.

    Raises:
        InputError: the model, the data or an option cannot be used.
        BudgetError: it loses more than `max_drop`; its `result` is what came out.
    """
    return convert(source, [Simplify(keep_overridable), Binarize(ternary, bases, ends, reconstruct)], **common)


def factorize(
    source: ModelSource,
    *,
    remains: float = 0.7,
    cost: Cost | str = Cost.PARAMS,
    method: Form | str = Form.AUTO,
    energy: float | None = None,
    multiple: int = 1,
    reconstruct: bool = True,
    keep_overridable: bool = False,
    **common: Unpack[Common],
) -> Result:
    """Clean up, make layers several smaller ones in a row until a share of a cost remains, and measure.

    Args:
        source: a path, bytes, `onnx.ModelProto` or `onnx_ir.Model`; never modified.
        remains: share of the cost that is to remain.
        cost: parameters, FLOPs, bytes, or the latency on the target at `batch`.
        method: which forms are tried.
        energy: share of each layer's output energy to keep, in place of a target.
        multiple: ranks are multiples of this.
        reconstruct: fit all stages again.
        keep_overridable: leave weights that are also graph inputs overridable.
        **common: as for `convert`; without `calib`, layers are fitted on made-up inputs.

    Raises:
        InputError: the model, the data or an option cannot be used.
        BudgetError: it loses more than `max_drop`; its `result` is what came out.
    """
    technique = Factorize(remains, chosen(Cost, cost), chosen(Form, method), energy, multiple, reconstruct)
    return convert(source, [Simplify(keep_overridable), technique], **common)


def _quantization(
    scheme: Scheme, range_: Range, rounding: Rounding, equalize: bool, smooth: bool, target: Target
) -> list[Pass]:
    smoothing: list[Pass] = [Smooth()] if smooth else []
    match scheme:
        case Scheme.INT8:
            equalizing: list[Pass] = [Equalize()] if equalize else []
            static = replace(QuantizeStatic.for_target(target), range=range_, rounding=rounding)
            return [*equalizing, *smoothing, static]
        case Scheme.INT8_DYNAMIC:
            return [*smoothing, replace(QuantizeDynamic.for_target(target), rounding=rounding)]
        case Scheme.INT8_WEIGHTS:
            return [QuantizeWeights(bits=8, rounding=rounding)]
        case Scheme.INT4_WEIGHTS:
            return [QuantizeWeights(bits=4, rounding=rounding)]
        case Scheme.FP16 | Scheme.BF16:
            return [ConvertFloat(Float(scheme.value))]
