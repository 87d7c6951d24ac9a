"""What a sample is, and how samples become the model's runs.

Every source of data becomes a `Dataset`: a count, and a function that reads the i-th sample as the model takes it.
Views, batches, padding and fingerprints follow from those two and are written once. Nothing is kept between reads, so
memory does not grow with the number of samples.
"""

import difflib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxcomp.errors import DataError
from onnxcomp.model import TensorSpec

Feeds: TypeAlias = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Batch:
    """One run of the model.

    Attributes:
        feeds: the model's inputs, padding included.
        targets: what belongs to the real rows (labels, reference outputs), without padding.
        valid: rows that are real; 1 where the feeds have no common first axis.
        padding: rows after them that repeat the last one to fill a fixed batch.
        void: which positions of the real rows are padding, if that is known.
    """

    feeds: Feeds
    targets: Feeds
    valid: int
    padding: int = 0
    void: "Padding | None" = None

    def trim(self, outputs: Mapping[str, NDArray[Any]]) -> Feeds:
        """The model's outputs without the rows that belong to padding."""
        padded = self.valid + self.padding
        return {
            name: array[: self.valid] if self.padding and array.shape[:1] == (padded,) else array
            for name, array in outputs.items()
        }


@dataclass(frozen=True)
class Padding:
    """Where entries are padded, so that nothing depends on it.

    Attributes:
        mask: the input that says so.
        axes: of inputs, by name and number, that run along the positions.
        outputs: the same of outputs, the axis of samples aside.
        spans: of each entry, or row of a run, its first position that counts, the one behind the last, and how many
            there are.
    """

    mask: str
    axes: tuple[tuple[str, int], ...]
    outputs: tuple[tuple[str, int], ...]
    spans: tuple[tuple[int, int, int], ...]

    @property
    def share(self) -> float:
        """Of all positions."""
        whole = sum(length for _, _, length in self.spans)
        return 1 - sum(stop - start for start, stop, _ in self.spans) / max(whole, 1)

    def select(self, entries: Iterable[int]) -> "Padding":
        """That of some entries."""
        return replace(self, spans=tuple(self.spans[entry] for entry in entries))

    def cut(self, feeds: Feeds, entry: int) -> Feeds:
        """The inputs of an entry without it."""
        return self._sliced(feeds, self.axes, entry)

    def row(self, outputs: Mapping[str, NDArray[Any]], row: int) -> Feeds:
        """Of the outputs of a run those of one row, without it; what does not run along the rows is all of theirs."""
        count = len(self.spans)
        found = {name: array[row : row + 1] if len(array) == count else array for name, array in outputs.items()}
        return self._sliced(found, [axis for axis in self.outputs if axis[0] in found], row)

    def _sliced(self, arrays: Feeds, axes: Iterable[tuple[str, int]], number: int) -> Feeds:
        found = dict(arrays)
        for name, axis in axes:
            found[name] = found[name][(slice(None),) * axis + (slice(*self.spans[number][:2]),)]
        return found


@dataclass(frozen=True)
class Dataset:
    """A finite set of samples that can be read again and again, one at a time.

    Attributes:
        specs: the model's inputs.
        size: number of entries, each a sample or a run of several.
        read: gives the i-th entry as a run of its own, checked against the specs.
        rows: samples in each entry; None for one each.
        stackable: whether samples of one row may share a run. False where the source says what a run is.
        constants: keys of the source that do not run along the samples, whole.
        origin: what error messages call the source.
        padding: where entries are padded, if that is known.
    """

    specs: tuple[TensorSpec, ...]
    size: int
    read: Callable[[int], Batch] = field(repr=False)
    rows: tuple[int, ...] | None = field(default=None, repr=False)
    stackable: bool = True
    constants: Mapping[str, NDArray[Any]] = field(default_factory=dict, repr=False)
    origin: str = "the data"
    padding: Padding | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Batch]:
        return map(self.read, range(self.size))

    @property
    def samples(self) -> int:
        """How many samples the entries hold."""
        return self.size if self.rows is None else sum(self.rows)

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of what comes with every sample beside the model's inputs; reads one sample."""
        return tuple(self.read(0).targets) if self.size else ()

    def batches(self, size: int | None = None) -> Iterator[Batch]:
        """Stream all samples, in order, in runs of at most `size` rows.

        A batch size fixed by the model wins over `size`, and the runs that do not fill it are padded by repeating
        their last row. Only neighbours of the same shapes share a run. Samples that are not stackable keep the run
        that their source gave them.

        Args:
            size: rows per run; None for the source's own runs, which are single rows where it is stackable.
        """
        fixed = _fixed_batch(self.specs)
        limit = fixed or size or 1
        group: list[Batch] = []
        for number, entry in enumerate(self):
            void = self.padding and self.padding.select([number] * entry.valid)
            sample = entry if void is None else replace(entry, void=void)
            if group and not (self.stackable and len(group) < limit and _alike(group[-1], sample)):
                yield _join(group, fixed)
                group = []
            group.append(sample)
        if group:
            yield _join(group, fixed)

    def select(self, indices: Iterable[int]) -> "Dataset":
        """A view on some of the entries, in ascending order."""
        chosen = sorted(indices)
        return self._ordered(chosen)

    def _ordered(self, entries: Sequence[int]) -> "Dataset":
        rows = None if self.rows is None else tuple(self.rows[entry] for entry in entries)
        padding = self.padding and self.padding.select(entries)
        read = self.read
        return replace(self, size=len(entries), read=lambda index: read(entries[index]), rows=rows, padding=padding)

    @property
    def unpadded(self) -> "Dataset":
        """The same entries without padding, or these data where none is known.

        What is learnt is read so: what nothing depends on says nothing. Those of one length follow each other, to share
        runs; lengths come in random order. Targets stay as they are.
        """
        if self.padding is None or not self.size:
            return self
        lengths = np.array([stop - start for start, stop, _ in self.padding.spans])
        ranks = np.random.default_rng(0).permutation(int(lengths.max()) + 1)[lengths]
        ordered = self._ordered(np.argsort(ranks, kind="stable").tolist())
        read, padding = ordered.read, ordered.padding
        assert padding is not None

        def cut(index: int) -> Batch:
            entry = read(index)
            return replace(entry, feeds=padding.cut(entry.feeds, index))

        return replace(ordered, read=cut, padding=None)

    def at_most(self, samples: int, seed: int = 0) -> "Dataset":
        """A random part of about that many samples, or all if there are no more."""
        if self.samples <= samples:
            return self
        entries = max(samples * self.size // self.samples, 1)
        return self.select(np.random.default_rng(seed).permutation(self.size)[:entries].tolist())

    def loaded(self) -> "Dataset":
        """The same entries in memory, which another process can be given."""
        return replace(self, read=list(self).__getitem__)

    def fingerprint(self) -> str:
        """SHA-256 (hex) over names, dtypes, shapes, values and padding of every sample; reads them all."""
        digest = hashlib.sha256()
        for sample in self:
            _digest(digest.update, "feed", sample.feeds)
            _digest(digest.update, "target", sample.targets)
        _digest(digest.update, "constant", self.constants)
        if self.padding is not None:
            digest.update(repr(self.padding).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Shard:
    """Some of the data's runs, one after the other: what is worked on at a time.

    Attributes:
        number: of the shard, from 0.
        runs: as `Dataset.batches` gives them.
    """

    number: int
    runs: tuple[Batch, ...]

    @property
    def samples(self) -> int:
        """How many there are."""
        return sum(run.valid for run in self.runs)

    def batches(self, size: int | None = None) -> Iterator[Batch]:
        """The runs, as they are."""
        return iter(self.runs)


def shards(runs: Iterable[Batch], samples: int) -> Iterator[Shard]:
    """Runs in portions of so many samples, or a run where one has more; the last may be smaller."""
    portion: list[Batch] = []
    number = held = 0
    for run in runs:
        if portion and held + run.valid > samples:
            yield Shard(number, tuple(portion))
            portion, number, held = [], number + 1, 0
        portion.append(run)
        held += run.valid
    if portion:
        yield Shard(number, tuple(portion))


def _fixed_batch(specs: Sequence[TensorSpec]) -> int | None:
    """The first axis, where the inputs that fix theirs agree on it."""
    lengths = {length for spec in specs for length in (spec.shape or ())[:1] if isinstance(length, int)}
    return lengths.pop() if len(lengths) == 1 else None


def common_rows(feeds: Feeds) -> int | None:
    """The common first axis of all arrays."""
    lengths = {array.shape[:1] for array in feeds.values()}
    return next(iter(lengths.pop()), None) if len(lengths) == 1 else None


def _alike(left: Batch, right: Batch) -> bool:
    """Whether both are single rows of the same shapes."""

    def form(arrays: Feeds) -> dict[str, tuple[Any, ...]]:
        return {name: (array.dtype.kind, array.shape) for name, array in arrays.items()}

    same = form(left.feeds) == form(right.feeds) and form(left.targets) == form(right.targets)
    return same and common_rows(left.feeds) == 1


def _join(samples: list[Batch], fixed: int | None) -> Batch:
    """One run of several samples of one row each, padded to the model's fixed batch."""
    feeds, targets, valid, void = samples[0].feeds, samples[0].targets, samples[0].valid, samples[0].void
    if len(samples) > 1:
        spans = [span for sample in samples if sample.void is not None for span in sample.void.spans]
        void = void and replace(void, spans=tuple(spans))
        feeds = {name: np.concatenate([sample.feeds[name] for sample in samples]) for name in feeds}
        targets = {name: np.concatenate([sample.targets[name] for sample in samples]) for name in targets}
        valid = len(samples)
    padding = max((fixed or 0) - valid, 0) if common_rows(feeds) == valid else 0
    if padding:
        feeds = {name: np.concatenate([array, *[array[-1:]] * padding]) for name, array in feeds.items()}
    return Batch(feeds, targets, valid, padding, void)


def _digest(update: Callable[[bytes], None], role: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    for name, array in sorted(arrays.items()):
        update(repr((role, name, array.dtype.str, array.shape)).encode())
        update(repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes())


class _Problem(NamedTuple):
    fact: str
    remedy: str


def checked_sample(
    raw: Mapping[str, NDArray[Any]], targets: Feeds, specs: Sequence[TensorSpec], where: str, *, pads: bool = False
) -> Batch:
    """A run of the model from arrays as they were found.

    Args:
        raw: arrays by name; all inputs must be among them.
        targets: what is carried along.
        specs: the model's inputs.
        where: which sample of what, for messages.
        pads: whether fewer rows than a fixed batch are fine, as they will be padded.

    Raises:
        DataError: naming every mismatch.
    """
    fixed = _fixed_batch(specs) if pads else None
    checked = {spec.name: _fit(raw, spec, fixed) for spec in specs}
    problems = [item for item in checked.values() if isinstance(item, _Problem)]
    if problems:
        raise DataError(
            "\n".join([f"{where} does not fit the model", *(f"  {problem.fact}" for problem in problems)]),
            remedy="; ".join(dict.fromkeys(problem.remedy for problem in problems)),
        )
    feeds = {name: item for name, item in checked.items() if not isinstance(item, _Problem)}
    return Batch(feeds, targets, valid=common_rows(feeds) or 1)


def _fit(raw: Mapping[str, NDArray[Any]], spec: TensorSpec, fixed: int | None) -> NDArray[Any] | _Problem:
    """The array for one input in the input's dtype, or why it cannot be."""
    if spec.name not in raw:
        close = difflib.get_close_matches(spec.name, raw, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(map(repr, raw)) or 'none'}"
        return _Problem(f"there is no key for input {spec.name!r}; {hint}", f"name the array {spec.name!r}")
    array = np.asarray(raw[spec.name])
    if spec.shape is not None:
        expected = _show(spec.shape)
        fact = f"input {spec.name!r} has shape {_show(array.shape)}, the model takes {expected}"
        if array.ndim != len(spec.shape):
            return _Problem(fact, f"give {spec.name!r} the axes {expected}, behind a sample axis where there is one")
        for axis, (have, want) in enumerate(zip(array.shape, spec.shape, strict=True)):
            padded = axis == 0 and fixed is not None and want == fixed and have < fixed
            if isinstance(want, int) and have != want and not padded:
                return _Problem(f"{fact}: axis {axis} differs", f"make axis {axis} of {spec.name!r} {want} long")
    if not array.size and 0 not in (spec.shape or ()):
        return _Problem(
            f"input {spec.name!r} is empty, of shape {_show(array.shape)}", f"put values into {spec.name!r}"
        )
    if (bad := _not_finite(array)) is not None:
        return _Problem(
            f"input {spec.name!r} holds {array[bad]} at {list(bad)}", "repair that value or drop the sample"
        )
    converted = _convert(array, spec.dtype)
    if converted is None:
        wanted = "str" if spec.dtype.hasobject else spec.dtype.name
        return _Problem(
            f"input {spec.name!r} is {array.dtype}, the model takes {wanted}",
            f"give {spec.name!r} as .astype({wanted!r}) if its values mean the same then",
        )
    if (bad := _not_finite(converted)) is not None:
        return _Problem(
            f"input {spec.name!r} holds {array[bad]} at {list(bad)}, beyond the range of {spec.dtype.name}",
            f"scale {spec.name!r} into the range of {spec.dtype.name}",
        )
    return converted


def _convert(array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any] | None:
    """The array in the model's dtype, in this machine's byte order; None if it has another.

    Two kinds have no dtype of their own in NumPy's files, so text of any kind is taken for strings, and float32 for the
    floats of ml_dtypes.
    """
    have = array.dtype
    if dtype.hasobject:
        return strings(array)
    stands_in = have == np.float32 and dtype.isbuiltin != 1 and _is_float(dtype)
    if not (have.newbyteorder("=") == dtype or stands_in):
        return None
    with np.errstate(over="ignore"):  # what overflows is reported by name
        return np.require(array, dtype, requirements="C")


def strings(array: NDArray[Any]) -> NDArray[Any] | None:
    """The array with `str` elements, or None if they are something else."""
    if array.dtype.kind == "S":
        try:
            array = np.char.decode(array, "utf-8")
        except UnicodeDecodeError:
            return None
    if array.dtype.kind == "U" or (array.dtype.hasobject and all(isinstance(item, str) for item in array.flat)):
        return array.astype(object)
    return None


def _is_float(dtype: np.dtype[Any]) -> bool:
    """Also true for the floats of ml_dtypes, whose kind is `V`."""
    return dtype.name.startswith(("float", "bfloat"))


def _not_finite(array: NDArray[Any]) -> tuple[int, ...] | None:
    """Where the first NaN or infinity is."""
    if not (_is_float(array.dtype) or array.dtype.kind == "c"):
        return None
    finite = np.isfinite(array)
    if finite.all():
        return None
    return tuple(map(int, np.unravel_index(int(np.argmin(finite)), array.shape)))


def _show(shape: tuple[int | str | None, ...]) -> str:
    return f"[{', '.join('?' if axis is None else str(axis) for axis in shape)}]"
