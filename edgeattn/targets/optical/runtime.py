"""Runs an optical bundle: electronics under ONNX Runtime, optics on simulated planes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from edgeattn.core.files import inside
from edgeattn.core.numerics import Array
from edgeattn.device import Effects
from edgeattn.targets.base import Artifact, Step, TraceValue, entry_of
from edgeattn.targets.feeds import check_feeds
from edgeattn.targets.onnx_graph.execute import Tracer, graph_steps, make_session
from edgeattn.targets.optical.convolve import Convolver, MaskStore
from edgeattn.targets.optical.program import Operation, OpticalProgram, Turn


class OpticalRuntime:
    """An artifact's entries on a 4f correlator.

    Args:
        effects: of the hardware; an ideal correlator, which convolves and nothing else, without.
    """

    def __init__(self, artifact: Artifact, effects: Effects | None = None) -> None:
        self._artifact = artifact
        self._effects = effects
        self._generator = torch.Generator().manual_seed(effects.seed if effects else 0)
        self._programs: dict[str, OpticalProgram] = {}
        self._sessions: dict[Path, ort.InferenceSession] = {}
        self._convolvers: dict[Path, Convolver] = {}
        self._masks = MaskStore()
        self._biases: dict[Path, Array | None] = {}

    def folder(self, entry: str) -> Path:
        """Where an entry's files are."""
        return self._artifact.folder / entry_of(self._artifact, entry).file

    def program(self, entry: str) -> OpticalProgram:
        """An entry's program."""
        if entry not in self._programs:
            self._programs[entry] = OpticalProgram.read(self.folder(entry))
        return self._programs[entry]

    def run(self, entry: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""
        return self.run_many(entry, [feeds])[0]

    def run_many(self, entry: str, samples: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
        """The same for several samples at once: their tiles share the planes, as in a batch.

        Raises:
            UsageError: unknown entry, or feeds whose names, shapes or dtypes differ from the entry's.
        """
        inputs = entry_of(self._artifact, entry).inputs
        for feeds in samples:
            check_feeds(inputs, feeds)
        program, folder = self.program(entry), self.folder(entry)
        known = [dict(feeds) for feeds in samples]
        for turn in program.turns:
            if turn.electronics:
                session = self._session(inside(folder, turn.electronics))
                wanted = [value.name for value in session.get_outputs()]
                for values in known:
                    given = {value.name: values[value.name] for value in session.get_inputs()}
                    values.update(zip(wanted, session.run(wanted, given), strict=True))
            for op in turn.optics:
                for values, result in zip(known, self._optical(op, folder, program, known), strict=True):
                    values[op.output] = result
        return [{name: values[name] for name in program.outputs} for values in known]

    def _session(self, path: Path) -> ort.InferenceSession:
        if path not in self._sessions:
            self._sessions[path] = make_session(str(path))
        return self._sessions[path]

    def _optical(
        self, op: Operation, folder: Path, program: OpticalProgram, known: Sequence[Mapping[str, Array]]
    ) -> Iterator[Array]:
        place = inside(folder, op.masks)
        if place not in self._convolvers:
            kernels = torch.from_numpy(op.kernels(folder))
            self._convolvers[place] = Convolver(
                kernels, op.work, program.optics, self._effects, self._generator, self._masks
            )
            self._biases[place] = op.offset(folder)
        maps = torch.cat([op.layout.maps(torch.from_numpy(values[op.input])) for values in known])
        with torch.no_grad():
            results = self._convolvers[place](maps)
        bias = self._biases[place]
        for part in results.chunk(len(known)):
            result = op.layout.result(part, op.shape).numpy()
            yield np.ascontiguousarray(result if bias is None else result + bias)

    def trace(
        self, entry: str, feeds: Mapping[str, Array], wanted: Collection[str] | None = None
    ) -> Iterator[TraceValue]:
        """Every float tensor of the electronics, and the results of the optics, in order."""
        program, folder = self.program(entry), self.folder(entry)
        known = dict(feeds)
        shown: set[str] = set()
        for turn in program.turns:
            if turn.electronics:
                given = {name: known[name] for name in self._reads(folder, turn)}
                for item in Tracer(ir.load(inside(folder, turn.electronics)), wanted).over([given]):
                    if item.name not in shown:  # what a turn reads has been made, and shown, by another
                        yield item
                    shown.add(item.name)
                session = self._session(inside(folder, turn.electronics))
                made = [value.name for value in session.get_outputs()]
                known.update(zip(made, session.run(made, given), strict=True))
            for op in turn.optics:
                (known[op.output],) = self._optical(op, folder, program, [known])
                shown.add(op.output)
                if wanted is None or op.output in wanted:
                    yield TraceValue(op.output, op.module, op.op, known[op.output])

    def _reads(self, folder: Path, turn: Turn) -> list[str]:
        return [value.name for value in self._session(inside(folder, turn.electronics)).get_inputs()]

    def steps(self, entry: str) -> list[Step]:
        """The nodes of the electronics, and the optical operations."""
        folder, found = self.folder(entry), []
        for turn in self.program(entry).turns:
            if turn.electronics:
                found += graph_steps(ir.load(inside(folder, turn.electronics)).graph)
            found += [Step((op.output,), (op.input,), op.module, op.op) for op in turn.optics]
        return found
