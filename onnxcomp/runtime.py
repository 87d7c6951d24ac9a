"""The one door to ONNX Runtime: sessions, execution providers, timing and profiles."""

import ctypes
import functools
import gc
import json
import math
import re
import statistics
import tempfile
import time
import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from onnxcomp.errors import ModelError, OnnxcompError, OptionError, ProviderError

# The fresh processes that time files need ONNX Runtime and NumPy alone. onnx_ir takes three times as long to import as
# both: it is imported where a model comes in, or a type that NumPy lacks.
if TYPE_CHECKING:
    import onnx_ir as ir

Feeds = Mapping[str, NDArray[np.generic]]

VERSION: str = ort.__version__

_SUFFIX = "ExecutionProvider"
_SILENT = 4
_MOST_THREADS = 1024
ort.set_default_logger_severity(_SILENT)


@dataclass(frozen=True)
class Target:
    """The place where a model must run.

    Attributes:
        provider: an ONNX Runtime execution provider by its short name: cpu, cuda, tensorrt, ...
        threads: threads within an operator; 0 is ONNX Runtime's own choice (one per core).

    Raises:
        OptionError: more threads than any machine has, or fewer than none.
    """

    provider: str = "cpu"
    threads: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.threads <= _MOST_THREADS:
            raise OptionError(
                f"{self.threads} threads are not possible", remedy=f"--threads 1 to {_MOST_THREADS}, or 0 for the usual"
            )

    @classmethod
    def of(cls, target: "Target | str") -> "Target":
        """A target, also by its provider's name."""
        return target if isinstance(target, Target) else cls(target)

    @property
    def short(self) -> str:
        """The provider's short name, however the user wrote it."""
        return _short(self.provider)

    @property
    def providers(self) -> list[str]:
        """Full provider names, most wanted first.

        Raises:
            ProviderError: this build of ONNX Runtime does not have it; names those that it has.
        """
        available = ort.get_available_providers()
        for name in available:
            if _short(name) == _short(self.provider):
                fallback = ["CUDA" + _SUFFIX] if name.startswith("Tensorrt") and "CUDA" + _SUFFIX in available else []
                return list(dict.fromkeys([name, *fallback, "CPU" + _SUFFIX]))
        short = ", ".join(map(_short, available))
        raise ProviderError(
            f"execution provider '{self.provider}' is not available; available: {short}",
            f"the installed onnxruntime {VERSION} was built without it",
            "for CUDA and TensorRT: pip uninstall onnxruntime && pip install onnxruntime-gpu",
        )


@functools.cache
def weight_bits(target: Target) -> int:
    """Bits that INT8 weights may use: 7 where the target's kernels add pairs of uint8 * int8 products in 16 bits.

    x86 without VNNI does (vpmaddubsw), and saturates: two products of 255 * 127 exceed 32,767. Half the range cannot.
    The CPU's kernels tell: they are given the largest numbers to multiply. Of other providers it is assumed, not
    measured, that they add in 32 bits.

    Raises:
        ProviderError: the target is not available here.
    """
    if target.short != "cpu":
        return 8
    import onnx_ir as ir

    text = """<ir_version: 8, opset_import: ["" : 13]>
        g (uint8[M, K] data, int8[K, N] weights) => (int32[M, N] sums) { sums = MatMulInteger(data, weights) }"""
    data, weights = np.full((4, 64), 255, np.uint8), np.full((64, 16), 127, np.int8)
    sums = Session(ir.from_onnx_text(text), target).run({"data": data, "weights": weights})["sums"]
    return 8 if (sums == 255 * 127 * 64).all() else 7


def _short(provider: str) -> str:
    return provider.lower().removesuffix(_SUFFIX.lower())


class Session:
    """A model loaded by ONNX Runtime on a target, silent on the terminal.

    It pickles as its model, and is loaded anew where that arrives: once, however often it does. A model of more than
    2 GiB does not pickle, see `travels`.

    Args:
        model: a model, the bytes of one, or the path of one.
        target: where to run.
        profile: record the time of each node, read by `profile()`.
        extended: ONNX Runtime's own graph optimizations; off only to observe a graph as it is.
        spinning: its threads wait busily for the next run, as they do by default; off where NumPy works between runs,
            which they would slow down.

    Raises:
        ModelError: ONNX Runtime does not load it.
        ProviderError: the provider is not available, or fell back to the CPU.
    """

    def __init__(
        self,
        model: "ir.Model | bytes | str | Path",
        target: Target = Target(),
        *,
        profile: bool = False,
        extended: bool = True,
        spinning: bool = True,
    ) -> None:
        self.target, self._given = target, model
        large = _is_large(model)
        self._folder = tempfile.TemporaryDirectory(prefix="onnxcomp-") if profile or large else None
        if self._folder is not None:  # left to itself it goes too, but with a ResourceWarning
            weakref.finalize(self, self._folder.cleanup)
        options = ort.SessionOptions()
        options.log_severity_level = _SILENT
        options.intra_op_num_threads = target.threads
        if not spinning:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not extended:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if profile and self._folder:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(self._folder.name) / "profile")
        start = time.perf_counter()
        try:
            self._session = ort.InferenceSession(self._source(model, large), options, providers=target.providers)
        except OnnxcompError:
            raise
        except Exception as error:
            raise ModelError(
                f"ONNX Runtime {VERSION} does not load the model: {_first_line(error)}",
                "an operator, opset or type that this version does not implement, or an invalid graph",
                "run `onnxcomp inspect` on it, or upgrade onnxruntime",
            ) from error
        self.load_seconds = time.perf_counter() - start
        wanted = target.providers[0]
        if wanted not in self._session.get_providers():
            raise ProviderError(
                f"ONNX Runtime could not start {wanted} and fell back to {self._session.get_providers()[0]}",
                "its driver or libraries (CUDA, cuDNN, TensorRT) are missing or of another version",
                "see `python -c 'import onnxruntime as o; o.print_debug_info()'`",
            )
        self.outputs = tuple(value.name for value in self._session.get_outputs())
        self.inputs = tuple(value.name for value in self._session.get_inputs())
        types = {value.type for value in (*self._session.get_inputs(), *self._session.get_outputs())}
        self._unknown_to_numpy = any(re.fullmatch(r"tensor\((bfloat|float[48]|u?int[24]\b).*", kind) for kind in types)

    @property
    def travels(self) -> bool:
        """Whether it can be pickled."""
        from onnxcomp import model as models

        return not _is_large(models.load(self._given) if isinstance(self._given, str | Path) else self._given)

    @functools.cached_property
    def content(self) -> bytes:
        """The model as it travels."""
        from onnxcomp import model as models

        return self._given if isinstance(self._given, bytes) else models.to_bytes(models.load(self._given))

    def __reduce__(self) -> tuple[object, ...]:
        if not self.travels:
            raise OnnxcompError("a model of more than 2 GiB cannot be sent to other processes")
        return _arrived, (self.content, self.target)

    def _source(self, model: "ir.Model | bytes | str | Path", large: bool) -> bytes | str:
        if isinstance(model, bytes):
            return model
        if isinstance(model, str | Path):
            return str(model)
        from onnxcomp import model as models

        if self._folder is None or not large:
            return models.to_bytes(model)
        return str(models.save(model, Path(self._folder.name) / "model.onnx")[0])

    def run(self, feeds: Feeds, names: Sequence[str] | None = None) -> dict[str, NDArray[np.generic]]:
        """Run once.

        Args:
            feeds: arrays by input name.
            names: the outputs wanted; all by default.

        Raises:
            OnnxcompError: ONNX Runtime failed on these inputs.
        """
        wanted = list(self.outputs if names is None else names)
        try:
            if self._unknown_to_numpy:
                values = {name: _to_ort(np.asarray(array)) for name, array in feeds.items()}
                return dict(zip(wanted, map(_from_ort, self._session.run_with_ort_values(wanted, values)), strict=True))
            return dict(zip(wanted, self._session.run(wanted, dict(feeds)), strict=True))
        except Exception as error:
            raise OnnxcompError(
                f"ONNX Runtime failed to run the model: {_first_line(error)}",
                "the inputs do not fit the model, or an operator lacks this case",
            ) from error

    def profile(self) -> "dict[str, NodeTime]":
        """What each executed node took, by its name in ONNX Runtime's own graph; ends the profile."""
        times: dict[str, list[float]] = defaultdict(list)
        facts: dict[str, tuple[str, int]] = {}
        suffix = "_kernel_time"
        for event in json.loads(Path(self._session.end_profiling()).read_text()):
            if event.get("cat") == "Node" and event["name"].endswith(suffix):
                name, details = event["name"].removesuffix(suffix), event["args"]
                times[name].append(event["dur"])
                shapes = [shape for output in details.get("output_type_shape", ()) for shape in output.values()]
                facts[name] = (details["op_name"], int(np.prod(shapes[0])) if shapes else 0)
        return {name: NodeTime(*facts[name], statistics.median(values)) for name, values in times.items()}


def _to_ort(array: NDArray[np.generic]) -> ort.OrtValue:
    """An input, also of types that only ml_dtypes has: ONNX Runtime takes their bytes, with the type beside them."""
    if array.dtype.isbuiltin == 1:
        return ort.OrtValue.ortvalue_from_numpy(array)
    import onnx_ir as ir

    raw = np.frombuffer(ir.tensor(array).tobytes(), np.uint8)
    # The shape is read off the carrier: elements of less than a byte fill only the front of theirs.
    carrier = np.zeros(array.shape, f"u{array.itemsize}")
    carrier.reshape(-1).view(np.uint8)[: raw.size] = raw
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(carrier, ir.DataType.from_numpy(array.dtype))


def _from_ort(value: ort.OrtValue) -> NDArray[np.generic]:
    """An output, of whatever type."""
    if not value.is_tensor() or value.element_type() in _numpy_types():
        array: NDArray[np.generic] = value.numpy()
        return array
    import onnx
    import onnx_ir as ir

    raw = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    tensor = onnx.TensorProto(dims=value.shape(), data_type=value.element_type(), raw_data=raw)
    return ir.from_proto(tensor).numpy()


@functools.cache
def _numpy_types() -> "set[ir.DataType]":
    import onnx_ir as ir

    return {ir.DataType.from_numpy(np.dtype(kind)) for kind in "?bBhHiIlLefdFD"} | {ir.DataType.STRING}


@dataclass(frozen=True)
class NodeTime:
    """Time of one node in a profile.

    Attributes:
        operator: type of the node that ran, after ONNX Runtime's fusions.
        elements: size of its first output.
        microseconds: median over runs.
    """

    operator: str
    elements: int
    microseconds: float


@functools.lru_cache(maxsize=2)
def _arrived(content: bytes, target: Target) -> Session:
    """A session that came from another process: it works there between others, so its threads do not spin.

    The last two are kept, as models are judged beside the original, and each arrives with every piece of work.
    """
    return Session(content, target, spinning=False)


def _is_large(model: "ir.Model | bytes | str | Path") -> bool:
    if isinstance(model, bytes | str | Path):
        return False
    from onnxcomp import model as models

    return models.tensor_bytes(model) > models.PROTOBUF_LIMIT


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:400]


@dataclass(frozen=True)
class Timing:
    """Latency of one model, measured beside others.

    Attributes:
        median: seconds per run, the median over blocks.
        low, high: 2.5% and 97.5% quantiles over blocks, seconds.
        speedup: median over blocks of (first model's time / this model's time) in the same round.
        speedup_low, speedup_high: quartiles of that ratio.
    """

    median: float
    low: float
    high: float
    speedup: float
    speedup_low: float
    speedup_high: float

    @property
    def quartiles(self) -> tuple[float, float]:
        """Of the speed-up."""
        return self.speedup_low, self.speedup_high


@dataclass(frozen=True)
class Protocol:
    """How latency is measured. Blocks keep caches warm; single alternating runs (`cold`) evict them: up to 2x apart."""

    block: int = 20
    longest: float = math.inf
    """Seconds after which a block ends, after one run at least."""
    rounds: int = 11
    warmup: int = 5
    cold: bool = False
    seconds: float = 20.0
    """Stop adding rounds after this long, but never before three."""

    def __str__(self) -> str:
        if self.cold:
            return "medians over alternating single runs (caches evicted)"
        runs = f"{self.block} consecutive runs"
        if self.longest < math.inf:
            runs = f"up to {runs}, begun within {self.longest:g} s"
        return f"medians over alternating blocks of {runs}, after warm-up"


def compare(sessions: Sequence[Session], feeds: Feeds, protocol: Protocol = Protocol()) -> list[Timing]:
    """Time models side by side, in turn, so that a drift of the machine's speed hits all alike.

    Args:
        sessions: the models; ratios are to the first.
        feeds: one batch, the same for all.
        protocol: how often, in which order.
    """
    return summarised(block_seconds(sessions, feeds, protocol))


def block_seconds(sessions: Sequence[Session], feeds: Feeds, protocol: Protocol) -> NDArray[np.float64]:
    """(rounds, models) seconds per run, models in turn."""
    for session in sessions:
        for _ in range(protocol.warmup):
            session.run(feeds)
    block = 1 if protocol.cold else protocol.block
    rounds = protocol.rounds * protocol.block if protocol.cold else protocol.rounds
    times: list[list[float]] = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        while len(times) < rounds and (len(times) < 3 or time.perf_counter() - start < protocol.seconds):
            times.append([_block_seconds(session, feeds, block, protocol.longest) for session in sessions])
    finally:
        if collecting:
            gc.enable()
    return np.asarray(times)


def summarised(table: NDArray[np.float64]) -> list[Timing]:
    """From (rounds, models) seconds per run; ratios are to the first model."""
    ratios = table[:, :1] / table
    return [
        Timing(
            *(float(v) for v in np.quantile(table[:, i], (0.5, 0.025, 0.975))),
            *(float(v) for v in np.quantile(ratios[:, i], (0.5, 0.25, 0.75))),
        )
        for i in range(table.shape[1])
    ]


def _block_seconds(session: Session, feeds: Feeds, block: int, longest: float) -> float:
    """Seconds per run."""
    start, taken, done = time.perf_counter(), 0.0, 0
    while done < block and taken < longest:
        session.run(feeds)
        done, taken = done + 1, time.perf_counter() - start
    return taken / done
