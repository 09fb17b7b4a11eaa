"""``edgeattn export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeattn.cli._options import job_options, parse_args

if TYPE_CHECKING:
    from rich.table import Table

    from edgeattn.bundle import Bundle
    from edgeattn.bundle.manifest import ArtifactInfo
    from edgeattn.pipeline.export import Exported


@click.command("export", short_help="Export a model and prove that its numbers hold.")
@job_options
@click.option("--output", "-o", default=".", type=click.Path(), help="Folder that the bundle is made in.")
@click.option("--force", "-f", is_flag=True, help="Replace what stands at the bundle's place.")
def command(args: tuple[str, ...], output: str, force: bool, **job: Any) -> None:
    """Export MODEL and prove that its numbers hold.

    MODEL is a recipe's name or file, package.module:factory, file.py:factory, or timm:NAME. The result is a bundle,
    the folder NAME.TARGET.PRECISION; without a checkpoint the weights are random and its name says so.

    \b
      edgeattn export fmvit-digits --target onnx
      edgeattn export fmvit-s --target tflite --precision fp16
      edgeattn export fmvit-s --device raspberry-pi-5
      edgeattn export mypackage.net:build --input x=1x3x224x224 --checkpoint net.safetensors
    """
    from edgeattn.cli._show import Live
    from edgeattn.pipeline.export import export_job, make_job

    live = Live()
    try:
        made = make_job(**job, args=parse_args(args))
        exported = export_job(made, Path(output), force=force, progress=live)
    finally:
        live.stop()
    _report(exported, made.resolved.unscored)


def _report(exported: Exported, unscored: str | None) -> None:
    from rich.markup import escape

    from edgeattn.cli._show import console, decoding_rows, size, table

    bundle = exported.bundle
    manifest, out = bundle.manifest, console()
    path = escape(str(bundle.path))
    out.print()
    state = "unchanged, it was there already" if exported.unchanged else f"{exported.seconds:.1f} s"
    out.print(f"[bold green]held[/bold green]  {path}  ({state})")
    out.print()
    facts = table("", "")
    weights = "[bold yellow]random: nothing was trained, its outputs mean nothing[/bold yellow]"
    if manifest.weights.kind == "checkpoint":
        weights = f"checkpoint, SHA-256 {str(manifest.weights.sha256)[:16]}…"
    facts.add_row("weights", weights)
    summary = next(iter(exported.runs.values())).records["reparameterize"].facts["summary"]
    facts.add_row("reparameterized", escape(summary))
    for info in manifest.artifacts:
        which = f" ({info.backend})" if manifest.alternatives else ""
        _artifact_rows(facts, info, manifest.tolerance, which)
        if info.decoding and manifest.decoder:
            for label, words in decoding_rows(info.decoding, manifest.decoder.context):
                facts.add_row(f"{label}{which}", escape(words))
    if unscored:
        facts.add_row("accuracy", f"not scored: {escape(unscored)}")
    models = {entry.file for info in manifest.artifacts for entry in info.entries.values()}
    sizes = {
        model: sum(
            i.size for n, i in manifest.files.items() if n in (model, f"{model}.data") or n.startswith(f"{model}/")
        )
        for model in sorted(models)
    }
    files = ", ".join(f"{escape(model)} {size(count)}" for model, count in sizes.items())
    facts.add_row("size", files)
    if manifest.choice:
        facts.add_row("in front", escape(f"{manifest.choice['front']}. {manifest.choice['why']}"))
    took = ", ".join(f"{s.name} {s.seconds:.1f} s" for s in manifest.stages)
    facts.add_row("stages", f"{took}; peak {max(s.peak_mb for s in manifest.stages):.0f} MB")
    out.print(facts)
    out.print()
    out.print("next:")
    for line in _next(bundle):
        out.print(f"  {escape(line)}", soft_wrap=True)


#: Where a backend's own runtime can be asked, and for what.
_ELSEWHERE = {
    "coreml": ("mac", "a Mac: every compute unit"),
    "tensorrt": ("gpu", "a machine with the GPU: transfers, CUDA graph, layers"),
}


def _next(bundle: Bundle) -> list[str]:
    """The commands that follow, each of which can be run as it stands, or says what it waits for."""
    from edgeattn import device

    manifest, path = bundle.manifest, bundle.path
    place = device.resolve(manifest.device) if manifest.device else None
    lines = [f"edgeattn verify {path}"]
    requirements = " or ".join(sorted({info.requirement for info in manifest.artifacts if info.requirement}))
    text = manifest.decoder is not None and bool(manifest.decoder.tokenizer)
    prompt = '--prompt "..."' if text else "--ids 1,2,3"
    if place is not None and place.connect:
        lines = [f"edgeattn {what} {path} --device {manifest.device}" for what in ("verify", "profile")]
    elif manifest.backend == "optical":
        lines.append(f"edgeattn optics show {path}    (planes, frames, cost, and what a device's limits do to it)")
    elif manifest.unproven:
        host, what = _ELSEWHERE.get(manifest.backend, ("host", "on the hardware"))
        lines.append(f"edgeattn profile {path} --device ssh://user@{host}    ({what})")
    elif requirements:
        lines.append(f"edgeattn profile {path}")
    if place is not None and place.kind != "host" and not place.connect:
        if place.emulate:
            lines.append("edgeattn device setup qemu    (once: what emulates it)")
            lines.append(f"edgeattn verify {path} --device {manifest.device}    (emulated)")
        # Else it is a file, which can hold an address itself; phones have none.
        if place.name == manifest.device and place.kind not in ("phone", "tablet", "optical"):
            lines.append(
                f"edgeattn device add NAME ssh://user@host --base {place.name}    (your own, to measure on it)"
            )
    lines.append(f"edgeattn inspect {path}")
    if manifest.decoder:
        lines.insert(1, f"edgeattn generate {path} {prompt}")
    if requirements:
        lines.append(f"python {path}/run.py    (on the device: needs numpy and {requirements})")
    if requirements and manifest.decoder:
        lines.append(f"python {path}/run.py {prompt}" + "    (and tokenizers)" * text)
    return lines


def _quantized_words(quantized: dict[str, Any]) -> str:
    """How much of a graph is stored in small numbers, and what is not."""
    count, left = len(quantized["operations"]), len(quantized["left_in_floats"])
    words = f"{count} of {count + left} convolutions and matrix products in {quantized['numbers']}"
    modules = [m or "(model)" for m in quantized.get("modules_in_floats", ())]
    return f"{words}; in floats: {', '.join(modules[:4])}{' …' if len(modules) > 4 else ''}" if modules else words


def _artifact_rows(facts: Table, info: ArtifactInfo, tolerance: float, which: str) -> None:
    """What was proven of one artifact, and what lint found."""
    from rich.markup import escape

    from edgeattn.cli._show import numerics_rows, optics_rows, size

    rows = numerics_rows(info.numerics)
    worst = max(rows, key=lambda row: float(row[2]))
    facts.add_row(
        f"numbers{which}",
        f"worst relative L2 {worst[2]} on {escape(worst[1])} ({worst[4]}), allowed {tolerance:g}; "
        f"against the training form in float32, {len(rows)} comparisons",
    )
    if optics := next((entry["optics"] for entry in info.facts.get("entries", {}).values() if "optics" in entry), None):
        facts.add_row(f"assumed{which}", escape("; ".join(optics["assumptions"])))
    if info.unproven:
        facts.add_row(f"unproven{which}", f"[yellow]{escape(info.unproven)}[/yellow]")
    if info.task:
        task = info.task
        facts.add_row(
            f"accuracy{which}",
            f"{task['artifact_accuracy']:.2%} ({task['artifact_correct']} of {task['samples']} held-out samples), "
            f"PyTorch {task['reference_accuracy']:.2%} ({task['reference_correct']}); "
            f"top-1 agreement {task['top1_agreement']:.2%}",
        )
    for line in info.facts.get("quantize", {}).get("words", ()):
        facts.add_row(f"calibration{which}", escape(line))
    for name in ("equalized", "corrected"):
        for line in info.facts.get("quantize", {}).get(name, {}).get("words", ()):
            facts.add_row(f"{name}{which}", escape(line))
    for line in info.facts.get("quantize", {}).get("risks", ()):
        facts.add_row(f"risk{which}", f"[yellow]{escape(line)}[/yellow]")
    for line in info.facts.get("advice", ()):
        facts.add_row(f"advice{which}", escape(line))
    for name, entry in info.facts.get("entries", {}).items():
        kept = entry.get("kept_in_fp32")
        if kept is not None:
            where = sorted({k["module"] or "(model)" for k in kept})
            text = (
                f"{len(kept)} operations, in {', '.join(where[:4])}{' …' if len(where) > 4 else ''}" if kept else "none"
            )
            facts.add_row(f"kept in fp32 ({escape(name)})", escape(text))
        if optics := entry.get("optics"):
            of = f"{which} ({escape(name)})" if len(info.entries) > 1 else which
            for label, words in optics_rows(optics, str(info.facts["device"])):
                facts.add_row(f"{label}{of}", escape(words))
        if quantized := entry.get("quantized"):
            facts.add_row(f"quantized ({escape(name)})", escape(_quantized_words(quantized)))
        if built := entry.get("engines"):
            each = [f"{e['compute_capability']} {size(e['bytes'])} in {e['seconds']:.1f} s" for e in built]
            made = f"TensorRT for RTX {built[0]['tensorrt']}: {', '.join(each)}"
            facts.add_row(f"engines ({escape(name)})", escape(made))
        if "transposes" in entry:
            sides = [t["of"] for t in entry["transposes"]]
            inside = sides.count("graph")
            facts.add_row(
                f"transposes ({escape(name)})",
                f"{len(sides)} of {sum(entry['nodes'].values())} nodes: {inside} inside, "
                f"{len(sides) - inside} at inputs and outputs",
            )
    for finding in info.lint:
        if finding["severity"] != "note":
            text = f"{finding['rule']} in module {finding['module'] or '(model)'}: {finding['what']}. {finding['mend']}"
            facts.add_row(f"lint{which}", f"[yellow]{escape(text)}[/yellow]")
