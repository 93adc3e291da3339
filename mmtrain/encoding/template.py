"""The model's chat template: what it takes, found out by rendering a few conversations, and the text that it makes."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mmtrain.errors import UserError
from mmtrain.records.chat import Messages, SampleError
from mmtrain.records.reasoning import CLOSE, OPEN
from mmtrain.safe_text import one_line, shown

Render = Callable[[Messages, bool], str]
"""From messages, and whether a reply is to follow, to text."""

_UNKNOWN = "Zq-unknown-qZ"


@dataclass(frozen=True, slots=True)
class TemplateTraits:
    """What is found out about a chat template, once."""

    text_roles: frozenset[str]
    """The roles whose content the template takes as a string: a list of parts is dropped there, or printed as data."""
    takes_system: bool
    """Whether it shows what a system turn says."""
    generation_prompt: str | None
    """What it writes after a user's turn for the reply to follow; None where it refuses a lone turn or rewrites it."""


def probe_template(source: str | None, render: Render, image_token: str | None) -> TemplateTraits:
    """The traits of the template `source`, whose text is made by `render`.

    `image_token` is the text that stands for an image, None for a model that takes none. Raises UserError where there
    is no template, and where it drops a user's words or images.
    """
    if not source:
        raise UserError(
            "the model has no chat template: give one as model.chat_template: FILE, such as the chat_template.jinja of "
            "a chat model with the same tokenizer"
        )
    roles = _find_text_roles(render)
    tried = [wanted for wanted in (roles, roles | {"system"}) if _shows(render, wanted, "system", "user")]
    text_roles = tried[0] if tried else roles
    if image_token is not None:
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "probe"}]}
        if _rendered(render, as_wanted([turn], text_roles), False).count(image_token) != 1:
            raise UserError(f"the chat template writes no placeholder {shown(image_token)} for an image")
    return TemplateTraits(text_roles, bool(tried), _find_generation_prompt(render, text_roles))


def image_frame(render: Render, traits: TemplateTraits, image_token: str, special: re.Pattern[str]) -> tuple[str, str]:
    """The special tokens that the template writes right before and right after an image of a user's turn, at most one
    of each. `special` matches one."""
    content = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    turn = {"role": "user", "content": content}
    try:
        text = _rendered(render, as_wanted([turn], traits.text_roles), False)
    except SampleError:
        return "", ""
    found = re.search(f"({special.pattern})?{re.escape(image_token)}({special.pattern})?", text)
    return ("", "") if found is None else (found[1] or "", found[2] or "")


def _find_generation_prompt(render: Render, text_roles: frozenset[str]) -> str | None:
    question = as_wanted([_probe_turn("user")], text_roles)
    try:
        bare, prompt = _rendered(render, question, False), _rendered(render, question, True)
    except SampleError:
        return None
    return prompt.removeprefix(bare) if prompt.startswith(bare) else None


def _find_text_roles(render: Render) -> frozenset[str]:
    """The roles, the system's left out, whose content the template takes as a string.

    The probe's parts carry a key that no template knows: where its value is in the text, the part was printed.
    """
    failures: list[str] = []
    for roles in ((), ("assistant",), ("user",), ("user", "assistant")):
        if _shows(render, frozenset(roles), "user", "assistant", failures=failures):
            return frozenset(roles)
    raise UserError(f"the chat template does not show a user's words: {'; '.join(failures) or 'they are dropped'}")


def _shows(render: Render, text_roles: frozenset[str], *turns: str, failures: list[str] | None = None) -> bool:
    """Whether the template shows the words of each role in `turns` once; why it refuses goes into `failures`."""
    try:
        text = _rendered(render, as_wanted([_probe_turn(role) for role in turns], text_roles), False)
    except SampleError as error:
        if failures is not None:
            failures.append(str(error))
        return False
    return _UNKNOWN not in text and all(text.count(_probe_words(role)) == 1 for role in turns)


def _probe_words(role: str) -> str:
    return f"Zq-{role}-qZ"


def _probe_turn(role: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": _probe_words(role), "unknown_key": _UNKNOWN}]}


def as_wanted(messages: Messages, text_roles: frozenset[str]) -> Messages:
    """`messages`, whose content is a list of parts, with a string in its place for `text_roles`."""
    return [
        {**message, "content": "".join(part.get("text", "") for part in message["content"])}
        if message["role"] in text_roles
        else message
        for message in messages
    ]


def _rendered(render: Render, messages: Messages, add_generation_prompt: bool) -> str:
    try:
        return render(messages, add_generation_prompt)
    except Exception as error:  # a template can raise anything; its message is for the user
        raise SampleError(f"the model's chat template refuses the conversation: {one_line(error)}") from None


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """Renders conversations as inference does."""

    source: str
    """The template, in Jinja."""
    traits: TemplateTraits
    make_text: Render
    image_token: str | None = None
    """The text that stands for an image, None for a model that takes none."""
    text_around_image: tuple[str, str] = ("", "")
    """Ordinary text that the processor writes before and after an image's span, such as newlines."""
    text_end: str = ""
    """Ordinary text that the processor writes after all of a text with images."""

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """The text that the template makes, with what the processor writes around an image's span.

        Raises SampleError where the template refuses.
        """
        text = _rendered(self.make_text, self.as_wanted(messages), add_generation_prompt)
        before, after = self.text_around_image
        if self.image_token is None or not (before or after or self.text_end) or self.image_token not in text:
            return text
        return text.replace(self.image_token, before + self.image_token + after) + self.text_end

    def reply(self, text: str) -> str:
        """A reply that says `text`, with reasoning where the prompt for a reply begins it."""
        prompt = self.traits.generation_prompt
        return f"{OPEN}{text}{CLOSE}{text}" if prompt is not None and prompt.rstrip().endswith(OPEN) else text

    def as_wanted(self, messages: Messages) -> Messages:
        """`messages`, whose content is a list of parts, in the form that the template takes."""
        return as_wanted(messages, self.traits.text_roles)
