"""What the tests of the gguf target share: a tokenizer, a model, and its program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from edgeattn.capture import Program
from edgeattn.capture.decoder import caches_of, capture_decoder
from edgeattn.core.specs import StepShape
from edgeattn.models.plm import PLM
from tests.targets.gguf.small import QWEN2, ROOT, deploy, random_plm


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A small tokenizer of Qwen2's kind, in a folder as checkpoints have it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    one = Tokenizer(models.BPE())
    one.normalizer = normalizers.NFC()
    one.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    one.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    one.train_from_iterator([(ROOT / "README.md").read_text()], trainer)
    one.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


STEPS = (StepShape("decode", 1, 64, True), StepShape("prefill_16", 16, 64, True))


@pytest.fixture(scope="module")
def model() -> PLM:
    return deploy(random_plm())


@pytest.fixture(scope="module")
def program(model) -> Program:
    return capture_decoder(model, caches_of(model, 64), STEPS)
