"""Runs a function of an ML program: binds its operations once, then executes them in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeattn.core.errors import CheckFailed, ConversionFailed, UsageError
from edgeattn.core.numerics import Array
from edgeattn.targets.coreml.mil import ops  # noqa: F401 (fills the registry)
from edgeattn.targets.coreml.mil.features import Feature, features_of
from edgeattn.targets.coreml.mil.package import Package
from edgeattn.targets.coreml.mil.registry import (
    MODES,
    OPS,
    Call,
    Declared,
    Op,
    carrier,
    conform,
    convert,
    to_tensor,
)
from edgeattn.targets.coreml.mil.values import Weights, decode, type_of

#: Called with name, operation and value of every float tensor that is computed.
Watch = Callable[[str, str, Tensor], None]
#: Numbers of the iOS whose operations a function uses, by the name of its operation set.
_OPSETS = {"CoreML5": 15, "CoreML6": 16, "CoreML7": 17, "CoreML8": 18, "CoreML9": 26}


@dataclass(frozen=True)
class _Const:
    """A value that is known before anything runs; the tensor of an array is made when first asked for, and kept."""

    value: Any
    dtype: str
    mode: str
    cache: list[Tensor] = field(default_factory=list)

    def as_kind(self, kind: str) -> Any:
        """As a parameter of that kind takes it."""
        if isinstance(self.value, np.ndarray) and kind in ("Tensor", "Tensors", "Any"):
            if not self.cache:
                self.cache.append(to_tensor(self.value, self.dtype, self.mode))
            return self.cache[0]
        return convert(self.value, kind)


@dataclass(frozen=True)
class _Ref:
    """A value that an operation gives, or an input."""

    name: str


@dataclass
class _Step:
    """One operation, bound; ``blocks`` are those of control flow.

    Attributes:
        fixed: arguments that are known already. moving: parameter, its kind, references and known values among them.
        drop: names of values that nothing after this step reads.
        plain: parameter and name of what is taken as it is carried. rest: of ``moving`` what is not.
    """

    op: Op
    call: Call
    fixed: dict[str, Any]
    moving: list[tuple[str, str, list[Any]]]
    blocks: list[_Block]
    drop: list[str] = field(default_factory=list)
    plain: list[tuple[str, str]] = field(init=False)
    rest: list[tuple[str, str, list[Any]]] = field(init=False)

    def __post_init__(self) -> None:
        plain = ("Tensor", "Any")
        self.plain = [(parameter, items[0].name) for parameter, kind, items in self.moving if kind in plain]
        self.rest = [item for item in self.moving if item[1] not in plain]

    def arguments(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments, with the references looked up."""
        given = dict(self.fixed)
        for parameter, name in self.plain:
            given[parameter] = values[name]
        for parameter, kind, items in self.rest:
            found = [values[item.name] if type(item) is _Ref else item for item in items]
            given[parameter] = found if kind == "Tensors" else convert(found[0], kind)
        return given


@dataclass(frozen=True)
class _Block:
    """Operations in order; ``outputs`` are references and known values under ``names``."""

    inputs: tuple[str, ...]
    steps: list[_Step]
    names: tuple[str, ...]
    outputs: list[Any]


def _bindings(spec: Any) -> dict[str, list[Any]]:
    """Arguments of an operation by parameter; constexpr operations hold theirs as attributes."""
    bound = {name: list(argument.arguments) for name, argument in spec.inputs.items()}
    return bound | {name: [value] for name, value in spec.attributes.items() if name != "name"}


def _names_read(spec: Any) -> set[str]:
    """Names of all values that an operation or its blocks read."""
    names = {b.name for argument in spec.inputs.values() for b in argument.arguments if b.name}
    for block in spec.blocks:
        names = names.union(block.outputs, *map(_names_read, block.operations))
    return names


class States:
    """What functions keep between runs: a box with a tensor for each; the methods are those of coremltools' MLState."""

    def __init__(self, features: Mapping[str, tuple[Feature, str]], mode: str) -> None:
        """All zeros; ``features`` with their dtypes in MIL, by name."""
        self._features, self._mode = features, mode
        self.boxes: dict[str, list[Tensor]] = {name: [] for name in features}
        self.reset()

    def reset(self) -> None:
        """Let all of them hold zeros."""
        for name, (feature, dtype) in self._features.items():
            self.boxes[name][:] = [torch.zeros(feature.shape, dtype=carrier(dtype, self._mode))]

    def read_state(self, name: str) -> Array:
        """A copy of what a state holds, in its own dtype."""
        value: Array = self._features[name][0].from_result(self.boxes[name][0])
        return value

    def write_state(self, name: str, value: Array) -> None:
        """Let a state hold these numbers.

        Raises:
            UsageError: another shape or dtype, or NaN in it.
        """
        feature, dtype = self._features[name]
        self.boxes[name][0] = to_tensor(feature.check(value), dtype, self._mode).clone()


class Function:
    """A function of a package, ready to run; weights are decoded here, once.

    Attributes:
        inputs, outputs: what it takes and gives. states: what it keeps between runs.
        nodes: how many operations there are of each type, constants aside.
    """

    def __init__(self, package: Package, name: str | None = None, mode: str = "fp32acc") -> None:
        """Bind every operation of the function; the default one without a ``name``.

        Args:
            mode: what computes fp16: ``fp32`` float32 without any rounding, ``native`` float16, ``fp32acc`` float32
                with each output rounded to its dtype.

        Raises:
            UsageError: no such function or mode; a damaged weight file.
            ConversionFailed: an operation that has no implementation here; names the module that it came from.
        """
        if mode not in MODES:
            raise UsageError("unknown mode of the MIL interpreter", value=mode, why=f"known are {', '.join(MODES)}")
        name = name or package.functions[0]
        if name not in package.functions:
            why = f"it has {', '.join(package.functions)}"
            raise UsageError("the Core ML package has no such function", value=name, where=str(package.path), why=why)
        spec = package.spec.mlProgram.functions[name]
        self.mode, self.nodes = mode, Counter[str]()
        self.inputs, self.outputs, self.states = features_of(package, name)
        self._modules = package.modules_in(name)
        self._opset = _OPSETS.get(spec.opset, max(_OPSETS.values()))
        self._weights = Weights(package.root)
        self._watch: Watch | None = None
        self._types = {item.name: type_of(item.type)[0] for item in spec.inputs}
        with torch.inference_mode():
            self._block = self._compile(spec.block_specializations[spec.opset], {})

    def _compile(self, spec: Any, around: Mapping[str, Any]) -> _Block:
        """Bind the operations of a block; ``around`` are constants and references of the blocks around it."""
        known: dict[str, Any] = {**around, **{item.name: _Ref(item.name) for item in spec.inputs}}
        steps: list[tuple[_Step, set[str]]] = []
        for item in spec.operations:
            if item.type == "const":
                (output,) = item.outputs
                value = decode(item.attributes["val"], self._weights)
                known[output.name] = _Const(value, type_of(output.type)[0], self.mode)
                continue
            step = self._bind(item, known)
            if item.type.startswith("constexpr_"):
                for declared, value in zip(step.call.outputs, self._execute(step, {}), strict=True):
                    known[declared.name] = _Const(value, declared.dtype, self.mode)
                continue
            self.nodes[item.type] += 1
            known.update({declared.name: _Ref(declared.name) for declared in step.call.outputs})
            steps.append((step, _names_read(item)))
        needed = set(spec.outputs)
        for step, names in reversed(steps):
            made = {declared.name for declared in step.call.outputs}
            step.drop = [name for name in (names | made) - needed if name not in around]
            needed |= names
        outputs = [known.get(name, _Ref(name)) for name in spec.outputs]
        inputs = tuple(item.name for item in spec.inputs)
        return _Block(inputs, [step for step, _ in steps], tuple(spec.outputs), outputs)

    def _bind(self, spec: Any, known: Mapping[str, Any]) -> _Step:
        outputs = tuple(Declared(item.name, *type_of(item.type)) for item in spec.outputs)
        name = outputs[0].name if outputs else spec.type
        bindings, found = _bindings(spec), OPS.get(spec.type)
        strangers = set(bindings) - set(found.kinds) if found else set()
        if found is None or strangers:
            why = (
                f"it has parameters that are unknown here: {', '.join(sorted(strangers))}"
                if strangers
                else ("the MIL interpreter has no implementation of it")
            )
            raise ConversionFailed(
                "an operation of the Core ML model cannot be interpreted",
                value=spec.type,
                where=f"module {self._modules.get(name) or '(model)'}, operation {name}",
                why=why,
                fix="its numbers cannot be checked here; write that module with other operations",
            )
        fixed: dict[str, Any] = {}
        moving: list[tuple[str, str, list[Any]]] = []
        for parameter, arguments in bindings.items():
            kind = found.kinds[parameter]
            values = [self._known(argument, known) for argument in arguments]
            ready = [v.as_kind(kind) if isinstance(v, _Const) else v for v in values]
            if any(isinstance(value, _Ref) for value in values):
                moving.append((parameter, kind, ready))
            else:
                fixed[parameter] = ready if kind == "Tensors" else ready[0]
        call = Call(spec.type, name, self._opset, self.mode, outputs)
        fixed.update({parameter: call for parameter, kind in found.kinds.items() if kind == "Call"})
        return _Step(found, call, fixed, moving, [self._compile(block, known) for block in spec.blocks])

    def _known(self, argument: Any, known: Mapping[str, Any]) -> Any:
        """The constant or the reference that an argument names, or the constant that it holds."""
        if argument.DESCRIPTOR.name == "Binding" and argument.WhichOneof("binding") == "name":
            return known.get(argument.name, _Ref(argument.name))
        value = argument.value if argument.DESCRIPTOR.name == "Binding" else argument
        return _Const(decode(value, self._weights), type_of(value.type)[0], self.mode)

    def _nested(self, block: _Block, around: Mapping[str, Any]) -> Callable[[Sequence[Any]], list[Any]]:
        """A block of control flow as a function from its arguments to its results."""
        return lambda values: self._run_block(block, {**around, **dict(zip(block.inputs, values, strict=True))})

    def _run_block(self, block: _Block, values: dict[str, Any]) -> list[Any]:
        for step in block.steps:
            for declared, value in zip(step.call.outputs, self._execute(step, values), strict=True):
                values[declared.name] = value
                if self._watch is not None and isinstance(value, Tensor) and value.is_floating_point():
                    self._watch(declared.name, step.call.type, value)
            for name in step.drop:
                values.pop(name, None)
        return [values[item.name] if isinstance(item, _Ref) else item.as_kind("Any") for item in block.outputs]

    def _execute(self, step: _Step, values: Mapping[str, Any]) -> list[Any]:
        """Outputs of one operation in their declared dtypes."""
        given, call = step.arguments(values), step.call
        if step.blocks:
            given["call"] = replace(call, blocks=tuple(self._nested(block, values) for block in step.blocks))
        try:
            made = self._compute(step.op, given)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise CheckFailed(
                "an operation of the Core ML model cannot be computed",
                value=call.type,
                where=f"module {self._modules.get(call.name) or '(model)'}, operation {call.name}",
                why=(str(error).splitlines() or [type(error).__name__])[0],
            ) from error
        results = list(made) if isinstance(made, tuple) else [made]
        if step.op.moves:
            return results
        return [
            conform(value, declared.dtype, self.mode) if isinstance(value, Tensor) else value
            for value, declared in zip(results, call.outputs, strict=True)
        ]

    def _compute(self, op: Op, given: dict[str, Any]) -> Any:
        """What an implementation returns; in float32 where torch has no float16 kernel for it."""
        try:
            return op.function(**given)
        except RuntimeError as error:
            if self.mode != "native" or "not implemented for 'Half'" not in str(error):
                raise
        wide = {k: v.float() if isinstance(v, Tensor) and v.dtype == torch.half else v for k, v in given.items()}
        return op.function(**wide)

    def module_of(self, value: str) -> str:
        """Path of the torch module that a value came from; "" if that is not known."""
        return self._modules.get(value, "")

    def operations(self) -> list[tuple[tuple[str, ...], tuple[str, ...], str]]:
        """Names of the values that each operation gives and reads, constants aside, and its kind; in order."""
        return [
            (
                tuple(declared.name for declared in step.call.outputs),
                tuple(item.name for _, _, items in step.moving for item in items if isinstance(item, _Ref)),
                step.call.type,
            )
            for step in self._block.steps
        ]

    def make_state(self) -> States:
        """New states, all zeros, for ``run`` to read and to write, also of another function with the same ones."""
        return States({s.name: (s, self._types[s.name]) for s in self.states}, self.mode)

    def run(
        self, feeds: Mapping[str, Array], state: States | None = None, watch: Watch | None = None
    ) -> dict[str, Any]:
        """Outputs by name: arrays in the dtypes that the model declares, and what a classifier gives.

        Args:
            feeds: arrays by name. state: from ``make_state``; changed by the run.
            watch: sees every float tensor that is computed, in order.

        Raises:
            UsageError: feeds of other names, shapes or dtypes, or with NaN in them; a state is needed.
            CheckFailed: an operation that cannot be computed on these feeds.
        """
        names = {feature.name for feature in self.inputs}
        if names != set(feeds):
            raise UsageError(
                "the inputs do not match",
                value=", ".join(feeds) or "none",
                why=f"wanted are {', '.join(sorted(names))}",
            )
        if self.states and state is None:
            why = f"it keeps {', '.join(s.name for s in self.states)}"
            raise UsageError("the model needs a state", why=why, fix="pass one from make_state()")
        values: dict[str, Any] = dict(state.boxes if state else {})
        for feature in self.inputs:
            given = feature.check(feeds[feature.name])
            values[feature.name] = to_tensor(given, self._types[feature.name], self.mode)
        self._watch = watch
        try:
            with torch.inference_mode():
                results = self._run_block(self._block, values)
        finally:
            self._watch = None
        named = dict(zip(self._block.names, results, strict=True))
        return {feature.name: feature.from_result(named[feature.name]) for feature in self.outputs}
