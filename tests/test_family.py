"""Every result that is worth a choice."""

import json
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import pytest

import onnxcomp
from onnxcomp import family
from onnxcomp import model as models
from onnxcomp.budget import Budget
from onnxcomp.errors import ModelError
from onnxcomp.report import Figures
from tests.lab import Lab, integers, lab, network, samples
from tests.test_report import SCHEMA

__all__ = ["lab"]


@pytest.fixture
def varied(lab: Lab) -> Lab:
    """Each layer in INT8 saves a tenth of the time and costs a hundredth."""
    lab.loss = lambda model: 0.01 * len(integers(model))
    return lab


def test_the_folder_holds_what_is_not_beaten(varied: Lab, tmp_path: Path) -> None:
    result = varied.optimize(budget=Budget(max_drop=0.5), pareto=tmp_path / "all")
    index = json.loads((tmp_path / "all" / "pareto.json").read_text())
    jsonschema.validate(index, SCHEMA)
    files = [member["file"] for member in index["members"]]
    assert sorted(files) == files == sorted(path.name for path in (tmp_path / "all").glob("*.onnx"))
    figures = [(m["figures"]["drop"], m["figures"]["latency"], m["figures"]["size"]) for m in index["members"]]
    assert len(figures) > 2
    for one in figures:
        assert not any(all(a <= b for a, b in zip(other, one, strict=True)) for other in figures if other != one)
    layers = [len(integers(onnxcomp.load(tmp_path / "all" / file))) for file in files]
    assert layers[0] == 6
    assert {3, 4, 5} & set(layers), "some keep nodes in float"
    (chosen,) = [member for member in index["members"] if member["chosen"]]
    assert integers(onnxcomp.load(tmp_path / "all" / chosen["file"])) == integers(result.model)
    assert result.family is not None
    assert result.family.to_json() == index


def test_each_says_what_made_it(varied: Lab, tmp_path: Path) -> None:
    varied.optimize(pareto=tmp_path / "all", budget=Budget(max_drop=0.5))
    for path in (tmp_path / "all").glob("*.onnx"):
        made = onnxcomp.explain(path)
        assert made.recipe


def test_an_earlier_family_is_replaced_and_nothing_else(varied: Lab, tmp_path: Path) -> None:
    folder = tmp_path / "all"
    varied.optimize(pareto=folder, budget=Budget(max_drop=0.5))
    with pytest.raises(ModelError, match="not empty"):
        varied.optimize(pareto=folder)
    (folder / "mine.txt").write_text("x")
    index = json.loads((folder / "pareto.json").read_text())
    index["members"] += [{"file": "77.onnx"}, {"file": "../out.onnx"}, {"file": "mine.txt"}]
    (folder / "pareto.json").write_text(json.dumps(index))
    (folder / "77.onnx").write_text("")
    (tmp_path / "out.onnx").write_text("")
    varied.optimize(pareto=folder, overwrite=True, budget=Budget(max_drop=0.5))
    assert (folder / "mine.txt").exists()
    assert (tmp_path / "out.onnx").exists()
    assert not (folder / "77.onnx").exists()


def test_a_dry_run_writes_none(varied: Lab, tmp_path: Path) -> None:
    assert varied.optimize(pareto=tmp_path / "all", dry_run=True).family is not None
    assert not (tmp_path / "all").exists()


def test_nothing_else_is_where_the_family_may_write(varied: Lab, tmp_path: Path) -> None:
    folder, model, data = tmp_path / "all", tmp_path / "m.onnx", tmp_path / "d.npz"
    folder.mkdir()
    onnxcomp.save(network(), model)
    np.savez(data, **samples())  # type: ignore[arg-type]
    apart = onnx.load(model)
    onnx.save(apart, tmp_path / "apart.onnx", save_as_external_data=True, location="all/77.onnx.data", size_threshold=0)
    inside, link = folder / "01.onnx", folder / "02.onnx"
    inside.write_bytes(model.read_bytes())
    link.symlink_to(model)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for given in (
        {"source": inside},
        {"source": link},
        {"source": tmp_path / "apart.onnx"},
        {"source": model, "calib": folder},
        {"source": model, "output": folder / "03.onnx"},
        {"source": model, "output": folder / ".." / "all" / "pareto.json"},
        {"source": model, "output": folder, "dry_run": True},
        {"source": model, "report": folder / "04.onnx.data"},
    ):
        with pytest.raises(ModelError, match="give another folder to --pareto"):
            varied.optimize(**{"calib": str(data)} | given, pareto=folder, overwrite=True)
    assert not varied.protocols
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_other_names_in_its_folder_are_free(varied: Lab, tmp_path: Path) -> None:
    folder = tmp_path / "all"
    folder.mkdir()
    onnxcomp.save(network(), folder / "m.onnx")
    result = varied.optimize(
        folder / "m.onnx", output=folder / "m.opt.onnx", pareto=folder, overwrite=True, budget=Budget(max_drop=0.5)
    )
    assert models.to_bytes(onnxcomp.load(folder / "m.opt.onnx")) == models.to_bytes(result.model)
    assert models.to_bytes(onnxcomp.load(folder / "m.onnx")) == models.to_bytes(network())


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(ModelError, match="is no folder"):
        family.check_folder(tmp_path / "f", overwrite=True)
    with pytest.raises(ModelError, match="cannot make"):
        family.write(family.Family("", Figures(1), (), "", "", "", {}), [], tmp_path / "none" / "all")
    with pytest.raises(ModelError, match="does not exist"):
        family.check_folder(tmp_path / "none" / "all", overwrite=True)
