"""`mmtrain inspect-model`: prints what was found in a model directory."""

import textwrap
from collections.abc import Iterator
from dataclasses import asdict

from mmtrain.command_output import print_json
from mmtrain.inspect_model.find import ImagesFound, ModelFound, TemplateFound, find
from mmtrain.inspect_model.trainable_components import ComponentFound
from mmtrain.progress import Progress
from mmtrain.safe_text import counted, shown, visible

_WIDTH, _LABEL = 80, 14


def inspect_model(path: str, as_json: bool, chat_template: str | None = None) -> None:
    """Print what is found. `chat_template`: the file with the chat template in place of the model's own.

    Raises UserError where the model cannot be trained at all.
    """
    found = find(path, Progress().say, chat_template)
    if as_json:
        print_json(asdict(found))
    else:
        print("\n".join(lines(found)))


def lines(found: ModelFound) -> Iterator[str]:
    """The lines of at most 80 columns."""
    yield from _row("model", visible(found.path))
    yield from _row("class", f"{found.model_class} in {found.dtype}")
    for component in found.components:
        yield from _component(component)
    yield from _images(found.images)
    yield from _template(found.template)
    if found.encoding is not None:
        yield from _row("ids", *found.encoding.lines())
    kinds = {"plain": "a linear layer: logits in chunks", "own": "of its own kind: all logits of a batch at once"}
    yield from _row("head", kinds[found.head])
    yield from _row(
        "packing", "on: packed rows equal samples alone" if found.packing is None else f"off, {found.packing}"
    )
    if found.images is not None:
        yield from _row(
            "image cache",
            "on: cached features equal pixels" if found.image_cache is None else f"off, {found.image_cache}",
        )


def _row(label: str, *values: str) -> Iterator[str]:
    """Each of the values from column 15 on, wrapped; the label before the first."""
    for value in values:
        for line in textwrap.wrap(value, _WIDTH - _LABEL):
            yield f"{label:{_LABEL}}{line}"
            label = ""


def _component(found: ComponentFound) -> Iterator[str]:
    share = found.num_without_adapter / found.num_parameters
    prefix = f"tune.{found.name}: "
    refused = [f"not {mode}: {why.removeprefix(prefix)}" for mode, why in found.modes.items() if why is not None]
    accepted = ["frozen", *(mode for mode, why in found.modes.items() if why is None)]
    inside = f" in {', '.join(found.modules)}" if found.modules else ""
    yield from _row(
        found.name,
        f"{found.num_parameters:,} parameters{inside}",
        f"linear layers for LoRA: {found.num_adapted}; without an adapter: {found.num_without_adapter:,} ({share:.1%})",
        f"{prefix}{', '.join(accepted)}",
        *refused,
    )


def _images(found: ImagesFound | None) -> Iterator[str]:
    if found is None:
        yield from _row("images", "none: a model of text alone")
        return
    counts = []
    for size, number in found.num_tokens.items():
        placeholders = found.num_placeholders.get(size, number)
        more = "" if placeholders == number else f", {placeholders:,} of them placeholders"
        counts.append(f"{size}: {number}" if isinstance(number, str) else f"{size}: {counted(number, 'token')}{more}")
    yield from _row("images", f"placeholder {shown(found.placeholder)}", *counts)


def _template(found: TemplateFound) -> Iterator[str]:
    if found.reply_end is not None:
        yield from _row("end of reply", shown(found.reply_end))
    elif found.added_end is not None:
        yield from _row("end of reply", f"none in the template; {shown(found.added_end)} is added")
    else:
        yield from _row("end of reply", "none: set labels.end_of_turn to false")
    yield from _row(
        "template",
        f"content as a string for: {', '.join(found.text_roles) or 'no role'}; as a list of parts for the others",
        f"system turns: {'shown' if found.takes_system else 'refused or dropped'}",
    )
    prompt = found.generation_prompt
    yield from _row("reply prompt", "not an addition to the user's turn" if prompt is None else shown(prompt))
