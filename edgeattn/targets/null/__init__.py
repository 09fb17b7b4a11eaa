"""The null target: lowers to the captured program itself, so that the pipeline runs without any toolchain."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from edgeattn.core import tools
from edgeattn.core.errors import ToolchainMissing
from edgeattn.core.numerics import Array
from edgeattn.targets.base import (
    Artifact,
    ArtifactEntry,
    Availability,
    LowerPlan,
    OneStep,
    Runtime,
    Target,
    Tensor,
    entry_of,
)
from edgeattn.targets.feeds import check_feeds

if TYPE_CHECKING:
    from edgeattn.capture import Program
    from edgeattn.device import Device


class NullTarget(Target):
    """float32 only; runs in PyTorch."""

    name: ClassVar[str] = "null"
    runtime_tools: ClassVar[tuple[str, ...]] = ("torch",)
    cache: ClassVar[Literal["", "dynamic", "buckets", "whole"]] = "whole"

    def availability(self) -> Availability:
        """Found where torch is."""
        version = tools.version("torch")
        if version is None:
            return Availability(False, "not installed: torch", "pip install 'torch>=2.9,<2.14'")
        return Availability(True, f"torch {version}")

    def precisions(self, device: Device | None) -> tuple[str, ...]:
        """What capture gives."""
        return ("fp32",)

    def lower_tools(self, precision: str) -> tuple[str, ...]:
        """torch alone."""
        return ("torch",)

    def lower(self, program: Program, plan: LowerPlan, out: Path) -> Artifact:
        """Save the program's entries as .pt2 files."""
        program.save(out)
        entries = {}
        for name, entry in program.entries.items():
            placeholders = [n for n in entry.graph.graph.nodes if n.op == "placeholder"]
            users = set(entry.graph.graph_signature.user_inputs)
            values = [n.meta["val"] for n in placeholders if n.name in users]
            # An output that is no tensor (None, a number) is not a node, or not one with a shape.
            returned: list[Any] = [getattr(n, "meta", {}).get("val") for n in entry.graph.graph.output_node().args[0]]
            results = [v for v in returned if hasattr(v, "shape")]
            entries[name] = ArtifactEntry(
                f"{name}.pt2",
                tuple(Tensor(n, tuple(v.shape), _dtype(v)) for n, v in zip(entry.inputs, values, strict=True)),
                tuple(Tensor(n, tuple(v.shape), _dtype(v)) for n, v in zip(entry.outputs, results, strict=True)),
            )
        return Artifact(out, plan.precision, entries, {})

    def open(self, artifact: Artifact) -> Runtime:
        """The program as a PyTorch module."""
        if tools.version("torch") is None:
            raise ToolchainMissing("torch is missing", why="the null target runs in it", fix=self.availability().fix)
        return _NullRuntime(artifact)


def _dtype(value: object) -> str:
    return str(getattr(value, "dtype", "")).removeprefix("torch.")


class _NullRuntime(OneStep):
    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact)
        self._modules: dict[str, Any] = {}

    def run(self, entry: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        spec = entry_of(self._artifact, entry)
        check_feeds(spec.inputs, feeds)
        if entry not in self._modules:
            self._modules[entry] = torch.export.load(self._artifact.folder / spec.file).module()
        with torch.no_grad():
            result = self._modules[entry](*(torch.from_numpy(feeds[i.name]) for i in spec.inputs))
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        return {output.name: leaf.detach().numpy() for output, leaf in zip(spec.outputs, leaves, strict=True)}
