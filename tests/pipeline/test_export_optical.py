"""Whole models through the optical target: ideal planes give the training form's numbers, and all of its accuracy."""

from __future__ import annotations

from pathlib import Path

import pytest

import edgeattn
from edgeattn.core.errors import UsageError

#: Relative L2 that is allowed on ideal planes.
ALLOWED = 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["v1", "v2", "v3"])
def test_convsharevit_at_its_full_size_holds_on_ideal_planes(variant: str, tmp_path: Path) -> None:
    bundle = edgeattn.export(f"convsharevit-{variant}", device="optical-4f-4k-2mhz", output=tmp_path)
    assert bundle.path.name == f"convsharevit-{variant}-random.optical.fp32"
    verified = bundle.verify()
    assert verified.tolerance == ALLOWED
    assert verified.worst.holds(ALLOWED)
    found = bundle.manifest.facts["entries"]["main"]["optics"]
    assert found["operations"] == {"ConvTranspose": 1 + 12 * (variant == "v2"), "Conv": 13 if variant == "v2" else 25}
    assert found["largest_error"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fmvit-digits", "convsharevit-v2-digits", "convsharevit-v3-digits"])
def test_a_trained_model_keeps_its_numbers_and_its_accuracy(name: str, tmp_path: Path) -> None:
    bundle = edgeattn.export(name, target="optical", output=tmp_path)
    assert bundle.verify().worst.holds(ALLOWED)
    task = bundle.manifest.task
    assert task is not None
    assert task["artifact_correct"] == task["reference_correct"]
    assert task["samples"] == 360


def test_a_decoder_behind_a_cache_is_refused() -> None:
    with pytest.raises(UsageError, match="no form for a decoder with a cache"):
        edgeattn.export("plm-tiny", target="optical")
