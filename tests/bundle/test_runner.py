"""``run.py`` as a device runs it: a process of its own, without EdgeAttn."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgeattn.bundle.bundle import RUNNER, Bundle
from edgeattn.core.hashing import sha256_data


def run(bundle: Path, *arguments: str, cwd: Path | None = None, blocked: str = "") -> subprocess.CompletedProcess[str]:
    """``blocked``: modules that cannot be imported. EdgeAttn and torch never can."""
    block = "".join(f"sys.modules[{name!r}] = None\n" for name in [*blocked.split(), "edgeattn", "torch"])
    code = f"import runpy, sys\n{block}sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", code, str(bundle / "run.py"), *arguments],
        cwd=cwd or bundle.parent, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def failed(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr + done.stdout


@pytest.fixture
def inputs(tmp_path):
    np.save(tmp_path / "x.npy", np.array([[1, -1], [2, 0.5]], np.float32))
    np.save(tmp_path / "ids.npy", np.array([3, 4]))
    return ["--input", f"x={tmp_path / 'x.npy'}", "--input", f"ids={tmp_path / 'ids.npy'}"]


def test_it_is_python_3_9_and_imports_the_standard_library_at_the_top():
    tree = ast.parse(RUNNER.read_text(encoding="utf-8"), feature_version=(3, 9))
    imported = {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module for n in tree.body if isinstance(n, ast.ImportFrom)}
    assert imported <= {
        *("__future__", "argparse", "hashlib", "importlib", "importlib.util", "json", "os", "platform", "signal"),
        *("subprocess", "sys", "time", "typing"),
    }
    assert any(isinstance(n, ast.ImportFrom) and n.module == "__future__" for n in tree.body)  # for ``X | Y``
    assert not any(isinstance(n, ast.Match) for n in ast.walk(tree))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    assert not any(k.arg == "strict" for c in calls if c.func.id == "zip" for k in c.keywords)


def test_it_verifies(tiny, tmp_path):
    done = run(tiny.path, cwd=tmp_path)
    assert done.returncode == 0, done
    assert "tiny.onnx.fp32: holds under onnxruntime" in done.stdout
    assert "over 2 golden samples, tolerance 1e-05" in done.stdout
    assert run(tiny.path, "--verify").stdout == done.stdout
    result = json.loads(run(tiny.path, "--json").stdout)
    assert (result["holds"], result["golden"], result["worst_relative_l2"]) == (True, 2, 0.0)


def test_it_runs_ones_own_data(tiny, inputs, tmp_path):
    done = run(tiny.path, *inputs, "--json", cwd=tmp_path)
    assert done.returncode == 0, done
    outputs = json.loads(done.stdout)["outputs"]
    assert outputs["y"] == {"file": "output.y.npy", "shape": [2, 2], "dtype": "float32"}
    assert np.load(tmp_path / "output.y.npy").tolist() == [[2, 0], [4, 1]]
    assert np.load(tmp_path / "output.n.npy").tolist() == [4, 5]
    assert "y -> output.y.npy (2, 2) float32" in run(tiny.path, *inputs, cwd=tmp_path).stdout


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"schema_version": null}'])
def test_a_manifest_that_is_none_is_named(copy, text):
    (copy / "manifest.json").unlink()
    if text is not None:
        (copy / "manifest.json").write_text(text)
    done = run(copy)
    failed(done, 1, "manifest.json is missing or damaged")
    assert "copy the bundle again" in done.stderr


@pytest.mark.parametrize("name", ["model.onnx", "golden/main-001.npz", "README.md", "manifest.json"])
@pytest.mark.parametrize("own", [False, True])
def test_one_changed_byte(copy, name, own, inputs):
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    failed(run(copy, *(inputs if own else [])), 1, "copy the bundle again" if name != "manifest.json" else "manifest")


@pytest.mark.parametrize(("old", "new"), [("\n", " "), ("1e-05", "1E-05"), ('"files"', '"files" ')])
def test_a_manifest_that_means_the_same_but_was_touched(copy, old, new):
    text = (copy / "manifest.json").read_text(encoding="utf-8")
    (copy / "manifest.json").write_text(text.replace(old, new, 1), encoding="utf-8")
    failed(run(copy), 1, "manifest.json was changed")


def test_a_missing_file(copy):
    (copy / "golden/main-000.npz").unlink()
    done = run(copy, "--json")
    failed(done, 1, "golden/main-000.npz is missing")
    assert json.loads(done.stdout)["exit_code"] == 1


def test_numbers_that_do_not_hold(tmp_path, make_bundle):
    make_bundle(tmp_path, off=0.1)
    done = run(tmp_path / "tiny.onnx.fp32")
    failed(done, 1, "DOES NOT HOLD")


@pytest.mark.parametrize("off", [np.nan, np.inf])
def test_golden_outputs_that_are_not_finite_never_hold(tmp_path, make_bundle, off):
    make_bundle(tmp_path, off=off)
    failed(run(tmp_path / "tiny.onnx.fp32"), 1, "worst relative L2 not finite")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--input", "x={x}"], ["missing --input ids=FILE.npy"]),
        (["--input", "x={none}"], ["none.npy"]),
        (["--input", "x"], ["--input x"]),
        (["--input", "x={wide}", "--input", "ids={ids}"], ["input x is (1, 4) float32, wanted is (2, 2) float32"]),
        (["--input", "x={ids}", "--input", "ids={ids}"], ["int64, wanted is (2, 2) float32"]),
        (["--input", "x={x}", "--input", "ids={ids}", "--input", "z={x}"], ["no input named z"]),
        (["--input", "x={several}", "--input", "ids={ids}"], ["several arrays"]),
        (["--input", "x={empty}", "--input", "ids={ids}"], ["empty.npy"]),
        (["--input", "x={pickled}", "--input", "ids={ids}"], ["allow_pickle=False"]),
        (["--input", "x={x}", "--entry", "decode"], ["no entry 'decode'; there are main"]),
        (["--input", "x={x}", "--verify"], ["not allowed with argument"]),
        (["--inptu", "x"], ["unrecognized"]),
    ],
)
def test_usage(tiny, inputs, tmp_path, arguments, words):
    np.save(tmp_path / "wide.npy", np.zeros((1, 4), np.float32))
    np.savez(tmp_path / "several.npy.npz", a=np.zeros(1))
    (tmp_path / "several.npy.npz").rename(tmp_path / "several.npy")
    (tmp_path / "empty.npy").write_bytes(b"")
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object))
    files = {n: tmp_path / f"{n}.npy" for n in ("x", "ids", "none", "wide", "several", "empty", "pickled")}
    failed(run(tiny.path, *(a.format(**files) for a in arguments), cwd=tmp_path), 2, *words)
    assert not list(tmp_path.glob("output*"))


@pytest.mark.parametrize("blocked", ["onnxruntime", "numpy", "numpy onnxruntime"])
@pytest.mark.parametrize("own", [False, True])
def test_without_its_runtime(tiny, inputs, blocked, own):
    done = run(tiny.path, *(inputs if own else []), "--json", blocked=blocked)
    failed(done, 3, "pip install numpy")
    assert json.loads(done.stdout)["exit_code"] == 3


def reseal(path: Path, **changes) -> None:
    data = json.loads((path / "manifest.json").read_text(encoding="utf-8")) | changes
    data["digest"] = sha256_data({k: v for k, v in data.items() if k != "digest"})
    (path / "manifest.json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def test_a_newer_schema(copy):
    reseal(copy, schema_version=99)
    failed(run(copy), 2, "newer")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "link"])
def test_names_that_leave_the_bundle(copy, tiny, name):
    (copy.parent / "outside").write_text("secret")
    (copy / "link").symlink_to(copy.parent / "outside")
    files = {k: v.model_dump() for k, v in tiny.manifest.files.items()}
    reseal(copy, files={**files, name: files["run.py"]})
    failed(run(copy), 2, "outside of the bundle")


def test_no_golden_samples_prove_nothing(copy, tiny):
    shutil.rmtree(copy / "golden")
    reseal(copy, files={k: v.model_dump() for k, v in tiny.manifest.files.items() if "golden" not in k})
    assert run(copy).returncode == 1


def test_the_runner_and_the_package_agree(tiny):
    # Two implementations of the same digest: whatever one seals the other must read.
    assert json.loads(run(tiny.path, "--json").stdout)["holds"]
    assert Bundle.open(tiny.path).verify().worst.holds(1e-5)
