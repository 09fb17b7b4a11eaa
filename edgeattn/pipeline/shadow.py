"""Runs a PyTorch model twice at once: on its own numbers, and on those that another program has at the same places."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten


@dataclass(eq=False)
class Frame:
    """A running call of a module; ``args`` and ``kwargs`` hold what the other program gives it, as far as known."""

    path: str
    module: nn.Module
    call: int
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Shadow:
    """What a tensor would be had the operations before it had the other program's numbers.

    Attributes:
        value: computed from the last tensors in which both programs agreed.
        doubtful: the same, computed from the other program's last tensor, which did not agree; None if there is none.
        since: the calls whose operations are between the last tensors that both have and this one, in order.
        points: numbers of the places on the way since the programs last agreed, the first of which did not.
        met: names of the other program's tensors that this very tensor was compared with.
    """

    value: Tensor
    doubtful: Tensor | None = None
    since: tuple[Frame, ...] = ()
    points: tuple[int, ...] = ()
    met: tuple[str, ...] = ()

    @property
    def latest(self) -> Tensor:
        """``doubtful``, or ``value`` where there is none."""
        return self.value if self.doubtful is None else self.doubtful


def shadow_of(value: object) -> Shadow | None:
    """Of a tensor that depends on the model's inputs."""
    return getattr(value, "_edgeattn_shadow", None) if isinstance(value, Tensor) else None


def set_shadow(tensor: Tensor, shadow: Shadow) -> None:
    """Give a tensor its shadow, which lives as long as it does."""
    tensor._edgeattn_shadow = shadow  # type: ignore[attr-defined]


def shadowed(value: Any) -> Any:
    """Arguments with the shadows' values in the place of tensors."""
    return tree_map(lambda leaf: leaf if (found := shadow_of(leaf)) is None else found.value, value)


def _joined(parts: list[Any]) -> tuple[Any, ...]:
    joined: list[Any] = []
    for part in parts:
        joined += [item for item in part if item not in joined]
    return tuple(joined)


class ShadowMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes the shadow of every tensor that an operation makes; ``stack`` are the calls that run, innermost last."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack: list[Frame] = []
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation, up to three times."""
        kwargs = kwargs or {}
        leaves, form = tree_flatten((args, kwargs))
        shadows = [None if self.paused else shadow_of(leaf) for leaf in leaves]
        known = [shadow for shadow in shadows if shadow is not None]
        if not known:
            return func(*args, **kwargs)
        changes = bool(func._schema.is_mutable)

        def over(choose: Callable[[Shadow], Tensor], own: bool) -> Any:
            """The operation on other numbers; what it changes in place are copies, unless they are its own."""
            given = [
                (choose(shadow) if own else choose(shadow).clone())
                if changes and shadow is not None
                else choose(shadow)
                if shadow is not None
                else leaf.clone()
                if changes and isinstance(leaf, Tensor)
                else leaf
                for leaf, shadow in zip(leaves, shadows, strict=True)
            ]
            again, named = tree_unflatten(given, form)
            return func(*again, **named)

        doubtful = None
        if any(shadow.doubtful is not None for shadow in known):
            doubtful = over(lambda shadow: shadow.latest, own=False)
        value = over(lambda shadow: shadow.value, own=True)
        made = func(*args, **kwargs)
        since = _joined([s.since for s in known] + [self.stack[-1:]])
        points = _joined([s.points for s in known])
        others = tree_flatten(doubtful)[0] if doubtful is not None else []
        for i, (leaf, other) in enumerate(zip(tree_flatten(made)[0], tree_flatten(value)[0], strict=True)):
            if isinstance(leaf, Tensor):
                set_shadow(leaf, Shadow(other, others[i] if others else None, since, points))
        return made


class Walk:
    """Hooks that tell where the model is, while it runs with shadows.

    Args:
        enter, leave: called with the call and its tensors (those that go in, and that come out); they may set shadows.
    """

    def __init__(
        self,
        model: nn.Module,
        enter: Callable[[Frame, tuple[Tensor, ...]], None],
        leave: Callable[[Frame, tuple[Tensor, ...]], None],
    ) -> None:
        self._model, self._enter, self._leave = model, enter, leave
        self._mode = ShadowMode()
        self._calls: dict[str, int] = {}

    def _before(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            call = self._calls.get(path, 0)
            self._calls[path] = call + 1
            frame = Frame(path, module, call)
            self._quietly(self._enter, frame, (args, kwargs))
            frame.args, frame.kwargs = shadowed(args), shadowed(kwargs)
            if getattr(module, "inplace", False):
                frame.args = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, frame.args)
            self._mode.stack.append(frame)

        return hook

    def _after(self, _module: nn.Module, _args: Any, result: Any) -> None:
        self._quietly(self._leave, self._mode.stack.pop(), result)

    def _quietly(self, call: Callable[[Frame, tuple[Tensor, ...]], None], frame: Frame, held: Any) -> None:
        self._mode.paused = True
        try:
            call(frame, tuple(leaf for leaf in tree_flatten(held)[0] if isinstance(leaf, Tensor)))
        finally:
            self._mode.paused = False

    def run(self, inputs: tuple[Tensor, ...]) -> Any:
        """The model's result on inputs that have shadows."""
        handles = []
        for path, module in self._model.named_modules():
            handles.append(module.register_forward_pre_hook(self._before(path), with_kwargs=True))
            handles.append(module.register_forward_hook(self._after))
        try:
            with torch.inference_mode(), self._mode:
                return self._model(*inputs)
        finally:
            for handle in handles:
                handle.remove()
