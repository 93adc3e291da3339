"""Samples as one HTML page that needs no network: words, labels, pictures with their patch grid, losses.

All text of a sample is foreign: it goes through `drawn` or `plain`, and the page's policy lets no
script run but its own.
"""

import base64
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import groupby, pairwise
from pathlib import Path

from mmtrain.inspect_labels.page_parts import Pixels, clusters, count, drawn, figure, plain, resized, visible
from mmtrain.inspect_labels.view import ImageView, SampleView, SpanView, TokenView

Losses = Mapping[int, Mapping[int, float]]

FULL_SHADE = 6.0
"""Nats at which a token is shaded in full: a probability of 1 in 400. Fixed, so that pages can be compared."""
NUM_SURPRISING = 20


@dataclass(frozen=True, slots=True)
class _Cell:
    """A token and the characters drawn for it; `part` says which part of one character it is, if it is no whole."""

    token: TokenView
    text: str
    part: str = ""

    @property
    def named(self) -> str:
        return self.part or self.token.text

    @property
    def is_plain(self) -> bool:
        """Whether what is drawn is all there is to say."""
        return not self.part and self.text == self.token.text and all(map(visible, self.text))


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring cells of one span and one turn, or a picture."""

    span: SpanView
    turn: int
    cells: tuple[_Cell, ...]
    image: ImageView | None = None


def write_page(
    path: Path,
    views: Sequence[SampleView],
    losses: Losses | None = None,
    title: str = "What the model is trained on",
    pixels: Pixels | None = None,
) -> None:
    """Write `views` to `path` as one page.

    `losses[index][position]` is the negative log-likelihood (nats) of that supervised token. `pixels` makes the
    picture that the vision encoder sees, at its used size; without it, a picture whose shape the model's processor
    changes (by cropping, padding or stretching) is shown whole, without a grid.
    """
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    runs = [tuple(_runs(view)) for view in views]
    surprising = _surprising(views, runs, losses or {})
    targets = {(view.index, cell.token.position) for _, view, cell in surprising}
    parts = {
        "title": plain(title),
        "policy": _script_hash(template),
        "summary": _summary(views),
        "legend": _legend() if losses is not None else "",
        "surprising": _surprising_list(surprising),
        "samples": "".join(
            _sample(view, mine, losses, targets, pixels or resized) for view, mine in zip(views, runs, strict=True)
        ),
    }
    page = re.sub(r"<!--(\w+)-->", lambda match: parts[match[1]], template)
    path.write_text(page, encoding="utf-8", newline="\n")


def _script_hash(template: str) -> str:
    script = template.partition("<script>")[2].partition("</script>")[0]
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


# --- what stands where


def _runs(view: SampleView) -> Iterator[_Run]:
    turns = _turns(view.tokens)
    images = {image.start: image for image in view.images}
    for span in view.spans:
        tokens = view.tokens[span.start : span.end]
        if span.start in images:
            yield _Run(span, turns[span.start], (), images[span.start])
            continue
        for turn, cells in groupby(_cells(tokens, span.text), key=lambda cell: turns[cell.token.position]):
            yield _Run(span, turn, tuple(cells))


def _turns(tokens: Sequence[TokenView]) -> list[int]:
    """The turn that each token is shown in.

    For the reader's eye only: what a template writes between two turns is cut where the token that begins the whole
    text comes again (`<|im_start|>`), or else at the second special token, behind the one that ends a turn.
    """
    turns: list[int] = []
    first = next((token.turn for token in tokens if token.turn is not None), 0)
    for token in tokens:
        turns.append(token.turn if token.turn is not None else turns[-1] if turns else first)
    for before, after in pairwise([token for token in tokens if token.role != "template"]):
        if turns[after.position] != turns[before.position] + 1:
            continue
        specials = [t for t in tokens[before.position + 1 : after.position] if t.kind == "special"]
        opening = [t.position for t in specials if t.id == tokens[0].id][-1:] or [t.position for t in specials[1:2]]
        for cut in opening:
            for position in range(before.position + 1, after.position):
                turns[position] = turns[before.position if position < cut else after.position]
    return turns


def _cells(tokens: Sequence[TokenView], text: str) -> Iterator[_Cell]:
    """Share out `text`, which the tokens decode to together, among them; none of it is lost or doubled.

    A token on its own may decode to less: part of a character, or a word without the space before it.
    """
    at, waiting = 0, list[TokenView]()
    for token in tokens:
        found = text.find(token.text, at) if token.text and "\ufffd" not in token.text else -1
        if found < 0 or (not waiting and text[at:found].strip()):
            waiting.append(token)
            continue
        if waiting:
            yield from _together(waiting, text[at:found])
            at, waiting = found, []
        end = found + len(token.text)
        yield _Cell(token, text[at:end])
        at = end
    if waiting:
        yield from _together(waiting, text[at:])


def _together(tokens: list[TokenView], text: str) -> Iterator[_Cell]:
    """Tokens that are no whole characters alone: by character where each is one byte, else all of them as one."""
    pieces = clusters(text) if len(text.encode(errors="replace")) == len(tokens) else [text]
    at = 0
    for piece in pieces:
        end = at + len(piece.encode(errors="replace")) if len(pieces) > 1 else len(tokens)
        for number, token in enumerate(tokens[at:end], start=1):
            part = f"part {number} of {end - at} of “{piece}”" if end - at > 1 else piece
            yield _Cell(token, piece if number == 1 else "", part)
        at = end


def _surprising(
    views: Sequence[SampleView], runs: list[tuple[_Run, ...]], losses: Losses
) -> list[tuple[float, SampleView, _Cell]]:
    """The supervised tokens with the highest losses; one that is not a number comes first."""
    found = [
        (loss, view, cell)
        for view, mine in zip(views, runs, strict=True)
        for run in mine
        for cell in run.cells
        if (loss := losses.get(view.index, {}).get(cell.token.position)) is not None and cell.token.supervised
    ]
    found.sort(key=lambda item: (math.isfinite(item[0]), -item[0] if math.isfinite(item[0]) else 0))
    return found[:NUM_SURPRISING]


# --- HTML


def _summary(views: Sequence[SampleView]) -> str:
    tokens = sum(len(view.tokens) for view in views)
    learned = sum(view.num_supervised for view in views)
    images = sum(len(view.images) for view in views)
    return f"{count(len(views), 'sample')} · {_learned(learned, tokens)} · {count(images, 'image')}"


def _learned(learned: int, tokens: int) -> str:
    return f"{count(tokens, 'token')}, {learned:,} trained on ({learned / max(tokens, 1):.1%})"


def _legend() -> str:
    marks = "".join(f"<span>{mark:g}</span>" for mark in (0, FULL_SHADE / 2))
    return (
        '<div class="scale"><span>negative log-likelihood, nats</span>'
        f'<div><div class="ramp"></div><div class="marks">{marks}<span>{FULL_SHADE:g} or more</span></div></div></div>'
    )


def _surprising_list(found: list[tuple[float, SampleView, _Cell]]) -> str:
    if not found:
        return ""
    rows = "".join(
        f'<li><a href="#s{view.index}-{cell.token.position}"><bdi class="word">{_shown(cell)}</bdi></a> '
        f'<span class="nll">{loss:.2f} nats, {_probability(loss)}</span> '
        f'<span class="where">sample {view.index}, position {cell.token.position}</span></li>'
        for loss, view, cell in found
    )
    name = count(len(found), "most surprising token")
    return f'<details class="surprising" open><summary>The {name}</summary><ol>{rows}</ol></details>'


def _shown(cell: _Cell) -> str:
    return plain(cell.part) if cell.part else drawn(cell.token.text)


def _probability(loss: float) -> str:
    return f"p = {math.exp(-loss):.2g}" if loss >= 0 else "p unknown"


def _sample(
    view: SampleView,
    runs: tuple[_Run, ...],
    losses: Losses | None,
    targets: set[tuple[int, int]],
    pixels: Pixels,
) -> str:
    mine = (losses or {}).get(view.index, {})
    facts = [_learned(view.num_supervised, len(view.tokens)), count(len(view.images), "image")]
    if mine:
        facts.append(f"mean {sum(mine.values()) / len(mine):.2f} nats")
    marked = {position for index, position in targets if index == view.index}
    turns = "".join(
        _turn(view, turn, tuple(group), mine, marked, pixels) for turn, group in groupby(runs, lambda run: run.turn)
    )
    return (
        f'<article id="s{view.index}"><header><h2>Sample {view.index}</h2>'
        f'<bdi class="place">{plain(str(view.place))}</bdi><span class="facts">{" · ".join(facts)}</span></header>'
        f'<div class="chat" tabindex="0" role="group" aria-label="Tokens of sample {view.index}; '
        f'arrow keys go from token to token">{turns}</div></article>\n'
    )


def _turn(
    view: SampleView, turn: int, runs: tuple[_Run, ...], losses: Mapping[int, float], marked: set[int], pixels: Pixels
) -> str:
    message = view.conversation.messages[turn]
    cells = [cell for run in runs for cell in run.cells]
    learned = sum(cell.token.supervised for cell in cells)
    size = len(cells) + sum(run.span.end - run.span.start for run in runs if run.image)
    badge = f"{learned} of {count(size, 'token')} trained on"
    if message.role == "assistant" and not message.train:
        badge += ": the record says not to train on this turn"
    has = " ".join(sorted({name for run in runs for name in _filters(run)}))
    body = "".join(
        figure(run.image, run.span, pixels) if run.image else _words(run, view.index, losses, marked) for run in runs
    )
    return (
        f'<section class="turn {message.role}" data-has="{has}"><h3>{message.role} <span>turn {turn}</span>'
        f'<em class="{"yes" if learned else "no"}">{badge}</em></h3><div class="words">{body}</div></section>'
    )


def _filters(run: _Run) -> list[str]:
    return [run.span.role, "learned"] if run.span.supervised else [run.span.role]


def _words(run: _Run, index: int, losses: Mapping[int, float], marked: set[int]) -> str:
    """A run of tokens, set apart from its neighbours whichever way it is written."""
    tokens = "".join(_token(cell, index, losses.get(cell.token.position), marked) for cell in run.cells)
    state = " on" if run.span.supervised else ""
    return (
        f'<bdi class="run{state}" data-has="{" ".join(_filters(run))}" data-role="{run.span.role}" '
        f'data-turn="{"" if run.span.turn is None else run.span.turn}">{tokens}</bdi>'
    )


def _token(cell: _Cell, index: int, loss: float | None, marked: set[int]) -> str:
    token = cell.token
    classes = ["t", *(["sp"] if token.kind == "special" else []), *(["part"] if not cell.text else [])]
    extra = ""
    if not cell.is_plain:
        extra += f' data-x="{plain(cell.named)}"'
    if loss is not None:
        shade = min(max(loss, 0.0) / FULL_SHADE, 1.0) if math.isfinite(loss) else 1.0
        classes.append("nll")
        extra += f' data-n="{loss:.3f}" style="--n:{shade:.2f}"'
    if token.position in marked:
        extra += f' id="s{index}-{token.position}"'
    return (
        f'<span class="{" ".join(classes)}" data-p="{token.position}" data-i="{token.id}" '
        f'data-l="{token.label}"{extra}>{drawn(cell.text)}</span>'
    )
