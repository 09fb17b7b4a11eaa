"""The TensorRT part of a bundle's ``run.py``: engines built or found, golden inputs, and a profile on the GPU.

Python 3.9+, NumPy, a TensorRT (``tensorrt`` 10 or 11, or ``tensorrt_rtx``) and NVIDIA's driver. Written against the
documented APIs of TensorRT 10 and 11 and of TensorRT for RTX 1.7: it was never run on a GPU.

An engine that the bundle carries is used where it fits GPU and TensorRT version, or the one that ``build.sh`` left;
else one is built from the typed graph and kept under the cache by the hashes of graph, GPU, driver and version.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import re
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeattn.bundle import runner as run
    from edgeattn.bundle import runner_cuda as cuda_driver
else:
    import run  # run.py, beside this file
    import run_cuda as cuda_driver

Data = run.Data

#: Where engines are kept that were built here.
ENGINES = os.environ.get("EDGEATTN_ENGINES") or os.path.join(run.CACHE, "engines")
#: How often a launch is timed by CUDA events where --runs does not say.
LAUNCHES = 200
#: Of the layers a profile shows so many, the slowest first.
SHOWN = 12
_MEMORY = ("out of memory", "outofmemory", "insufficient memory", "workspace")


def module(part: Data) -> tuple[Any, str]:
    """The TensorRT of this machine, the flavour's own before the other, and what it is called with its version."""
    name = run.runtime_name(part)
    if not name:
        raise run.lacking([part])
    trt = importlib.import_module(run.MODULES["tensorrt"][name])
    if name == "tensorrt" and int(trt.__version__.split(".")[0]) < 10:
        fix = "JetPack 6.1 or newer brings TensorRT 10; on a server: python3 -m pip install tensorrt"
        raise run.Problem(3, f"TensorRT {trt.__version__} is too old: it does not take strongly typed graphs", fix)
    return trt, f"{name} {trt.__version__}"


def lacking(why: str, fix: str) -> tuple[str, str]:
    """Why nothing runs here, and what to do."""
    return why, f"{fix}    (Jetson: sudo apt install python3-libnvinfer). {cuda_driver.ANYWHERE}"


def identity(part: Data) -> str:
    """What the golden outputs were found to hold with: the GPU, its driver, and TensorRT's version."""
    return json.dumps([module(part)[1], cuda_driver.driver().gpu], sort_keys=True)


class _Said:
    """What TensorRT's logger was told, errors and warnings apart."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def logger(self, trt: Any) -> Any:
        """A logger that prints nothing."""
        said = self

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                    said.errors.append(message)

        return Logger()


def build(trt: Any, part: Data, entry: str) -> bytes:
    """An engine of the entry's typed graph for this machine's GPU.

    Raises:
        run.Problem: 4, the parser does not take it, or the builder gives none; with their own words.
    """
    said, facts = _Said(), part["facts"]
    builder = trt.Builder(said.logger(trt))  # held while network and parser live
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # TensorRT 11 knows no other way
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, builder.logger)
    if not parser.parse_from_file(run.place(part["entries"][entry]["file"])):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        lines = [f"{e.node_operator()} {e.node_name()}: {e.desc()}" for e in errors] or said.errors
        raise run.Problem(4, f"TensorRT {trt.__version__} cannot parse {entry}: {'; '.join(lines)[:2000]}")
    config, options = builder.create_builder_config(), facts.get("options", {})
    if part["precision"] == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.get("weight_streaming") == "yes":
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    config.builder_optimization_level = int(options.get("level", 3))
    if options.get("workspace_mb", "default") != "default":
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options["workspace_mb"]) << 20)
    profiles = facts["entries"][entry].get("profiles") or {}
    if profiles:
        profile = builder.create_optimization_profile()
        for name, shapes in profiles.items():
            profile.set_shape(name, *(tuple(shapes[end]) for end in ("min", "opt", "max")))
        config.add_optimization_profile(profile)
    timings = os.path.join(ENGINES, f"timing-{trt.__version__}.cache")
    cache = config.create_timing_cache(_bytes(timings))
    config.set_timing_cache(cache, False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _not_built(trt, entry, said.errors)
    try:
        _write(timings, bytes(config.get_timing_cache().serialize()))
    except (AttributeError, TypeError):
        pass  # the next build takes longer
    return bytes(plan)


def _not_built(trt: Any, entry: str, errors: list[str]) -> run.Problem:
    text = "; ".join(dict.fromkeys(errors)) or "it gave no reason"
    fix = "use the TensorRT that the bundle was made with, or export in another precision"
    if any(words in text.lower() for words in _MEMORY):
        fix = (
            "the message says how much it asked for: close other programs, export with -O workspace_mb=512 or "
            "-O weight_streaming=yes; on a Jetson GPU and CPU share one memory, and swap helps the CPU's part"
        )
    return run.Problem(4, f"TensorRT {trt.__version__} cannot build {entry}: {text[:2000]}", fix)


def _bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as handle:
            return handle.read()
    except OSError:
        return b""


def _write(path: str, data: bytes) -> None:
    """Whole or not at all; where nothing can be kept the next use takes longer."""
    part = f"{path}.{os.getpid()}.part"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(part, "wb") as handle:
            handle.write(data)
        os.replace(part, path)
    except OSError:
        pass


def _prebuilt(part: Data, entry: str, name: str, compute: str) -> str:
    """The bundle's engine for this GPU and this very TensorRT; "" if it has none."""
    facts = part["facts"]["entries"][entry]
    fitting = [e for e in facts.get("engines", ()) if f"tensorrt-rtx {e['tensorrt']}" == name]
    for wanted in (compute, "portable"):
        for engine in fitting:
            if engine["compute_capability"] == wanted and (wanted == compute or float(compute) >= 8.0):
                return run.place(engine["file"])
    return ""


def _left_by_script(part: Data, entry: str) -> str:
    """The engine that build.sh made of the bundle's graph; "" if there is none, or it is older than the graph."""
    graph = run.place(part["entries"][entry]["file"])
    engine = f"{os.path.splitext(graph)[0]}.engine"
    return engine if os.path.isfile(engine) and os.path.getmtime(engine) >= os.path.getmtime(graph) else ""


def _found(part: Data, entry: str, name: str, compute: str, kept: str) -> list[tuple[str, str]]:
    """Engines that are there already, each with where it is from."""
    places = {
        "prebuilt": _prebuilt(part, entry, name, compute),
        "built by build.sh": _left_by_script(part, entry),
        "cached": kept,
    }
    return [(source, path) for source, path in places.items() if os.path.isfile(path)]


def engine_of(part: Data, entry: str, cuda: cuda_driver.Driver) -> tuple[Any, Any, Data]:
    """A runtime, which has to outlive its engine; the engine; and where it is from.

    An engine of the bundle or of the cache that does not open here is passed over.

    Raises:
        run.Problem: 4, none can be built; 1, what was built on this machine cannot be opened.
    """
    trt, name = module(part)
    gpu, facts = cuda.gpu, part["facts"]
    file = part["entries"][entry]["file"]
    graph = [part["files"].get(each, {}).get("sha256") for each in (file, f"{file}.data")]  # weights apart where large
    about = [graph, part["precision"], name, gpu, facts.get("options"), facts["entries"][entry].get("profiles")]
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    kept = os.path.join(ENGINES, f"{key}.engine")
    said = _Said()
    runtime = trt.Runtime(said.logger(trt))
    for source, path in _found(part, entry, name, gpu["compute_capability"], kept):
        engine = runtime.deserialize_cuda_engine(_bytes(path))
        if engine is not None:
            return runtime, engine, {**gpu, "tensorrt": name, "engine": source}
        if source == "built by build.sh":
            raise run.Problem(1, _unopened(name, source, said), "sh build.sh makes it anew")
    begun = time.perf_counter()
    plan = build(trt, part, entry)
    source = f"built in {time.perf_counter() - begun:.1f} s"
    _write(kept, plan)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise run.Problem(1, _unopened(name, source, said), run.advice(part))
    return runtime, engine, {**gpu, "tensorrt": name, "engine": source}


def _unopened(name: str, source: str, said: _Said) -> str:
    return f"{name} cannot open the engine ({source}): {'; '.join(said.errors)[:1000] or 'no reason given'}"


class Opened:
    """An engine with its buffers.

    Attributes:
        trt: the TensorRT module. about: GPU, driver, TensorRT, and where the engine is from.
    """

    def __init__(self, part: Data, entry: str, cuda: cuda_driver.Driver) -> None:
        self.cuda, self._spec = cuda, part["entries"][entry]
        self._runtime, self.engine, self.about = engine_of(part, entry, cuda)
        self.context = self.engine.create_execution_context()
        self.trt = module(part)[0]
        self.host: Data = {}
        self.device: Data = {}
        self._shapes: Data = {}

    def prepare(self, feeds: Data) -> None:
        """Buffers for feeds of these shapes; made anew when they change."""
        shapes = {name: value.shape for name, value in feeds.items()}
        if shapes == self._shapes:
            return
        for name, shape in shapes.items():
            if not self.context.set_input_shape(name, shape):
                raise run.Problem(2, f"the engine does not take input {name} of shape {shape}")
        for spec in (*self._spec["inputs"], *self._spec["outputs"]):
            self._place(spec["name"])
        self._shapes = shapes

    def _place(self, name: str) -> None:
        """Buffers of a tensor on both sides."""
        shape = tuple(self.context.get_tensor_shape(name))
        self.host[name] = self.cuda.pinned(shape, self.trt.nptype(self.engine.get_tensor_dtype(name)))
        self.device[name] = self.cuda.memory(self.host[name].nbytes)
        self.context.set_tensor_address(name, self.device[name].value)

    def upload(self) -> None:
        """Inputs to the GPU."""
        for spec in self._spec["inputs"]:
            self.cuda.upload(self.device[spec["name"]], self.host[spec["name"]])

    def launch(self) -> None:
        """The engine, on the stream."""
        if not self.context.execute_async_v3(self.cuda.stream.value):
            raise run.Problem(1, "TensorRT did not start the engine")

    def download(self) -> None:
        """Outputs from the GPU."""
        for spec in self._spec["outputs"]:
            self.cuda.download(self.host[spec["name"]], self.device[spec["name"]])

    def fill(self, feeds: Data) -> None:
        """Feeds into the host's buffers."""
        self.prepare(feeds)
        for name, value in feeds.items():
            self.host[name][...] = value

    def own(self, feeds: Data) -> Data:
        """What of the feeds goes up at every run."""
        return feeds

    def steps(self) -> Data:
        """What a run consists of, by name, each a function that puts it on the stream."""
        return {"transfer in": self.upload, "engine": self.launch, "transfer out": self.download}

    def __call__(self, feeds: Data) -> Data:
        """Outputs by name, copied out of the buffers."""
        self.fill(feeds)
        self.upload()
        self.launch()
        self.download()
        self.cuda.wait()
        return {spec["name"]: self.host[spec["name"]].astype(spec["dtype"]) for spec in self._spec["outputs"]}


#: Of decoders, by the manifest's digest: one for all entries.
_CACHES: Data = {}


def opened_of(part: Data, entry: str, cuda: cuda_driver.Driver) -> Opened:
    """An entry's engine; of a decoder with the cache that all of its entries share."""
    if not part.get("decoder"):
        return Opened(part, entry, cuda)
    steps = importlib.import_module("run_cache")
    if part["digest"] not in _CACHES:
        _CACHES[part["digest"]] = steps.Cache(part, cuda)
    opened: Opened = steps.Steps(part, entry, _CACHES[part["digest"]])
    return opened


def open_entry(part: Data, entry: str) -> tuple[run.Run, str]:
    """A function from inputs to outputs by name, and the runtime's name and version."""
    opened = opened_of(part, entry, cuda_driver.driver())
    return opened, opened.about["tensorrt"]


def verify(part: Data) -> list[Data]:
    """The golden inputs on the GPU, in a process of its own."""
    cuda_driver.driver()  # what is missing is said by this process
    return [
        run.apart(
            ["--step", json.dumps(["tensorrt", {"do": "golden"}])], "the golden inputs on the GPU", run.advice(part)
        )
    ]


def child(manifest: Data, do: str) -> Data:
    """The golden inputs, in this process; says where the engine is from."""
    part = run.part_of(manifest, "tensorrt")
    about: Data = {}

    def opener(entry: str) -> tuple[run.Run, str]:
        opened = opened_of(part, entry, cuda_driver.driver())
        about.update(opened.about)
        return opened, opened.about["tensorrt"]

    return {**run.compare_golden(manifest, part, opener), **about}


def _modules(part: Data, entry: str, layers: list[tuple[str, float]]) -> list[Data]:
    """Layers with the torch modules of the ONNX nodes that their names speak of."""
    known = part["facts"]["entries"][entry].get("modules", {})
    found = []
    for layer, ms in layers:
        modules = {known[word] for word in re.split(r"[.]{3}|[^\w./]+", layer) if word in known}
        found.append({"layer": layer, "modules": sorted(modules), "ms": ms})
    return found


def _layers(opened: Opened, runs: int) -> list[tuple[str, float]]:
    """Mean time of each layer in ms, by TensorRT's own profiler; the engine runs slower meanwhile."""
    times: dict[str, list[float]] = {}
    trt: Any = opened.trt

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, name: str, ms: float) -> None:
            times.setdefault(name, []).append(ms)

    opened.context.profiler = Profiler()
    for _ in range(runs):
        opened.launch()
        opened.cuda.wait()
    return [(name, sum(each) / len(each)) for name, each in times.items()]


def profile(manifest: Data, part: Data, options: argparse.Namespace) -> Data:
    """Latency from host to host, and by CUDA events: transfers in, the engine with and without a CUDA graph, out."""
    golden = verify(part)[0]
    if not golden["holds"]:
        far = f"{golden['worst_relative_l2']} on {golden['worst_at']}, allowed {manifest['tolerance']:g}"
        raise run.Problem(1, f"refused: the golden outputs come out wrong: relative L2 {far}", run.advice(part))
    cuda, entry = cuda_driver.driver(), options.entry
    if options.threads:
        raise run.Problem(2, "TensorRT computes on the GPU, not in threads of the CPU", "leave --threads away")
    timing, state = run.own("profile"), run.own("state").machine_state
    before, free = state(gpu=True), cuda.free_memory()
    feeds = timing.feeds_of(manifest, part, options)
    begun = time.perf_counter()
    opened = opened_of(part, entry, cuda)
    cuda = opened.cuda
    opened.fill(feeds)
    about = {
        "backend": part["backend"],
        "runtime": opened.about["tensorrt"],
        "threads": 1,
        "batch": options.batch or 1,
        "unit": "ms",
        "timed": timing.timed_words(entry),
        "load_ms": (time.perf_counter() - begun) * 1e3,
        "before": before,
        **opened.about,
    }
    whole = timing.timings(opened, opened.own(feeds), options.runs, options.warmup, about=about)
    device_mb = (free - cuda.free_memory()) / 1e6
    begin, end, runs = cuda.event(), cuda.event(), options.runs or LAUNCHES
    steps = opened.steps()
    problem = ""
    try:
        steps["engine, CUDA graph"] = cuda.graph(opened.launch)
    except run.Problem as error:
        problem = str(error)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(runs):  # in turns, so that all meet the same clocks
        for name, work in steps.items():
            times[name].append(cuda.timed(work, begin, end))
    return {
        **about,
        **whole,
        "device_mb": device_mb,
        "events": {name: timing.spread(each) for name, each in times.items()},
        "cuda_graph": problem or "captured",
        "layers": _modules(part, entry, _layers(opened, min(runs, 50))),
        "golden": golden,
        "after": state(gpu=True),
        "holds": True,
    }


def show(result: Data) -> list[str]:
    """A profile for a person."""
    about = f"{result['gpu']} (compute capability {result['compute_capability']}, driver {result['driver']})"
    lines = [f"{result['bundle']}: {result['tensorrt']} on {about}, engine {result['engine']}"]
    lines.append("host to host  " + "  ".join(f"{k} {result[k]:.3f}" for k in ("p50", "p90", "p99")) + " ms")
    for name, each in result["events"].items():
        lines.append(f"{name:<20} p50 {each['p50']:.3f}  p90 {each['p90']:.3f}  p99 {each['p99']:.3f} ms")
    if result["cuda_graph"] != "captured":
        lines.append(f"no CUDA graph: {result['cuda_graph']}")
    total = sum(layer["ms"] for layer in result["layers"]) or 1.0
    slowest = sorted(result["layers"], key=lambda layer: -layer["ms"])
    for layer in slowest[:SHOWN]:
        where = ", ".join(layer["modules"][:3]) or layer["layer"][:60]
        lines.append(f"{layer['ms']:8.4f} ms {layer['ms'] / total:6.1%}  {where}")
    if len(slowest) > SHOWN:
        lines.append(f"and {len(slowest) - SHOWN} more layers")
    return lines
