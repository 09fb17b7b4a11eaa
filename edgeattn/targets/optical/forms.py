"""Convolutions and linear layers as what a correlator computes: maps, kernels that convolve them, wanted values.

Tensors keep their gradients on the way to the planes and back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from edgeattn.targets.optical.schedule import Pair, Workload, plain

Numbers = Sequence[int]


@dataclass(frozen=True)
class Layout:
    """How electronics bring a tensor onto the planes and back, as plain data.

    Attributes:
        kind: ``conv``, of (B, C, *spatial); or ``linear``, over ``axis`` of a tensor.
        groups, channels: that the maps are told apart by. spatial: dimensions of a convolution's input.
        before, after: zeros around a map, (down, right); less than none are values left away. spread: distance of its
            values, with zeros between.
        map, out: pixels of a map as it is shown, and of a result, (down, right).
        pieces: that a map too large for the plane is shown in, rows of their own; 1 where it is not. step: from one to
            the next. whole: pixels of the result of all pieces.
        axis: of a linear layer, from the end; its values fill ``channels`` maps one after the other.
    """

    kind: str
    groups: int
    channels: int
    map: Pair
    out: Pair
    spatial: int = 2
    before: Pair = (0, 0)
    after: Pair = (0, 0)
    spread: Pair = (1, 1)
    pieces: Pair = (1, 1)
    step: Pair = (1, 1)
    whole: Pair = (1, 1)
    axis: int = -1

    def maps(self, x: Tensor) -> Tensor:
        """A tensor as maps (rows, groups, channels, M1, M2)."""
        pad = torch.nn.functional.pad
        if self.kind == "linear":
            x = x.movedim(self.axis, -1)
            flat = x.reshape(-1, x.shape[-1])
            flat = pad(flat, (0, self.channels * math.prod(self.map) - flat.shape[1]))
            return flat.reshape(len(flat), 1, self.channels, *self.map)
        x = x.reshape(len(x), self.groups, self.channels, *([1] * (2 - self.spatial)), *x.shape[2:])
        if self.spread != (1, 1):
            sizes = [(n - 1) * step + 1 for n, step in zip(x.shape[3:], self.spread, strict=True)]
            wide = x.new_zeros(*x.shape[:3], *sizes)
            wide[..., :: self.spread[0], :: self.spread[1]] = x
            x = wide
        x = pad(x, (self.before[1], self.after[1], self.before[0], self.after[0]))
        if self.pieces == (1, 1):
            return x
        x = x.unfold(3, self.map[0], self.step[0]).unfold(4, self.map[1], self.step[1])
        return x.permute(0, 3, 4, 1, 2, 5, 6).flatten(0, 2)

    def result(self, y: Tensor, shape: Numbers) -> Tensor:
        """Outputs (rows, groups, kernels, out1, out2) as the operation gives them, for an input of ``shape``."""
        if self.kind == "linear":
            kept = list(shape)
            del kept[self.axis]
            return y.reshape(*kept, y.shape[2]).movedim(-1, self.axis)
        if self.pieces != (1, 1):
            y = y.reshape(-1, *self.pieces, *y.shape[1:]).permute(0, 3, 4, 1, 5, 2, 6)
            y = y.flatten(3, 4).flatten(4, 5)[..., : self.whole[0], : self.whole[1]]
        return y.reshape(len(y), y.shape[1] * y.shape[2], *self.whole[2 - self.spatial :])

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Layout:
        """The inverse of ``as_dict``."""
        return Layout(**plain(data))


@dataclass(frozen=True)
class Form:
    """An operation for a correlator.

    Attributes:
        work: what is to be convolved. layout: of its input and output.
        dilation: distance of a kernel's taps. transposed: of a transposed convolution.
    """

    work: Workload
    layout: Layout
    dilation: Pair = (1, 1)
    transposed: bool = False

    def kernels(self, weight: Tensor) -> Tensor:
        """Weights as they convolve, (groups, kernels, channels, N1, N2).

        Args:
            weight: of a convolution as PyTorch and ONNX have it; (outputs, inputs) of a linear layer.
        """
        work = self.work
        if self.layout.kind == "linear":
            full = work.channels * math.prod(work.map)
            filled = torch.nn.functional.pad(weight, (0, full - weight.shape[1]))
            return filled.reshape(1, work.kernels, work.channels, *work.map).flip(-2, -1)
        taps = [*([1] * (4 - weight.ndim)), *weight.shape[2:]]
        kernels = weight.reshape(work.groups, -1, weight.shape[1], *taps)
        # A convolution of deep learning is a correlation; a transposed one convolves.
        kernels = kernels.transpose(1, 2) if self.transposed else kernels.flip(-2, -1)
        if self.dilation == (1, 1):
            return kernels
        wide = kernels.new_zeros(*kernels.shape[:3], *work.kernel)
        wide[..., :: self.dilation[0], :: self.dilation[1]] = kernels
        return wide


def conv_form(
    name: str,
    shape: Numbers,
    weight: Numbers,
    out: Numbers,
    stride: Numbers,
    padding: Numbers,
    dilation: Numbers,
    groups: int,
    transposed: bool,
    plane: Pair,
) -> Form:
    """A convolution of one or two dimensions.

    A map that is too large for the plane is shown in pieces that overlap as far as the kernel reaches.

    Args:
        shape, weight, out: of input (B, C, *spatial), of the weights, and of the output.
        stride, padding, dilation: a number for each dimension; the padding is that before a map.
    """
    spatial = len(shape) - 2
    ones, none = [1] * (2 - spatial), [0] * (2 - spatial)
    stride, steps, begins = [*ones, *stride], [*ones, *dilation], [*none, *padding]
    sizes, outs, taps = [*ones, *shape[2:]], [*ones, *out[2:]], [*ones, *weight[2:]]
    reach = [(n - 1) * d + 1 for n, d in zip(taps, steps, strict=True)]
    spread = [1, 1]
    if transposed:  # a full convolution of the input with zeros between its values, of which the edges are cut
        spread, stride = list(stride), [1, 1]
        sizes = [(m - 1) * s + 1 for m, s in zip(sizes, spread, strict=True)]
        start = list(begins)
        kernels, channels = weight[1], weight[0] // groups
        macs = math.prod(shape) * weight[1] * math.prod(taps)
    else:
        start = [n - 1 - p for n, p in zip(reach, begins, strict=True)]
        kernels, channels = weight[0] // groups, weight[1]
        macs = math.prod(out) * weight[1] * math.prod(taps)
    raw = list(sizes)
    # Where values are wanted that even the full convolution does not reach, the map has zeros around it.
    before = [max(0, -a) for a in start]
    start = [max(0, a) for a in start]
    full = [m + b + n - 1 for m, b, n in zip(sizes, before, reach, strict=True)]
    last = [a + (o - 1) * s + 1 for a, o, s in zip(start, outs, stride, strict=True)]
    after = [max(0, end - have) for end, have in zip(last, full, strict=True)]
    sizes = [m + b + a for m, b, a in zip(sizes, before, after, strict=True)]
    whole, pieces, step = _pair(outs), [1, 1], [1, 1]
    for i, (m, n, a, o, s) in enumerate(zip(sizes, reach, start, whole, stride, strict=True)):
        if max(m, a + (o - 1) * s + 1, m + n - 1 - a) <= plane[i] or n > plane[i]:
            continue
        pieces[i] = -(-o // ((plane[i] - n) // s + 1))
        outs[i] = -(-o // pieces[i])
        sizes[i], step[i] = (outs[i] - 1) * s + n, outs[i] * s
        before[i] += n - 1 - a
        after[i] = (pieces[i] - 1) * step[i] + sizes[i] - before[i] - raw[i]
        start[i] = n - 1
    map_, kernel, first, wanted, apart = (_pair(each) for each in (sizes, reach, start, outs, stride))
    rows = shape[0] * math.prod(pieces)
    work = Workload(name, rows, groups, channels, kernels, map_, kernel, first, wanted, apart, macs)
    around = _pair(before), _pair(after), _pair(spread)
    layout = Layout("conv", groups, channels, map_, wanted, spatial, *around, _pair(pieces), _pair(step), whole)
    return Form(work, layout, _pair(steps), transposed)


def linear_form(name: str, shape: Numbers, outputs: int, axis: int, plane: Pair) -> Form:
    """A matrix times a tensor of ``shape``, along ``axis`` (from the end).

    A vector is laid out as a map, as square as can be, and so is every row of the matrix: the one value of their valid
    convolution is a dot product. What a plane cannot hold is shown as several maps whose products are summed.
    """
    inputs = shape[axis]
    channels = -(-inputs // math.prod(plane))
    each = -(-inputs // channels)
    down = min(math.isqrt(max(each - 1, 0)) + 1, plane[0])
    right = min(-(-each // down), plane[1])
    down = -(-each // right)
    rows = math.prod(shape) // inputs
    size = (down, right)
    first = (down - 1, right - 1)
    work = Workload(name, rows, 1, channels, outputs, size, size, first, (1, 1), macs=rows * outputs * inputs)
    return Form(work, Layout("linear", 1, channels, size, (1, 1), axis=axis))


def _pair(values: Numbers) -> Pair:
    down, right = values
    return int(down), int(right)
