"""Export: run the plan, put the bundle together."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeattn import device as devices
from edgeattn import recipe as recipes
from edgeattn import targets
from edgeattn.bundle import Bundle, Manifest, write_bundle
from edgeattn.bundle.manifest import EntryInfo, StageInfo, TensorInfo, Weights
from edgeattn.core import tools
from edgeattn.core.errors import EdgeAttnError, ToolchainMissing, UsageError
from edgeattn.core.files import check_writable
from edgeattn.core.numerics import TOLERANCES
from edgeattn.core.specs import TensorSpec
from edgeattn.pipeline.cache import Cache
from edgeattn.pipeline.job import Job
from edgeattn.pipeline.plan import check_choice, make_plan, sources_key
from edgeattn.pipeline.run import Finished, Progress, Silent, run_plan


@dataclass(frozen=True)
class Exported:
    """A bundle and how it came about.

    Attributes:
        unchanged: the same bundle was there already, whole, and was kept.
    """

    bundle: Bundle
    run: Finished
    unchanged: bool


def make_job(
    model: str,
    *,
    target: str = "onnx",
    precision: str = "fp32",
    device: str | None = None,
    inputs: Sequence[str | TensorSpec] = (),
    checkpoint: str | Path | None = None,
    args: Mapping[str, Any] | None = None,
    check_tools: bool = True,
) -> Job:
    """Resolve names to a job; everything that can be wrong without running anything is said here.

    Args:
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
    resolved = recipes.resolve(
        model, inputs=inputs, checkpoint=None if checkpoint is None else Path(checkpoint), args=args
    )
    chosen = targets.get(target)
    check_choice(chosen, precision, devices.resolve(device) if device else None, tuple(TOLERANCES))
    availability = chosen.availability()
    if check_tools and not availability.found:
        raise ToolchainMissing(f"target {target} cannot be used here", why=availability.detail, fix=availability.fix)
    return Job(resolved, target, precision, device)


def _manifest(job: Job, run: Finished) -> Manifest:
    records, resolved = run.records, job.resolved
    target = targets.get(job.target)
    lowered, verified = records["lower"].facts, records["verify"].facts
    return Manifest(
        name=job.title,
        target=job.target,
        precision=job.precision,
        device=job.device,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        key=run.keys["bundle"],
        weights=Weights(
            kind="random" if resolved.random_weights else "checkpoint",
            sha256=resolved.checkpoint_sha256,
            seed=resolved.recipe.seed,
        ),
        recipe=resolved.recipe.model_dump(mode="json"),
        recipe_sha256=resolved.sha256,
        entries={
            name: EntryInfo(
                file=entry["file"],
                inputs=tuple(TensorInfo(**t) for t in entry["inputs"]),
                outputs=tuple(TensorInfo(**t) for t in entry["outputs"]),
            )
            for name, entry in lowered["entries"].items()
        },
        requirement=target.package(),
        tolerance=verified["tolerance"],
        tools=tools.versions(
            ("edgeattn", "python", *sorted({*target.lower_tools(job.precision), *target.runtime_tools}))
        ),
        host=tools.host(),
        stages=tuple(
            StageInfo(name=name, key=r.key, seconds=round(r.seconds, 3), peak_mb=r.peak_mb)
            for name, r in records.items()
        ),
        reparam=records["reparameterize"].facts["proof"],
        numerics={"reference": f"training form, float32, {records['reference'].facts['data']}", **verified["numerics"]},
        task=verified["task"],
        facts=lowered["artifact"],
    )


def _readme(manifest: Manifest) -> str:
    inputs = [f"- `{t.name}` {tuple(t.shape)} {t.dtype}" for t in manifest.entries["main"].inputs]
    outputs = [f"- `{t.name}` {tuple(t.shape)} {t.dtype}" for t in manifest.entries["main"].outputs]
    random = manifest.weights.kind == "random"
    weights = "RANDOM: nothing was trained, the outputs mean nothing" if random else "from a checkpoint"
    run = (
        ["", "    python run.py                        # check files and golden outputs"]
        if manifest.requirement
        else []
    )
    if run:
        run += [f"    python run.py --input {manifest.entries['main'].inputs[0].name}=data.npy   # your own data"]
    return "\n".join(
        [
            f"# {manifest.name}",
            "",
            manifest.recipe["description"],
            "",
            f"Made by EdgeAttn {manifest.tools['edgeattn']} on {manifest.created} for target `{manifest.target}`, "
            f"precision `{manifest.precision}`. Weights: {weights}.",
            *run,
            f"    edgeattn verify {manifest.name}" if run else f"\n    edgeattn verify {manifest.name}",
            "",
            "Inputs:",
            *inputs,
            "",
            "Outputs:",
            *outputs,
            "",
            "`manifest.json` holds what was proven, all versions, and the SHA-256 of every file.",
            "",
        ]
    )


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
    check_writable(output)
    # Looked at before anything runs, if the key can be known by then: a long export must not end in a refusal.
    if cache.sources(sources_key(job)) is not None:
        _keep_standing(final, make_plan(job, cache)[-1].key, force)
    run = run_plan(job, cache, progress or Silent())
    standing = _keep_standing(final, run.keys["bundle"], force)
    if standing is not None:
        return Exported(standing, run, True)
    manifest = _manifest(job, run)
    bundle = write_bundle(
        final,
        manifest,
        {run.records["lower"].folder / name: name for name in run.records["lower"].files},
        run.records["reference"].folder / "golden",
        _readme(manifest),
        replace=force,
    )
    return Exported(bundle, run, False)


def export(
    model: str,
    target: str = "onnx",
    precision: str = "fp32",
    output: str | Path = ".",
    *,
    device: str | None = None,
    inputs: Sequence[str | TensorSpec] = (),
    checkpoint: str | Path | None = None,
    args: Mapping[str, Any] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Export a model and prove the numbers; the words are those of ``edgeattn export``.

    Args:
        model: a recipe's name or file, ``package.module:factory``, ``file.py:factory`` or ``timm:NAME``.
        output: folder that the bundle's folder is made in.
        inputs: ``x=1x3x224x224`` texts or ``TensorSpec`` objects.
        force: replace what stands at the bundle's place.

    Returns:
        The bundle, with ``.path``, ``.manifest``, ``.verify()`` and ``.run({...})``.

    Raises:
        EdgeAttnError: one class for each exit code, see ``edgeattn.core.errors``.
    """
    job = make_job(
        model, target=target, precision=precision, device=device, inputs=inputs, checkpoint=checkpoint, args=args
    )
    return export_job(job, Path(output), force=force, progress=progress).bundle
