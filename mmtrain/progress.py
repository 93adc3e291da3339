"""What a command reports while it runs: lines and bars on standard error. Whatever is reported ticks the watchdog."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress as bars
from rich.console import Console
from rich.table import Table
from rich.text import Text


class _Count(bars.MofNCompleteColumn):
    """What is done of the total, where that is known."""

    def render(self, task: bars.Task) -> Text:
        return Text() if task.total is None else super().render(task)


class _TimeLeft(bars.TimeRemainingColumn):
    """The time left, with its label, where the total is known."""

    def render(self, task: bars.Task) -> Text:
        return Text() if task.total is None else Text("ETA ") + super().render(task)


class Task:
    """One task under way."""

    def __init__(self, group: bars.Progress, number: bars.TaskID, tick: Callable[[], None]) -> None:
        self._group, self._number, self._tick = group, number, tick

    def advance(self, number: int = 1) -> None:
        self._tick()
        self._group.advance(self._number, number)

    def note(self, text: str) -> None:
        """Show `text` next to the bar."""
        self._group.update(self._number, note=text)


class Progress:
    """The lines and bars of one process, for the person who watches it.

    `tick` is called with everything that is reported, so that a watchdog sees the process work. `quiet`: nothing is
    shown, for all processes of a run but the first. `console`: where it is shown, by default standard error.
    """

    def __init__(
        self, tick: Callable[[], None] = lambda: None, quiet: bool = False, console: Console | None = None
    ) -> None:
        self.tick = tick
        """Report that something was done, of which nothing is shown."""
        self._console = console or Console(stderr=True, quiet=quiet, highlight=False, emoji=False)
        self._group: bars.Progress | None = None

    @property
    def shows_bars(self) -> bool:
        """Whether tasks have bars: only on a terminal."""
        return self._console.is_terminal

    def say(self, line: str | Table) -> None:
        """Print a line, never wrapped and never read as markup, or a table."""
        self.tick()
        self._console.print(line, markup=False, highlight=False, soft_wrap=isinstance(line, str))

    @contextmanager
    def task(self, name: str, total: int | None = None, done: int = 0) -> Iterator[Task]:
        """A task, with a bar until the end of the block. `total`: None where it is not known. Tasks nest."""
        outermost = self._group is None
        self._group = self._group or self._new_group()
        group, number = self._group, self._group.add_task(name, total=total, completed=done, note="")
        try:
            if outermost:
                group.start()
            yield Task(group, number, self.tick)
        finally:
            group.remove_task(number)
            if outermost:
                group.stop()
                self._group = None

    def _new_group(self) -> bars.Progress:
        return bars.Progress(
            bars.TextColumn("{task.description}", markup=False),
            _Count(),
            bars.BarColumn(),
            bars.TextColumn("{task.fields[note]}", markup=False),
            _TimeLeft(compact=True),
            console=self._console,
            transient=True,
            disable=not self.shows_bars,
        )


QUIET = Progress(quiet=True)
"""Shows nothing and ticks nobody."""
