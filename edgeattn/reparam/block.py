"""What a rule works with: the model under work (Site), and what it proposes (Block)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from edgeattn.reparam.proof import NotFused
from edgeattn.reparam.trace import Call, Inputs, Record, run, trace

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

#: Spatial side that is kept of a recorded activation beside what the block's kernels reach: cheap in float64.
CROP = 8


class Refused(Exception):
    """Why a place cannot be fused, in words for the report."""


class NotRunnable(Refused):
    """The training form of a block does not run on the recorded arguments: perhaps not on a crop of them."""


@dataclass(eq=False)
class Block:
    """A proposed fusion. Nothing of the model changes until its proof holds.

    Attributes:
        path: where, in the training form.
        rule: name of the rule.
        modules: paths of all modules that take part.
        entry: the module whose call begins the block; its arguments are the recorded activations.
        before: the training form, runnable on the arguments of ``entry``.
        fuse: makes the deploy form out of a copy of ``before``, which it may change or consume; ``Refused`` if not.
        pairs: given the deploy form, the (old, new) modules to exchange in the model.
        crop: axis of channels if a crop of the input along the others is as good as the whole, else None.
    """

    path: str
    rule: str
    modules: tuple[str, ...]
    entry: nn.Module
    before: nn.Module
    fuse: Callable[[nn.Module], nn.Module]
    pairs: Callable[[nn.Module], list[tuple[nn.Module, nn.Module]]]
    crop: Callable[[Tensor], int | None] = lambda x: None

    def cropped(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """A copy of the middle of the recorded arguments; of all of them where no crop may be taken."""
        tensors = [value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)]
        axis = self.crop(tensors[0]) if len(tensors) == 1 else None
        if axis is None:
            return self.whole(args, kwargs)
        side = max(CROP, reach(self.before))
        return _copied(lambda x: crop(x, axis, side), (args, kwargs))

    def whole(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """A copy of all of the recorded arguments."""
        return _copied(lambda x: x, (args, kwargs))


@dataclass(frozen=True)
class Rule:
    """One kind of fusion: ``propose`` yields what could be fused at a site, and what could not with the reason."""

    name: str
    propose: Callable[[Site], Iterable[Block | NotFused]]


@dataclass(eq=False)
class Site:
    """The model under work, its inputs, and the dataflow of its current state (recorded only when a rule asks).

    Attributes:
        rejected: (rule, path) of blocks that were tried and rolled back.
        shared: the model under work has the parameters of the one that was given.
    """

    model: nn.Module
    inputs: Inputs
    seed: int
    rejected: set[tuple[str, str]] = field(default_factory=set)
    shared: bool = False

    @cached_property
    def record(self) -> Record:
        """One recorded forward of the current model."""
        return trace(self.model, self.inputs, self.seed)

    @cached_property
    def outputs(self) -> Any:
        """What the current model returns, from a plain forward."""
        return run(self.model, self.inputs, self.seed)

    @cached_property
    def paths(self) -> Mapping[nn.Module, str]:
        """The first path of every module; the model itself is ``(model)``."""
        return {module: path or "(model)" for path, module in self.model.named_modules()}

    @cached_property
    def owners(self) -> Mapping[int, list[str]]:
        """Paths of the parameters by the memory they live in: more than one path means shared weights."""
        found: dict[int, list[str]] = {}
        for path, parameter in self.model.named_parameters(remove_duplicate=False):
            found.setdefault(parameter.untyped_storage().data_ptr(), []).append(path)
        return found

    def exchange(self, pairs: Iterable[tuple[nn.Module, nn.Module]]) -> Callable[[], None]:
        """Put new modules in the place of old ones, wherever these are registered; returns what undoes it."""
        new = dict(pairs)
        for module in new.values():
            for part in module.modules():
                part.training = False
        replaced: list[tuple[nn.Module, str, nn.Module]] = []
        for parent in list(self.model.modules()):
            for name, child in parent._modules.items():
                if child in new:
                    replaced.append((parent, name, child))
                    parent._modules[name] = new[child]
        model = self.model
        self._become(new.get(model, model))

        def undo() -> None:
            for parent, name, child in replaced:
                parent._modules[name] = child
            self._become(model)

        return undo

    def _become(self, model: nn.Module) -> None:
        self.model = model
        for name in ("record", "outputs", "paths", "owners"):
            self.__dict__.pop(name, None)

    def once(self, module: nn.Module) -> None:
        """Refuse unless the module has its own plain parameters and was called exactly once."""
        path, calls = self.paths[module], len(self.record.calls_of(module))
        if calls != 1:
            raise Refused(f"{path} was called {calls} times in the recorded forward")
        if module._forward_hooks or module._forward_pre_hooks:
            raise Refused(f"{path} has forward hooks (an old-style weight norm is one)")
        call = self.record.calls_of(module)[0]
        for name in ("weight", "bias"):
            parameter = getattr(module, name, None)
            if parameter is None:
                continue
            if name not in module._parameters:
                raise Refused(f"the {name} of {path} is computed (a parametrization), not a plain parameter")
            owners = self.owners[parameter.untyped_storage().data_ptr()]
            if len(owners) > 1:
                raise Refused(f"the {name} of {path} is shared: {', '.join(owners)}")
        self.alone(module, [call])

    def alone(self, module: nn.Module, calls: Sequence[Call]) -> None:
        """Refuse if a parameter of the module itself is read outside these calls."""
        for name, parameter in module.named_parameters(recurse=False):
            value = self.record.constant(parameter)
            readers = [] if value is None else self.record.readers(value)
            if any(op.call is None or not any(op.call.within(call) for call in calls) for op in readers):
                where = "its forward" if all(call.module is module for call in calls) else calls[0].path or "(model)"
                raise Refused(f"the {name} of {self.paths[module]} is also read outside {where}")


def _copied(form: Callable[[Tensor], Tensor], arguments: Arguments) -> Arguments:
    copied: Arguments = map_tensors(lambda x: form(x).detach().clone(), arguments)
    return copied


def reach(module: nn.Module) -> int:
    """A spatial side on which every tap of every kernel of ``module`` meets data, one layer behind the other."""
    spans = [1]
    for layer in module.modules():
        sizes, steps = getattr(layer, "kernel_size", 1), getattr(layer, "dilation", 1)
        sizes = sizes if isinstance(sizes, tuple) else (sizes,)
        steps = steps if isinstance(steps, tuple) else (steps,) * len(sizes)
        spans += [step * (size - 1) for size, step in zip(sizes, steps, strict=False) if isinstance(size, int)]
    return sum(spans)


def crop(x: Tensor, axis: int, side: int) -> Tensor:
    """The middle of ``x``: one batch element where there are other axes to crop, at most ``side`` along those."""
    for dim, size in enumerate(x.shape):
        keep = 1 if dim == 0 and x.ndim > 2 and axis != 0 else side
        if dim != axis and size > keep:
            x = x.narrow(dim, (size - keep) // 2, keep)
    return x


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply ``function`` to every tensor in nested arguments."""
    return torch.utils._pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)
