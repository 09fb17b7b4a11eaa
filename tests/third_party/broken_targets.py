"""Targets with one fault each, named as the check of the kit that is there to see it."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from edgeattn_target_npz import NpzRuntime, NpzTarget

from edgeattn.core.errors import ConversionFailed
from edgeattn.targets.base import Artifact, OpCost, Step, TraceValue


class Names(NpzTarget):
    name = "Not A Name"


class Attributes(NpzTarget):
    layouts = ("chw",)


class Availability(NpzTarget):
    def availability(self):
        found = super().availability()
        if not found.found:
            raise KeyError("numpy")
        return found


class Precisions(NpzTarget):
    def precisions(self, device):
        return ("fp32", "int3")

    def tolerance(self, precision):
        return 1e-5


class Options(NpzTarget):
    options: ClassVar[dict[str, tuple[str, ...]]] = {"form": ("short", "long")}

    def settle(self, options, device, precision=""):
        return {"form": options.get("form", "short")}


class Packages(NpzTarget):
    def lower_tools(self, precision):
        return ("no-such-distribution",)


class Requirement(NpzTarget):
    def package(self):
        return "numpy"


class Lower(NpzTarget):
    def lower(self, program, plan, out):
        try:
            return super().lower(program, plan, out)
        except ConversionFailed as error:
            raise NotImplementedError(error.value) from error


class LowerSilent(NpzTarget):
    """Refuses without a word of where."""

    def lower(self, program, plan, out):
        try:
            return super().lower(program, plan, out)
        except ConversionFailed:
            raise ConversionFailed("it cannot be lowered") from None


class Files(NpzTarget):
    def lower(self, program, plan, out):
        (out.parent / "lower.log").write_text("begun")
        return super().lower(program, plan, out)


class FilesFar(NpzTarget):
    """Writes where nobody looks."""

    def lower(self, program, plan, out):
        far = Path(os.environ["EDGEATTN_HOME"]) / "settings.json"
        far.parent.mkdir(exist_ok=True)
        far.write_text("{}")
        far.unlink()
        return super().lower(program, plan, out)


class Program(NpzTarget):
    def lower(self, program, plan, out):
        import torch

        for entry in program.entries.values():
            nodes = list(entry.graph.graph.nodes)
            if not any(node.name == "left_over" for node in nodes):
                with entry.graph.graph.inserting_before(nodes[-1]):
                    entry.graph.graph.create_node(
                        "call_function", torch.ops.aten.relu.default, (nodes[-2],), name="left_over"
                    )
        return super().lower(program, plan, out)


class Bytes(NpzTarget):
    def lower(self, program, plan, out):
        artifact = super().lower(program, plan, out)
        (out / "made.json").write_text(json.dumps(time.time_ns()))
        return artifact


class Process(NpzTarget):
    """The order of a set goes into the file."""

    def lower(self, program, plan, out):
        artifact = super().lower(program, plan, out)
        (out / "made.json").write_text(json.dumps(list({"a", "b", "c", "d", "e", "f"})))
        return artifact


class Outputs(NpzTarget):
    def lower(self, program, plan, out):
        artifact = super().lower(program, plan, out)
        entries = {
            name: replace(e, outputs=tuple(replace(t, name=f"out_{t.name}") for t in e.outputs))
            for name, e in artifact.entries.items()
        }
        return replace(artifact, entries=entries)


class _Off(NpzRuntime):
    def run(self, entry, feeds):
        return {name: value * np.float32(1.001) for name, value in super().run(entry, feeds).items()}


class Numbers(NpzTarget):
    def open(self, artifact):
        return _Off(artifact)


class MorePrecisions(NpzTarget):
    def precisions(self, device):
        return ("fp32", "fp16")

    def open(self, artifact: Artifact):
        return (_Coarse if artifact.precision == "fp16" else NpzRuntime)(artifact)


class _Coarse(NpzRuntime):
    def run(self, entry, feeds):
        return {name: value.round(0) for name, value in super().run(entry, feeds).items()}


class _Buffers(NpzRuntime):
    """Gives views of one buffer for each output."""

    def run(self, entry, feeds):
        results = super().run(entry, feeds)
        buffers = vars(self).setdefault("buffers", {name: value.copy() for name, value in results.items()})
        for name, value in results.items():
            buffers[name][:] = value
        return dict(buffers)


class Runs(NpzTarget):
    def open(self, artifact):
        return _Buffers(artifact)


class _Lenient(NpzRuntime):
    def run(self, entry, feeds):
        spec = self._artifact.entries["main"]
        return super().run(
            "main", {t.name: np.resize(feeds.get(t.name, 0), t.shape).astype(t.dtype) for t in spec.inputs}
        )


class Feeds(NpzTarget):
    def open(self, artifact):
        return _Lenient(artifact)


class _Backwards(NpzRuntime):
    def steps(self, entry):
        (whole,) = super().steps(entry)
        return [Step(whole.outputs, ("half",), "", "second"), Step(("half",), whole.inputs, "", "first")]


class Steps(NpzTarget):
    def open(self, artifact):
        return _Backwards(artifact)


class _Endless(NpzRuntime):
    """Shows all that there is, whatever is wanted."""

    def trace(self, entry, feeds, wanted=None):
        yield TraceValue("input", "", "input", next(iter(feeds.values())))
        yield from super().trace(entry, feeds)


class Trace(NpzTarget):
    def open(self, artifact):
        return _Endless(artifact)


class Operations(NpzTarget):
    def operations(self, artifact, entry):
        return [OpCost("all", "", "program", 0, 4, -4, 4, "fp32")]


class Adopt(NpzTarget):
    def adopt(self, path):
        return Artifact(path.parent, "fp32", {})


class _Absent:
    def run(self, entry, feeds):
        raise ImportError("it is not here after all")


class Others(NpzTarget):
    def others(self, artifact):
        return {"absent": _Absent()}


class Lint(NpzTarget):
    def lint(self, program, device):
        return [len(program.entries[name].graph.graph.nodes) for name in ("main", "decode")]


_MADE: dict[str, Artifact] = {}


class Export(NpzTarget):
    """Runs what this process lowered, and nothing else."""

    name = "export-fault"

    def lower(self, program, plan, out):
        artifact = super().lower(program, plan, out)
        _MADE["last"] = artifact
        return artifact

    def open(self, artifact):
        return super().open(_MADE["last"])
