"""What is reported is shown where a person can see it, and always ticks the watchdog."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from mmtrain.progress import Progress
from mmtrain.train.report import StepReporter


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


@pytest.mark.parametrize(("terminal", "expected"), [(False, [1, 2, 5]), (True, [5])])
def test_steps_are_reported_in_lines_a_few_seconds_apart_where_no_bar_shows_them(
    terminal: bool, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps end after 100, 105, 106, 107 and 108 seconds; the last one is always reported."""
    shown, clock = io.StringIO(), [0.0]
    row = {"loss": 2.5, "num_tokens": 3000, "seconds": 2.0, "mfu": 0.25, "learning_rate": 1e-3, "grad_norm": 0.5}
    progress = Progress(console=Console(file=shown, force_terminal=terminal, width=150))
    monkeypatch.setattr("mmtrain.train.report.time", SimpleNamespace(monotonic=lambda: clock[0]))
    with progress.task("step", 5) as task:
        memory = iter([2**30, 3 * 2**30, *[2**31] * 3])
        reporter = StepReporter(5, 4, task, progress, lambda: next(memory))
        for step, clock[0] in enumerate((100.0, 105.0, 106.0, 107.0, 108.0), start=1):
            reporter.report(row | {"step": step, "loss": 3.5 - step})
    figures = "lr 1.00e-03  grad 0.500  1,500 tok/s  25% mfu"
    wanted = {
        1: f"step 1/5  epoch 0.25  loss 2.5000 (average 2.5000)  {figures}  peak 1.0 GiB  ETA 6:40",
        2: f"step 2/5  epoch 0.50  loss 1.5000 (average 2.0000)  {figures}  peak 3.0 GiB  ETA 2:38",
        5: f"step 5/5  epoch 1.25  loss -1.5000 (average 0.5000)  {figures}  peak 3.0 GiB\n",
    }
    for step in expected:
        assert wanted[step] in shown.getvalue()
    assert shown.getvalue().count("lr 1.00e-03") == len(expected)
