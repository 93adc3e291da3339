"""`mmtrain eval`: the commands that measure a model. Each imports its modules when it runs."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from mmtrain.api import load_config
from mmtrain.config_commands import Adapter, ConfigPath, DataFiles, Html, Json, KeysCommand, Overrides, Processes

eval_app = typer.Typer(help="Measure a model on held-out data.", no_args_is_help=True)


@eval_app.command(cls=KeysCommand)
def perplexity(
    config: ConfigPath,
    overrides: Overrides = None,
    adapter: Adapter = None,
    compare: Annotated[
        str | None,
        typer.Option(metavar="ADAPTER...", help="Adapters, or `base`, on the same tokens; the first is the reference."),
    ] = None,
    data: DataFiles = None,
    images: Annotated[
        Literal["right", "all"], typer.Option(help="all: also with swapped, grey and no images.")
    ] = "right",
    json: Json = False,
) -> None:
    """Measure how likely the right answers are, and whether the model uses the images."""
    words = overrides or []
    compared = [compare, *(word for word in words if "=" not in word)] if compare is not None else []
    loaded = load_config(config, [word for word in words if word not in compared])
    from mmtrain.evaluate.command import PerplexityOptions, eval_perplexity

    eval_perplexity(loaded, PerplexityOptions(adapter, tuple(compared), tuple(data or ()), images == "all", json))


@eval_app.command(cls=KeysCommand)
def answers(
    config: ConfigPath,
    overrides: Overrides = None,
    adapter: Adapter = None,
    data: DataFiles = None,
    metric: Annotated[
        str | None,
        typer.Option(help="How answers are scored.", show_default="each source's, or one that suits it"),
    ] = None,
    json: Json = False,
    html: Html = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 16,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="The longest answer.", show_default="twice the longest reference")
    ] = None,
    processes: Processes = 1,
) -> None:
    """Measure how good the answers are, and whether they are better than blind guessing."""
    from mmtrain.runtime.launch import launch_again

    launch_again(processes)
    loaded = load_config(config, overrides or [])
    from mmtrain.answers.command import AnswersOptions, eval_answers

    eval_answers(loaded, AnswersOptions(adapter, tuple(data or ()), metric, html, json, batch_size, max_new_tokens))


@eval_app.command(cls=KeysCommand)
def retrieval(
    config: ConfigPath,
    overrides: Overrides = None,
    adapter: Adapter = None,
    compare: Annotated[
        Literal["base"] | None, typer.Option(help="Compare with the base model.", show_default=False)
    ] = None,
    data: DataFiles = None,
    classes: Annotated[
        Path | None,
        typer.Option(help="Classify images too: a file with one class on each line.", show_default=False),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(help="The text of a class, such as 'a photo of a {}'; may be repeated.", show_default="{}"),
    ] = None,
    json: Json = False,
    html: Html = None,
) -> None:
    """Measure how well images find their texts, or queries their documents, and the other way round."""
    loaded = load_config(config, overrides or [])
    from mmtrain.retrieval.command import RetrievalOptions, eval_retrieval

    options = RetrievalOptions(adapter, compare, tuple(data or ()), classes, tuple(template or ()), html, json)
    eval_retrieval(loaded, options)
