"""Work on other processes and machines: nothing is lost, and the results are those of one process, byte for byte."""

import asyncio
import contextlib
import os
import pickle
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnxcomp
from onnxcomp import errors, executors, metrics
from onnxcomp import model as models
from onnxcomp.calibration import calibrate
from onnxcomp.core import Context
from onnxcomp.data import open_dataset
from onnxcomp.errors import DataError, OnnxcompError, OptionError
from onnxcomp.executors import Processes, mapped, opened, spare
from onnxcomp.measure import evaluated
from onnxcomp.observations import Statistics
from onnxcomp.runtime import Session, Target
from onnxcomp.samples import Dataset
from tests import test_calibration as calibration
from tests.commands import run

ONE = Target(threads=1)
SAMPLES = 5 * 256 - 7
"""Five shards."""


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    """Two, of which one may be killed."""
    with Processes(2, patience=0) as executor:
        yield executor


@pytest.fixture(scope="module")
def threads() -> Iterator[Executor]:
    with ThreadPoolExecutor(3) as executor:
        yield executor


def data() -> Dataset:
    return calibration.dataset(calibration.network(), calibration.images(SAMPLES))


def statistics(executor: Executor | None, progress: Callable[[int, int, str], None] | None = None) -> Statistics:
    model = calibration.network()
    tensors, found = calibration.requests(model)
    context = Context(target=ONE, executor=executor)
    if progress is not None:
        context = Context(target=ONE, executor=executor, progress=progress)
    return calibrate(model, data(), context, tensors, found, channels=calibration.slots(model))


def content(found: Statistics) -> bytes:
    """All numbers."""
    parts = [pickle.dumps((name, seen)) for name, seen in found.tensors.items()]
    parts += [pickle.dumps((name, gram)) for name, gram in found.grams.items()]
    return b"".join([*parts, *(pickle.dumps((place, moments)) for place, moments in found.channels.items())])


@pytest.fixture(scope="module")
def truth() -> bytes:
    """What one process gathers."""
    return content(statistics(None))


# -- mapping ----------------------------------------------------------------------------------------------------------


def die_once(marker: Path, number: int) -> int:
    """Kill the process that works on number 2, the first time."""
    if number == 2 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def refuse(number: int) -> int:
    if number == 3:
        raise DataError("sample 3 is odd", "it was so from the start", "leave it out")
    return number


def wait_for(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def test_a_killed_process_loses_nothing(processes: Processes, tmp_path: Path) -> None:
    found = list(mapped(partial(die_once, tmp_path / "died"), range(9), processes, room=8))
    assert (tmp_path / "died").exists()
    assert found == [number * number for number in range(9)]


def test_work_that_kills_every_process_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "_LOSSES", 1)
    with Processes(1, patience=0) as executor, pytest.raises(OnnxcompError, match="work was lost") as caught:
        list(mapped(die, [1], executor, room=2))
    assert "--executor none" in caught.value.remedy


def test_a_pool_that_was_given_is_not_started_again() -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool, pytest.raises(OnnxcompError, match="starts no others"):
        list(mapped(die, [1, 2], pool, room=2))


def test_when_the_cluster_goes_away_the_rest_is_done_here(threads: Executor) -> None:
    class Leaving(Executor):
        left = 3

        def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            self.left -= 1
            if self.left >= 0:
                return threads.submit(function, *args, **kwargs)
            gone: Future[Any] = Future()
            gone.cancel()
            return gone

    assert list(mapped(abs, range(-9, 0), Leaving(), room=4)) == list(range(9, 0, -1))


@pytest.mark.parametrize("kind", ["none", "threads", "processes"])
def test_an_error_comes_back_as_it_was(kind: str, threads: Executor, processes: Processes) -> None:
    executor = {"none": None, "threads": threads, "processes": processes}[kind]
    found = mapped(refuse, range(9), executor, room=4)
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError) as caught:
        next(found)
    told = caught.value
    assert (told.fact, told.cause, told.remedy) == ("sample 3 is odd", "it was so from the start", "leave it out")


KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, OnnxcompError)]


@pytest.mark.parametrize("kind", KINDS)
def test_errors_travel(kind: type[OnnxcompError]) -> None:
    here = kind("fact", "cause", "remedy")
    there = pickle.loads(pickle.dumps(here))
    assert type(there) is kind
    assert (there.fact, there.cause, there.remedy, str(there)) == ("fact", "cause", "remedy", str(here))


def test_no_more_is_read_ahead_than_there_is_room_for(threads: Executor) -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            read.append(number)
            yield number

    found = mapped(refuse, filter(lambda number: number != 3, items()), threads, room=3)
    assert next(found) == 0
    assert len(read) <= 5
    assert list(found) == [1, 2, *range(4, 20)]


def test_nothing_runs_on_when_the_rest_is_not_wanted(threads: Executor) -> None:
    under_way: list[Future[float]] = []

    class Watched(Executor):
        _max_workers = 2

        def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            under_way.append(threads.submit(function, *args, **kwargs))
            return under_way[-1]

    found = mapped(wait_for, [0.0, 0.2, 0.2, 0.2], Watched(), room=4)
    next(found)
    found.close()  # type: ignore[attr-defined]
    assert all(future.done() for future in under_way)


def test_what_an_executor_never_tells_is_not_waited_for() -> None:
    class Silent(Executor):
        """Like Dask's, where work ends just as it is cancelled."""

        _max_workers = 2

        def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            future: Future[Any] = Future()
            if args[0] == 0:
                future.set_result(0)
            return future

    found = mapped(abs, range(9), Silent(), room=4)
    assert next(found) == 0
    found.close()  # type: ignore[attr-defined]


def test_work_and_results_of_any_size_are_sent_at_once(tmp_path: Path) -> None:
    """Else a process killed as it sends or reads would leave this one waiting."""
    work = pickle.dumps(executors._Filed((bytes, (bytes(10**6),), {}), str(tmp_path)))
    assert len(work) < select.PIPE_BUF
    sent = pickle.dumps(executors._done(pickle.loads(work), str(tmp_path)))
    assert len(sent) < select.PIPE_BUF
    assert pickle.loads(sent) == bytes(10**6)
    assert not list(tmp_path.iterdir())


def test_results_leave_no_files() -> None:
    with Processes(1, patience=0) as executor:
        folder = Path(executor._folder.name)
        assert list(mapped(bytes, [5, 6], executor, room=2)) == [bytes(5), bytes(6)]
        assert not list(folder.iterdir())
    assert not folder.exists()


def test_processes_whose_work_is_not_wanted_end_at_once_and_others_start() -> None:
    with Processes(1, patience=0) as executor:
        first = executor.submit(os.getpid).result()
        found = mapped(wait_for, [0.0, 60.0, 60.0], executor, room=3)
        next(found)
        found.close()  # type: ignore[attr-defined]
        assert executor.submit(os.getpid).result() != first


def test_little_work_starts_no_processes() -> None:
    with Processes(2) as executor:
        assert {future.result() for future in [executor.submit(os.getpid) for _ in range(20)]} == {os.getpid()}
        executor.submit(wait_for, 1.6).result()
        assert executor.submit(os.getpid).result() != os.getpid()


# -- opening ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["local:0", "local:", "dask://", "dask://host", "dask:host:1", "ray://x:1", ""])
def test_a_text_that_names_none_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match=f"'{text}' is not an executor") as caught, opened(text, ONE):
        pass
    assert executors.FORMS in caught.value.remedy
    run("optimize", "m.onnx", "--executor", text, code=2)


def test_local_takes_the_cores_that_the_target_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "cores", lambda: 1.5)
    assert spare(ONE) == 1
    assert list(executors.beside(abs, [-1, 2, -3, 4])) == [1, 2, 3, 4]
    monkeypatch.setattr(executors, "cores", lambda: 8)
    assert [spare(Target(threads=count)) for count in (0, 1, 2, 3, 8, 16)] == [1, 8, 4, 2, 1, 1]
    assert spare(Target("cuda", 1)) == 1
    with opened("local", ONE) as executor:
        assert executor is not None
        assert executors.width(executor) == 8
    for text, target in (("local", Target()), ("none", ONE), (None, ONE)):
        with opened(text, target) as executor:
            assert executor is None
    with opened("local:3", Target()) as executor:
        assert executor is not None
        assert executors.text_of(executor) == "local:3"


def test_an_executor_that_is_given_stays_open(threads: Executor) -> None:
    with opened(threads, ONE) as executor:
        assert executor is threads
    assert threads.submit(abs, -1).result() == 1
    assert executors.text_of(threads) == "<ThreadPoolExecutor>"


def test_dask_that_is_not_there_is_an_option_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(executors, "import_module", missing)
    with pytest.raises(OptionError, match="not installed") as caught, opened("dask://localhost:8786", ONE):
        pass
    assert "onnxcomp[dask]" in caught.value.remedy


# -- calibration and scores -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_statistics_are_those_of_one_process(kind: str, threads: Executor, processes: Processes, truth: bytes) -> None:
    assert content(statistics({"threads": threads, "processes": processes}[kind])) == truth


def test_a_process_killed_while_calibrating_loses_nothing(processes: Processes, truth: bytes) -> None:
    killed: list[int] = []

    def kill(done: int, total: int, what: str) -> None:
        if not killed and done < total:
            killed.append(processes.submit(os.getpid).result())
            os.kill(killed[0], signal.SIGKILL)

    assert content(statistics(processes, kill)) == truth
    assert killed


def test_without_room_it_is_done_here(truth: bytes) -> None:
    class Forbidden(Executor):
        def submit(self, *_: Any, **__: Any) -> Any:
            raise AssertionError

    model = calibration.network()
    tensors, found = calibration.requests(model)
    context = Context(target=ONE, executor=Forbidden(), memory=10**4)
    with pytest.raises(AssertionError):
        statistics(Forbidden())
    calibrate(model, data().select(range(9)), context, tensors[:1], found)


@pytest.mark.parametrize("name", ["relative-error", "mse", "accuracy"])
def test_scores_are_those_of_one_process(name: str, processes: Processes) -> None:
    model = calibration.network()
    labels = np.random.default_rng(0).integers(0, 5, SAMPLES)
    samples = open_dataset({"x": calibration.images(SAMPLES), "label": labels}, models.input_specs(model))
    worse = onnxcomp.quantize(model, scheme="int8-weights", target=ONE).model
    session, reference = Session(worse, ONE), Session(model, ONE)
    expected = metrics.evaluate(metrics.parse_metric(name), session.run, samples, reference.run, 16)
    found = evaluated(metrics.parse_metric(name), session, samples, reference, Context(executor=processes))
    assert found == expected
    assert found.rows is not None
    assert expected.rows is not None
    assert found.rows.tobytes() == expected.rows.tobytes()


def test_a_model_is_the_same_whoever_calibrated_it(processes: Processes, threads: Executor) -> None:
    def made(executor: Executor | str | None) -> bytes:
        result = onnxcomp.quantize(
            calibration.network(), calib={"x": calibration.images(SAMPLES)}, target=ONE, executor=executor
        )
        return models.to_bytes(result.model)

    alone = made("none")
    assert made(processes) == alone
    assert made(threads) == alone


def test_products_are_those_of_one_thread(threads: Executor) -> None:
    from threadpoolctl import threadpool_info

    from onnxcomp.numerics.blas import one_thread

    def limits() -> set[int]:
        return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}

    before, inside, leave = limits(), threading.Event(), threading.Event()

    def stay() -> None:
        with one_thread():
            inside.set()
            leave.wait()

    other = threads.submit(stay)
    inside.wait()
    with one_thread():
        leave.set()
        other.result()
        assert limits() == {1}
    assert limits() == before


# -- Dask -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    distributed = pytest.importorskip("distributed", reason="pip install 'onnxcomp[dask]'")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
    ) as started:
        yield started


def address(cluster: Any) -> str:
    return str(cluster.scheduler_address).replace("tcp", "dask")


def test_a_dask_worker_killed_while_calibrating_loses_nothing(cluster: Any, truth: bytes) -> None:
    killed: list[int] = []
    with opened(address(cluster), ONE) as executor:
        assert executor is not None
        assert executors.width(executor) == 2

        def kill(done: int, total: int, what: str) -> None:
            if not killed and done < total:
                killed.append(executor.submit(os.getpid).result())
                os.kill(killed[0], signal.SIGKILL)

        assert content(statistics(executor, kill)) == truth
    assert killed


def test_an_error_comes_back_from_dask(cluster: Any) -> None:
    with opened(address(cluster), ONE) as executor, pytest.raises(DataError, match="sample 3 is odd") as caught:
        list(mapped(refuse, range(9), executor, room=4))
    assert caught.value.remedy == "leave it out"


def die_elsewhere(home: int, number: int) -> int:
    """Kill the process that works on it, unless it is home."""
    return number * number if os.getpid() == home else die(number)


async def serve(sender: Any) -> None:
    """A whole cluster in this process, until it ends."""
    import distributed

    async with (
        distributed.Scheduler(dashboard_address=":0", host="127.0.0.1", port=0) as scheduler,
        distributed.Worker(scheduler.address, nthreads=1) as worker,
    ):
        sender.send(scheduler.address)
        await worker.finished()


async def work(address: str) -> None:
    """A worker in this process, until it ends."""
    import distributed

    async with distributed.Worker(address, nthreads=1) as worker:
        await worker.finished()


def run_there(server: Callable[[Any], Any], given: Any) -> None:
    asyncio.run(server(given))


@contextlib.contextmanager
def started(server: Callable[[Any], Any], given: Any) -> Iterator[BaseProcess]:
    """A process that serves until it is killed."""
    process = get_context("spawn").Process(target=run_there, args=(server, given), daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("way", ["SIGKILL", "SIGSTOP"])
def test_a_scheduler_that_ends_between_two_uses_is_done_without(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed", reason="pip install 'onnxcomp[dask]'")
    receiver, sender = get_context("spawn").Pipe(duplex=False)
    with started(serve, sender) as process, opened(receiver.recv().replace("tcp", "dask"), ONE) as executor:
        assert list(mapped(abs, range(-4, 0), executor, room=4)) == [4, 3, 2, 1]
        monkeypatch.setattr(executors, "_ANSWER", 0.3)
        os.kill(process.pid or 0, getattr(signal, way))
        for _ in range(2):
            assert list(mapped(abs, range(-4, 0), executor, room=4)) == [4, 3, 2, 1]


def test_when_all_workers_are_lost_the_rest_is_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = pytest.importorskip("distributed", reason="pip install 'onnxcomp[dask]'")
    with (
        distributed.LocalCluster(n_workers=0, protocol="tcp", dashboard_address=":0", silence_logs=50) as alone,
        started(work, alone.scheduler_address),
    ):
        alone.wait_for_workers(1)
        with opened(address(alone), ONE) as executor:
            monkeypatch.setattr(executors, "_ANSWER", 0.3)
            function = partial(die_elsewhere, os.getpid())
            assert list(mapped(function, range(5), executor, room=2)) == [0, 1, 4, 9, 16]
            found = mapped(function, range(5), executor, room=4)
            assert next(found) == 0
            found.close()  # type: ignore[attr-defined]  # does not wait for the others


def test_an_error_of_a_submission_is_told_unless_the_scheduler_went_away() -> None:
    class Client:
        status = "running"

        def get_executor(self, pure: bool) -> "Client":
            return self

        def submit(self, function: Callable[..., Any], status: str) -> Future[Any]:
            self.status = status
            raise TypeError(status)

    executor = executors._Dask(Client(), "dask:x")
    with pytest.raises(TypeError):
        executor.submit(abs, "running")
    assert executor.submit(abs, "closed").cancelled()


def test_a_cluster_that_does_not_answer_is_an_option_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed", reason="pip install 'onnxcomp[dask]'")
    monkeypatch.setattr(executors, "_ANSWER", 0.5)
    with contextlib.ExitStack() as stack, pytest.raises(OptionError, match="no Dask scheduler answers") as caught:
        stack.enter_context(opened("dask://127.0.0.1:9", ONE))
    assert "dask worker" in caught.value.remedy
    assert caught.value.exit_code == 2
