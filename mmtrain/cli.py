"""The commands. Each imports its modules when it runs, so that `--help` is fast."""

import errno
import gc
import io
import os
import signal
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal

import typer

from mmtrain import __version__, api
from mmtrain.config_commands import ConfigPath, KeysCommand, Overrides, config_app
from mmtrain.data_commands import inspect_data, inspect_labels
from mmtrain.errors import UserError, grouped, refused_by_system
from mmtrain.eval_commands import eval_app
from mmtrain.model_commands import compose, inspect_model, merge
from mmtrain.run_commands import plan, report, runs
from mmtrain.runtime.environment import ignore_lost_stderr, set_environment

MAX_LINES_SHOWN = 100

app = typer.Typer(
    name="mmtrain",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(eval_app, name="eval")
app.add_typer(config_app, name="config")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mmtrain {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fine-tune vision-language models on your own image-text conversations."""


@app.command()
def init(
    model: Annotated[
        str, typer.Option(prompt="Model (a directory, or an id in the hub cache)", help="A model directory or hub id.")
    ],
    data: Annotated[str, typer.Option(prompt="Training data (a .jsonl file)", help="The training data.")],
    evaluation: Annotated[str | None, typer.Option("--eval", help="The evaluation data.", show_default=False)] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="A new file.")] = Path("config.yaml"),
    chat_template: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A chat template in Jinja, for a model without one.", show_default=False),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="What the user asks, for data that has only replies, such as captions.", show_default=False),
    ] = None,
) -> None:
    """Write a first config for a model, your data and this machine; asks for what is not given."""
    from mmtrain.init import command
    from mmtrain.init.options import InitOptions

    if prompt is None and command.needs_prompt(model, data):
        prompt = typer.prompt('What the user asks for each reply, such as "Describe this image."')
    command.init(InitOptions(model, data, evaluation, output, chat_template, prompt))


@app.command(cls=KeysCommand)
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete an earlier run in run.output_dir and start over.")
    ] = False,
    accept_change: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Resume although KEY changed since the checkpoint; may be repeated."),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Processes on this node.", show_default="one per GPU, or one")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the run; start the command on each.")] = 1,
    node_rank: Annotated[int, typer.Option(min=0, help="The number of this node, from 0.")] = 0,
    rendezvous: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="The address of node 0, a free port.", show_default=False)
    ] = None,
    max_restarts: Annotated[int, typer.Option(min=0, help="Restarts after a process has died.")] = 3,
) -> None:
    """Train a model. The same command resumes from the newest checkpoint."""
    from mmtrain.runtime import launch

    loaded = api.load_config(config, overrides or [])
    options = launch.LaunchOptions(processes, nodes, node_rank, rendezvous, max_restarts)
    options.check()
    launch.quiet()
    if not (nodes == 1 and processes is None and launch.takes_part()):
        num_local = processes or launch.num_local_gpus(loaded.run.device) or 1
        if num_local * nodes > 1:
            from mmtrain.train.folder import reserved

            args = [str(config), *(overrides or []), *(f"--accept-change={key}" for key in accept_change or [])]
            with reserved(loaded, fresh, node_rank):
                raise typer.Exit(launch.launch(options, num_local, ["train", *args]))
    api.train(loaded, fresh, accept_change or [])


app.command(cls=KeysCommand)(inspect_data)
app.command(cls=KeysCommand)(inspect_labels)
app.command()(inspect_model)
app.command()(compose)
app.command()(merge)


app.command()(runs)
app.command()(report)
app.command(cls=KeysCommand)(plan)


@app.command()
def generate(
    path: Annotated[
        str, typer.Argument(metavar="RUN", help="The directory of a run, an adapter or a model.", show_default=False)
    ],
    question: Annotated[str | None, typer.Argument(help="What to ask.", show_default=False)] = None,
    image: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="An image for the question; may be repeated.")
    ] = None,
    interactive: Annotated[bool, typer.Option("--interactive", "-i", help="Chat with the model.")] = False,
    system: Annotated[str | None, typer.Option(help="A system prompt.", show_default=False)] = None,
    data: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Answer all questions of a data file; may be repeated.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="With --data: where the answers go.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The base model of an adapter.", show_default="the one it names")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(help="The type of the weights.", show_default="the run's, or bfloat16"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="With --data: questions at a time.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest reply, in tokens.")] = 256,
    do_sample: Annotated[bool, typer.Option("--do-sample", help="Sample instead of the most likely token.")] = False,
    temperature: Annotated[float | None, typer.Option(help="With --do-sample.", show_default="1.0")] = None,
    top_p: Annotated[float | None, typer.Option(help="With --do-sample.", show_default="1.0")] = None,
    top_k: Annotated[int | None, typer.Option(help="With --do-sample.", show_default="50")] = None,
    num_beams: Annotated[int, typer.Option(min=1, help="Beams of a beam search.")] = 1,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 repetition is penalized.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="With --do-sample: decides what is sampled.")] = 0,
    processes: Annotated[int, typer.Option(min=1, max=1024, help="With --data: processes on this machine.")] = 1,
) -> None:
    """Ask a trained model: one question, a chat (-i), or all questions of a file (--data)."""
    from mmtrain.runtime.launch import launch_again

    launch_again(processes)
    from mmtrain.generate.command import GenerateOptions
    from mmtrain.generate.command import generate as run
    from mmtrain.generate.sampling import Sampling

    sampling = Sampling(max_new_tokens, do_sample, temperature, top_p, top_k, num_beams, repetition_penalty, seed)
    options = GenerateOptions(
        path, question, tuple(image or ()), interactive, system, tuple(data or ()), output, base, dtype, batch_size,
        sampling,
    )  # fmt: skip
    options.check()
    if question is None:
        run(options)
        return
    (reply,) = api.generate(path, [question], image or (), base, system=system, dtype=dtype, **asdict(sampling))
    print(reply)


def main() -> None:
    """The entry point. A UserError is printed without a traceback."""
    set_environment()
    ignore_lost_stderr()
    gc.set_threshold(700, 10, 100)  # with the usual 10 it looks at all that importing torch makes 7 times: a second
    if isinstance(sys.stdout, io.TextIOWrapper):  # as stderr does: an odd file name must not make a command fail
        sys.stdout.reconfigure(errors="backslashreplace")
    # peft uses deprecated names of transformers: a user cannot act on these warnings
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    interrupts = _noted_interrupts()
    try:
        try:
            app()
        finally:
            _flush_stdout()
    except (KeyboardInterrupt, Exception) as error:
        if interrupts or isinstance(error, KeyboardInterrupt):
            print("mmtrain: interrupted", file=sys.stderr)
            sys.exit(130)
        error = refused_by_system(error) or error
        if not isinstance(error, UserError):
            raise
        lines = [] if error.already_reported else grouped(error.faults)
        for line in lines[:MAX_LINES_SHOWN]:
            print(f"mmtrain: {line}", file=sys.stderr)
        if len(lines) > MAX_LINES_SHOWN:
            print(f"mmtrain: and {len(lines) - MAX_LINES_SHOWN:,} more", file=sys.stderr)
        sys.exit(error.exit_code)


def _flush_stdout() -> None:
    """Write what is left of the output; where nobody reads it or its disk is full, it is not tried again at the exit.
    Raises OSError."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
        if error.errno != errno.EPIPE:
            raise


def _noted_interrupts() -> list[int]:
    """A list that has an item after Ctrl-C: a library that is being imported can turn it into an error of its own."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        signal.default_int_handler(number, frame)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, note)
    return noted
