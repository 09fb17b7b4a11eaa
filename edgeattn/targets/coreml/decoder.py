"""A decoder's entries as the functions of one package, with the cache as states.

Each entry is converted and quantized as it was captured: caches among its inputs, new rows among its outputs. Then its
caches become states, and the new rows are written into them at ``position``; no row but the new ones is touched, and
nothing of the cache is given back. Last all functions go into one program, in which a weight is stored once.

Core ML has states in float16 alone, from iOS18 on, and keeps them for a caller from one prediction to the next, also of
another function of the same package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeattn.capture import Entry, Program
from edgeattn.core.errors import ConversionFailed
from edgeattn.core.quiet import quiet
from edgeattn.core.specs import IDS, POSITION, new_name
from edgeattn.quant.plan import BITS
from edgeattn.targets.base import Artifact, ArtifactEntry, LowerPlan
from edgeattn.targets.coreml import STATES_FROM
from edgeattn.targets.coreml.describe import describe
from edgeattn.targets.coreml.facts import facts_of
from edgeattn.targets.coreml.lower import convert, prepare
from edgeattn.targets.coreml.mil.package import open_package
from edgeattn.targets.coreml.modules import modules_of, note_modules
from edgeattn.targets.coreml.quantize import quantize
from edgeattn.targets.coreml.save import save

with quiet():
    import coremltools as ct
    from coremltools.converters.mil.converter import mil_convert
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import Program as MilProgram
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY
    from coremltools.converters.mil.mil.program import StateTensorPlaceholder
    from coremltools.models.utils import _apply_graph_pass

FILE = "model.mlpackage"
#: The function that a caller gets who names none.
_DEFAULT = "decode"
#: Number of iOS18's specification.
_SPECIFICATION = 9


class _States(AbstractGraphPass):  # type: ignore[misc]
    """Makes states of inputs (1, S, width), and of the outputs with their new rows (1, N, width) what is written.

    The rows are written last, when all that reads the cache has read it, so that it can be done in place. Rows of
    tokens behind ``last`` are written too: their positions are masked until other rows are written there. ``position``
    + N must not be more than S; the caller sees to that.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """``names`` of the inputs."""
        self._names = names

    def apply(self, prog: Any) -> None:
        """Change the program in place."""
        for function in prog.functions.values():
            with function:
                self._function(function)

    def _function(self, function: Any) -> None:
        position, tokens = function.inputs[POSITION], function.inputs[IDS].shape[1]
        states, held, first = {}, {}, function.operations[0]
        for name in self._names:
            given = function.inputs[name]
            placeholder = StateTensorPlaceholder(given.shape, given.dtype, name)
            (states[name],) = placeholder.outputs
            function.placeholder_inputs[name], function._input_dict[name] = placeholder, states[name]
            held[name] = mb.read_state(input=states[name], before_op=first, name=f"{name}_held")
            function.replace_uses_of_var_after_op(anchor_op=held[name].op, old_var=given, new_var=held[name])
        rows = {output.name: output for output in function.outputs}
        after, zero = mb.add(x=position, y=np.array([tokens], np.int32)), np.array([0], np.int32)
        begin = mb.concat(values=[zero, position, zero], axis=0, name="rows_begin")
        end = mb.concat(values=[zero, after, zero], axis=0, name="rows_end")
        whole = [True, False, True]
        for name in self._names:
            written = mb.slice_update(
                x=held[name],
                update=rows.pop(new_name(name)),
                begin=begin,
                end=end,
                begin_mask=whole,
                end_mask=whole,
                name=f"{name}_written",
            )
            mb.coreml_update_state(state=states[name], value=written, name=f"{name}_kept")
        function.set_outputs(list(rows.values()))


def _check_caches(program: Program) -> None:
    assert program.decoder is not None
    for name, entry in program.entries.items():
        values = {node.name: node.meta["val"] for node in entry.graph.graph.nodes if node.op == "placeholder"}
        inputs = dict(zip(entry.inputs, entry.graph.graph_signature.user_inputs, strict=True))
        for row, width in program.decoder.rows:
            shape, wanted = tuple(values[str(inputs[row])].shape), (1, program.decoder.context, width)
            if shape != wanted:
                raise ConversionFailed(
                    "entries cannot share a state",
                    value=f"{row}: {shape}",
                    where=f"entry {name}",
                    why=f"a package has one for all of its functions; the others have {wanted}",
                )


def _tables(entry: Entry) -> frozenset[str]:
    """Placeholders that hold buffers: what is learned is a parameter."""
    return frozenset(entry.graph.graph_signature.inputs_to_buffers)


def _joined(functions: Mapping[str, Any]) -> Any:
    """One model with all functions, in which those of equal constants share one."""
    program = MilProgram()
    for name, function in functions.items():
        program.add_function(name, function)
    PASS_REGISTRY["common::const_deduplication"]._deduplicate_const_across_functions(program)
    program.default_function_name = _DEFAULT if _DEFAULT in functions else next(iter(functions))
    # The passes have run on each of them, and one of them would move what is written to a state.
    program.skip_all_passes, program.export_as_multifunction = True, True
    return mil_convert(
        program,
        convert_to="mlprogram",
        convert_from="milinternal",
        specification_version=_SPECIFICATION,
        compute_units=ct.ComputeUnit.CPU_ONLY,
        skip_model_load=True,
    )


def lower(program: Program, plan: LowerPlan, out: Path) -> Artifact:
    """Write ``FILE`` into ``out`` with a function for each entry.

    Raises:
        ConversionFailed: names the operation and the module; entries with caches of different lengths.
    """
    assert program.decoder is not None
    assert plan.options["deployment"] == STATES_FROM, "see settle_decoder"
    _check_caches(program)
    names = [name for name, _ in program.decoder.rows]
    kept = frozenset((*names, *map(new_name, names)))
    entries, functions, modules, notes = {}, {}, {}, {}
    for name, entry in program.entries.items():
        prepared = prepare(entry, plan, halves=kept)
        inputs, outputs = prepared.tensors(plan)
        model = convert(prepared, plan)
        known, notes[name] = modules_of(model._mil_program), {"mends": prepared.mends}
        if plan.precision in BITS:
            made = quantize(model, known, inputs, plan, _tables(entry))
            model, known, notes[name]["quantized"] = made.model, made.modules, made.facts
        with quiet():
            functions[name] = _apply_graph_pass(model, _States(names), return_pymil_prog=True).functions["main"]
        modules[name] = note_modules(known)
        fed, given = ([t for t in tensors if t.name not in kept] for tensors in (inputs, outputs))
        entries[name] = ArtifactEntry(FILE, tuple(fed), tuple(given))
    with quiet():
        model = _joined(functions)
        describe(model, plan, modules)
    save(model, out / FILE)
    package = open_package(out / FILE)
    facts = {
        "options": dict(plan.options),
        "labels": [],
        "entries": {name: facts_of(package, name) | note for name, note in notes.items()},
        "states": {name: [1, program.decoder.context, width] for name, width in program.decoder.rows},
    }
    return Artifact(out, plan.precision, entries, facts)
