"""The package as users get it: a wheel, installed elsewhere, with every pass in it."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

CHECK = """
import importlib.metadata, importlib.resources, pathlib, sys
import onnxcomp
from onnxcomp.registry import passes
home = pathlib.Path(sys.argv[1])
assert pathlib.Path(onnxcomp.__file__).is_relative_to(home), onnxcomp.__file__
for file in ("py.typed", "page.html"):
    assert importlib.resources.files("onnxcomp").joinpath(file).is_file()
(command,) = importlib.metadata.Distribution.at(next(home.glob("*.dist-info"))).entry_points
assert command.name == "onnxcomp" and callable(command.load())
for kind in passes().values():
    kind()
    assert pathlib.Path(sys.modules[kind.__module__].__file__).is_relative_to(home)
    print(kind.__module__)
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_works_elsewhere(tmp_path: Path) -> None:
    python = sys.executable
    # The wheel is made from the source distribution, so that nothing left behind in the checkout gets in.
    run(python, "-m", "build", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.startswith(("tests/", "models/", "benchmarks/", "passes/"))]
    assert any(name.endswith("licenses/LICENSE") for name in names)

    home = tmp_path / "elsewhere"
    run(python, "-m", "pip", "install", "--no-deps", "--target", home, wheel, cwd=tmp_path)
    # -I keeps this checkout out; what the package depends on is in the environment.
    check = f"import sys; sys.path.insert(0, sys.argv[1])\n{CHECK}"
    imported = run(python, "-I", "-c", check, home, cwd=tmp_path).split()
    assert imported
    assert sorted(imported) == sorted(f"onnxcomp.passes.{file.stem}" for file in (ROOT / "passes").glob("[!_]*.py"))
