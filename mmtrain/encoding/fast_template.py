"""Tokenizer and chat template beneath transformers' wrappers, which take as long again as what they wrap."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from transformers.tokenization_utils_tokenizers import TokenizersBackend
from transformers.utils import chat_template_utils

from mmtrain.encoding.messages import Render, Tools
from mmtrain.encoding.traceable import is_traceable
from mmtrain.encoding.traced_template import TracedTemplate
from mmtrain.records.chat import Messages

_FIXED_DATE = "{% macro strftime_now(format) %}01 Jan 2025{% endmacro %}"
"""Put before a template that prints today's date: a run must not depend on the day it was started."""


_CACHED_WORDS = 2**16


def with_large_cache(tokenizer: Any) -> Any:
    """`tokenizer`, whose native part keeps the ids of more words than the 10,000 that it keeps by default: a data set
    has more."""
    resize = getattr(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None), "_resize_cache", None)
    if resize is not None:
        resize(_CACHED_WORDS)
    return tokenizer


def without_padding(tokenizer: Any) -> Any:
    """`tokenizer`, whose native part pads and cuts nothing, whatever its file or an earlier caller has set."""
    native = getattr(tokenizer, "backend_tokenizer", None)
    if native is not None:
        native.no_padding()
        native.no_truncation()
    return tokenizer


def chat_template(tokenizer: Any, processor: Any | None) -> str | None:
    """The processor's template, or else the tokenizer's."""
    template = getattr(processor, "chat_template", None) or tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    return _FIXED_DATE + template if template and "strftime_now" in template else template


def text_encoder(tokenizer: Any, literal: bool) -> Callable[[str], list[int]]:
    """From text to ids, straight through the native part where there is one: the wrapper takes as long again."""
    wrapped = functools.partial(tokenizer.encode, add_special_tokens=False, split_special_tokens=literal)
    wrapped("word")  # leaves the native part in the state that `literal` asks for
    native = getattr(tokenizer, "backend_tokenizer", None)
    if native is None:
        return wrapped
    return lambda text: native.encode(text, add_special_tokens=False).ids


def inference_encoder(tokenizer: Any) -> Callable[[Sequence[str], bool], list[list[int]]]:
    """From whole texts, and whether the tokenizer adds its special tokens to each, to ids as inference makes them: in
    one call of the native part, except where the tokenizer's own class changes what it is given."""
    native = _native_part(tokenizer, "__call__", "_encode_plus")

    def encode(texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        if native is None:
            return [tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"] for text in texts]
        return [one.ids for one in native.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)]

    return encode


def text_decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """From ids to text with its special tokens, through the native part where the tokenizer's class changes nothing."""
    native = _native_part(tokenizer, "decode", "_decode")
    if native is None:
        return functools.partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return functools.partial(native.decode, skip_special_tokens=False)


def _native_part(tokenizer: Any, *methods: str) -> Any:
    """The native tokenizer, None where there is none or the class has its own of `methods`."""
    native, own = getattr(tokenizer, "backend_tokenizer", None), type(tokenizer)
    is_plain = all(getattr(own, method, None) is getattr(TokenizersBackend, method) for method in methods)
    return native if is_plain else None


def through_wrapper(tokenizer: Any, template: str | None) -> Render:
    """From messages to text by `template`, as transformers does it."""

    def render(messages: Messages, begun: bool, tools: Tools | None = None) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages, tools, chat_template=template, tokenize=False, add_generation_prompt=begun
            )
        )

    return render


def renderer(tokenizer: Any, template: str | None) -> Render:
    """From messages to text by `template`: through its compiled form where that gives what the wrapper gives, which
    copies every message twice on its way."""
    wrapped = through_wrapper(tokenizer, template)
    compile_template = getattr(chat_template_utils, "_compile_jinja_template", None)
    if compile_template is None or template is None:
        return wrapped
    try:
        compiled, known = compile_template(template), dict(tokenizer.special_tokens_map)
    except Exception:  # a template that does not compile: the wrapper says why
        return wrapped

    def variables(messages: Messages, begun: bool, tools: Tools | None = None) -> dict[str, Any]:
        return {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": begun, **known}

    def direct(messages: Messages, begun: bool, tools: Tools | None = None) -> str:
        return str(compiled.render(variables(messages, begun, tools)))

    def run(messages: Messages, begun: bool) -> Iterator[str]:
        pieces: Iterator[str] = compiled.root_render_func(compiled.new_context(variables(messages, begun)))
        return pieces

    if _outcome(direct) != _outcome(wrapped):
        return wrapped
    return TracedTemplate(direct, run) if is_traceable(compiled.environment.parse(template)) else direct


def _outcome(render: Render) -> list[str]:
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
