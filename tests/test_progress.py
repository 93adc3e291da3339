"""What is reported is shown where a person can see it, and always ticks the watchdog."""

import io

import pytest
from rich.console import Console

from mmtrain.progress import Progress


def terminal() -> tuple[Progress, io.StringIO]:
    shown = io.StringIO()
    return Progress(console=Console(file=shown, force_terminal=True, width=100)), shown


def test_lines_go_to_standard_error_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    line = "data/[red]:smile:/a.jsonl:7 " + "x" * 200
    Progress().say(line)
    assert capsys.readouterr() == ("", line + "\n")


def test_a_quiet_one_shows_nothing_and_ticks(capsys: pytest.CaptureFixture[str]) -> None:
    ticks: list[int] = []
    progress = Progress(lambda: ticks.append(1), quiet=True)
    progress.say("a line")
    with progress.task("counting", 3) as task:
        task.advance(2)
        task.advance()
    assert capsys.readouterr() == ("", "")
    assert len(ticks) == 3


def test_a_task_has_a_bar_on_a_terminal_alone(capsys: pytest.CaptureFixture[str]) -> None:
    progress, shown = terminal()
    for one in (progress, Progress()):
        with one.task("counting [b]", 8, done=2) as task:
            task.advance(3)
            task.note("loss [i] 1.25")
            assert one._group is not None
            one._group.refresh()  # a thread does it, a few times a second
    assert progress.shows_bars
    assert capsys.readouterr() == ("", "")
    assert "counting [b]" in shown.getvalue()
    assert "5/8" in shown.getvalue()
    assert "loss [i] 1.25" in shown.getvalue()


def test_tasks_nest_and_end_with_an_error() -> None:
    progress, shown = terminal()
    with progress.task("outer", 1):
        with pytest.raises(ValueError, match="broken"), progress.task("inner"):
            raise ValueError("broken")
        progress.say("a line above the bars")
    before = len(shown.getvalue())
    with progress.task("later", 1):
        pass
    assert "a line above the bars" in shown.getvalue()[:before]
    assert "inner" not in shown.getvalue()[before:]
    assert "later" in shown.getvalue()[before:]
