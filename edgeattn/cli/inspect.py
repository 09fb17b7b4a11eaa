"""``edgeattn inspect``."""

from __future__ import annotations

import click


@click.command("inspect", short_help="Show what is in a bundle and what was proven.")
@click.argument("bundle", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print the manifest.")
def command(bundle: str, as_json: bool) -> None:
    """Show what is in BUNDLE, how it was made and what was proven. Runs nothing; see edgeattn verify."""
    from rich.markup import escape

    from edgeattn.bundle import Bundle
    from edgeattn.cli._show import console, numerics_rows, size, table

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
    facts.add_row("versions", ", ".join(f"{name} {version}" for name, version in manifest.tools.items()))
    if manifest.task:
        task = manifest.task
        facts.add_row(
            "accuracy",
            f"{task['artifact_correct']} of {task['samples']} held-out samples, PyTorch {task['reference_correct']}",
        )
    for name, entry in manifest.entries.items():
        ins = ", ".join(f"{t.name} {tuple(t.shape)} {t.dtype}" for t in entry.inputs)
        outs = ", ".join(f"{t.name} {tuple(t.shape)} {t.dtype}" for t in entry.outputs)
        facts.add_row(f"entry {name}", escape(f"{entry.file}: {ins} -> {outs}"))
        nodes = manifest.facts.get("entries", {}).get(name, {}).get("nodes", {})
        if nodes:
            most = ", ".join(f"{op} {count}" for op, count in list(nodes.items())[:10])
            facts.add_row("", f"{sum(nodes.values())} nodes: {most}{' …' if len(nodes) > 10 else ''}")
    fused = manifest.reparam.get("fused", [])
    facts.add_row("reparameterized", f"{len(fused)} blocks fused, {len(manifest.reparam.get('not_fused', []))} not")
    out.print(facts)
    out.print()
    rows = table("numbers against the reference", "output", "relative L2", "max abs", "SQNR", "cosine", "not finite")
    for row in numerics_rows(manifest.numerics):
        rows.add_row(*(escape(cell) for cell in row))
    out.print(rows)
    for entry_name, entry_facts in manifest.facts.get("entries", {}).items():
        for kept in entry_facts.get("kept_in_fp32", []):
            text = f"kept in fp32 ({entry_name}): {kept['op']} in module {kept['module'] or '(model)'}: {kept['why']}"
            out.print(escape(text), soft_wrap=True)
    out.print()
    files = table("file", "size", "SHA-256", right=("size",))
    for name, info in manifest.files.items():
        files.add_row(escape(name), size(info.size), info.sha256[:16])
    out.print(files)
