"""What a plan of TensorRT for RTX 1.7 says of its kernels, in plain text among its bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass

_TEXT = re.compile(rb"[\x20-\x7e]{6,}")
_KERNEL = re.compile(r"(?:function|runtime_fusion)=\{ name=(\S+) .*?input_args=\{ (.*?) \}.*?output_args=\{ (.*?) \}")
_VIEW = re.compile(r'sub_tensor=\{ base="(\S+?)" .* name="(\S+?)"')
_TENSOR = re.compile(r'tensor=\{.* name="(\S+?)".* type=(\w+) ')


@dataclass(frozen=True)
class Kernel:
    """One that TensorRT wrote itself, of products as they come alone only those with something else in them.

    Attributes:
        name: the operations in it, as "CastMulFc" for a product of what it first unpacks. inputs, outputs: tensors.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def multiplies(self) -> bool:
        """Whether there is a product in it, or it ends in the sum that one of a vector is."""
        return "Fc" in self.name or self.name.endswith("Sum")


def _lines(plan: bytes) -> list[str]:
    return [text.decode("ascii") for text in _TEXT.findall(plan)]


def kernels(plan: bytes) -> list[Kernel]:
    """In the order of the plan; tensors that are views of others under the names of those."""
    lines = _lines(plan)
    views = {match[2]: match[1] for line in lines if (match := _VIEW.search(line))}
    found = [match for line in lines if (match := _KERNEL.search(line))]
    names = [[views.get(part, part) for part in re.findall(r'"(.*?)"', m[i])] for m in found for i in (2, 3)]
    pairs = zip(found, names[0::2], names[1::2], strict=True)
    return [Kernel(m[1].removeprefix("__myl_"), tuple(ins), tuple(outs)) for m, ins, outs in pairs]


def of_type(plan: bytes, *types: str) -> set[str]:
    """Names of the tensors of these types, as "int4"; memory to work in left out."""
    found = [match for line in _lines(plan) if "scratch" not in line and (match := _TENSOR.search(line))]
    return {match[1] for match in found if match[2] in types}
