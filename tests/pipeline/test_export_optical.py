"""Whole models through the optical target: ideal planes give the training form's numbers, and all of its accuracy."""

from __future__ import annotations

from pathlib import Path

import pytest

import edgeattn

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


DECODER = """
name = "plm-small"
[model]
factory = "edgeattn.models.plm:plm"
[model.args]
vocab_size = 96
hidden_size = 64
num_hidden_layers = 1
num_attention_heads = 2
kv_lora_rank = 32
qk_nope_head_dim = 16
qk_rope_head_dim = 16
v_head_dim = 16
intermediate_size = 64
[inputs.ids]
shape = [1, 16]
dtype = "int64"
low = 0
high = 95
[decoder]
context = 64
prefill = [8]
steps = 32
greedy = 8
"""


def test_a_decoder_has_its_entries_on_optics_and_its_cache_in_electronics(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(DECODER)
    bundle = edgeattn.export(str(tmp_path / "small.toml"), target="optical", output=tmp_path)
    assert set(bundle.manifest.entries) == {"decode", "prefill_8"}
    decoding = bundle.manifest.decoding
    assert decoding is not None
    assert decoding["greedy"]["same"] == 8
    assert bundle.verify().worst.holds(ALLOWED)
    assert all(entry["optics"]["operations"] for entry in bundle.manifest.facts["entries"].values())
