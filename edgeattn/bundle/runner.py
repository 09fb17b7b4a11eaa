#!/usr/bin/env python3
"""Runs this bundle on a device: Python 3.9+, NumPy and a runtime, no PyTorch and no EdgeAttn.

    python run.py                      check all files and the golden outputs (the same as --verify)
    python run.py --profile            measure the latency
    python run.py --input x=photo.npy  run on your own data; outputs go to output.NAME.npy
    python run.py --prompt "..."       make text, with a language model; see --help of such a bundle
    python run.py ... --json           the result as JSON

Before anything but --verify the golden outputs are compared once for each machine and runtime: a runtime that computes
something else is refused. Exit codes: 0 they hold, 1 they do not, 2 usage, 3 the runtime is missing, 4 none is built.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
from importlib import metadata
from typing import Any, Callable

HERE = os.path.dirname(os.path.abspath(__file__))
CACHE = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "edgeattn")
SCHEMA_VERSION = 3

#: Modules of the runtimes that can run an artifact, the one that is preferred first.
MODULES = {
    "onnx": {"onnxruntime": "onnxruntime"},
    "tflite": {"ai-edge-litert": "ai_edge_litert", "tflite-runtime": "tflite_runtime"},
    "tensorrt": {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"},
    "gguf": {"llama-cpp-python": "llama_cpp"},
    **({"coreml": {"coremltools": "coremltools"}} if sys.platform == "darwin" else {}),
}
#: Backends whose part of this runner is a module of its own beside it, which uses this one as ``run``.
PARTS = {
    name: f"run_{name}" for name in ("coreml", "tensorrt", "inputs", "score", "prompt", "steps", "profile", "state")
}
#: ONNX Runtime's sessions and TFLite's interpreters by file: the entries of one share it, and its weights.
_OPENED: dict[str, Any] = {}
Data = dict[str, Any]
Run = Callable[[Data], Data]


class Problem(Exception):
    """An error with its exit code and what to do."""

    def __init__(self, code: int, text: str, fix: str = "") -> None:
        super().__init__(text)
        self.code, self.fix = code, fix


def place(name: str) -> str:
    """The path of a file of the bundle; names that leave it are refused."""
    path = os.path.join(HERE, *name.split("/"))
    if os.path.isabs(name) or not os.path.realpath(path).startswith(os.path.realpath(HERE) + os.sep):
        raise Problem(2, f"the manifest names a file outside of the bundle: {name}")
    return path


def check_files(manifest: Data) -> None:
    """The manifest is as it was sealed; every file is there and has the bytes that were proven."""
    again = "copy the bundle again"
    with open(os.path.join(HERE, "manifest.json"), "rb") as handle:
        written = handle.read()
    if written != (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode():
        raise Problem(1, "manifest.json was changed: it is not as it was written", again)
    content = {key: value for key, value in manifest.items() if key != "digest"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    if hashlib.sha256(text.encode()).hexdigest() != manifest["digest"]:
        raise Problem(1, "manifest.json was changed: its digest does not fit its content", again)
    for name, info in sorted(manifest["files"].items()):
        path, digest = place(name), hashlib.sha256()
        if not os.path.isfile(path):
            raise Problem(1, f"{name} is missing", again)
        with open(path, "rb") as handle:
            for piece in iter(lambda: handle.read(1 << 20), b""):
                digest.update(piece)
        if digest.hexdigest() != info["sha256"]:
            raise Problem(1, f"{name} was changed: its SHA-256 does not fit the manifest", again)


def parts_of(manifest: Data) -> list[Data]:
    """The artifacts, the one in front first; each with all that is known of the bundle."""
    return [manifest, *({**manifest, **other} for other in manifest["alternatives"])]


def part_of(manifest: Data, backend: str | None) -> Data:
    """The artifact of a backend; without one the first whose runtime is installed."""
    parts = parts_of(manifest)
    if backend is None:
        return next((part for part in parts if runtime_name(part)), parts[0])
    for part in parts:
        if part["backend"] == backend:
            return part
    raise Problem(2, f"no backend {backend!r}; there are {', '.join(p['backend'] for p in parts)}")


def runtime_name(part: Data) -> str:
    """The distribution that would run the artifact here; "" if none is installed."""
    known = MODULES.get(part["backend"], {})
    names = list(known)[:: -1 if part["facts"].get("flavour") == "rtx" else 1]  # TensorRT for RTX before TensorRT
    return next((name for name in names if importlib.util.find_spec(known[name])), "")


def lacking(parts: list[Data]) -> Problem:
    """Why none of these artifacts can run here."""
    why, fix = f"no runtime for {', '.join(part['backend'] for part in parts)} is installed", install_line(parts[0])
    if len(parts) == 1 and parts[0]["backend"] in PARTS:
        why, fix = own(parts[0]["backend"]).lacking(why, fix)
    return Problem(3, why, fix)


def own(backend: str) -> Any:
    """A backend's own part of this runner."""
    sys.dont_write_bytecode = True  # the bundle stays as it is
    sys.modules["run"] = sys.modules[__name__]
    sys.path.insert(0, HERE)
    return importlib.import_module(PARTS[backend])


def install_line(part: Data) -> str:
    """What brings the runtime to this machine."""
    # A 32-bit system may run under a 64-bit kernel.
    small = platform.machine().startswith("armv") or (platform.machine() == "aarch64" and sys.maxsize < 2**32)
    if part["backend"] == "tflite" and (small or part["requirement"] == "tflite-runtime"):
        return "python3 -m pip install 'numpy<2' tflite-runtime"
    return f"python3 -m pip install numpy {part['requirement']}"


def open_entry(part: Data, entry: str, threads: int) -> tuple[Run, str]:
    """A function from inputs to outputs by name, ready to run, and the runtime's name and version."""
    name, spec = runtime_name(part), part["entries"][entry]
    if part["backend"] in PARTS:
        return own(part["backend"]).open_entry(part, entry)  # type: ignore[no-any-return]
    if name == "llama-cpp-python":
        return own("llama").open_entry(part, entry, threads)  # type: ignore[no-any-return]
    names = [output["name"] for output in spec["outputs"]]
    try:
        if name == "onnxruntime":
            import onnxruntime

            if (path := place(spec["file"])) not in _OPENED:
                options = session_options(part, threads)
                _OPENED[path] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            session = _OPENED[path]
            return lambda feeds: dict(zip(names, session.run(names, feeds))), f"{name} {onnxruntime.__version__}"  # noqa: B905
        if not name:
            raise ImportError(f"no runtime for {part['backend']} is installed")
        interpreter_of = importlib.import_module(f"{MODULES['tflite'][name]}.interpreter").Interpreter
    except ImportError as error:
        raise Problem(3, str(error), install_line(part)) from error
    if (path := place(spec["file"])) not in _OPENED:
        _OPENED[path] = interpreter_of(model_path=path, num_threads=threads)
        _OPENED[path].allocate_tensors()
    version = f"{name} {metadata.version(name)}"
    if part.get("decoder"):
        return own("steps").Steps(_OPENED[path], entry), version
    runner = _OPENED[path].get_signature_runner(entry)
    return lambda feeds: dict(sorted(runner(**feeds).items(), key=lambda made: names.index(made[0]))), version


def session_options(part: Data, threads: int) -> Any:
    """How ONNX Runtime runs an artifact."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, threads
    if part["precision"] in ("w8", "w4"):  # small weights are unpacked once, not at every run
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def fitted(part: Data, entry: str, feeds: Data) -> Data:
    """Feeds with integers as wide as the artifact takes them."""
    import numpy as np

    given = dict(feeds)
    for spec in part["entries"][entry]["inputs"]:
        value, wanted = given[spec["name"]], np.dtype(spec["dtype"])
        if value.dtype != wanted and value.dtype.kind in "iu" and wanted.kind in "iu":
            limits = np.iinfo(wanted)
            if value.size and (value.min() < limits.min or value.max() > limits.max):
                raise Problem(2, f"input {spec['name']} does not fit {wanted}: {value.min()} to {value.max()}")
            given[spec["name"]] = value.astype(wanted)
    return given


def relative_l2(reference: Any, value: Any) -> float:
    """||value - reference|| / ||reference|| in float64; infinite when anything is not finite."""
    import numpy as np

    reference, value = reference.astype(np.float64), value.astype(np.float64)
    if reference.shape != value.shape or not np.isfinite(value).all() or not np.isfinite(reference).all():
        return float("inf")
    norm, error = float(np.linalg.norm(reference)), float(np.linalg.norm(value - reference))
    return error / norm if norm else (0.0 if error == 0 else float("inf"))


def golden_samples(manifest: Data, only: str = "") -> list[tuple[str, str]]:
    """(file, entry) of every golden sample; with ``only`` those of one entry, which must have some."""
    names = sorted(name for name in manifest["files"] if name.startswith("golden/"))
    samples = [(name, name.split("/")[1].split("-")[0]) for name in names]
    if only and only not in {entry for _, entry in samples}:
        raise Problem(2, f"no entry {only!r} with a golden sample; there are {', '.join(manifest['entries'])}")
    return [(name, entry) for name, entry in samples if only in ("", entry)]


def golden_data(name: str) -> tuple[Data, Data]:
    """Inputs and reference outputs of a golden sample."""
    import numpy as np

    with np.load(place(name), allow_pickle=False) as data:
        feeds = {key[3:]: data[key] for key in data.files if key.startswith("in.")}
        return feeds, {key[4:]: data[key] for key in data.files if key.startswith("out.")}


def compare_golden(manifest: Data, part: Data, opener: Callable[[str], tuple[Run, str]], only: str = "") -> Data:
    """Re-run the golden inputs of one artifact in this process, with what ``opener`` gives for an entry."""
    worst, where, runtime = 0.0, "", ""
    samples, compared = [s for s in golden_samples(manifest, only) if s[1] in part["entries"]], 0
    opened: dict[str, tuple[Run, str]] = {}
    for name, entry in samples:
        feeds, wanted = golden_data(name)
        try:
            run, runtime = opened[entry] = opened.get(entry) or opener(entry)
            outputs = run(fitted(part, entry, feeds))
        except Problem:
            raise
        except Exception as error:  # every runtime has its own kinds
            said = f"{runtime_name(part)} cannot run {part['backend']}: {error}"
            raise Problem(1, said, advice(part)) from error
        # A runtime that keeps the cache itself gives no rows of it.
        given = {key: value for key, value in wanted.items() if key in outputs or not hasattr(run, "stateful")}
        compared += bool(given)
        for key, value in given.items():
            distance = relative_l2(value, outputs[key])
            if distance > worst or not where:
                worst, where = distance, f"{key} of {name}"
    return {
        "backend": part["backend"],
        "runtime": runtime,
        "golden": compared,
        "worst_relative_l2": worst if worst != float("inf") else None,
        "worst_at": where,
        "proven": runtime in [f"{r['name']} {r['version']}" for r in part["runtimes"]],
        "holds": bool(compared) and worst <= manifest["tolerance"],
    }


def golden_apart(manifest: Data, part: Data, threads: int, here: bool = False) -> Data:
    """The same in a process of its own: a runtime that cannot run the artifact may crash instead of saying so."""
    if here or os.environ.get("EDGEATTN_IN_PROCESS"):  # under an emulator, which no child would run in
        return compare_golden(manifest, part, lambda entry: open_entry(part, entry, threads))
    words = ["--step", json.dumps([part["backend"], None]), "--threads", str(threads)]
    return apart(words, f"{runtime_name(part)} on the golden inputs of {part['backend']}", advice(part))


def apart(words: list[str], what: str, fix: str, seconds: float | None = None) -> Data:
    """What this program says to ``words`` in a process of its own; Problem where that gives no result."""
    command = [sys.executable, os.path.abspath(__file__), *words, "--json"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise Problem(1, f"{what}: it does not end in {seconds:.0f} s", fix) from None
    if done.returncode < 0:
        raise Problem(1, f"{what}: it crashed ({signal.Signals(-done.returncode).name})", fix)
    try:
        result: Data = json.loads(done.stdout)
    except ValueError:
        tail = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise Problem(1, f"{what}: it gave no result: {' '.join(tail)}") from None
    if "error" in result:
        raise Problem(result["exit_code"], result["error"], result.get("fix", ""))
    return result


def advice(part: Data) -> str:
    """Which runtime to use instead."""
    proven = ", ".join(f"{r['name']} {r['version']} ({r['machine']})" for r in part["runtimes"])
    return f"use the runtime that the numbers were proven with: {proven}; or export for this one (--device)"


def verify(manifest: Data, backend: str | None, threads: int) -> Data:
    """Re-run the golden inputs of every artifact whose runtime is here."""
    wanted = [part_of(manifest, backend)] if backend else parts_of(manifest)
    results: list[Data] = []
    for part in wanted:
        if not runtime_name(part):
            results.append({"backend": part["backend"], "missing": part["requirement"], "fix": lacking([part]).fix})
        else:
            ours = part["backend"] in PARTS
            results += own(part["backend"]).verify(part) if ours else [golden_apart(manifest, part, threads)]
    if not (ran := [result for result in results if "missing" not in result]):
        raise lacking(wanted)
    worst = [result["worst_relative_l2"] for result in ran]
    return {
        "runtime": ran[0]["runtime"],
        "golden": ran[0]["golden"],
        "worst_relative_l2": None if None in worst else max(worst),
        "tolerance": manifest["tolerance"],
        "parts": results,
        "holds": all(result["holds"] for result in ran),
    }


def check_first_use(manifest: Data, part: Data, threads: int) -> None:
    """Compare the golden outputs if this machine and runtime were not found to hold before."""
    if not runtime_name(part):
        raise lacking([part])
    name, system = (
        runtime_name(part),
        [sys.version, platform.mac_ver()[0], platform.machine(), own("state").cpu_model()],
    )
    version = own(part["backend"]).identity(part) if part["backend"] in PARTS else metadata.version(name)
    about = [manifest["digest"], part["backend"], name, version, *system]
    mark = os.path.join(CACHE, "proven", hashlib.sha256(json.dumps(about).encode()).hexdigest())
    if os.path.exists(mark):
        return
    result = golden_apart(manifest, part, threads)
    if not result["holds"]:
        far = f"{result['worst_relative_l2']} on {result['worst_at']}, allowed {manifest['tolerance']:g}"
        what = f"refused: {result['runtime']} computes the golden outputs wrongly: relative L2 {far}"
        raise Problem(1, what, advice(part))
    try:
        os.makedirs(os.path.dirname(mark), exist_ok=True)
        with open(mark, "w", encoding="utf-8"):
            pass
    except OSError:
        pass  # it is checked again next time


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as handle:
            return handle.read().strip()
    except OSError:
        return ""


def peak_rss_mb() -> float | None:
    """Peak of resident memory in MB (1e6 bytes)."""
    for line in _read("/proc/self/status").splitlines():
        if line.startswith("VmHWM"):  # getrusage also counts what started this program
            return int(line.split()[1]) * 1024 / 1e6
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def show(result: Data) -> str:
    """The result for a person."""
    if "text" in result:
        return str(result["text"])
    lines, words = [], own("state").words
    if "outputs" in result:
        lines.append(f"{result['bundle']}: {result['backend']} under {result['runtime']}, threads {result['threads']}")
        lines += [f"{n} -> {i['file']} {tuple(i['shape'])} {i['dtype']}" for n, i in result["outputs"].items()]
    elif result.get("backend") in PARTS:
        lines += own(result["backend"]).show(result)
    elif "p50" in result:
        lines.append(f"{result['bundle']}: {result['backend']} under {result['runtime']}, threads {result['threads']}")
        lines.append("  ".join(f"{k} {result[k]:.3f}" for k in ("p50", "p90", "p95", "p99", "mean", "std")) + " ms")
        lines.append(f"{result['runs']} runs after {result['warmup']}; {result['timed']}")
        lines += [f"{when}: {words(result[when])}" for when in ("before", "after") if words(result[when])]
    else:
        word = "holds" if result["holds"] else "DOES NOT HOLD"
        about = f"Python {result['python']}, threads {result['threads']}"
        lines.append(f"{result['bundle']}: {word} under {result['runtime']}, {about}")
        for part in result["parts"]:
            if "missing" in part:
                lines.append(f"{part['backend']}: not checked, its runtime is not here; {part['fix']}")
                continue
            worst = "not finite" if part["worst_relative_l2"] is None else f"{part['worst_relative_l2']:.3g}"
            known = "" if part["proven"] else ", which is not among those that the numbers were proven with"
            lines.append(
                f"{part['backend']}: worst relative L2 {worst} over {part['golden']} golden samples, "
                f"tolerance {result['tolerance']:g}, under {part['runtime']}{known}"
            )
        state = words(result["state"])
        lines.append(f"{result['machine']}, {result['cpu']}{', ' + state if state else ''}")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--verify", action="store_true", help="check files and golden outputs (the default)")
    what.add_argument("--profile", action="store_true", help="measure the latency")
    what.add_argument("--score", action="store_true", help="top-1 accuracy on the held-out samples, if there are some")
    what.add_argument("--input", action="append", default=[], metavar="NAME=FILE.npy", help="run on your own data")
    what.add_argument("--step", help=argparse.SUPPRESS)  # a child: [backend, its own part's job or null for golden]
    parser.add_argument("--entry", help="which graph to run (default: main, else the first)")
    parser.add_argument("--backend", help="which artifact, where there are several")
    parser.add_argument("--threads", type=int, help="CPU threads (default: 1; with --profile and --prompt up to 4)")
    parser.add_argument("--runs", type=int, help="with --profile: timed runs (default: 30 or more, 2 to 30 s)")
    parser.add_argument("--warmup", type=int, help="with --profile: runs before (default: until stable)")
    parser.add_argument("--batch", type=int, help="with --profile: size of the first axis, where it may vary")
    parser.add_argument("--ops", nargs="?", const="", metavar="FILE", help="with --profile: each operation's time too")
    parser.add_argument("--paced", action="store_true", help=argparse.SUPPRESS)  # see run_profile.py
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(prompt=None, ids=None)
    if os.path.exists(os.path.join(HERE, "run_prompt.py")):
        own("prompt").add_options(parser, what)
    options = parser.parse_args()
    for name in ("threads", "runs", "warmup", "batch"):
        if (given := getattr(options, name)) is not None and given < (0 if name == "warmup" else 1):
            parser.error(f"--{name} {given} is too small")
    return options


def work(options: argparse.Namespace, answers: Any) -> Data:
    """What was asked for; text that is made for it goes to ``answers`` as it comes."""
    try:
        with open(os.path.join(HERE, "manifest.json"), encoding="utf-8") as handle:
            manifest = json.load(handle)
        version = int(manifest["schema_version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Problem(1, f"manifest.json is missing or damaged: {error}", "copy the bundle again") from error
    if version != SCHEMA_VERSION:
        age = "newer" if version > SCHEMA_VERSION else "older"
        raise Problem(2, f"this bundle's manifest is {age} than its runner", "copy the bundle again")
    if importlib.util.find_spec("numpy") is None:
        raise Problem(3, "NumPy is not installed", install_line(manifest))
    text = options.prompt is not None or options.ids is not None
    threads = options.threads or (min(4, os.cpu_count() or 1) if options.profile or text else 1)
    if options.step:
        backend, job = json.loads(options.step)
        if job is None:
            return golden_apart(manifest, part_of(manifest, backend), threads, here=True)
        return dict(own(backend).child(manifest, **job))
    check_files(manifest)
    about = {"bundle": manifest["name"], "python": sys.version.split()[0], "machine": platform.machine()}
    part = part_of(manifest, options.backend)
    options.entry = options.entry or ("main" if "main" in part["entries"] else next(iter(part["entries"])))
    if text:
        result = own("prompt").on_device(manifest, part, options, threads, answers)
    elif options.input:
        result = own("inputs").run_inputs(manifest, part, options.input, options.entry, threads)
    elif options.score and "heldout.npz" not in manifest["files"]:
        raise Problem(2, "the bundle has no held-out samples to be scored on", "run.py --verify compares golden ones")
    elif options.score:
        result = own("score").score(manifest, part, threads)
    elif options.profile:
        result = own("profile").profile(manifest, part, options, threads, answers)
    else:
        result = {
            **verify(manifest, options.backend, threads),
            "threads": threads,
            "state": own("state").machine_state(),
        }
    return {**about, **own("state").about(), **result}


def main() -> int:
    """Parse arguments, print the result, return the exit code."""
    options = parse()
    # Runtimes print past Python; standard output belongs to the result alone.
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        result = work(options, answers)
    except KeyboardInterrupt:
        result = {"holds": False, "error": "stopped", "exit_code": 130}
    except Problem as problem:
        result = {"holds": False, "error": str(problem), "fix": problem.fix, "exit_code": problem.code}
    except ImportError as error:
        fix = "python3 -m pip install numpy"
        result = {"holds": False, "error": str(error), "fix": fix, "exit_code": 3}
    except Exception as error:  # whatever a damaged file makes the runtime raise
        result = {"holds": False, "error": f"the bundle cannot be run: {error}", "exit_code": 1}
    if options.json:
        answers.write(json.dumps(result, indent=1) + "\n")
    elif "error" in result:
        fix = f"\n  fix: {result['fix']}" if result.get("fix") else ""
        print(f"error: {result['error']}{fix}", file=sys.stderr)
    elif "finish" not in result:  # whose text is out
        answers.write(show(result) + "\n")
    answers.flush()
    return int(result.get("exit_code", 0 if result["holds"] else 1))


if __name__ == "__main__":
    sys.exit(main())
