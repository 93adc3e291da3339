"""The model's chat template: what it takes, found out by rendering a few conversations, and the text that it makes."""

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from typing import Any

from mmtrain.encoding.messages import REASONING, ArgumentForm, MessageForm, Render, Tools
from mmtrain.errors import UserError
from mmtrain.records.chat import Messages, SampleError
from mmtrain.records.reasoning import CLOSE, OPEN
from mmtrain.safe_text import one_line, shown

_UNKNOWN = "Zq-unknown-qZ"
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True, slots=True)
class TemplateTraits:
    """What is found out about a chat template, once."""

    text_roles: frozenset[str]
    """The roles whose content the template takes as a string: a list of parts is dropped there, or printed as data."""
    takes_system: bool
    """Whether it shows what a system turn says."""
    generation_prompt: str | None
    """What it writes after a user's turn for the reply to follow; None where it refuses a lone turn or rewrites it."""
    arguments: ArgumentForm | None = None
    """How it takes the arguments of calls; None where it does not show calls."""
    reasoning_key: str | None = None
    """The key under which it takes the reasoning of a reply; None where it shows none."""

    @property
    def form(self) -> MessageForm:
        return MessageForm(self.text_roles, self.arguments, self.reasoning_key)


def probe_template(source: str | None, render: Render, image_token: str | None) -> TemplateTraits:
    """The traits of the template `source`, whose text is made by `render`.

    `image_token` is the text that stands for an image, None for a model that takes none. Raises UserError where there
    is no template, and where it drops a user's text or images.
    """
    if not source:
        raise UserError(
            "the model has no chat template: give one as model.chat_template: FILE, or as --chat-template FILE without "
            "a config, such as the chat_template.jinja of a chat model with the same tokenizer"
        )
    roles = _find_text_roles(render)
    tried = [wanted for wanted in (roles, roles | {"system"}) if _shows(render, wanted, "system", "user")]
    text_roles = tried[0] if tried else roles
    if image_token is not None:
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "probe"}]}
        count = _rendered(render, MessageForm(text_roles).apply([turn])).count(image_token)
        if count != 1:
            number = f"{count} placeholders" if count else "no placeholder"
            raise UserError(f"the chat template writes {number} {shown(image_token)} for an image: expected one")
    prompt, reasoning_key = _find_generation_prompt(render, text_roles), _find_reasoning_key(render, text_roles)
    form = _find_call_form(render, text_roles)
    return TemplateTraits(form.text_roles, bool(tried), prompt, form.arguments, reasoning_key)


def _find_reasoning_key(render: Render, text_roles: frozenset[str]) -> str | None:
    reasoning = "Zq-reasoning-qZ"
    for key in _REASONING_KEYS:
        form = MessageForm(text_roles, reasoning_key=key)
        turns = form.apply([_probe_turn("user"), {**_probe_turn("assistant"), REASONING: reasoning}])
        with suppress(SampleError):
            if _rendered(render, turns).count(reasoning) == 1:
                return key
    return None


def _find_call_form(render: Render, text_roles: frozenset[str]) -> MessageForm:
    """The form in which the template shows a call and its result, or if it shows no calls, a result."""
    name, argument = "Zq-name-qZ", "Zq-argument-qZ"
    call = {
        "id": "callofqZ1",  # of nine letters and digits, which some templates demand
        "type": "function",
        "function": {"name": name, "arguments": json.dumps({"key": argument})},
    }
    called = {"role": "assistant", "content": [], "tool_calls": [call]}
    result = {**_probe_turn("tool"), "name": name, "tool_call_id": call["id"]}
    forms: tuple[ArgumentForm, ...] = ("object", "text")
    for arguments, more in product(forms, ((), ("tool",))):
        form = MessageForm(text_roles.union(more), arguments)
        with suppress(SampleError):
            text = _rendered(render, form.apply([_probe_turn("user"), called, result]))
            is_printed_as_data = _UNKNOWN in text or "{'" in text or r"\"" in text
            are_shown = name in text and text.count(argument) == text.count(_probe_text("tool")) == 1
            if are_shown and not is_printed_as_data:
                return form
    takes_text = not _shows(render, text_roles, "user", "assistant", "tool")
    return MessageForm(text_roles | {"tool"} if takes_text else text_roles)


def image_frame(render: Render, traits: TemplateTraits, image_token: str, special: re.Pattern[str]) -> tuple[str, str]:
    """The special tokens that the template writes right before and right after an image of a user's turn, at most one
    of each. `special` matches one."""
    content = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    turn = {"role": "user", "content": content}
    try:
        text = _rendered(render, traits.form.apply([turn]))
    except SampleError:
        return "", ""
    found = re.search(f"({special.pattern})?{re.escape(image_token)}({special.pattern})?", text)
    return ("", "") if found is None else (found[1] or "", found[2] or "")


def _find_generation_prompt(render: Render, text_roles: frozenset[str]) -> str | None:
    question = MessageForm(text_roles).apply([_probe_turn("user")])
    try:
        bare, prompt = _rendered(render, question), _rendered(render, question, add_generation_prompt=True)
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
    why = "; ".join(dict.fromkeys(failures)) or "they are dropped"
    raise UserError(f"the chat template does not show a user's text: {why}")


def _shows(render: Render, text_roles: frozenset[str], *turns: str, failures: list[str] | None = None) -> bool:
    """Whether the template shows the text of each role in `turns` once; why it refuses goes into `failures`."""
    try:
        text = _rendered(render, MessageForm(text_roles).apply([_probe_turn(role) for role in turns]))
    except SampleError as error:
        if failures is not None:
            failures.append(str(error))
        return False
    return _UNKNOWN not in text and all(text.count(_probe_text(role)) == 1 for role in turns)


def _probe_text(role: str) -> str:
    return f"Zq-{role}-qZ"


def _probe_turn(role: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": _probe_text(role), "unknown_key": _UNKNOWN}]}


def _rendered(
    render: Render, messages: Messages, add_generation_prompt: bool = False, tools: Tools | None = None
) -> str:
    try:
        return render(messages, add_generation_prompt, tools)
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

    def render(self, messages: Messages, add_generation_prompt: bool = False, tools: Tools | None = None) -> str:
        """The text that the template makes, with what the processor writes around an image's span.

        Raises SampleError where the template refuses.
        """
        text = _rendered(self.make_text, self.as_wanted(messages), add_generation_prompt, tools)
        before, after = self.text_around_image
        if self.image_token is None or not (before or after or self.text_end) or self.image_token not in text:
            return text
        return text.replace(self.image_token, before + self.image_token + after) + self.text_end

    def reply(self, text: str) -> str:
        """A reply that says `text`, with reasoning where the prompt for a reply begins it."""
        prompt = self.traits.generation_prompt
        return f"{OPEN}{text}{CLOSE}{text}" if prompt is not None and prompt.rstrip().endswith(OPEN) else text

    def as_wanted(self, messages: Messages) -> Messages:
        """`messages`, as `as_messages` gives them, in the form that the template takes. Raises SampleError where it has
        no place for what they have."""
        return self.traits.form.apply(messages)
