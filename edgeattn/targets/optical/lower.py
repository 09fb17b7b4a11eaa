"""From a captured program to an optical one: turns of electronics and optics, kernels, plans, all carried out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from edgeattn.capture import Program
from edgeattn.core.errors import CheckFailed, ConversionFailed, UsageError
from edgeattn.core.numerics import Array, compare
from edgeattn.device import Device, Effects, Optics
from edgeattn.targets.base import Artifact, ArtifactEntry, LowerPlan
from edgeattn.targets.onnx_graph.execute import make_session
from edgeattn.targets.onnx_graph.export import export, tensors, tidy
from edgeattn.targets.onnx_graph.files import save
from edgeattn.targets.optical.convolve import Convolver, direct, parts
from edgeattn.targets.optical.cost import cost
from edgeattn.targets.optical.operators import Operator
from edgeattn.targets.optical.partition import turns
from edgeattn.targets.optical.program import FILE, Operation, OpticalProgram, Turn
from edgeattn.targets.optical.schedule import in_parts, make_plan

#: Largest relative L2 between an operation on ideal planes and a plain convolution.
IDEAL = 1e-5
#: The same under a scheme of signs, whose roots and differences of float32 numbers lose some digits.
SIGNED = 1e-3
#: Samples that show whether inputs have a sign; on the first of them every plan is carried out.
_SAMPLES = 2
#: Frames of a plan that are carried out at most; of longer ones some, spread over all of it.
_FRAMES = 8
#: Operations that move numbers, and compute none.
_MOVES = frozenset(
    (
        *("Cast", "Concat", "Constant", "ConstantOfShape", "Expand", "Flatten", "Gather", "Identity", "Pad", "Range"),
        *("Reshape", "Shape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
    )
)


def lower(program: Program, plan: LowerPlan, device: Device, out: Path) -> Artifact:
    """Write a folder for each entry: ``program.json``, ``masks/``, ``electronics/``.

    Raises:
        ConversionFailed: nothing in it is for optics, something is larger than the planes, or the exporter failed.
        CheckFailed: planes give other numbers than a plain convolution. UsageError: there are no samples.
    """
    entries: dict[str, ArtifactEntry] = {}
    facts: dict[str, Any] = {"device": device.name, "entries": {}}
    assert device.optics is not None
    for name, entry in program.entries.items():
        model = export(entry)
        tidy(model, {**plan.metadata, "entry": name, "precision": plan.precision})
        sides = tensors(model.graph.inputs), tensors(model.graph.outputs)
        folder = "optical" if name == "main" else f"optical-{name}"
        if not plan.samples_of(name):
            raise UsageError("plans need a sample to be carried out on", value=name, fix="give LowerPlan some")
        made = _Writer(out / folder, device, device.optics, plan.samples_of(name)[:_SAMPLES]).write(model)
        entries[name] = ArtifactEntry(folder, *sides)
        facts["entries"][name] = _facts(made)
    return Artifact(out, plan.precision, entries, facts)


def _facts(made: OpticalProgram) -> dict[str, Any]:
    spent = cost([op.plan for op in made.operations], made.optics, 1, made.electronic_ops)
    return {
        "optics": {
            "operations": dict(Counter(op.op for op in made.operations)),
            "largest_error": max(op.error for op in made.operations),
            **spent.as_dict(),
        }
    }


class _Writer:
    """Writes one entry, and carries out its plans on samples as it goes."""

    def __init__(self, folder: Path, device: Device, optics: Optics, samples: Sequence[Mapping[str, Array]]) -> None:
        self._folder = folder
        self._device = device
        self._optics = optics
        self._known: list[dict[str, Array]] = [dict(feeds) for feeds in samples]
        self._ops = 0
        self._count = 0

    def write(self, model: ir.Model) -> OpticalProgram:
        """The program of a graph, which is taken apart."""
        inputs, outputs = ([str(v.name) for v in side] for side in (model.graph.inputs, model.graph.outputs))
        found = turns(model, (self._optics.rows, self._optics.cols))
        if not any(turn.optical for turn in found):
            kinds = Counter(node.op_type for node in model.graph).most_common(6)
            raise ConversionFailed(
                "the model has nothing that optics can compute",
                value=", ".join(f"{count} {kind}" for kind, count in kinds) or "no operations",
                why="optics compute convolutions and linear layers with constant weights, and it has none",
                fix="choose an electronic target, such as --target onnx",
            )
        for name in ("masks", "electronics"):
            (self._folder / name).mkdir(parents=True)
        written = []
        for i, turn in enumerate(found):
            file = self._electronics(turn.electronic, i) if turn.electronic is not None else ""
            written.append(Turn(file, tuple(self._optical(op) for op in turn.optical)))
        sides = tuple(inputs), tuple(outputs)
        program = OpticalProgram(self._device.name, self._optics, *sides, self._ops, tuple(written))
        (self._folder / FILE).write_text(program.text(), encoding="utf-8")
        return program

    def _electronics(self, model: ir.Model, number: int) -> str:
        file = f"electronics/{number:03}.onnx"
        save(model, self._folder / file)
        self._ops += sum(operations(node) for node in model.graph)
        session = make_session(str(self._folder / file))
        names = [value.name for value in session.get_outputs()]
        for values in self._known:
            given = {value.name: values[value.name] for value in session.get_inputs()}
            values.update(zip(names, session.run(names, given), strict=True))
        return file

    def _optical(self, op: Operator) -> Operation:
        name = f"{self._count:03}-{op.module or op.node.op_type}".replace("/", "_")
        self._count += 1
        signed, error, shape = self._carry_out(op)
        masks, bias = f"masks/{name}.npy", f"masks/{name}.bias.npy" if op.bias is not None else ""
        np.save(self._folder / masks, op.kernels.numpy())
        work = op.form.work
        if op.bias is not None:
            np.save(self._folder / bias, op.bias)
            self._ops += work.rows * work.groups * work.kernels * math.prod(work.out)
        plane = (self._optics.rows, self._optics.cols)
        plan = make_plan(in_parts(work, *parts(self._optics.effects, signed)), plane)
        # What several frames give of one value is summed by electronics.
        self._ops += plan.useful_pixels - plan.useful_pixels // plan.blocks[3]
        sides = op.input, op.output, shape
        return Operation(
            name, op.module, op.node.op_type, *sides, op.form.layout, work, plan, signed, masks, bias, error
        )

    def _carry_out(self, op: Operator) -> tuple[bool, float, tuple[int, ...]]:
        """Whether inputs have negative numbers, how far off ideal planes are, the input's shape."""
        work, layout = op.form.work, op.form.layout
        shape = self._known[0][op.input].shape
        maps = [layout.maps(torch.from_numpy(values[op.input])) for values in self._known]
        error = self._prove(op, maps[0])
        for values, shown in zip(self._known, maps, strict=True):
            result = layout.result(direct(shown, op.kernels, work), shape).numpy()
            values[op.output] = np.ascontiguousarray(result if op.bias is None else result + op.bias)
        return any(bool((shown < 0).any()) for shown in maps), error, shape

    def _prove(self, op: Operator, maps: torch.Tensor) -> float:
        """Relative L2 between ideal planes and a plain convolution.

        Raises:
            CheckFailed: it is too much, or too much under the device's sign scheme.
        """
        work, sign, errors = op.form.work, Effects(sign=self._optics.effects.sign), []
        for effects, bound in ((None, IDEAL), (sign, SIGNED)):
            convolver = Convolver(op.kernels, work, self._optics, effects, as_planned=True)
            if convolver.plan(len(maps)).frames <= _FRAMES:
                expected, seen = direct(maps, op.kernels, work), convolver(maps)
            else:
                expected, seen, _ = convolver.carried_out(maps, _FRAMES)
            numbers = compare(expected.numpy(), seen.numpy())
            errors.append(numbers.relative_l2)
            if not numbers.holds(bound):
                raise CheckFailed(
                    "a plan gives other numbers than the convolution that it stands for",
                    value=f"relative L2 {numbers.relative_l2:.3g}, {numbers.nonfinite} values not finite",
                    where=f"module {op.module or '(model)'}",
                    why=f"allowed are {bound:g}" + (f" under sign scheme {sign.sign}" if effects else ""),
                    fix="this is a fault of EdgeAttn's, unless the model's own numbers are not finite; report it",
                )
        return errors[0]


def operations(node: ir.Node) -> int:
    """Multiply-accumulates of a product or convolution that is left to electronics; of others, numbers they give."""
    if node.op_type in _MOVES:
        return 0
    sizes = [value.shape for value in node.outputs if value.shape is not None]
    given = sum(math.prod(n for n in shape if isinstance(n, int)) for shape in sizes)
    first, second = (node.inputs[i] if len(node.inputs) > i else None for i in (0, 1))
    if node.op_type in ("MatMul", "Gemm") and first is not None and first.shape is not None:
        last = first.shape[-1]
        return given * (last if isinstance(last, int) else 1)
    if node.op_type in ("Conv", "ConvTranspose") and second is not None and second.shape is not None:
        return given * math.prod(n for n in list(second.shape)[1:] if isinstance(n, int))
    return given
