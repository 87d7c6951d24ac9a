"""Where independent work is done: in this process, in others of this machine, or on a cluster.

    with opened("local", target) as executor:
        for found in mapped(function, items, executor, room=8):
            ...

`mapped` takes any `concurrent.futures.Executor` and gives what the built-in `map` gives, in the same order. Work that
is lost with a killed worker is done again, and here if the whole cluster or all its workers go away. Nothing of it runs
any more once `mapped` is through, so that what is timed afterwards has the machine to itself.
"""

import contextlib
import functools
import math
import multiprocessing
import os
import pickle
import re
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

import onnxcomp
from onnxcomp.errors import OnnxcompError, OptionError
from onnxcomp.machine import cores
from onnxcomp.runtime import VERSION, Target

Item = TypeVar("Item")
Found = TypeVar("Found")
Given = ParamSpec("Given")

FORMS = "none, local, local:N or dask://HOST:PORT"

_PATIENCE = 1.5
"""Seconds of work that are done in this process before others are started: about what it takes to start one."""

_LOSSES = 3
"""Times that a piece of work may be lost with its worker; Dask's `allowed-failures` is the same."""

_ANSWER = 10
"""Seconds that a cluster has to answer, and its workers to come back."""

_LOOK = 1.0
"""Seconds after which it is looked whether a cluster still has workers."""


def parse(text: str) -> str:
    """The text, if it names an executor.

    Raises:
        OptionError: it does not.
    """
    if not re.fullmatch(r"none|local(:[1-9]\d{0,3})?|dask://(\[[^\]/]+\]|[^/:\s]+):\d+", text):
        raise OptionError(f"'{text}' is not an executor", remedy=f"write {FORMS}")
    return text


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items; the next one is made in a thread while the caller works on the last."""
    source, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        following: Future[Any] = pool.submit(next, source, end)
        while (item := following.result()) is not end:
            following = pool.submit(next, source, end)
            yield item


def beside(function: Callable[[Item], Found], items: Iterable[Item]) -> Iterator[Found]:
    """What a function makes of each item, in order; as many threads work at a time as there are cores."""
    threads = math.ceil(cores())
    with ThreadPoolExecutor(threads) as pool:
        under_way: deque[Future[Found]] = deque()
        for item in items:
            if len(under_way) > threads:
                yield under_way.popleft().result()
            under_way.append(pool.submit(function, item))
        while under_way:
            yield under_way.popleft().result()


@contextlib.contextmanager
def opened(given: Executor | str | None, target: Target) -> Iterator[Executor | None]:
    """The executor that was asked for, while the context lasts.

    Args:
        given: an executor, which stays open; None or `none` for this process; `local` for as many processes as the
            target leaves cores for, `local:N` for N; `dask://HOST:PORT` for the scheduler of a Dask cluster.
        target: how many threads each of them takes.

    Raises:
        OptionError: there is no such form, Dask is not installed, the cluster does not answer, has no workers, or they
            have another version of onnxcomp or ONNX Runtime.
    """
    if not isinstance(given, str):
        yield given
        return
    kind, _, rest = parse(given).partition(":")
    workers = int(rest or spare(target)) if kind == "local" else 0
    if kind == "dask":
        with _dask(rest) as executor:
            yield executor
    elif workers > 1 or rest:
        with Processes(workers, text=given) as processes:
            yield processes
    else:  # another process would do what this one does
        yield None


def opening(function: Callable[Given, Found]) -> Callable[Given, Found]:
    """A function whose keyword `executor` may be a text: it is given what that opens for its keyword `target`."""

    @functools.wraps(function)
    def wrapped(*args: Given.args, **named: Given.kwargs) -> Found:
        executor, target = named.get("executor"), named.get("target", Target())
        with opened(executor, Target.of(target)) as named["executor"]:  # type: ignore[arg-type]
            return function(*args, **named)

    return wrapped


def text_of(executor: Executor | None) -> str | None:
    """The text that opens it, or its type in brackets where it came as an object."""
    return None if executor is None else getattr(executor, "text", f"<{type(executor).__name__}>")


def spare(target: Target) -> int:
    """Processes that run at a time without taking cores from each other; 1 where one takes all, or an accelerator."""
    alone = target.threads == 0 or target.short != "cpu"
    return 1 if alone else max(int(cores() // target.threads), 1)


def width(executor: Executor) -> int:
    """Pieces of work that it does at a time."""
    known = getattr(executor, "workers", None) or getattr(executor, "_max_workers", None)
    return int(known or math.ceil(cores()))


class Processes(Executor):
    """Processes of this machine, started when there is work for them, and again where one was killed.

    Work and results are left in files, and their names are sent: a process that is killed in the midst of a message
    longer than what a pipe takes at once would keep this one waiting, for the rest or for somebody who reads it.

    Args:
        workers: how many.
        patience: seconds of work that are done in this process before others are started, for what is small is done
            before they are up.
        text: that opens them.
    """

    def __init__(self, workers: int, patience: float = _PATIENCE, text: str = "local") -> None:
        self.workers, self._patience, self.text = workers, patience, text
        self._pool: ProcessPoolExecutor | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="onnxcomp-", ignore_cleanup_errors=True)

    def submit(self, function: Callable[..., Found], /, *args: Any, **kwargs: Any) -> Future[Found]:
        """Do it in one of the processes; or at once, in this one."""
        if self._patience > 0:
            return self._at_once(function, *args, **kwargs)
        work = _Filed((function, args, kwargs), self._folder.name)
        if self._pool is not None:
            with contextlib.suppress(BrokenProcessPool):
                return self._pool.submit(_done, work, self._folder.name)
            self._pool.shutdown()
        self._pool = ProcessPoolExecutor(self.workers, multiprocessing.get_context("spawn"), _begin)
        return self._pool.submit(_done, work, self._folder.name)

    def _at_once(self, function: Callable[..., Found], *args: Any, **kwargs: Any) -> Future[Found]:
        done: Future[Found] = Future()
        start = time.perf_counter()
        try:
            done.set_result(function(*args, **kwargs))
        except Exception as error:  # noqa: BLE001  (whoever asks for the result gets it, as from another process)
            done.set_exception(error)
        self._patience -= time.perf_counter() - start
        return done

    def stop(self) -> None:
        """End the processes in the midst of their work, which is lost. Others start when there is more.

        Nothing may have been cancelled: the pool, as it breaks, would fail at it and never end the rest.
        """
        for process in list((getattr(self._pool, "_processes", None) or {}).values()):
            process.terminate()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(wait, cancel_futures=cancel_futures)
        if wait:
            self._folder.cleanup()


class _Filed:
    """A value that pickles as the name of a file, and is itself again, the file gone, where that is read."""

    def __init__(self, value: object, folder: str) -> None:
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            pickle.dump(value, file, pickle.HIGHEST_PROTOCOL)
        self._path = Path(file.name)

    def __reduce__(self) -> tuple[Callable[[Path], object], tuple[Path]]:
        return _taken, (self._path,)


def _done(work: Any, folder: str) -> Any:
    """What comes of a function and its arguments, which are no longer filed here; filed."""
    function, args, kwargs = work
    return _Filed(function(*args, **kwargs), folder)


def _taken(path: Path) -> object:
    try:
        with path.open("rb") as file:
            return pickle.load(file)
    finally:
        path.unlink()


def _begin() -> None:
    """In each process: leave Ctrl-C to the one that started it, and do not outlive that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


@dataclass(eq=False)
class _Piece(Generic[Item, Found]):
    """Work under way, and how often it was lost."""

    item: Item
    future: Future[Found]
    losses: int = field(default=0)


def mapped(
    function: Callable[[Item], Found], items: Iterable[Item], executor: Executor | None, room: int
) -> Iterator[Found]:
    """What a function makes of each item, in order.

    Args:
        function: of a module, or made of such ones by `functools.partial`; with what it is given, it must pickle.
        items: read in this process, no more of them ahead of what is given than there is room for.
        executor: where the function is called; None for this process.
        room: pieces of work that may be under way at a time, their items and results in memory.

    Raises:
        OnnxcompError: a piece of work was lost with its worker again and again.
        Exception: whatever the function raises, in place of its result.
    """
    if executor is None or room < 2:
        yield from map(function, items)
        return
    room = min(room, 2 * width(executor))
    under_way: deque[_Piece[Item, Found]] = deque()
    try:
        for item in items:
            if len(under_way) >= room:
                yield _result(under_way.popleft(), function, executor)
            under_way.append(_Piece(item, _submitted(executor, function, item)))
        while under_way:
            yield _result(under_way.popleft(), function, executor)
    finally:
        _abandon([piece.future for piece in under_way], executor)


def _abandon(futures: list[Future[Found]], executor: Executor) -> None:
    """End what is under way, or see it end."""
    if isinstance(executor, Processes):
        if not all(future.done() for future in futures):
            executor.stop()
        wait(futures)
    elif isinstance(executor, _Dask):  # that loses track of what is cancelled just as it ends; it is little
        for future in futures:
            executor.settle(future)
    else:  # `wait` would wait for some executors to notice what was cancelled, for ever
        wait([future for future in futures if not future.cancel()])


def _result(piece: _Piece[Item, Found], function: Callable[[Item], Found], executor: Executor) -> Found:
    """Wait for it, and submit it again where it was lost."""
    while True:
        if isinstance(executor, _Dask):
            executor.settle(piece.future)
        try:
            return piece.future.result()
        except BrokenExecutor as error:
            piece.losses += 1
            if piece.losses > _LOSSES:
                raise _lost() from error
            piece.future = _submitted(executor, function, piece.item)
        except CancelledError:  # not by us: the cluster went away, and a long search need not end with it
            return function(piece.item)
        except Exception as error:
            if type(error).__module__.partition(".")[0] == "distributed":  # KilledWorker: Dask gives up
                raise _lost() from error
            raise


def _submitted(executor: Executor, function: Callable[[Item], Found], item: Item) -> Future[Found]:
    try:
        return executor.submit(function, item)
    except BrokenExecutor as error:  # `Processes` starts others, an executor that was given may not
        raise _lost("a process of the executor was killed, and it starts no others") from error


_USUAL = (
    "it needs more memory than its machine has, it crashes ONNX Runtime, or a script starts processes without "
    'if __name__ == "__main__":'
)


def _lost(cause: str = _USUAL) -> OnnxcompError:
    return OnnxcompError(
        "work was lost with the process that did it",
        cause,
        "fewer workers (--executor local:N) or less --memory; --executor none does it all in one process",
    )


class _Dask(Executor):
    """The workers of a Dask cluster.

    Args:
        client: connected to its scheduler.
        text: that opens them.
    """

    def __init__(self, client: Any, text: str) -> None:
        self._client, self.text = client, text
        self._gone, self._seen = False, time.monotonic()
        # Impure: Dask need not look for equal work, which would hash all that is sent.
        self._executor: Executor = client.get_executor(pure=False)

    @property
    def workers(self) -> int:
        """Threads of all workers, which may come and go; 1 where there are none."""
        return max(self._threads(), 1)

    def _threads(self) -> int:
        if not self._answers():
            return 0
        try:
            threads = sum(map(int, self._client.nthreads(callback_timeout=_ANSWER).values()))
        except Exception:  # noqa: BLE001  (Dask has many, and whichever it is, nobody is there)
            self._gone = True
            return 0
        if threads:
            self._seen = time.monotonic()
        return threads

    def _answers(self) -> bool:
        """Whether there is a scheduler, as far as is known; the client may be about to connect again."""
        return not self._gone and self._client.status == "running"

    def submit(self, function: Callable[..., Found], /, *args: Any, **kwargs: Any) -> Future[Found]:
        """Do it on one of them. Dask does it again where a worker is lost, `allowed-failures` times.

        What was not done when the scheduler went away is cancelled.
        """
        if self._answers():
            try:
                return self._executor.submit(function, *args, **kwargs)
            except Exception:
                if self._answers():
                    raise
        lost: Future[Found] = Future()
        lost.cancel()
        return lost

    def settle(self, future: Future[Found]) -> None:
        """Wait for it, or cancel it where the scheduler went away or there were no workers for a while."""
        while not future.done():
            if not self._threads() and (self._gone or time.monotonic() - self._seen > _ANSWER):
                future.cancel()
            else:
                wait([future], _LOOK)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the cluster, which goes on."""
        self._executor.shutdown(wait=wait and not cancel_futures)
        self._client.close()


@contextlib.contextmanager
def _dask(place: str) -> Iterator[Executor]:
    try:
        dask, distributed = import_module("dask"), import_module("distributed")
    except ImportError as error:
        raise OptionError(
            f"--executor dask:{place} needs Dask, which is not installed", remedy="pip install 'onnxcomp[dask]'"
        ) from error
    address = f"tcp:{place}"
    # Models are larger than what Dask warns of.
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "2GB"}):
        try:
            client = distributed.Client(address, timeout=_ANSWER, set_as_default=False)
        except (OSError, ValueError) as error:
            raise OptionError(
                f"no Dask scheduler answers at {address}",
                "it is not running, or a firewall is between",
                f"start `dask scheduler` there, and `dask worker {address}` on the machines that are to work",
            ) from error
        with _Dask(client, f"dask:{place}") as executor:
            _refuse_strangers(client, address)
            yield executor


def versions() -> tuple[str, str]:
    """Of onnxcomp and of ONNX Runtime."""
    return onnxcomp.__version__, VERSION


def _refuse_strangers(client: Any, address: str) -> None:
    """Refuse a cluster whose results could differ from those of this machine."""
    try:
        found = client.run(versions)
    except Exception as error:
        raise OptionError(
            f"the workers of {address} cannot load onnxcomp: {error}",
            "it is not installed there",
            f"pip install onnxcomp=={onnxcomp.__version__} onnxruntime=={VERSION} on each of them",
        ) from error
    if not found:
        raise OptionError(
            f"the Dask scheduler at {address} has no workers", remedy=f"start some: `dask worker {address}`"
        )
    for worker, other in found.items():
        if tuple(other) != versions():
            raise OptionError(
                "onnxcomp {} and ONNX Runtime {} on {} are other versions than here".format(*other, worker),
                "results would depend on which machine did what",
                f"pip install onnxcomp=={onnxcomp.__version__} onnxruntime=={VERSION} there",
            )
