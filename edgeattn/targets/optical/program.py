"""``program.json``: what an optical bundle does, turn by turn, as it is written and read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeattn.core.errors import CheckFailed
from edgeattn.core.files import inside
from edgeattn.core.numerics import Array
from edgeattn.device import Optics
from edgeattn.targets.optical.forms import Layout
from edgeattn.targets.optical.schedule import Plan, Workload, plain

FILE = "program.json"
#: Of the format; a reader refuses others.
VERSION = 1
AGAIN = "copy the bundle again, or export anew"


@dataclass(frozen=True)
class Operation:
    """One optical operation.

    Attributes:
        name: of its own. module: path of the torch module. op: of the graph, as ``Conv``.
        input, output: names of the tensors. shape: of the input.
        plan: for one run of the program, under the device's sign scheme. signed: whether inputs had negative numbers.
        masks, bias: files beside the program; "" where there is no bias.
        error: relative L2 between the ideal planes and a plain convolution, as it was measured.
    """

    name: str
    module: str
    op: str
    input: str
    output: str
    shape: tuple[int, ...]
    layout: Layout
    work: Workload
    plan: Plan
    signed: bool
    masks: str
    bias: str
    error: float

    def kernels(self, folder: Path) -> Array:
        """Kernels (groups, kernels, channels, N1, N2), as they convolve. Raises CheckFailed: not such a file."""
        wanted = (self.work.groups, self.work.kernels, self.work.channels)
        found = _array(inside(folder, self.masks))
        if found.ndim != 5 or found.shape[:3] != wanted:
            why = f"it holds {found.shape}, the program wants {(*wanted, 'N1', 'N2')}"
            raise CheckFailed("masks do not fit their program", where=str(folder / self.masks), why=why, fix=AGAIN)
        return found

    def offset(self, folder: Path) -> Array | None:
        """The bias."""
        return _array(inside(folder, self.bias)) if self.bias else None


def _array(path: Path) -> Array:
    """The array of a .npy file.

    Raises:
        CheckFailed: it is missing or damaged; code in it is not run.
    """
    try:
        found: Array = np.load(path, allow_pickle=False)
        return found
    except (OSError, ValueError, EOFError) as error:
        why = str(error).splitlines()[0]
        raise CheckFailed("a file of an optical bundle cannot be read", where=str(path), why=why, fix=AGAIN) from error


@dataclass(frozen=True)
class Turn:
    """Electronics (an ONNX file, or ""), and then optics."""

    electronics: str
    optics: tuple[Operation, ...]


@dataclass(frozen=True)
class OpticalProgram:
    """All turns of an entry.

    Attributes:
        device: name. optics: of it.
        electronic_ops: multiply-accumulates and elementwise operations that are left to electronics in one run.
    """

    device: str
    optics: Optics
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    electronic_ops: int
    turns: tuple[Turn, ...]

    @property
    def operations(self) -> list[Operation]:
        """All optical ones, in order."""
        return [op for turn in self.turns for op in turn.optics]

    def text(self) -> str:
        """As JSON."""
        data = {
            "version": VERSION,
            "device": self.device,
            "optics": self.optics.model_dump(mode="json"),
            "inputs": self.inputs,
            "outputs": self.outputs,
            "electronic_ops": self.electronic_ops,
            "masks": "each file holds the kernels of an operation as they convolve: (groups, kernels, channels, down, "
            "right). The mask of a frame is the two-dimensional Fourier transform of the plane on which its plan lays "
            "them out; edgeattn optics show draws both.",
            "turns": [
                {"electronics": turn.electronics, "optics": [_operation(op) for op in turn.optics]}
                for turn in self.turns
            ],
        }
        return json.dumps(data, indent=1) + "\n"

    @staticmethod
    def read(folder: Path) -> OpticalProgram:
        """The program in a folder.

        Raises:
            CheckFailed: it is missing, damaged, or of another version.
        """
        try:
            data = json.loads((folder / FILE).read_text(encoding="utf-8"))
            if data["version"] != VERSION:
                raise ValueError(f"version {data['version']}, and this EdgeAttn reads {VERSION}")
            turns = tuple(
                Turn(turn["electronics"], tuple(_read(op) for op in turn["optics"])) for turn in data["turns"]
            )
            optics = Optics.model_validate_json(json.dumps(data["optics"]))
            names = tuple(data["inputs"]), tuple(data["outputs"])
            return OpticalProgram(data["device"], optics, *names, data["electronic_ops"], turns)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckFailed(
                "an optical program cannot be read", where=str(folder / FILE), why=str(error), fix="export anew"
            ) from error


def _operation(op: Operation) -> dict[str, Any]:
    return {**vars(op), "layout": op.layout.as_dict(), "work": asdict(op.work), "plan": op.plan.as_dict()}


def _read(data: Mapping[str, Any]) -> Operation:
    fields = {
        **data,
        "shape": tuple(data["shape"]),
        "layout": Layout.from_dict(data["layout"]),
        "work": Workload(**plain(data["work"])),
        "plan": Plan.from_dict(data["plan"]),
    }
    return Operation(**fields)
