"""What may have gone wrong at a place where two programs part, by evidence: a cause must reproduce what is there.

Each cause is tried on what the other program itself gives the module, so that errors before it do not count. Of those
that reproduce the other program's tensor the one is taken that leaves the least of the error.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeattn.core.numerics import Array
from edgeattn.pipeline.meeting import Met, distance

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgeattn.pipeline.shadow import Frame

#: Largest number in float16, and from where on a value is near it.
HALF_MAX = 65504.0
_NEAR_HALF = 0.9 * HALF_MAX
#: A cause is likely if it leaves less than this share of the error, sure if it leaves what both precisions allow.
_LIKELY = 0.1
#: Fewest numbers of a channel that a line through them is taken for more than a coincidence.
_FEWEST = 6
#: Most channels that a permutation is looked for of.
_MOST_CHANNELS = 4096
#: Most inputs of a linear map whose weight is looked for.
_MOST_INPUTS = 2048


@dataclass(frozen=True)
class Cause:
    """A likely cause.

    Attributes:
        name: "fp16 overflow", "bad scale", "permuted channels", "wrong padding", "transposed weight", "epsilon",
            "bias", "another formula", "another weight", "operation of its own" or "unknown".
        evidence: what speaks for it, in a sentence.
        confidence: "sure", "likely" or "none".
        fix: what to try.
        left: share of the error that the cause leaves unexplained.
    """

    name: str
    evidence: str
    confidence: str
    fix: str
    left: float = math.nan


_FIXES = {
    "fp16 overflow": "keep this module in float32, or scale its weights or inputs down before the conversion",
    "bad scale": "compare the scales and weights of this tensor with the model's; calibrate anew if it is quantized",
    "permuted channels": "look at the order of channels of this module's weights, and at concatenations before it",
    "wrong padding": "compare the padding on each side with the model's; a converter may have taken SAME for it",
    "transposed weight": "compare the layout of this weight with what the operation takes: (out, in) or (in, out)",
    "epsilon": "write the model's eps into the operation",
    "bias": "compare the bias with the model's; it may have been lost or fused twice",
    "another formula": "ask the converter for the model's formula, or write it out in the model",
    "another weight": "compare the weights of this operation with the checkpoint, and convert anew",
    "operation of its own": "look at the operations between this module's children: axes, scales, order of inputs",
    "unknown": "compare the operation's attributes and weights with the module's",
}


def _cause(name: str, evidence: str, left: float, limit: float, error: float) -> Cause:
    sure = left * error <= max(limit, 0.01 * error)
    return Cause(name, evidence, "sure" if sure else "likely", _FIXES[name], left)


def explain(met: Met, limit: float) -> Cause:
    """The likeliest cause of the error at a place.

    Args:
        limit: largest relative L2 of what is the same.
    """
    expected, actual = met.expected, met.actual
    if expected is None or actual is None:
        return _rest(met)
    lost = int(np.count_nonzero(~np.isfinite(actual) & np.isfinite(expected)))
    bound = np.abs(actual[np.isfinite(actual)]).max(initial=0.0)
    beyond = float(np.abs(expected[np.isfinite(expected)]).max(initial=0.0))
    if lost or (met.dtype == "float16" and bound >= _NEAR_HALF):
        half = met.dtype == "float16" or beyond > HALF_MAX or bound > _NEAR_HALF
        words = f"{lost} of {actual.size} values are not finite here" if lost else f"values reach {bound:g}"
        words += f"; the largest finite one is {bound:.4g}, the model's {beyond:.4g}, float16 ends at {HALF_MAX:g}"
        return Cause("fp16 overflow", words, "sure" if half and lost else "likely", _FIXES["fp16 overflow"], 0.0)
    error = distance(expected, actual)
    found = [*_by_module(met, actual), *_by_values(expected.astype(np.float64), actual.astype(np.float64))]
    shares = [distance(made, actual) / error for _, _, made in found]
    least = min(shares, default=1.0)
    if least < _LIKELY:
        # The first of those that explain about as much as the best one does.
        at = next(i for i, share in enumerate(shares) if share <= max(3 * least, min(limit / error, _LIKELY / 3)))
        return _cause(*found[at][:2], shares[at], limit, error)
    border = _border(expected, actual)
    if border:
        return Cause("wrong padding", border, "likely", _FIXES["wrong padding"])
    return _weight(met, actual) or _rest(met)


def _rest(met: Met) -> Cause:
    name = met.blamed
    inner = next((f for f in met.frames if f.path == name), None)
    if inner is not None and any(True for _ in inner.module.children()):
        words = "given this program's own tensors the children are right; what stands between them is not"
        return Cause("operation of its own", words, "likely", _FIXES["operation of its own"])
    return Cause("unknown", "none of the usual causes reproduces these values", "none", _FIXES["unknown"])


Found = tuple[str, str, Array]


def _by_values(expected: Array, actual: Array) -> Iterator[Found]:
    """What can be told from the tensors alone: (cause, evidence, what it would make of the expected tensor)."""
    scale = float((expected * actual).sum() / max((expected * expected).sum(), 1e-300))
    yield "bad scale", f"all values are {scale:.4g} times the model's", scale * expected
    low, high = float(actual.min()), float(actual.max())
    ends = np.mean((actual == low) | (actual == high))
    if ends > 0.01 and high > low:
        clipped = np.clip(expected, low, high)
        yield "bad scale", f"values saturate: {ends:.1%} of them are at {low:.4g} or {high:.4g}", clipped
    levels = np.unique(actual)
    if 2 < len(levels) <= 256 and len(levels) * 4 < actual.size:
        step = float(np.diff(levels).min())
        coarse = np.clip(np.rint(expected / step) * step, low, high)
        yield "bad scale", f"only {len(levels)} different values, {step:.4g} apart", coarse
    axes = [axis for axis in dict.fromkeys((1 if expected.ndim > 3 else expected.ndim - 1, 1)) if axis < expected.ndim]
    for axis in axes:
        a, b = (np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1) for x in (expected, actual))
        order = _permutation(a, b)
        if order is not None:
            moved = a[order] + (b.mean(1) - a.mean(1)[order])[:, None]  # the bias may not have moved along
            yield "permuted channels", f"along axis {axis}: {_moves(order)}", _back(moved, axis, expected.shape)
        if a.shape[1] >= _FEWEST:
            yield from _lines(a, b, axis, expected.shape)


def _moves(order: Array) -> str:
    """A permutation in words."""
    moved = np.flatnonzero(order != np.arange(len(order)))
    return ", ".join(f"{i} holds {order[i]}" for i in moved[:6]) + (" …" if len(moved) > 6 else "")


def _back(rows: Array, axis: int, shape: tuple[int, ...]) -> Array:
    """Rows, one for each index of an axis, as a tensor of that shape."""
    made: Array = np.moveaxis(rows.reshape(shape[axis], *shape[:axis], *shape[axis + 1 :]), 0, axis)
    return made


def _permutation(a: Array, b: Array) -> Array | None:
    """For each row of ``b`` the row of ``a`` that it follows but for an offset, if that moves some and loses none."""
    count, length = a.shape
    if not 4 <= count <= _MOST_CHANNELS:
        return None
    own = np.arange(count)
    if length > 2:
        a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    apart = (b**2).sum(1)[:, None] + (a**2).sum(1)[None] - 2 * b @ a.T
    nearest = np.argmin(apart, axis=1)
    stays = apart[own, own] <= 1e-3 * (b**2).sum(1) + 1e-9 * (a**2).sum(1).max()
    order: Array = np.where(stays, own, nearest)
    return None if len(np.unique(order)) < count or np.array_equal(order, own) else order


def _lines(a: Array, b: Array, axis: int, shape: tuple[int, ...]) -> Iterator[Found]:
    """Whether each channel is a factor times the model's and an offset, without zeros that a ReLU may have made."""
    count = a.shape[1]
    weights = np.ones_like(a)
    if np.mean((a == 0) & (b == 0)) > 0.1:
        weights = ((a != 0) & (b != 0)).astype(float)
    total = np.maximum(weights.sum(1), 1)
    mean_a, mean_b = (weights * a).sum(1) / total, (weights * b).sum(1) / total
    spread = (weights * (a - mean_a[:, None]) ** 2).sum(1)
    factor = (weights * (a - mean_a[:, None]) * (b - mean_b[:, None])).sum(1) / np.maximum(spread, 1e-300)
    factor = np.where(spread > 1e-12 * (a**2).sum(1).max(initial=1e-300), factor, 1.0)
    offset = mean_b - factor * mean_a

    def back(made: Array) -> Array:
        return _back(np.where(weights > 0, made, b), axis, shape)

    off = (mean_b - mean_a)[:, None]
    largest = int(np.argmax(np.abs(off)))
    many = int(np.count_nonzero(np.abs(off) > 1e-3 * np.abs(off).max()))
    yield (
        "bias",
        f"{many} of {len(a)} channels are off by a constant, channel {largest} by {float(off[largest, 0]):.4g}",
        back(a + off),
    )
    if count >= 2 * _FEWEST:
        wrong = np.flatnonzero(np.abs(factor - 1) > 1e-3 + 0.02 * np.abs(factor - 1).max())
        same = len(wrong) == len(a) and np.ptp(factor) < 1e-2 * np.abs(factor).max()
        words = (
            f"all channels are {float(np.median(factor)):.4g} times the model's, around an offset"
            if same
            else f"{len(wrong)} of {len(a)} channels are scaled: "
            + ", ".join(f"channel {i} by {factor[i]:.4g}" for i in wrong[:4])
        )
        yield "bad scale", words, back(factor[:, None] * a + offset[:, None])


def _border(expected: Array, actual: Array) -> str:
    """In words, if the error of an image is at its border alone."""
    if expected.ndim != 4 or min(expected.shape[2:]) < 5:
        return ""
    wrong = np.square(actual.astype(np.float64) - expected).sum(axis=(0, 1))
    for width in range(1, min(4, (min(wrong.shape) - 1) // 2)):
        inside = wrong[width:-width, width:-width].sum()
        if inside <= 1e-4 * wrong.sum():
            return f"the error is within {width} pixels of the border alone"
    return ""


def _run(module: nn.Module, frames: Sequence[Frame], start: int, call: Callable[..., Any]) -> Array | None:
    """What a chain of modules makes of the input of its first, computed by ``call`` instead of ``module``."""
    import torch

    first = frames[start]
    try:
        with torch.inference_mode():
            value = call(*first.args, **first.kwargs)
            for frame in frames[start + 1 :]:
                rest = frame.args[1:]
                if frame.kwargs or any(isinstance(item, torch.Tensor) for item in rest):
                    return None
                value = frame.module(value, *rest)
            return value.numpy() if isinstance(value, torch.Tensor) else None
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return None


def _by_module(met: Met, actual: Array) -> Iterator[Found]:
    """What the module makes of this program's inputs with one thing about it changed."""
    path = met.blamed
    frames = [f for f in met.frames if not any(True for _ in f.module.children())]
    start = next((i for i, f in enumerate(frames) if f.path == path), None)
    if start is None or not met.output:
        return
    module = frames[start].module
    plain = _run(module, frames, start, module)
    if plain is None or plain.shape != actual.shape or met.expected is None or distance(met.expected, plain) > 1e-4:
        return
    changes = [*_weights(module), *_orders(module, plain, actual), *_paddings(module), *_formulas(module)]
    for name, words, call in changes:
        made = _run(module, frames, start, call)
        if made is not None and made.shape == actual.shape:
            yield name, words, made
    if start == len(frames) - 1:
        yield from _scaled(module, lambda call: _run(module, frames, start, call), plain, actual)
    yield from _epsilons(module, lambda call: _run(module, frames, start, call), actual)


Changed = tuple[str, str, Any]


def _with(module: nn.Module, **changes: Any) -> nn.Module:
    """A copy of a module with other attributes or parameters; the others are shared."""
    made = copy.copy(module)
    made.__dict__ = {**module.__dict__, "_parameters": dict(module._parameters)}
    for name, value in changes.items():
        if name in made._parameters:
            made._parameters[name] = value
        else:
            made.__dict__[name] = value
    return made


def _stored(module: nn.Module, name: str, weight: Tensor) -> nn.Module:
    """A copy of a module with another parameter."""
    from torch import nn

    return _with(module, **{name: nn.Parameter(weight.contiguous(), requires_grad=False)})


def _weights(module: nn.Module) -> Iterator[Changed]:
    """Other readings of the weights' numbers."""
    import torch

    for name, weight in module.named_parameters(recurse=False):
        shape = tuple(weight.shape)
        if weight.ndim >= 2:
            turned = weight.transpose(0, 1)
            if turned.shape == weight.shape:
                if not torch.equal(turned, weight):
                    words = f"{name} {shape} reproduces it with its first two axes swapped"
                    yield "transposed weight", words, _stored(module, name, turned)
            else:
                words = f"{name} {shape} reproduces it read as {tuple(turned.shape)}"
                yield "transposed weight", words, _stored(module, name, turned.reshape(shape))
                read = weight.reshape(turned.shape).transpose(0, 1)
                yield "transposed weight", words, _stored(module, name, read)
        if weight.ndim == 4 and max(shape[2:]) > 1:
            if shape[2] == shape[3]:
                words = f"{name} {shape} reproduces it with height and width of its kernels swapped"
                yield "transposed weight", words, _stored(module, name, weight.transpose(2, 3))
            words = f"{name} {shape} reproduces it with its kernels turned by 180 degrees"
            yield "transposed weight", words, _stored(module, name, weight.flip(2, 3))
    if getattr(module, "bias", None) is not None and isinstance(module.bias, torch.nn.Parameter):
        yield "bias", "it is reproduced without a bias", _stored(module, "bias", module.bias * 0)


def _scaled(
    module: nn.Module, run: Callable[[Callable[..., Any]], Array | None], plain: Array, actual: Array
) -> Iterator[Found]:
    """The module with all of its weight times a factor, and the same bias."""
    import torch

    bias = getattr(module, "bias", None)
    part = run(_stored(module, "bias", bias * 0)) if isinstance(bias, torch.nn.Parameter) else None
    if part is not None and part.shape == actual.shape:
        factor = float((part * (actual - plain + part)).sum() / max(float((part * part).sum()), 1e-30))
        yield "bad scale", f"it is reproduced with {factor:.4g} times the weight", plain + (factor - 1) * part


def _orders(module: nn.Module, plain: Array, actual: Array) -> Iterator[Changed]:
    """The weight's output channels in the order in which the values are like them, also behind an activation."""
    import torch

    weight = getattr(module, "weight", None)
    axis = 1 if plain.ndim == 4 else plain.ndim - 1
    if not isinstance(weight, torch.Tensor) or len(weight) != plain.shape[axis]:
        return
    a, b = (np.moveaxis(x.astype(np.float64), axis, 0).reshape(len(weight), -1) for x in (plain, actual))
    a, b = (x - x.mean(1, keepdims=True) for x in (a, b))
    size = np.linalg.norm(a, axis=1)[None] * np.linalg.norm(b, axis=1)[:, None]
    likeness = (b @ a.T) / np.maximum(size, 1e-300)
    own = np.arange(len(weight))
    still = (likeness[own, own] > 0.999) | (np.linalg.norm(b, axis=1) <= 1e-9 * size.max() ** 0.5)
    order = np.where(still, own, likeness.argmax(1))
    if len(np.unique(order)) == len(own) and not np.array_equal(order, own):
        words = f"it is reproduced with the weight's output channels in another order: {_moves(order)}"
        yield "permuted channels", words, _stored(module, "weight", weight[torch.from_numpy(order)])


def _paddings(module: nn.Module) -> Iterator[Changed]:
    """The same padding in all, split otherwise between both ends, or filled otherwise."""
    import torch
    from torch.nn import functional as F

    if not isinstance(module, (torch.nn.Conv2d, torch.nn.MaxPool2d, torch.nn.AvgPool2d)):
        return
    if isinstance(module.padding, str):
        return
    pads: Any = module.padding
    high, wide = (pads, pads) if isinstance(pads, int) else pads
    if not (high or wide):
        return
    bare = _with(module, padding=(0, 0), **({"padding_mode": "zeros"} if hasattr(module, "padding_mode") else {}))
    fill = -math.inf if isinstance(module, torch.nn.MaxPool2d) else 0.0

    def padded(left: int, right: int, top: int, bottom: int, mode: str, number: float = 0.0) -> Callable[..., Tensor]:
        def call(x: Tensor) -> Tensor:
            extra = {"value": number} if mode == "constant" else {}
            given = F.pad(x, (left, right, top, bottom), mode=mode, **extra)
            made: Tensor = bare(given)
            return made

        return call

    for top in range(2 * high + 1):
        for left in range(2 * wide + 1):
            if (top, left) != (high, wide):
                words = f"it is reproduced by {top} rows above, {2 * high - top} below, {left} columns on the left, "
                words += f"{2 * wide - left} on the right, where the model has {high} and {wide}"
                yield (
                    "wrong padding",
                    words,
                    padded(left, 2 * wide - left, top, 2 * high - top, "constant", fill),
                )
    for mode in ("replicate", "reflect", "circular"):
        yield (
            "wrong padding",
            f"it is reproduced by padding of the kind {mode}",
            padded(wide, wide, high, high, mode),
        )


def _formulas(module: nn.Module) -> Iterator[Changed]:
    """Other formulas that go by the same name."""
    import torch
    from torch.nn import functional as F

    if isinstance(module, torch.nn.GELU):
        other = "none" if module.approximate == "tanh" else "tanh"
        yield "another formula", f"it is reproduced by GELU of the approximation {other}", torch.nn.GELU(other)
    if isinstance(module, (torch.nn.Softmax, torch.nn.LogSoftmax)):
        for dim in range(4):
            if dim != module.dim:
                yield "another formula", f"it is reproduced over axis {dim}, not {module.dim}", _with(module, dim=dim)
    names = "ReLU ReLU6 GELU SiLU Hardswish Sigmoid Hardsigmoid Tanh LeakyReLU ELU Identity"
    kinds: tuple[type[nn.Module], ...] = tuple(getattr(torch.nn, name) for name in names.split())
    if isinstance(module, kinds):
        for kind in kinds:
            if not isinstance(module, kind):
                yield "another formula", f"it is reproduced by {kind.__name__}", kind()
        yield "another formula", "it is reproduced by a squared ReLU", lambda x: F.relu(x).square()


def _epsilons(module: nn.Module, run: Callable[[Callable[..., Any]], Array | None], actual: Array) -> Iterator[Found]:
    """The module with the epsilon that fits best."""
    for name in ("eps", "epsilon", "variance_epsilon"):
        own = getattr(module, name, None)
        if not isinstance(own, float):
            continue

        def tried(power: float, name: str = name) -> tuple[float, Array | None]:
            made = run(_with(module, **{name: 10.0**power}))
            fits = made is not None and made.shape == actual.shape
            return (distance(made, actual) if fits and made is not None else math.inf), made

        powers = [half / 2 for half in range(-28, 7)]
        at = min(powers, key=lambda power: tried(power)[0])
        low, high = at - 0.5, at + 0.5
        for _ in range(40):  # golden section
            left, right = high - 0.618034 * (high - low), low + 0.618034 * (high - low)
            if tried(left)[0] <= tried(right)[0]:
                high = right
            else:
                low = left
        error, made = tried((low + high) / 2)
        if made is not None and math.isfinite(error):
            yield (
                "epsilon",
                f"it is reproduced with {name} {10 ** ((low + high) / 2):.3g}, the model's is {own:.3g}",
                made,
            )


def _rows(module: nn.Module, x: Tensor, y: Array) -> tuple[Array, Array] | None:
    """What the outputs (N, channels) of a linear map are computed from, (N, inputs), and they; None if it is no map.

    Inputs of a convolution are in the order of its weight: channels, then places of the kernel.
    """
    import torch
    from torch.nn import functional as F

    if isinstance(module, torch.nn.Linear):
        return x.numpy().reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    plain = isinstance(module, torch.nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros"
    if not plain or not isinstance(module, torch.nn.Conv2d) or isinstance(module.padding, str) or x.ndim != 4:
        return None
    columns = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)  # type: ignore[arg-type]
    return columns.transpose(1, 2).reshape(-1, columns.shape[1]).numpy(), np.moveaxis(y, 1, -1).reshape(-1, y.shape[1])


def _weight(met: Met, actual: Array) -> Cause | None:
    """Whether a linear map or a convolution with another weight reproduces the values: by least squares."""
    import torch

    frame = next((f for f in met.frames if f.path == met.blamed), None)
    if frame is None or len(met.frames) != 1 or not frame.args or not isinstance(frame.args[0], torch.Tensor):
        return None
    found = _rows(frame.module, frame.args[0], actual)
    if found is None or len(found[0]) < found[0].shape[1] + 2 or found[0].shape[1] > _MOST_INPUTS:
        return None
    rows, wanted = (part.astype(np.float64) for part in found)
    rows = np.hstack([rows, np.ones((len(rows), 1))])
    solved, *_ = np.linalg.lstsq(rows, wanted, rcond=None)
    if distance(wanted, rows @ solved) > 1e-3:
        return None
    own = frame.module.weight
    assert isinstance(own, torch.Tensor)
    weight = own.detach().numpy().astype(np.float64)
    weight = weight.reshape(*weight.shape[:2], -1).swapaxes(0, 1).reshape(weight.shape[1], -1)
    other = solved[:-1].reshape(len(weight), -1, wanted.shape[1]).swapaxes(1, 2).reshape(len(weight), -1)
    order = _permutation(weight, other)
    if order is not None and distance(weight[order], other) < 0.05:
        words = f"input channels of the weight: {_moves(order)}"
        return Cause("permuted channels", words, "likely", _FIXES["permuted channels"])
    words = f"another weight reproduces it: relative L2 {distance(weight, other):.3g} from the model's"
    return Cause("another weight", words, "likely", _FIXES["another weight"])
