"""A decoder as one stateful package: its numbers step by step, where they are kept, and what is stored once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeattn import device as devices
from edgeattn.bundle.runner_generate import Session
from edgeattn.capture import Program
from edgeattn.capture.decoder import caches_of, capture_decoder
from edgeattn.core.errors import CheckFailed, ConversionFailed, UsageError
from edgeattn.core.numerics import Array, compare
from edgeattn.core.specs import IDS, LAST, LOGITS, POSITION, StepShape, new_name
from edgeattn.models.decoder import as_step
from edgeattn.models.layers.mla import AbsorbedAttention, LatentAttention
from edgeattn.models.plm import PLM, plm
from edgeattn.quant.plan import QuantPlan
from edgeattn.targets.base import Artifact, LowerPlan
from edgeattn.targets.coreml import CoreMLTarget
from edgeattn.targets.coreml.facts import operations
from edgeattn.targets.coreml.mil.package import Package, open_package
from edgeattn.targets.coreml.mil.program import Function
from edgeattn.targets.coreml.mil.values import DTYPES, type_of
from edgeattn.targets.coreml.runtime import MilRuntime
from tests.targets.coreml.lowering import METADATA

CONTEXT, PREFILL, VOCABULARY = 64, 16, 96
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "intermediate_size": 128,
    "max_position_embeddings": 128,
}
ROWS = ("latent_0", "rope_0", "latent_1", "rope_1")
#: Of logits of random weights, which amplify rounding.
TOLERANCES = {"fp16": 5e-3, "w8": 5e-2, "w4": 0.4}
#: Bytes of a number, its share of a scale included.
BYTES = {"fp16": 2.0, "w8": 1.1, "w4": 0.6}


def absorbed(model: PLM) -> PLM:
    """The deploy form."""
    for layer in model.model.layers:
        attention: Any = layer.self_attn
        assert isinstance(attention.kv_b_proj, LatentAttention)
        attention.kv_b_proj = AbsorbedAttention(attention.kv_b_proj)
    return model.eval()


def captured(model: PLM, *shapes: StepShape, context: int = CONTEXT) -> Program:
    shapes = shapes or (StepShape("decode", 1, context), StepShape(f"prefill_{PREFILL}", PREFILL, context))
    return capture_decoder(model, caches_of(model, context), shapes)


def plan_of(precision: str) -> LowerPlan:
    target = CoreMLTarget()
    options = target.settle_decoder(target.settle({}, None, precision), {}, None, precision)
    return LowerPlan(precision, [], METADATA, options=options, quant=QuantPlan(precision))


@dataclass
class Made:
    """A model in its deploy form, and what it was lowered to."""

    model: PLM
    artifact: Artifact
    precision: str

    @property
    def package(self) -> Package:
        return open_package(self.artifact.folder / "model.mlpackage")

    def session(self, runtime: MilRuntime) -> Session:
        entries = {
            name: {
                "inputs": [vars(t) for t in entry.inputs],
                "outputs": [vars(t) for t in entry.outputs],
            }
            for name, entry in self.artifact.entries.items()
        }
        cache = [{"name": name, "width": width} for name, width in self.model.cache_rows()]
        return Session({"context": CONTEXT, "cache": cache}, entries, runtime.opened)


@pytest.fixture(scope="module")
def model() -> PLM:
    torch.manual_seed(0)
    return absorbed(plm(**SIZES))


@pytest.fixture(scope="module")
def program(model: PLM) -> Program:
    return captured(model)


@pytest.fixture(
    scope="module", params=["fp16", pytest.param("w8", marks=pytest.mark.slow), "w4"], ids=lambda name: str(name)
)
def made(request: pytest.FixtureRequest, model: PLM, program: Program, tmp_path_factory: Any) -> Made:
    out = tmp_path_factory.mktemp(f"decoder_{request.param}")
    return Made(model, CoreMLTarget().lower(program, plan_of(request.param), out), request.param)


class Functional:
    """The model's own steps in PyTorch, behind a cache of zeros that is kept here."""

    def __init__(self, model: PLM) -> None:
        self.model, self.position = model, 0
        self.cache = [torch.zeros(1, CONTEXT, width) for _, width in model.cache_rows()]

    def feed(self, ids: Array) -> Array:
        step, position = as_step(self.model, False), torch.tensor([self.position])
        with torch.no_grad():
            logits, *rows = step(torch.from_numpy(ids[None]), position, *self.cache)
        for held, new in zip(self.cache, rows, strict=True):
            held[:, self.position : self.position + len(ids)] = new
        self.position += len(ids)
        return logits[0].numpy()


def test_steps_agree_with_the_models_own(made: Made) -> None:
    """A prefill with padding, 30 tokens one by one, a prefill behind them, and again one by one up to the last."""
    ids = np.random.default_rng(1).integers(0, VOCABULARY, CONTEXT)
    session, functional = made.session(MilRuntime(made.artifact)), Functional(made.model)
    counts = [11, *[1] * 30, 13, *[1] * 10]
    assert sum(counts) == CONTEXT
    begin, worst = 0, 0.0
    for count in counts:
        part = ids[begin : begin + count]
        worst = max(worst, compare(functional.feed(part), session.feed(part)).relative_l2)
        begin += count
    assert worst <= TOLERANCES[made.precision]
    assert session.position == CONTEXT


def test_what_a_step_gives_does_not_depend_on_how_the_cache_was_filled(made: Made) -> None:
    """One run on states filled from arrays gives what a run behind 21 others does, rows included: not a bit is lost."""
    ids = np.random.default_rng(2).integers(0, VOCABULARY, 24)
    runtime = MilRuntime(made.artifact)
    session = made.session(runtime)
    for token in ids[:20]:
        session.feed(np.array([token]))
    states = runtime._states
    assert states is not None
    held = {name: states.read_state(name) for name in ROWS}
    logits = session.feed(ids[20:21])
    feeds = {IDS: ids[None, 20:21].astype(np.int32), POSITION: np.array([20], np.int32)}
    again = runtime.run("decode", feeds | {name: rows.astype(np.float32) for name, rows in held.items()})
    np.testing.assert_array_equal(again[LOGITS][0], logits)
    for name in ROWS:
        after = states.read_state(name)
        np.testing.assert_array_equal(again[new_name(name)], after[:, 20:21])
        np.testing.assert_array_equal(np.delete(after, 20, axis=1), np.delete(held[name], 20, axis=1))
        assert np.abs(after[:, 20]).sum() > 0


def test_padding_is_written_and_never_seen(made: Made) -> None:
    ids = np.random.default_rng(3).integers(0, VOCABULARY, PREFILL)
    results = []
    for padding in (0, 7):
        runtime = MilRuntime(made.artifact)
        prefill, decode = runtime.opened(f"prefill_{PREFILL}"), runtime.opened("decode")
        padded = np.where(np.arange(PREFILL) < 9, ids, padding).astype(np.int32)[None]
        logits = prefill({IDS: padded, POSITION: np.zeros(1, np.int32), LAST: np.array([8], np.int32)})[LOGITS]
        assert runtime._states is not None
        assert np.abs(runtime._states.read_state("latent_0")[0, 9:PREFILL]).sum() > 0
        after = [
            decode({IDS: np.array([[token]], np.int32), POSITION: np.array([9 + i], np.int32)})[LOGITS]
            for i, token in enumerate((4, 5, 6))
        ]
        results.append([logits, *after])
    np.testing.assert_array_equal(*results)


def test_the_cache_is_states_that_all_functions_share(made: Made) -> None:
    package = made.package
    assert package.functions == ("decode", f"prefill_{PREFILL}")  # the default one first
    wanted = [(name, (1, CONTEXT, 32), "float16") for name in ROWS]
    for name in package.functions:
        function = Function(package, name)
        assert [(s.name, s.shape, s.dtype) for s in function.states] == wanted
        fed = [(i.name, i.shape, i.dtype) for i in function.inputs]
        tokens = 1 if name == "decode" else PREFILL
        last = [] if name == "decode" else [(LAST, (1,), "int32")]
        assert fed == [(IDS, (1, tokens), "int32"), (POSITION, (1,), "int32"), *last]
        assert [(o.name, o.shape, o.dtype) for o in function.outputs] == [(LOGITS, (1, VOCABULARY), "float32")]
        entry = made.artifact.entries[name]
        assert (entry.file, [(t.name, t.shape, t.dtype) for t in entry.inputs]) == ("model.mlpackage", fed)
    assert made.artifact.facts["states"] == {name: [1, CONTEXT, 32] for name in ROWS}


def _numbers(value_type: Any) -> int:
    return int(np.prod(type_of(value_type)[1] or ()))


def test_new_rows_are_written_as_a_slice_and_nothing_else_is_as_large_as_the_cache(made: Made) -> None:
    package = made.package
    for name in package.functions:
        tokens = 1 if name == "decode" else PREFILL
        made_by = {o.name: item for item in operations(package, True, name) for o in item.outputs}
        written = {}
        for item in operations(package, name=name):
            if item.type == "write_state":
                update = made_by[item.inputs["data"].arguments[0].name]
                named = {key: made_by[update.inputs[key].arguments[0].name] for key in ("x", "update", "begin", "end")}
                assert update.type == "slice_update"
                assert (named["x"].type, named["begin"].type, named["end"].type) == ("read_state", "concat", "concat")
                assert type_of(named["update"].outputs[0].type)[1] == (1, tokens, 32)
                state = item.inputs["input"].arguments[0].name
                assert named["x"].inputs["input"].arguments[0].name == state
                assert named["begin"].inputs["values"].arguments[1].name == POSITION
                written[state] = item
            elif item.type not in ("read_state", "slice_update", "squeeze"):
                float_sizes = [_numbers(o.type) for o in item.outputs if DTYPES[o.type.tensorType.dataType] == "fp16"]
                # Scores and masks are (H * T, S); only a row of the cache for each position is as large as this.
                limit = CONTEXT * 32 if tokens == 1 else CONTEXT * 32 * 2
                constant = item.type.startswith("constexpr") or all(n < limit for n in float_sizes)
                assert constant, (name, item.type, float_sizes)
        assert list(written) == list(ROWS)
        kinds = [item.type for item in operations(package, name=name)]
        assert "one_hot" not in kinds
        assert not [kind for kind in kinds if kind.startswith("scatter")]
        # Everything has read the cache before any of it is written: it can be written in place.
        writes = [i for i, kind in enumerate(kinds) if kind == "write_state"]
        reads = [i for i, kind in enumerate(kinds) if kind in ("read_state", "matmul", "linear")]
        assert max(reads) < min(writes)


def test_functions_share_their_weights(made: Made) -> None:
    numbers = sum(p.numel() for p in made.model.parameters())
    # Angles stay in float16. A prefill expands its new tokens with the same numbers laid out otherwise: stored again.
    angles = 2 * 2 * SIZES["max_position_embeddings"] * 16
    again = sum(p.numel() for n, p in made.model.named_parameters() if n.rpartition(".")[2] in ("up_k", "up_v"))
    (weights,) = made.package.root.rglob("*.bin")
    assert weights.stat().st_size <= BYTES[made.precision] * (numbers + again) + angles + 8192
    assert {facts["weight_bytes"] for facts in made.artifact.facts["entries"].values()} == {weights.stat().st_size}


def test_every_weight_is_quantized_and_no_table(made: Made) -> None:
    if made.precision == "fp16":
        assert "quantized" not in made.artifact.facts["entries"]["decode"]
        return
    words = {"w8": "int8, by channel", "w4": "int4, blocks of 32"}[made.precision]
    for name, facts in made.artifact.facts["entries"].items():
        found = facts["quantized"]["operations"]
        assert {use["weights"] for use in found} == {words}
        layers = range(SIZES["num_hidden_layers"])
        kinds = ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
        modules = {f"layers.{i}.self_attn.{kind}" for i in layers for kind in kinds}
        modules |= {f"layers.{i}.mlp.{kind}" for i in layers for kind in ("up_proj", "down_proj")}
        # The embedding is looked up and multiplied with: one weight.
        assert {use["module"] for use in found} == {f"model.{path}" for path in (*modules, "embed_tokens")}
        assert sorted(use["op"] for use in found if use["module"].endswith("embed_tokens")) == ["gather", "linear"]
        absorbed = [use["op"] for use in found if use["module"].endswith("kv_b_proj")]
        assert absorbed.count("matmul") == 4
        assert absorbed.count("linear") == (0 if name == "decode" else 4)
        left = facts["quantized"]["left_in_floats"]
        assert [use["op"] for use in left] == ["gather", "gather"]
        assert all("angles" in use["why"] for use in left)
    consts = [item for item in operations(made.package, name="decode") if item.type.startswith("constexpr")]
    embedding = [item for item in consts if type_of(item.outputs[0].type)[1] == (VOCABULARY, 64)]
    assert len(embedding) == 1


def test_values_name_their_modules_by_function(made: Made) -> None:
    package = made.package
    known = {name: set(package.modules_in(name).values()) for name in package.functions}
    assert all(any(path.endswith("layers.1.mlp.up_proj") for path in paths) for paths in known.values())
    runtime = MilRuntime(made.artifact)
    assert any(step.module.endswith("layers.1.self_attn.kv_b_proj") for step in runtime.steps("decode"))
    feeds = {IDS: np.array([[3]], np.int32), POSITION: np.array([0], np.int32)}
    zeros = {name: np.zeros((1, CONTEXT, 32), np.float32) for name in ROWS}
    traced = {item.name for item in runtime.trace("decode", feeds | zeros)}
    assert {LOGITS, *map(new_name, ROWS)} <= traced


def test_a_new_sequence_begins_with_zeros(made: Made) -> None:
    runtime = MilRuntime(made.artifact)
    session = made.session(runtime)
    first = [session.feed(np.array([token])) for token in (1, 2, 3)]
    session.reset()
    np.testing.assert_array_equal([session.feed(np.array([token])) for token in (1, 2, 3)], first)
    assert session.cache_bytes == 0  # the states are the runtime's
    session.reset()
    assert runtime._states is not None
    assert not any(runtime._states.read_state(name).any() for name in ROWS)


def test_rows_that_do_not_fit_are_an_error(made: Made) -> None:
    """A device promises nothing for them; whoever runs a prefill sees to it that they fit."""
    prefill = MilRuntime(made.artifact).opened(f"prefill_{PREFILL}")
    begin = CONTEXT - PREFILL
    feeds = {IDS: np.zeros((1, PREFILL), np.int32), LAST: np.array([0], np.int32)}
    prefill(feeds | {POSITION: np.array([begin], np.int32)})
    with pytest.raises(CheckFailed, match="cannot be computed") as caught:
        prefill(feeds | {POSITION: np.array([begin + 1], np.int32)})
    assert caught.value.value == "slice_update"


# What a decoder cannot have.


@pytest.fixture
def target() -> CoreMLTarget:
    return CoreMLTarget()


@pytest.mark.parametrize(
    ("precision", "options", "why"),
    [
        ("fp32", {}, "float16 alone"),
        ("fp16", {"image": "rgb"}, "image=rgb"),
        ("fp16", {"classifier": "yes"}, "classifier=yes"),
        ("w8", {"deployment": "iOS17"}, "begins with iOS18"),
    ],
)
def test_what_a_decoder_cannot_be(target: CoreMLTarget, precision: str, options: dict[str, str], why: str) -> None:
    with pytest.raises(UsageError) as caught:
        target.settle_decoder(target.settle(options, None, precision), options, None, precision)
    assert why in str(caught.value)


def test_it_is_made_for_the_first_system_with_states(target: CoreMLTarget) -> None:
    for precision in ("fp16", "w8", "w4"):
        settled = target.settle_decoder(target.settle({}, None, precision), {}, None, precision)
        assert settled["deployment"] == "iOS18"
    new = devices.resolve("iphone-16-pro")
    assert target.settle_decoder(target.settle({}, new, "fp16"), {}, new, "fp16")["deployment"] == "iOS18"
    old = new.model_copy(update={"deployment_target": "iOS17"})
    with pytest.raises(UsageError, match="newer system"):
        target.settle_decoder(target.settle({}, old, "fp16"), {}, old, "fp16")


def test_what_of_a_decoder_is_not_proven(target: CoreMLTarget) -> None:
    plain, more = (target.unproven_of(target.settle({}, None), decoder) for decoder in (False, True))
    assert plain == target.unproven
    assert more.startswith(plain)
    assert "share one state" in more


def test_caches_of_several_lengths_cannot_share_a_state(model: PLM, target: CoreMLTarget, tmp_path: Path) -> None:
    made = captured(model, StepShape("decode_32", 1, 32), StepShape("decode_64", 1, 64))
    with pytest.raises(ConversionFailed, match="share a state") as caught:
        target.lower(made, plan_of("fp16"), tmp_path)
    assert caught.value.where == "entry decode_32"


def test_a_context_off_the_neural_engines_step_is_said(model: PLM, target: CoreMLTarget) -> None:
    odd = captured(model, StepShape("decode", 1, 72), context=72)
    (found,) = [finding for finding in target.lint(odd, None) if finding.rule == "state-32"]
    assert "latent_0 (1, 72, 32)" in found.detail
    assert not [finding for finding in target.lint(captured(model), None) if finding.rule == "state-32"]
