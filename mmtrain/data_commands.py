"""The commands that show data. Each imports its modules when it runs."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from mmtrain.api import load_config
from mmtrain.config_commands import ConfigPath, Html, Json, Overrides


def inspect_data(
    config: ConfigPath,
    overrides: Overrides = None,
    html: Html = None,
    json: Json = False,
) -> None:
    """Count samples, lengths, images, roles and duplicates, and what train and eval have in common."""
    loaded = load_config(config, overrides or [])
    from mmtrain.inspect_data.command import inspect_data as run

    raise typer.Exit(run(loaded, json, html))


def inspect_labels(
    config: ConfigPath,
    overrides: Overrides = None,
    index: Annotated[list[int] | None, typer.Option(help="The index of a sample to show; may be repeated.")] = None,
    num: Annotated[
        int | None,
        typer.Option(min=1, help="How many samples to show.", show_default="3; of pairs the queries of a step, 12"),
    ] = None,
    split: Annotated[Literal["train", "eval"], typer.Option(help="The sources: data.train or data.eval.")] = "train",
    html: Html = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object per sample.")] = False,
    tokens: Annotated[bool, typer.Option("--tokens", help="With --json: include every token.")] = False,
    audit: Annotated[bool, typer.Option("--all", help="Check every sample; exit 1 if any has a fault.")] = False,
    losses: Annotated[bool, typer.Option("--losses", help="Load the model and show each token's loss.")] = False,
    adapter: Annotated[Path | None, typer.Option(help="With --losses: an adapter.", show_default=False)] = None,
) -> None:
    """Show which tokens are trained on or which pairs are compared, or check every sample."""
    loaded = load_config(config, overrides or [])
    from mmtrain.inspect_labels.command import inspect_labels as run
    from mmtrain.inspect_labels.options import LabelsOptions

    options = LabelsOptions(
        split=split,
        indices=tuple(index or ()),
        num=num,
        html=html,
        all=audit,
        json=json,
        tokens=tokens,
        losses=losses,
        adapter=adapter,
    )
    raise typer.Exit(run(loaded, options))
