"""From finished runs to a bundle: its manifest, README and files."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeattn import targets
from edgeattn.bundle import Bundle, Manifest, write_bundle
from edgeattn.bundle.bundle import SCORED
from edgeattn.bundle.manifest import ArtifactInfo, DecoderInfo, EntryInfo, RuntimeInfo, StageInfo, TensorInfo, Weights
from edgeattn.core import tools
from edgeattn.core.specs import shape_words
from edgeattn.pipeline.cache import Record
from edgeattn.pipeline.decoding import tokenizer
from edgeattn.pipeline.decoding.samples import Text
from edgeattn.pipeline.decoding.samples import golden as samples_of
from edgeattn.pipeline.job import Job
from edgeattn.pipeline.run import Finished
from edgeattn.pipeline.stages.lower import entries_of
from edgeattn.targets.base import BGR, NHWC, Tensor
from edgeattn.targets.feeds import own_feeds

#: Held-out samples up to this many bytes travel with a bundle, so that it can be scored on a device.
LARGEST_SCORED = 8_000_000
#: What a layout means, for the README.
_LAYOUTS = {NHWC: ", channels last", BGR: ", blue first"}


def _artifact(job: Job, run: Finished) -> dict[str, Any]:
    """The fields of one ``ArtifactInfo``; ``job`` is that of its own target."""
    target = targets.get(job.target)
    lowered, verified = run.records["lower"].facts, run.records["verify"].facts
    runtime = target.runtime_tools[0]
    versions = tools.versions(
        ("edgeattn", "python", *sorted({*target.lower_tools(job.precision), *target.runtime_tools}))
    )
    reference = f"training form, float32, {run.records['reference'].facts['data']}"
    return {
        "backend": job.target,
        "requirement": target.package() and (job.runtime or target.package()),
        "entries": {
            name: EntryInfo(
                file=entry["file"],
                inputs=tuple(TensorInfo(**t) for t in entry["inputs"]),
                outputs=tuple(TensorInfo(**t) for t in entry["outputs"]),
            )
            for name, entry in lowered["entries"].items()
        },
        "runtimes": (RuntimeInfo(name=runtime, version=versions[runtime] or "", machine=tools.host()["machine"]),),
        "unproven": target.unproven_of(job.settled, bool(job.steps)),
        "tools": versions,
        "numerics": {"reference": reference, **verified["numerics"]},
        "task": verified["task"],
        "decoding": verified.get("decoder"),
        "facts": lowered["artifact"] | _quantization(job, run),
        "lint": (*run.records["lint"].facts["findings"], *lowered["findings"]),
    }


def _quantization(job: Job, run: Finished) -> dict[str, Any]:
    """What a quantized artifact was measured on, and what that is good for; {} for others."""
    if not job.quant.quantizes:
        return {}
    warnings = run.records["verify"].facts["warnings"]
    return {"quantize": run.records["quantize"].facts, "advice": [*run.advice, *warnings]}


def _decoder(job: Job, records: Mapping[str, Record]) -> DecoderInfo | None:
    """How tokens are made; None for other models."""
    facts = records["reference"].facts.get("decoder")
    if facts is None:
        return None
    resolved = job.resolved
    if resolved.tokenizer is None:
        return DecoderInfo(**facts)
    folder = Path(resolved.tokenizer)
    return DecoderInfo(
        **facts,
        stop=tuple(tokenizer.stop_tokens(folder)),
        tokenizer=tokenizer.FILE,
        chat_template=tokenizer.chat_template(folder),
        special_tokens=tokenizer.special_tokens(folder),
        borrowed=resolved.checkpoint is None or Path(resolved.checkpoint) != folder,
    )


def _manifest(job: Job, runs: Mapping[str, Finished], order: Sequence[str], key: str, choice: Any) -> Manifest:
    resolved = job.resolved
    jobs = {part.target: part for part in job.parts}
    first, *others = ({**_artifact(jobs[name], runs[name])} for name in order)
    stages = {
        (r.key, f"{name} {target}" if len(runs) > 1 and r.key not in _shared(runs) else name): r
        for target, run in runs.items()
        for name, r in run.records.items()
    }
    records = runs[order[0]].records
    return Manifest(
        **first,
        name=job.title,
        target=job.target,
        precision=job.precision,
        device=job.device,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        key=key,
        weights=Weights(
            kind="random" if resolved.random_weights else "checkpoint",
            sha256=resolved.checkpoint_sha256,
            seed=resolved.recipe.seed,
        ),
        recipe=resolved.recipe.model_dump(mode="json"),
        recipe_sha256=resolved.sha256,
        tolerance=records["verify"].facts["tolerance"],
        host=tools.host(),
        stages=tuple(
            StageInfo(name=name, key=r.key, seconds=round(r.seconds, 3), peak_mb=r.peak_mb)
            for (_, name), r in stages.items()
        ),
        reparam=records["reparameterize"].facts["proof"],
        decoder=_decoder(job, records),
        alternatives=tuple(ArtifactInfo(**other) for other in others),
        choice=choice,
    )


def _shared(runs: Mapping[str, Finished]) -> set[str]:
    """Keys of stages that every run has in common."""
    return set.intersection(*({r.key for r in run.records.values()} for run in runs.values()))


def _readme(manifest: Manifest) -> str:
    entry = next(iter(manifest.entries.values()))
    inputs = [
        f"- `{t.name}` {shape_words(t.shape, t.dynamic)} {t.dtype}{', raw pixels' if t.pixels else ''}"
        f"{_LAYOUTS.get(t.layout, '')}"
        for t in entry.inputs
    ]
    outputs = [f"- `{t.name}` {shape_words(t.shape, t.dynamic)} {t.dtype}" for t in entry.outputs]
    random = manifest.weights.kind == "random"
    weights = "RANDOM: nothing was trained, the outputs mean nothing" if random else "from a checkpoint"
    run = []
    if manifest.decoder:
        names = ", ".join(f"`{name}`" for name in manifest.entries)
        inputs = [f"Of {names}; here those of `{next(iter(manifest.entries))}`:", *inputs]
        run = ['    edgeattn generate . --prompt "..."       # tokens, with EdgeAttn installed']
        if any(info.requirement for info in manifest.artifacts):
            run = [
                "    python run.py                        # check files and golden outputs",
                '    python run.py --prompt "..."          # tokens; needs tokenizers beside the runtime',
                "    python run.py --profile              # latency of a step on this device",
            ]
        if manifest.backend == "gguf":
            # llama.cpp's flash attention stops at heads of 192 and 128 (measured), and is on unless it is told.
            run.append(
                f'    llama-cli -m {next(iter(manifest.entries.values())).file} -fa off -p "..."   # llama.cpp itself'
            )
    elif any(info.requirement for info in manifest.artifacts):
        run = [
            "    python run.py                        # check files and golden outputs",
            f"    python run.py --input {entry.inputs[0].name}=data.npy   # your own data",
            "    python run.py --profile              # latency on this device",
        ]
    proven = [
        f"- `{info.backend}`: {', '.join(f'{r.name} {r.version} on {r.machine}' for r in info.runtimes)}"
        for info in manifest.artifacts
    ]
    return "\n".join(
        [
            f"# {manifest.name}",
            "",
            manifest.recipe["description"],
            "",
            f"Made by EdgeAttn {manifest.tools['edgeattn']} on {manifest.created} for target `{manifest.target}`, "
            f"precision `{manifest.precision}`. Weights: {weights}.",
            "",
            *run,
            f"    edgeattn verify {manifest.name}",
            "",
            "Inputs:",
            *inputs,
            "",
            "Outputs:",
            *outputs,
            "",
            "The numbers were proven with:",
            *proven,
            *(f"- {info.backend}: {info.unproven}" for info in manifest.artifacts if info.unproven),
            "",
            "Under another runtime `run.py` compares the golden outputs before it does anything else.",
            *([f"In front: {manifest.choice['front']}. {manifest.choice['why']}", ""] if manifest.choice else [""]),
            "`manifest.json` holds what was proven, all versions, and the SHA-256 of every file.",
            "",
        ]
    )


def _golden(source: Path, inputs: Sequence[Tensor], out: Path) -> Path:
    """The reference's golden samples with inputs as the artifact takes them."""
    out.mkdir()
    for path in sorted(source.glob("*.npz")):
        with np.load(path, allow_pickle=False) as data:
            feeds = own_feeds(inputs, {key[3:]: data[key] for key in data.files if key.startswith("in.")})
            outputs = {key: data[key] for key in data.files if key.startswith("out.")}
        arrays: dict[str, Any] = {f"in.{name}": value for name, value in feeds.items()}
        np.savez(out / path.name, **arrays, **outputs)
    return out


def _steps(parts: Iterable[tuple[Job, Finished]], out: Path) -> Path:
    """Golden samples of a decoder's entries, of every artifact that has some."""
    out.mkdir()
    for job, run in parts:
        text = Text.load(run.records["reference"].folder)
        entries = entries_of(run.records["lower"].facts)
        for sample in samples_of(text, job.steps):
            entry = entries[sample.entry]
            arrays: dict[str, Any] = {f"in.{n}": v for n, v in own_feeds(entry.inputs, sample.feeds).items()}
            arrays |= {f"out.{t.name}": sample.reference[t.name] for t in entry.outputs}
            np.savez_compressed(out / f"{sample.name}.npz", **arrays)  # most of a cache of fixed length is zeros
    return out


def pack(
    job: Job,
    runs: Mapping[str, Finished],
    order: Sequence[str],
    key: str,
    choice: Mapping[str, Any] | None,
    final: Path,
    *,
    replace: bool = False,
) -> Bundle:
    """Write the bundle ``final``.

    Args:
        runs: by target. order: their names, the one in front first. key: digest of all that went in.
        choice: why that one is in front, where there are several.
        replace: take the place of an existing folder.
    """
    manifest = _manifest(job, runs, order, key, choice)
    files = {run.records["lower"].folder / name: name for run in runs.values() for name in run.records["lower"].files}
    if manifest.decoder and job.resolved.tokenizer:
        files[Path(job.resolved.tokenizer, tokenizer.FILE)] = tokenizer.FILE
    if job.resolved.heldout and manifest.task and not manifest.entries["main"].inputs[0].pixels:
        heldout = Path(job.resolved.heldout)
        files |= {heldout: SCORED} if heldout.stat().st_size <= LARGEST_SCORED else {}
    front = runs[order[0]].records
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "golden"
        if manifest.decoder:
            jobs = {part.target: part for part in job.parts}
            golden = _steps(((jobs[name], runs[name]) for name in reversed(order)), place)
        else:
            inputs = entries_of(front["lower"].facts)["main"].inputs
            golden = _golden(front["reference"].folder / "golden", inputs, place)
        return write_bundle(final, manifest, files, golden, _readme(manifest), replace=replace)
