"""A recipe does again what made a model, on that model to the byte, and on another of the same shape."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

import onnxcomp
from onnxcomp import conversion, registry
from onnxcomp import model as models
from onnxcomp.core import name_nodes
from onnxcomp.errors import BudgetError, OptionError
from onnxcomp.graph import prepared
from onnxcomp.passes.quantize_dynamic import QuantizeDynamic
from onnxcomp.passes.quantize_weights import QuantizeWeights
from onnxcomp.passes.share import Share
from onnxcomp.passes.simplify import Simplify
from onnxcomp.recipe import Recipe
from onnxcomp.record import Origin
from onnxcomp.runtime import Protocol, Target, weight_bits
from tests.commands import child, mlp, run, samples
from tests.lab import Lab, integers, lab, network
from tests.lab import samples as lab_samples
from tests.test_report import SCHEMA

__all__ = ["lab"]

WIDE: dict[str, Any] = {
    "w1": np.random.default_rng(0).standard_normal((256, 8)).astype("f4"),
    "w2": np.random.default_rng(1).standard_normal((4, 256)).astype("f4"),
}


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "_PROTOCOL", Protocol(block=1, rounds=3, warmup=1))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return mlp(tmp_path / "wide.onnx", WIDE)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return samples(tmp_path / "data.npz")


def recipe_of(path: Path) -> str:
    return next(entry.value for entry in onnx.load(path).metadata_props if entry.key == "onnxcomp.recipe")


COMMANDS: dict[str, list[object]] = {
    "simplify": ["simplify"],
    "int8": ["quantize", "--exclude", "^Gemm_y$"],
    "int4-weights": ["quantize", "--scheme", "int4-weights", "--seed", 3],
    "prune": ["prune", "--target", "flops=60%", "--no-reconstruct"],
    "share": ["share", "--bits", 3],
    "binarize": ["binarize", "--ternary"],
    "sparsify": ["sparsify", "--sparsity", "2:4"],
}


@pytest.mark.parametrize("how", COMMANDS)
def test_the_same_model_gives_the_same_bytes(model: Path, data: Path, tmp_path: Path, how: str) -> None:
    command, *options = COMMANDS[how]
    calib = [] if how == "simplify" else ["--calib", data]
    first, by_model, by_file = (tmp_path / f"{name}.onnx" for name in ("first", "by_model", "by_file"))
    run(command, model, "-o", first, *calib, *options, "-q")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_of(first))
    run("apply", model, "--recipe", first, "--calib", data, "-o", by_model, "-q")
    run("apply", model, "--recipe", recipe, "--calib", data, "-o", by_file, "-q")
    assert by_model.read_bytes() == by_file.read_bytes() == first.read_bytes()


def test_what_the_search_decided_is_done_again_to_the_byte(lab: Lab, tmp_path: Path) -> None:
    lab.loss = lambda model: 0.3 if "g2" in integers(model) else 0.0
    lab.order = lambda name: name == "g2"
    calib, proof = lab_samples(60), lab_samples(121)
    first = lab.optimize(calib=calib, evaluation=proof, seed=3, exclude="g5")
    source, path = network(), tmp_path / "first.onnx"
    models.save(first.model, path)
    assert integers(first.model) == {"g0", "g1", "g3", "g4"}
    again = onnxcomp.apply(source, recipe=path, calib=calib, target=Target(threads=1))
    assert models.to_bytes(again.model) == path.read_bytes()
    trials = Origin.of(path).record
    assert trials is not None
    assert [trial.name for trial in trials.trials] == [trial.name for trial in first.report.trials]


def test_a_model_trained_again_gets_the_same_treatment(model: Path, data: Path, tmp_path: Path) -> None:
    first, other = tmp_path / "first.onnx", tmp_path / "other.onnx"
    run("quantize", model, "--calib", data, "-o", first, "-q")
    retrained = mlp(other, {name: array + 0.1 for name, array in WIDE.items()})
    result = run("apply", retrained, "--recipe", first, "--calib", data, "--eval", data, "--json", "-")
    report = json.loads(result.stdout)
    jsonschema.validate(report, SCHEMA)
    made = tmp_path / "other.opt.onnx"
    assert report["output"] == str(made)
    assert report["metric"] == "accuracy"
    kinds = [[node.op_type for node in onnx.load(path).graph.node] for path in (first, made)]
    assert kinds[0] == kinds[1]
    assert recipe_of(made) == recipe_of(first)
    assert first.read_bytes() != made.read_bytes()


def test_recipes_by_hand_and_in_python() -> None:
    model = network()
    recipe = Recipe((Simplify(), Share(bits=3)), seed=5)
    result = onnxcomp.apply(model, recipe=recipe, dry_run=True)
    direct = onnxcomp.convert(model, recipe.passes, seed=5, dry_run=True)
    assert models.to_bytes(result.model) == models.to_bytes(direct.model)
    assert result.report.environment["seed"] == 5
    assert Origin.of(result.model).recipe == recipe
    assert Origin.of(ir.to_proto(result.model)).recipe == Origin.of(models.to_bytes(result.model)).recipe == recipe


# --- what does not fit ----------------------------------------------------------------------------------------------


def refused(model: Path, text: str, *options: object) -> str:
    recipe = model.with_name("r.yaml")
    recipe.write_text(text)
    before = set(model.parent.iterdir())
    message = run("apply", model, "--recipe", recipe, *options, code=2).stderr
    assert set(model.parent.iterdir()) == before
    return message.replace(str(model.parent) + os.sep, "")


def test_nodes_that_are_not_there_are_named_with_their_line(model: Path, data: Path) -> None:
    text = "onnxcomp: 1\npasses:\n- simplify\n- quantize-static:\n    keep: [Gemm_h, Gem_y, other]\n"
    message = refused(model, text, "--calib", data)
    assert "quantize-static names nodes that the model does not have" in message
    assert "'Gem_y' (r.yaml, line 5, column 20), 'other' (r.yaml, line 5, column 27)" in message
    assert "did you mean 'Gemm_y'?" in message
    assert "onnxcomp inspect" in message
    with pytest.raises(OptionError, match="'Gem_y'"):
        onnxcomp.apply(model, recipe=Recipe((QuantizeWeights(keep=("Gem_y",)),)))


def test_an_exclusion_of_nothing_is_named_with_its_line(model: Path) -> None:
    message = refused(model, 'onnxcomp: 1\nexclude: "^lm_head"\npasses: [simplify]\n')
    assert "r.yaml, line 2, column 10: exclude '^lm_head' matches no node of the model" in message
    run("quantize", model, "--scheme", "fp16", "--exclude", "^lm_head", "--dry-run")  # as a user may write one for many


def test_names_are_found_where_they_stand_and_not_where_else_the_same_text_does(model: Path, data: Path) -> None:
    text = "onnxcomp: 1\nexclude: Gemm_x\npasses:\n- prune:\n    parts:\n      Gemm_x: 4\n"
    text += "- quantize-weights:\n    keep: [Gemm_x]\n"
    assert "r.yaml, line 2, column 10: exclude 'Gemm_x' matches no node" in refused(model, text)
    message = refused(model, text.replace("exclude: Gemm_x\n", ""))
    assert "prune names nodes that the model does not have: 'Gemm_x' (r.yaml, line 5, column 7)" in message
    message = refused(model, text.replace("exclude: Gemm_x\n", "").replace("Gemm_x: 4", "Gemm_h: 4"))
    assert "quantize-weights names nodes that the model does not have: 'Gemm_x' (r.yaml, line 7, column 12)" in message


REFUSED_BY_THE_MODEL = {
    "prune: {parts: {Gemm_h: 1000}}": (19, "group 'Gemm_h' has 256 channels, and cannot keep 1000", "give 1 to 256"),
    "prune: {parts: {Gemm_y: 2}}": (19, "there is no group of channels 'Gemm_y'", "those there are: Gemm_h"),
    "prune-depth: {parts: {Gemm_y: 1}}": (25, "'Gemm_y' has no operand 1 that can go", "that can lose one: none"),
    "factorize: {parts: {Gemm_h: tucker 2 2}}": (23, "layer 'Gemm_h' has no form 'tucker 2 2'", "name svd"),
}


@pytest.mark.parametrize("step", REFUSED_BY_THE_MODEL)
def test_what_only_the_model_refuses_is_said_with_its_line(model: Path, data: Path, step: str) -> None:
    column, fact, remedy = REFUSED_BY_THE_MODEL[step]
    message = refused(model, f"onnxcomp: 1\npasses:\n- simplify\n- {step}\n", "--calib", data)
    assert f"r.yaml, line 4, column {column}: {fact}" in message
    assert remedy in message


@pytest.mark.parametrize("name", ["quantize-static", "smooth"])
def test_what_can_do_nothing_without_data_is_refused_without(model: Path, name: str) -> None:
    message = refused(model, f"onnxcomp: 1\npasses: [simplify, {name}]\n")
    assert f"r.yaml, line 2, column 20: {name} needs calibration data, and there are none" in message
    assert "add --calib" in message
    with pytest.raises(OptionError, match=f"^{name} needs calibration data"):
        onnxcomp.convert(model, [registry.named(name)()])


def test_what_was_made_without_data_is_made_again_without(model: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first.onnx", tmp_path / "again.onnx"
    run("quantize", model, "--scheme", "int8-dynamic", "-o", first, "-q")
    run("apply", model, "--recipe", first, "-o", again, "-q")
    assert first.read_bytes() == again.read_bytes()


def test_names_of_nodes_that_passes_convert_first_are_known() -> None:
    """Passes see a model of an old operator set converted, and may have kept nodes that conversion added."""
    graph = "g (float[n,3,4] x) => (float[n,3,4] y) { h = Relu (x)  y = Softmax <axis=1> (h) }"
    model = models.load(onnx.parser.parse_model(f'<ir_version: 7, opset_import: ["": 11]> {graph}'))
    named = model.clone()
    name_nodes(named)
    converted = prepared(named, 13)
    assert isinstance(converted, ir.Model)
    name_nodes(converted)
    names = tuple(node.name or "" for node in models.all_nodes(converted))
    assert len(names) > 2
    onnxcomp.apply(model, recipe=Recipe((QuantizeWeights(keep=names),)), dry_run=True)


@pytest.mark.parametrize("options", [[], ["--calib", "r.yaml"]])
def test_errors_in_the_recipe_come_before_any_work(model: Path, options: list[str]) -> None:
    message = refused(model, "onnxcomp: 1\npasses: [prun]\n", *options)
    assert "r.yaml, line 2, column 10: there is no pass 'prun'" in message


def test_recipes_that_cannot_be_read(model: Path, tmp_path: Path) -> None:
    message = run("apply", model, "--recipe", tmp_path / "none.yaml", code=2).stderr
    assert "no such file" in message
    message = run("apply", model, "--recipe", tmp_path, code=2).stderr
    assert "is a folder, not a recipe" in message
    message = run("apply", model, "--recipe", model, code=2).stderr
    assert f"{model} has no recipe in its metadata" in message
    binary = tmp_path / "r.yaml"
    binary.write_bytes(b"onnxcomp: 1\npasses: \xff")
    assert "line 2, column 9: not YAML: not UTF-8" in run("apply", model, "--recipe", binary, code=2).stderr
    renamed = tmp_path / "model.bin"
    renamed.write_bytes(model.read_bytes())
    assert "has no recipe" in run("apply", model, "--recipe", renamed, code=2).stderr
    with binary.open("wb") as stream:
        stream.truncate(2**25)
    assert "far too large for a recipe" in run("apply", model, "--recipe", binary, code=2).stderr
    assert "Missing option '--recipe'" in run("apply", model, code=2).stderr


def test_inputs_are_not_written_over(model: Path, data: Path, tmp_path: Path) -> None:
    made = tmp_path / "made.onnx"
    run("share", model, "-o", made, "-q")
    for output in (made, model):
        message = run("apply", model, "--recipe", made, "-o", output, "--overwrite", code=2).stderr
        assert "is an input itself" in message
    other = tmp_path / "other.onnx"
    run("apply", model, "--recipe", made, "-o", other, "-q")
    assert "--overwrite" in run("apply", model, "--recipe", made, "-o", other, code=2).stderr
    run("apply", model, "--recipe", made, "-o", other, "--overwrite", "--dry-run", "-q")


def test_a_gate_on_the_loss_as_of_the_direct_commands(model: Path, data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("onnxcomp: 1\npasses:\n- share: {bits: 1}\n")
    options = ["--recipe", recipe, "--eval", data, "--metric", "relative-error", "--max-drop", "0.001"]
    assert "loses too much" in run("apply", model, *options, code=3).stderr
    assert not (tmp_path / "wide.opt.onnx").exists()
    run("apply", model, *options, "--best-effort", code=3)
    assert (tmp_path / "wide.opt.onnx").exists()
    with pytest.raises(BudgetError):
        onnxcomp.apply(model, recipe=recipe, evaluation=data, metric="relative-error", max_drop=0.001)


def test_metadata_of_a_former_run_do_not_stay(model: Path, data: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"
    run("share", model, "-o", first, "-q")
    proto = onnx.load(first)
    proto.metadata_props.add(key="onnxcomp.exclude", value="old")
    proto.metadata_props.add(key="author", value="somebody")
    onnx.save(proto, first)
    run("simplify", first, "-o", second, "-q")
    said = {entry.key: entry.value for entry in onnx.load(second).metadata_props}
    assert Recipe.from_yaml(said["onnxcomp.recipe"]).passes == (Simplify(),)
    assert "onnxcomp.exclude" not in said
    assert said["author"] == "somebody"


# --- passes of others -----------------------------------------------------------------------------------------------

THEIRS = '''
from dataclasses import dataclass
from typing import ClassVar
import onnx_ir as ir
from onnxcomp.core import Change, Outcome, Pass

@dataclass(frozen=True)
class Rename(Pass):
    """Names of nodes get a suffix."""
    name: ClassVar[str] = "rename"
    summary: ClassVar[str] = "nodes get other names"
    suffix: str = "_x"
    def apply(self, model, context):
        nodes = list(model.graph)
        for node in nodes:
            node.name += self.suffix
        return Outcome(model, tuple(Change(node.name.removesuffix(self.suffix), "renamed") for node in nodes))

@dataclass(frozen=True)
class Share(Rename):
    name: ClassVar[str] = "share"

class Base(Pass):
    pass

@dataclass(frozen=True)
class Odd(Rename):
    name: ClassVar[str] = "odd"
    table: dict = None

@dataclass(frozen=True)
class Needy(Rename):
    name: ClassVar[str] = "needy"
    suffix: str = None
    def __post_init__(self):
        raise RuntimeError("no settings")
'''

POINTS = """
[onnxcomp.passes]
good = theirs:Rename
taken = theirs:Share
needy = theirs:Needy
odd = theirs:Odd
base = theirs:Base
missing = not_there
broken = theirs_broken
leaves = theirs_leaves
number = theirs:ir
"""


@pytest.fixture
def theirs(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that has a distribution with passes."""
    folder = tmp_path / "site"
    info = folder / "their_passes-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-passes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    (folder / "theirs.py").write_text(THEIRS)
    (folder / "theirs_broken.py").write_text("1 / 0")
    (folder / "theirs_leaves.py").write_text("raise SystemExit('bye')")
    return dict(os.environ) | {"PYTHONPATH": str(folder)}


def test_passes_of_others_are_listed_and_broken_ones_named(theirs: dict[str, str]) -> None:
    done = subprocess.run(child("passes"), env=theirs, capture_output=True, text=True, check=True)
    assert "rename " in done.stdout
    assert "needy" not in done.stdout
    for name in registry.passes():
        assert name in done.stdout
    warnings = done.stderr.splitlines()
    assert all("their-passes" in line and line.startswith("Warning: entry point") for line in warnings)
    expected = {
        "'taken = theirs:Share'": "the name 'share' is already taken",
        "'needy = theirs:Needy'": "'needy' cannot be made with its defaults: RuntimeError: no settings",
        "'odd = theirs:Odd'": "odd: a recipe cannot hold a dict",
        "'base = theirs:Base'": "neither a pass nor a module of passes",
        "'missing = not_there'": "No module named 'not_there'",
        "'broken = theirs_broken'": "cannot be imported: ZeroDivisionError",
        "'leaves = theirs_leaves'": "cannot be imported: SystemExit: bye",
        "'number = theirs:ir'": "neither a pass nor a module of passes",
    }
    assert len(warnings) == len(expected)
    for point, problem in expected.items():
        assert any(point in line and problem in line for line in warnings)


def test_a_distribution_with_broken_metadata_is_named_by_its_place(theirs: dict[str, str]) -> None:
    info = next(Path(theirs["PYTHONPATH"]).glob("*.dist-info"))
    (info / "METADATA").unlink()
    (info / "entry_points.txt").write_text("[onnxcomp.passes]\ngood = theirs:Rename\nodd = a b?!\n")
    done = subprocess.run(child("passes"), env=theirs, capture_output=True, text=True, check=True)
    assert "rename " in done.stdout
    (warning,) = done.stderr.splitlines()
    assert "their_passes-1.0.dist-info" in warning
    assert "'odd = a b?!'" in warning


def test_recipes_use_passes_of_others(theirs: dict[str, str], model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("onnxcomp: 1\npasses:\n- rename: {suffix: on}\n- share: {bits: 3}\n")
    apply = child("apply", model, "--recipe", recipe, "--json", tmp_path / "r.json")
    done = subprocess.run(apply, env=theirs, capture_output=True, text=True, check=True)
    assert "renamed" in done.stdout
    assert {node.name for node in onnx.load(tmp_path / "wide.opt.onnx").graph.node} >= {"Gemm_hon", "Gemm_yon"}
    recipe.write_text("onnxcomp: 1\npasses: [nedy_or_so]\n")
    failed = subprocess.run(apply, env=theirs, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert "line 2, column 10: there is no pass 'nedy_or_so'" in failed.stderr
    assert "not usable here: entry point" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_a_pass_that_is_not_installed_here_is_named(model: Path) -> None:
    message = refused(model, "onnxcomp: 1\npasses: [rename]\n")
    assert "there is no pass 'rename'" in message


def test_what_depends_on_the_target_is_settled_in_the_recipe_of_a_result(tmp_path: Path) -> None:
    result = onnxcomp.apply(mlp(tmp_path / "m.onnx"), recipe=Recipe((QuantizeDynamic(),)))
    (made,) = Recipe.from_yaml(result.model.metadata_props["onnxcomp.recipe"]).passes
    assert made == QuantizeDynamic(weight_bits=weight_bits(Target()))
    assert result.report.steps[0].recipe == repr(made)
