"""Samples as one HTML page that needs no network: tokens with labels, images with their patch grid, losses.

The page is the template `page.html`. Jinja escapes all text of a sample, and the page's content security policy runs
no script except `page.js`.
"""

import base64
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

import PIL.Image
from markupsafe import Markup, escape

from mmtrain.command_output import page_environment
from mmtrain.encoding.thumbnails import data_uri
from mmtrain.inspect_labels.page_tokens import Cell, Turn, is_visible, turns_of
from mmtrain.inspect_labels.pixels import Pixels, resized
from mmtrain.inspect_labels.view import ImageView, SampleView
from mmtrain.records.chat import SampleError
from mmtrain.safe_text import counted

Losses = Mapping[int, Mapping[int, float]]

FULL_SHADE = 6.0
"""Nats at which a token has the full shade: a probability of 1 in 400. Fixed, so that pages can be compared."""
NUM_SURPRISING = 20
_SAVED_SIDE = 1024
"""Pixels: the longer side of an image on the page."""
_WHITE_SPACE = {" ": "s", "\n": "n", "\t": "b"}  # the classes that page.css draws as signs


@dataclass(frozen=True, slots=True)
class _ShownSample:
    view: SampleView
    turns: tuple[Turn, ...]
    losses: Mapping[int, float]


def page_of_samples(views: Sequence[SampleView], losses: Losses | None = None, pixels: Pixels = resized) -> str:
    """The page that shows `views`.

    `losses[index][position]` is the negative log-likelihood (nats) of that supervised token. `pixels` makes the image
    that the vision encoder sees; one that is not of the used size is shown without a grid.
    """
    environment = page_environment("mmtrain.inspect_labels")
    environment.filters |= {"drawn": _drawn, "plain": _plain, "count": counted, "shade": _shade}
    environment.filters["data_uri"] = functools.partial(data_uri, side=_SAVED_SIDE)
    script = resources.files(__package__).joinpath("page.js").read_text(encoding="utf-8")
    samples = [_ShownSample(view, turns_of(view), (losses or {}).get(view.index, {})) for view in views]
    return environment.get_template("page.html").render(
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        full_shade=FULL_SHADE if losses is not None else None,
        samples=samples,
        surprising=_surprising(samples),
        exp=math.exp,
        seen=lambda image: _made_or_reason(image, pixels),
    )


def _surprising(samples: Sequence[_ShownSample]) -> list[tuple[float, str, Cell]]:
    """(loss, name of the sample, token) of the supervised tokens with the highest losses; those that are not finite
    are first."""
    found = [
        (sample.losses[cell.token.position], sample.view.name, cell)
        for sample in samples
        for turn in sample.turns
        for run in turn.runs
        for cell in run.cells
        if cell.token.supervised and cell.token.position in sample.losses
    ]
    found.sort(key=lambda item: (math.isfinite(item[0]), -item[0] if math.isfinite(item[0]) else 0))
    return found[:NUM_SURPRISING]


# --- filters of the template


def _drawn(text: str) -> Markup:
    """`text` with white space as signs; a character that is invisible or reverses the text shows as its number."""
    return Markup("").join(map(_character, text))


def _character(character: str) -> Markup:
    if character in _WHITE_SPACE:
        return Markup(f'<i class="{_WHITE_SPACE[character]}">{character}</i>')
    if not is_visible(character):
        return Markup(f'<i class="c" data-c="U+{ord(character):04X}"></i>')
    return escape(character)


def _plain(text: str) -> str:
    """`text` on one line, invisible characters as escapes: for attributes and names."""
    return "".join(c if is_visible(c) else c.encode("unicode_escape").decode() for c in text)


def _shade(loss: float) -> float:
    return min(max(loss, 0.0) / FULL_SHADE, 1.0) if math.isfinite(loss) else 1.0


# --- images


def _made_or_reason(image: ImageView, pixels: Pixels) -> PIL.Image.Image | str:
    try:
        return pixels(image)
    except SampleError as error:
        return str(error)
