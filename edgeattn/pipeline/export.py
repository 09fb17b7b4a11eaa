"""Export: run the plan, put the bundle together."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeattn import device as devices
from edgeattn import recipe as recipes
from edgeattn import targets
from edgeattn.bundle import Bundle
from edgeattn.core import schema
from edgeattn.core.errors import EdgeAttnError, ToolchainMissing, UsageError
from edgeattn.core.files import check_writable
from edgeattn.core.numerics import TOLERANCES
from edgeattn.core.specs import TensorSpec
from edgeattn.pipeline.advice import advise
from edgeattn.pipeline.cache import Cache
from edgeattn.pipeline.job import Job
from edgeattn.pipeline.pack import pack
from edgeattn.pipeline.plan import bundle_key, check_choice, joined_key, sources_key
from edgeattn.pipeline.rivals import choose
from edgeattn.pipeline.run import Finished, Progress, Silent, run_plan
from edgeattn.quant.plan import BITS
from edgeattn.targets.base import NCHW, Target


@dataclass(frozen=True)
class Exported:
    """A bundle and how it came about.

    Attributes:
        runs: the stages' results, for each target whose artifact is in the bundle.
        unchanged: the same bundle was there already, whole, and was kept.
    """

    bundle: Bundle
    runs: Mapping[str, Finished]
    unchanged: bool

    @property
    def seconds(self) -> float:
        """Wall time of all stages."""
        return sum(run.seconds for run in self.runs.values())


def _check_quantizes(precision: str, **asked: Any) -> None:
    """Raises UsageError where something is asked for that only a quantized export has."""
    given = [f"--{name}" for name, value in asked.items() if value]
    if given and precision not in BITS:
        raise UsageError(
            "nothing is quantized",
            value=", ".join(given),
            where=f"--precision {precision}",
            fix=f"--precision {', '.join(BITS)}; or leave it away",
        )


def _calibration(source: str | None, samples: int | None) -> recipes.CalibrationSpec | None:
    if source is None:
        return None
    fields = {"source": source} | ({} if samples is None else {"samples": samples})
    return schema.validate(recipes.CalibrationSpec, fields, "the command line")


def _check_decoder(resolved: recipes.Resolved, target: Target, precision: str, options: Mapping[str, str]) -> None:
    """Raises UsageError where a recipe wants a cache, and the target has no form for it; or an option needs one."""
    if resolved.recipe.decoder is None:
        if "cache" in options:
            raise UsageError("the model has no cache", value=f"--option cache={options['cache']}", fix="leave it away")
        return
    cached = [name for name in targets.names() if targets.get(name).cache]
    parts = [targets.get(part) for part in target.parts] or [target]
    if any(not part.cache for part in parts):
        raise UsageError(
            "the target has no form for a decoder with a cache",
            value=target.name,
            where=f"recipe {resolved.recipe.name}, decoder",
            fix=f"--target {', '.join(cached)}",
        )
    if BITS.get(precision, (32, 32))[1] < 32:
        raise UsageError(
            "a decoder's data are not quantized",
            value=f"--precision {precision}",
            why="a cache of rounded rows would need ranges of its own; weights are what decoding reads",
            fix="--precision w8 or w4",
        )


def make_job(
    model: str,
    *,
    target: str | None = None,
    precision: str = "fp32",
    device: str | None = None,
    layout: str = NCHW,
    options: Mapping[str, str] | None = None,
    strict: bool = False,
    inputs: Sequence[str | TensorSpec] = (),
    checkpoint: str | Path | None = None,
    args: Mapping[str, Any] | None = None,
    calibration: str | None = None,
    samples: int | None = None,
    keep: Sequence[str] = (),
    check_tools: bool = True,
) -> Job:
    """Resolve names to a job; everything that can be wrong without running anything is said here.

    Args:
        target: the device's best where none is given, else ``onnx``.
        calibration: source of calibration samples in place of the recipe's. samples: how many of them.
        keep: modules that stay in floats.
        check_tools: refuse a target whose toolchain is missing; a plan may be looked at without it.

    Raises:
        UsageError: unknown recipe, target, device or precision, unreadable files. ToolchainMissing: names the line
            that installs it.
    """
    if not isinstance(model, str):
        raise UsageError(
            "a model is given by name",
            value=type(model).__name__,
            why="stages run in a process of their own, which has to build the model itself",
            fix="pass 'package.module:factory' or 'file.py:factory' instead of the module",
        )
    _check_quantizes(precision, calibration=calibration, samples=samples, keep=keep)
    resolved = recipes.resolve(
        model,
        inputs=inputs,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        args=args,
        calibration=_calibration(calibration, samples),
        keep=keep,
    )
    if samples is not None and calibration is None:
        resolved = recipes.with_samples(resolved, samples)
    place = devices.resolve(device) if device else None
    target = target or (place.targets[0] if place else "onnx")
    chosen = targets.get(target)
    check_choice(chosen, precision, layout, place, tuple(TOLERANCES))
    if strict and not chosen.keeps_wider:
        raise UsageError(
            "there is nothing to be strict about",
            value="--strict",
            where=f"target {target}",
            why="it keeps no operations in a wider precision than the one asked for by its own choice",
            fix="leave it away",
        )
    _check_decoder(resolved, chosen, precision, options or {})
    availability = chosen.availability()
    if check_tools and not availability.found:
        raise ToolchainMissing(f"target {target} cannot be used here", why=availability.detail, fix=availability.fix)
    asked = dict(options or {})
    settled = chosen.settle(asked, place, precision)
    if resolved.recipe.decoder is not None:
        chosen.settle_decoder(settled, asked, place, precision)
    # Without the precision: one that the device is too old for is refused unless something is asked for.
    plain = chosen.settle({}, place)
    options = {name: choice for name, choice in asked.items() if settled[name] != plain[name]}
    return Job(resolved, target, precision, device, layout, options, strict)


def _keep_standing(final: Path, key: str, force: bool) -> Bundle | None:
    """The bundle at ``final`` if it is whole and was made from the same key; None if there is nothing to keep.

    Raises:
        UsageError: something else stands there.
    """
    if force or not (final.exists() or final.is_symlink()):
        return None
    try:
        bundle = Bundle.open(final)
        bundle.check_files()
        if bundle.manifest.key == key:
            return bundle
        why = "it was made from another recipe, checkpoint, code or tool version"
    except EdgeAttnError as error:
        why = f"it is not a whole bundle: {error.what}"
    raise UsageError(
        "the output exists already",
        value=final,
        why=f"{why}; it was kept",
        fix="pass --force to replace it, or choose another folder with --output",
    )


def export_job(job: Job, output: Path, *, force: bool = False, progress: Progress | None = None) -> Exported:
    """Run a job and write its bundle to ``output / job.title``.

    Raises:
        UsageError: something else stands there and ``force`` is not set (it is kept), or it cannot be written.
        CheckFailed, ToolchainMissing, ConversionFailed: from the stages; no bundle is written then.
    """
    final = output / job.title
    cache = Cache.default()
    progress = progress or Silent()
    check_writable(output)
    # Looked at before anything runs, if the key can be known by then: a long export must not end in a refusal.
    if cache.sources(sources_key(job)) is not None:
        _keep_standing(final, bundle_key(job, cache), force)
    runs = {part.target: run_plan(part, cache, progress) for part in job.parts}
    # As they were when the stages ran: a file that was changed since is the next export's.
    key = joined_key(job, [runs[part.target].keys["bundle"] for part in job.parts])
    standing = _keep_standing(final, key, force)
    if standing is not None:
        return Exported(standing, runs, True)
    for part in job.parts:
        runs[part.target] = replace(runs[part.target], advice=tuple(advise(part, runs[part.target], cache, progress)))
    order, choice = list(runs), None
    if len(runs) > 1:
        with tempfile.TemporaryDirectory() as folder:
            choice = choose(pack(job, runs, order, key, None, Path(folder) / job.title), job.device, progress)
        order = choice["order"]
    return Exported(pack(job, runs, order, key, choice, final, replace=force), runs, False)


def export(
    model: str,
    target: str | None = None,
    precision: str = "fp32",
    output: str | Path = ".",
    *,
    device: str | None = None,
    layout: str = NCHW,
    options: Mapping[str, str] | None = None,
    strict: bool = False,
    inputs: Sequence[str | TensorSpec] = (),
    checkpoint: str | Path | None = None,
    args: Mapping[str, Any] | None = None,
    calibration: str | None = None,
    samples: int | None = None,
    keep: Sequence[str] = (),
    force: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Export a model and prove the numbers; the words are those of ``edgeattn export``.

    Args:
        model: a recipe's name or file, ``package.module:factory``, ``file.py:factory`` or ``timm:NAME``.
        target: the device's best where none is given, else ``onnx``.
        output: folder that the bundle's folder is made in.
        layout: of image inputs, ``nchw`` as in PyTorch or ``nhwc`` where the target takes it.
        options: of the target, see ``edgeattn targets``.
        strict: refuse to keep operations in a wider precision than the one asked for.
        inputs: ``x=1x3x224x224`` texts or ``TensorSpec`` objects.
        calibration: a folder of images, a .npy or .npz file or ``package.module:function``, for precisions that
            quantize. samples: how many of them at most. keep: modules that stay in floats, as dotted paths or globs.
        force: replace what stands at the bundle's place.

    Returns:
        The bundle, with ``.path``, ``.manifest``, ``.verify()`` and ``.run({...})``.

    Raises:
        EdgeAttnError: one class for each exit code, see ``edgeattn.core.errors``.
    """
    job = make_job(
        model,
        target=target,
        precision=precision,
        device=device,
        layout=layout,
        options=options,
        strict=strict,
        inputs=inputs,
        checkpoint=checkpoint,
        args=args,
        calibration=calibration,
        samples=samples,
        keep=keep,
    )
    return export_job(job, Path(output), force=force, progress=progress).bundle
