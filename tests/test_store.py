"""Results on disk by content."""

import os
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp import model as models
from onnxcomp import store as module
from onnxcomp.core import Context, Outcome, node_pattern
from onnxcomp.errors import OptionError
from onnxcomp.passes.quantize_static import QuantizeStatic
from onnxcomp.passes.simplify import Simplify
from onnxcomp.runtime import Target
from onnxcomp.store import Store
from tests.lab import network, samples


class Colour(Enum):
    RED = 1
    BLUE = 2


@dataclass(frozen=True)
class Settings:
    name: str
    share: float = 0.5


def twice(x: int) -> int:
    return 2 * x


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def counted(value: object) -> tuple[Callable[[], object], list[int]]:
    calls: list[int] = []

    def compute() -> object:
        calls.append(1)
        return value

    return compute, calls


VALUES: list[Any] = [
    None, True, 1, 1.0, "1", b"1", np.arange(3), np.arange(3.0), np.arange(3).reshape(3, 1), (1, 2), [1, 2], (1, (2,)),
    {"a": 1}, {"a": 2}, {"b": 1}, frozenset("a"), Colour.RED, Colour.BLUE, Settings("a"), Settings("a", 0.25),
    node_pattern("a"), node_pattern("b"), twice, partial(twice, 1), partial(twice, 2), Simplify(), Simplify(True),
    QuantizeStatic(), Target(), Target(threads=1), Context(), Context(seed=1), Context(exclude=node_pattern("x")),
]  # fmt: skip


def test_each_value_has_a_key_of_its_own_and_keeps_it(tmp_path: Path) -> None:
    for round_ in range(2):
        for place, value in enumerate([*VALUES, network(seed=1), network(seed=2)]):
            compute, calls = counted(place)
            assert Store(tmp_path).recall("place", value, compute) == place
            assert len(calls) == 1 - round_
    compute, calls = counted("other")
    assert Store(tmp_path).recall("another thing", VALUES[0], compute) == "other"
    assert calls


def test_what_does_not_change_a_result_does_not_change_the_key(store: Store) -> None:
    compute, calls = counted(1)
    for context in (Context(), Context(progress=lambda *_: None), Context(cache={1: 2}), Context(store=store)):
        store.recall("x", context, compute)
    assert len(calls) == 1


def test_functions_of_the_user_have_no_key(store: Store) -> None:
    compute, calls = counted(1)
    for _ in range(2):
        assert store.recall("x", (lambda: 1,), compute) == 1
        assert store.recall("x", (object(),), compute) == 1
    assert len(calls) == 4


def test_models_come_back_the_same(store: Store, tmp_path: Path) -> None:
    made = Outcome(network())
    first = store.recall("x", 1, lambda: made)
    again = Store(tmp_path / "cache").recall("x", 1, lambda: Outcome(network(seed=9)))
    assert models.to_bytes(first.model) == models.to_bytes(again.model) == models.to_bytes(made.model)
    assert isinstance(first.model, ir.Model)


def test_a_pass_gives_the_same_with_and_without_a_store(store: Store) -> None:
    given = Context(data=None)
    plain = Simplify()(network(), given)
    kept = store.recall("pass", (Simplify(), network(), given), lambda: Simplify()(network(), given))
    assert models.to_bytes(plain.model) == models.to_bytes(kept.model)


def test_a_damaged_entry_counts_as_missing(store: Store, tmp_path: Path) -> None:
    kept = [1, 2, 3], np.arange(4.0), Outcome(network())
    store.recall("x", 1, lambda: kept)
    (entry,) = (tmp_path / "cache").glob("??/*")
    sound = entry.read_bytes()
    damages = [b"", b"not a pickle", sound[:-4], sound[:20], sound + b"0", pickle.dumps(5)]
    damages += [flipped(sound, place) for place in (0, 31, *range(32, len(sound), len(sound) // 40), len(sound) - 1)]
    for damage in damages:
        entry.write_bytes(damage)
        assert store.recall("x", 1, lambda: "computed anew") == "computed anew"
        assert store.recall("x", 1, lambda: None) == "computed anew"


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


def test_an_entry_of_something_else_counts_as_missing(store: Store, tmp_path: Path) -> None:
    store.recall("x", 1, lambda: "one")
    (one,) = (tmp_path / "cache").glob("??/*")
    store.recall("x", 2, lambda: "two")
    for other in (tmp_path / "cache").glob("??/*"):
        other.write_bytes(one.read_bytes())
    assert store.recall("x", 2, lambda: None) is None
    assert store.recall("x", 1, lambda: None) == "one"


def test_an_entry_that_no_longer_unpickles_counts_as_missing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.recall("x", 1, lambda: Settings("a"))
    monkeypatch.delitem(globals(), "Settings")
    assert store.recall("x", 1, lambda: 5) == 5


def test_an_error_is_not_kept(store: Store) -> None:
    def fails() -> int:
        raise OptionError("no")

    with pytest.raises(OptionError):
        store.recall("x", 1, fails)
    assert store.recall("x", 1, lambda: 5) == 5


def test_other_code_or_another_machine_knows_nothing_of_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.recall("x", 1, lambda: 1)
    monkeypatch.setattr(module, "_circumstances", lambda: ("elsewhere",))
    assert store.recall("x", 1, lambda: 2) == 2


@pytest.fixture
def asked_anew() -> Iterator[Callable[[], tuple[str, ...]]]:
    """What results depend on, as it is now."""

    def circumstances() -> tuple[str, ...]:
        module._circumstances.cache_clear()
        return module._circumstances()

    yield circumstances
    module._circumstances.cache_clear()


@pytest.mark.parametrize("library", ["numpy", "onnx", "onnx-ir", "onnxscript", "scipy"])
def test_another_version_of_a_library_is_another_key(
    asked_anew: Callable[[], object], monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    before, usual = asked_anew(), metadata.version
    assert asked_anew() == before
    monkeypatch.setattr("onnxcomp.store.version", lambda name: "99" if name == library else usual(name))
    assert asked_anew() != before


def test_fewer_cores_are_another_key(asked_anew: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    for cores in (1, 1.5, 2, 2.0):
        monkeypatch.setattr(module, "cores", lambda cores=cores: cores)
        found.add(asked_anew())
    assert len(found) == 3


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    store = Store(tmp_path, limit=10_000)
    for number in range(12):
        store.recall("x", number, lambda: b"0" * 1000)
        for entry in tmp_path.glob("??/*"):  # as if a minute had passed
            status = entry.stat()
            os.utime(entry, (status.st_atime, status.st_mtime - 60))
    store.recall("x", 0, lambda: None)
    Store(tmp_path, limit=10_000)
    assert sum(path.stat().st_size for path in tmp_path.glob("??/*")) <= 9_000
    known = [Store(tmp_path).recall("x", number, lambda: None) is not None for number in range(12)]
    assert known == [True, *[False] * 4, *[True] * 7]


def test_what_is_too_large_is_not_kept(tmp_path: Path) -> None:
    store = Store(tmp_path, limit=1000)
    assert store.recall("x", 1, lambda: b"0" * 500) == b"0" * 500
    assert not list(tmp_path.glob("??/*"))


def test_leftovers_of_killed_processes_go(tmp_path: Path) -> None:
    Store(tmp_path).recall("x", 1, lambda: 1)
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    old, new = folder / ".old", folder / ".new"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    Store(tmp_path)
    assert (old.exists(), new.exists()) == (False, True)


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="--no-cache"):
        Store(tmp_path / "file")


def test_datasets_count_by_their_samples(store: Store) -> None:
    from onnxcomp.data import open_dataset
    from onnxcomp.model import input_specs

    specs = input_specs(network())
    data = open_dataset(samples(), specs)
    compute, calls = counted(1)
    for given in (data, open_dataset(samples(), specs), data.select(range(len(data)))):
        store.recall("x", replace(Context(), data=given), compute)
    assert len(calls) == 1
    store.recall("x", replace(Context(), data=data.select(range(5))), compute)
    assert len(calls) == 2
