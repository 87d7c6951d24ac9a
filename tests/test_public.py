"""The names that users may rely on."""

import subprocess
import sys

import pytest

import onnxcomp

NAMES = {
    *("optimize", "convert", "simplify", "quantize", "prune", "share", "sparsify", "binarize", "factorize"),
    *("apply", "explain", "verify"),
    *("bench", "evaluate", "inspect", "load", "save", "pack", "unpack"),
    *("Budget", "Context", "Pass", "Recipe", "Report", "Target", "errors"),
}


def test_the_public_names_are_these() -> None:
    assert set(onnxcomp.__all__) == NAMES
    assert set(dir(onnxcomp)) >= NAMES


@pytest.mark.parametrize("name", sorted(NAMES - {"errors"}))
def test_each_is_what_it_says(name: str) -> None:
    item = getattr(onnxcomp, name)
    assert callable(item)
    assert item.__name__ == name
    assert item.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        _ = onnxcomp.optimise


def test_importing_it_imports_nothing_heavy() -> None:
    heavy = "{'numpy', 'onnx', 'onnx_ir', 'onnxruntime', 'onnxscript', 'rich', 'scipy', 'yaml'}"
    script = f"import sys, onnxcomp, onnxcomp.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
