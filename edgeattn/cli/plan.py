"""``edgeattn plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeattn.cli._options import job_options, parse_args


@click.command("plan", short_help="Show what an export would do, and what is cached or missing.")
@job_options
@click.option("--output", "-o", default=".", type=click.Path(), help="Folder that the bundle would be made in.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(args: tuple[str, ...], output: str, as_json: bool, **given: Any) -> None:
    """Show the stages of an export of MODEL: what is cached, what would run, which toolchain is missing.

    Reads files and package versions only; nothing heavy is imported and nothing is written.
    """
    import json

    from edgeattn import targets
    from edgeattn.bundle.bundle import runner_files
    from edgeattn.cli._show import console, table
    from edgeattn.core.errors import ToolchainMissing
    from edgeattn.pipeline.cache import Cache
    from edgeattn.pipeline.export import make_job
    from edgeattn.pipeline.plan import make_plan

    missing: ToolchainMissing | None = None
    try:
        job = make_job(**given, args=parse_args(args))
    except ToolchainMissing as error:
        missing = error
        job = make_job(**given, args=parse_args(args), check_tools=False)
    plans = {part.target: make_plan(part, Cache.default()) for part in job.parts}
    # What several targets have in common is shown once.
    named = {
        p.key: (p, f"{p.stage.name} {target}" if len(plans) > 1 else p.stage.name)
        for target, plan in plans.items()
        for p in plan
    }
    shared = set.intersection(*({p.key for p in plan} for plan in plans.values()))
    planned = [(p, p.stage.name if key in shared else name) for key, (p, name) in named.items()]
    final = Path(output) / job.title
    files = ["manifest.json", "README.md", "golden/*.npz"]
    for target, plan in plans.items():
        lowered = next(p.record for p in plan if p.stage.name == "lower")
        written = [e["file"] for e in lowered.facts["entries"].values()] if lowered else [f"the {target} artifact"]
        files += sorted(set(written))
    if any(targets.get(target).package() for target in plans):
        files += runner_files(list(plans), scored=False, decoder=job.resolved.recipe.decoder is not None)
    if as_json:
        stages = [
            {
                "name": name,
                "needs": p.stage.needs,
                "key": p.key,
                "cached": p.record is not None,
                "seconds": p.record.seconds if p.record else None,
            }
            for p, name in planned
        ]
        result = {"bundle": str(final), "exists": final.exists(), "random_weights": job.resolved.random_weights}
        lacking = {"why": missing.why, "fix": missing.fix} if missing else None
        click.echo(json.dumps({**result, "missing": lacking, "stages": stages, "files": files}, indent=1))
    else:
        out = console()
        rows = table("stage", "state", "needs", "key", "took last time", right=("took last time",))
        for p, name in planned:
            state = "[green]cached[/green]" if p.record else ("written anew" if p.stage.name == "bundle" else "to run")
            took = f"{p.record.seconds:.2f} s" if p.record else ""
            rows.add_row(name, state, ", ".join(p.stage.needs) or "recipe", p.key[:16], took)
        out.print(rows)
        out.print()
        out.print(
            f"bundle   {final}{'  (something stands there)' if final.exists() else ''}", soft_wrap=True, markup=False
        )
        out.print(f"files    {', '.join(files)}", soft_wrap=True, markup=False)
        weights = "random, no checkpoint" if job.resolved.random_weights else str(job.resolved.checkpoint)
        out.print(f"weights  {weights}", soft_wrap=True, markup=False)
    if missing is not None:
        raise missing
