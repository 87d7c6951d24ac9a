"""The door to ONNX Runtime: what loads and runs, what is refused and how, and timing that cannot be misread."""

import gc
import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from models import zoo
from onnxcomp import model as models
from onnxcomp import runtime
from onnxcomp.errors import ModelError, OnnxcompError, ProviderError
from onnxcomp.runtime import Protocol, Session, Target, compare


@pytest.fixture(scope="module")
def resnet() -> ir.Model:
    return models.load(zoo.build("resnet"))


FEEDS = zoo.feeds(zoo.build("resnet"))


# Targets


@pytest.mark.parametrize("name", ["cpu", "CPU", "CPUExecutionProvider"])
def test_a_provider_has_a_short_and_a_long_name(name: str) -> None:
    assert Target(name).providers == ["CPUExecutionProvider"]


class _Adds:
    """A session of MatMulInteger that adds pairs of products as some processors do."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        products = feeds["data"].astype(np.int64)[:, :, None] * feeds["weights"].astype(np.int64)
        pairs = products.reshape(len(products), -1, 2, products.shape[2]).sum(axis=2)
        return {"sums": np.clip(pairs, -self.limit, self.limit).sum(axis=1)}


@pytest.mark.parametrize(("limit", "bits"), [(2**15 - 1, 7), (2**31 - 1, 8)])
def test_weights_lose_a_bit_where_pairs_of_products_saturate(
    monkeypatch: pytest.MonkeyPatch, limit: int, bits: int
) -> None:
    monkeypatch.setattr(runtime, "Session", lambda *_: _Adds(limit))
    assert runtime.weight_bits.__wrapped__(Target()) == bits
    assert runtime.weight_bits.__wrapped__(Target("cuda")) == 8


@pytest.mark.parametrize("extreme", [-1, 1])
def test_sums_of_weights_with_these_bits_are_exact_here(extreme: int) -> None:
    largest = 2 ** (runtime.weight_bits(Target()) - 1) - (extreme > 0)
    largest = min(largest, 127)  # as the grid of the weights
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 13]>
        g (uint8[N, 32, 5, 5] x, int8[16, 32, 3, 3] w) => (int32[N, 16, 3, 3] y) { y = ConvInteger(x, w) }""")
    feeds = {"x": np.full((1, 32, 5, 5), 255, np.uint8), "w": np.full((16, 32, 3, 3), extreme * largest, np.int8)}
    assert (Session(model).run(feeds)["y"] == extreme * largest * 255 * 32 * 9).all()


def test_a_missing_provider_is_told_with_what_there_is() -> None:
    with pytest.raises(ProviderError, match=r"'vulkan' is not available; available: .*cpu") as caught:
        Session(models.load(zoo.build("resnet")), Target("vulkan"))
    assert caught.value.exit_code == 2
    assert "pip" in caught.value.remedy


def test_accelerators_fall_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt, cuda, cpu = (f"{name}ExecutionProvider" for name in ("Tensorrt", "CUDA", "CPU"))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [tensorrt, cuda, cpu])
    assert Target("tensorrt").providers == [tensorrt, cuda, cpu]
    assert Target("cuda").providers == [cuda, cpu]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [tensorrt, cpu])
    assert Target("tensorrt").providers == [tensorrt, cpu]


def test_a_silent_fallback_is_an_error(resnet: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fallen:
        def __init__(self, *args: object, **kwargs: object) -> None: ...

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Fallen)
    with pytest.raises(ProviderError, match="fell back to CPUExecutionProvider"):
        Session(resnet, Target("cuda"))


# Sessions


def test_outputs_equal_those_of_a_plain_session(resnet: ir.Model, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    models.save(resnet, path)
    plain = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, FEEDS)
    for source in (resnet, path, str(path)):
        session = Session(source)
        assert (session.inputs, session.outputs) == (("input",), ("logits",))
        assert session.load_seconds > 0
        np.testing.assert_array_equal(session.run(FEEDS)["logits"], plain[0])


def test_only_wanted_outputs_are_computed() -> None:
    model = models.load(zoo.build("bert"))
    session = Session(model)
    feeds = zoo.feeds(zoo.build("bert"))
    assert len(session.outputs) > 1
    last = session.outputs[-1]
    assert list(session.run(feeds, [last])) == [last]
    np.testing.assert_array_equal(session.run(feeds, [last])[last], session.run(feeds)[last])


@pytest.mark.parametrize(
    "feeds",
    [{}, {"input": np.zeros((1, 3, 32, 32))}, {"input": np.zeros(3, np.float32)}, {**FEEDS, "more": FEEDS["input"]}],
    ids=["nothing", "float64", "one axis", "too many"],
)
def test_bad_inputs_fail_with_the_runtimes_reason(feeds: runtime.Feeds, resnet: ir.Model) -> None:
    with pytest.raises(OnnxcompError, match=r"ONNX Runtime failed to run the model: .+") as caught:
        Session(resnet).run(feeds)
    assert caught.value.exit_code == 1


def test_what_the_runtime_does_not_load_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not load the model") as caught:
        Session(models.load(zoo.build("custom_domain")))
    assert "Mystery" in caught.value.fact
    with pytest.raises(ModelError, match="does not load the model"):
        Session(tmp_path / "missing.onnx")


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    Session(models.load(zoo.build("weights_as_inputs")))  # ONNX Runtime itself warns about each of its weights
    with pytest.raises(ModelError):
        Session(models.load(zoo.build("custom_domain")))
    assert capfd.readouterr() == ("", "")


def test_temporary_files_go_with_the_session(resnet: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(models, "PROTOBUF_LIMIT", 1 << 10)
    session = Session(resnet)
    (folder,) = tmp_path.iterdir()
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "model.onnx.data"}
    session.run(FEEDS)
    del session
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_profile_names_what_was_executed(resnet: ir.Model) -> None:
    session = Session(resnet, profile=True, extended=False)
    for _ in range(3):
        session.run(FEEDS)
    profile = session.profile()
    assert set(profile) >= {node.name for node in resnet.graph if node.op_type == "Conv"}


def test_optimizations_can_be_off(resnet: ir.Model) -> None:
    counts = []
    for extended in (True, False):
        session = Session(resnet, profile=True, extended=extended)
        session.run(FEEDS)
        counts.append(len(session.profile()))
    assert counts[0] < counts[1] == resnet.graph.num_nodes()


# Timing


class Clocked(Session):
    """A session whose runs take so many ticks of a fake clock."""

    def __init__(self, name: str, ticks: "itertools.cycle[float]", log: list[str], clock: list[float]) -> None:
        self.name, self.ticks, self.log, self.clock = name, ticks, log, clock

    def run(self, feeds: runtime.Feeds, names: object = None) -> dict[str, np.ndarray]:
        self.log.append(self.name)
        self.clock[0] += next(self.ticks)
        return {}


def clocked(monkeypatch: pytest.MonkeyPatch, **ticks: list[float]) -> tuple[list[Session], list[str]]:
    log: list[str] = []
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    return [Clocked(name, itertools.cycle(values), log, clock) for name, values in ticks.items()], log


def test_blocks_alternate_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions, log = clocked(monkeypatch, a=[2.0], b=[1.0])
    first, second = compare(sessions, {}, Protocol(block=3, rounds=4, warmup=2, seconds=1e9))
    assert "".join(log) == "aabb" + "aaabbb" * 4
    assert (first.median, first.low, first.high, first.speedup) == (2, 2, 2, 1)
    assert (second.median, second.speedup, second.speedup_low, second.speedup_high) == (1, 2, 2, 2)


def test_single_runs_alternate_when_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions, log = clocked(monkeypatch, a=[1.0], b=[1.0])
    compare(sessions, {}, Protocol(block=3, rounds=4, warmup=0, cold=True, seconds=1e9))
    assert "".join(log) == "ab" * 12


def test_blocks_end_by_time_so_that_fast_models_have_more_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions, log = clocked(monkeypatch, a=[4.0], b=[1.0], c=[0.5])
    timings = compare(sessions, {}, Protocol(block=5, longest=3.0, rounds=3, warmup=0, seconds=1e9))
    assert "".join(log) == "abbbccccc" * 3
    assert [timing.median for timing in timings] == [4.0, 1.0, 0.5]


def test_speedups_compare_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    # The machine slows down threefold half way: the models' ratio stays.
    slowing = [1.0] * 4 + [3.0] * 4
    sessions, _ = clocked(monkeypatch, a=[2 * tick for tick in slowing], b=slowing)
    second = compare(sessions, {}, Protocol(block=2, rounds=4, warmup=0, seconds=1e9))[1]
    assert (second.speedup, second.speedup_low, second.speedup_high) == (2, 2, 2)
    assert second.low < second.median < second.high


def test_time_is_limited_but_three_rounds_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions, log = clocked(monkeypatch, a=[1.0])
    compare(sessions, {}, Protocol(block=2, rounds=100, warmup=0, seconds=9))
    assert len(log) == 2 * 5  # the fifth round begins at 8 seconds
    log.clear()
    compare(sessions, {}, Protocol(block=2, rounds=100, warmup=0, seconds=0))
    assert len(log) == 2 * 3


def test_garbage_is_collected_again_afterwards(resnet: ir.Model) -> None:
    class Failing(Clocked):
        def run(self, feeds: runtime.Feeds, names: object = None) -> dict[str, np.ndarray]:
            raise OnnxcompError("no")

    assert gc.isenabled()
    with pytest.raises(OnnxcompError, match="no"):
        compare([Failing("a", itertools.cycle([1.0]), [], [0.0])], {}, Protocol(warmup=0))
    assert gc.isenabled()


def test_a_protocol_says_how_it_measures() -> None:
    assert str(Protocol(block=25)) == "medians over alternating blocks of 25 consecutive runs, after warm-up"
    assert "single runs" in str(Protocol(cold=True))


# Types that numpy lacks


@pytest.mark.parametrize("dtype", [ir.DataType.BFLOAT16, ir.DataType.FLOAT8E5M2, ir.DataType.INT4, ir.DataType.UINT2])
def test_types_without_a_numpy_dtype_are_fed_and_fetched(dtype: ir.DataType) -> None:
    x = ir.val("x", dtype, [1, 3])
    there = ir.node("Cast", [x], {"to": ir.DataType.FLOAT})
    back = ir.node("Cast", there.outputs, {"to": dtype})
    for value, name, kind in ((there.outputs[0], "float", ir.DataType.FLOAT), (back.outputs[0], "y", dtype)):
        value.name, value.dtype, value.shape = name, kind, x.shape
    model = ir.Model(ir.Graph([x], back.outputs, nodes=[there, back], opset_imports={"": 25}), ir_version=13)
    fed = np.array([[0, 1, 3]]).astype(dtype.numpy())
    fetched = Session(model).run({"x": fed})["y"]
    assert fetched.dtype == fed.dtype
    assert fetched.astype(int).tolist() == [[0, 1, 3]]
