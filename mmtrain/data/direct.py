"""Tokenizer and chat template beneath transformers' wrappers, which take as long again as what they wrap."""

import functools
from collections.abc import Callable
from typing import Any

from transformers.utils import chat_template_utils

Messages = list[dict[str, Any]]


def text_encoder(tokenizer: Any, literal: bool) -> Callable[[str], list[int]]:
    """From text to ids, straight through the native part where there is one: the wrapper takes as long again."""
    through_wrapper = functools.partial(tokenizer.encode, add_special_tokens=False, split_special_tokens=literal)
    through_wrapper("word")  # leaves the native part in the state that `literal` asks for
    native = getattr(tokenizer, "backend_tokenizer", None)
    if native is None:
        return through_wrapper
    return lambda text: native.encode(text, add_special_tokens=False).ids


def renderer(tokenizer: Any, template: str | None) -> Callable[[Messages, bool], str]:
    """From messages to text by `template`: through its compiled form where that gives what the wrapper gives, which
    copies every message twice on its way."""

    def through_wrapper(messages: Messages, add_generation_prompt: bool) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    compile_template = getattr(chat_template_utils, "_compile_jinja_template", None)
    if compile_template is None or template is None:
        return through_wrapper
    try:
        compiled, known = compile_template(template), dict(tokenizer.special_tokens_map)
    except Exception:  # a template that does not compile: the wrapper says why
        return through_wrapper

    def direct(messages: Messages, add_generation_prompt: bool) -> str:
        return str(
            compiled.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **known
            )
        )

    return direct if _outcome(direct) == _outcome(through_wrapper) else through_wrapper


def _outcome(render: Callable[[Messages, bool], str]) -> list[str]:
    """What `render` makes of a few conversations, or says against them."""
    found = []
    for content in ("probe", [{"type": "text", "text": "probe"}], [{"type": "image"}, {"type": "text", "text": "a"}]):
        messages: Messages = [{"role": role, "content": content} for role in ("user", "assistant")]
        for begun in (False, True):
            try:
                found.append(render(messages[: 2 - begun], begun))
            except Exception as error:  # a template can raise anything
                found.append(str(error))
    return found
