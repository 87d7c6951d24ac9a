"""The commands that store weights in fewer bytes: options reach the passes, reports say what was done, errors help."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest

from onnxcomp import model as models
from tests.commands import run
from tests.passes.small import context, network
from tests.test_report import SCHEMA


@pytest.fixture
def model(tmp_path: Path) -> Path:
    models.save(network(), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    learn = context(24).data
    assert learn is not None
    np.savez(tmp_path / "calib.npz", **next(iter(learn.batches(24))).feeds)  # type: ignore[arg-type]
    return tmp_path / "calib.npz"


def document(*arguments: object) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(run(*arguments, "--json", "-").stdout)
    jsonschema.validate(plain, SCHEMA)
    return plain


COMMANDS: dict[str, tuple[tuple[object, ...], str]] = {
    "share": (("share", "--bits", 3), "8 shared values, 3 bits"),
    "share, product": (("share", "--bits", 2, "--method", "product", "--no-reconstruct"), "shared vectors"),
    "share, hash": (("share", "--bits", 8, "--method", "hash", "--no-reconstruct"), "by hash"),
    "share by channels": (("share", "--channels", 8, "--no-reconstruct"), "4 codebooks"),
    "sparsify": (("sparsify",), "50% zero"),
    "sparsify, N:M": (("sparsify", "--sparsity", "2:4", "--choose", "wanda"), "2 of 4 zero"),
    "sparsify, blocks": (("sparsify", "--sparsity", "75%", "--block", "2x2", "--no-reconstruct"), "in blocks of 2x2"),
    "binarize": (("binarize", "--bases", 2), "binary weights, 2 bits"),
    "binarize, ternary": (("binarize", "--ternary", "--ends", 0), "ternary weights"),
    "factorize": (("factorize", "--target", "params=70%"), "of its weights"),
    "factorize, energy": (("factorize", "--energy", "90%", "--method", "svd"), "svd of rank"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_was_asked_for_is_done_and_reported(name: str, model: Path, data: Path) -> None:
    options, said = COMMANDS[name]
    command, *others = options
    before = model.read_bytes()
    plain = document(command, model, *others, "--calib", data, "--threads", 1)
    assert any(said in change["what"] for step in plain["steps"] for change in step["changes"])
    assert command == "factorize" or any("save bytes in the file on every provider" in note for note in plain["notes"])
    written = model.with_name("net.opt.onnx")
    assert plain["result"]["size"] == written.stat().st_size < 0.95 * len(before)
    assert model.read_bytes() == before
    onnx.checker.check_model(written, full_check=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("share", "--bits", 9), "9 is not in the range"),
        (("share", "--method", "hash", "--channels", 4), "need the method kmeans"),
        (("sparsify", "--sparsity", "4:2"), "write it like 2:4"),
        (("sparsify", "--sparsity", "0:4"), "write it like 2:4"),
        (("sparsify", "--sparsity", "100%"), "expected a number above 0 and below 1"),
        (("sparsify", "--block", "0x4"), "is not a block"),
        (("binarize", "--ternary", "--bases", 2), "ternary weights of 2 bases"),
        (("factorize",), "give either --target or --energy"),
        (("factorize", "--target", "params=70%", "--energy", "99%"), "give either --target or --energy"),
        (("factorize", "--target", "weights=70%"), "weights"),
    ],
)
def test_what_makes_no_sense_is_refused(options: tuple[object, ...], said: str, model: Path) -> None:
    command, *others = options
    result = run(command, model, *others, code=2)
    assert said in result.stderr
    assert not model.with_name("net.opt.onnx").exists()


def test_a_loss_over_the_budget_is_exit_code_3_and_writes_nothing(model: Path, data: Path) -> None:
    result = run("binarize", model, "--calib", data, "--eval", data, "--max-drop", "0.01%", code=3)
    assert "loses too much" in result.stderr
    assert not model.with_name("net.opt.onnx").exists()


def test_excluded_layers_stay(model: Path, data: Path) -> None:
    first = network().graph[0].name
    plain = document("share", model, "--calib", data, "--exclude", f"^{first}$")
    assert not any(change["node"] == first for step in plain["steps"] for change in step["changes"])
    assert any(skip["node"] == first for step in plain["steps"] for skip in step["skips"])


def test_pack_and_unpack(model: Path, tmp_path: Path) -> None:
    run("share", model, "--bits", 3, "-q")
    shared = model.with_name("net.opt.onnx")
    plain = document("pack", shared)
    assert plain["size"] == (tmp_path / "net.opt.onnxpack").stat().st_size < shared.stat().st_size
    assert "smaller" in run("unpack", tmp_path / "net.opt.onnxpack", "-o", tmp_path / "back.onnx").stdout
    assert (tmp_path / "back.onnx").read_bytes() == shared.read_bytes()
    assert "exists" in run("unpack", tmp_path / "net.opt.onnxpack", code=2).stderr
    assert (
        "more than the"
        in run("unpack", tmp_path / "net.opt.onnxpack", "--overwrite", "--max-bytes", "1KB", code=2).stderr
    )
    assert "no package" in run("unpack", model, "-o", tmp_path / "x.onnx", code=2).stderr


def test_inspect_tells_what_weights_bear(model: Path, data: Path) -> None:
    plain = document("inspect", model, "--weights", "--calib", data)
    assert len(plain["weights"]) == 7
    assert "What weights bear" in run("inspect", model, "--weights").stdout


def test_optimize_stores_weights_as_it_was_told_whatever_the_clock_says(model: Path, data: Path) -> None:
    plain = document("optimize", model, "--calib", data, "--passes", "simplify,share", "--max-drop", "50%")
    assert plain["result"]["size"] < 0.3 * plain["original"]["size"]
    assert any("save bytes" in note for note in plain["notes"])
