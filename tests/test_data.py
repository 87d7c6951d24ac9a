"""Every kind of source becomes a dataset that fits the model, or a DataError that says why not."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from onnxcomp.data import Dataset, ImageOptions, open_dataset, split
from onnxcomp.errors import DataError
from onnxcomp.model import TensorSpec

RNG = np.random.default_rng(0)


def spec(name: str, *shape: int | str | None, dtype: Any = np.float32) -> TensorSpec:
    return TensorSpec(name, np.dtype(dtype), shape)


X = spec("x", "batch", 3)
IDS, MASK = (spec(name, "batch", "length", dtype="i8") for name in ("ids", "mask"))


def fed(dataset: Dataset, name: str = "x", size: int | None = None) -> list[np.ndarray]:
    return [batch.feeds[name] for batch in dataset.batches(size)]


class Reader:
    """What ONNX Runtime calls a CalibrationDataReader."""

    def __init__(self, items: list[dict[str, np.ndarray]]) -> None:
        self.items = items
        self.rewind()

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.iterator, None)

    def rewind(self) -> None:
        self.iterator = iter(self.items)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_with_targets_and_constants(tmp_path: Path, save: Any) -> None:
    x, label, extra = RNG.standard_normal((10, 3)).astype("f4"), np.arange(10), np.arange(4)
    save(tmp_path / "a.npz", x=x, label=label, extra=extra)
    data = open_dataset(tmp_path / "a.npz", [X])
    assert (len(data), data.targets) == (10, ("label",))
    assert np.array_equal(data.constants["extra"], extra)
    for _ in range(2):
        batches = list(data.batches(4))
        assert [batch.valid for batch in batches] == [4, 4, 2]
        assert np.array_equal(np.concatenate([batch.feeds["x"] for batch in batches]), x)
        assert np.array_equal(np.concatenate([batch.targets["label"] for batch in batches]), label)


def test_the_same_content_has_the_same_fingerprint_wherever_it_lies(tmp_path: Path) -> None:
    x, label = RNG.standard_normal((4, 3)).astype("f4"), np.arange(4)
    np.savez(tmp_path / "plain.npz", x=x, label=label)
    np.savez_compressed(tmp_path / "packed.npz", x=x, label=label)
    (tmp_path / "folder").mkdir()
    for index in range(4):
        np.savez(tmp_path / "folder" / f"{index}.npz", x=x[index], label=label[index])
    runs = [{"x": x[i : i + 1], "label": label[i : i + 1]} for i in range(4)]
    sources = [
        tmp_path / "plain.npz",
        str(tmp_path / "packed.npz"),
        tmp_path / "folder",
        {"x": x, "label": label},
        runs,
        iter(runs),
        Reader(runs),
    ]
    assert len({open_dataset(source, [X]).fingerprint() for source in sources}) == 1


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_memory_does_not_grow_with_the_samples(tmp_path: Path, save: Any) -> None:
    x = np.zeros((4096, 1024), np.float32)
    save(tmp_path / "a.npz", x=x)
    tracemalloc.start()
    data = open_dataset(tmp_path / "a.npz", [spec("x", "batch", 1024)])
    count = sum(batch.valid for batch in data.batches(16))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 4096
    assert peak < x.nbytes / 4  # a batch is 64 KiB and copying a member takes 1 MiB at a time


def test_samples_without_a_batch_axis_run_one_by_one() -> None:
    image, scale = RNG.standard_normal((5, 3, 4, 4)).astype("f4"), np.arange(5, dtype="f4")
    data = open_dataset({"x": image, "scale": scale, "label": np.arange(5)}, [spec("x", 3, 4, 4), spec("scale")])
    batches = list(data.batches(4))
    assert [(batch.feeds["x"].shape, batch.feeds["scale"].shape, batch.valid) for batch in batches] == [
        ((3, 4, 4), (), 1)
    ] * 5
    assert [float(batch.feeds["scale"]) for batch in batches] == [0, 1, 2, 3, 4]
    assert [batch.targets["label"].tolist() for batch in batches] == [[0], [1], [2], [3], [4]]
    with pytest.raises(DataError, match="axis 0 differs"):
        open_dataset({"x": image[:, :2]}, [spec("x", 3, 4, 4)])


def test_whole_runs_in_an_npz() -> None:
    data = open_dataset({"x": np.ones((5, 1, 3), "f4")}, [spec("x", 1, 3)])
    assert [array.shape for array in fed(data, size=4)] == [(1, 3)] * 5


def test_a_fixed_batch_is_filled() -> None:
    x = np.arange(10, dtype="f4")[:, None]
    batches = list(open_dataset({"x": x}, [spec("x", 4, 1)]).batches(1))
    assert [(len(batch.feeds["x"]), batch.valid) for batch in batches] == [(4, 4), (4, 4), (4, 2)]
    assert batches[-1].feeds["x"][:, 0].tolist() == [8, 9, 9, 9]


def test_files_of_different_lengths(tmp_path: Path) -> None:
    for index, length in enumerate([3, 3, 5]):
        ids = np.arange(length, dtype="i8") + index
        np.savez(tmp_path / f"{index}.npz", ids=ids, mask=np.ones(length, "i8"), score=index / 2)
    batches = list(open_dataset(tmp_path, [IDS, MASK]).batches(8))
    assert [batch.feeds["ids"].shape for batch in batches] == [(2, 3), (1, 5)]
    assert batches[0].feeds["ids"].tolist() == [[0, 1, 2], [1, 2, 3]]
    assert batches[0].targets["score"].tolist() == [0, 0.5]


def test_npy_files(tmp_path: Path) -> None:
    x = RNG.standard_normal((4, 3)).astype("f4")
    for index, row in enumerate(x):
        np.save(tmp_path / f"{index}.npy", row if index % 2 else row[None])
    assert np.array_equal(np.concatenate(fed(open_dataset(tmp_path, [X]), size=4)), x)
    np.save(tmp_path / "all.npy", x)
    assert np.array_equal(np.concatenate(fed(open_dataset(tmp_path / "all.npy", [X]), size=3)), x)
    with pytest.raises(DataError, match="takes 2 inputs"):
        open_dataset(tmp_path, [IDS, MASK])


def test_class_folders_become_labels_in_sorted_order(tmp_path: Path) -> None:
    for shade, name in [(250, "dog"), (10, "cat"), (130, "cow")]:
        for index in range(2):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (9, 7), (shade, shade, shade)).save(tmp_path / name / f"{index}.PNG")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    data = open_dataset(tmp_path, [spec("image", "batch", 3, 4, 4)])
    (batch,) = data.batches(16)
    assert batch.targets["label"].dtype == np.int64
    assert batch.targets["label"].tolist() == [0, 0, 1, 1, 2, 2]
    np.testing.assert_allclose(batch.feeds["image"].mean((1, 2, 3)) * 255, [10, 10, 130, 130, 250, 250], rtol=1e-5)
    Image.new("L", (4, 4)).save(tmp_path / "loose.png")
    with pytest.raises(DataError, match=r"loose\.png and 0\.PNG"):
        open_dataset(tmp_path, [spec("image", "batch", 3, 4, 4)])


def test_loose_images_have_no_label(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 255).save(tmp_path / "a.png")
    data = open_dataset(tmp_path, [spec("image", 2, 1, "h", "w")], ImageOptions(size=(4, 6)))
    (batch,) = data.batches()
    assert data.targets == ()
    assert (batch.feeds["image"].shape, batch.valid) == ((2, 1, 4, 6), 1)
    (tmp_path / "b.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"cannot read .*b\.png"):
        list(open_dataset(tmp_path, [spec("image", 2, 1, 4, 6)]).batches())


def write_tensor(path: Path, array: np.ndarray, name: str = "") -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(onnx.numpy_helper.from_array(array, name).SerializeToString())


def test_onnx_test_data(tmp_path: Path) -> None:
    for index in range(2):
        folder = tmp_path / f"test_data_set_{index}"
        write_tensor(folder / "input_0.pb", np.full((2, 5), index, "i8"))
        write_tensor(folder / "input_1.pb", np.ones((2, 5), "i8"), "mask")
        write_tensor(folder / "output_0.pb", np.array([[np.inf]], "f4"))
        write_tensor(folder / "output_1.pb", np.zeros(1, "f4"), "named")
    data = open_dataset(tmp_path, [IDS, MASK])
    assert (len(data), data.targets) == (2, ("output_0", "named"))
    assert [array[0, 0] for array in fed(data, "ids")] == [0, 1]
    assert len(open_dataset(tmp_path / "test_data_set_1", [IDS, MASK])) == 1
    (tmp_path / "test_data_set_0" / "input_0.pb").write_bytes(b"\xff\xff\xff")
    with pytest.raises(DataError, match=r"cannot read .*input_0\.pb"):
        open_dataset(tmp_path, [IDS, MASK])


def test_a_generator_is_read_once_and_can_be_streamed_again() -> None:
    drawn = []

    def items() -> Iterator[dict[str, Any]]:
        for index in range(3):
            drawn.append(index)
            yield {"x": np.full((2, 3), index, "f4"), "label": [index, index]}

    data = open_dataset(items(), [X])
    assert [[int(array[0, 0]) for array in fed(data, size=8)] for _ in range(2)] == [[0, 1, 2]] * 2
    assert drawn == [0, 1, 2]
    assert [batch.valid for batch in data.batches()] == [2, 2, 2]
    assert data.targets == ("label",)


def test_the_last_run_of_an_iterable_may_fall_short_of_a_fixed_batch() -> None:
    items = [{"x": np.ones((rows, 3), "f4")} for rows in (4, 4, 2)]
    batches = list(open_dataset(items, [spec("x", 4, 3)]).batches())
    assert [(len(batch.feeds["x"]), batch.valid) for batch in batches] == [(4, 4), (4, 4), (4, 2)]
    with pytest.raises(DataError, match="item 0 of the iterable"):
        open_dataset(items[::-1], [spec("x", 4, 3)])


def test_a_reader_is_rewound_first() -> None:
    reader = Reader([{"x": np.ones((1, 3), "f4")}] * 2)
    reader.get_next()
    assert len(open_dataset(reader, [X])) == 2


def test_strings_from_python_and_npz(tmp_path: Path) -> None:
    text = np.array([["short"], ["much longer"]])
    np.savez(tmp_path / "a.npz", text=text)
    takes_text = [spec("text", None, 1, dtype=object)]
    sources = (tmp_path / "a.npz", {"text": text.astype(object)}, [{"text": row[None].astype(object)} for row in text])
    for source in sources:
        assert np.concatenate(fed(open_dataset(source, takes_text), "text")).tolist() == text.tolist()


def test_a_dataset_is_returned_as_it_is() -> None:
    data = open_dataset({"x": np.ones((2, 3), "f4")}, [X])
    assert open_dataset(data, [X]) is data


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"y": np.ones((2, 3))}, "no key for input 'x'"),
        ({"x": np.ones((0, 3))}, "holds no samples"),
        ({"x": np.array(1.0)}, "number of samples"),
        ({"x": np.ones((2, 4))}, "axis 1 differs"),
        ({"x": np.ones(2)}, "the model takes \\[batch, 3\\]"),
        ({"x": np.ones((2, 3), "i8")}, "is int64, the model takes float32"),
        ({"x": np.array([[{}, 1, 2]], object)}, "is object"),
        ([], "holds no samples"),
        ([np.ones((1, 3))], "not a mapping"),
        ([{"x": np.array([[{}, 1, 2]], object)}], "Python objects"),
        (Reader([]), "holds no samples"),
        (5, "int is not a source"),
        ("no/such/path", "there is no no/such/path"),
    ],
)
def test_sources_that_do_not_fit(source: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset(source, [X])


def test_unequal_sample_counts_are_listed() -> None:
    with pytest.raises(DataError, match=r"'ids' has shape \[4, 5\], 'mask' has shape \[3, 5\]"):
        open_dataset({"ids": np.ones((4, 5), "i8"), "mask": np.ones((3, 5), "i8")}, [IDS, MASK])


def test_nan_is_named_with_its_sample_even_in_a_view() -> None:
    x = np.ones((6, 3), "f4")
    x[4, 1] = np.nan
    data = open_dataset({"x": x}, [X]).select([0, 4])
    with pytest.raises(DataError, match=r"sample 4 of the mapping.*\n.*'x' holds nan at \[0, 1\]"):
        list(data.batches(2))


def test_paths_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no samples"):
        open_dataset(tmp_path, [X])
    (tmp_path / "a.csv").write_text("1,2,3")
    with pytest.raises(DataError, match="not in a format"):
        open_dataset(tmp_path / "a.csv", [X])
    with pytest.raises(DataError, match="takes no inputs"):
        open_dataset(tmp_path, [])


def test_split_is_disjoint_complete_and_repeatable() -> None:
    data = open_dataset({"x": np.arange(400, dtype="f4")[:, None]}, [spec("x", None, 1)])
    parts = split(data, seed=1)
    rows = [np.concatenate(fed(part, size=64))[:, 0].tolist() for part in (parts.tune, parts.judge, parts.final)]
    assert [len(part) for part in rows] == [200, 100, 100]
    assert sorted(row for part in rows for row in part) == list(range(400))
    assert all(part == sorted(part) for part in rows)
    assert not parts.shared
    assert split(data, seed=1).tune.fingerprint() == parts.tune.fingerprint()
    assert split(data, seed=2).tune.fingerprint() != parts.tune.fingerprint()


@pytest.mark.parametrize(("count", "shared"), [(99, True), (100, False)])
def test_few_samples_are_not_split(count: int, shared: bool) -> None:
    data = open_dataset({"x": np.ones((count, 3), "f4")}, [X])
    parts = split(data)
    assert parts.shared is shared
    assert (len(parts.final) == count) is shared


@pytest.mark.parametrize(("runs", "shared"), [(3, True), (4, False), (12, False)])
def test_samples_are_counted_not_runs(runs: int, shared: bool) -> None:
    data = open_dataset(Reader([{"x": np.ones((32, 3), "f4")}] * runs), [X])
    parts = split(data)
    assert (len(data), data.samples) == (runs, 32 * runs)
    assert parts.shared is shared
    assert [part.samples for part in (parts.tune, parts.judge, parts.final)] == (
        [96] * 3 if shared else [16 * runs, 8 * runs, 8 * runs]
    )
    assert data.at_most(64).samples == 64
