"""onnxcomp: makes a trained ONNX model smaller and faster, and proves it.

Names are imported when they are first used, so that `import onnxcomp` itself costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from onnxcomp import errors

if TYPE_CHECKING:
    from onnxcomp.budget import Budget
    from onnxcomp.conversion import apply, convert
    from onnxcomp.core import Context, Pass
    from onnxcomp.explanation import explain
    from onnxcomp.inspection import inspect
    from onnxcomp.measure import bench, evaluate
    from onnxcomp.model import load, save
    from onnxcomp.optimizer import optimize
    from onnxcomp.package import pack, unpack
    from onnxcomp.recipe import Recipe
    from onnxcomp.report import Report
    from onnxcomp.runtime import Target
    from onnxcomp.techniques import binarize, factorize, prune, quantize, share, simplify, sparsify
    from onnxcomp.verification import verify

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Context",
    "Pass",
    "Recipe",
    "Report",
    "Target",
    "apply",
    "bench",
    "binarize",
    "convert",
    "errors",
    "evaluate",
    "explain",
    "factorize",
    "inspect",
    "load",
    "optimize",
    "pack",
    "prune",
    "quantize",
    "save",
    "share",
    "simplify",
    "sparsify",
    "unpack",
    "verify",
]

_HOMES = {
    "budget": ("Budget",),
    "conversion": ("apply", "convert"),
    "core": ("Context", "Pass"),
    "explanation": ("explain",),
    "inspection": ("inspect",),
    "measure": ("bench", "evaluate"),
    "model": ("load", "save"),
    "optimizer": ("optimize",),
    "package": ("pack", "unpack"),
    "recipe": ("Recipe",),
    "report": ("Report",),
    "runtime": ("Target",),
    "techniques": ("binarize", "factorize", "prune", "quantize", "share", "simplify", "sparsify"),
    "verification": ("verify",),
}
"""Which module defines which names."""


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            # Kept, so that the function `optimize` takes the place of the module of that name.
            globals()[name] = getattr(import_module(f"onnxcomp.{home}"), name)
            return globals()[name]
    raise AttributeError(f"module 'onnxcomp' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
