"""Parameters and multiply-accumulates of a model, counted from the operators that a forward pass runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


@dataclass(frozen=True)
class Cost:
    """What a forward pass costs.

    Args:
        parameters: elements of all parameters, shared ones once; buffers are not counted.
        macs: multiply-accumulates of convolutions, linear layers and matrix products (both of an attention included).
            Published "GFLOPs" of vision backbones are these, in units of 1e9. Element-wise work is not counted.
        by_module: the same MACs by the path of the innermost module that ran them ("" for the model itself), in order
            of first use; a module shared between places goes by its first path.
    """

    parameters: int
    macs: int
    by_module: dict[str, int]


def count(model: nn.Module, inputs: Tensor | Sequence[Any]) -> Cost:
    """Count ``model(*inputs)`` in eval mode; the model is left as it was.

    A model and inputs on the meta device are counted without computing anything.

    Args:
        model: any module.
        inputs: its positional arguments, or the only one.
    """
    args = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    counter = _Counter()
    with _eval_mode(model), no_fused_encoder(), counter.following(model), torch.no_grad(), counter:
        model(*args)
    return Cost(sum(p.numel() for p in model.parameters()), sum(counter.macs.values()), counter.macs)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds the MACs of each operator to the module that is running."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs: dict[str, int] = {}
        self._running: list[str] = [""]

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Keep the path of the running module at the end of ``_running``."""
        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._running.append(name)))
            handles.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self) -> None:
        self._running.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(func.overloadpacket)
        if rule is None:
            # In inference mode composite operators (linear, matmul, conv2d) arrive whole: look inside.
            with self:
                out = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if out is NotImplemented else out
        out = func(*args, **kwargs)
        path = self._running[-1]
        self.macs[path] = self.macs.get(path, 0) + rule(args, kwargs, out)
        return out


def _convolution(args: Sequence[Any], _kwargs: dict[str, Any], out: Tensor) -> int:
    x, weight, transposed = args[0], args[1], args[6]
    # A weight (Co, Ci / groups, k...) makes one output element; transposed, (Ci, Co / groups, k...) spreads one input.
    return int((x if transposed else out).numel() * weight[0].numel())


def _product(first: int) -> Callable[[Sequence[Any], dict[str, Any], Tensor], int]:
    """Matrix product of arguments ``first`` and ``first + 1``: (..., n, k) @ (..., k, m)."""

    def macs(args: Sequence[Any], _kwargs: dict[str, Any], _out: Tensor) -> int:
        a, b = args[first], args[first + 1]
        return int(a.numel() * (b.shape[-1] if b.ndim > 1 else 1))

    return macs


def _attention(args: Sequence[Any], _kwargs: dict[str, Any], _out: Any) -> int:
    """softmax(Q K^T) V, with Q (..., N, D), K (..., S, D), V (..., S, Dv); a causal mask saves nothing here."""
    q, k, v = args[:3]
    return int(math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1]))


_RULES: dict[Any, Callable[[Sequence[Any], dict[str, Any], Any], int]] = {
    aten.convolution: _convolution,
    aten.mm: _product(0),
    aten.bmm: _product(0),
    aten.mv: _product(0),
    aten.dot: _product(0),
    aten.addmm: _product(1),
    aten.addmv: _product(1),
    aten.baddbmm: _product(1),
    aten.addbmm: _product(1),
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention: _attention,
    aten._scaled_dot_product_efficient_attention: _attention,
    aten._scaled_dot_product_cudnn_attention: _attention,
}


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; every module's own mode back after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def no_fused_encoder() -> Iterator[None]:
    """Keep nn.MultiheadAttention and nn.TransformerEncoderLayer from running as one opaque operator."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
