"""The commands that show, compose and merge models. Each imports its modules when it runs."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from mmtrain.config_commands import Json


def inspect_model(
    path: Annotated[str, typer.Argument(metavar="MODEL", help="A model directory, or an id in the local hub cache.")],
    json: Json = False,
    chat_template: Annotated[
        str | None, typer.Option(metavar="FILE", help="A chat template, as model.chat_template.", show_default=False)
    ] = None,
) -> None:
    """Show what a model is made of, how it takes text and images, and what can be trained."""
    from mmtrain.inspect_model.command import inspect_model as run

    run(path, json, chat_template)


def compose(
    vision: Annotated[str, typer.Option(metavar="MODEL", help="An image encoder: CLIP, SigLIP, DINOv2 or another.")],
    language: Annotated[str, typer.Option(metavar="MODEL", help="A causal language model with a chat template.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="A new directory for the model.")],
    projector: Annotated[
        Literal["mlp2x-gelu", "linear", "pixel-shuffle"], typer.Option(help="The new layers between them.")
    ] = "mlp2x-gelu",
    feature_layer: Annotated[
        int, typer.Option(help="The hidden states of the encoder that are the image's features.")
    ] = -2,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Cast both models to this type.", show_default="the type of both"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides the new weights.")] = 0,
) -> None:
    """Make one image-text model of an image encoder and a language model, with a new projector to train."""
    from mmtrain.compose.command import ComposeOptions
    from mmtrain.compose.command import compose as run

    run(ComposeOptions(vision, language, output, projector, feature_layer, dtype, seed))


def merge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run or of an adapter.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="A new directory for the model.")],
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The base model.", show_default="the one of the run")
    ] = None,
) -> None:
    """Merge an adapter into its base model: one model that transformers, vLLM and others load."""
    from mmtrain.merge.command import merge as run_merge

    run_merge(run, output, base)
