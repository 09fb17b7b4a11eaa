"""The trained model to Core ML in few bits, end to end: accuracy, sizes, and what the bundle says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

import edgeattn


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Bytes of the weights in float32."""
    output = tmp_path_factory.mktemp("wide")
    bundle = edgeattn.export("fmvit-digits", target="coreml", output=output)
    bytes_: int = bundle.manifest.facts["entries"]["main"]["weight_bytes"]
    return bytes_


@pytest.mark.parametrize(
    ("precision", "drop", "numbers", "system", "share"),
    [
        ("w8", 0.005, "int8, by channel", "iOS16", 0.28),
        ("w8a8", 0.01, "int8, by channel; data int8", "iOS17", 0.28),
        ("w4", 0.02, "int4, blocks of 32", "iOS18", 0.18),
    ],
)
def test_digits_hold(
    wide: int, precision: str, drop: float, numbers: str, system: str, share: float, tmp_path: Path
) -> None:
    bundle = edgeattn.export("fmvit-digits", target="coreml", precision=precision, output=tmp_path)
    assert bundle.path.name == f"fmvit-digits.coreml.{precision}"
    task = bundle.manifest.task
    assert task is not None
    assert task["samples"] == 360
    assert task["reference_correct"] - task["artifact_correct"] <= drop * task["samples"]
    facts = bundle.manifest.facts["entries"]["main"]
    assert facts["minimum_system"] == system
    assert bundle.manifest.facts["options"]["deployment"] == system
    assert facts["quantized"]["numbers"] == numbers
    assert facts["quantized"]["left_in_floats"] == []
    assert len(facts["quantized"]["operations"]) == 50
    assert facts["weight_bytes"] <= share * wide
    assert ("quantize" in facts["nodes"]) == (precision == "w8a8")
