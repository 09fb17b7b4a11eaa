"""Optics' lint: patterns of ``lint.toml`` in a captured program; a device says how large its planes are."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import fx

from edgeattn.lint import Finding, RuleBook
from edgeattn.lint.books import own
from edgeattn.lint.engine import Findings, Hit, by_pattern
from edgeattn.lint.graph import Part, op_of, parts_of, path_of, tensors_of
from edgeattn.lint.match import arguments_of

if TYPE_CHECKING:
    from edgeattn.capture import Program
    from edgeattn.device import Device

#: Operations that optics compute where their second tensor is constant. An attention's projections are among them.
_LAYERS = ("conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d", "convolution", "linear", "matmul", "mm", "addmm")
_CONVOLUTIONS = ("conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d")


@cache
def _book() -> RuleBook:
    return own(Path(__file__).parent, "optical")


def _weights(node: fx.Node, part: Part) -> bool:
    """Whether one of the factors of a layer is constant, and another is not."""
    factors = [source in part.live for source in node.all_input_nodes]
    return any(factors) and not all(factors)


def _too_large(node: fx.Node, plane: tuple[int, int]) -> Iterator[Hit]:
    """A kernel that is larger than the plane."""
    weight = node.args[1] if op_of(node) in _CONVOLUTIONS and len(node.args) > 1 else None
    if not isinstance(weight, fx.Node) or not tensors_of(weight):
        return
    taps: list[Any] = list(tensors_of(weight)[0].shape[2:])
    given = arguments_of(node)["dilation"][0]
    steps = list(given) * len(taps) if isinstance(given, list | tuple) and len(given) == 1 else given
    steps = [steps] * len(taps) if isinstance(steps, int) else steps
    sizes = [(n - 1) * step + 1 for n, step in zip(taps, steps, strict=True)]
    if any(size > side for size, side in zip(sizes, plane[-len(sizes) :], strict=True)):
        words = " x ".join(map(str, sizes))
        yield "kernel-over-plane", f"{words}, the plane has {plane[0]} x {plane[1]} pixels", None


def lint(program: Program, device: Device) -> list[Finding]:
    """Findings in the captured program, before any conversion.

    Args:
        device: whose planes it is for.
    """
    findings, optics = Findings(_book()), device.optics
    for name, entry in program.entries.items():
        layers = 0
        for part in parts_of(entry):
            for node in part.nodes():
                layers += op_of(node) in _LAYERS and _weights(node, part)
                for hit in _too_large(node, (optics.rows, optics.cols)) if optics else ():
                    findings.add(path_of(node) or part.place, hit)
        if not layers:
            findings.add("", ("nothing-optical", f"entry {name}", None))
    return [*findings.list(), *by_pattern(program, _book(), "optical")]
