"""Bad input: the documented exit code, what, where and what to do; no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from edgeattn.bundle import Bundle
from edgeattn.core.schema import folders
from edgeattn.pipeline.export import make_job
from edgeattn.pipeline.plan import sources_key

Cli = Callable[..., subprocess.CompletedProcess[str]]
SHIPPED = folders("recipes")[-1]
CHECKPOINT = SHIPPED / "checkpoints" / "fmvit-digits.safetensors"

GUESTS = """
import torch
from torch import nn

def small():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 64, 2))

class Log(nn.Module):
    def forward(self, x):
        return torch.log(x - 1e9)

def nonfinite():
    return nn.Sequential(nn.Linear(4, 4), Log())

class Gate(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x

def branchy():
    return nn.Sequential(nn.Linear(4, 4), Gate())

def raises():
    raise RuntimeError("no such width")

def text():
    return "not a module"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "guests.py").write_text(GUESTS)
    shutil.copytree(SHIPPED, tmp_path / "recipes")
    return tmp_path


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert sum(line.lower().startswith("error:") for line in done.stderr.splitlines()) == 1
    for word in words:
        assert word in done.stderr, done.stderr


def nothing_written(folder: Path) -> None:
    assert not list(folder.rglob("manifest.json"))
    assert not list((folder / "out").glob("**/.*")) if (folder / "out").exists() else True


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["export", "fmvit-tt"], 2, ["unknown recipe", "did you mean 'fmvit-t'"]),
        (["export", "guests.py:smal", "-i", "x=1x3x8x8"], 2, ["no such factory", "did you mean 'small'"]),
        (["export", "guests.py:small"], 2, ["needs its inputs", "--input x=1x3x224x224"]),
        (["export", "guests.py", "-i", "x=1x3x8x8"], 2, ["factory is not clear", "small"]),
        (["export", "nowhere.py:small", "-i", "x=1x3x8x8"], 2, ["does not exist"]),
        (["export", "no.such.module:f", "-i", "x=1x3x8x8"], 2, ["module cannot be found"]),
        (["export", "guests.py:raises", "-i", "x=1x3x8x8"], 2, ["factory failed", "guests.py:", "no such width"]),
        (["export", "guests.py:text", "-i", "x=1x3x8x8"], 2, ["torch.nn.Module", "str"]),
        (["export", "guests.py:small", "-i", "x=1x3x9x9"], 2, ["cannot run on these inputs", "module 2"]),
        (["export", "guests.py:nonfinite", "-i", "x=1x4"], 1, ["not finite", "module 1 "]),
        (["export", "guests.py:branchy", "-i", "x=1x4"], 4, ["cannot be captured", "module 1"]),
        (["export", "fmvit-t", "-i", "x=1x3x100x224"], 2, ["multiples of 32", "96"]),
        (["export", "fmvit-t", "-i", "x=1x4x64x64"], 2, ["channel"]),
        (["export", "fmvit-t", "-i", "x=3x"], 2, ["NAME=SHAPE"]),
        (["export", "fmvit-t", "-i", "x=1x3x64x64:flaot32"], 2, ["float32"]),
        (["export", "fmvit-t", "-i", "image=1x3x64x64"], 2, ["no such input", "fmvit-t has x"]),
        (["export", "fmvit-t", "-i", "x=1x3x64x64", "-i", "x=1x3x32x32"], 2, ["given twice"]),
        (["export", "fmvit-t", "-i", "x=1x3x99999999x99999999"], 2, ["too large"]),
        (["export", "fmvit-t", "--arg", "variant=q"], 2, ["variant"]),
        (["export", "fmvit-t", "--arg", "variant"], 2, ["NAME=VALUE"]),
        (["export", "fmvit-t", "--precision", "fp61"], 2, ["precision", "fp32, fp16"]),
        (["export", "fmvit-t", "--target", "onx"], 2, ["unknown target", "'onnx'"]),
        (["export", "fmvit-t", "--device", "hots"], 2, ["unknown device", "'host'"]),
        (["export", "fmvit-t", "--target", "null", "--device", "host"], 2, ["does not run this target"]),
        (["export", "timm:resnet999", "-c", "none.pth"], 2, ["a file is missing"]),
        (["exprot", "fmvit-t"], 2, ["Did you mean 'export'"]),
        (["export", "fmvit-t", "--outptu", "x"], 2, ["--output"]),
        (["verify", "nowhere"], 2, ["not a bundle"]),
        (["inspect", "recipes"], 2, ["not a bundle", "manifest.json"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_refused(folder: Path, edgeattn_cli: Cli, arguments: list[str], code: int, words: list[str]) -> None:
    if arguments[0] == "export":
        arguments = [*arguments, "-o", "out"]
    refused(edgeattn_cli(*arguments, cwd=folder), code, *words)
    nothing_written(folder)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("outputs =", "outptus =", ["outptus: unknown key", "did you mean 'outputs'"]),
        ("checkpoint =", "chekpoint =", ["model.chekpoint", "did you mean 'checkpoint'"]),
        ("shape =", "sahpe =", ["inputs.x.sahpe", "did you mean 'shape'"]),
        ("[1, 1, 32, 32]", "[1, 1, 0, 32]", ["inputs.x.shape", "at least 1"]),
        ("[1, 1, 32, 32]", '"big"', ["inputs.x.shape", "big"]),
        ('name = "fmvit-digits"', 'name = "../up"', ["name", "'../up'"]),
        ("[model]", "[model", ["not TOML"]),
        ("checkpoints/", "nowhere/", ["a file is missing", "model.checkpoint"]),
        ('factory = "edgeattn', 'factory = "nowhere', ["module cannot be found"]),
    ],
)
def test_bad_recipe(folder: Path, edgeattn_cli: Cli, old: str, new: str, words: list[str]) -> None:
    path = folder / "recipes" / "fmvit-digits.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    refused(edgeattn_cli("export", path, "-o", folder / "out"), 2, *words)
    nothing_written(folder)


def test_truncated_checkpoints(folder: Path, edgeattn_cli: Cli) -> None:
    import torch

    data = CHECKPOINT.read_bytes()
    (folder / "cut.safetensors").write_bytes(data[: len(data) // 2])
    torch.save(load_file(CHECKPOINT), folder / "whole.pth")
    (folder / "cut.pth").write_bytes((folder / "whole.pth").read_bytes()[:100_000])
    (folder / "empty.pth").write_bytes(b"")
    for name in ("cut.safetensors", "cut.pth", "empty.pth"):
        refused(edgeattn_cli("export", "fmvit-digits", "-c", folder / name, "-o", folder / "out"), 2, "damaged", name)
    nothing_written(folder)


class _Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, (f"touch {self.mark}",))


def test_code_in_a_pickle_is_not_run(folder: Path, edgeattn_cli: Cli) -> None:
    import torch

    mark = folder / "was-run"
    (folder / "plain.pth").write_bytes(pickle.dumps({"a": _Evil(mark)}))
    torch.save({"state_dict": _Evil(mark)}, folder / "zip.pth")
    for name in ("plain.pth", "zip.pth"):
        done = edgeattn_cli("export", "fmvit-digits", "-c", folder / name, "-o", folder / "out")
        refused(done, 2, "holds code, which is not executed", "posix.system", "safetensors")
    assert not mark.exists()
    nothing_written(folder)


def test_weights_that_do_not_fit_are_listed(folder: Path, edgeattn_cli: Cli) -> None:
    state = load_file(CHECKPOINT)
    names = [name for name in state if name.endswith("conv.weight")]
    state["extra.weight"] = state.pop(names[0])
    state[names[1]] = state[names[1]][:1].contiguous()
    save_file(state, folder / "odd.safetensors")
    done = edgeattn_cli("export", "fmvit-digits", "-c", folder / "odd.safetensors", "-o", folder / "out")
    refused(done, 2, "1 missing, 1 extra, 1 of another shape", f"missing: {names[0]}", "extra: extra.weight", names[1])
    nothing_written(folder)


def test_output_that_exists_is_kept(folder: Path, edgeattn_cli: Cli, digits: Bundle) -> None:
    mine = folder / "out" / "fmvit-digits.onnx.fp32"
    mine.mkdir(parents=True)
    (mine / "precious.txt").write_text("mine")
    refused(edgeattn_cli("export", "fmvit-digits", "-o", folder / "out"), 2, "exists already", "--force", "was kept")
    assert (mine / "precious.txt").read_text() == "mine"
    assert edgeattn_cli("export", "fmvit-digits", "-o", folder / "out", "--force").returncode == 0
    assert not (mine / "precious.txt").exists()
    assert edgeattn_cli("verify", mine).returncode == 0


def test_output_that_cannot_be_written(folder: Path, edgeattn_cli: Cli) -> None:
    (folder / "file").write_text("")
    refused(edgeattn_cli("export", "fmvit-digits", "-o", folder / "file" / "out"), 2, "cannot be written", "--output")
    refused(edgeattn_cli("export", "fmvit-digits", "-o", "/proc/out"), 2, "cannot be written")


def test_flipped_byte_in_any_file(folder: Path, edgeattn_cli: Cli, digits: Bundle) -> None:
    for name in ["manifest.json", *digits.manifest.files]:
        copy = folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(digits.path, copy)
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 0x01
        (copy / name).write_bytes(bytes(data))
        done = edgeattn_cli("verify", copy)
        refused(done, 1, name)


def test_a_newer_schema_is_refused(folder: Path, edgeattn_cli: Cli, digits: Bundle) -> None:
    shutil.copytree(digits.path, folder / "copy")
    path = folder / "copy" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99, "news": 1}))
    for command in ("verify", "inspect"):
        refused(edgeattn_cli(command, folder / "copy"), 2, "newer EdgeAttn", "99", "upgrade")


def test_a_missing_toolchain_is_exit_3_with_the_line(folder: Path, edgeattn_cli: Cli, digits: Bundle) -> None:
    (folder / "sitecustomize.py").write_text(
        "import importlib.metadata as m\n"
        "real = m.version\n"
        "def version(name):\n"
        "    if name == 'onnxruntime':\n"
        "        raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
    )
    words = ("onnxruntime", "pip install onnxruntime")
    refused(edgeattn_cli("export", "fmvit-t", "-o", folder / "out", PYTHONPATH=str(folder)), 3, *words)
    plan = edgeattn_cli("plan", "fmvit-t", PYTHONPATH=str(folder))
    refused(plan, 3, *words)
    assert "reparameterize" in plan.stdout
    refused(edgeattn_cli("verify", digits.path, PYTHONPATH=str(folder)), 3, *words)
    doctor = edgeattn_cli("doctor", PYTHONPATH=str(folder))
    assert doctor.returncode == 0
    assert "pip install onnxruntime" in doctor.stdout


@pytest.mark.parametrize(
    "content", ["truncated", "labels", "nan", "too many classes", "a bare array"], ids=lambda c: c.replace(" ", "-")
)
def test_held_out_samples_that_cannot_be_used(folder: Path, edgeattn_cli: Cli, content: str) -> None:
    file = folder / "recipes" / "data" / "digits-heldout.npz"
    with np.load(file) as data:
        x, y = data["x"], data["y"]
    if content == "truncated":
        file.write_bytes(file.read_bytes()[:5000])
    elif content == "a bare array":
        with file.open("wb") as handle:
            np.save(handle, x)
    else:
        given = {"labels": (x, y.astype(str)), "nan": (x * np.float32("nan"), y), "too many classes": (x, y + 5)}[
            content
        ]
        np.savez(file, x=given[0], y=given[1])
    done = edgeattn_cli("export", folder / "recipes" / "fmvit-digits.toml", "-o", folder / "out")
    refused(done, 2, "the held-out samples")
    nothing_written(folder)


def test_a_cache_that_cannot_be_used(folder: Path, edgeattn_cli: Cli) -> None:
    (folder / "file").write_text("")
    for place in ("/proc/nowhere", str(folder / "file")):
        done = edgeattn_cli("export", "fmvit-digits", "-o", folder / "out", EDGEATTN_CACHE=place)
        refused(done, 2, "cache folder cannot be written", "EDGEATTN_CACHE")
        assert edgeattn_cli("plan", "fmvit-digits", EDGEATTN_CACHE=place).returncode == 0
    for text in ("5", '{"files": 3, "distributions": null}', "{"):
        cache = folder / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        (cache / "sources").mkdir(parents=True)
        key = sources_key(make_job("fmvit-digits"))
        (cache / "sources" / f"{key}.json").write_text(text)
        assert edgeattn_cli("plan", "fmvit-digits", EDGEATTN_CACHE=str(cache)).returncode == 0


def test_a_working_folder_that_is_gone(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    command = f"mkdir {gone} && cd {gone} && rmdir {gone} && {sys.executable} -c "
    code = "from edgeattn.cli import main; main(['export', 'guest.py:f', '-i', 'x=1x4'])"
    done = subprocess.run(["bash", "-c", f'{command} "{code}"'], capture_output=True, text=True)
    refused(done, 2)


def test_weights_of_another_kind_are_refused(folder: Path, edgeattn_cli: Cli) -> None:
    import torch

    state = load_file(CHECKPOINT)
    name = next(name for name in state if name.endswith("conv.weight"))
    for odd in (state[name].to(torch.int8), state[name].to(torch.complex64), state[name].to_sparse()):
        torch.save({**state, name: odd}, folder / "odd.pth")
        done = edgeattn_cli("export", "fmvit-digits", "-c", folder / "odd.pth", "-o", folder / "out")
        refused(done, 2, "1 of another kind", f"dtype: {name}")


def test_debug_shows_where_it_was_raised(folder: Path, edgeattn_cli: Cli) -> None:
    done = edgeattn_cli("export", "guests.py:raises", "-i", "x=1x4", "-o", "out", "--debug", cwd=folder)
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "in raises" in done.stderr
