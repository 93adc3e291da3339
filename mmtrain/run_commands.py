"""The commands about runs: those that are there, and one that is not yet. Each imports its modules when it runs."""

from pathlib import Path
from typing import Annotated

import typer

from mmtrain.api import load_config
from mmtrain.config_commands import ConfigPath, Json, Overrides


def runs(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="A folder of runs, or a run.")] = Path("runs"),
) -> None:
    """List the runs in a folder: state, steps, loss, evaluation and time."""
    from mmtrain.train.run_list import print_runs

    print_runs(folder)


def report(
    run: Annotated[list[Path], typer.Argument(metavar="RUN...", help="The directory of a run; several are compared.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The page.", show_default="report.html in the run"),
    ] = None,
    json: Json = False,
) -> None:
    """Write one HTML page about a run, or about several side by side: curves, data, config, answers."""
    from mmtrain.report.command import report as write

    write(run, output, json)


def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    processes: Annotated[str, typer.Option(metavar="N,N,...", help="Numbers of processes to plan for.")] = "1,2,8",
    json: Json = False,
) -> None:
    """Show what a run will do and need before it is started: steps, memory per GPU, disk, time."""
    from mmtrain.plan.command import plan as run

    run(load_config(config, overrides or []), processes, json)
