"""``edgeattn inspect``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from edgeattn.bundle.manifest import ArtifactInfo, DecoderInfo, TensorInfo


@click.command("inspect", short_help="Show what is in a bundle and what was proven.")
@click.argument("bundle", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print the manifest.")
def command(bundle: str, as_json: bool) -> None:
    """Show what is in BUNDLE, how it was made and what was proven. Runs nothing; see edgeattn verify."""
    from rich.markup import escape

    from edgeattn.bundle import Bundle
    from edgeattn.cli._show import console, decoding_rows, size, table

    manifest = Bundle.open(bundle).manifest
    if as_json:
        click.echo(manifest.text(), nl=False)
        return
    out = console()
    out.print(f"[bold]{escape(manifest.name)}[/bold]  {escape(manifest.recipe['description'])}")
    out.print()
    facts = table("", "")
    facts.add_row(
        "target", f"{manifest.target}, {manifest.precision}" + (f", for {manifest.device}" if manifest.device else "")
    )
    weights = manifest.weights
    facts.add_row("weights", "random" if weights.kind == "random" else f"checkpoint, SHA-256 {weights.sha256}")
    facts.add_row("made", f"{manifest.created} on {manifest.host['system']} {manifest.host['machine']}")
    fused = manifest.reparam.get("fused", [])
    facts.add_row("reparameterized", f"{len(fused)} blocks fused, {len(manifest.reparam.get('not_fused', []))} not")
    if manifest.choice:
        facts.add_row("in front", escape(f"{manifest.choice['front']}. {manifest.choice['why']}"))
    if manifest.decoder:
        facts.add_row("tokens", _tokens(manifest.decoder))
    for info in manifest.artifacts:
        _artifact_rows(facts, info)
        if info.decoding and manifest.decoder:
            for label, words in decoding_rows(info.decoding, manifest.decoder.context):
                facts.add_row(f"  {label}", escape(words))
    out.print(facts)
    for info in manifest.artifacts:
        _details(out, info, f" ({info.backend})" if manifest.alternatives else "")
    out.print()
    files = table("file", "size", "SHA-256", right=("size",))
    for name, file in manifest.files.items():
        files.add_row(escape(name), size(file.size), file.sha256[:16])
    out.print(files)


def _tokens(decoder: DecoderInfo) -> str:
    """How a decoder makes tokens."""
    words = [f"context {decoder.context}", f"vocabulary {decoder.vocabulary}"]
    borrowed = ", borrowed: the checkpoint has none of its own" * decoder.borrowed
    words.append(f"tokenizer {decoder.tokenizer}{borrowed}" if decoder.tokenizer else "no tokenizer")
    words += ["with a chat template"] if decoder.chat_template else []
    words += [f"ended by {', '.join(map(str, decoder.stop))}"] if decoder.stop else []
    return "; ".join(words)


def _tensors(tensors: Sequence[TensorInfo]) -> str:
    """Names, shapes and dtypes; those of a cache's layers together."""
    from edgeattn.cli._show import families
    from edgeattn.core.specs import shape_words

    about = {t.name: f"{shape_words(t.shape, t.dynamic)} {t.dtype}{f' {t.layout}' * bool(t.layout)}" for t in tensors}
    words = []
    for label, names in families(about):
        alike = len({about[name] for name in names}) == 1
        words += [f"{label} {about[names[0]]}"] if alike else [f"{name} {about[name]}" for name in names]
    return ", ".join(words)


def _artifact_rows(facts: Table, info: ArtifactInfo) -> None:
    """One artifact: its versions, what it was proven with, its score and its entries."""
    from rich.markup import escape

    facts.add_row(f"artifact {info.backend}", ", ".join(f"{n} {v}" for n, v in info.tools.items() if v))
    proven = ", ".join(f"{r.name} {r.version} on {r.machine}" for r in info.runtimes)
    needs = f"; the device needs {info.requirement}" if info.requirement else ""
    facts.add_row("  proven with", f"{proven}{needs}")
    if info.unproven:
        facts.add_row("  unproven", f"[yellow]{escape(info.unproven)}[/yellow]")
    if info.task:
        task = info.task
        facts.add_row(
            "  accuracy",
            f"{task['artifact_correct']} of {task['samples']} held-out samples, PyTorch {task['reference_correct']}",
        )
    for name, entry in info.entries.items():
        ins, outs = (_tensors(side) for side in (entry.inputs, entry.outputs))
        facts.add_row(f"  entry {escape(name)}", escape(f"{entry.file}: {ins} -> {outs}"))
        nodes = info.facts.get("entries", {}).get(name, {}).get("nodes", {})
        if nodes:
            most = ", ".join(f"{op} {count}" for op, count in list(nodes.items())[:10])
            facts.add_row("", f"{sum(nodes.values())} nodes: {most}{' …' if len(nodes) > 10 else ''}")
        for engine in info.facts.get("entries", {}).get(name, {}).get("engines", []):
            about = f"compute {engine['compute_capability']}, TensorRT {engine['tensorrt']}, {engine['seconds']:.1f} s"
            facts.add_row("", f"{engine['file']}: {about}")


def _details(out: Console, info: ArtifactInfo, which: str) -> None:
    """Numbers by golden sample, then what stayed as it was and what lint found, with modules."""
    from rich.markup import escape

    from edgeattn.cli._show import numerics_rows, table, worst_rows

    out.print()
    columns = (f"numbers against the reference{which}", "output", "relative L2", "max abs", "SQNR", "cosine")
    rows = table(*columns, "not finite")
    for row in worst_rows(numerics_rows(info.numerics)):
        rows.add_row(*(escape(cell) for cell in row))
    out.print(rows)
    for name, entry in info.facts.get("entries", {}).items():
        for kept in entry.get("kept_in_fp32", []):
            text = f"kept in fp32 ({name}): {kept['op']} in module {kept['module'] or '(model)'}: {kept['why']}"
            out.print(escape(text), soft_wrap=True)
    found: dict[str, list[str]] = {}
    for finding in info.lint:
        found.setdefault(f"{finding['rule']} ({finding['severity']}): {finding['what']}", []).append(
            f"{finding['module'] or '(model)'}: {finding['detail']}"
        )
    if found:
        out.print()
        out.print(f"[bold]lint{which}[/bold]")
    for rule, places in found.items():
        out.print(escape(rule), soft_wrap=True)
        for place, count in Counter(places).items():
            out.print(escape(f"  {place}{f', {count} times' if count > 1 else ''}"), soft_wrap=True)
