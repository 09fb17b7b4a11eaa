"""Reference of a decoder: what the training form makes of a held-out text, every position computed anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeattn.bundle.decoding import error_of
from edgeattn.bundle.runner_text import Refused, open_tokenizer
from edgeattn.core.errors import CheckFailed, ToolchainMissing, UsageError
from edgeattn.core.numerics import Array
from edgeattn.core.specs import LOGITS, new_name
from edgeattn.models.build import Built
from edgeattn.models.decoder import Decoder
from edgeattn.pipeline.context import Context
from edgeattn.pipeline.decoding.tokenizer import FILE
from edgeattn.recipe import DecoderSpec, Resolved

#: Logits are kept of so many numbers at most (float32); of a large vocabulary not at every position.
KEPT = 32_000_000
#: Tokens before a golden sample that has something in its cache.
BEFORE = 64
#: Tokens before the greedy continuation begins.
PROMPT = 32


def _tokenizer(path: Path) -> Any:
    """The tokenizer of a checkpoint; raises as ``read_text`` does."""
    try:
        return open_tokenizer(str(path))
    except Refused as refused:
        if refused.code == ToolchainMissing.exit_code:
            raise error_of(refused, "decoder.text") from refused
        raise UsageError(
            "the tokenizer of the checkpoint cannot be read", value=path, why=refused.why, fix="copy it again"
        ) from refused


def read_text(resolved: Resolved, vocabulary: int) -> tuple[Array | None, str]:
    """Token numbers of the recipe's held-out text, and what they are in words; None where there is no text.

    Raises:
        UsageError: the text cannot be read, or its tokens are not the model's. ToolchainMissing: no tokenizers.
    """
    if resolved.text is None:
        return None, "random tokens"
    if resolved.tokenizer is None:
        raise UsageError(
            "there is no tokenizer for the recipe's text",
            value=resolved.text,
            where="decoder.text",
            why="the checkpoint is no folder with a tokenizer.json, and the recipe names none",
            fix="give the checkpoint's folder, or write tokenizer = FOLDER into [decoder]",
        )
    try:
        text = Path(resolved.text).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError("the text of the recipe cannot be read", value=resolved.text, why=str(error)) from error
    encoded = _tokenizer(Path(resolved.tokenizer, FILE)).encode(text, add_special_tokens=False)
    ids = np.array(encoded.ids, np.int64)
    if ids.size and ids.max() >= vocabulary:
        raise UsageError(
            "the tokenizer has more tokens than the model",
            value=f"token {ids.max()}, vocabulary {vocabulary}",
            where=resolved.tokenizer,
            fix="give the checkpoint's own folder: its tokenizer.json lies beside its weights",
        )
    return ids, "held-out text"


def check_decoder(model: nn.Module, spec: DecoderSpec) -> Decoder:
    """The model as a decoder.

    Raises:
        UsageError: it is none, or its context is smaller than the recipe's.
    """
    if not isinstance(model, Decoder):
        raise UsageError(
            "the model cannot be exported with a cache",
            value=type(model).__name__,
            where="decoder",
            why="it has no context, vocabulary, cache_rows(), rows() and step() (edgeattn.models.decoder.Decoder)",
            fix="take [decoder] out of the recipe, and it is exported as one forward over all positions",
        )
    if spec.context > model.context:
        raise UsageError(
            "the recipe's context is longer than the model's",
            value=spec.context,
            where="decoder.context",
            why=f"the model was made for {model.context} positions",
        )
    return model


def _positions(count: int, begin: int, vocabulary: int, needed: set[int]) -> Array:
    """Positions whose logits are kept: those needed, and of the others evenly as many as ``KEPT`` allows."""
    room = max(16, KEPT // vocabulary - len(needed))
    evenly = np.linspace(begin, count - 1, min(room, count - begin)).round().astype(np.int64)
    return np.array(sorted({*map(int, evenly), *needed}), np.int64)


def _greedy(context: Context, model: Decoder, prompt: Array, count: int) -> Array:
    """The ``count`` tokens that follow a prompt, the most likely each time."""
    ids = torch.from_numpy(prompt[None].copy())
    for i in range(count):
        if i % 16 == 0:
            context.say(f"reference: greedy continuation, token {i} of {count}")
        logits, _ = model.rows(ids, torch.tensor([ids.shape[1] - 1]))
        ids = torch.cat([ids, logits.argmax(-1)[None]], dim=1)
    return ids[0, len(prompt) :].numpy()


def run(context: Context) -> dict[str, Any]:
    """Write text.npz: ``ids`` (T,), ``at`` and ``logits`` (M, V), rows (K, width) by name, ``greedy``; facts about it.

    Raises:
        UsageError: see ``check_decoder`` and ``read_text``. CheckFailed: the model gives numbers that are not finite.
    """
    built: Built = context.value("build")
    resolved = context.job.resolved
    spec = resolved.recipe.decoder
    assert spec is not None
    model = check_decoder(built.model, spec)
    ids, data = read_text(resolved, model.vocabulary)
    longest = min(spec.prefill[-1], spec.context // 2)
    wanted = min(spec.context, longest + spec.steps + 1)
    if ids is None:
        ids = np.random.Generator(np.random.PCG64(resolved.recipe.seed)).integers(0, model.vocabulary, wanted)
    if len(ids) < min(wanted, 2 * longest):
        raise UsageError(
            "the held-out text is too short",
            value=f"{len(ids)} tokens",
            where="decoder.text",
            why=f"it takes {2 * longest} at least: a prefill, and as many tokens decoded after it",
        )
    ids = ids[:wanted]
    before = min(BEFORE, spec.context // 4)
    kept = min(len(ids), spec.prefill[-1] + before)
    # The ends of the golden samples: see ``samples.golden``.
    ends = {start + n - 1 for start in (0, before) for n in (1, *spec.prefill)}
    at = _positions(len(ids), longest - 1, model.vocabulary, {i for i in ends if i < len(ids)})
    context.say(f"reference on {len(ids)} tokens of {data}")
    with torch.no_grad():
        logits, rows = model.rows(torch.from_numpy(ids[None].copy()), torch.from_numpy(at))
        if not bool(logits.isfinite().all()):
            raise CheckFailed(
                "the model's own output is not finite", where=data, why="no export can be compared with NaN or infinity"
            )
        prompt = ids[: min(PROMPT, spec.context - spec.greedy)]
        greedy = _greedy(context, model, prompt, spec.greedy)
    names = [name for name, _ in model.cache_rows()]
    arrays: dict[str, Any] = {name: row[:kept].numpy() for name, row in zip(names, rows, strict=True)}
    own = {"ids": ids, "at": at, "logits": logits.numpy(), "prompt": prompt, "greedy": greedy, "before": before}
    np.savez(context.out / "text.npz", **(own | arrays))
    return {
        "data": data,
        "outputs": [LOGITS, *map(new_name, names)],
        "text": {"tokens": len(ids), "compared": len(at)},
        "decoder": {
            "context": spec.context,
            "vocabulary": model.vocabulary,
            "cache": [{"name": name, "width": width} for name, width in model.cache_rows()],
        },
    }
