"""How things look in a terminal."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from edgeattn.core.errors import EdgeAttnError

#: Enough for a table in a log file, where the width cannot be asked for.
_PLAIN_WIDTH = 110


def console(err: bool = False) -> Console:
    """A console on standard output, or on standard error for progress and errors."""
    stream = sys.stderr if err else sys.stdout
    return Console(stderr=err, highlight=False, width=None if stream.isatty() else _PLAIN_WIDTH)


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """An open table with bold headings; the columns named in ``right`` are aligned to the right."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    made.show_header = any(columns)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def show_error(error: EdgeAttnError, debug: bool) -> None:
    """What failed, value, where, why, what to do; the traceback too with ``--debug``."""
    out = console(err=True)
    out.print(Text.assemble(("error: ", "bold red"), error.what), soft_wrap=True)
    for label, text in error.parts():
        out.print(Text.assemble((f"  {label:<6} ", "bold"), text), soft_wrap=True)
    for line in error.details[:40]:
        out.print(f"         {escape(line)}", soft_wrap=True)
    if len(error.details) > 40:
        out.print(f"         and {len(error.details) - 40} more", soft_wrap=True)
    if debug:
        out.print(escape(error.traceback_text or "".join(traceback.format_exception(error))), soft_wrap=True)


def size(count: float) -> str:
    """Bytes in MB of 1e6, or kB below one."""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


class Live:
    """A ``Progress``: a spinner with the running stage and its time, then a line for each finished one."""

    def __init__(self) -> None:
        self._console = console(err=True)
        self._bar: Progress | None = None
        self._stage = ""

    def start(self, stage: str) -> None:
        """Show that a stage runs."""
        self._stage = stage
        if self._console.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.add_task(f"[bold]{stage}[/bold]", total=None)
            self._bar.start()

    def say(self, text: str) -> None:
        """Show what the stage is doing."""
        if self._bar:
            self._bar.update(self._bar.task_ids[0], description=f"[bold]{self._stage}[/bold] {escape(text)}")

    def done(self, stage: str, seconds: float, peak_mb: float, cached: bool) -> None:
        """Leave a line for the stage."""
        self.stop()
        mark = "[dim]cached[/dim]" if cached else f"{seconds:6.2f} s  {peak_mb:5.0f} MB peak"
        self._console.print(f"  {stage:<15} {mark}")

    def stop(self) -> None:
        """Take the spinner off."""
        if self._bar:
            self._bar.stop()
            self._bar = None


class Status:
    """A line on standard error that says what is going on, while it lasts."""

    def __init__(self) -> None:
        self._status = console(err=True).status("") if sys.stderr.isatty() else None

    def __enter__(self) -> Status:
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status:
            self._status.stop()

    def say(self, text: str) -> None:
        """Show ``text``."""
        if self._status:
            self._status.update(escape(text))


def numerics_rows(numerics: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows (sample, output, relative L2, max abs, SQNR, cosine, not finite) of a manifest's numerics."""
    rows: list[tuple[str, ...]] = []
    for sample, outputs in numerics.items():
        if not isinstance(outputs, dict):
            continue
        for name, n in outputs.items():
            sqnr = "equal" if n["sqnr_db"] is None else f"{n['sqnr_db']:.1f} dB"
            values = (f"{n['relative_l2']:.2e}", f"{n['max_abs']:.2e}", sqnr, f"{n['cosine']:.8f}", str(n["nonfinite"]))
            rows.append((sample, name, *values))
    return rows


def families(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Names that differ in the number at their end alone, as the layers' tensors of a cache do, under one of them all.

    Returns:
        ("latent_0..31", its names), in the order of the first ones; up to two of a kind stand alone.
    """
    kinds: dict[str, list[str]] = {}
    for name in names:
        stem = name.rstrip("0123456789")
        kinds.setdefault(stem if stem.endswith("_") and stem != name else name, []).append(name)
    found = []
    for stem, members in kinds.items():
        together = [(f"{members[0]}..{members[-1][len(stem) :]}", members)]
        found += together if len(members) > 2 else [(name, [name]) for name in members]
    return found


def worst_rows(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Of ``numerics_rows`` those that are furthest off among ``families`` of outputs."""
    shown: list[tuple[str, ...]] = []
    for sample in dict.fromkeys(row[0] for row in rows):
        own = {row[1]: row for row in rows if row[0] == sample}
        for label, members in families(own):
            worst = max((own[name] for name in members), key=lambda row: float(row[2]))
            shown.append((sample, label if len(members) == 1 else f"worst of {label}", *worst[2:]))
    return shown


def decoding_rows(found: dict[str, Any], context: int) -> list[tuple[str, str]]:
    """Rows (label, words) of what a text showed of a decoder, see ``ArtifactInfo.decoding``."""
    first, last = (found["by_position"][i]["relative_l2"] for i in (0, -1))
    held = f"{size(found['cache_bytes'])} for {context} tokens, {found['cache_bytes'] / context:g} bytes each"
    return [
        (
            "perplexity",
            f"{found['perplexity']:.5g} over {found['positions']} positions of {found['data']}, PyTorch "
            f"{found['perplexity_reference']:.5g}: ratio {found['perplexity_ratio']:.4f}, allowed {found['bound']:g}",
        ),
        (
            "agreement",
            f"KL {found['kl']:.2e} nats, {found['kl_max']:.2e} at most; top-1 agreement {found['top1_agreement']:.2%}",
        ),
        (
            "drift",
            f"relative L2 {first:.2e} in the first eighth of {found['steps']} steps, {last:.2e} in the last; decoded "
            f"against prefilled {found['prefill_against_decode']:.2e}",
        ),
        ("greedy", f"{found['greedy']['same']} of {found['greedy']['of']} tokens until it differs from PyTorch's"),
        ("cache", held if found["cache_bytes"] else f"kept by the runtime, for {context} tokens"),
    ]


def optics_rows(found: dict[str, Any], device: str) -> list[tuple[str, str]]:
    """Rows (label, words) of what an optical program costs, see ``ArtifactInfo.facts``."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in found["operations"].items())
    parts = ", ".join(f"{name} {duration(value)}" for name, value in found["seconds"].items() if value)
    return [
        (
            "on optics",
            f"{found['share']:.1%} of {found['optical_macs'] + found['electronic_ops']:,} operations: {kinds}; plans "
            f"carried out, largest relative L2 {found['largest_error']:.1e}",
        ),
        (
            "frames",
            f"{found['frames']} of {device} for one input, {found['mask_writes']} masks; zones lie on "
            f"{found['fill']:.1%} of the planes, {found['macs_a_pixel']:.2g} multiplications of use behind a pixel",
        ),
        ("time", f"{duration(found['total_s'])} for one input, computed: {parts}"),
    ]


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
