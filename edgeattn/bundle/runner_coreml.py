"""The Core ML part of a bundle's ``run.py``: predictions, and a profile of every compute unit. Needs macOS.

Python 3.9+, NumPy and coremltools; Pillow where the artifact takes images. Written against coremltools 9.0 as it is
documented: it was never run on Apple hardware.

A unit is measured in a process of its own, because Core ML may end the process instead of saying that it cannot; its
plan is read in another one, for the same reason. What happens to one unit does not keep the others from being measured.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgeattn.bundle import runner as run
else:
    import run  # run.py, beside this file

Data = run.Data

#: Compute units, and the device that each of them asks for: what runs on another one has fallen back.
UNITS = {"CPU_ONLY": "CPU", "CPU_AND_GPU": "GPU", "CPU_AND_NE": "NE", "ALL": "NE"}
#: On which of them the golden inputs are run to verify a bundle.
VERIFIED = ("ALL", "CPU_ONLY")
#: Timed predictions, at the least.
RUNS = 100
#: A step that takes longer than this has gone wrong, though the first load of a large model takes minutes. All steps of
#: a profile together end before a transport gives up.
LIMITS_S = {"compile": 110.0, "golden": 300.0, "measure": 300.0, "plan": 110.0}
#: What a decoder's functions keep, by compute unit.
STATES: dict[str, Data] = {}


def described(part: Data, entry: str) -> tuple[Any, str | None]:
    """An entry's description in its package, and the function to ask for where that has several."""
    from coremltools.models.utils import load_spec

    description = load_spec(run.place(part["entries"][entry]["file"])).description
    for function in description.functions:
        if function.name == entry:
            return function, entry
    return description, None


def predictor(part: Data, entry: str, model: Any, kept: Data | None = None) -> run.Run:
    """From inputs as Core ML takes them to what it gives; states begin as zeros at every run.

    Args:
        kept: states of a decoder, from run to run and entry to entry.
    """
    description, function = described(part, entry)
    names = [state.name for state in description.state]
    if function and names:
        return Steps(model, names, {} if kept is None else kept)
    if names:
        return lambda given: model.predict(given, model.make_state())
    return lambda given: model.predict(given)


class Steps:
    """A function of a decoder's package, whose states hold the cache.

    That functions of a package share one state is how coremltools' users and its guides have it; it was never tried
    here. States that are among the feeds are put in place first, and the rows that were written to them given back.

    Args:
        names: of the states. kept: holds the state of all functions that are opened together, under "state".
    """

    stateful = True

    def __init__(self, model: Any, names: list[str], kept: Data) -> None:
        self._model, self._names, self._kept = model, names, kept

    def reset(self) -> None:
        """Begin with zeros again."""
        self._kept.clear()

    def __call__(self, given: Data) -> Data:
        """Outputs by name."""
        import numpy as np

        if "state" not in self._kept:
            self._kept["state"] = self._model.make_state()
        state, fed = self._kept["state"], {name: given[name] for name in self._names if name in given}
        for name, rows in fed.items():
            state.write_state(name, np.ascontiguousarray(rows, np.float16))
        own = {name: value for name, value in given.items() if name not in fed}
        outputs = dict(self._model.predict(own, state))
        begin, count = (int(own["position"][0]), own["ids"].shape[1]) if fed else (0, 0)
        outputs.update({f"new_{name}": np.array(state.read_state(name))[:, begin : begin + count] for name in fed})
        return outputs


def prepared(part: Data, entry: str, feeds: Data) -> Data:
    """Inputs as Core ML takes them: pixels as a Pillow image, red first whatever the model's own order is."""
    given = dict(feeds)
    images = [spec for spec in part["entries"][entry]["inputs"] if spec["pixels"]]
    if images and importlib.util.find_spec("PIL") is None:
        raise run.Problem(3, "Pillow is not installed, and the artifact takes images", "python3 -m pip install pillow")
    for spec in images:
        from PIL import Image

        planes = given[spec["name"]][0]
        planes = planes[::-1] if spec["layout"] == "bgr" else planes
        picture = planes[0] if len(planes) == 1 else planes.transpose(1, 2, 0)
        given[spec["name"]] = Image.frombytes(
            "L" if len(planes) == 1 else "RGB", picture.shape[1::-1], picture.tobytes()
        )
    return given


def arrays(part: Data, entry: str, outputs: Data) -> Data:
    """Outputs by name; a classifier's probabilities, which come by label and in any order, as a row (1, N)."""
    import numpy as np

    found = {name: value for name, value in outputs.items() if name.startswith("new_")}
    for name in (spec["name"] for spec in part["entries"][entry]["outputs"]):
        value = outputs[name]
        if isinstance(value, dict):
            value = np.array([[value[label] for label in part["recipe"]["labels"]]], np.float32)
        found[name] = np.array(value)
    return found


def open_entry(part: Data, entry: str, unit: str = "ALL") -> tuple[run.Run, str]:
    """A function from inputs to outputs by name on a compute unit, and the runtime's name and version."""
    import coremltools as ct

    path, (_, function) = run.place(part["entries"][entry]["file"]), described(part, entry)
    model = ct.models.MLModel(path, compute_units=ct.ComputeUnit[unit], function_name=function)
    predict = predictor(part, entry, model, STATES.setdefault(unit, {}))
    if isinstance(predict, Steps):
        return predict, runtime()
    return lambda feeds: arrays(part, entry, predict(prepared(part, entry, feeds))), runtime()


def runtime() -> str:
    """Name and version of what runs artifacts here."""
    return f"coremltools {metadata.version('coremltools')}"


def identity(part: Data) -> str:
    """What the golden outputs were found to hold with."""
    return metadata.version("coremltools")


def lacking(why: str, fix: str) -> tuple[str, str]:
    """Why nothing runs here, and what to do."""
    if sys.platform == "darwin":
        return why, fix
    why = f"Core ML runs on macOS only; this system is {platform.system()}"
    return why, "edgeattn verify BUNDLE checks graph and weights on any system, by an interpreter"


def apart(what: str, do: str, **job: Any) -> Data:
    """What ``child`` says, in a process of its own; Problem where that crashed, failed or does not end."""
    return run.apart(["--step", json.dumps(["coreml", {"do": do, **job}])], what, "", LIMITS_S[do])


def child(manifest: Data, do: str, unit: str = "", **job: Any) -> Data:
    """One step, as ``apart`` asked for it."""
    part = run.part_of(manifest, "coreml")
    if do == "golden":
        return run.compare_golden(manifest, part, lambda entry: open_entry(part, entry, unit))
    if do == "compile":
        return compile_entry(part, **job)
    return plan(unit, **job) if do == "plan" else measure(manifest, part, unit, **job)


def verify(part: Data) -> list[Data]:
    """The golden inputs on the units of ``VERIFIED``, each in a process of its own."""
    results = []
    for unit in VERIFIED:
        result = apart(f"the golden inputs on {unit}", do="golden", unit=unit)
        results.append({**result, "compute_unit": unit, "runtime": f"{result['runtime']} on {unit}"})
    return results


def compile_entry(part: Data, entry: str, compiled: str) -> Data:
    """Make the folder ``compiled`` of an entry's package."""
    from coremltools.models.utils import compile_model

    begun = time.perf_counter()
    compile_model(run.place(part["entries"][entry]["file"]), compiled)
    return {"compile_ms": (time.perf_counter() - begun) * 1e3, "holds": True}


def measure(manifest: Data, part: Data, unit: str, entry: str, compiled: str, **counts: int | None) -> Data:
    """Load twice, compare the golden outputs, and where they hold time predictions on the first golden input."""
    import coremltools as ct

    description, function = described(part, entry)

    def load() -> tuple[Any, float]:
        begun = time.perf_counter()
        model = ct.models.CompiledMLModel(compiled, compute_units=ct.ComputeUnit[unit], function_name=function)
        return model, (time.perf_counter() - begun) * 1e3

    model, load_first_ms = load()
    del model
    gc.collect()
    model, load_ms = load()
    predict, first = predictor(part, entry, model), []

    def timed(feeds: Data) -> Data:
        given = prepared(part, entry, feeds)
        begun = time.perf_counter()
        outputs = predict(given)
        first.append((time.perf_counter() - begun) * 1e3)
        return arrays(part, entry, outputs)

    golden = run.compare_golden(manifest, part, lambda _: (timed, runtime()), entry)
    result = {name: golden[name] for name in ("golden", "worst_relative_l2", "worst_at", "holds")}
    result.update(load_first_ms=load_first_ms, load_ms=load_ms)
    if not golden["holds"]:
        worst, allowed = golden["worst_relative_l2"], manifest["tolerance"]
        far = "not finite" if worst is None else f"{worst:.3g}"
        return {**result, "why": f"wrong numbers: relative L2 {far} on {golden['worst_at']}, allowed {allowed:g}"}
    timing = run.own("profile")
    feeds = timing.feeds_of(manifest, part, argparse.Namespace(entry=entry, batch=counts["batch"]))
    given = prepared(part, entry, feeds)
    if isinstance(predict, Steps):  # a cache that is in its place already, as from the second step on
        given = {name: value for name, value in given.items() if name not in {s.name for s in description.state}}
    return {**result, **timing.timings(predict, given, counts["runs"], counts["warmup"], RUNS), "first_ms": first[0]}


def operations(block: Any) -> Iterator[Any]:
    """Those of a block and of the blocks inside, constants left out."""
    for operation in block.operations:
        if operation.operator_name.rpartition(".")[2] != "const":
            yield operation
        for inner in operation.blocks:
            yield from operations(inner)


def plan(unit: str, compiled: str, function: str = "main") -> Data:
    """On which device Core ML means to run each operation, and what is not on the one that the unit asks for.

    Returns ``ops`` (their number by device; ``unplaced`` where the plan names none), ``fallback`` (their number by
    kind), their share of the placed ones and of these ones' estimated cost, in percent, and ``each`` of the placed ones
    with its kind, device and estimated share of the cost.
    """
    import coremltools as ct
    from coremltools.models.compute_device import MLCPUComputeDevice, MLGPUComputeDevice, MLNeuralEngineComputeDevice
    from coremltools.models.compute_plan import MLComputePlan

    devices = {"CPU": MLCPUComputeDevice, "GPU": MLGPUComputeDevice, "NE": MLNeuralEngineComputeDevice}
    found = MLComputePlan.load_from_path(path=compiled, compute_units=ct.ComputeUnit[unit])
    ops: Counter[str] = Counter()
    fallback: Counter[str] = Counter()
    cost = dict.fromkeys(devices, 0.0)
    each: list[list[Any]] = []
    for operation in operations(found.model_structure.program.functions[function].block):
        usage = found.get_compute_device_usage_for_mlprogram_operation(operation)
        preferred = usage.preferred_compute_device if usage is not None else None
        device = next((name for name, kind in devices.items() if isinstance(preferred, kind)), "unplaced")
        ops[device] += 1
        if device == "unplaced":
            continue
        fallback[operation.operator_name] += device != UNITS[unit]
        estimated = found.get_estimated_cost_for_mlprogram_operation(operation)
        weight = estimated.weight if estimated is not None else 0.0
        cost[device] += weight
        name = next((output.name for output in operation.outputs), "")  # a write into a state gives nothing
        each.append([name, operation.operator_name, device, weight])
    placed = sum(ops.values()) - ops["unplaced"]
    if not placed:
        raise run.Problem(1, f"the plan names no device for any of the {ops['unplaced']} operations")
    spent = sum(cost.values())
    return {
        "ops": {device: ops[device] for device in (*devices, "unplaced")},
        "fallback": {kind: count for kind, count in fallback.most_common() if count},
        "fallback_ops_percent": 100 * sum(fallback.values()) / placed,
        "fallback_cost_percent": 100 * (spent - cost[UNITS[unit]]) / spent if spent else None,
        "plan_why": None if spent else "the plan has no costs",
        "each": each,
        "holds": True,
    }


def profile(manifest: Data, part: Data, options: argparse.Namespace) -> Data:
    """Every compute unit's latency, and what falls back there; a unit that cannot be measured says why."""
    if not run.runtime_name(part):
        raise run.lacking([part])
    if options.threads:
        raise run.Problem(2, "Core ML chooses its threads itself", "leave --threads away")
    sample = run.golden_samples(manifest, options.entry)[0][0]
    prepared(part, options.entry, run.golden_data(sample)[0])  # whether Pillow is here where it must be
    state = run.own("state").machine_state
    before = state()
    os.makedirs(run.CACHE, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="coreml-", dir=run.CACHE) as folder:
        compiled = os.path.join(folder, f"{options.entry}.mlmodelc")
        made = apart("compiling the package", do="compile", entry=options.entry, compiled=compiled)
        function = described(part, options.entry)[1] or "main"
        units = [profile_unit(unit, options, compiled, function) for unit in UNITS]
    if not any(unit["holds"] for unit in units):
        reasons = "; ".join(f"{unit['compute_unit']}: {unit['why']}" for unit in units)
        raise run.Problem(1, f"no compute unit could be measured: {reasons}", "see whether one in fp32 holds")
    return {
        "backend": "coreml",
        "runtime": runtime(),
        "system": f"macOS {platform.mac_ver()[0]}",
        "unit": "ms",
        "timed": "one predict, from inputs in host memory to outputs in host memory; loading and warm-up apart",
        "compile_ms": made["compile_ms"],
        "tolerance": manifest["tolerance"],
        "compute_units": units,
        "before": before,
        "after": state(),
        "holds": True,
    }


def profile_unit(unit: str, options: argparse.Namespace, compiled: str, function: str) -> Data:
    """Measure a unit, then read its plan: in this order, for the plan may compile what the first load is to compile."""
    found: Data = {"compute_unit": unit}
    job = {"unit": unit, "compiled": compiled}
    try:
        counts = {"runs": options.runs, "warmup": options.warmup, "batch": options.batch}
        found.update(apart("measuring", do="measure", entry=options.entry, **job, **counts))
    except run.Problem as problem:
        found.update(holds=False, why=str(problem))
    names = ("ops", "fallback", "fallback_ops_percent", "fallback_cost_percent", "plan_why", "each")
    found.update(dict.fromkeys(names))
    try:
        planned = apart("reading the plan", do="plan", function=function, **job)
        found.update({name: planned[name] for name in names})
    except run.Problem as problem:
        found["plan_why"] = str(problem)
    return found


def show(result: Data) -> list[str]:
    """A profile for a person."""
    head = f"{result['bundle']}: {result['runtime']}, {result['system']}, {result['cpu']}"
    columns = ("p50", "p90", "p99", "first_ms", "load_ms", "load_first_ms")
    shares = ("fallback_ops_percent", "fallback_cost_percent")
    titles = (*(name.replace("_ms", "").replace("_", " ") for name in columns), "ops off", "cost off")
    lines = [head, f"{'ms':12}" + "".join(f"{title:>12}" for title in titles)]
    for unit in result["compute_units"]:
        cells = ["-" if unit.get(name) is None else f"{unit[name]:.3f}" for name in columns]
        cells += ["-" if unit[name] is None else f"{unit[name]:.1f} %" for name in shares]
        lines.append(f"{unit['compute_unit']:12}" + "".join(f"{cell:>12}" for cell in cells))
    for unit in result["compute_units"]:
        said = (unit.get("why"), unit["plan_why"] and f"no plan: {unit['plan_why']}")
        lines += [f"{unit['compute_unit']}: {text}" for text in said if text]
        if unit["fallback"]:
            kinds = ", ".join(f"{kind} {count}" for kind, count in unit["fallback"].items())
            lines.append(f"{unit['compute_unit']}: not on the {UNITS[unit['compute_unit']]}: {kinds}")
    runs = [unit["runs"] for unit in result["compute_units"] if unit["holds"]]
    lines.append(f"{min(runs)} to {max(runs)} runs; {result['timed']}; compiled in {result['compile_ms']:.0f} ms")
    return lines
