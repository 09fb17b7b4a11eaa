"""Quantization simulated in torch, on the deploy form: what a plan rounds, and a model that computes with it rounded.

What is rounded are *sites*: the weights of a module, the data that a call of it reads, and, for targets that compute
whole tensors in integers, the data that it makes. A kept module's weights, inputs and outputs stay in floats: a tensor
that one module makes and another reads belongs to both, so keeping either frees it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from edgeattn.capture import ModulePath
from edgeattn.core.numerics import Array
from edgeattn.quant.observe import Observer
from edgeattn.quant.plan import QuantPlan, Scheme
from edgeattn.quant.rounding import rounded
from edgeattn.reparam.flow import enclosing
from edgeattn.reparam.trace import Call, Record, Value, trace

#: Modules whose weights are quantized, and the data that these are multiplied with.
WEIGHTED = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
    nn.Embedding,
)
#: Between two modules these hand a tensor on, so that it still is the first one's output.
_HANDS_ON = frozenset(
    f"aten.{name}"
    for name in (
        *("relu", "relu_", "view", "_unsafe_view", "reshape", "flatten", "squeeze", "unsqueeze"),
        *("permute", "transpose", "t", "clone", "detach", "alias", "contiguous"),
    )
)
#: What functions are to a table; a matrix product is rounded where it reads, all others where they give.
_KINDS = {
    "softmax": ("softmax", "_softmax"),
    "attention": ("scaled_dot_product_attention",),
    "matmul operands": ("matmul", "__matmul__", "__rmatmul__", "bmm", "einsum"),
    "norm": ("layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm", "normalize"),
    "activation": ("relu", "relu_", "relu6", "gelu", "silu", "hardswish", "hardsigmoid", "sigmoid", "tanh"),
    "pool": ("avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "max_pool2d", "mean"),
    "sum": ("add", "add_", "__add__", "__radd__", "__iadd__", "sub", "__sub__"),
    "product": ("mul", "mul_", "__mul__", "__rmul__", "__imul__"),
    "square": ("square", "pow", "__pow__"),
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names}

#: Rounds a tensor to the levels of a site.
Round = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Site:
    """One thing that is rounded.

    Attributes:
        what: ``weights`` of a module; data that it ``reads`` or ``makes``; what an ``operation`` in it reads or gives.
        module: dotted path. call: of the module, or of the operation in it, in a forward.
        maker: of data that are read the module with weights that they come from; "" where there is none.
        operation: its kind.
    """

    what: Literal["weights", "reads", "makes", "operation"]
    module: str
    call: int = 0
    maker: str = ""
    operation: str = ""

    def touches(self, modules: Collection[str]) -> bool:
        """Whether it stays in floats where these modules are kept."""
        return self.module in modules or self.maker in modules


@dataclass(frozen=True)
class Unit:
    """What is rounded, or kept, as one: a module, or the operations of a kind.

    Attributes:
        kind: class of the module, or "" for operations. parameters: numbers in its weights.
        alone: what is rounded for its sake: weights, data that it makes, and data that it reads and no other module
            with weights makes. The sites of all units are theirs alone: each site counts once.
    """

    name: str
    kind: str
    parameters: int
    alone: frozenset[Site]


@dataclass(frozen=True)
class Style:
    """How a target rounds data.

    Attributes:
        zero_point: a range of its own ends, in place of one symmetric around 0.
        outputs: what modules make is rounded for every reader, in place of modules that quantize what they read.
    """

    zero_point: bool = False
    outputs: bool = False


def _weighted(model: nn.Module) -> dict[str, nn.Module]:
    """Modules with weights of their own by their first path; weights that are computed are not stored anywhere."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, WEIGHTED) and module._parameters.get("weight") is not None
    }


def _rows(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight with its output channels as rows."""
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        inputs, outputs = weight.shape[:2]
        parts = weight.reshape(module.groups, inputs // module.groups, outputs, -1).transpose(1, 2)
        return parts.reshape(module.groups * outputs, -1)
    return weight.reshape(weight.shape[0], -1)


def _from_rows(module: nn.Module, rows: Tensor, weight: Tensor) -> Tensor:
    """The inverse of ``_rows``."""
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        inputs, outputs = weight.shape[:2]
        parts = rows.reshape(module.groups, outputs, inputs // module.groups, -1).transpose(1, 2)
        return parts.reshape(weight.shape)
    return rows.reshape(weight.shape)


def rounded_weight(module: nn.Module, bits: int, group: int = 0) -> Tensor:
    """The weight of a module of ``WEIGHTED`` as integers stand for it, one scale a channel or a group of inputs."""
    weight = module._parameters["weight"]
    assert weight is not None
    rows = _rows(module, weight.detach()).float().cpu().numpy()
    made = torch.from_numpy(rounded(rows, bits, group)).to(weight)
    return _from_rows(module, made, weight)


def _scheme(plan: QuantPlan, path: str, module: nn.Module, weight: Tensor) -> Scheme:
    scheme = plan.scheme(path)
    return scheme.for_kernel(weight.shape) if isinstance(module, _ConvNd) else scheme


def weight_errors(model: nn.Module, plan: QuantPlan) -> list[dict[str, Any]]:
    """``module``, ``bits`` and ``error`` of every module whose weights become integers: ||rounded - w|| / ||w||.

    As the plan has it, with one scale a channel or a group of inputs; the rounding of a target may be finer or coarser.
    """
    found = []
    for path, module in _weighted(model).items():
        weight = module._parameters["weight"]
        assert weight is not None
        scheme = _scheme(plan, path, module, weight)
        size = float(weight.detach().double().norm())
        if scheme.floats or not size:
            continue
        away = rounded_weight(module, scheme.weights, scheme.group).double() - weight.detach().double()
        error = float(away.norm()) / size
        if math.isfinite(error):  # what is not finite is verification's to say
            found.append({"module": path, "bits": scheme.weights, "error": error})
    return found


def _levels(observer: Observer, bits: int, zero_point: bool) -> Round:
    """Rounds as the observed range says; what is not finite stays so."""
    if zero_point:
        low, high = observer.limits(bits)
        scale = (high - low) / (2**bits - 1) or 1.0
        first = float(round(low / scale))
        last = first + 2**bits - 1
    else:
        scale = observer.scale(bits)
        last = float(2 ** (bits - 1) - 1)
        first = -last

    def apply(x: Tensor) -> Tensor:
        return (x / scale).round_().clamp_(first, last).mul_(scale)

    return apply


def _maker(record: Record, value: Value, modules: Mapping[nn.Module, str]) -> str:
    """Path of the module with weights that made a tensor, seen through what only hands it on; "" if none did."""
    while (op := record.producer(value)) is not None:
        call = enclosing(op, lambda module: module in modules)
        if call is not None:
            return modules[call.module] if value in call.outputs else ""
        if op.name not in _HANDS_ON or not op.inputs:
            return ""
        value = op.inputs[0]
    return ""


def _read_elsewhere(record: Record, call: Call, value: Value, modules: Mapping[nn.Module, str]) -> bool:
    """Whether anything but a module with weights reads a tensor, such as a sum or a matrix product of two data."""
    for op in record.readers(value):
        inside = enclosing(op, lambda module: module in modules)
        if inside is call or (inside is None and op.name in _HANDS_ON):
            if any(_read_elsewhere(record, call, after, modules) for after in op.outputs if after.id != value.id):
                return True
        elif inside is None:
            return True
    return False


def _tensors(feeds: Mapping[str, Array]) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(value.copy()) for value in feeds.values())


@contextmanager
def _calls(model: nn.Module) -> Iterator[dict[Any, int]]:
    """How often each module was called so far in the forward that runs."""
    counts: dict[Any, int] = defaultdict(int)
    handle = model.register_forward_pre_hook(lambda _m, _i: counts.clear())
    try:
        yield counts
    finally:
        handle.remove()


class Simulation:
    """A model as a plan quantizes it: int8 or int4 weights, and int8 data at the modules that have weights.

    Args:
        model: the deploy form, in eval mode. It is left as it was.
        plan: which module is stored in how many bits. style: how data are rounded.
        feeds: calibration samples, gone through once: what ranges are measured on.

    Attributes:
        sites: all that the plan rounds. units: the modules that it quantizes, in the model's order.
    """

    def __init__(
        self, model: nn.Module, plan: QuantPlan, feeds: Iterable[Mapping[str, Array]], style: Style | None = None
    ) -> None:
        self.model, self.plan, self.style = model, plan, style or Style()
        self._modules = {p: m for p, m in _weighted(model).items() if not plan.scheme(p).floats}
        self._weights: dict[str, Tensor] = {}
        self._rounds: dict[Site, Round] = {}
        self.sites: frozenset[Site] = frozenset(Site("weights", path) for path in self._modules)
        self._calibrate(feeds)
        self.units = tuple(self._unit(path, module) for path, module in self._modules.items())

    def _unit(self, path: str, module: nn.Module) -> Unit:
        own = (s for s in self.sites if (s.maker or s.module) == path)
        weight = module._parameters["weight"]
        assert weight is not None
        return Unit(path, type(module).__name__, weight.numel(), frozenset(own))

    def _data(self, feeds: Mapping[str, Array]) -> set[Site]:
        """The data that are rounded, found by one forward."""
        record = trace(self.model, _tensors(feeds))
        every = {module: path for path, module in _weighted(self.model).items()}
        found = set()
        for path, module in self._modules.items():
            if self.plan.scheme(path).data == 32 or isinstance(module, nn.Embedding):
                continue
            for number, call in enumerate(record.calls_of(module)):
                maker = _maker(record, call.inputs[0], every)
                if not maker or not self.plan.scheme(maker).floats:
                    found.add(Site("reads", path, number, maker))
                (made,) = call.outputs
                returned = record.leaves(made)
                if self.style.outputs and not returned and _read_elsewhere(record, call, made, every):
                    found.add(Site("makes", path, number))
        return found

    def _calibrate(self, feeds: Iterable[Mapping[str, Array]]) -> None:
        observers: dict[Site, Observer] = {}
        if all(self.plan.scheme(path).data == 32 for path in self._modules):
            return
        for sample in feeds:
            if not observers:
                observers = {site: Observer(self.plan.observer) for site in self._data(sample)}

            def add(site: Site, x: Tensor, seen: Mapping[Site, Observer] = observers) -> Tensor:
                seen[site].add(x.detach().float().cpu().numpy())
                return x

            with torch.no_grad(), self._watched(observers, add):
                self.model(*_tensors(sample))
        self._rounds = {
            site: _levels(observer, self.plan.scheme(site.module).data, self.style.zero_point)
            for site, observer in observers.items()
        }
        self.sites |= frozenset(self._rounds)

    @contextmanager
    def _watched(self, sites: Collection[Site], change: Callable[[Site, Tensor], Tensor]) -> Iterator[None]:
        """Put ``change(site, data)`` in the place of the data of these sites."""
        reads = {(s.module, s.call): s for s in sites if s.what == "reads"}
        makes = {(s.module, s.call): s for s in sites if s.what == "makes"}
        with ExitStack() as stack:
            counts = stack.enter_context(_calls(self.model))

            def before(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                number, counts[path] = counts[path], counts[path] + 1
                site = reads.get((path, number))
                if site is None:
                    return None
                if args:
                    return (change(site, args[0]), *args[1:]), kwargs
                name = next(iter(kwargs))
                return args, {**kwargs, name: change(site, kwargs[name])}

            def after(path: str, output: Tensor) -> Tensor | None:
                site = makes.get((path, counts[path] - 1))
                return None if site is None else change(site, output)

            for path in {module for module, _ in [*reads, *makes]}:
                module = self._modules[path]
                stack.callback(
                    module.register_forward_pre_hook(
                        lambda _m, args, kwargs, path=path: before(path, args, kwargs), with_kwargs=True
                    ).remove
                )
                stack.callback(module.register_forward_hook(lambda _m, _i, y, path=path: after(path, y)).remove)
            yield

    def _weight(self, path: str) -> Tensor:
        if path not in self._weights:
            module = self._modules[path]
            weight = module._parameters["weight"]
            assert weight is not None
            scheme = _scheme(self.plan, path, module, weight)
            self._weights[path] = rounded_weight(module, scheme.weights, scheme.group)
        return self._weights[path]

    @contextmanager
    def rounded(self, sites: Collection[Site]) -> Iterator[None]:
        """The model computes with these sites rounded while the body runs; afterwards it is exactly as before."""
        with ExitStack() as stack:
            for path in (site.module for site in sites if site.what == "weights"):
                owned = self._modules[path]._parameters
                stack.callback(owned.__setitem__, "weight", owned["weight"])
                owned["weight"] = nn.Parameter(self._weight(path), requires_grad=False)
            data = [site for site in sites if site.what != "weights"]
            stack.enter_context(self._watched(data, lambda site, x: self._rounds[site](x)))
            yield

    def without(self, modules: Collection[str]) -> frozenset[Site]:
        """All sites that are left where these modules are kept in floats."""
        return frozenset(site for site in self.sites if not site.touches(modules))


class _Functions(TorchFunctionMode):
    """Puts ``change(site, tensor)`` in the place of what operations without weights give, or of what products read."""

    def __init__(self, path: ModulePath, counts: dict[Any, int], change: Callable[[Site, Tensor], Tensor]) -> None:
        super().__init__()
        self.path, self.counts, self.change = path, counts, change

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = _KIND_OF.get(getattr(func, "__name__", ""))
        if kind is None:
            return func(*args, **kwargs)

        def put(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            key = (self.path.current, kind)
            number, self.counts[key] = self.counts[key], self.counts[key] + 1
            return self.change(Site("operation", key[0], number, operation=kind), value)

        if kind == "matmul operands":
            return func(*torch.utils._pytree.tree_map(put, args), **kwargs)
        return put(func(*args, **kwargs))


class Operations:
    """A model whose data are rounded to 8 bits beside its weighted modules: softmax, norms, pools, sums, products.

    No target does that here by default; this tells what it would cost. Weights and what they are multiplied with stay.

    Args: as of ``Simulation``.

    Attributes:
        sites: every operation that was found. units: those of a module, by kind; then all of a kind.
    """

    def __init__(
        self, model: nn.Module, plan: QuantPlan, feeds: Iterable[Mapping[str, Array]], style: Style | None = None
    ) -> None:
        self.model = model
        observers: dict[Site, Observer] = defaultdict(lambda: Observer(plan.observer))

        def add(site: Site, x: Tensor) -> Tensor:
            observers[site].add(x.detach().float().cpu().numpy())
            return x

        for sample in feeds:
            with torch.no_grad(), self._changed(add):
                model(*_tensors(sample))
        zero_point = style is not None and style.zero_point
        self._rounds = {site: _levels(observer, 8, zero_point) for site, observer in observers.items()}
        self.sites = frozenset(self._rounds)
        places: dict[str, set[Site]] = defaultdict(set)
        kinds: dict[str, set[Site]] = defaultdict(set)
        for site in self._rounds:
            places[f"{site.module} {site.operation}"].add(site)
            kinds[f"every {site.operation}"].add(site)
        self.units = tuple(Unit(name, "", 0, frozenset(own)) for name, own in (*places.items(), *kinds.items()))
        self._own = {unit.name: unit.alone for unit in self.units}

    @contextmanager
    def _changed(self, change: Callable[[Site, Tensor], Tensor]) -> Iterator[None]:
        with _calls(self.model) as counts, ModulePath().follow(self.model) as path, _Functions(path, counts, change):
            yield

    @contextmanager
    def rounded(self, sites: Collection[Site]) -> Iterator[None]:
        """The model computes with these sites rounded while the body runs."""
        chosen = frozenset(sites)
        with self._changed(lambda site, x: self._rounds[site](x) if site in chosen else x):
            yield

    def without(self, units: Collection[str]) -> frozenset[Site]:
        """All sites but those of these units."""
        return self.sites - frozenset().union(*(self._own[name] for name in units))
