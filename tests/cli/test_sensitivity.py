"""``edgeattn sensitivity``: what it shows, writes, and goes on with."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from edgeattn import recipe
from edgeattn.core.schema import find
from edgeattn.pipeline.sensitivity import Sensitivity
from edgeattn.quant.sensitivity import Error
from edgeattn.report.sensitivity import picture

Cli = Callable[..., subprocess.CompletedProcess[str]]

PLANTED = """
import torch
from torch import nn

def planted():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(),
        nn.Linear(8 * 36, 4),
    )
    with torch.no_grad():
        net[0].weight[2] *= 1000
        net[0].bias[2] *= 1000
        net[2].weight[:, 2] /= 1000
    return net
"""


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """Recipes of a model with one channel 1000 times as loud as the others: as it is quantized, and as it is not."""
    (tmp_path / "net.py").write_text(PLANTED)
    code = "import net, safetensors.torch as s; s.save_file(net.planted().state_dict(), 'w.safetensors')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    for name, words in {"even": "", "plain": "[quant]\nequalize = false\n"}.items():
        (tmp_path / f"{name}.toml").write_text(
            f'name = "{name}"\n[model]\nfactory = "net.py:planted"\ncheckpoint = "w.safetensors"\n'
            f"[inputs.x]\nshape = [1, 3, 8, 8]\n{words}"
        )
    return tmp_path


@pytest.mark.slow
def test_a_planted_killer_is_named_first_and_the_advice_holds(edgeattn_cli: Cli, planted: Path) -> None:
    done = edgeattn_cli("sensitivity", "plain.toml", "-t", "onnx", "-o", "out", cwd=planted)
    assert done.returncode == 0, done.stderr
    found = json.loads((planted / "out" / "sensitivity.json").read_text())
    assert found["rows"][0]["name"] == "0"
    assert [step["holds"] for step in found["kept"]] == [False] * (len(found["kept"]) - 1) + [True]
    assert found["keep"][0] == "0"
    assert found["loud"]["0"] > 100
    ElementTree.fromstring((planted / "out" / "sensitivity.svg").read_text())

    # The entry is one that a recipe takes, and the next command is one that works.
    assert all(line in done.stdout for line in found["toml"].splitlines())
    with (planted / "plain.toml").open("a") as handle:
        handle.write(f"{found['toml']}\n")
    (keep,) = recipe.load(planted / "plain.toml").quant.keep
    assert keep.modules[0] == "0"
    following = shlex.split(done.stdout.partition("next:")[2].splitlines()[1])
    assert following[:2] == ["edgeattn", "export"]
    exported = edgeattn_cli(*following[1:], "-o", "bundles", cwd=planted)
    assert exported.returncode == 0, exported.stderr
    held = edgeattn_cli("sensitivity", "plain.toml", "-t", "onnx", cwd=planted)
    assert "nothing has to be kept in floats" in held.stdout


LOUD = "stages.1.1.ffn.expand"


@pytest.fixture
def loud_digits(tmp_path: Path) -> Path:
    """The trained digits model with one channel 1000 times as loud once fused; it computes the same."""
    home = find("recipes")["fmvit-digits"].parent
    for name in ("checkpoints", "data"):
        shutil.copytree(home / name, tmp_path / name)
    file = tmp_path / "checkpoints" / "fmvit-digits.safetensors"
    state, read = load_file(file), LOUD.replace("expand", "contract")
    width = state[f"{LOUD}.branches.0.bn.weight"].numel()
    for name, value in state.items():
        if name.startswith(LOUD) and name.endswith((".bn.weight", ".bn.bias")):
            value[3] *= 1000
        elif name.startswith(read) and name.endswith(".conv.weight"):
            groups = width // value.shape[1]
            value[: len(value) // groups, 3] /= 1000
    save_file(state, file)
    recipe_text = (home / "fmvit-digits.toml").read_text()
    (tmp_path / "loud.toml").write_text(f"{recipe_text}\n[quant]\nequalize = false\n")
    return tmp_path


@pytest.mark.slow
def test_a_killer_planted_in_the_trained_model(edgeattn_cli: Cli, loud_digits: Path) -> None:
    fused = json.loads(edgeattn_cli("reparam", "loud.toml", "--json", cwd=loud_digits).stdout)["fused"]
    assert max(fused, key=lambda block: block["crest_growth"] or 0)["path"] == LOUD
    assert next(block for block in fused if block["path"] == LOUD)["ptq_risk"]

    broken = edgeattn_cli("export", "loud.toml", "-t", "onnx", "-p", "w8a8", cwd=loud_digits)
    assert broken.returncode == 1
    assert "do not hold" in broken.stderr

    words = ("sensitivity", "loud.toml", "-t", "onnx", "--json")
    assert json.loads(edgeattn_cli(*words, cwd=loud_digits).stdout)["rows"][0]["name"] == LOUD

    held = edgeattn_cli("export", "loud.toml", "-t", "onnx", "-p", "w8a8", "--keep", LOUD, cwd=loud_digits)
    assert held.returncode == 0, held.stderr
    [manifest] = loud_digits.glob("*.onnx.w8a8/manifest.json")
    found = json.loads(manifest.read_text())
    assert found["task"]["reference_correct"] - found["task"]["artifact_correct"] <= 3
    assert any(LOUD in line for line in found["facts"]["quantize"]["risks"])


@pytest.mark.slow
def test_what_export_evens_out_need_not_be_kept_and_a_run_goes_on(
    edgeattn_cli: Cli, planted: Path, own_cache: Path
) -> None:
    words = ("sensitivity", "even.toml", "-t", "onnx")
    done = edgeattn_cli(*words, "--json", cwd=planted)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["rows"][0]["name"] == "0"
    assert found["evened"] > 0
    assert found["keep"] == []
    assert found["kept"][0]["holds"]
    assert found["kept"][0]["error"]["relative_l2"] < found["rows"][0]["alone"]["relative_l2"]

    again = edgeattn_cli(*words, cwd=planted)
    assert "4 of 4 rows were measured by an earlier run" in again.stdout
    (journal,) = (own_cache / "sensitivity").iterdir()
    lines = [line for line in journal.read_text().splitlines() if line]
    journal.write_text("\n".join(lines[:2]))
    resumed = json.loads(edgeattn_cli(*words, "--json", cwd=planted).stdout)
    assert resumed == found | {"known": 2}


@pytest.mark.slow
def test_labelled_samples_are_scored(edgeattn_cli: Cli) -> None:
    done = edgeattn_cli("sensitivity", "fmvit-digits", "-t", "coreml", "-p", "w8", "--on", "16")
    assert done.returncode == 0, done.stderr
    assert "and 30 more: --all" in done.stdout
    assert "16 held-out samples" in done.stdout
    assert "256 held-out samples" in done.stdout
    assert "top-1" in done.stdout
    assert "edgeattn export fmvit-digits --target coreml --precision w8" in done.stdout


@pytest.mark.slow
def test_operations_without_weights(edgeattn_cli: Cli) -> None:
    done = edgeattn_cli("sensitivity", "fmvit-digits", "--what", "operations", "--on", "16", "--json")
    assert done.returncode == 0, done.stderr
    names = {row["name"] for row in json.loads(done.stdout)["rows"]}
    assert {"every softmax", "every sum", "stages.1.1.attention softmax"} <= names


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["-p", "fp16"], 2, "nothing is quantized"),
        (["-p", "w9"], 2, "unknown precision"),
        (["--on", "0"], 2, "--on"),
        (["--keep", "stem.99"], 2, "no such module"),
        (["--keep", "*"], 1, "there is nothing to quantize"),
        (["-o", "/proc/none"], 2, "cannot be written"),
    ],
)
def test_bad_input(edgeattn_cli: Cli, words: list[str], code: int, said: str) -> None:
    done = edgeattn_cli("sensitivity", "fmvit-digits", *words)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_the_picture_escapes_names_and_shows_what_is_not_finite() -> None:
    rows = [
        {"name": name, "kind": "Linear", "parameters": 1, "alone": error.as_dict(), "without": Error(0.0).as_dict()}
        for name, error in {"<b>&": Error(float("inf")), "x" * 80: Error(0.02), "none": Error(0.0)}.items()
    ]
    kept = [{"count": count, "error": Error(0.1 / (count + 1)).as_dict(), "holds": count == 1} for count in (0, 1)]
    found = Sensitivity(
        "a < b", True, "onnx", "w8a8", "modules", rows, kept, 0.06, "2 samples", "2 samples", 0, 0, {"<b>&": 9.0}
    )
    root = ElementTree.fromstring(picture(found))
    texts = [element.text for element in root.iter() if element.text]
    assert "<b>&" in texts
    assert "not finite" in texts
    assert any("random" in text for text in texts)
    assert any("to be kept" in text for text in texts)
    assert "9 times as loud" in found.toml()


def test_a_decoder_is_refused_in_words(edgeattn_cli: Cli) -> None:
    done = edgeattn_cli("sensitivity", "plm-tiny", "--target", "onnx", "--precision", "w4")
    assert done.returncode == 2
    assert "the modules of a decoder with a cache are not ranked" in done.stderr
    assert "without [decoder]" in done.stderr
