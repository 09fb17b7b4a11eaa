"""Exact zeros behind the ReLUs of a model, counted while it runs, and the weights that they make idle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from edgeattn.models.cost import no_fused_encoder

aten = torch.ops.aten

#: What gives zeros for all numbers below zero, by the argument that says so; None where it always does.
_RELUS: dict[Any, int | None] = {
    aten.relu: None,
    aten.relu_: None,
    aten.relu6: None,
    aten.relu6_: None,
    aten.hardtanh: 1,
    aten.hardtanh_: 1,
    aten.clamp: 1,
    aten.clamp_: 1,
    aten.clamp_min: 1,
    aten.clamp_min_: 1,
}
#: Products, and which of their arguments may be a weight; the first one of some is a bias.
_PRODUCTS: dict[Any, slice] = {
    aten.mm: slice(2),
    aten.bmm: slice(2),
    aten.mv: slice(2),
    aten.addmm: slice(1, 3),
    aten.baddbmm: slice(1, 3),
    aten.addmv: slice(1, 3),
    aten.convolution: slice(1, 2),
}


@dataclass(frozen=True)
class Site:
    """An activation.

    Attributes:
        path: of the module. A module that is run several times in a forward, or has several ReLUs of its own, has
            their numbers behind it: ``block (2)``.
        zeros: share of exact zeros. low, high: the smallest and the largest share of a row. elements: of all rows.
        rows: tokens, or else forwards.
        units: a token's numbers. never: how many of them were zero in every row. None where rows are forwards.
    """

    path: str
    zeros: float
    low: float
    high: float
    elements: int
    rows: int
    units: int | None
    never: int | None


@dataclass(frozen=True)
class Reader:
    """A linear layer to which some of its inputs are exact zeros.

    Attributes:
        path: of the layer. weights: elements of its matrix. zeros: share of its columns that meet a zero, on average.
    """

    path: str
    weights: int
    zeros: float


@dataclass(frozen=True)
class Found:
    """What ran.

    Attributes:
        sites: in order of first use. readers: likewise.
        weights: elements of all parameters that were part of a matrix product or a convolution, shared ones once.
    """

    sites: list[Site]
    readers: list[Reader]
    weights: int

    @property
    def idle(self) -> float:
        """Weights that meet zeros alone, on average over the rows."""
        return sum(reader.weights * reader.zeros for reader in self.readers)


@dataclass
class _Tally:
    """Counts of one tensor over the forwards."""

    by_token: bool
    shares: list[Tensor] = field(default_factory=list)
    zeros: int = 0
    elements: int = 0
    used: Tensor | None = None

    def add(self, x: Tensor) -> None:
        zero = x == 0
        self.zeros += int(zero.sum())
        self.elements += zero.numel()
        rows = zero.reshape(-1, x.shape[-1]) if self.by_token else zero.reshape(1, -1)
        self.shares.append(rows.float().mean(dim=1))
        if self.by_token:
            some = (~rows).any(dim=0)
            self.used = some if self.used is None else self.used | some

    def site(self, path: str) -> Site:
        shares = torch.cat(self.shares)
        units, never = (None, None) if self.used is None else (len(self.used), int((~self.used).sum()))
        ends = float(shares.min()), float(shares.max())
        return Site(path, self.zeros / max(1, self.elements), *ends, self.elements, len(shares), units, never)


@dataclass
class _Running:
    """A module that is being run. ``plain``: it has nothing but code, so that its output is the activation."""

    path: str
    plain: bool
    rectifies: bool = False


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees ReLUs, in modules and in code, what linear layers are given, and which parameters are multiplied with."""

    def __init__(self, model: nn.Module, by_token: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_token = by_token
        self.sites: dict[str, _Tally] = {}
        self.readers: dict[str, _Tally] = {}
        self.multiplied: set[int] = set()
        self.parameters = {_place(parameter): parameter.numel() for parameter in model.parameters()}
        self._running = [_Running("", False)]
        self._calls: dict[str, int] = {}

    def begin(self) -> None:
        """A new forward."""
        self._calls.clear()

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Watch the modules of ``model``."""
        with ExitStack() as stack:
            for path, module in model.named_modules():
                plain = not any(True for _ in module.children()) and not any(True for _ in module.parameters())

                def enter(_: nn.Module, args: Any, path: str = path, plain: bool = plain) -> None:
                    self._running.append(_Running(path, plain))

                def given(_: nn.Module, args: Any, path: str = path) -> None:
                    if args and isinstance(args[0], Tensor):
                        self.readers.setdefault(path, _Tally(self.by_token)).add(args[0])

                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)
                if isinstance(module, nn.Linear):
                    stack.callback(module.register_forward_pre_hook(given).remove)
            yield

    def _leave(self, _module: nn.Module, _args: Any, out: Any) -> None:
        done = self._running.pop()
        if done.rectifies and isinstance(out, Tensor):
            self._count(done.path, out)

    def _count(self, path: str, x: Tensor) -> None:
        call = self._calls[path] = self._calls.get(path, 0) + 1
        name = path if call == 1 else f"{path} ({call})"
        self.sites.setdefault(name, _Tally(self.by_token)).add(x)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet not in _RELUS and packet not in _PRODUCTS:
            # In inference mode composite operators (linear, matmul, conv2d) arrive whole: look inside.
            with self:
                out = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if out is NotImplemented else out
        out = func(*args, **kwargs)
        if packet in _PRODUCTS:
            self.multiplied |= {_place(x) for x in args[_PRODUCTS[packet]]} & self.parameters.keys()
        elif out.is_floating_point() and _from_zero(_RELUS[packet], args, kwargs):
            if self._running[-1].plain:
                self._running[-1].rectifies = True
            else:
                self._count(self._running[-1].path, out)
        return out


def _place(x: Tensor) -> int:
    """Where a tensor's numbers lie; its views share it."""
    return x.untyped_storage().data_ptr()


def _from_zero(position: int | None, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether an operation of ``_RELUS`` cuts off at zero."""
    if position is None:
        return True
    low = args[position] if len(args) > position else kwargs.get("min", kwargs.get("min_val"))
    return isinstance(low, int | float) and low == 0


def measure(
    model: nn.Module,
    feeds: Iterable[tuple[Tensor, ...]],
    by_token: bool,
    say: Callable[[int], None] = lambda done: None,
) -> Found:
    """Run ``model`` on each of ``feeds`` and count exact zeros behind its ReLUs; the model is left as it was.

    A ReLU is ``torch.relu``, ReLU6 or a clamp at zero, wherever it is called. In a module that is nothing but an
    activation, as ``nn.ReLU`` or a squared ReLU, the module's output counts, else the operation's own.

    Args:
        by_token: rows are the last axis of each tensor, a token's numbers; else a whole forward.
        say: is told how many forwards are done.
    """
    watch = _Watch(model, by_token)
    with watch.following(model), no_fused_encoder(), torch.no_grad():
        for i, feed in enumerate(feeds):
            watch.begin()
            with watch:
                model(*feed)
            say(i + 1)
    readers = [
        Reader(path, model.get_submodule(path).get_parameter("weight").numel(), tally.zeros / max(1, tally.elements))
        for path, tally in watch.readers.items()
        if tally.zeros
    ]
    weights = sum(watch.parameters[place] for place in watch.multiplied)
    return Found([tally.site(path) for path, tally in watch.sites.items()], readers, weights)
