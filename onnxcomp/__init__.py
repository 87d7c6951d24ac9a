"""onnxcomp: makes a trained ONNX model smaller and faster, and proves it.

Names are imported when they are first used, so that `import onnxcomp` itself costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from onnxcomp import errors

if TYPE_CHECKING:
    from onnxcomp.budget import Budget
    from onnxcomp.convert import prune, quantize, simplify
    from onnxcomp.core import Context, Pass
    from onnxcomp.inspection import inspect
    from onnxcomp.measure import bench, evaluate
    from onnxcomp.model import load, save
    from onnxcomp.optimizer import optimize
    from onnxcomp.report import Report
    from onnxcomp.runtime import Target

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Context",
    "Pass",
    "Report",
    "Target",
    "bench",
    "errors",
    "evaluate",
    "inspect",
    "load",
    "optimize",
    "prune",
    "quantize",
    "save",
    "simplify",
]

_HOMES = {
    "budget": ("Budget",),
    "convert": ("prune", "quantize", "simplify"),
    "core": ("Context", "Pass"),
    "inspection": ("inspect",),
    "measure": ("bench", "evaluate"),
    "model": ("load", "save"),
    "optimizer": ("optimize",),
    "report": ("Report",),
    "runtime": ("Target",),
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
