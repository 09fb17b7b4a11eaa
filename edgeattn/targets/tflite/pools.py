"""Average pooling in the one form that TFLite has an operation for.

litert-torch 0.10 makes AVERAGE_POOL_2D of a pooling that counts its padding. Others become STABLEHLO_REDUCE_WINDOW
(with ``ceil_mode`` and without ``count_include_pad`` even where both change nothing) or stay a STABLEHLO_COMPOSITE:
tflite-runtime 2.14.0 does not load those, XNNPACK does not take them, and they break static quantization.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from edgeattn.targets.tflite.edit import Builder, shape_of

aten = torch.ops.aten


def _two(value: Any) -> list[int]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values * 2 if len(values) == 1 else values


@dataclass(frozen=True)
class Pool:
    """The arguments of ``aten.avg_pool2d`` on maps of (height, width) ``size``."""

    size: tuple[int, int]
    kernel: list[int]
    stride: list[int]
    padding: list[int]
    ceil_mode: bool
    counts_padding: bool
    divisor: int | None

    @classmethod
    def of(cls, node: fx.Node) -> Pool | None:
        """The pooling that a node calls; None where it is none, or of a dynamic shape."""
        shape = shape_of(node.args[0]) if node.target is aten.avg_pool2d.default else None
        if shape is None:
            return None
        defaults: tuple[Any, ...] = (None, None, [], 0, False, True, None)
        kernel, stride, padding, ceil_mode, counts, divisor = (*node.args, *defaults[len(node.args) :])[1:]
        return cls(
            (shape[-2], shape[-1]), _two(kernel), _two(stride or kernel), _two(padding), ceil_mode, counts, divisor
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H', W')."""
        return torch.nn.functional.avg_pool2d(
            x, self.kernel, self.stride, self.padding, self.ceil_mode, self.counts_padding, self.divisor
        )

    @property
    def plain(self) -> bool:
        """Whether the converter makes AVERAGE_POOL_2D of it as it stands."""
        if self.divisor is not None:
            return False
        if self.counts_padding:
            return True
        same = self.stride == [1, 1] and all(2 * p == k - 1 for p, k in zip(self.padding, self.kernel, strict=True))
        return not self.ceil_mode and (same or not any(self.padding))

    def counting(self) -> Pool:
        """The same windows, the padding counted, without ceil_mode where it adds no window."""
        rest = [
            (n + 2 * p - k) % s for n, p, k, s in zip(self.size, self.padding, self.kernel, self.stride, strict=True)
        ]
        return Pool(self.size, self.kernel, self.stride, self.padding, self.ceil_mode and any(rest), True, None)


def plain_pools(module: fx.GraphModule) -> int:
    """Rewrite every average pooling of another form, in place: the plain form, and a product where divisors differ.

    Returns:
        The number that was rewritten.
    """
    count = 0
    for node in list(module.graph.nodes):
        pool = Pool.of(node)
        if pool is None or pool.plain:
            continue
        source, add, plain = node.args[0], Builder(module, node), pool.counting()
        made = add(
            aten.avg_pool2d.default, source, plain.kernel, plain.stride, plain.padding, plain.ceil_mode, True, None
        )
        # A pooling is a sum over its window by a divisor; ones give the quotient of the two divisors.
        ones = torch.ones(1, 1, *pool.size, dtype=torch.float64)
        ratio = (pool(ones) / plain(ones)).to(node.meta["val"].dtype)
        if not bool((ratio == 1).all()):
            made = add(aten.mul.Tensor, made, add.constant(ratio, source))
        node.replace_all_uses_with(made)
        module.graph.erase_node(node)
        count += 1
    if count:
        module.graph.lint()
        module.recompile()
    return count
