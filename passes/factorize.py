"""Low-rank decomposition: a layer becomes several smaller ones in a row (`numerics.lowrank` has the forms).

1. Each layer's forms are found from the covariance of its inputs, at about a dozen ranks of each kind; their errors
   follow without running the model.
2. What an error does to the model's outputs is measured for a few forms of each layer.
3. The forms are chosen that cost the outputs least for what is to remain (a multiple-choice knapsack).
4. All stages are fitted again on what the decomposed model gives them, together with those of the layers beside them.

More nodes run slower than their FLOPs say. Unless bytes or parameters are the target, forms that take longer than the
layer by itself are not used.
"""

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxcomp.calibration import calibrate
from onnxcomp.core import NOT_NAMED, Change, Choice, Context, Option, Outcome, Pass, Skip, name_nodes
from onnxcomp.cost import Totals
from onnxcomp.effects import Answers
from onnxcomp.errors import OnnxcompError, OptionError
from onnxcomp.facts import observe, sized
from onnxcomp.graph import prepared, remove_unused
from onnxcomp.layers import Layer, layers
from onnxcomp.model import free_inputs, opset, spec_of
from onnxcomp.numerics.choice import choose
from onnxcomp.numerics.feedback import layer_error
from onnxcomp.numerics.lowrank import Factors, LowRank
from onnxcomp.observations import Gram
from onnxcomp.reconstruction import reconstruct
from onnxcomp.samples import Dataset, Feeds
from onnxcomp.settings import like, within
from onnxcomp.splitting import Clock, alike, alone, kernel_of, merge_into_followers, split
from onnxcomp.timing import profiles, ratio
from onnxcomp.widths import Cost, totals

_OPSET = 13
_PROBES = 4
"""Forms of each layer at which it is measured what its error does to the outputs."""
_TIMED = 3
"""Times that a latency is measured and the forms chosen again."""
_FORM = "(svd|spatial|cp) [1-9][0-9]*|tucker [1-9][0-9]* [1-9][0-9]*"


class Method(Choice):
    """Which forms are tried."""

    AUTO = "auto"
    """All but CP, whose channel by channel stages are slow and whose decomposition takes long."""
    SVD = "svd"
    SPATIAL = "spatial"
    TUCKER = "tucker"
    CP = "cp"

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the forms."""
        return ("svd", "spatial", "tucker") if self is Method.AUTO else (self.value,)


@dataclass(frozen=True)
class Factorize(Pass):
    """Low-rank decomposition to a share of a cost.

    Attributes:
        remains: share of the cost that is to remain.
        cost: which cost.
        method: which forms are tried.
        energy: share of each layer's output energy to keep, in place of what remains; None chooses by that.
        multiple: ranks are multiples of this.
        reconstruct: fit all stages again.
        parts: forms by the name of a node, e.g. `svd 12` or `tucker 8 16`; where any is named, no other is treated.

    Raises:
        OptionError: a setting out of range, or both a share that remains and an energy.
    """

    name: ClassVar[str] = "factorize"
    summary: ClassVar[str] = "low-rank decomposition of layers, by SVD, spatial SVD, Tucker-2 or CP"

    remains: Annotated[float, within(above=0, most=1)] = 0.7
    cost: Cost = Cost.PARAMS
    method: Method = Method.AUTO
    energy: Annotated[float, within(above=0, below=1)] | None = None
    multiple: Annotated[int, within(1)] = 1
    reconstruct: bool = True
    parts: tuple[tuple[str, Annotated[str, like(_FORM, "svd 12", "tucker 8 16")]], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.energy is not None and self.remains != Factorize.remains:
            raise OptionError(
                f"a remaining share of {self.remains:.4g} and an energy of {self.energy:.4g} exclude each other",
                remedy="leave one of them out",
                setting=("energy",),
            )

    def apply(self, model: ir.Model, context: Context) -> Outcome:
        """Decompose, choose, split, fit."""
        original = prepared(model, _OPSET)
        if isinstance(original, str):
            return Outcome(model, (), (Skip("model", original),))
        if any(spec_of(value) is None for value in free_inputs(original)):
            return Outcome(model, (), (Skip("model", "an input is no tensor, so that shapes cannot be observed"),))
        name_nodes(original)
        chosen, skips = _factorable(original, context, self.method)
        if not chosen:
            return Outcome(model, (), tuple(skips))
        data = context.samples(original)
        try:
            if self.parts:
                forms = self._named(original, chosen, data, context)
                reasons = {layer.name: NOT_NAMED for layer in chosen if layer.name not in forms}
            else:
                plan = _Plan(self, original, chosen, data, context)
                forms = plan.chosen()
                reasons = plan.reasons(forms)
        except OptionError:
            raise
        except OnnxcompError as error:
            return Outcome(model, (), (*skips, Skip("model", f"its layers cannot be observed: {error.fact}")))
        skips += [Skip(name, reason) for name, reason in reasons.items()]
        if not forms:
            return Outcome(model, (), tuple(skips))
        made = _split(original, forms)
        merged = merge_into_followers(made, forms.keys())
        note = ", fitted on made-up inputs" if context.data is None else ""
        changes = [
            Change(name, f"{_said(form)}{f', the last part in {merged[name]!r}' if name in merged else ''}{note}")
            for name, form in forms.items()
        ]
        if self.reconstruct:
            fitted, unfitted = reconstruct(original, made, {}, data, context)
            changes += [change for change in fitted if change.node not in forms]
            skips += unfitted
        remove_unused(made)
        return Outcome(made, tuple(changes), tuple(skips))

    def drafted(self) -> "Factorize":  # noqa: D102
        return replace(self, reconstruct=False)

    def options(self, model: ir.Model, context: Context) -> Iterator[Option]:
        """Every form at about a dozen ranks, each timed beside the layer as it is."""
        original = prepared(model.clone(), _OPSET)
        if isinstance(original, str) or any(spec_of(value) is None for value in free_inputs(original)):
            return
        name_nodes(original)
        chosen, _ = _factorable(original, context, self.method)
        data = context.samples(original)
        grams = calibrate(original, data, context, layers=chosen).grams
        shapes = observe(original, _first(data, context)).shapes
        clock = Clock(original, context)
        for layer in chosen:
            low = LowRank(kernel_of(layer), _moment(layer, grams[layer.name]))
            forms = list(low.options(self.method.kinds, self.multiple))
            energy = layer_error(low.weight.reshape(len(low.weight), -1), low.H) or 1.0
            times = clock.slowdowns(layer, shapes[layer.data], forms)
            width = layer.matrix().itemsize
            for form, time in zip(forms, times.tolist(), strict=True):
                error = form.error(low.weight, low.H) / energy
                yield Option(layer.name, form.title, error, form.parameters * width, time)

    def _named(self, model: ir.Model, found: list[Layer], data: Dataset, context: Context) -> dict[str, Factors]:
        settings = dict(self.parts)
        layers = [layer for layer in found if layer.name in settings]
        grams = calibrate(model, data, context, layers=layers).grams
        return {layer.name: _form(layer, grams[layer.name], settings[layer.name]) for layer in layers}


def _form(layer: Layer, gram: Gram, setting: str) -> Factors:
    """The form of a layer that a setting names.

    Raises:
        OptionError: it names none that the layer has.
    """
    kind, *ranks = setting.split()
    low = LowRank(kernel_of(layer), _moment(layer, gram))
    known = low.kinds()
    if kind not in known:
        raise OptionError(
            f"layer '{layer.name}' has no form '{setting}'",
            remedy=f"name {' or '.join(known)}",
            setting=("parts", layer.name),
        )
    return low.form(kind, tuple(map(int, ranks)))


def _moment(layer: Layer, gram: Gram) -> NDArray[np.float64]:
    """H of the layer's inputs, centred where its bias takes up their mean."""
    moments = gram.covariance if layer.adds_bias else gram.second_moment
    return np.asarray(moments[0])


def _first(data: Dataset, context: Context) -> Feeds:
    """A run of as many samples as latency counts at."""
    return next(iter(data.at_most(context.batch, context.seed).batches(context.batch))).feeds


def _said(form: Factors) -> str:
    before = form.composed().size
    return f"{form.kind} of rank {' and '.join(map(str, form.ranks))}, {form.parameters / before:.0%} of its weights"


def _factorable(model: ir.Model, context: Context, method: Method) -> tuple[list[Layer], list[Skip]]:
    found, skips = [], []
    for layer in layers(model):
        reason = None
        if layer.node.graph is not model.graph:
            reason = "a body of control flow holds it"
        elif context.excludes(layer.node):
            reason = "excluded by the user"
        elif len(layer.weight.uses()) > 1 or layer.weight.is_graph_output():
            reason = "another node shares its weight"
        elif layer.node.op_type == "ConvTranspose":
            reason = "decomposition is not worked out for ConvTranspose"
        elif layer.groups > 1:
            reason = "it is a grouped convolution, which has few weights already"
        elif layer.is_scaled:
            reason = "it scales its product or its bias"
        elif not np.isfinite(layer.matrix()).all():
            reason = "its weights are not finite"
        elif method in {Method.SPATIAL, Method.CP} and len(layer.kernel) != 2:
            reason = f"{method} needs a kernel of two axes"
        elif method is Method.TUCKER and int(np.prod(layer.kernel)) == 1:
            reason = "tucker needs a kernel of more than one tap"
        if reason is None:
            found.append(layer)
        else:
            skips.append(Skip(layer.name, reason))
    return found, skips


class _Plan:
    """The forms of each layer, with what they cost and what they do to the outputs."""

    def __init__(
        self, settings: Factorize, model: ir.Model, found: list[Layer], data: Dataset, context: Context
    ) -> None:
        self._settings, self._model, self._context = settings, model, context
        self._layers = {layer.name: layer for layer in found}
        self._one, self._run = (next(iter(data.at_most(n, context.seed).batches(n))).feeds for n in (1, context.batch))
        grams = calibrate(model, data, context, layers=found).grams
        self._forms: dict[str, list[Factors]] = {}
        self._errors: dict[str, NDArray[np.float64]] = {}
        self._costs: dict[str, NDArray[np.float64]] = {}  # of the layer itself, then of its forms
        answers = Answers(model, data, context)
        for done, (name, layer) in enumerate(self._layers.items()):
            self._add(name, layer, grams[name], answers)
            context.progress(done + 1, len(self._layers), "finding low-rank forms")
        self._price()

    def _add(self, name: str, layer: Layer, gram: Gram, answers: Answers) -> None:
        H, kernel = _moment(layer, gram), kernel_of(layer)
        low = LowRank(kernel, H)
        forms = list(low.options(self._settings.method.kinds, self._settings.multiple))
        energy = layer_error(kernel.reshape(len(kernel), -1), H) or 1.0
        errors = np.array([form.error(kernel, H) / energy for form in forms])
        if forms and self._settings.energy is None:
            errors = errors * self._gains(layer, forms, errors, answers)
        self._forms[name], self._errors[name] = forms, errors

    def _gains(
        self, layer: Layer, forms: list[Factors], errors: NDArray[np.float64], answers: Answers
    ) -> NDArray[np.float64]:
        """What the outputs lose for what the layer loses, measured at some forms and interpolated.

        At some, as it depends on how much is lost: the last ranks may be those that tell the classes apart.
        """
        order = np.argsort(errors)
        probes = sorted({int(order[(len(order) - 1) * place // _PROBES]) for place in range(1, _PROBES + 1)})
        probes.sort(key=lambda number: errors[number])
        measured = [answers.error(self._with(layer, forms[number])) for number in probes]
        known = np.maximum(errors[probes], 1e-12)
        return np.interp(errors, known, np.asarray(measured) / known)

    def _with(self, layer: Layer, form: Factors) -> ir.Model:
        """The model with one layer at a lower rank."""
        clone = self._model.clone()
        twin = next(other for other in layers(clone) if other.name == layer.name)
        kernel = form.composed()
        twin.set_matrix(kernel.reshape(len(kernel), -1))
        return clone

    def _price(self) -> None:
        """What each layer costs, and its forms relative to that."""
        settings, version = self._settings, opset(self._model)
        timed = settings.cost in {Cost.LATENCY, Cost.FLOPS}
        times: Mapping[str, float] = {}
        shapes = observe(self._model, self._one).shapes
        if timed:
            observed = observe(self._model, self._run).shapes
            times = profiles([self._model], self._context, self._run)[0].times
        clock = Clock(self._model, self._context)
        known: dict[Hashable, float] = {}
        for name, layer in self._layers.items():
            shape = shapes[layer.data]
            forms: list[Factors | None] = [None, *self._forms[name]]
            same = [(alike(layer, shape), form and form.title) for form in forms]
            for key, form in zip(same, forms, strict=True):
                if key not in known:
                    known[key] = self._static(totals(alone(layer, shape, version, form)))
            costs = np.array([known[key] for key in same])
            if timed:
                slower = clock.slowdowns(layer, observed[layer.data], self._forms[name])
                if settings.cost is Cost.LATENCY:
                    costs = np.append(1.0, slower) * times.get(name, 0.0)
                kept = np.flatnonzero(slower < 1)  # nothing that runs longer than the layer
                self._forms[name] = [self._forms[name][number] for number in kept]
                self._errors[name], costs = self._errors[name][kept], costs[np.append(0, kept + 1)]
            self._costs[name] = costs
        whole = totals(sized(self._model, shapes))
        self._total = sum(times.values()) if settings.cost is Cost.LATENCY else self._static(whole)

    def _static(self, whole: Totals) -> float:
        match self._settings.cost:
            case Cost.PARAMS:
                return float(whole.parameters)
            case Cost.SIZE:
                return float(whole.bytes)
            case _:
                return float(whole.flops)

    def chosen(self) -> dict[str, Factors]:
        """The form that each layer gets; those that stay as they are have none."""
        settings = self._settings
        if settings.energy is not None:
            return self._by_energy(1 - settings.energy)
        goal, found = settings.remains, self._choose(settings.remains)
        if settings.cost is not Cost.LATENCY:
            return found
        tried = {}
        for _ in range(_TIMED):
            share = ratio(self._model, _split(self._model, found), self._context, self._run)
            tried[abs(share - settings.remains)] = found
            goal *= settings.remains / share
            found = self._choose(goal)
        return tried[min(tried)]

    def _choose(self, remains: float) -> dict[str, Factors]:
        names = [name for name, forms in self._forms.items() if forms]
        errors = [np.append(0.0, self._errors[name]) for name in names]
        costs = [self._costs[name][:, None] for name in names]
        fixed = self._total - sum(self._costs[name][0] for name in names)
        numbers = choose(errors, costs, np.array([self._total * remains - fixed]))
        if numbers is None:  # out of reach: as far as it goes
            numbers = [int(np.argmin(cost[:, 0])) for cost in costs]
        return {name: self._forms[name][number - 1] for name, number in zip(names, numbers, strict=True) if number}

    def _by_energy(self, lost: float) -> dict[str, Factors]:
        found = {}
        for name, forms in self._forms.items():
            costs = np.where(self._errors[name] <= lost, self._costs[name][1:], np.inf)
            if len(forms) and costs.min() < self._costs[name][0]:
                found[name] = forms[int(np.argmin(costs))]
        return found

    def reasons(self, taken: Mapping[str, Factors]) -> dict[str, str]:
        """Why layers stay as they are."""
        unless = "no form has fewer weights"
        if self._settings.cost in {Cost.FLOPS, Cost.LATENCY}:
            unless += " and runs faster"
        left = "the target is met at less loss elsewhere" if self._settings.energy is None else "it would lose too much"
        return {name: left if forms else unless for name, forms in self._forms.items() if name not in taken}


def _split(model: ir.Model, forms: Mapping[str, Factors]) -> ir.Model:
    made = model.clone()
    for layer in list(layers(made)):
        if layer.name in forms:
            split(layer, forms[layer.name])
    return made
