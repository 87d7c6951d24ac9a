"""What to try: the quantizations that a target has kernels for, and the ways to refine one."""

from collections.abc import Sequence
from dataclasses import replace

from onnxcomp import kernels, placement
from onnxcomp.candidates import Candidate, Effort, Workbench
from onnxcomp.core import Pass
from onnxcomp.passes.convert_float import ConvertFloat
from onnxcomp.passes.equalize import Equalize
from onnxcomp.passes.quantize_dynamic import QuantizeDynamic
from onnxcomp.passes.quantize_static import QuantizeStatic, Range
from onnxcomp.passes.smooth import Smooth
from onnxcomp.registry import passes, storing
from onnxcomp.timing import profiles
from onnxcomp.weights import NEAREST
from onnxcomp.wording import several

Recipe = tuple[str, tuple[Pass, ...]]

_FP16 = {"cuda", "tensorrt", "nvtensorrtrtx", "rocm", "migraphx", "dml"}
"""Providers that compute in half precision; the CPU's converts to float32 and back."""

_PART_OF_DRAFTS = {
    *("simplify", "unfuse", "prune", "prune-depth", "quantize-static", "quantize-dynamic", "quantize-weights"),
}
"""Passes that the search applies in its own way."""

_NO_INT8 = {"cuda", "rocm"}
"""Providers whose integer kernels are slow or missing."""


def drafts(
    bench: Workbench, base: Candidate, allowed: frozenset[str], effort: Effort, named: Sequence[str] = ()
) -> list[Candidate]:
    """Every quantization with kernels on the target that changes a model and runs, weights rounded to the nearest.

    Passes that the user named and that are no part of these are tried as they are.

    Args:
        bench: where they are made.
        base: the model to quantize, in float: the cleaned-up one, or that with fewer channels.
        allowed: names of the passes that may be used.
        effort: how many placements.
        named: passes that the user asked for.
    """
    made = []
    if bench.provider in _FP16 and "convert-float" in allowed:
        made.append(_upon(bench, base, "fp16", ConvertFloat()))
    if bench.provider not in _NO_INT8 and "quantize-static" in allowed and bench.context.data is not None:
        made.extend(_static(bench, base, effort))
    if bench.provider == "cpu" and "quantize-dynamic" in allowed:
        dynamic = replace(QuantizeDynamic.for_target(bench.context.target), rounding=NEAREST)
        made.append(_upon(bench, base, "dynamic INT8", dynamic))
    tried = {draft.passes for draft in made}
    for name in named:
        technique = passes()[name]()
        if name not in _PART_OF_DRAFTS | storing() and (*base.passes, technique) not in tried:
            made.append(_upon(bench, base, name, technique))
    return [draft for draft in made if bench.works(draft)]


def _upon(bench: Workbench, base: Candidate, name: str, technique: Pass) -> Candidate:
    """One more pass behind those of a candidate."""
    return bench.make(f"{base.name}, {name}" if base.passes else name, (*base.passes, technique))


def _static(bench: Workbench, base: Candidate, effort: Effort) -> list[Candidate]:
    """Static INT8 wherever it can be and, on the CPU, where and by which kernels measured times say."""
    everywhere = replace(QuantizeStatic.for_target(bench.context.target), rounding=NEAREST)
    full = _upon(bench, base, "static INT8", everywhere)
    if bench.provider != "cpu" or not bench.works(full):
        return [full]
    found = {everywhere: full}
    fastest = kernels.with_fastest(base.model, everywhere, bench.context, bench.batch.feeds)
    if products := len(fastest.as_gemm):
        name = f"static INT8, {several(products, 'convolution as a product', 'convolutions as products')}"
        found[fastest] = _upon(bench, base, name, fastest)
        if bench.works(found[fastest]):
            everywhere, full = fastest, found[fastest]
    floats, integers = profiles([base.model, full.model], bench.context, bench.batch.feeds)
    crossing = placement.crossing(bench.context)
    names = set(full.changed)
    for factor in effort.crossings:
        chosen = placement.place(base.model, names, floats, integers, crossing, factor)
        placed = replace(everywhere, keep=tuple(sorted(names - chosen)))
        if placed not in found and chosen:
            left = several(len(placed.keep), "node that is", "nodes that are")
            name = f"static INT8 but for {left} faster in float"
            found[placed] = _upon(bench, base, name, placed)
    return list(found.values())


def variants(draft: Candidate, allowed: frozenset[str], effort: Effort, *, has_data: bool) -> list[Recipe]:
    """The same nodes with other ways to choose ranges and weights, the usual one first."""
    *before, last = draft.passes
    name = draft.name
    rounding = effort.rounding if has_data else NEAREST
    more = effort is not Effort.QUICK and has_data
    if not isinstance(last, QuantizeStatic | QuantizeDynamic):
        return [(name, draft.passes)]
    rounded = replace(last, rounding=rounding)
    found: list[Recipe] = [(f"{name}, weights refined", (*before, rounded))]
    if isinstance(rounded, QuantizeStatic) and more:
        found.append((f"{name}, min-max ranges", (*before, replace(rounded, range=Range.MINMAX))))
        if "equalize" in allowed:
            found.append((f"{name}, equalized", (*before, Equalize(), rounded)))
    if isinstance(rounded, QuantizeDynamic) and more and "smooth" in allowed:
        found.append((f"{name}, smoothed", (*before, Smooth(insert=True), rounded)))
    return found
