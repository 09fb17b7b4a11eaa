"""Many tasks in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from edgeattn.cli._show import console

if TYPE_CHECKING:
    from edgeattn.pipeline.executor import Done, Task


class Tasks:
    """A ``Watcher``: how many cells are done, a line for each that runs, and one that stays for each that is done.

    Attributes:
        total, done: cells, those that were kept from before among them.
    """

    def __init__(self, total: int, kept: int = 0) -> None:
        self.total, self.done = total, kept
        self._console = console(err=True)
        words, time = TextColumn("{task.description}"), TimeElapsedColumn()
        self._bar = Progress(words, BarColumn(24), MofNCompleteColumn(), time)
        self._all = self._bar.add_task("[bold]exports[/bold]", total=total, completed=kept)
        self._running = Progress(SpinnerColumn(), words, time)
        self._live: Live | None = None
        self._lines: dict[str, TaskID] = {}

    def __enter__(self) -> Tasks:
        if self.done:
            self._console.print(f"{self.total} cells, {self.done} of them done before")
        if self._console.is_terminal:
            self._live = Live(Group(self._bar, self._running), console=self._console, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        """Show what goes on when no task runs."""
        self._take_off("")
        self._lines[""] = self._running.add_task(escape(text), total=None)

    def started(self, task: Task, attempt: int) -> None:
        """See ``Watcher``."""
        self._take_off(task.key)
        if attempt > 1:
            self._console.print(f"  its process died, started again: {escape(task.label)}", style="yellow")
        self._lines[task.key] = self._running.add_task(escape(task.label), total=None)

    def said(self, task: Task, text: str) -> None:
        """See ``Watcher``."""
        words = f"{escape(task.label)} [dim]{escape(text[:60])}[/dim]"
        self._running.update(self._lines[task.key], description=words)

    def finished(self, task: Task, done: Done) -> None:
        """See ``Watcher``; the task is a cell, see ``pipeline.cells.run_cell``."""
        self._take_off(task.key)
        self.done += 1
        self._bar.update(self._all, completed=self.done)
        outcome = done.result or {"held": False, "stage": "", "error": done.error}
        state = "[green]held  [/green]" if outcome["held"] else "[bold red]failed[/bold red]"
        error = outcome["error"] or {}
        where = "" if outcome["held"] else f"  {outcome['stage']}: {error.get('what', '')}"
        count = f"{self.done}/{self.total}"
        self._console.print(
            f"  {count:>9}  {state} {done.seconds:6.1f} s  {escape(task.label + where)}", soft_wrap=True
        )

    def _take_off(self, key: str) -> None:
        if key in self._lines:
            self._running.remove_task(self._lines.pop(key))
