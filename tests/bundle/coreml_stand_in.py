"""Stands for coremltools on a Mac: answers from ``transcript.json`` beside it, and notes each call in ``calls.jsonl``.

The program that every package holds here is ``y = 2 * x``, which a compute unit gets wrong by the factor that the
transcript says; or that of ``small_decoder``, where the transcript names functions. What the real package refuses is
refused here too, as far as a runner could run into it.
"""

from __future__ import annotations

import enum
import json
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np

HERE = Path(__file__).parent


def transcript() -> dict[str, Any]:
    return json.loads((HERE / "transcript.json").read_text())


def note(what: str, unit: str) -> None:
    """Also dies where the transcript says so."""
    with (HERE / "calls.jsonl").open("a") as file:
        file.write(json.dumps({"call": what, "unit": unit, "process": os.getpid()}) + "\n")
    said = transcript()["units"].get(unit, {})
    if said.get("killed_at") == what:
        os.kill(os.getpid(), getattr(signal, said["signal"]))
    if said.get("refused_at") == what:
        raise RuntimeError(said["refusal"])


class ComputeUnit(enum.Enum):
    ALL = 1
    CPU_AND_GPU = 2
    CPU_ONLY = 3
    CPU_AND_NE = 4


Arrays: TypeAlias = dict[str, Any]
#: Of ``small_decoder``: what it keeps, rows of that, and how many logits it gives.
ROWS, CONTEXT, VOCABULARY = "rows_0", 16, 7


def small_decoder(feeds: Arrays, rows: Any) -> Arrays:
    """Logits (1, V), highest for the sum of all tokens modulo V, and the new rows (1, N, 2): token and position.

    Args:
        feeds: of a decoder's entry. rows: what the cache holds, (1, S, 2).
    """
    ids, begin = feeds["ids"], int(feeds["position"][0])
    count = int(feeds["last"][0]) + 1 if "last" in feeds else ids.shape[1]
    total = rows[0, :begin, 0].astype(np.int64).sum() + ids[0, :count].sum()
    new = np.stack([ids, begin + np.arange(ids.shape[1])[None]], -1).astype(np.float32)
    logits = -((np.arange(VOCABULARY, dtype=np.float32)[None] - total % VOCABULARY) ** 2)
    return {"logits": logits, f"new_{ROWS}": new}


class MLState:
    """Zeros at first. Belongs to all functions of a package, which is what nobody tried here."""

    def __init__(self, proxy: Any) -> None:
        self._held = proxy
        self.used = False

    def read_state(self, name: str) -> Any:
        return self._held[name].copy()

    def write_state(self, name: str, value: Any) -> None:
        if self._held[name].shape != value.shape or value.dtype != np.float16:
            raise RuntimeError(f"{name} cannot hold {value.shape} {value.dtype}")
        self._held[name][...] = value


class _Loaded:
    """What is common to both kinds of model."""

    _loads = 0

    def _load(self, unit: ComputeUnit, function: str | None) -> None:
        self._unit, self._said = unit.name, transcript()
        if function not in (self._said["functions"] or [None]):
            raise RuntimeError(f"Failed to load: there is no function {function}")
        note("load", self._unit)
        time.sleep(self._said["units"][self._unit]["load_ms"][min(_Loaded._loads, 1)] / 1e3)
        _Loaded._loads += 1

    def make_state(self) -> MLState:
        note("make_state", self._unit)
        return MLState({name: np.zeros((1, CONTEXT, 2), np.float16) for name in self._said["state"]})

    def predict(self, data: dict[str, Any], state: MLState | None = None) -> dict[str, Any]:
        if type(data) is not dict:
            raise TypeError('"data" parameter must be either a dict or list of dict')
        note("predict", self._unit)
        time.sleep(self._said["units"][self._unit].get("predict_ms", 0) / 1e3)
        if (state is not None) != bool(self._said["state"]):
            raise RuntimeError("a state that is missing or unknown")
        if self._said["functions"]:
            assert state is not None
            return self._decode(data, state)
        if state is not None:
            if state.used:
                raise RuntimeError("a state that is not fresh")
            state.used = True
        y = 2 * self._array(data["x"]) * np.float32(1 + self._said["units"][self._unit]["error"])
        labels = self._said["labels"]
        if labels:  # from an NSDictionary, whose order is nobody's promise
            return {"classLabel": labels[int(y.argmax())], "y": dict(zip(labels[::-1], map(float, y[0, ::-1])))}  # noqa: B905
        return {"y": y}

    def _decode(self, data: dict[str, Any], state: MLState) -> dict[str, Any]:
        if set(data) - {"last"} != {"ids", "position"}:
            raise RuntimeError(f"inputs {', '.join(data)}")
        begin, count = int(data["position"][0]), data["ids"].shape[1]
        made, held = small_decoder(data, state.read_state(ROWS)), state.read_state(ROWS)
        if begin + count > CONTEXT:
            raise RuntimeError("the slice is out of bounds")
        held[:, begin : begin + count] = made[f"new_{ROWS}"]
        state.write_state(ROWS, held)
        return {"logits": made["logits"] * np.float32(1 + self._said["units"][self._unit]["error"])}

    def _array(self, value: Any) -> Any:
        layout = self._said["image"]
        if layout is None:
            return np.asarray(value, np.float32)
        if getattr(value, "mode", "") != ("L" if layout == "gray" else "RGB"):
            raise TypeError("Image input, 'x' must be of type PIL.Image.Image in the input dict")
        pixels = np.atleast_3d(np.asarray(value, np.float32)).transpose(2, 0, 1)[None]
        return pixels[:, ::-1] if layout == "bgr" else pixels


class MLModel(_Loaded):
    def __init__(
        self,
        model: str,
        is_temp_package: bool = False,
        mil_program: None = None,
        skip_model_load: bool = False,
        compute_units: ComputeUnit = ComputeUnit.ALL,
        weights_dir: None = None,
        function_name: None = None,
        optimization_hints: None = None,
    ) -> None:
        if not model.endswith(".mlpackage") or not os.path.isdir(model):
            raise TypeError("Expected model to be a .mlmodel file, .mlpackage file or a Model_pb2 object")
        self._load(compute_units, function_name)


class CompiledMLModel(_Loaded):
    def __init__(
        self,
        path: str,
        compute_units: ComputeUnit = ComputeUnit.ALL,
        function_name: None = None,
        optimization_hints: None = None,
        asset: None = None,
    ) -> None:
        if not os.path.isfile(os.path.join(path, "coremldata.bin")):
            raise RuntimeError(f"{path} is not a valid .mlmodelc file")
        self._load(compute_units, function_name)


def load_spec(model_path: str) -> Any:
    if not os.path.isdir(model_path):
        raise OSError(model_path)
    states = [SimpleNamespace(name=name) for name in transcript()["state"]]
    functions = [SimpleNamespace(name=name, state=states) for name in transcript()["functions"]]
    return SimpleNamespace(description=SimpleNamespace(state=[] if functions else states, functions=functions))


def compile_model(model: str, destination_path: str | None = None) -> str:
    note("compile", "")
    if not os.path.isdir(model) or not model.endswith(".mlpackage"):
        raise ValueError(f"Invalid model file path: '{model}'.")
    assert destination_path is not None
    if not destination_path.endswith(".mlmodelc"):
        raise Exception('"destination_path" parameter must have ".mlmodelc" file extension.')
    os.mkdir(destination_path)
    Path(destination_path, "coremldata.bin").touch()
    return destination_path


class MLComputeDevice:
    pass


class MLCPUComputeDevice(MLComputeDevice):
    pass


class MLGPUComputeDevice(MLComputeDevice):
    pass


class MLNeuralEngineComputeDevice(MLComputeDevice):
    pass


DEVICES = {"CPU": MLCPUComputeDevice, "GPU": MLGPUComputeDevice, "NE": MLNeuralEngineComputeDevice}


@dataclass
class MLModelStructureProgramOperation:
    inputs: dict[str, Any]
    operator_name: str
    outputs: list[Any]
    blocks: list[MLModelStructureProgramBlock]
    said: dict[str, Any] = field(repr=False, default_factory=dict)


@dataclass
class MLModelStructureProgramBlock:
    inputs: list[Any]
    operations: list[MLModelStructureProgramOperation]
    output_names: list[str]


@dataclass
class MLModelStructureProgramFunction:
    inputs: list[Any]
    block: MLModelStructureProgramBlock


@dataclass
class MLModelStructureProgram:
    functions: dict[str, MLModelStructureProgramFunction]


@dataclass
class MLModelStructure:
    neuralnetwork: None
    program: MLModelStructureProgram
    pipeline: None


@dataclass
class MLComputePlanDeviceUsage:
    preferred_compute_device: MLComputeDevice
    supported_compute_devices: list[MLComputeDevice]


@dataclass
class MLComputePlanCost:
    weight: float


def _block(said: list[dict[str, Any]]) -> MLModelStructureProgramBlock:
    operations = [
        MLModelStructureProgramOperation({}, one["name"], [], [_block(one["inside"])] if "inside" in one else [], one)
        for one in said
    ]
    return MLModelStructureProgramBlock([], operations, [])


class MLComputePlan:
    @classmethod
    def load_from_path(cls, path: str, compute_units: ComputeUnit = ComputeUnit.ALL) -> MLComputePlan:
        note("plan", compute_units.name)
        if not os.path.isfile(os.path.join(path, "coremldata.bin")):
            os.abort()  # what the real one does, past every except
        plan = cls()
        plan._unit = compute_units.name
        return plan

    @property
    def model_structure(self) -> MLModelStructure:
        function = MLModelStructureProgramFunction([], _block(transcript()["operations"]))
        names = transcript()["functions"] or ["main"]
        return MLModelStructure(None, MLModelStructureProgram(dict.fromkeys(names, function)), None)

    def get_compute_device_usage_for_mlprogram_operation(
        self, operation: MLModelStructureProgramOperation
    ) -> MLComputePlanDeviceUsage | None:
        device = operation.said["on"].get(self._unit)
        if device is None:
            return None
        return MLComputePlanDeviceUsage(DEVICES[device](), [kind() for kind in DEVICES.values()])

    def get_estimated_cost_for_mlprogram_operation(
        self, operation: MLModelStructureProgramOperation
    ) -> MLComputePlanCost | None:
        cost = operation.said["cost"]
        return None if cost is None else MLComputePlanCost(cost)


#: Where the real package has these names.
MODULES = {
    "coremltools": ("ComputeUnit", "models"),
    "coremltools.models": ("MLModel", "CompiledMLModel"),
    "coremltools.models.model": ("MLState",),
    "coremltools.models.utils": ("load_spec", "compile_model"),
    "coremltools.models.compute_device": (
        "MLComputeDevice",
        "MLCPUComputeDevice",
        "MLGPUComputeDevice",
        "MLNeuralEngineComputeDevice",
    ),
    "coremltools.models.compute_plan": (
        "MLComputePlan",
        "MLComputePlanCost",
        "MLComputePlanDeviceUsage",
        "MLModelStructure",
        "MLModelStructureProgram",
        "MLModelStructureProgramBlock",
        "MLModelStructureProgramFunction",
        "MLModelStructureProgramOperation",
    ),
}
