"""One operation at a time: through a saved package and the interpreter, and through coremltools' value inference."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgeattn.core.numerics import Array
from edgeattn.core.quiet import quiet
from edgeattn.targets.coreml.mil.package import open_package
from edgeattn.targets.coreml.mil.program import Function

with quiet():
    import coremltools as ct
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import types

# Each conversion ends in a full garbage collection, which spends its time on what is imported by now.
gc.freeze()
TARGETS = {15: ct.target.iOS15, 16: ct.target.iOS16, 17: ct.target.iOS17, 18: ct.target.iOS18}
_DTYPES = {
    "float32": types.fp32,
    "float16": types.fp16,
    "int32": types.int32,
    "int16": types.int16,
    "int8": types.int8,
    "uint8": types.uint8,
    "bool": types.bool,
}
#: Takes the builder's variables by name, returns one or a tuple of them.
Build = Callable[..., Any]


def save(build: Build, feeds: Mapping[str, Array], path: Path, opset: int = 18) -> list[str]:
    """A package at ``path`` whose inputs are the feeds and whose outputs are what ``build`` returns; their names.

    No pass of coremltools changes what ``build`` makes. A feed of a type that no input can have (bool, 8 bits) is one
    of float32 or int32 that a cast brings to its type.
    """
    names: list[str] = []
    inputs = {
        n: "float32"
        if v.dtype == np.bool_
        else "int32"
        if v.dtype.itemsize < 2 or v.dtype.kind in "iu"
        else str(v.dtype)
        for n, v in feeds.items()
    }
    specs = [mb.TensorSpec(v.shape, _DTYPES[inputs[n]]) for n, v in feeds.items()]

    def body(*variables: Any) -> Any:
        given = {}
        for (name, value), variable in zip(feeds.items(), variables, strict=True):
            same = inputs[name] == str(value.dtype)
            given[name] = variable if same else mb.cast(x=variable, dtype=_name(value.dtype))
        made = build(**given)
        results = [mb.identity(x=item, name=f"out_{i}") for i, item in enumerate(_listed(made))]
        results = [
            item
            if item.dtype in (types.fp32, types.fp16, types.int32)
            else mb.cast(x=item, dtype="int32", name=f"{item.name}_i")
            for item in results
        ]
        names.extend(item.name for item in results)
        return tuple(results) if len(results) > 1 else results[0]

    # The builder reads the names of a function's inputs from its code.
    listed = ", ".join(feeds)
    body = eval(f"lambda {listed}: body({listed})", {"body": body})
    with quiet():
        program = mb.program(input_specs=specs, opset_version=TARGETS[opset])(body)
        model = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=TARGETS[opset],
            compute_precision=ct.precision.FLOAT32,
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
        )
        model.save(str(path))
    return names


def _name(dtype: np.dtype[Any]) -> str:
    return {"float32": "fp32", "float16": "fp16"}.get(str(dtype), str(dtype))


def _listed(made: Any) -> list[Any]:
    return list(made) if isinstance(made, list | tuple) else [made]


def interpret(build: Build, feeds: Mapping[str, Array], opset: int = 18, mode: str = "fp32acc") -> list[Array]:
    """Outputs of the operation, from a package on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "op.mlpackage"
        names = save(build, feeds, path, opset)
        function = Function(open_package(path), mode=mode)
        wide = {f.name: feeds[f.name].astype(f.dtype) for f in function.inputs}
        outputs = function.run(wide, function.make_state() if function.states else None)
    return [outputs[name] for name in names]


def inferred(build: Build, feeds: Mapping[str, Array], opset: int = 18) -> list[Array] | None:
    """What coremltools itself infers when the feeds are constants; None where it does not."""
    found: list[Any] = []

    def body(unused: Any) -> Any:
        made = build(**{name: mb.const(val=value) for name, value in feeds.items()})
        found.extend(item.val for item in _listed(made))
        return mb.identity(x=unused)

    with quiet():
        mb.program(input_specs=[mb.TensorSpec((1,), types.fp32)], opset_version=TARGETS[opset])(body)
    return None if any(value is None for value in found) else [np.asarray(value) for value in found]
