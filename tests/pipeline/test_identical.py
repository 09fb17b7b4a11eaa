"""Two exports of one recipe on the same versions give the same bytes, whatever hash seed, day and folder."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from edgeattn.core import tools

#: What differs between two processes that should not matter: seeds of hashes, threads, the day.
WORLDS = (
    {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1", "TZ": "Pacific/Kiritimati"},
    {"PYTHONHASHSEED": "4242", "OMP_NUM_THREADS": "2", "TZ": "Pacific/Pago_Pago"},
)
#: Of a bundle, what says when and how fast it was made.
TIMES = ("manifest.json", "README.md")

LOWER = """
import sys
from pathlib import Path
from edgeattn import targets
from edgeattn.conformance.kit import Kit
from edgeattn.conformance.models import case, decoder
asked = (("onnx", "fp32", "attention"), ("onnx", "w8a8", "convolution"), ("gguf", "w4", "decoder"))
for name, precision, model in asked:
    target = targets.get(name)
    kit = Kit(target, name, "", Path.cwd() / f"{name}-{precision}")
    made = kit.lowered(decoder(target.cache) if model == "decoder" else case(model), precision)
    assert made.artifact is not None, made
"""
EXPORT = """
import json, sys
import edgeattn
for model, target, precision in json.loads(sys.argv[1]):
    edgeattn.export(model, target, precision, output="bundles")
"""


def made_twice(folder: Path, code: str, *arguments: str, **alike: str) -> list[Path]:
    """Runs code in two worlds, each with a folder and an empty cache of its own; ``alike`` is the same in both."""
    places = []
    for number, world in enumerate(WORLDS):
        place = folder / f"{'far/away/' * number}place"
        place.mkdir(parents=True)
        environ = {**os.environ, **world, **alike, "EDGEATTN_CACHE": str(place / "cache")}
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=place, env=environ, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        places.append(place)
    return places


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    first, second = map(digests, made_twice(tmp_path, LOWER))
    assert {Path(name).suffix for name in first} >= {".onnx", ".gguf"}
    assert first == second


def plain(bundle: Path) -> dict[str, Any]:
    """A manifest without times and what follows from them."""
    content = json.loads((bundle / "manifest.json").read_text())
    for stage in content["stages"]:
        del stage["seconds"], stage["peak_mb"]
    del content["created"], content["digest"], content["files"]["README.md"]
    content["facts"].pop("advice", None)  # of quantized ones: how they were timed on this machine
    return content


CASES = (
    ("fmvit-digits", "onnx", "w8a8"),
    ("fmvit-digits", "tflite", "w8a8"),
    ("fmvit-digits", "coreml", "fp16"),
    ("plm-tiny", "gguf", "w8"),
)


@pytest.mark.slow
def test_two_exports_give_the_same_bytes(tmp_path: Path) -> None:
    """Artifacts, golden samples and the runner; of the manifest all but the times."""
    cases = [case for case in CASES if tools.version({"coreml": "coremltools"}.get(case[1], "numpy"))]
    # With other threads the reference's sums have another order, and golden samples other last digits.
    made = made_twice(tmp_path, EXPORT, json.dumps(cases), OMP_NUM_THREADS="1")
    first, second = (place / "bundles" for place in made)
    bundles = sorted(path.name for path in first.iterdir())
    assert len(bundles) == len(cases)
    for name in bundles:
        ours, theirs = digests(first / name), digests(second / name)
        assert {file for file in ours.keys() | theirs.keys() if ours.get(file) != theirs.get(file)} <= {*TIMES}
        assert plain(first / name) == plain(second / name)


def test_a_package_has_identifiers_of_its_content(tmp_path: Path) -> None:
    """Two conversions are one package; another model's has other identifiers, and coremltools reads it."""
    if tools.version("coremltools") is None:
        pytest.skip("needs coremltools")
    import coremltools as ct

    from edgeattn import targets
    from edgeattn.conformance.kit import Kit
    from edgeattn.conformance.models import case
    from edgeattn.targets.coreml.save import DATE

    kit = Kit(targets.get("coreml"), "coreml", "", tmp_path)
    made = [kit.lowered(case("rectified"), "fp16", again).artifact for again in (0, 1)]
    made.append(kit.lowered(case("several"), "fp16").artifact)
    folders = [artifact.folder for artifact in made if artifact is not None]
    assert digests(folders[0]) == digests(folders[1])
    packages = [folder / "main.mlpackage" for folder in folders]
    known = [json.loads((package / "Manifest.json").read_text()) for package in packages]
    assert set(known[0]["itemInfoEntries"]).isdisjoint(known[2]["itemInfoEntries"])
    for content, package in zip(known, packages, strict=True):
        assert {uuid.UUID(name).version for name in content["itemInfoEntries"]} == {5}
        assert content["rootModelIdentifier"] in content["itemInfoEntries"]
        loaded = ct.models.MLModel(str(package), skip_model_load=True)
        assert loaded.get_spec().specificationVersion == 7
        assert DATE not in loaded.user_defined_metadata
