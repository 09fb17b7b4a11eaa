"""Which module is stored in how many bits: one plan, by torch module name, that every target follows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeattn.recipe import Keep, Quantization

#: Bits of weights and of activations, by precision; 32 stands for floats, whatever their width.
BITS: dict[str, tuple[int, int]] = {"w8a8": (8, 8), "w8": (8, 32), "w4": (4, 32), "fp8": (8, 8)}


@dataclass(frozen=True)
class Scheme:
    """How a module's weights, and the data that they are multiplied with, are stored.

    Attributes:
        weights, data: bits of signed integers, symmetric around 0; 32 where they stay floats.
        group: weights along the input channels that share a scale; 0 where all of an output channel do.
    """

    weights: int = 32
    data: int = 32
    group: int = 0

    @property
    def floats(self) -> bool:
        """Nothing of the module is quantized."""
        return self.weights == 32

    def for_kernel(self, shape: Sequence[int]) -> Scheme:
        """The scheme of a convolution's weight (outputs, inputs, *kernel).

        Kernels over space get 8 bits in place of 4: they are few numbers, and with 4 bits lost fmvit-scenes 5 points of
        accuracy where all other weights together lost 2.
        """
        over_space = self.weights == 4 and math.prod(shape[2:]) > 1
        return replace(self, weights=8, group=0) if over_space else self


@dataclass(frozen=True)
class QuantPlan:
    """What a precision means for each module of a model on a target.

    Attributes:
        group: of 4-bit weights, see ``Scheme.group``. observer: one of ``quant.observe.METHODS``.
        keep: of the recipe, those that apply to this precision and target.
        float_data: modules whose data are not rounded, for they come out of one that is kept in floats; see
            ``quant.flow.read_from_kept``.
    """

    precision: str
    group: int = 32
    observer: str = "mse"
    keep: tuple[Keep, ...] = ()
    float_data: frozenset[str] = frozenset()

    @staticmethod
    def of(quantization: Quantization, precision: str, target: str) -> QuantPlan:
        """The plan of a recipe."""
        keep = tuple(
            k
            for k in quantization.keep
            if (not k.precisions or precision in k.precisions) and (not k.targets or target in k.targets)
        )
        return QuantPlan(precision, quantization.group, quantization.observer, keep)

    @property
    def quantizes(self) -> bool:
        """Whether the precision stores anything in integers (or fp8) at all."""
        return self.precision in BITS

    def kept(self, module: str) -> Keep | None:
        """The last entry of the recipe that speaks of ``module`` or of a module that it is part of."""
        return next((k for k in reversed(self.keep) if any(within(module, pattern) for pattern in k.modules)), None)

    def scheme(self, module: str) -> Scheme:
        """How ``module``, a dotted path of the deploy form, is stored."""
        keep = self.kept(module)
        weights, data = BITS.get(self.precision, (32, 32))
        if keep is not None and keep.at == "float":
            return Scheme()
        if keep is not None and keep.at == "w8":
            weights, data = 8, 32
        if module in self.float_data:
            data = 32
        return Scheme(weights, data, self.group if weights == 4 else 0)

    def unused(self, modules: Sequence[str]) -> list[str]:
        """Patterns that speak of none of ``modules``: a slip of the pen, most likely."""
        patterns = [pattern for keep in self.keep for pattern in keep.modules]
        return [pattern for pattern in patterns if not any(within(module, pattern) for module in modules)]


def within(module: str, pattern: str) -> bool:
    """Whether a glob of dotted paths names ``module``, or a module around it.

    >>> within("stages.1.0.attention.q", "stages.1"), within("stages.10.0", "stages.1"), within("head.fc", "*.fc")
    (True, False, True)
    """
    parts = module.split(".")
    return any(fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))
