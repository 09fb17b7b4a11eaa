"""The programs of a comparison seen alike: spans of tensors by torch module, and their values a window at a time."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edgeattn.core.numerics import Array
from edgeattn.targets.base import NHWC, Step, Tensor, TraceValue
from edgeattn.targets.feeds import own_feeds

if TYPE_CHECKING:
    from edgeattn.targets.base import Runtime

#: At most about this many bytes of a program's inner tensors are held at once; the others are computed again.
WINDOW_BYTES = 128_000_000
#: Tensors in the first window, from which the size of the others is learned.
_FIRST = 32
#: Operations that hand on what they read, in another width or as integers.
_CONVERSIONS = frozenset({"quantizelinear", "dequantizelinear", "quantize", "dequantize", "cast", "identity"})


@dataclass(frozen=True)
class Span:
    """One call of a module: where its tensors are found in a program.

    Attributes:
        outs, ins: tensors that it gives to, or reads from, the rest of the program, the last to be made first; of each
            its name, and then those of what it was converted from, for the tensor itself may not be in floats.
    """

    outs: tuple[tuple[str, ...], ...]
    ins: tuple[tuple[str, ...], ...]

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return [name for names in (*self.ins, *self.outs) for name in names]


#: The calls of each module, by path; a module that the program has nothing of is missing.
Spans = dict[str, list[Span]]


class Side(Protocol):
    """A program, given the inputs of the model."""

    words: str
    inputs: tuple[Tensor, ...]

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs, as ``values`` knows them."""
        ...

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""
        ...

    def spans(self, feeds: Mapping[str, Array], calls: Mapping[str, int]) -> Spans:
        """The calls of each module, in the order in which modules finish.

        Args:
            calls: how often the other program calls each module.
        """
        ...

    def values(self, feeds: Mapping[str, Array], wanted: Collection[str]) -> Iterator[TraceValue]:
        """The tensors of these names, of floats alone."""
        ...

    @property
    def fused(self) -> frozenset[str]:
        """Modules that are part of the operations of others."""
        ...


def ancestry(path: str) -> list[str]:
    """A module and all around it, without the model itself."""
    parts = path.split(".") if path else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def spans_of(steps: Sequence[Step], outputs: Collection[str], calls: Mapping[str, int]) -> Spans:
    """Where the modules' tensors are in a graph.

    A tensor leaves a module if anything outside reads it.

    Args:
        outputs: names of the graph's outputs. calls: see ``Side.spans``.
    """
    producer = {name: i for i, step in enumerate(steps) for name in step.outputs}
    readers: dict[str, list[int]] = defaultdict(list)
    members: dict[str, list[int]] = defaultdict(list)
    for i, step in enumerate(steps):
        for name in step.inputs:
            readers[name].append(i)
        for path in ancestry(step.module):
            members[path].append(i)

    def sources(name: str) -> Iterator[str]:
        yield name
        step = steps[producer[name]] if name in producer else None
        if step is not None and step.op.lower() in _CONVERSIONS:
            for source in step.inputs:
                yield from sources(source)

    found: Spans = {}
    for path in sorted(members, key=lambda path: (members[path][-1], -path.count("."))):
        indices, count = members[path], calls.get(path, 1)
        if len(indices) % count:
            continue  # which operation belongs to which call cannot be told
        size, found[path] = len(indices) // count, []
        for start in range(0, len(indices), size):
            own = set(indices[start : start + size])
            made = [name for i in sorted(own, reverse=True) for name in steps[i].outputs]
            leaving = [n for n in made if n in outputs or not readers[n] or not own.issuperset(readers[n])]
            read = [n for i in sorted(own) for n in steps[i].inputs if producer.get(n) not in own]
            both = (tuple(tuple(sources(name)) for name in dict.fromkeys(names)) for names in (leaving, read))
            found[path].append(Span(*both))
    return found


class ArtifactSide:
    """A target's artifact under the runtime of this machine.

    Args:
        words: what the user calls it. inputs, outputs: of its entry.
    """

    def __init__(
        self, words: str, runtime: Runtime, inputs: Sequence[Tensor], outputs: Sequence[str], entry: str = "main"
    ) -> None:
        self.words, self._runtime, self._entry = words, runtime, entry
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self._steps: list[Step] | None = None

    @property
    def steps(self) -> list[Step]:
        """Of the graph."""
        if self._steps is None:
            self._steps = self._runtime.steps(self._entry)
        return self._steps

    @property
    def fused(self) -> frozenset[str]:
        """See ``Side.fused``."""
        return frozenset(path for step in self.steps for path in step.fused)

    def _own(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        specs = [_in_its_layout(spec, feeds[spec.name]) for spec in self.inputs]
        return own_feeds(specs, feeds)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See ``Side.run``."""
        return self._runtime.run(self._entry, self._own(feeds))

    def spans(self, feeds: Mapping[str, Array], calls: Mapping[str, int]) -> Spans:
        """See ``Side.spans``."""
        return spans_of(self.steps, self.outputs, calls)

    def values(self, feeds: Mapping[str, Array], wanted: Collection[str]) -> Iterator[TraceValue]:
        """See ``Side.values``."""
        yield from self._runtime.trace(self._entry, self._own(feeds), wanted)


def _in_its_layout(spec: Tensor, value: Array) -> Tensor:
    """An input of a file of unknown making: its channels are last where only so the model's image fits."""
    shape = value.shape
    last = len(shape) == 4 and (shape[0], *shape[2:], shape[1]) == spec.shape != shape
    return replace(spec, layout=NHWC) if last and not spec.layout else spec


class TorchSide:
    """A model in PyTorch.

    Args:
        words: what the user calls it. model: in eval mode. inputs: in the order of its forward.
        outputs: names of the flattened outputs, see ``capture.name_outputs``.
    """

    def __init__(self, words: str, model: Any, inputs: Sequence[Tensor], outputs: tuple[str, ...]) -> None:
        self.words, self.model, self.inputs, self._named = words, model, tuple(inputs), outputs
        self.outputs: tuple[str, ...] = ()
        self.fused: frozenset[str] = frozenset()

    def tensors(self, feeds: Mapping[str, Array]) -> dict[str, Any]:
        """Feeds as torch's, in the model's order and dtypes."""
        import torch

        return {s.name: torch.from_numpy(feeds[s.name].astype(s.dtype, copy=True)) for s in self.inputs}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See ``Side.run``."""
        from edgeattn.capture import run_eager

        return {k: v.numpy() for k, v in run_eager(self.model, self.tensors(feeds), self._named).items()}

    def _follow(
        self, feeds: Mapping[str, Array], seen: Callable[[str, list[str], list[str], dict[str, Any]], None]
    ) -> None:
        """Run the model; ``seen`` gets path, names of inputs and outputs, and the tensors by name, of each call.

        A tensor is called by the first module that gives or reads it, the number of its call, and its place there.
        """
        import torch

        from edgeattn.capture import tensors_of

        calls: Counter[str] = Counter()

        def named(path: str, kind: str, held: Any) -> dict[str, Any]:
            found = {}
            for i, tensor in enumerate(tensors_of(held)):
                if getattr(tensor, "_edgeattn_name", None) is None:
                    tensor._edgeattn_name = f"{path or '(model)'} call {calls[path]} {kind} {i}"  # type: ignore[attr-defined]
                found[tensor._edgeattn_name] = tensor  # type: ignore[attr-defined]
            return found

        def hooks(path: str) -> tuple[Any, Any]:
            pending: list[dict[str, Any]] = []

            def before(_module: object, args: Any, kwargs: Any) -> None:
                pending.append(named(path, "input", (args, kwargs)))

            def after(_module: object, _args: Any, result: Any) -> None:
                ins, outs = pending.pop(), named(path, "output", result)
                calls[path] += 1
                seen(path, list(ins), list(outs), {**ins, **outs})

            return before, after

        handles = []
        for path, module in self.model.named_modules():
            before, after = hooks(path)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        try:
            with torch.inference_mode():
                self.model(*self.tensors(feeds).values())
        finally:
            for handle in handles:
                handle.remove()

    def calls(self, feeds: Mapping[str, Array]) -> Counter[str]:
        """How often each module is called."""
        counted: Counter[str] = Counter()
        self._follow(feeds, lambda path, *_: counted.update([path]))
        return counted

    def spans(self, feeds: Mapping[str, Array], calls: Mapping[str, int]) -> Spans:
        """See ``Side.spans``."""
        found: Spans = defaultdict(list)

        def seen(path: str, ins: list[str], outs: list[str], _tensors: object) -> None:
            found[path].append(Span(tuple((name,) for name in outs), tuple((name,) for name in ins)))

        self._follow(feeds, seen)
        self.outputs = tuple(name for span in found.pop("") for names in span.outs for name in names)
        return {path: spans for path, spans in found.items() if len(spans) == calls.get(path, 1)}

    def values(self, feeds: Mapping[str, Array], wanted: Collection[str]) -> Iterator[TraceValue]:
        """See ``Side.values``."""
        kept: dict[str, TraceValue] = {}

        def seen(path: str, _ins: object, outs: list[str], tensors: dict[str, Any]) -> None:
            op = type(self.model.get_submodule(path)).__name__
            for name, tensor in tensors.items():
                if name in wanted and tensor.is_floating_point() and (name in outs or name not in kept):
                    kept.setdefault(name, TraceValue(name, path, op, tensor.clone().numpy()))

        self._follow(feeds, seen)
        yield from kept.values()


class Windows:
    """A program's inner tensors by name. At most two windows of them are in memory; a third one runs it again.

    Args:
        fetch: gives the tensors of some names. order: the names that will be asked for, about as they are computed.
    """

    def __init__(
        self, fetch: Callable[[Collection[str]], Iterator[TraceValue]], order: Sequence[str], budget: int = WINDOW_BYTES
    ) -> None:
        self._fetch, self._order, self._budget = fetch, list(dict.fromkeys(order)), budget
        self._place = {name: i for i, name in enumerate(self._order)}
        self._ends: list[int] = []
        self._next = _FIRST
        self._held: dict[int, dict[str, TraceValue]] = {}
        #: How often the program was run, and the most bytes of tensors that were held.
        self.runs, self.peak = 0, 0

    def _window(self, place: int) -> int:
        """Number of the window around a place in the order; windows are made as they are needed."""
        while not self._ends or self._ends[-1] <= place:
            self._ends.append((self._ends[-1] if self._ends else 0) + self._next)
            if self._ends[-1] <= place:
                self._load(len(self._ends) - 1)  # to learn how large tensors are
        return next(i for i, end in enumerate(self._ends) if place < end)

    def _load(self, number: int) -> None:
        while len(self._held) > 1:
            del self._held[next(iter(self._held))]
        start = self._ends[number - 1] if number else 0
        wanted = self._order[start : self._ends[number]]
        window = {item.name: item for item in self._fetch(frozenset(wanted))}
        self._held[number] = window
        self.runs += 1
        size = sum(item.value.nbytes for item in window.values())
        self.peak = max(self.peak, sum(item.value.nbytes for held in self._held.values() for item in held.values()))
        self._next = max(1, int(self._budget * len(wanted) / max(size, 1)))

    def get(self, name: str) -> TraceValue | None:
        """The tensor of that name; None where the program has none in floats."""
        if name not in self._place:
            return None
        number = self._window(self._place[name])
        if number not in self._held:
            self._load(number)
        return self._held[number].get(name)


def fits(value: Array, shape: tuple[int, ...]) -> list[Array]:
    """The ways in which a tensor of a program can be one of that shape: as it is, or with its channels last there.

    Dimensions of one may come and go. Empty if there is no way.
    """
    if value.size != int(np.prod(shape)):
        return []
    ways = []
    squeezed = tuple(n for n in shape if n != 1)
    if tuple(n for n in value.shape if n != 1) == squeezed or value.ndim != len(shape):
        ways.append(value.reshape(shape))
    if len(shape) >= 3:
        last = (shape[0], *shape[2:], shape[1])
        same = last == shape and len(shape) == 3  # of tokens, as many as channels: as it is
        if tuple(n for n in value.shape if n != 1) == tuple(n for n in last if n != 1) and not same:
            ways.append(np.moveaxis(value.reshape(last), -1, 1))
    return ways
