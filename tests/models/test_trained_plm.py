"""The trained PLM as committed: its files fit together, and the model is as good as they say."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from edgeattn import recipe
from edgeattn.models.build import build

tokenizers = pytest.importorskip("tokenizers")

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FOLDER = RECIPES / "checkpoints" / "plm-tiny"
HELDOUT, CALIBRATION = (RECIPES / "data" / f"plm-tiny-{name}.txt" for name in ("heldout", "calibration"))
SCRIPT = RECIPES.parent / "examples" / "train_plm_tiny.py"
SPECIAL = {"<|endoftext|>": 2045, "<|im_start|>": 2046, "<|im_end|>": 2047}

#: Of the chat template in the released checkpoints.
TEMPLATE_SHA256 = "af9c0233881b083b52ff773580215222b5440ac3d0beeeca99b76329b048f8db"


def content(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name).read_text("utf-8"))


@pytest.fixture(scope="module")
def facts() -> dict[str, str]:
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        return dict(file.metadata())


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build(recipe.resolve("plm-tiny")).model


@pytest.fixture(scope="module")
def ids(tokenizer: Any) -> list[int]:
    return tokenizer.encode(HELDOUT.read_text("utf-8")).ids


@torch.no_grad()
def losses(model: nn.Module, ids: list[int]) -> Tensor:
    part = torch.tensor(ids)
    return F.cross_entropy(model(part[None, :-1])[0], part[1:], reduction="none")


def test_files_are_small_and_in_the_layout_of_the_released_checkpoints() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8_000_000
    config = content("config.json")
    assert config["architectures"] == ["PLMForCausalLM"]
    assert (config["bos_token_id"], config["eos_token_id"]) == (2045, 2047)
    assert content("generation_config.json")["eos_token_id"] == [2047, 2045]
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert len(names) == 9 * config["num_hidden_layers"] + 2
    assert "lm_head.weight" not in names


def test_the_recorded_facts_are_of_a_trained_model(facts: dict[str, str]) -> None:
    perplexity = float(facts["heldout_perplexity"])
    assert perplexity < 50
    assert perplexity < float(facts["unigram_perplexity"]) / 12
    assert facts["tokens"] == facts["of_tokens"]
    short, middle, long = (float(x.partition(": ")[2]) for x in facts["heldout_perplexity_by_window"].split(", "))
    assert max(middle, long) < short  # the same tokens: what is far before them helps
    assert long < 1.05 * middle  # and what is very far does no harm, though training saw little of it
    assert long == pytest.approx(perplexity, abs=0.01)


def test_perplexity_of_the_beginning_is_about_the_recorded_one(
    model: nn.Module, ids: list[int], facts: dict[str, str]
) -> None:
    found = losses(model, ids[:1537]).mean().exp().item()
    assert found == pytest.approx(float(facts["heldout_perplexity"]), rel=0.35)


@pytest.mark.slow
def test_perplexity_is_the_recorded_one(model: nn.Module, ids: list[int], facts: dict[str, str]) -> None:
    found = torch.cat([losses(model, ids[i : i + 4097]) for i in range(0, len(ids) - 4096, 4096)])
    assert len(found) == int(facts["heldout_tokens"])
    assert found.mean().exp().item() == pytest.approx(float(facts["heldout_perplexity"]), rel=2e-3)
    bits = found.mean().item() / math.log(2) * len(ids) / len(HELDOUT.read_bytes())
    assert bits == pytest.approx(float(facts["heldout_bits_per_byte"]), rel=2e-3)


@pytest.mark.parametrize(
    "text",
    ["", "a  b\n\n\tc", "It's 12345 naïve — ¡日本語! 🙂", "<|im_start|>user\nHello<|im_end|>\n", "\x00\r\n", "é" * 9],
)
def test_the_tokenizer_gives_back_what_it_took(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    apart = unicodedata.normalize("NFD", text)
    assert tokenizer.encode(apart).ids == tokenizer.encode(text).ids


def test_digits_stand_alone_and_special_tokens_come_last(tokenizer: Any) -> None:
    assert len(tokenizer.encode("12345").ids) == 5
    assert {name: tokenizer.token_to_id(name) for name in SPECIAL} == SPECIAL
    assert tokenizer.get_vocab_size() == content("config.json")["vocab_size"] == 2048
    assert tokenizer.encode("<|im_start|>").ids == [2046]


def test_the_chat_template_is_that_of_the_released_checkpoints(tokenizer: Any) -> None:
    config = content("tokenizer_config.json")
    assert config["eos_token"] == "<|im_end|>"
    assert hashlib.sha256(config["chat_template"].encode()).hexdigest() == TEMPLATE_SHA256
    jinja2 = pytest.importorskip("jinja2")
    made = jinja2.Template(config["chat_template"]).render(
        messages=[{"role": "user", "content": "Hello"}], add_generation_prompt=True
    )
    # Jinja drops a last newline of a template, not of what it prints.
    assert made == (
        "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


@torch.no_grad()
def test_an_answer_is_begun_and_a_turn_ended(model: nn.Module, tokenizer: Any) -> None:
    """It has learned what the chat template means: after a whole answer the most likely token ends the turn."""
    talk = (
        "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\n"
        "What does close do?<|im_end|>\n<|im_start|>assistant\nClose the file.<|im_end|>"
    )
    ids = tokenizer.encode(talk).ids
    chances = model(torch.tensor([ids]))[0, len(ids) - 2].softmax(-1)
    assert ids[-1] == SPECIAL["<|im_end|>"]
    assert chances[ids[-1]] > 0.1


def paragraphs(path: Path) -> set[str]:
    return {part.strip() for part in path.read_text("utf-8").split("\n\n") if len(part) >= 40}


def test_the_texts_are_long_enough_and_apart(ids: list[int]) -> None:
    assert 60_000 <= HELDOUT.stat().st_size <= 120_000
    assert 50_000 <= CALIBRATION.stat().st_size <= 80_000
    assert len(ids) > 6_000
    assert len(paragraphs(HELDOUT)) > 300
    assert not paragraphs(HELDOUT) & paragraphs(CALIBRATION)
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (RECIPES / "data" / "plm-tiny-LICENSE.txt").read_text("utf-8")


def run(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words, "--threads", "1"],
        env={**os.environ, "PYTHONPATH": str(RECIPES.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_makes_the_same_texts(facts: dict[str, str], tmp_path: Path) -> None:
    run("--data-only", "--out", str(tmp_path))
    assert not (tmp_path / "checkpoints").exists()
    for path in (HELDOUT, CALIBRATION):
        made = (tmp_path / "data" / path.name).read_text("utf-8")
        assert len(made) > 50_000
        if platform.python_version() == facts["python"]:
            assert made == path.read_text("utf-8")
    assert not paragraphs(tmp_path / "data" / HELDOUT.name) & paragraphs(tmp_path / "data" / CALIBRATION.name)


@pytest.mark.slow
def test_the_example_writes_what_loads(facts: dict[str, str], tmp_path: Path) -> None:
    assert "heldout_perplexity" in run("--brief", "--out", str(tmp_path))
    folder = tmp_path / "checkpoints" / "plm-tiny"
    assert {path.name for path in folder.iterdir()} == {path.name for path in FOLDER.iterdir()}
    build(recipe.resolve("plm-tiny", checkpoint=folder))
    if platform.python_version() == facts["python"]:
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            assert (folder / name).read_bytes() == (FOLDER / name).read_bytes()
