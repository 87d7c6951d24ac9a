"""Packages give back the same bytes, and what is wrong with one is said."""

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from models import zoo
from onnxcomp import model as models
from onnxcomp import package
from onnxcomp.core import Context
from onnxcomp.errors import ModelError
from onnxcomp.numerics.pack import pack as pack_bits
from onnxcomp.package import pack, unpack
from onnxcomp.passes.share import Share
from tests.passes.small import network


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A model with 3-bit weights."""
    models.save(Share(3)(network(), Context()).model, tmp_path / "shared.onnx")
    return tmp_path / "shared.onnx"


@pytest.fixture
def packed(shared: Path) -> Path:
    pack(shared, shared.with_suffix(".onnxpack"))
    return shared.with_suffix(".onnxpack")


@pytest.mark.parametrize(
    "name", ["resnet", "gpt", "fp16_weights", "string_lookup", "control_flow", "quantized_already"]
)
def test_the_same_bytes_come_back(name: str, tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    source.write_bytes(zoo.build(name).SerializeToString())
    done = pack(source, tmp_path / "p.onnxpack")
    assert done.size == (tmp_path / "p.onnxpack").stat().st_size
    assert done.files == {"model.onnx": source.stat().st_size}
    assert done.size < source.stat().st_size
    back = unpack(tmp_path / "p.onnxpack", tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == source.read_bytes()
    assert back.files == {"back.onnx": source.stat().st_size}


def test_external_data_travel_with_the_model(tmp_path: Path) -> None:
    for name in ("from", "to"):
        (tmp_path / name).mkdir()
    onnx.save(
        zoo.build("resnet"), tmp_path / "from" / "m.onnx", save_as_external_data=True, location="weights.bin",
        size_threshold=0,
    )  # fmt: skip
    pack(tmp_path / "from" / "m.onnx", tmp_path / "p.onnxpack")
    assert [*unpack(tmp_path / "p.onnxpack", tmp_path / "to" / "m.onnx").files] == ["weights.bin", "m.onnx"]
    for name in ("m.onnx", "weights.bin"):
        assert (tmp_path / "to" / name).read_bytes() == (tmp_path / "from" / name).read_bytes()
    with pytest.raises(ModelError, match="exists"):
        unpack(tmp_path / "p.onnxpack", tmp_path / "to" / "other.onnx")  # the data are there
    assert not (tmp_path / "to" / "other.onnx").exists()


def test_codes_of_three_bits_shrink_to_their_entropy(tmp_path: Path) -> None:
    """And not to that of bytes, in which they lie across each other."""
    codes = np.random.default_rng(0).choice(8, 80000, p=[0.4, 0.2, 0.1, 0.1, 0.1, 0.05, 0.03, 0.02]).astype(np.uint8)
    shares = np.bincount(codes) / len(codes)
    entropy = -(shares * np.log2(shares)).sum() * len(codes) / 8
    coding, stored = package._coded(pack_bits(codes, 3).tobytes())
    assert coding == "integers:6"
    assert len(stored) < 1.03 * entropy


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.integers(1, 40))
def test_every_coding_gives_back_what_it_got(part: bytes, times: int) -> None:
    whole = part * times
    coding, stored = package._coded(whole)
    assert package._decoded(coding, len(whole), stored, "p") == whole
    array = np.frombuffer(whole, np.uint8)
    for bits in (5, 6, 7):
        assert package._together(package._apart(array, bits), bits, len(array)).tobytes() == whole


def remade(packed: Path, edit: Callable[[list[dict[str, Any]]], object], version: int = 1) -> Path:
    """The package with other contents, and a checksum that fits."""
    body = packed.read_bytes()[:-32]
    _, _, length = struct.unpack_from("<8sHQ", body)
    files = json.loads(zstandard.decompress(body[18 : 18 + length]))
    edit(files)
    contents = zstandard.compress(json.dumps(files).encode())
    made = struct.pack("<8sHQ", b"ONNXPACK", version, len(contents)) + contents + body[18 + length :]
    packed.write_bytes(made + hashlib.sha256(made).digest())
    return packed


def refused(path: Path, **options: Any) -> str:
    """What is said of a package, and that it left nothing behind."""
    folder = path.parent / "out"
    folder.mkdir(exist_ok=True)
    with pytest.raises(ModelError) as caught:
        unpack(path, folder / "m.onnx", **options)
    assert not [*folder.iterdir()]
    return str(caught.value)


def test_a_package_cut_short_anywhere_is_refused(packed: Path) -> None:
    body = packed.read_bytes()
    for length in [*range(0, 60, 3), *range(60, len(body), len(body) // 20), len(body) - 1]:
        packed.write_bytes(body[:length])
        assert "damaged" in refused(packed) or "no package" in refused(packed)


def test_a_changed_byte_is_refused(packed: Path) -> None:
    body = bytearray(packed.read_bytes())
    for place in range(10, len(body), len(body) // 25):
        body[place] ^= 4
        packed.write_bytes(body)
        assert "damaged" in refused(packed)
        body[place] ^= 4


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil", "C:\\evil", "..\\evil", "C:evil", "", "a\0b"])
def test_names_that_lead_elsewhere_are_refused(packed: Path, name: str) -> None:
    def add(files: list[dict[str, Any]]) -> None:
        files.append({"name": name, "bytes": 0, "sha256": hashlib.sha256().hexdigest(), "pieces": []})

    assert "outside the model's folder" in refused(remade(packed, add))


def test_links_are_not_followed(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path / "elsewhere")

    def add(files: list[dict[str, Any]]) -> None:
        files.append({"name": "link/evil", "bytes": 0, "sha256": hashlib.sha256().hexdigest(), "pieces": []})

    with pytest.raises(ModelError, match="outside the model's folder"):
        unpack(remade(packed, add), tmp_path / "out" / "m.onnx")
    assert not [*(tmp_path / "elsewhere").iterdir()]


EDITS: dict[str, Callable[[list[dict[str, Any]]], object]] = {
    "a piece that says it is longer": lambda files: files[0]["pieces"][0].__setitem__(1, 10**6),
    "a size below zero": lambda files: files[0]["pieces"][0].__setitem__(1, -1),
    "a size that is text": lambda files: files[0]["pieces"][0].__setitem__(2, "9"),
    "an unknown coding": lambda files: files[0]["pieces"][0].__setitem__(0, "magic"),
    "integers of no bits": lambda files: files[0]["pieces"][0].__setitem__(0, "integers:0"),
    "planes of no bytes": lambda files: files[0]["pieces"][0].__setitem__(0, "planes:0"),
    "another checksum": lambda files: files[0].__setitem__("sha256", "0" * 64),
    "no pieces": lambda files: files[0].pop("pieces"),
    "no files": lambda files: files.clear(),
    "a piece less": lambda files: files[0]["pieces"].pop(),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_contents_that_lie_are_refused(packed: Path, edit: Callable[[list[dict[str, Any]]], object]) -> None:
    assert "damaged" in refused(remade(packed, edit))


def test_a_length_bomb_is_refused(packed: Path) -> None:
    bomb = remade(packed, lambda files: files[0]["pieces"][0].__setitem__(1, 1 << 50))
    assert "more than the" in refused(bomb)
    assert "more than the 100 allowed" in refused(packed, most=100)


def test_a_piece_that_inflates_beyond_its_size_is_refused(packed: Path) -> None:
    stored = zstandard.compress(bytes(10**8))

    def swap(files: list[dict[str, Any]]) -> None:
        files[:] = [{"name": "m", "bytes": 9, "sha256": "", "pieces": [["zstd", 9, len(stored)]]}]

    contents = remade(packed, swap).read_bytes()
    _, _, length = struct.unpack_from("<8sHQ", contents)
    made = contents[: 18 + length] + stored
    packed.write_bytes(made + hashlib.sha256(made).digest())
    assert "damaged" in refused(packed)


def test_another_version_is_named(packed: Path) -> None:
    assert "version 9" in refused(remade(packed, lambda files: None, version=9))


def test_what_cannot_be_packed_or_written_is_said(shared: Path, packed: Path) -> None:
    with pytest.raises(ModelError, match="exists"):
        pack(shared, packed)
    with pytest.raises(ModelError, match="is an input itself"):
        pack(shared, shared, overwrite=True)
    with pytest.raises(ModelError, match="is no package"):
        unpack(shared, shared.with_name("new.onnx"))
    with pytest.raises(ModelError):
        pack(shared.with_name("none.onnx"), shared.with_name("p"))
    with pytest.raises(ModelError, match="cannot read"):
        unpack(shared.with_name("none"), shared.with_name("new.onnx"))
    assert pack(shared, packed, overwrite=True).size == packed.stat().st_size
