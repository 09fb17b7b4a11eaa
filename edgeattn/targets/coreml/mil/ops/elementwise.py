"""Operations that work element by element: arithmetic, comparison, logic, functions of one number, casts, selection.

Operands broadcast as NumPy's do. Integers wrap around at 32 bits. Whatever results in a fraction where an integer is
declared is cut off towards zero.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from edgeattn.targets.coreml.mil.registry import Number, op

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "acos": torch.acos,
    "asin": torch.asin,
    "atan": torch.atan,
    "atanh": torch.atanh,
    "ceil": torch.ceil,
    "cos": torch.cos,
    "cosh": torch.cosh,
    "erf": torch.erf,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "floor": torch.floor,
    "logical_not": torch.logical_not,
    "round": torch.round,
    "sign": torch.sign,
    "sin": torch.sin,
    "sinh": torch.sinh,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "tan": torch.tan,
    "tanh": torch.tanh,
}
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "equal": torch.eq,
    "floor_div": torch.floor_divide,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mod": torch.remainder,
    "mul": torch.mul,
    "not_equal": torch.ne,
    "sub": torch.sub,
}


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        return function(x)

    return run


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def run(x: Tensor, y: Tensor) -> Tensor:
        return function(x, y)

    return run


for _name, _function in _UNARY.items():
    op(_name)(_unary(_function))
for _name, _operator in _BINARY.items():
    op(_name)(_binary(_operator))


@op("cast")
def cast(x: Tensor, dtype: str) -> Tensor:
    """The same numbers in another dtype: to integers towards zero, to bool whether they differ from zero.

    The program brings every result to its declared dtype, and with it this one. Only uint16 is carried in a wider
    type, so that what does not fit has to wrap around here.
    """
    return x.to(torch.int64) & 0xFFFF if dtype == "uint16" else x


@op("real_div")
def real_div(x: Tensor, y: Tensor) -> Tensor:
    """``x / y``; of integers the quotient without its fraction.

    Raises:
        RuntimeError: an integer is divided by zero.
    """
    return torch.div(x, y, rounding_mode=None if x.is_floating_point() else "trunc")


@op("pow")
def power(x: Tensor, y: Tensor) -> Tensor:
    """``x ** y``; of integers the power without its fraction.

    A single float exponent is given to torch as a number: it knows short cuts for 2, 3, 0.5 and their inverses.
    """
    return torch.pow(x, y.item() if y.dim() == 0 and y.is_floating_point() else y)


@op("clip")
def clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    """``x``, but at least ``alpha`` and at most ``beta``; ``beta`` where these contradict each other."""
    return torch.clamp(x, alpha, beta)


@op("threshold")
def threshold(x: Tensor, alpha: Number) -> Tensor:
    """``x``, but at least ``alpha``."""
    return torch.clamp_min(x, alpha)


@op("inverse")
def inverse(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    """``1 / (x + epsilon)``."""
    return torch.reciprocal(x + epsilon)


@op("log")
def log(x: Tensor, epsilon: float = 1e-45) -> Tensor:
    """Natural logarithm of ``x + epsilon``."""
    return torch.log(x + epsilon)


@op("rsqrt")
def rsqrt(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    """``1 / sqrt(x + epsilon)``."""
    return torch.rsqrt(x + epsilon)


@op("select")
def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``a`` where ``cond`` is true, else ``b``; all three broadcast."""
    return torch.where(cond, a, b)
