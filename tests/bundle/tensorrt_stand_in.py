"""What stands for the ``tensorrt`` package: its engines run in ONNX Runtime, on the memory of ``cuda_stand_in.c``.

A copy of this file is ``tensorrt/__init__.py`` on the path of the process that is tested. What it does beyond working
is asked for by environment variables. ``test_runner_tensorrt.py`` compares its names with the real package.
"""

from __future__ import annotations

import ctypes
import enum
import os
from typing import Any

import numpy as np

__version__ = os.environ.get("STAND_IN_VERSION", "10.16.1.11")


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING = range(3)

    def __init__(self) -> None:
        pass

    def log(self, severity: Any, message: str) -> None:
        raise NotImplementedError


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class BuilderFlag(enum.Enum):
    TF32 = 1
    WEIGHT_STREAMING = 2


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class _Cache:
    def serialize(self) -> bytes:
        return b"timings"


class _Config:
    def __init__(self) -> None:
        self.builder_optimization_level = 3
        self.flags = {BuilderFlag.TF32}
        self.profiles: list[Any] = []
        self._cache: Any = None

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.discard(flag)

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags.add(flag)

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        assert size > 0

    def add_optimization_profile(self, profile: Any) -> None:
        self.profiles.append(profile)

    def create_timing_cache(self, data: bytes) -> _Cache:
        return _Cache()

    def set_timing_cache(self, cache: _Cache, ignore_mismatch: bool) -> bool:
        self._cache = cache
        return True

    def get_timing_cache(self) -> _Cache:
        return self._cache


class _Profile(dict):
    def set_shape(self, name: str, least: tuple, usual: tuple, most: tuple) -> None:
        self[name] = (least, usual, most)


class _Network:
    file = ""


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def create_network(self, flags: int) -> _Network:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return _Network()

    def create_builder_config(self) -> _Config:
        return _Config()

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def build_serialized_network(self, network: _Network, config: _Config) -> bytes | None:
        assert config._cache is not None
        if said := os.environ.get("STAND_IN_BUILD"):
            self.logger.log(ILogger.ERROR, said)
            return None
        with open(os.environ["STAND_IN_BUILDS"], "a") as handle:
            handle.write(f"{BuilderFlag.TF32 in config.flags} {config.profiles}\n")
        with open(network.file, "rb") as handle:
            return b"stand-in" + handle.read()


class _Error:
    def node_operator(self) -> str:
        return "Det"

    def node_name(self) -> str:
        return "node_det"

    def desc(self) -> str:
        return "no importer"


class OnnxParser:
    def __init__(self, network: _Network, logger: ILogger) -> None:
        self.network = network
        self.num_errors = 2 if os.environ.get("STAND_IN_PARSE") else 0

    def parse_from_file(self, model: str) -> bool:
        self.network.file = model
        return not self.num_errors

    def get_error(self, index: int) -> _Error:
        return _Error()


class IProfiler:
    def __init__(self) -> None:
        pass

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        raise NotImplementedError


def nptype(dtype: Any) -> Any:
    return dtype


class IExecutionContext:
    profiler: Any = None

    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._shapes = {n: s for n, s in engine.inputs.items() if all(isinstance(size, int) for size in s)}
        self._addresses: dict[str, int] = {}
        self._captured: list[Any] = []

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = tuple(shape)
        fixed = self._engine.inputs[name]
        return len(fixed) == len(shape) and all(isinstance(f, str) or f == n for f, n in zip(fixed, shape, strict=True))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        zeros = {n: np.zeros(s, self._engine.dtypes[n]) for n, s in self._shapes.items()}
        return dict(zip(self._engine.outputs, self._engine.session.run(None, zeros), strict=True))[name].shape

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert isinstance(memory, int)
        assert memory % 256 == 0  # NvInferRuntime.h
        assert name in self._engine.dtypes
        self._addresses[name] = memory
        return True

    def _array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        dtype = np.dtype(self._engine.dtypes[name])
        size = int(np.prod(shape)) * dtype.itemsize
        raw = (ctypes.c_char * size).from_address(self._addresses[name])
        return np.frombuffer(raw, dtype).reshape(shape)

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle == 7
        if os.environ.get("STAND_IN_CRASH"):
            os.abort()
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.stand_in_capturing():
            self._captured.append(ctypes.CFUNCTYPE(None)(self._run))
            driver.stand_in_keep(self._captured[-1])
        else:
            self._run()
        return True

    def _run(self) -> None:
        feeds = {name: self._array(name, shape) for name, shape in self._shapes.items()}
        for name, value in zip(self._engine.outputs, self._engine.session.run(None, feeds), strict=True):
            wrong = 1.5 if os.environ.get("STAND_IN_WRONG") else 1
            self._array(name, value.shape)[...] = value * wrong
        if self.profiler is not None:
            for name in (
                "node_conv2d + node_relu",
                "node_conv2d_11",
                "node_conv2d_1111",
                "{ForeignNode[node_conv2d_2...node_relu_1]}",
                "Reformat 1",
            ):
                self.profiler.report_layer_time(name, 0.25)


class ICudaEngine:
    def __init__(self, data: bytes) -> None:
        import onnxruntime

        self.session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        self.inputs = {i.name: tuple(i.shape) for i in self.session.get_inputs()}
        self.outputs = [o.name for o in self.session.get_outputs()]
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
        both = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.dtypes = {tensor.name: kinds[tensor.type] for tensor in both}

    def create_execution_context(self) -> IExecutionContext:
        return IExecutionContext(self)

    def get_tensor_dtype(self, name: str) -> Any:
        return self.dtypes[name]


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, data: bytes) -> ICudaEngine | None:
        if data[:8] == b"stand-in":
            return ICudaEngine(data[8:])
        if "STAND_IN_PREBUILT" in os.environ:  # the graph that a real engine was built from
            with open(os.environ["STAND_IN_PREBUILT"], "rb") as handle:
                return ICudaEngine(handle.read())
        self.logger.log(ILogger.ERROR, "magic tag does not match")
        return None
