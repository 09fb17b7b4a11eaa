"""Any PyTorch model through simulated planes, with gradients: to see what a device does to it, and to tune it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from edgeattn.device import Effects, Optics
from edgeattn.targets.optical.convolve import Convolver
from edgeattn.targets.optical.forms import Form, conv_form, linear_form

#: Functions whose work goes to the optics, and how many spatial dimensions they have; 0 for a linear layer.
_TAKEN: dict[Any, tuple[int, bool]] = {
    F.linear: (0, False),
    F.conv1d: (1, False),
    F.conv2d: (2, False),
    F.conv_transpose1d: (1, True),
    F.conv_transpose2d: (2, True),
}


class through(TorchFunctionMode):
    """Inside of it, convolutions and linear layers of any model are computed on planes.

    ::

        with through(device.resolve("optical-4f-lcos-1khz").optics):
            loss = criterion(model(x), y)
        loss.backward()

    What rounds or is random passes gradients straight through. Planes are those that the optics and the effects say;
    tensors must be float32 and on the CPU.

    Args:
        effects: those of the optics where none are given.
    """

    def __init__(self, optics: Optics, effects: Effects | None = None) -> None:
        super().__init__()
        self._optics = optics
        self._effects = effects or optics.effects
        self._generator = torch.Generator().manual_seed(self._effects.seed)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """See ``TorchFunctionMode``: one of ``_TAKEN`` is computed here, everything else as ever."""
        given = dict(kwargs or {})
        if func not in _TAKEN:
            return func(*args, **given)
        spatial, transposed = _TAKEN[func]
        if spatial == 0:
            return self._linear(*args, **given)
        return self._conv(func, spatial, transposed, *args, **given)

    def _compute(self, form: Form, x: Tensor, weight: Tensor) -> Tensor:
        convolver = Convolver(form.kernels(weight), form.work, self._optics, self._effects, self._generator)
        return form.layout.result(convolver(form.layout.maps(x)), x.shape)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        form = linear_form("", input.shape, len(weight), -1, (self._optics.rows, self._optics.cols))
        y = self._compute(form, input, weight)
        return y if bias is None else y + bias

    def _conv(
        self,
        func: Callable[..., Any],
        spatial: int,
        transposed: bool,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        *rest: Any,
        **named: Any,
    ) -> Tensor:
        # The order of the last arguments differs: dilation and groups of a convolution; output padding first, then
        # groups and dilation of a transposed one.
        names = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
        named = {**dict(zip(names, rest, strict=False)), **named}
        # Shapes and the words for padding are PyTorch's own business.
        out = func(
            input.detach().to("meta"), weight.detach().to("meta"), None, stride=stride, padding=padding, **named
        ).shape
        each = {"stride": stride, "padding": padding, "dilation": named.get("dilation", 1)}
        if padding == "valid":
            each["padding"] = 0
        steps = {name: [value] * spatial if isinstance(value, int) else value for name, value in each.items()}
        if padding == "same":
            reach = [(n - 1) * d for n, d in zip(weight.shape[2:], steps["dilation"], strict=True)]
            steps["padding"] = [n // 2 for n in reach]
        form = conv_form(
            "",
            input.shape,
            weight.shape,
            out,
            **steps,
            groups=named.get("groups", 1),
            transposed=transposed,
            plane=(self._optics.rows, self._optics.cols),
        )
        y = self._compute(form, input, weight)
        return y if bias is None else y + bias.reshape(-1, *[1] * spatial)
