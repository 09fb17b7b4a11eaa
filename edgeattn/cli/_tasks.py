"""Many tasks in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from edgeattn.cli._show import console

if TYPE_CHECKING:
    from edgeattn.pipeline.executor import Done, Task


class Tasks:
    """A ``Watcher``: a line for each running task, and one that stays for each that is done."""

    def __init__(self) -> None:
        self._console = console(err=True)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self._bar = Progress(*columns, console=self._console, transient=True) if self._console.is_terminal else None
        self._lines: dict[str, TaskID] = {}

    def __enter__(self) -> Tasks:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Show what goes on beside the tasks; an empty text takes it off."""
        if not self._bar:
            return
        if "" in self._lines:
            self._bar.remove_task(self._lines.pop(""))
        if text:
            self._lines[""] = self._bar.add_task(escape(text), total=None)

    def started(self, task: Task, attempt: int) -> None:
        """See ``Watcher``."""
        if self._bar:
            again = f" (attempt {attempt})" if attempt > 1 else ""
            self._lines[task.key] = self._bar.add_task(f"[bold]{escape(task.label)}[/bold]{again}", total=None)
        elif attempt > 1:
            self._console.print(f"  {escape(task.label)}: its process died; once more", soft_wrap=True)

    def said(self, task: Task, text: str) -> None:
        """See ``Watcher``."""
        if self._bar and task.key in self._lines:
            words = f"[bold]{escape(task.label)}[/bold] {escape(text)}"
            self._bar.update(self._lines[task.key], description=words)

    def finished(self, task: Task, done: Done) -> None:
        """See ``Watcher``."""
        if self._bar and task.key in self._lines:
            self._bar.remove_task(self._lines.pop(task.key))
        held = done.result is not None and done.result.get("held")
        words = "[green]held[/green]" if held else "[red]did not hold[/red]"
        self._console.print(f"  {escape(task.label):<44} {words}  {done.seconds:6.1f} s", soft_wrap=True)
