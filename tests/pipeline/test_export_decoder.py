"""Decoders through the pipeline: what the reference is, what verification sees, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import edgeattn
from edgeattn import targets
from edgeattn.bundle import Bundle
from edgeattn.bundle.runner_generate import Session
from edgeattn.core.errors import CheckFailed, UsageError
from edgeattn.core.numerics import Array, compare
from edgeattn.models.build import build
from edgeattn.models.decoder import Decoder
from edgeattn.pipeline.context import Context, Result
from edgeattn.pipeline.decoding import verify
from edgeattn.pipeline.decoding.samples import Text, golden
from edgeattn.pipeline.export import make_job
from edgeattn.pipeline.job import Job
from edgeattn.pipeline.stages import build as build_stage
from edgeattn.pipeline.stages import capture, lower, reference, reparameterize

SIZES = (
    "vocab_size = 96, hidden_size = 64, num_hidden_layers = 2, num_attention_heads = 2, kv_lora_rank = 32, "
    "qk_nope_head_dim = 16, qk_rope_head_dim = 16, v_head_dim = 16, intermediate_size = 64"
)
RECIPE = f"""
name = "plm-small"
[model]
factory = "edgeattn.models.plm:plm"
args = {{ {SIZES} }}
[inputs.ids]
shape = [1, 16]
dtype = "int64"
low = 0
high = 95
[decoder]
context = 96
prefill = [8, 16]
buckets = [32]
steps = 40
greedy = 8
"""


def recipe(folder: Path, text: str = RECIPE) -> str:
    (folder / "small.toml").write_text(text)
    return str(folder / "small.toml")


def job(folder: Path, target: str = "null", precision: str = "fp32") -> Job:
    return make_job(recipe(folder), target=target, precision=precision)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    """The stages up to lowering, in this process; weights large enough for attention to tell tokens apart."""
    folder = tmp_path_factory.mktemp("decoder")
    made = Context(job(folder), folder, {})
    for name, stage in (
        ("build", build_stage),
        ("reference", reference),
        ("reparameterize", reparameterize),
        ("capture", capture),
    ):
        made.out = folder / name
        made.out.mkdir()
        made.results[name] = Result(made.out, stage.run(made))
        if name == "build":
            with torch.no_grad():
                for parameter in made.values["build"].model.parameters():
                    parameter.mul_(6.0 if parameter.ndim > 1 else 1.0)
    made.results["lint"] = Result(folder, {"findings": []})
    made.out = folder / "lower"
    made.out.mkdir()
    made.results["lower"] = Result(made.out, lower.run(made))
    return made


class Faulty:
    """The null target's runtime, with what it gives changed."""

    def __init__(self, change: Callable[[str, dict[str, Array], dict[str, Array]], dict[str, Array]]) -> None:
        self._change = change
        self.opened_artifact: Any = None

    def open(self, artifact: Any) -> Faulty:
        self._runtime = targets.get("null").open(artifact)
        return self

    def run(self, entry: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return self._change(entry, dict(feeds), self._runtime.run(entry, feeds))

    def steps(self, entry: str) -> list[Any]:
        return self._runtime.steps(entry)

    def trace(self, entry: str, feeds: Mapping[str, Array], wanted: Any = None) -> Any:
        return self._runtime.trace(entry, feeds, wanted)

    def tolerance(self, precision: str) -> float:
        return targets.get("null").tolerance(precision)


def verified(
    context: Context, monkeypatch: pytest.MonkeyPatch, change: Callable[..., dict[str, Array]] | None = None
) -> dict[str, Any]:
    if change:
        monkeypatch.setattr(verify, "targets", SimpleNamespace(get=lambda _: Faulty(change)))
    return verify.run(context)


def test_entries_are_named_after_what_they_take(tmp_path: Path) -> None:
    def named(target: str) -> list[tuple[str, int, int]]:
        return [(s.name, s.tokens, s.cached) for s in job(tmp_path, target).steps]

    assert named("null") == [("decode", 1, 96), ("prefill_8", 8, 96), ("prefill_16", 16, 96)]
    assert named("onnx") == named("null")
    assert all(step.dynamic for step in job(tmp_path, "onnx").steps)
    assert named("tflite")[:3] == [("decode_32", 1, 32), ("decode_96", 1, 96), ("prefill_8_32", 8, 32)]


def test_what_the_reference_keeps(context: Context) -> None:
    text = Text.load(context.results["reference"].folder)
    assert len(text.ids) == 16 + 40 + 1
    assert text.rows["latent_1"].shape == (40, 32)
    samples = golden(text, context.job.steps)
    wanted = [f"{name}-{i:03}" for name in ("decode", "prefill_8", "prefill_16") for i in (0, 1)]
    assert [s.name for s in samples] == wanted
    empty, after = samples[2:4]
    assert empty.feeds["position"] == 0
    assert not empty.feeds["latent_0"].any()
    assert after.feeds["position"] == 24
    assert after.feeds["last"] == 7
    assert after.feeds["latent_0"].shape == (1, 96, 32)
    assert np.array_equal(after.feeds["latent_0"][0, :24], text.rows["latent_0"][:24])
    assert not after.feeds["latent_0"][0, 24:].any()


def test_a_right_artifact_holds(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = verified(context, monkeypatch)
    found = facts["decoder"]
    assert found["greedy"] == {"same": 8, "of": 8}
    assert found["steps"] == 41
    assert found["relative_l2"] < 1e-5
    assert found["top1_agreement"] == 1.0
    assert found["prefill_against_decode"] < 1e-5
    assert found["cache_bytes"] == 2 * 96 * (32 + 16) * 4


def test_rows_that_are_off_are_named_with_their_entry(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(entry: str, feeds: dict[str, Array], outputs: dict[str, Array]) -> dict[str, Array]:
        return outputs | {"new_latent_1": outputs["new_latent_1"] * 1.01} if entry == "prefill_8" else outputs

    with pytest.raises(CheckFailed, match="numbers do not hold") as caught:
        verified(context, monkeypatch, change)
    assert "new_latent_1 of prefill_8-000" in str(caught.value.value)


def test_a_cache_that_is_not_seen_fails_over_the_text(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Golden samples have 24 tokens before them; what comes after those only the text shows."""
    runtime = targets.get("null").open(lower.artifact_of(context.results["lower"], "fp32"))

    def change(entry: str, feeds: dict[str, Array], outputs: dict[str, Array]) -> dict[str, Array]:
        seen = {k: np.where(np.arange(v.shape[1])[:, None] < 30, v, 0) for k, v in feeds.items() if v.ndim == 3}
        return runtime.run(entry, feeds | {k: v.astype(np.float32) for k, v in seen.items()})

    with pytest.raises(CheckFailed) as caught:
        verified(context, monkeypatch, change)
    assert caught.value.where == "held-out text, decoded with the cache"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_far_into_the_text(
    value: float, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a float16 that overflows in a long context; NaN is no more than any bound."""

    def change(entry: str, feeds: dict[str, Array], outputs: dict[str, Array]) -> dict[str, Array]:
        if feeds["position"][0] != 50:
            return outputs
        return outputs | {"logits": np.where(np.arange(96) == 5, np.float32(value), outputs["logits"])}

    with pytest.raises(CheckFailed, match="numbers do not hold") as caught:
        verified(context, monkeypatch, change)
    assert (caught.value.value, "position 50" in str(caught.value.where)) == ("1 of 96 logits are not finite", True)


def test_a_longer_prefill_that_is_not_finite() -> None:
    logits = np.ones((3, 5), np.float32)
    text = Text(np.arange(40), np.array([3, 5, 39]), logits, np.zeros(1), np.zeros(1), np.zeros(()), {})
    one = SimpleNamespace(reset=lambda: None, feed=lambda ids: np.array([1, 1, 1, 1, np.nan], np.float32))
    with pytest.raises(CheckFailed) as caught:
        verify._check_prefill(text, one, 4, text.at, logits, verify._Bounds("w4", 0.3, 1.1))  # type: ignore[arg-type]
    assert "1 values not finite" in str(caught.value.value)


def test_errors_that_grow_from_step_to_step_are_drift() -> None:
    bounds = verify._Bounds("fp32", 1e-5, 1.0005)
    steady = {"perplexity_ratio": 1.0, "perplexity": 1.0, "perplexity_reference": 1.0, "relative_l2": 5e-6}
    parts = [{"relative_l2": 1e-7}] * 4 + [{"relative_l2": 4e-6}] * 4
    with pytest.raises(CheckFailed, match="numbers do not hold") as caught:
        verify._check_text({**steady, "by_position": parts}, bounds)
    assert "grow from step to step" in str(caught.value.why)
    verify._check_text({**steady, "by_position": parts[4:]}, bounds)


def test_perplexity_has_a_bound_of_its_own() -> None:
    bounds = verify._Bounds("w8", 5e-2, verify.PERPLEXITY["w8"])
    measured = {"perplexity_ratio": 1.021, "perplexity": 10.21, "perplexity_reference": 10.0, "relative_l2": 1e-3}
    with pytest.raises(CheckFailed) as caught:
        verify._check_text({**measured, "by_position": [{"relative_l2": 1e-3}]}, bounds)
    assert "1.0210 is more than 1.02" in str(caught.value.why)


def test_measures_of_equal_and_of_flat_logits() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((10, 7)).astype(np.float32)
    text = Text(rng.integers(0, 7, 11), np.arange(10), logits, np.zeros(1), np.zeros(1), np.zeros(()), {})
    same = verify.text_measures(text, np.arange(10), logits)
    assert same["kl"] == 0
    assert same["perplexity_ratio"] == 1
    assert same["top1_agreement"] == 1
    flat = verify.text_measures(text, np.arange(10), np.zeros_like(logits))
    assert flat["perplexity"] == pytest.approx(7)
    entropy = -(np.exp(verify._log_softmax(logits)) * verify._log_softmax(logits)).sum(-1).mean()
    assert flat["kl"] == pytest.approx(np.log(7) - entropy)


def test_another_greedy_continuation_fails_in_float32_alone(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Text.load(context.results["reference"].folder)
    artifact = lower.artifact_of(context.results["lower"], "fp32")
    other = Text(text.ids, text.at, text.logits, text.prompt, (text.greedy + 1) % 96, text.before, text.rows)
    decoder = context.results["reference"].facts["decoder"]
    one = verify.session(targets.get("null").open(artifact), artifact, decoder)
    assert verify._check_greedy(other, one, verify._Bounds("fp16", 5e-3, 1.005)) == 0
    with pytest.raises(CheckFailed, match="numbers do not hold"):
        verify._check_greedy(other, one, verify._Bounds("fp32", 1e-5, 1.0005))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("context = 96", "context = 8192"), "longer than the model's"),
        (("prefill = [8, 16]", "prefill = [16, 8]"), "larger than the one before"),
        (("prefill = [8, 16]", "prefill = []"), "needs at least one size"),
        (("prefill = [8, 16]", "prefill = [128]"), "more than the context"),
        (("steps = 40", "step = 40"), "step"),
    ],
)
def test_a_decoder_section_that_cannot_be(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        edgeattn.export(recipe(tmp_path, RECIPE.replace(*change)), target="null", output=tmp_path)
    error = caught.value
    assert said in f"{error.what} {error.value} {error.where} {error.why} {error.fix}"
    assert not list(tmp_path.glob("*.null.*"))


def test_a_model_without_a_cache_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("from torch import nn\n\ndef net():\n    return nn.Embedding(96, 4)\n")
    text = RECIPE.replace("edgeattn.models.plm:plm", "net.py:net").replace(f"args = {{ {SIZES} }}", "")
    with pytest.raises(UsageError, match="cannot be exported with a cache") as caught:
        edgeattn.export(recipe(tmp_path, text), target="null", output=tmp_path)
    assert "cache_rows" in str(caught.value.why)


def test_a_text_needs_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words")
    text = RECIPE.replace("steps = 40", 'steps = 40\ntext = "text.txt"')
    with pytest.raises(UsageError, match="no tokenizer for the recipe's text"):
        edgeattn.export(recipe(tmp_path, text), target="null", output=tmp_path)


def test_a_damaged_tokenizer_is_named_itself(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "tokenizer.json").write_text("{")
    text = RECIPE.replace("steps = 40", 'steps = 40\ntext = "text.txt"\ntokenizer = "words"')
    with pytest.raises(UsageError, match="tokenizer of the checkpoint cannot be read") as caught:
        edgeattn.export(recipe(tmp_path, text), target="null", output=tmp_path)
    assert Path(str(caught.value.value)) == tmp_path / "words" / "tokenizer.json"
    assert "EOF" in str(caught.value.why)


def test_sparse_positions_are_enough_to_compare_prefill_with_decode() -> None:
    """Of a large vocabulary logits are kept at few positions: here none within a prefill's length of it."""
    logits = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    text = Text(np.arange(40), np.array([3, 20, 39]), logits, np.zeros(1), np.zeros(1), np.zeros(()), {})
    fed: list[int] = []

    def feed(ids: Array) -> Array:
        fed.append(len(ids))
        return logits[1]

    one = SimpleNamespace(reset=lambda: None, feed=feed)
    bounds = verify._Bounds("fp32", 1e-5, 1.0005)
    assert verify._check_prefill(text, one, 4, text.at, logits, bounds) == 0  # type: ignore[arg-type]
    assert fed == [21]


def test_data_of_a_decoder_are_not_quantized(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="data are not quantized"):
        job(tmp_path, "onnx", "w8a8")


def test_an_option_for_caches_needs_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the model has no cache"):
        make_job("fmvit-digits", target="onnx", options={"cache": "float16"})


@pytest.fixture(scope="module")
def tiny(home: Path) -> Bundle:
    """The trained small PLM in float32, by the real pipeline."""
    return edgeattn.export("plm-tiny", output=home / "bundles")


def test_plm_tiny_is_exported_and_verified(tiny: Bundle) -> None:
    found = tiny.manifest.decoding
    assert found is not None
    assert found["steps"] >= 2000
    assert found["greedy"] == {"same": 64, "of": 64}
    assert found["relative_l2"] <= 1e-5
    assert all(part["relative_l2"] <= 1e-5 for part in found["by_position"])
    assert set(tiny.manifest.entries) == {"decode", "prefill_32", "prefill_128"}
    assert {entry.file for entry in tiny.manifest.entries.values()} == {"model.onnx"}
    decoder = tiny.manifest.decoder
    assert decoder is not None
    assert decoder.tokenizer == "tokenizer.json"
    assert decoder.stop
    assert "<|im_start|>" in decoder.chat_template
    assert not decoder.borrowed
    assert json.loads((tiny.path / "tokenizer.json").read_text())["model"]["type"] == "BPE"
    tiny.verify()


@pytest.mark.parametrize("last", [1, 127, 128, 1000, 4095])
def test_decoding_with_the_latent_cache_is_full_recomputation(tiny: Bundle, last: int) -> None:
    """The token at this position, behind a cache of all before it, against the training form over all of them."""
    resolved = edgeattn.recipe.resolve("plm-tiny")
    model = build(resolved).model
    assert isinstance(model, Decoder)
    ids = np.random.default_rng(last).integers(0, model.vocabulary, last + 1)
    logits, rows = model.rows(torch.from_numpy(ids[None]), torch.tensor([last]))
    assert tiny.manifest.decoder is not None
    decoder = tiny.manifest.decoder.model_dump()
    entries = tiny.manifest.model_dump()["entries"]
    one = Session(decoder, entries, lambda entry: lambda feeds: tiny.run(feeds, entry))
    one.feed(ids[:-1])
    assert compare(logits.numpy()[0], one.feed(ids[-1:])).relative_l2 <= 1e-5
    for (name, _), row in zip(model.cache_rows(), rows, strict=True):
        assert compare(row.numpy(), one.rows[name][0, : last + 1]).relative_l2 <= 1e-5
