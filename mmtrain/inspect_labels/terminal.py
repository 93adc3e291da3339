"""A sample in the terminal, in 80 columns: it is clear what is trained on, with or without colour."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmtrain.inspect_labels.view import ImageView, SampleView, SpanView, TokenView
from mmtrain.safe_text import counted, visible

SUPERVISED = "▌"
"""Marks lines that are trained on, also without colour."""
_STYLE = {True: "bold green", False: "dim"}
NUM_SURPRISING = 5


def print_sample(view: SampleView, console: Console, losses: Mapping[int, float] | None = None) -> None:
    """Print the conversation by turns, then pairs of input and target that show the shift by one."""
    share = view.num_supervised / len(view.tokens)
    console.print(Text(f"{visible(str(view.place))} · sample {view.name}", style="bold", overflow="fold"))
    images = f", {counted(len(view.images), 'image')}" if view.images else ""
    shape = f", read as {view.conversation.shape}" if view.conversation.shape else ""
    console.print(
        f"{counted(len(view.tokens), 'token')}, {view.num_supervised:,} trained on ({share:.1%}){images}{shape}",
        style="dim",
    )
    console.print(_spans(view))
    console.print(_pairs(view.tokens))
    if losses:
        console.print(_highest_losses(view.tokens, losses))
    console.print()


def _grid() -> Table:
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(width=1)
    table.add_column(width=9)
    table.add_column(ratio=1, overflow="fold")
    return table


def _spans(view: SampleView) -> Table:
    images = {image.start: image for image in view.images}
    table = _grid()
    for supervised, group in groupby(view.spans, key=lambda span: span.supervised):
        for role, text in _lines(list(group), images, supervised):
            table.add_row(SUPERVISED if supervised else "", Text(role, style="dim"), text, style=_STYLE[supervised])
    return table


def _lines(spans: Sequence[SpanView], images: Mapping[int, ImageView], supervised: bool) -> Iterable[tuple[str, Text]]:
    """A line for each span; a reply and the token that ends its turn are one line."""
    if supervised:
        weight = spans[0].weight
        name = spans[0].role if weight == 1 else f"×{weight:g}"
        yield name, Text("".join(visible(span.text) for span in spans))
        return
    for span in spans:
        yield span.role, _image(images[span.start]) if span.kind == "image" else Text(visible(span.text))


def _image(image: ImageView) -> Text:
    width, height = image.found.size
    used_width, used_height = image.tokens.used_size
    grid = f", {image.tokens.grid[0]}×{image.tokens.grid[1]}" if image.tokens.grid else ""
    return Text(
        f"▣ {visible(image.found.name)}  {width}×{height} → {used_width}×{used_height}  "
        f"{image.tokens.num_placeholders} placeholders{grid}",
        style="cyan",
    )


def _pairs(tokens: Sequence[TokenView]) -> Table:
    """The pairs around the first and the last supervised token: the token at one position predicts the next."""
    supervised = [token.position for token in tokens if token.supervised]
    around = {p + shift for p in (supervised[0], supervised[-1]) for shift in (-1, 0, 1)}
    chosen = sorted(p for p in around if 0 < p < len(tokens))
    table = Table.grid(padding=(0, 1))
    for justify in ("left", "right", "left", "left", "left"):
        table.add_column(justify=justify, overflow="fold", max_width=28)
    table.add_row("", "position", "input", "", "target", style="dim")
    last = chosen[0]
    for p in chosen:
        if p > last + 1:
            table.add_row("", "…", "", "", "", style="dim")
        last = p
        target = tokens[p]
        mark = SUPERVISED if target.supervised else ""
        label = f"{visible(target.text)} ({target.id})" if target.supervised else f"{visible(target.text)} (-100)"
        table.add_row(mark, str(p - 1), visible(tokens[p - 1].text), "→", label, style=_STYLE[target.supervised])
    return table


def _highest_losses(tokens: Sequence[TokenView], losses: Mapping[int, float]) -> Table:
    """The supervised tokens with the highest losses, in nats."""
    mean = sum(losses.values()) / len(losses)
    table = _grid()
    table.add_row("", "nats", f"mean {mean:.3f} over {len(losses)} supervised tokens; highest:", style="dim")
    for position in sorted(losses, key=lambda p: -losses[p])[:NUM_SURPRISING]:
        table.add_row("", f"{losses[position]:.3f}", f"{visible(tokens[position].text)} at {position}")
    return table
