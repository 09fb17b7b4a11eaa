"""TensorRT's own parser and builder: what it takes, which layers it makes of a graph, and engines.

Without a GPU all of this works in TensorRT for RTX. An engine cannot be opened then: what is known of one is read from
the network that it is built from.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeattn.core.errors import ConversionFailed, ToolchainMissing
from edgeattn.targets.tensorrt import PACKAGES, PORTABLE

if TYPE_CHECKING:
    import onnx_ir as ir

#: By input: smallest, usual and largest shape.
Profiles = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]

#: What to write instead of operations that are known to be missing.
INSTEAD = {
    "Attention": "call scaled_dot_product_attention decomposed, as EdgeAttn does up to opset 20",
    "BitShift": "multiply or divide by a power of two",
    "Det": "write the determinant out for small matrices, or compute it on the host",
    "DFT": "multiply with a constant matrix of sines and cosines",
    "DynamicQuantizeLinear": "quantize with constant scales: --precision w8a8",
    "MatMulInteger": "quantize with constant scales: --precision w8a8",
    "Unique": "compute it on the host, or use a fixed number of classes",
}
#: How TensorRT speaks of too little memory.
_MEMORY = ("out of memory", "outofmemory", "insufficient memory", "workspace")
#: Words of TensorRT's that say no more than that it does not take a node.
_EMPTY = re.compile("^false$|Plugin not found")
_ELSE = "write that module with other operations, or run it outside of the engine"


@dataclass(frozen=True)
class Built:
    """An engine: its bytes, and how long the build took in seconds."""

    plan: bytes
    seconds: float


def tensorrt(flavour: str) -> tuple[Any, str]:
    """The flavour's module and distribution; the other flavour's where that alone is here, whose parser is the same.

    Raises:
        ToolchainMissing: neither is installed.
    """
    for name in (PACKAGES[flavour], *PACKAGES.values()):
        found = importlib.util.find_spec(name.replace("-", "_"))
        if found is not None and found.origin:  # a folder of that name has none
            return importlib.import_module(name.replace("-", "_")), name
    raise ToolchainMissing("TensorRT's parser is missing", fix="pip install 'edgeattn[tensorrt]'")


def _logger(trt: Any) -> Any:
    """A logger that keeps warnings and errors in ``lines`` and prints nothing."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING and message not in self.warnings:
                self.warnings.append(message)

    return Log()


class Builder:
    """One graph inside of TensorRT.

    Args:
        path: of the .onnx file.
    """

    def __init__(self, path: Path, flavour: str) -> None:
        self._trt, self.distribution = tensorrt(flavour)
        self._log = _logger(self._trt)
        # Held as long as network and parser live: made from a temporary one they crashed.
        self._builder = self._trt.Builder(self._log)
        self._path = path
        self._network: Any = None
        self._parser: Any = None

    @property
    def version(self) -> str:
        """TensorRT's own."""
        return str(self._trt.__version__)

    def _nodes(self) -> list[ir.Node]:
        """The graph's nodes as they stand in the file; read only when something went wrong."""
        import onnx_ir

        return list(onnx_ir.load(self._path).graph)

    def _fresh(self) -> None:
        """An empty network, strongly typed where that is still a choice, and a parser for it."""
        typed = getattr(self._trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        self._network = self._builder.create_network(0 if typed is None else 1 << int(typed))
        self._parser = self._trt.OnnxParser(self._network, self._log)

    def parse(self) -> dict[str, Any]:
        """Have the parser take the graph; facts: layers by kind, and inputs and outputs as TensorRT has them.

        Raises:
            ConversionFailed: lists every node that it does not take, with its module and what to do.
        """
        self._fresh()
        if not self._parser.parse_from_file(str(self._path)):
            raise self._refusal()
        network = self._network
        layers = [network.get_layer(i) for i in range(network.num_layers)]
        ends = {
            "inputs": [network.get_input(i) for i in range(network.num_inputs)],
            "outputs": [network.get_output(i) for i in range(network.num_outputs)],
        }
        types = Counter(layer.get_output(0).dtype.name.lower() for layer in layers if layer.num_outputs)
        return {
            "layers": dict(Counter(layer.type.name.lower() for layer in layers).most_common()),
            "layer_types": dict(types.most_common()),
            **{
                side: [{"name": t.name, "shape": list(t.shape), "dtype": t.dtype.name.lower()} for t in tensors]
                for side, tensors in ends.items()
            },
        }

    def _errors(self) -> list[tuple[int, str]]:
        """Node and text of what the parser says; copies, since its own words end with it."""
        errors = [self._parser.get_error(i) for i in range(self._parser.num_errors)]
        return [(error.node(), "" if _EMPTY.search(error.desc()) else str(error.desc())) for error in errors]

    def _refused(self, nodes: list[ir.Node]) -> dict[int, str]:
        """What TensorRT says of each node that it does not take, by index; -1 is what it says of none of them."""
        errors = self._errors()
        self._fresh()  # parsing may stop at the first; the question of what is supported goes through all
        self._parser.supports_model_v2(self._path.read_bytes(), str(self._path))
        errors += self._errors()
        said = {i: "" for i, node in enumerate(nodes) if not self._parser.supports_operator(node.op_type)}
        for node, text in errors:
            at = [node] if 0 <= node < len(nodes) else []
            if not at:  # of a weight, whose name ends the message
                weight = text.rpartition("initializer: ")[2]
                at = [i for i, node in enumerate(nodes) if weight in [v.name for v in node.inputs if v is not None]]
            for index in at or [-1]:
                said[index] = said.get(index) or text
        return dict(sorted(said.items()))

    def _refusal(self) -> ConversionFailed:
        from edgeattn.targets.onnx_graph.execute import module_of

        nodes = self._nodes()
        said = self._refused(nodes)
        ops = list(dict.fromkeys(nodes[i].op_type for i in said if i >= 0))
        places = [module_of(nodes[i]) or "(model)" for i in said if i >= 0]
        lines = []
        for index, text in said.items():
            op, place = (nodes[index].op_type, module_of(nodes[index]) or "(model)") if index >= 0 else ("", "")
            what = f"{op} in module {place}{f': {text[:250]}' if text else ''}; {INSTEAD.get(op, _ELSE)}"
            lines.append(what if op else text[:400])
        return ConversionFailed(
            "TensorRT's parser cannot take operations of the model",
            value=", ".join(ops) or None,
            where=f"module {places[0]}" if places else None,
            why=f"{self.distribution} {self.version} does not support {len(places)} node{'s' if places[1:] else ''}"
            if places
            else "; ".join(self._log.errors[-2:])[:400],
            fix=INSTEAD.get(ops[0], _ELSE) if ops else "look at the log of the stage",
            details=lines,
        )

    def build(self, compute: str, precision: str, options: Mapping[str, str], profiles: Profiles) -> Built:
        """An engine for a compute capability, or a portable one.

        Raises:
            ConversionFailed: the builder says no; its own words, with modules where it names nodes.
        """
        trt = self._trt
        config = self._builder.create_builder_config()
        if precision == "fp32":
            config.clear_flag(trt.BuilderFlag.TF32)  # ten bits of mantissa do not hold to 1e-5
        if options["weight_streaming"] == "yes":
            config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
        config.builder_optimization_level = int(options["level"])
        if options["workspace_mb"] != "default":
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options["workspace_mb"]) << 20)
        if compute != PORTABLE:
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{compute.replace('.', '')}"), 0)
        if profiles:
            profile = self._builder.create_optimization_profile()
            for name, shapes in profiles.items():
                profile.set_shape(name, *map(tuple, shapes))
            config.add_optimization_profile(profile)
        self._log.errors.clear()
        begun = time.perf_counter()
        plan = self._builder.build_serialized_network(self._network, config)
        if plan is None:
            raise self._failure(compute)
        return Built(bytes(plan), time.perf_counter() - begun)

    def _failure(self, compute: str) -> ConversionFailed:
        from edgeattn.targets.onnx_graph.execute import module_of

        lines = list(dict.fromkeys(self._log.errors)) or ["it gave no reason"]
        text = " ".join(lines)
        named = [node for node in self._nodes() if node.name and f"'{node.name}'" in text]
        memory = any(words in text.lower() for words in _MEMORY)
        fix = "the nodes that it names are the ones to change; --precision may help too"
        if memory:
            fix = (
                "the lines below say how much it asked for: set -O workspace_mb=N above it where the machine has that "
                "much, -O weight_streaming=yes for large weights, or close what else fills the memory"
            )
        return ConversionFailed(
            "TensorRT cannot build an engine",
            value=f"compute {compute}",
            where=f"module {module_of(named[0]) or '(model)'}" if named else None,
            why=lines[0][:400],
            fix=fix,
            details=[line[:400] for line in lines[1:6]],
        )
