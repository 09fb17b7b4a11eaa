"""Convolutions. Tensors are [N, C, *D] with one to three spatial dimensions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeattn.targets.coreml.mil.registry import Ints, op
from edgeattn.targets.coreml.mil.windows import borders, outermost_last


def _alike(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, which share a type, in that of x; the test first, since a needless conversion costs more."""
    if weight.dtype == x.dtype:
        return weight, bias
    return weight.to(x.dtype), None if bias is None else bias.to(x.dtype)


@op("conv")
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Ints | None = None,
    pad_type: str = "valid",
    pad: Ints | None = None,
    dilations: Ints | None = None,
    groups: int = 1,
) -> Tensor:
    """Convolution; weight [C_out, C_in / groups, *K], of another float type than x from iOS17 on."""
    ones = (1,) * (x.dim() - 2)
    strides, dilations = strides or ones, dilations or ones
    before, after = borders(pad_type, pad, x.shape[2:], weight.shape[2:], strides, dilations)
    none = (0,) * len(ones)
    if before != after:
        x, before = F.pad(x, outermost_last(before, after)), none
    weight, bias = _alike(x, weight, bias)
    return torch.convolution(x, weight, bias, strides, before, dilations, False, none, groups)


@op("conv_quantized")
def conv_quantized(
    x: Tensor,
    weight: Tensor,
    quantization_type: str,
    quant_scale: Tensor,
    quant_bias: Tensor,
    nbits: int = 8,
    bias: Tensor | None = None,
    strides: Ints | None = None,
    pad_type: str = "valid",
    pad: Ints | None = None,
    dilations: Ints | None = None,
    groups: int = 1,
) -> Tensor:
    """Convolution with weights ``weight * quant_scale + quant_bias``, the two of one number or one a channel of output.

    ``nbits`` says how many bits a weight needs; each has a byte of its own all the same.

    Raises:
        ValueError: a table of weights; MIL has no parameter for its values.
    """
    if quantization_type != "linear":
        raise ValueError(f"conv_quantized of quantization_type {quantization_type} with {nbits} bits")
    across = (-1,) + (1,) * (x.dim() - 1)
    dense = weight.to(x.dtype) * quant_scale.reshape(across) + quant_bias.reshape(across)
    bias = None if bias is None else bias.to(x.dtype)
    return conv(x, dense, bias, strides, pad_type, pad, dilations, groups)


def _crop(
    pad_type: str, pad: tuple[int, int], size: int, width: int, stride: int, wanted: int | None
) -> tuple[int, int, int]:
    """Length of the output in one dimension, and what it lacks of the whole one at its beginning and at its end.

    The whole one is all that the kernel reaches; beyond it there are zeros, of which an output can have a few at its
    end (a negative number). ``wanted`` is its length where the model says it.

    Raises:
        ValueError: a convolution of this type would not lead from that length back to the input's.
    """
    whole = (size - 1) * stride + width
    if pad_type == "same":
        length = size * stride if wanted is None else wanted
        begin, fits = max(whole - length, 0) // 2, -(-length // stride) == size
    else:
        begin, end = pad if pad_type == "custom" else (0, 0)
        length = whole - begin - end if wanted is None else wanted
        fits = 0 <= length - (whole - begin - end) < stride
    if not fits:
        raise ValueError(f"conv_transpose of pad_type {pad_type} cannot lead from {size} to {length} elements")
    return length, begin, whole - begin - length


@op("conv_transpose")
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: Ints | None = None,
    output_shape: Ints | None = None,
    pad_type: str = "valid",
    strides: Ints | None = None,
    dilations: Ints | None = None,
    groups: int = 1,
) -> Tensor:
    """Transposed convolution; weight [C_in, C_out / groups, *K]; output_shape with batch and channels.

    It is the gradient of a convolution of the same padding; ``same`` takes ``size * stride`` elements apart, and
    crops an odd one at the end. Source: TensorFlow's, whose conversion gives this operation ``same``.

    Raises:
        ValueError: an output_shape that no convolution of this padding leads back from: Core ML's own devices
            disagree on what that means (coremltools issue 2281).
    """
    spatial = x.dim() - 2
    ones = (1,) * spatial
    strides, dilations = strides or ones, dilations or ones
    if pad_type not in ("valid", "same", "custom") or (pad_type == "custom" and pad is None):
        raise ValueError(f"pad_type {pad_type} with pad {pad}")
    cuts = []
    for i in range(spatial):
        width = (weight.shape[2 + i] - 1) * dilations[i] + 1
        ends = (pad[2 * i], pad[2 * i + 1]) if pad is not None else (0, 0)
        wanted = output_shape[2 + i] if output_shape else None
        cuts.append(_crop(pad_type, ends, x.shape[2 + i], width, strides[i], wanted))
    # torch crops both ends alike, and adds zeros at the end; what is left is cut off here.
    alike = tuple(min(begin, max(end, 0)) for _, begin, end in cuts)
    zeros = tuple(max(0, -end) for _, _, end in cuts)
    weight, bias = _alike(x, weight, bias)
    made = torch.convolution(x, weight, bias, strides, alike, dilations, True, zeros, groups)
    for i, (length, begin, _) in enumerate(cuts):
        if made.shape[2 + i] != length:
            made = made.narrow(2 + i, begin - alike[i], length)
    return made
