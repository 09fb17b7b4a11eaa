"""A target of somebody else: constants in an .npz, the program in JSON, NumPy runs it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from edgeattn.core import tools
from edgeattn.core.errors import ConversionFailed, ToolchainMissing
from edgeattn.targets import base
from edgeattn.targets.base import Artifact, ArtifactEntry, Availability, LowerPlan, Runtime, Tensor
from edgeattn.targets.feeds import check_feeds

_ERF = np.vectorize(math.erf, otypes=[np.float64])


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    return x @ weight.T + (0 if bias is None else bias)


def _gelu(x: Any) -> Any:
    return (0.5 * x * (1 + _ERF(x / math.sqrt(2)))).astype(x.dtype)


def _softmax(x: Any, axis: int, dtype: Any = None) -> Any:
    powers = np.exp(x - x.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def _layer_norm(x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn: Any = None) -> Any:
    axes = tuple(range(-len(shape), 0))
    centred = x - x.mean(axes, keepdims=True)
    scaled = centred / np.sqrt(np.square(centred).mean(axes, keepdims=True) + np.float32(eps))
    return scaled * (1 if weight is None else weight) + (0 if bias is None else bias)


#: What it can run, by the name that torch.export has for it.
OPERATIONS: dict[str, Callable[..., Any]] = {
    "aten.linear.default": _linear,
    "aten.relu.default": lambda x: np.maximum(x, 0),
    "aten.gelu.default": _gelu,
    "aten.softmax.int": _softmax,
    "aten.layer_norm.default": _layer_norm,
    "aten.add.Tensor": lambda a, b: a + b,
    "aten.mul.Tensor": lambda a, b: a * np.float32(b) if isinstance(b, float) else a * b,
    "aten.matmul.default": lambda a, b: a @ b,
    "aten.mean.dim": lambda x, axes, keep=False: x.mean(tuple(axes), keepdims=keep),
    "aten.reshape.default": lambda x, shape: x.reshape(shape),
    "aten.transpose.int": lambda x, a, b: np.swapaxes(x, a, b),
    "aten.chunk.default": lambda x, count, axis=0: np.split(x, count, axis),
    "aten.embedding.default": lambda table, ids: table[ids],
    "<built-in function getitem>": lambda values, place: values[place],
}


class NpzTarget(base.Target):
    """float32 alone."""

    name: ClassVar[str] = "npz"
    runtime_tools: ClassVar[tuple[str, ...]] = ("numpy",)

    def availability(self) -> Availability:
        """Found where NumPy is."""
        version = tools.version("numpy")
        return Availability(version is not None, f"numpy {version}", None if version else "pip install numpy")

    def precisions(self, device: Any) -> tuple[str, ...]:
        """The one."""
        return ("fp32",)

    def lower_tools(self, precision: str) -> tuple[str, ...]:
        """What reads the graph, and what writes."""
        return ("torch", "numpy")

    def lower(self, program: Any, plan: LowerPlan, out: Path) -> Artifact:
        """Write ``ENTRY.json`` and ``ENTRY.npz`` for each entry."""
        written = {name: _written(name, entry) for name, entry in program.entries.items()}
        for name, (nodes, constants, _) in written.items():
            (out / f"{name}.json").write_text(json.dumps(nodes), encoding="utf-8")
            np.savez(out / f"{name}.npz", **constants)
        return Artifact(out, plan.precision, {name: entry for name, (_, _, entry) in written.items()})

    def open(self, artifact: Artifact) -> Runtime:
        """NumPy."""
        if not self.availability().found:
            raise ToolchainMissing("NumPy is missing", fix=self.availability().fix)
        return NpzRuntime(artifact)


def _written(name: str, entry: Any) -> tuple[dict[str, Any], dict[str, Any], ArtifactEntry]:
    """Nodes, constants and description of one graph; raises ConversionFailed with all that stands in the way."""
    graph, signature = entry.graph.graph, entry.graph.graph_signature
    stored = {**entry.graph.state_dict, **entry.graph.constants}
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    held |= signature.inputs_to_lifted_tensor_constants
    unknown, calls, constants = [], [], {}
    for node in graph.nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        if node.op == "placeholder" and node.name in held:
            constants[node.name] = stored[held[node.name]].detach().numpy()
        elif node.op == "call_function" and str(node.target) in OPERATIONS:
            calls.append([node.name, str(node.target), _plain(node.args), _plain(node.kwargs)])
        elif node.op == "call_function":
            unknown.append(f"{node.target} in module {stack[-1][0] if stack and stack[-1][0] else '(model)'}")
    if unknown:
        first = unknown[0].partition(" in ")
        raise ConversionFailed(
            "npz has no such operation", value=first[0], where=first[2], fix="take another target", details=unknown
        )
    values = {node.name: node.meta.get("val") for node in graph.nodes}
    given = [str(node) for node in graph.output_node().args[0]]
    sides = (zip(entry.inputs, signature.user_inputs, strict=True), zip(entry.outputs, given, strict=True))
    inputs, outputs = (
        tuple(Tensor(n, tuple(values[v].shape), str(values[v].dtype).removeprefix("torch.")) for n, v in side)
        for side in sides
    )
    nodes = {"inputs": list(signature.user_inputs), "calls": calls, "outputs": given}
    return nodes, constants, ArtifactEntry(f"{name}.json", inputs, outputs)


def _plain(value: Any) -> Any:
    """Arguments as JSON: a node becomes {"of": its name}."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if not hasattr(value, "op"):
        raise ConversionFailed("npz has no such argument", value=value, where="module (model)")
    return {"of": value.name}


class NpzRuntime(base.OneStep):
    """Carries out the calls one after the other."""

    def run(self, entry: str, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """See ``Runtime``."""
        spec = base.entry_of(self._artifact, entry)
        check_feeds(spec.inputs, feeds)
        file = self._artifact.folder / spec.file
        nodes = json.loads(file.read_text(encoding="utf-8"))
        with np.load(file.with_suffix(".npz"), allow_pickle=False) as data:
            values: dict[str, Any] = dict(data)
        values |= {name: feeds[t.name] for name, t in zip(nodes["inputs"], spec.inputs, strict=True)}

        def real(value: Any) -> Any:
            if isinstance(value, list):
                return [real(one) for one in value]
            return values[value["of"]] if isinstance(value, dict) else value

        for name, operation, args, kwargs in nodes["calls"]:
            values[name] = OPERATIONS[operation](*real(args), **{key: real(v) for key, v in kwargs.items()})
        return {t.name: np.array(values[name]) for name, t in zip(nodes["outputs"], spec.outputs, strict=True)}
