"""How many elements a sliding window sees beyond each end of its input: what MIL's ``pad_type`` means."""

from __future__ import annotations

from functools import lru_cache

from edgeattn.targets.coreml.mil.registry import Ints


@lru_cache(maxsize=4096)
def borders(
    pad_type: str, pad: Ints | None, sizes: Ints, kernel: Ints, strides: Ints, dilations: Ints
) -> tuple[Ints, Ints]:
    """Padding before and after each spatial dimension of a convolution or a pooling.

    ``same`` and ``same_lower`` pad as much as it takes for ``ceil(size / stride)`` outputs, an odd element at the end
    or at the beginning. Source: the shape inference of MIL, and ``SamePadding`` in Core ML's NeuralNetwork.proto; the
    text at MIL's conv, which knows no strides, agrees only where they are 1.

    Args:
        pad: before and after each dimension in turn; read where the type is ``custom``.
        sizes, kernel, strides, dilations: one number a spatial dimension.

    Raises:
        ValueError: an unknown type, or ``custom`` without its numbers.
    """
    if pad_type == "valid":
        return (0,) * len(sizes), (0,) * len(sizes)
    if pad_type == "custom" and pad is not None and len(pad) == 2 * len(sizes):
        return pad[::2], pad[1::2]
    if pad_type not in ("same", "same_lower"):
        raise ValueError(f"pad_type {pad_type} with pad {pad}")
    needed = tuple(
        max(0, (-(-size // stride) - 1) * stride + (width - 1) * dilation + 1 - size)
        for size, width, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True)
    )
    less, more = tuple(n // 2 for n in needed), tuple(n - n // 2 for n in needed)
    return (less, more) if pad_type == "same" else (more, less)


def outermost_last(before: Ints, after: Ints) -> list[int]:
    """Paddings of the spatial dimensions in the order of ``torch.nn.functional.pad``."""
    return [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
