"""A chat template's text without running the template: what it did with one conversation, repeated with other texts.

The template runs once for each form of conversation (roles, kinds of content) with stand-ins for the texts. A stand-in
records what the template does with it: what it makes of it (`strip`), and what it asks (`'</think>' in content`). The
template sees a text in no other way, so of texts that give the same answers it makes the same pieces, joined.

`encoding/traceable.py` says which templates can be traced. A stand-in that is used in a way that is not recorded spoils
the trace. A trace must give what Jinja gives for the conversation that it was made with, and then for one in
`_CHECKED_EVERY`.
"""

import operator
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Never

from mmtrain.encoding.messages import Render, Tools
from mmtrain.encoding.traceable import ASKED, MADE
from mmtrain.records.chat import Messages

_MAX_FORMS = 4096
_MAX_TRACES = 4
"""Of a form; conversations that give yet other answers are left to Jinja."""
_CHECKED_EVERY = 256
_KEYS = {"role", "content"}
_IMAGE = {"type": "image"}


class _UnknownUseError(Exception):
    """A stand-in was used in a way that is not recorded."""


class _Trace:
    """What a template did with the texts of one conversation."""

    def __init__(self, texts: list[str]) -> None:
        self.is_spoilt = False
        self.num_left = _CHECKED_EVERY
        """Conversations up to the next one that Jinja renders too."""
        self._values = texts.copy()
        self._steps: list[tuple[Callable[..., Any], tuple[Any, ...], bool | None]] = []
        """A function, its operands, and its answer; None: it makes the next value."""
        self._pieces: list[str] = []

    def stand_ins(self) -> list["_StandIn"]:
        return [_StandIn(self, number) for number in range(len(self._values))]

    def write(self, pieces: Iterator[str]) -> None:
        """Take the output of the template."""
        self._pieces.extend(pieces)
        self._places = [(i, piece._number) for i, piece in enumerate(self._pieces) if isinstance(piece, _StandIn)]

    def make(self, function: Callable[..., str], *operands: Any) -> "_StandIn":
        self._values.append(_applied(function, operands, self._values))
        self._steps.append((function, operands, None))
        return _StandIn(self, len(self._values) - 1)

    def ask(self, function: Callable[..., bool], *operands: Any) -> bool:
        answer: bool = _applied(function, operands, self._values)
        self._steps.append((function, operands, answer))
        return answer

    def text(self, texts: list[str]) -> str | None:
        """What the template makes of these texts; None where it would do something else."""
        values = texts.copy()
        for function, operands, answer in self._steps:
            found = _applied(function, operands, values)
            if answer is None:
                values.append(found)
            elif found is not answer:
                return None
        pieces = self._pieces.copy()
        for position, number in self._places:
            pieces[position] = values[number]
        return "".join(pieces)


def _applied(function: Callable[..., Any], operands: tuple[Any, ...], values: list[str]) -> Any:
    """`function` of operands, some of which stand for values."""
    return function(*[values[one._number] if isinstance(one, _StandIn) else one for one in operands])


class _StandIn(str):
    """Stands for a text. All that can be done with a text is recorded, or spoils the trace."""

    _trace: _Trace
    _number: int

    def __new__(cls, trace: _Trace, number: int) -> "_StandIn":
        made = super().__new__(cls, f"\ue000\"'\n\\<&{{é {number}\ue001")  # what reads it directly gives another text
        made._trace, made._number = trace, number
        return made

    def __str__(self) -> str:
        return self

    def __eq__(self, other: object) -> bool:
        return self._trace.ask(operator.eq, self, other) if isinstance(other, str) else NotImplemented

    def __ne__(self, other: object) -> bool:
        return self._trace.ask(operator.ne, self, other) if isinstance(other, str) else NotImplemented

    def __hash__(self) -> int:
        self._spoil()

    def __bool__(self) -> bool:
        return self._trace.ask(bool, self)

    def __contains__(self, other: object) -> bool:
        return self._trace.ask(operator.contains, self, other) if isinstance(other, str) else self._spoil()

    def __add__(self, other: str) -> "_StandIn":
        return self._trace.make(operator.add, self, other) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> "_StandIn":
        return self._trace.make(operator.add, other, self) if isinstance(other, str) else NotImplemented

    def __iter__(self) -> Iterator[str]:
        yield self._spoil()  # once it is iterated: that it can be is known

    def __getitem__(self, key: Any) -> str:
        if isinstance(key, str):
            raise TypeError("a text has no keys")
        self._spoil()

    def _spoil(self, *_: Any, **__: Any) -> Never:
        self._trace.is_spoilt = True  # whoever catches the error
        raise _UnknownUseError


def _recorded(name: str) -> Callable[..., Any]:
    function = getattr(str, name)
    if name in MADE:
        return lambda text, *operands: text._trace.make(function, text, *operands)
    if name in ASKED:
        return lambda text, *operands: text._trace.ask(function, text, *operands)
    return _StandIn._spoil


for _name in vars(str).keys() - vars(_StandIn).keys() - {"__getattribute__"}:
    setattr(_StandIn, _name, _recorded(_name))


class TracedTemplate:
    """A traceable template, rendered as Jinja does it."""

    def __init__(self, render: Render, run: Callable[[Messages, bool], Iterator[str]]) -> None:
        """`render` is Jinja's. `run`: the output of the template for messages in pieces, and whether a reply is to
        follow."""
        self._render, self._run = render, run
        self._traces: dict[Hashable, list[_Trace | None]] = {}
        """By form; None for a conversation that cannot be traced."""

    def __call__(self, messages: Messages, begun: bool, tools: Tools | None = None) -> str:
        """Raises what `render` raises, and ValueError where a trace gives another text."""
        found = None if tools is not None else _form_and_texts(messages)
        if found is None:
            return self._render(messages, begun, tools)
        form, texts = found
        traces = self._traces.get((begun, form), [])
        for trace in traces:
            if trace is not None and (text := trace.text(texts)) is not None:
                trace.num_left -= 1
                if trace.num_left <= 0:
                    self._check(trace, text, messages, begun)
                return text
        whole = self._render(messages, begun, None)
        if len(traces) < _MAX_TRACES:
            if len(self._traces) >= _MAX_FORMS:
                self._traces.clear()
            self._traces[begun, form] = [*traces, self._traced(messages, begun, texts, whole)]
        return whole

    def _traced(self, messages: Messages, begun: bool, texts: list[str], whole: str) -> _Trace | None:
        """What the template does with the conversation, whose text is `whole`."""
        trace = _Trace(texts)
        try:
            trace.write(self._run(_with_texts(messages, trace.stand_ins()), begun))
        except Exception:  # a template can raise anything of a stand-in
            return None
        return None if trace.is_spoilt or trace.text(texts) != whole else trace

    def _check(self, trace: _Trace, text: str, messages: Messages, begun: bool) -> None:
        if text != self._render(messages, begun, None):
            raise ValueError("its traced run gives another text than Jinja: this is a fault of mmtrain, report it")
        trace.num_left = _CHECKED_EVERY


def _form_and_texts(messages: Messages) -> tuple[Hashable, list[str]] | None:
    """Roles and kinds of content, and the texts; None for messages that have more than these."""
    form: list[Hashable] = []
    texts: list[str] = []
    for message in messages:
        if message.keys() != _KEYS:
            return None
        content = message["content"]
        form.append(message["role"])
        if isinstance(content, str):
            form.append(str)
            texts.append(content)
            continue
        if not isinstance(content, list):
            return None
        for part in content:
            is_text = len(part) == 2 and part.get("type") == "text" and isinstance(part.get("text"), str)
            if not is_text and part != _IMAGE:
                return None
            form.append(is_text)
            if is_text:
                texts.append(part["text"])
    return tuple(form), texts


def _with_texts(messages: Messages, texts: Sequence[str]) -> Messages:
    """`messages` with other texts."""
    left = iter(texts)

    def content(given: Any) -> Any:
        if isinstance(given, str):
            return next(left)
        return [{**part, "text": next(left)} if "text" in part else part for part in given]

    return [{**message, "content": content(message["content"])} for message in messages]
