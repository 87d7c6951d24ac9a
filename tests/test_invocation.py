"""The command that a report names asks for what was asked for."""

import shlex
from pathlib import Path
from typing import Any

import pytest

import onnxcomp.optimizer
from onnxcomp.budget import Budget
from onnxcomp.candidates import Effort
from onnxcomp.errors import OptionError
from onnxcomp.images import ImageOptions
from onnxcomp.invocation import Invocation
from onnxcomp.runtime import Target
from tests.commands import run

USUAL: dict[str, Any] = {
    "source": "m.onnx", "output": None, "calib": None, "evaluation": None, "metric": None, "budget": Budget(),
    "passes": None, "exclude": None, "target": Target(), "batch": 1, "effort": Effort.DEFAULT, "seed": 0,
    "memory": 2 * 10**9, "images": None, "best_effort": False, "keep_overridable": False, "time_limit": None,
    "executor": None,
}  # fmt: skip


def test_what_is_usual_is_not_said() -> None:
    assert str(Invocation(**USUAL)) == "onnxcomp optimize m.onnx"


def test_objects_stand_as_their_type() -> None:
    text = str(Invocation(**USUAL | {"source": b"model", "calib": {"x": 1}, "metric": max}))
    assert shlex.split(text)[2:] == ["<bytes>", "--calib", "<dict>", "--metric", "<builtin_function_or_method>"]


@pytest.mark.parametrize(
    "size", [{"max_size": 12345}, {"max_size_share": 0.3}, {"max_memory": 5}, {"max_memory_share": 0.3}]
)
def test_every_option_reads_back(monkeypatch: pytest.MonkeyPatch, size: dict[str, Any]) -> None:
    asked: dict[str, Any] = {
        "output": Path("out dir/o.onnx"), "calib": Path("c.npz"), "evaluation": Path("it's.npz"), "metric": "top5",
        "budget": Budget(0.015, 1.5e-5, 1.25, **size), "passes": ("simplify", "quantize"), "exclude": "a|b $x",
        "target": Target("cpu", 2), "batch": 4, "effort": Effort.QUICK, "seed": 3, "memory": 10**8,
        "images": ImageOptions((20, 30), (0.5, 0.25, 0.125), (2.0,), "NHWC"), "best_effort": True,
        "keep_overridable": True, "time_limit": 90.0, "executor": "dask://10.0.0.1:8786",
    }  # fmt: skip
    given: dict[str, Any] = {}

    def remember(source: Any, **settings: Any) -> None:
        given.update(settings | {"source": source})
        raise OptionError("enough")

    monkeypatch.setattr(onnxcomp.optimizer, "optimize", remember)
    _, *words = shlex.split(str(Invocation(**USUAL | asked)))
    run(*words, code=2)
    assert given["source"] == Path("m.onnx")
    assert {name: given[name] for name in asked} == asked
