"""The TensorRT part of ``run.py``, against stand-ins for TensorRT and for NVIDIA's driver: nothing here ran on a GPU.

Unproven stay all that TensorRT and the driver do. Tested is how they are asked, by real processes through the real
ctypes calls, and what is made of their answers. The stand-in's names are compared with the real TensorRT for RTX.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import edgeattn
from edgeattn.bundle import Bundle
from edgeattn.core.errors import UsageError
from edgeattn.profile.measure import Effort, Job
from edgeattn.profile.run import measure
from tests.bundle import tensorrt_stand_in as stand_in
from tests.conftest import ROOT

trt = pytest.importorskip("tensorrt_rtx")
HERE = Path(__file__).parent
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def full(home: Path) -> Bundle:
    """The digits model for a Jetson, which builds its engine itself."""
    return edgeattn.export("fmvit-digits", device="jetson-orin-nano", precision="fp32", output=home / "bundles")


@pytest.fixture(scope="session")
def rtx(home: Path) -> Bundle:
    """The same with a portable engine inside, and a batch of 1 to 4."""
    return edgeattn.export(
        "fmvit-digits", target="tensorrt", inputs=["x=1..2..4x1x32x32"], output=home / "bundles" / "dynamic"
    )


DECODER = """
import torch
from edgeattn.models.plm import plm


def small():
    torch.manual_seed(1)
    model = plm(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=32,
        qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, intermediate_size=64,
    )
    with torch.no_grad():  # large enough for attention to tell tokens apart
        for parameter in model.parameters():
            parameter.mul_(6.0 if parameter.ndim > 1 else 1.0)
    return model
"""
RECIPE = """
name = "plm-small"
[model]
factory = "small.py:small"
[inputs.ids]
shape = [1, 16]
dtype = "int64"
low = 0
high = 95
[decoder]
context = 96
prefill = [8]
steps = 72
greedy = 8
"""


@pytest.fixture(scope="session")
def decoder(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A decoder of random weights in float16, for a GPU that builds its engines itself."""
    folder = tmp_path_factory.mktemp("decoder")
    (folder / "small.py").write_text(DECODER)
    (folder / "small.toml").write_text(RECIPE)
    return edgeattn.export(
        str(folder / "small.toml"),
        target="tensorrt",
        precision="fp16",
        options={"flavour": "full"},
        output=home / "bundles",
    )


@pytest.fixture(scope="session")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stand-in for the driver, compiled."""
    if not (compiler := shutil.which("cc") or shutil.which("gcc")):
        pytest.fail("the stand-in for the driver needs a C compiler")
    folder = tmp_path_factory.mktemp("cuda")
    source = str(HERE / "cuda_stand_in.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), source], check=True)
    return folder


@pytest.fixture
def gpu(tmp_path: Path, cuda: Path) -> Run:
    """Runs a bundle's run.py as on a machine with a GPU."""
    for name in ("tensorrt", "tensorrt_rtx"):
        (tmp_path / "site" / name).mkdir(parents=True)
        shutil.copyfile(HERE / "tensorrt_stand_in.py", tmp_path / "site" / name / "__init__.py")

    def run(bundle: Bundle, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        own = {
            "PYTHONPATH": str(tmp_path / "site"),
            "LD_LIBRARY_PATH": str(cuda),
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "STAND_IN_BUILDS": str(tmp_path / "builds"),
        }
        command = [sys.executable, str(bundle.path / "run.py"), *words]
        return subprocess.run(
            command, env={**os.environ, **own, **environ}, capture_output=True, text=True, timeout=300, check=False
        )

    run.library = str(cuda)  # type: ignore[attr-defined]
    return run


def builds(tmp_path: Path) -> list[str]:
    path = tmp_path / "builds"
    return path.read_text().splitlines() if path.exists() else []


def test_an_engine_is_built_once_and_kept_for_this_gpu(full: Bundle, gpu: Run, tmp_path: Path) -> None:
    done = gpu(full, "--verify", "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    part = json.loads(done.stdout)["parts"][0]
    assert part["gpu"] == "Stand-in GPU"
    assert part["compute_capability"] == "8.6"
    assert part["cuda"] == "13.2"
    assert part["runtime"] == part["tensorrt"] == "tensorrt 10.16.1.11"
    assert part["engine"].startswith("built in")
    assert 0 < part["worst_relative_l2"] < 1e-5
    assert builds(tmp_path) == ["False []"]  # TF32 off
    assert json.loads(gpu(full, "--verify", "--json").stdout)["parts"][0]["engine"] == "cached"
    for changed in ({"STAND_IN_GPU": "Another"}, {"STAND_IN_VERSION": "11.0.0.1"}):
        again = json.loads(gpu(full, "--verify", "--json", **changed).stdout)["parts"][0]
        assert again["engine"].startswith("built in")
    assert len(builds(tmp_path)) == 3
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_a_prebuilt_engine_is_used_where_version_and_gpu_fit(rtx: Bundle, gpu: Run, tmp_path: Path) -> None:
    graph = {"STAND_IN_PREBUILT": str(rtx.path / "model.onnx")}
    same = gpu(rtx, "--verify", "--json", STAND_IN_VERSION=trt.__version__, **graph)
    assert same.returncode == 0, same.stderr + same.stdout
    assert json.loads(same.stdout)["parts"][0]["engine"] == "prebuilt"
    assert builds(tmp_path) == []
    other = json.loads(gpu(rtx, "--verify", "--json", STAND_IN_VERSION="1.8.0.1").stdout)["parts"][0]
    assert other["engine"].startswith("built in")
    assert builds(tmp_path) == ["False [{'x': ((1, 1, 32, 32), (2, 1, 32, 32), (4, 1, 32, 32))}]"]


def test_the_engine_that_build_sh_left_is_used(full: Bundle, gpu: Run, tmp_path: Path) -> None:
    copy = Bundle.open(shutil.copytree(full.path, tmp_path / "copy"))
    engine = copy.path / "model.engine"
    engine.write_bytes(b"stand-in" + (copy.path / "model.onnx").read_bytes())
    done = json.loads(gpu(copy, "--verify", "--json").stdout)
    assert done["parts"][0]["engine"] == "built by build.sh"
    assert builds(tmp_path) == []
    engine.write_bytes(b"of another version")
    other = gpu(copy, "--verify")
    assert other.returncode == 1
    assert "sh build.sh makes it anew" in other.stderr


def test_what_does_not_open_is_built_anew_and_no_cache_is_needed(
    full: Bundle, rtx: Bundle, gpu: Run, tmp_path: Path
) -> None:
    refused = json.loads(gpu(rtx, "--verify", "--json", STAND_IN_VERSION=trt.__version__).stdout)["parts"][0]
    assert refused["engine"].startswith("built in")
    for kept in (tmp_path / "cache").rglob("*.engine"):
        kept.write_bytes(b"damaged")
    again = json.loads(gpu(rtx, "--verify", "--json", STAND_IN_VERSION=trt.__version__).stdout)["parts"][0]
    assert again["engine"].startswith("built in")
    (tmp_path / "file").touch()
    nowhere = gpu(full, "--verify", XDG_CACHE_HOME=str(tmp_path / "file"))
    assert nowhere.returncode == 0, nowhere.stderr


def test_own_inputs_of_several_sizes(rtx: Bundle, gpu: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    monkeypatch.chdir(tmp_path)
    for batch, code in ((3, 0), (5, 2)):
        np.save("x.npy", np.zeros((batch, 1, 32, 32), np.float32))
        done = gpu(rtx, "--input", "x=x.npy")
        assert done.returncode == code, done.stderr
    assert np.load("output.logits.npy").shape == (3, 10)


def test_profile(full: Bundle, gpu: Run) -> None:
    done = gpu(full, "--profile", "--json", "--runs", "5", "--warmup", "1")
    assert done.returncode == 0, done.stderr + done.stdout
    result = json.loads(done.stdout)
    assert list(result["events"]) == ["transfer in", "engine", "transfer out", "engine, CUDA graph"]
    assert all(each["runs"] == 5 and each["p50"] >= 0 for each in result["events"].values())
    assert result["runs"] == 5
    assert {"gpu", "driver", "tensorrt", "cuda", "compute_capability"} <= set(result)
    nodes = full.manifest.facts["entries"]["main"]["modules"]
    layers = {layer["layer"]: layer["modules"] for layer in result["layers"]}
    assert layers["node_conv2d + node_relu"] == sorted({nodes["node_conv2d"], nodes["node_relu"]})
    assert layers["node_conv2d_11"] == [nodes["node_conv2d_11"]]
    fused = layers["{ForeignNode[node_conv2d_2...node_relu_1]}"]
    assert fused == sorted({nodes["node_conv2d_2"], nodes["node_relu_1"]})
    assert layers["Reformat 1"] == layers["node_conv2d_1111"] == []
    shown = gpu(full, "--profile", "--runs", "5", "--warmup", "1")
    assert "Stand-in GPU" in shown.stdout
    assert "engine, CUDA graph" in shown.stdout
    without = json.loads(gpu(full, "--profile", "--json", "--runs", "3", "--warmup", "1", STAND_IN_NO_GRAPH="1").stdout)
    assert "cuStreamBeginCapture" in without["cuda_graph"]
    assert "engine, CUDA graph" not in without["events"]


def test_a_record_of_a_gpu(full: Bundle, gpu: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a GPU does is a stand-in's; that its answers become a record is shown here.
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("STAND_IN_BUILDS", str(tmp_path / "builds"))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(gpu.library))  # type: ignore[attr-defined]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    job = Job(full.path, "tensorrt", "main")
    outcome = measure([job, job], "local", Effort(rounds=2, runs=4, warmup=1))
    assert [record.settings.unit for record in outcome.records] == ["gpu", "gpu"]
    first = outcome.records[0]
    assert first.place.gpu.startswith("Stand-in GPU")
    assert first.memory.device_mb is not None
    assert first.memory.device_mb > 0
    assert first.latency is not None
    assert first.latency.runs == 8
    assert first.proof.device_relative_l2 is not None
    assert first.breakdown.source == "TensorRT's layer profile"
    layer = next(op for op in first.breakdown.operations if op.name == "node_conv2d + node_relu")
    assert layer.module
    assert layer.macs
    assert len(outcome.ratios) == 1
    with pytest.raises(UsageError, match="not in threads"):
        measure([Job(full.path, "tensorrt", "main", threads=2)], "local", Effort(rounds=1, runs=1))


@pytest.mark.parametrize(
    ("environ", "code", "words"),
    [
        ({"STAND_IN_WRONG": "1"}, 1, "DOES NOT HOLD"),
        ({"STAND_IN_NO_GPU": "1"}, 3, "CUDA_ERROR_NO_DEVICE"),
        ({"LD_LIBRARY_PATH": ""}, 3, "no NVIDIA GPU here"),
        ({"STAND_IN_PARSE": "1"}, 4, "Det node_det: no importer; Det node_det"),
        ({"STAND_IN_BUILD": "Requested 2147483648 bytes of workspace: out of memory"}, 4, "2147483648"),
        ({"STAND_IN_BUILD": "out of memory"}, 4, "workspace_mb=512"),
        ({"STAND_IN_CRASH": "1"}, 1, "SIGABRT"),
        ({"STAND_IN_VERSION": "8.6.2"}, 3, "too old"),
    ],
)
def test_what_goes_wrong_is_said(full: Bundle, gpu: Run, environ: dict[str, str], code: int, words: str) -> None:
    done = gpu(full, "--verify", **environ)
    assert done.returncode == code, done.stderr + done.stdout
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(("wrong", "code"), [({}, 0), ({"STAND_IN_WRONG": "1"}, 1)])
def test_verify_asks_the_engine_where_there_is_a_gpu(
    full: Bundle, gpu: Run, cuda: Path, tmp_path: Path, wrong: dict[str, str], code: int
) -> None:
    own = {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}", "LD_LIBRARY_PATH": str(cuda), **wrong}
    own |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "STAND_IN_BUILDS": str(tmp_path / "builds")}
    command = [sys.executable, "-m", "edgeattn", "verify", str(full.path)]
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, done.stderr + done.stdout
    if code:
        assert "does not run on this machine's GPU" in done.stderr
        assert "refused" in done.stderr
    else:
        assert "TensorRT: golden/main-000.npz" in done.stdout
        assert "none was run here" not in done.stdout  # what was open no longer is


def test_a_decoders_golden_outputs_come_out_of_the_cache_on_the_gpu(decoder: Bundle, gpu: Run, tmp_path: Path) -> None:
    inputs = {t.name: t for t in decoder.manifest.entries["decode"].inputs}
    assert inputs["latent_0"].dtype == inputs["rope_1"].dtype == "float16"
    for environ in ({}, {"STAND_IN_NO_GRAPH": "1"}):
        done = gpu(decoder, "--verify", "--json", **environ)
        assert done.returncode == 0, done.stderr + done.stdout
        part = json.loads(done.stdout)["parts"][0]
        assert part["golden"] == 4
        assert 0 < part["worst_relative_l2"] < 5e-3
    assert len(builds(tmp_path)) == 2
    wrong = gpu(decoder, "--verify", STAND_IN_WRONG="1")
    assert wrong.returncode == 1


#: Compares logits of steps behind the cache on the GPU with those of steps whose cache is the caller's, twice.
STEPS = """
import json, os, sys
import numpy as np
import onnxruntime

sys.path.insert(0, os.getcwd())
import run
import run_generate

with open("manifest.json") as handle:
    manifest = json.load(handle)


def by_hand(entry):
    session = onnxruntime.InferenceSession(run.place(manifest["entries"][entry]["file"]))
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, feeds)))


opened = {}


def on_gpu(entry):
    opened[entry] = run.open_entry(manifest, entry, 1)[0]
    return opened[entry]


sessions = [run_generate.Session(manifest["decoder"], manifest["entries"], one) for one in (by_hand, on_gpu)]
tokens = np.random.default_rng(0).integers(0, 96, (2, 96))
off = []
for ids in tokens:
    for session in sessions:
        session.reset()
    for size in (20, *[1] * 50, 10, *[1] * 16):
        begin = sessions[0].position
        ours, theirs = (session.feed(ids[begin : begin + size]) for session in sessions)
        off.append(float(np.abs(ours - theirs).max() / np.abs(ours).max()))
    assert sessions[1].position == 96
print(json.dumps([max(off), sessions[1].cache_bytes, sorted(opened), opened["decode"].cache_bytes]))
"""


def test_a_decoders_cache_stays_on_the_gpu_between_steps_and_entries(decoder: Bundle, gpu: Run, tmp_path: Path) -> None:
    gpu(decoder, "--verify")  # builds the engines
    environ = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environ |= {"LD_LIBRARY_PATH": gpu.library, "STAND_IN_BUILDS": str(tmp_path / "builds")}  # type: ignore[attr-defined]
    for more in ({}, {"STAND_IN_NO_GRAPH": "1"}):
        done = subprocess.run(
            [sys.executable, "-B", "-c", STEPS],
            cwd=decoder.path,
            env=environ | more,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        off, held, entries, size = json.loads(done.stdout)
        assert off < 1e-3  # two sessions of ONNX Runtime
        assert held == 0
        assert entries == ["decode", "prefill_8"]
        assert size == 2 * (96 * 64 + 96 * 32)  # in float16, for two layers


def test_text_is_made_on_the_gpu(decoder: Bundle, gpu: Run) -> None:
    done = gpu(decoder, "--ids", "1,2,3,4,5,6,7,8,9,10", "--max-tokens", "12", "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    result = json.loads(done.stdout)
    assert (result["tokens"], result["cached"], result["backend"]) == (12, 21, "tensorrt")
    full = json.loads(gpu(decoder, "--ids", ",".join(map(str, range(90))), "--json").stdout)
    assert (full["finish"], full["cached"]) == ("context", 96)


def test_a_decoders_profile(decoder: Bundle, gpu: Run) -> None:
    done = gpu(decoder, "--profile", "--json", "--runs", "5", "--warmup", "1")
    assert done.returncode == 0, done.stderr + done.stdout
    events = json.loads(done.stdout)["events"]
    assert list(events) == ["transfer in", "engine", "new rows", "transfer out", "engine, CUDA graph"]


def test_new_rows_that_do_not_fit_into_the_cache(
    decoder: Bundle, gpu: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    monkeypatch.chdir(tmp_path)
    words = []
    for spec in decoder.manifest.entries["prefill_8"].inputs:
        np.save(f"{spec.name}.npy", np.zeros(spec.shape, spec.dtype))
        words += ["--input", f"{spec.name}={spec.name}.npy"]
    assert gpu(decoder, "--entry", "prefill_8", *words).returncode == 0
    assert np.load("output.new_latent_1.npy").shape == (1, 8, 32)
    np.save("position.npy", np.array([89]))
    done = gpu(decoder, "--entry", "prefill_8", *words)
    assert done.returncode == 2
    assert "no room for the new rows: position 89" in done.stderr


def test_wrong_numbers_are_not_profiled(full: Bundle, gpu: Run) -> None:
    done = gpu(full, "--profile", STAND_IN_WRONG="1")
    assert done.returncode == 1
    assert "refused" in done.stderr


def test_the_real_package_without_a_gpu(rtx: Bundle) -> None:
    done = subprocess.run([sys.executable, str(rtx.path / "run.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "no NVIDIA GPU here" in done.stderr or "CUDA_ERROR" in done.stderr
    assert "edgeattn verify" in done.stderr


#: The stand-in's classes, which the real package has as well; those with an underscore go by these names there.
REAL = {
    "_Config": "IBuilderConfig",
    "_Profile": "IOptimizationProfile",
    "_Network": "INetworkDefinition",
    "_Cache": "ITimingCache",
    "_Error": "ParserError",
}


def test_the_stand_in_has_nothing_that_the_real_package_lacks() -> None:
    for name, thing in vars(stand_in).items():
        if not inspect.isclass(thing) or thing.__module__ != stand_in.__name__:
            continue
        real = getattr(trt, REAL.get(name, name))
        own = [n for n in vars(thing) if not n.startswith("_") and n not in ("file", "inputs", "outputs", "value")]
        assert [n for n in own if not hasattr(real, n)] == [], name
    assert callable(trt.nptype)


def test_all_that_the_runner_uses_is_in_the_real_package() -> None:
    """Every attribute of ``trt`` in the runner, and of what TensorRT's objects are called there."""
    folder = Path(edgeattn.__file__).parent / "bundle"
    source = "\n".join((folder / f"runner_{name}.py").read_text() for name in ("tensorrt", "cache"))
    objects = {
        "config": trt.IBuilderConfig,
        "builder": trt.Builder,
        "parser": trt.OnnxParser,
        "profile": trt.IOptimizationProfile,
        "runtime": trt.Runtime,
        "context": trt.IExecutionContext,
        "engine": trt.ICudaEngine,
        "trt": trt,
    }
    seen = 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            owner = node.value
            name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
            if name in objects and not (name == "engine" and node.attr == "get"):
                seen += 1
                assert hasattr(objects[name], node.attr), f"{name}.{node.attr}"
    assert seen > 25
