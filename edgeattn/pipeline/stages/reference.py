"""Reference: golden inputs and what the training-form float32 model makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from edgeattn.capture import own_copies, run_eager
from edgeattn.core.errors import CheckFailed, ConversionFailed, UsageError
from edgeattn.core.numerics import Array
from edgeattn.core.specs import batches
from edgeattn.models.build import Built
from edgeattn.pipeline.context import Context
from edgeattn.pipeline.job import takes_pixels
from edgeattn.recipe import Resolved, preprocessed

#: Golden samples of a model without held-out data.
RANDOM_SAMPLES = 2

#: Batch size for held-out samples: one by one a small model spends its time between operations.
FAST_BATCH = 64


def heldout_samples(resolved: Resolved, shape: tuple[int, ...]) -> tuple[Array, Array | None]:
    """Preprocessed inputs (N, ...) as float32, and labels (N,) where the file has them.

    Raises:
        UsageError: the file is not a .npz with numbers x and class numbers y, or they do not fit the input's shape.
    """
    path = Path(str(resolved.heldout))
    try:
        with np.load(path, allow_pickle=False) as data:
            x, y = data["x"], data["y"] if "y" in data.files else None
    except Exception as error:  # whatever a damaged archive makes NumPy raise
        raise UsageError(
            "the held-out samples cannot be read",
            value=path,
            why=f"{type(error).__name__}: {error}",
            fix="a .npz file with x (N, ...) and, to be scored, y (N,)",
        ) from error
    if x.shape[1:] != shape[1:] or (y is not None and y.shape != x.shape[:1]) or not len(x):
        raise UsageError(
            "the held-out samples do not fit the input",
            value=f"x {x.shape}{'' if y is None else f', y {y.shape}'}",
            where=str(path),
            why=f"the input takes samples of {shape[1:]}",
        )
    real = x.dtype.kind in "fiub" and (x.dtype.kind != "f" or bool(np.isfinite(x).all()))
    if not real or (y is not None and (y.dtype.kind not in "iu" or int(y.min()) < 0)):
        raise UsageError(
            "the held-out samples are not what they should be",
            value=f"x {x.dtype}{'' if y is None else f', y {y.dtype}'}",
            where=str(path),
            why="x must hold finite real numbers, y class numbers from 0",
        )
    return preprocessed(x, resolved.recipe.preprocess), y


def _random_feeds(built: Built, resolved: Resolved, pixels: bool) -> Iterator[dict[str, Tensor]]:
    """Random inputs, of which the first one is an image of random pixels where the artifact takes pixels."""
    for i in range(RANDOM_SAMPLES):
        seed = resolved.recipe.seed + 1000 * (i + 1)
        feed, spec = built.random_inputs(seed), built.specs[0]
        if pixels and len(spec.shape) == 4:
            raw = np.random.Generator(np.random.PCG64(seed)).integers(0, 255, size=spec.shape, endpoint=True)
            feed[spec.name] = torch.from_numpy(preprocessed(raw, resolved.recipe.preprocess))
        yield feed


def _end_feeds(built: Built, resolved: Resolved, heldout: Array | None) -> Iterator[dict[str, Tensor]]:
    """Inputs of the smallest and then of the largest shapes, as far as these are not the opt shapes.

    Held-out samples (N, ...) where only the batch varies, random ones elsewhere: there are no real ones of other sizes.
    """
    ends: tuple[Literal["min", "max"], ...] = ("min", "max")
    for i, end in enumerate(ends):
        specs = [spec.at(end) for spec in built.specs]
        if all(spec.shape == own.shape for spec, own in zip(specs, built.specs, strict=True)):
            continue
        if heldout is not None and specs[0].shape[1:] == heldout.shape[1:]:
            part = heldout[np.arange(specs[0].shape[0]) % len(heldout)]
            yield {specs[0].name: torch.from_numpy(part)}
        else:
            # Seeds that follow on those of ``_random_feeds``.
            yield built.random_inputs(resolved.recipe.seed + 1000 * (RANDOM_SAMPLES + i + 1), end)


def check_logits(logits: Array, labels: Array) -> None:
    """The first output can be scored: finite logits (N, C) with a class for every label.

    Raises:
        UsageError: it is something else.
    """
    fits = logits.dtype.kind == "f" and logits.ndim == 2 and logits.shape[0] >= len(labels)
    if not fits or int(labels.max()) >= logits.shape[1]:
        raise UsageError(
            "the held-out samples cannot be scored",
            value=f"first output {logits.shape} {logits.dtype}, labels up to {labels.max()}",
            where="heldout",
            why="top-1 accuracy needs logits (N, C), and class numbers below C",
            fix="take [heldout] out of the recipe, or make the logits the first output",
        )
    if not np.isfinite(logits).all():
        raise CheckFailed("the model's own output is not finite", where="held-out samples", fix="check the checkpoint")


def _first_nonfinite(model: nn.Module, inputs: dict[str, Tensor]) -> str:
    """Path of the first module whose output holds a NaN or an infinity."""
    found: list[str] = []

    def check(path: str, output: Any) -> None:
        leaves = torch.utils._pytree.tree_leaves(output)
        if not found and any(
            isinstance(t, Tensor) and t.is_floating_point() and not bool(t.isfinite().all()) for t in leaves
        ):
            found.append(path or "(model)")

    handles = [
        m.register_forward_hook(lambda _m, _i, output, path=path: check(path, output))
        for path, m in model.named_modules()
    ]
    try:
        with torch.no_grad():
            model(*own_copies(inputs))
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "(model)"


def _plain(outputs: dict[str, Tensor]) -> None:
    for name, value in outputs.items():
        if value.dtype == torch.bfloat16 or value.is_complex() or value.layout != torch.strided:
            raise ConversionFailed(
                "an output is of a kind that no target takes",
                value=f"{name}: {value.dtype}",
                fix="return float32: call .float() or .real on it in the model",
            )


def _repeats(model: nn.Module, inputs: dict[str, Tensor], outputs: dict[str, Tensor], names: tuple[str, ...]) -> None:
    """A second run gives the same numbers; without that nothing can be compared."""
    again = run_eager(model, inputs, names)
    for name, value in outputs.items():
        if value.is_floating_point() and not torch.allclose(value, again[name], rtol=1e-4, atol=1e-6):
            raise CheckFailed(
                "the model is not deterministic",
                value=name,
                why="two runs on the same input differ, although it is in eval mode",
                fix="look for dropout or random numbers that do not heed self.training",
            )


def _finite(model: nn.Module, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
    for name, value in outputs.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            bad = int((~value.isfinite()).sum())
            raise CheckFailed(
                "the model's own output is not finite",
                value=f"{name}: {bad} of {value.numel()} values",
                where=f"module {_first_nonfinite(model, inputs)} gives the first one",
                why="no export can be compared with NaN or infinity",
                fix="check the checkpoint, the preprocessing and the input range",
            )


def _heldout_logits(built: Built, x: Array, names: tuple[str, ...]) -> Array:
    """First output of the reference for all samples (N, ...), in large batches where the model takes them."""
    name, own = built.specs[0].name, built.specs[0].shape[0]
    for size in (max(own, FAST_BATCH), own):
        try:
            parts = [run_eager(built.model, {name: torch.from_numpy(p)}, names) for p in batches(x, size)]
        except UsageError:
            if size == own:
                raise
            continue  # written for its own batch size only
        return np.concatenate([next(iter(part.values())).numpy() for part in parts])
    raise AssertionError("the last size either returns or raises")


def run(context: Context) -> dict[str, Any]:
    """Write golden/main-NNN.npz (in.NAME, out.NAME), and heldout.npz (logits, y) where there are labelled samples."""
    if context.job.resolved.recipe.decoder:
        from edgeattn.pipeline.decoding import reference

        return reference.run(context)
    built: Built = context.value("build")
    resolved, names = context.job.resolved, context.job.resolved.recipe.outputs
    golden = context.out / "golden"
    golden.mkdir()
    feeds: list[dict[str, Tensor]]
    facts: dict[str, Any] = {"data": "random"}
    y = None
    if resolved.heldout:
        spec = built.specs[0]
        x, y = heldout_samples(resolved, spec.shape)
        parts = list(batches(x, spec.shape[0]))
        count = resolved.recipe.heldout.golden if resolved.recipe.heldout else 1
        feeds = [{spec.name: torch.from_numpy(part)} for part in parts[:count]]
        facts["data"] = "held-out samples"
        if any(axis for axes in context.job.dynamic.values() for axis in axes):
            facts["data"] += ", random inputs at other sizes"
    else:
        feeds = list(_random_feeds(built, resolved, takes_pixels(context.job)))
    if context.job.dynamic:
        # The opt shapes stay first: later stages take the first sample as an example. The largest come last.
        ends = _end_feeds(built, resolved, x if resolved.heldout else None)
        feeds = [*(feeds if resolved.heldout else feeds[:1]), *ends]
    outputs: dict[str, Tensor] = {}
    for i, feed in enumerate(feeds):
        outputs = run_eager(built.model, feed, names)
        _plain(outputs)
        _finite(built.model, feed, outputs)
        if i == 0:
            _repeats(built.model, feed, outputs, names)
        arrays = {f"in.{k}": v.numpy() for k, v in feed.items()} | {f"out.{k}": v.numpy() for k, v in outputs.items()}
        np.savez(golden / f"main-{i:03}.npz", **arrays)  # type: ignore[arg-type]
    facts["outputs"] = list(outputs)
    if y is not None:
        context.say(f"reference on {len(x)} held-out samples")
        logits = _heldout_logits(built, x, names)
        check_logits(logits, y)
        logits = logits[: len(y)]
        np.savez(context.out / "heldout.npz", x=x, y=y, logits=logits)
        facts["heldout"] = {"samples": len(y), "correct": int((logits.argmax(-1) == y).sum())}
    return facts
