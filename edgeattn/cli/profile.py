"""``edgeattn profile``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@click.command("profile", short_help="Measure a bundle's latency, here or on a device.")
@click.argument("bundle", type=click.Path())
@click.option("--device", "-d", default="local", help="A device's name, ssh://user@host, or local. [default: local]")
@click.option("--backend", "-b", help="Which artifact, where the bundle holds several. [default: all]")
@click.option(
    "--threads", type=click.IntRange(min=1), help="CPU threads; not for Core ML. [default: the runner's choice]"
)
@click.option("--runs", type=click.IntRange(min=1), help="Timed runs. [default: as many as it takes]")
@click.option("--warmup", type=click.IntRange(min=0), help="Runs before. [default: until the times are stable]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(bundle: str, device: str, backend: str | None, as_json: bool, **counts: int | None) -> None:
    """Measure BUNDLE's latency with its own run.py, in a fresh process on this machine or on a device.

    The golden outputs are compared first: a wrong result has no latency.
    """
    import json

    from edgeattn.bundle import Bundle
    from edgeattn.cli._show import Status, console
    from edgeattn.core.errors import unknown
    from edgeattn.profile.transports import open_transport

    opened = Bundle.open(bundle)
    backends = [info.backend for info in opened.manifest.artifacts]
    if backend is not None and backend not in backends:
        raise unknown("backend", backend, backends, where=str(bundle))
    transport = open_transport(device)
    arguments = ["--profile"]
    for name, count in counts.items():
        arguments += [f"--{name}", str(count)] if count is not None else []
    runs = [[*arguments, "--backend", name] for name in ([backend] if backend else backends)]
    with Status() as status:
        status.say(f"measuring on {transport.url}")
        results = transport.run_all(opened.path, runs, status.say)
    if as_json:
        click.echo(json.dumps({"device": device, "results": results}, indent=1))
        return
    out = console()
    for result in results:
        if "compute_units" in result:
            _show_units(out, result)
    if plain := [result for result in results if "compute_units" not in result]:
        out.print(_plain(plain))
    out.print()
    first = results[0]
    for result in results if len(opened.manifest.entries) > 1 else ():
        if "timed" in result:
            out.print(f"{result['backend']}: {result['timed']}", markup=False)
    out.print(f"{first['machine']}, {first['cpu']}, Python {first['python']}", markup=False)
    for when in ("before", "after"):
        state = ", ".join(f"{k} {v}" for k, v in first[when].items() if v not in (None, [], ""))
        if state:
            out.print(f"{when}: {state}", markup=False)


def _plain(results: list[dict[str, Any]]) -> Table:
    """A row for each artifact."""
    from edgeattn.cli._show import table

    columns = ("backend", "runtime", "threads", "p50 ms", "p90", "p99", "first", "load ms", "peak MB", "runs")
    rows = table(*columns, right=columns[2:])
    for r in results:
        figures = [f"{r[key]:.2f}" for key in ("p50", "p90", "p99", "first_ms", "load_ms")]
        rows.add_row(r["backend"], r["runtime"], str(r["threads"]), *figures, f"{r['peak_rss_mb']:.0f}", str(r["runs"]))
    return rows


def _show_units(out: Console, result: dict[str, Any]) -> None:
    """A row for each of Core ML's compute units, and what kept one from being measured."""
    from edgeattn.cli._show import table

    timed = {"p50 ms": "p50", "p90": "p90", "p99": "p99", "first": "first_ms", "load ms": "load_ms"}
    columns = (*timed, "first load", "runs", "ops off", "cost off")
    rows = table("compute unit", *columns, right=columns)
    said = []
    for unit in result["compute_units"]:
        name = unit["compute_unit"]
        times = ["-" if unit.get(key) is None else f"{unit[key]:.2f}" for key in (*timed.values(), "load_first_ms")]
        shares = [unit["fallback_ops_percent"], unit["fallback_cost_percent"]]
        off = ["-" if share is None else f"{share:.1f} %" for share in shares]
        rows.add_row(name, *times, str(unit.get("runs", "-")), *off)
        said += [f"{name}: {unit['why']}"] if not unit["holds"] else []
        said += [f"{name}: its plan cannot be told: {unit['plan_why']}"] if unit["plan_why"] else []
    out.print(rows)
    out.print()
    for line in said:
        out.print(line, markup=False, soft_wrap=True)
    out.print(
        "off: the share of operations, and of their estimated cost, that Core ML's plan puts on another device than "
        "the Neural Engine (CPU_AND_NE, ALL), the GPU (CPU_AND_GPU) or the CPU (CPU_ONLY)",
        soft_wrap=True,
    )
    out.print(f"{result['runtime']}, {result['system']}, compiled in {result['compile_ms']:.0f} ms", markup=False)
