"""Weights in 8 or 4 bits, and in w8a8 the data that they are multiplied with in 8: as the plan says, by module.

coremltools compresses the weights. Pairs of ``quantize`` and ``dequantize`` for the data are written here, with ranges
that the interpreter measures: coremltools' own way (9.0) calibrates on a Mac only, keeps of each tensor the range of
the last sample alone, and rounds sums, poolings and outputs as well.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeattn.core import tools
from edgeattn.core.errors import CheckFailed, ToolchainMissing
from edgeattn.core.numerics import Array
from edgeattn.core.quiet import quiet
from edgeattn.quant.observe import Observer
from edgeattn.quant.plan import QuantPlan
from edgeattn.targets.base import LowerPlan, Tensor
from edgeattn.targets.coreml import PALETTE
from edgeattn.targets.coreml.facts import operations
from edgeattn.targets.coreml.mil.package import Package, open_package
from edgeattn.targets.coreml.mil.program import Function
from edgeattn.targets.coreml.mil.values import Weights, decode, type_of
from edgeattn.targets.feeds import own_feeds

with quiet():
    import coremltools.optimize.coreml as cto
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
    from coremltools.models.utils import _apply_graph_pass

#: Which argument of a weighted operation is its weight, and which the data that it is multiplied with; a row that is
#: looked up is multiplied with nothing.
_WEIGHTED = {
    "conv": {"weight": "x"},
    "conv_transpose": {"weight": "x"},
    "linear": {"weight": "x"},
    "matmul": {"y": "x", "x": "y"},
    "gather": {"x": ""},
}
#: Palettes of 4 bits from iOS18 on: output channels that share one. One for a whole tensor is all that there is before.
_TABLES = 4
#: Constants of fewer numbers stand in the program itself, where none can be compressed.
_FEWEST = 10
#: What the converter calls a constant of float16 behind the name of its placeholder.
_ROUNDED = "_to_fp16"
_NO_WEIGHT = "it is a table of the model's, such as a rotary embedding's angles, and no weight"
#: The smallest block: in a smaller one 4 bits and its share of a scale of 16 are no less than 8 bits.
_SMALLEST = 8


@dataclass(frozen=True)
class Use:
    """A weighted operation with a constant weight.

    Attributes:
        node: name of its output. module: path of its torch module.
        weight: name of the constant, of that ``shape``. axes: of the weight's output and input channels.
        data: the value that it is multiplied with, "" where there is none; the argument that holds it is ``argument``.
        groups: of a convolution.
    """

    node: str
    op: str
    module: str
    weight: str
    shape: tuple[int, ...]
    axes: tuple[int, int]
    data: str
    argument: str
    groups: int

    def as_dict(self) -> dict[str, str]:
        """What names it in the facts."""
        return {"node": self.node, "op": self.op, "module": self.module}


@dataclass(frozen=True)
class Form:
    """How a weight is stored.

    Attributes:
        block: input channels that share a scale; 0 where all of an output channel do.
        palette: indices into a table instead of integers with scales. tables: for so many output channels each; 0
            where there is one for the tensor.
    """

    bits: int
    block: int = 0
    palette: bool = False
    tables: int = 0

    @property
    def words(self) -> str:
        """As the facts say it."""
        if self.palette:
            return f"palette of {2**self.bits}" + (f", one for {self.tables} channels" if self.tables else "")
        return f"int{self.bits}, blocks of {self.block}" if self.block else f"int{self.bits}, by channel"

    @property
    def config(self) -> Any:
        """As coremltools wants it said."""
        granularity: dict[str, Any] = {}
        if self.palette:
            if self.tables:
                granularity = {"granularity": "per_grouped_channel", "group_size": self.tables}
            return cto.OpPalettizerConfig(mode="kmeans", nbits=self.bits, weight_threshold=0, **granularity)
        if self.block:
            granularity = {"granularity": "per_block", "block_size": self.block}
        return cto.OpLinearQuantizerConfig(
            mode="linear_symmetric", dtype=f"int{self.bits}", weight_threshold=0, **granularity
        )


def uses_of(package: Package, modules: Mapping[str, str]) -> list[Use]:
    """Every weighted operation whose weight is a constant of floats, in the program's order."""
    weights = Weights(package.root)
    known: dict[str, Any] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    found = []
    for item in operations(package, constants=True):
        if item.type == "const":
            (output,) = item.outputs
            dtype, shape = type_of(output.type)
            known[output.name] = item.attributes["val"]
            if dtype in ("fp16", "fp32") and shape is not None and len(shape) > 1:
                shapes[output.name] = shape
            continue
        named = {name: argument.arguments[0].name for name, argument in item.inputs.items() if argument.arguments}

        def value(name: str, default: Any, named: Mapping[str, str] = named) -> Any:
            return decode(known[named[name]], weights) if named.get(name) in known else default

        for argument, data in _WEIGHTED.get(item.type, {}).items():
            weight = named.get(argument, "")
            if weight not in shapes or (item.type == "gather" and (len(shapes[weight]), value("axis", 0)) != (2, 0)):
                continue
            node, shape = item.outputs[0].name, shapes[weight]
            axes = _axes(item.type, argument, len(shape), bool(value(f"transpose_{argument}", False)))
            place = (node, item.type, modules.get(node, ""))
            found.append(Use(*place, weight, shape, axes, named.get(data, ""), data, int(value("groups", 1))))
    return found


def _axes(op: str, argument: str, rank: int, transposed: bool) -> tuple[int, int]:
    """Axes of a weight's output and input channels."""
    if op == "matmul":
        # y is (..., input, output) and x (..., output, input), unless it is transposed.
        return (rank - 1, rank - 2) if (argument == "y") != transposed else (rank - 2, rank - 1)
    return (1, 0) if op == "conv_transpose" else (0, 1)


def _form(uses: Sequence[Use], plan: QuantPlan, options: Mapping[str, str]) -> Form | str:
    """How the weight that these read is to be stored, or why it stays as it is."""
    first, palette = uses[0], options["weights"] == PALETTE
    schemes = [plan.scheme(use.module) for use in uses]
    if any(scheme.floats for scheme in schemes):
        kept = [keep for use in uses if (keep := plan.kept(use.module)) is not None]
        return f"the recipe keeps {', '.join(kept[0].modules)}" if kept else "the plan quantizes nothing"
    if len({use.axes for use in uses}) > 1:
        return "it is read in different ways"
    if math.prod(first.shape) < _FEWEST:
        return f"it has fewer than {_FEWEST} numbers"
    if first.op in ("conv", "conv_transpose"):
        schemes = [scheme.for_kernel(first.shape) for scheme in schemes]
    bits = max(scheme.weights for scheme in schemes)
    if first.op == "conv_transpose" and first.groups > 1 and not palette:
        return "channels of different groups would share scales"
    if bits == 8:
        return Form(8, palette=palette)
    # Groups are powers of two, and so is what divides both.
    block = math.gcd(first.shape[first.axes[1]], min(scheme.group for scheme in schemes if scheme.group))
    if block < _SMALLEST:
        return Form(8, palette=palette)
    if palette:
        grouped = options["deployment"] == "iOS18"
        return Form(4, palette=True, tables=math.gcd(first.shape[first.axes[0]], _TABLES) if grouped else 0)
    return Form(4, block)


class _Pairs(AbstractGraphPass):  # type: ignore[misc]
    """Puts the data of operations through a pair of ``quantize`` and ``dequantize``, one for all its readers."""

    def __init__(self, uses: Mapping[str, Use], scales: Mapping[str, float]) -> None:
        """``uses`` by the operation's name, ``scales`` by the data's."""
        self._uses, self._scales = uses, scales

    def apply(self, prog: Any) -> None:
        """Change the program in place."""
        for function in prog.functions.values():
            with function:
                self._block(function)

    def _block(self, block: Any) -> None:
        made: dict[str, Any] = {}
        for operation in list(block.operations):
            for inner in operation.blocks:
                with inner:
                    self._block(inner)
            use = self._uses.get(operation.outputs[0].name) if operation.outputs else None
            if use is None:
                continue
            data = operation.inputs[use.argument]
            if data.name not in made:
                made[data.name] = self._pair(data, operation)
            operation.set_inputs(**{use.argument: made[data.name]})

    def _pair(self, data: Any, before: Any) -> Any:
        scale = np.float16(self._scales[data.name])
        small = mb.quantize(
            input=data, scale=scale, output_dtype="int8", before_op=before, name=f"{data.name}_quantized"
        )
        return mb.dequantize(input=small, scale=scale, before_op=before, name=f"{data.name}_dequantized")


def _feeds(inputs: Sequence[Tensor], plan: LowerPlan) -> Iterator[dict[str, Array]]:
    """The calibration set as the package takes it; without one, the samples."""
    empty = True
    for feeds in plan.calibration:
        empty = False
        yield own_feeds(inputs, feeds)
    if empty:
        yield from (own_feeds(inputs, feeds) for feeds in plan.samples)


def _scales(
    package: Package, wanted: set[str], inputs: Sequence[Tensor], plan: LowerPlan
) -> tuple[dict[str, float], int]:
    """Scales of the named values, measured by the interpreter one sample after the other; and how many there were.

    Raises:
        CheckFailed: there is no sample.
    """
    function, observers = Function(package), {name: Observer(plan.quant.observer) for name in wanted}

    def watch(name: str, operation: str, value: Any) -> None:
        if name in observers:
            observers[name].add(value.numpy())

    count = 0
    for count, feeds in enumerate(_feeds(inputs, plan), 1):  # noqa: B007
        for name in wanted & set(feeds):
            observers[name].add(feeds[name])
        function.run(feeds, function.make_state(), watch)
    if not count:
        raise CheckFailed(
            "there is nothing to calibrate on",
            value=plan.precision,
            why="ranges of the data are measured on samples, and there are none",
            fix="give the recipe a [calibration] or held-out samples, or take --precision w8",
        )
    # What float16 holds in full; the interpreter and the accelerators may differ in what is smaller.
    low, high = float(np.finfo(np.float16).smallest_normal), float(np.finfo(np.float16).max)
    return {name: min(max(seen.scale(8), low), high) for name, seen in observers.items()}, count


@dataclass(frozen=True)
class Quantized:
    """A model in few bits.

    Attributes:
        model: as coremltools holds it. modules: of its values, as ``modules_of`` gives them.
        facts: numbers, operations, and what stayed in floats and why.
    """

    model: Any
    modules: dict[str, str]
    facts: dict[str, Any]


def _forms(
    uses: Sequence[Use], plan: LowerPlan, tables: Collection[str]
) -> tuple[dict[str, Form], list[Use], list[dict[str, str]]]:
    """How each weight is to be stored, the operations that read those weights, and what stays in floats and why.

    Args:
        tables: see ``quantize``.

    Raises:
        CheckFailed: everything does.
    """
    readers: dict[str, list[Use]] = {}
    for use in uses:
        readers.setdefault(use.weight, []).append(use)
    found = {
        name: _NO_WEIGHT if name.removesuffix(_ROUNDED) in tables else _form(reading, plan.quant, plan.options)
        for name, reading in readers.items()
    }
    forms = {name: form for name, form in found.items() if isinstance(form, Form)}
    left = [use.as_dict() | {"why": form} for use in uses if isinstance(form := found[use.weight], str)]
    if not forms:
        raise CheckFailed(
            "there is nothing to quantize",
            value=plan.precision,
            why=left[0]["why"] if left else "the model has no convolution or matrix product with constant weights",
            fix="--precision fp16",
        )
    return forms, [use for use in uses if use.weight in forms], left


def quantize(
    model: Any, modules: Mapping[str, str], inputs: Sequence[Tensor], plan: LowerPlan, tables: Collection[str] = ()
) -> Quantized:
    """A converted float16 model in the plan's bits.

    Args:
        modules: of the model's values. inputs: as the package takes them.
        tables: placeholders of the captured graph whose numbers are computed, not learned, and stay in floats.

    Raises:
        CheckFailed: nothing in it can be quantized, or there is nothing to calibrate on. ToolchainMissing: palettes
            are asked for, and what finds them is not installed.
    """
    palette = plan.options["weights"] == PALETTE
    if palette and tools.version("scikit-learn") is None:
        raise ToolchainMissing(
            "scikit-learn is missing",
            value="weights=palette",
            why="coremltools finds palettes with it",
            fix="pip install scikit-learn",
        )
    package = open_package(Path(model.package_path))
    forms, chosen, left = _forms(uses_of(package, modules), plan, tables)
    facts: dict[str, Any] = {"numbers": _numbers(plan, palette)}
    known, scales = dict(modules), dict[str, float]()
    rounded = {use.node: use for use in chosen if use.data and plan.quant.scheme(use.module).data == 8}
    if rounded:
        scales, count = _scales(package, {use.data for use in rounded.values()}, inputs, plan)
        facts["calibrated_on"] = f"{count} samples"
        with quiet():
            model = _apply_graph_pass(model, _Pairs(rounded, scales))
        for use in reversed(rounded.values()):  # the first reader names a pair
            known |= {f"{use.data}_quantized": use.module, f"{use.data}_dequantized": use.module}
    compress = cto.palettize_weights if palette else cto.linear_quantize_weights
    with quiet():
        config = cto.OptimizationConfig(op_name_configs={name: form.config for name, form in forms.items()})
        model = compress(model, config)
    facts["operations"] = [
        use.as_dict()
        | {"weights": forms[use.weight].words, "data": "int8" if use.node in rounded else "float16"}
        | ({"activation_scale": float(f"{scales[use.data]:.6g}")} if use.node in rounded else {})
        for use in chosen
    ]
    return Quantized(model, known, facts | {"left_in_floats": left})


def _numbers(plan: LowerPlan, palette: bool) -> str:
    """What most weights become, in words; single operations may differ."""
    scheme = plan.quant.scheme("")
    words = Form(scheme.weights, scheme.group, palette).words
    return f"{words}; data int8" if scheme.data == 8 else words
