"""The contract of a compression technique: `Pass` in, `Outcome` out.

A pass is a frozen dataclass: its settings are its fields, so its `repr` is the recipe. Authors write `apply` and edit
the graph they are handed; calling the pass clones, applies, and checks what every result must satisfy.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import StrEnum
from itertools import islice
from types import UnionType
from typing import Any, ClassVar, Self, TypeAlias, TypeVar

import onnx_ir as ir

from onnxcomp.deadline import TimeIsUp
from onnxcomp.errors import OnnxcompError, OptionError
from onnxcomp.model import all_nodes, free_inputs, input_specs, spec_of, vocabularies
from onnxcomp.runtime import Target
from onnxcomp.samples import Dataset, Feeds
from onnxcomp.settings import Settings
from onnxcomp.store import Store
from onnxcomp.synthetic import synthetic


@dataclass(frozen=True)
class Change:
    """What was done to one node.

    Attributes:
        node: name of the node in the model as it came to the pass.
        what: the change in a few words, e.g. `int8, per-channel weights`.
    """

    node: str
    what: str


@dataclass(frozen=True)
class Skip:
    """A node left as it was although the pass treats its kind, and why."""

    node: str
    reason: str


Setting: TypeAlias = int | float | str
"""How far a technique goes with one part of a model: bits, a share, channels left, a form by name."""

Parts: TypeAlias = tuple[tuple[str, Setting], ...]
"""Settings by the name of the part."""

NOT_NAMED = "it is not among the parts that the recipe names"
"""Why a pass that was told which parts to treat left another alone."""
CHANNELS_LEFT = "channels left"
"""What a change says of a layer that is narrower, behind numbers that a `Width` tells too."""


@dataclass(frozen=True)
class Option:
    """One way to treat one part of a model, a layer or a group of channels: what it costs and what it brings.

    Attributes:
        part: name of the layer's node, or of the group.
        setting: what the pass takes for that part among its `parts`.
        error: squared error of what the part gives, relative to its energy: tr(D H D^T) / tr(W H W^T) for a layer whose
            weights W change by D and whose inputs have the Gram matrix H.
        bytes: that the part's weights take then.
        latency: the time that the part takes then, relative to what it takes now, both by itself.
    """

    part: str
    setting: Setting
    error: float
    bytes: int
    latency: float = 1.0


@dataclass(frozen=True)
class Width:
    """A group of coupled channels before and after pruning.

    Attributes:
        group: its name, which begins with that of a layer that makes the channels.
        size: channels before.
        kept: which of them are left, ascending.
        saliency: (size,) what each was worth when it was last ranked; higher is better.
    """

    group: str
    size: int
    kept: tuple[int, ...]
    saliency: tuple[float, ...]


@dataclass(frozen=True)
class Outcome:
    """The model after a pass, and the truth about what happened to it.

    Attributes:
        model: the result.
        changes: what was done to which node.
        skips: what was left, and why.
        widths: the groups of channels that could have been pruned.
    """

    model: ir.Model
    changes: tuple[Change, ...] = ()
    skips: tuple[Skip, ...] = ()
    widths: tuple[Width, ...] = ()

    @property
    def modified(self) -> bool:
        """Whether anything changed."""
        return bool(self.changes)


def node_pattern(text: str | None) -> re.Pattern[str] | None:
    """The nodes to leave alone, as a user writes them.

    Raises:
        OptionError: not a regular expression.
    """
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise OptionError(f"'{text}' is not a regular expression: {error}", remedy="mend --exclude") from error


def no_progress(done: int, total: int, what: str) -> None:
    """Report nothing."""


_MADE_UP = 64
"""Samples that stand for data where there are none."""


Found = TypeVar("Found")


@dataclass(frozen=True)
class Context:
    """What a pass may use beside the model.

    Attributes:
        data: calibration samples, or None: then techniques that need data skip with that reason.
        target: where the model will run.
        batch: samples per run that latency is optimised for.
        seed: of everything random.
        memory: cap in bytes on what calibration keeps.
        exclude: nodes whose name matches are left alone.
        progress: called with (done, total, what) during long work.
        cache: what passes computed for a model and may need again, by key; shared by all that use this context.
        store: the same for longer, on disk.
        executor: where work on parts of the data is done; None for this process. Results are the same, byte for byte.
    """

    data: Dataset | None = None
    target: Target = field(default_factory=Target)
    batch: int = 1
    seed: int = 0
    memory: int = 2 * 10**9
    exclude: re.Pattern[str] | None = None
    progress: Callable[[int, int, str], None] = field(default=no_progress, compare=False)
    cache: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)
    executor: Executor | None = field(default=None, repr=False, compare=False)
    store: Store | None = field(default=None, repr=False, compare=False)

    def recall(self, what: str, parts: object, compute: Callable[[], Found]) -> Found:
        """What is in the store, else what is computed now; see `Store.recall`.

        Args:
            what: is computed.
            parts: all that it depends on, beside the machine, the code and the target.
            compute: how.
        """
        return compute() if self.store is None else self.store.recall(what, (self.target, parts), compute)

    def examples(self, model: ir.Model, count: int = 2) -> Iterator[Feeds]:
        """A few batches of the model's inputs: of the data, or synthetic where there are none.

        None at all where an input is no tensor, for then neither data nor synthetic values fit it.
        """
        if any(spec_of(value) is None for value in free_inputs(model)):
            return iter(())
        data = self.data
        if data is None:
            data = synthetic(input_specs(model), count * self.batch, self.seed, vocabularies(model))
        return (batch.feeds for batch in islice(data.batches(self.batch), count))

    def samples(self, model: ir.Model) -> Dataset:
        """Samples to learn from: the data, or a few made-up ones."""
        return self.data or synthetic(input_specs(model), _MADE_UP, self.seed, vocabularies(model))

    def excludes(self, node: ir.Node) -> bool:
        """Whether the user asked to leave this node alone."""
        return self.exclude is not None and self.exclude.search(node.name or "") is not None


E = TypeVar("E", bound=StrEnum)


def chosen(kind: type[E], value: E | str) -> E:
    """A value of a setting, also by its name as the command line has it.

    Raises:
        OptionError: no such value.
    """
    try:
        return kind(value)
    except ValueError:
        raise OptionError(
            f"there is no {kind.__name__.lower()} '{value}'", remedy=f"one of {', '.join(kind)}"
        ) from None


class Choice(StrEnum):
    """One of several values of a setting. Its `repr` is Python that gives it, for a recipe must be readable again."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}.{self.name}"


class Pass(ABC):
    """One technique. Subclasses are frozen dataclasses with `name` and `summary`.

    Raises:
        OptionError: a setting is not what its hint says, or beyond its limits.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    exact: ClassVar[bool] = False
    """Whether outputs stay equal up to float rounding."""
    needs_data: ClassVar[bool] = False
    """Whether it can do nothing without calibration data."""
    stores: ClassVar[bool] = False
    """Whether it only stores weights in fewer bytes, upon whatever else was done: sessions decode them as they load."""
    remark: ClassVar[str] = ""
    """What users of any result of it should know."""

    def __post_init__(self) -> None:
        Settings(type(self)).plain(self)

    def named_nodes(self) -> Mapping[str, str]:
        """Nodes that the settings name, as texts in tuples or as keys, and the setting that does."""
        settings: list[str] = [setting.name for setting in fields(self)] if is_dataclass(self) else []
        values: dict[str, Any] = {name: getattr(self, name) for name in settings}
        items = [(item, name) for name, value in values.items() if isinstance(value, tuple) for item in value]
        keys = [(item[0] if isinstance(item, tuple) and item else item, name) for item, name in items]
        return {key: name for key, name in keys if isinstance(key, str)}

    @abstractmethod
    def apply(self, model: ir.Model, context: Context) -> Outcome:
        """Edit `model` in place (it is the pass's own clone) or return another; report every change and skip."""

    def options(self, model: ir.Model, context: Context) -> Iterator[Option]:
        """What the technique could do to each part of a model, and what that would cost, without doing it.

        The options of a part stand together. None, where a pass only takes models as a whole. The model is not touched.
        """
        yield from ()

    def offered(self, model: ir.Model, context: Context) -> list[Option]:
        """All of its options.

        Raises:
            OnnxcompError: it cannot tell, or says what cannot be.
        """
        with self.answering():
            options = list(self.options(model, context))
            self.must_be(Option, *options)
            for option in options:
                self.must_be(str, option.part)
                self.must_be(Setting, option.setting)
                if not all(0 <= number < math.inf for number in (option.error, option.bytes, option.latency)):
                    raise self._fault(f"offers what cannot be: {option}")
        return options

    @classmethod
    def offers_options(cls) -> bool:
        """Whether it has options for parts of models, and takes what is chosen of them."""
        return cls.options is not Pass.options and "parts" in getattr(cls, "__dataclass_fields__", {})

    def taking(self, options: Iterable[Option]) -> Self:
        """The pass that does this and nothing else.

        Raises:
            OptionError: it only takes models as a whole.
        """
        if "parts" not in getattr(self, "__dataclass_fields__", {}):
            raise OptionError(f"pass '{self.name}' takes models as a whole", remedy="leave the choice of parts out")
        return replace(self, parts=tuple((option.part, option.setting) for option in options))  # type: ignore[type-var]

    def taken(self, options: Iterable[Option]) -> Self:
        """The same, found to be a pass.

        Raises:
            OnnxcompError: it cannot take them.
        """
        with self.answering():
            made = self.taking(options)
            self.must_be(type(self), made)
            hash(made)
        return made

    def drafted(self) -> Self:
        """The same graph for less work: what only decides which numbers it holds is done the cheapest way."""
        return self

    def settled(self, context: Context) -> Self:
        """The same with all settings that depend on the target as they are there: a recipe gives the same anywhere."""
        return self

    def __call__(self, model: ir.Model, context: Context = Context()) -> Outcome:
        """Apply to a clone and check the result; the given model is not touched.

        Returns:
            The outcome. Without changes its model is the one given, byte for byte: not even nodes were named.

        Raises:
            OnnxcompError: the pass failed, or broke its contract.
        """
        signature = _signature(model)
        clone = model.clone()
        name_nodes(clone)
        with self.answering():
            outcome = self.apply(clone, context)
            self.must_be(Outcome, outcome)
            self.must_be(ir.Model, outcome.model)
            self.must_be(Change, *outcome.changes)
            self.must_be(Skip, *outcome.skips)
            if _signature(outcome.model) != signature:
                raise self._fault("changed the model's inputs or outputs")
            if not outcome.modified:
                return replace(outcome, model=model)
            name_nodes(outcome.model)
        return outcome

    @contextmanager
    def answering(self) -> Iterator[None]:
        """What a pass of others raises is an error with its name on it, and no defect of ours."""
        try:
            yield
        except (OnnxcompError, TimeIsUp):
            raise
        except Exception as error:
            if type(self).__module__.startswith(f"{__package__}."):
                raise
            message = next(iter(str(error).splitlines()), "")
            raise self._fault(f"raised {type(error).__name__}: {message}") from error

    def must_be(self, kind: type | UnionType, *given: object) -> None:
        """Refuse what the pass gave and what is of another type than it promised.

        Raises:
            OnnxcompError: it is.
        """
        for each in given:
            if not isinstance(each, kind):
                wanted = getattr(kind, "__name__", kind)
                raise self._fault(f"gave something of type {type(each).__name__}, not {wanted}")

    def _fault(self, fact: str) -> OnnxcompError:
        return OnnxcompError(
            f"pass '{self.name}' {fact}",
            f"a defect of the pass, which comes from {type(self).__module__}",
            "leave it out, or report it to who made it",
        )


def _signature(model: ir.Model) -> tuple[object, ...]:
    """Names, types, order and axes of what a caller feeds and fetches."""
    values = [*free_inputs(model), *model.graph.outputs]
    return tuple((value.name, str(value.type), str(value.shape)) for value in values)


def name_nodes(model: ir.Model) -> None:
    """Give each unnamed or doubly named node a unique name, so that reports can speak of it."""
    taken = {node.name for node in all_nodes(model) if node.name}
    kept: set[str] = set()
    for node in all_nodes(model):
        if node.name and node.name not in kept:
            kept.add(node.name)
            continue
        name = base = node.name or f"{node.op_type}_{(node.outputs[0].name if node.outputs else '') or 'unnamed'}"
        count = 1
        while name in taken:
            name, count = f"{base}_{count}", count + 1
        taken.add(name)
        kept.add(name)
        node.name = name
