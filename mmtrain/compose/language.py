"""The language model that goes into a composed model: with tokens for images, and a template that places them."""

from dataclasses import dataclass
from typing import Any

from transformers import AddedToken

from mmtrain.encoding.directory import takes_images
from mmtrain.encoding.load import load_processor
from mmtrain.errors import UserError
from mmtrain.model.load import load_config, load_model
from mmtrain.safe_text import one_line, shown

IMAGE_TOKEN = "<image>"

# Content becomes one string, in which the token stands for an image, before the model's own template sees it.
# The last tag keeps what comes next as it is: after a block, Jinja drops a newline.
_PARTS_AS_TEXT = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is undefined or message['content'] is none -%}
{%- set flat.messages = flat.messages + [message] -%}
{%- else -%}
{%- set joined = namespace(text='') -%}
{%- if message['content'] is string -%}{%- set joined.text = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{%- set joined.text = joined.text + 'IMAGE\\n' -%}
{%- elif part['type'] == 'text' -%}{%- set joined.text = joined.text + part['text'] -%}
{%- else -%}{{- raise_exception('only text and images are supported, not ' ~ part['type']) -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set flat.messages = flat.messages + [dict(message, content=CONTENT)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
{{- '' }}"""
_AS_STRING, _AS_PART = "joined.text", "[{'type': 'text', 'text': joined.text}]"


@dataclass(frozen=True, slots=True)
class Language:
    """A causal language model and its tokenizer, both with the tokens that images need."""

    model: Any
    tokenizer: Any
    template: str
    token_ids: dict[str, int]
    """The ids of the tokens for images."""
    num_new_rows: int
    """Rows that were added to the embeddings; the other tokens for images have rows that were unused before."""


def load_language(path: str, dtype: str) -> Language:
    """The causal language model in a model directory, without tokens for images yet.

    Raises UserError if the directory is broken, has no chat template, or has a model that takes images already or whose
    embeddings are not as wide as its layers.
    """
    if takes_images(load_config(path)):
        raise UserError(f"--language {path}: this model takes images already: give a causal language model")
    processor = load_processor(path)
    model = load_model(path, dtype, processor)
    width, hidden = model.get_input_embeddings().embedding_dim, model.config.hidden_size
    if width != hidden:
        raise UserError(
            f"--language {path}: its embeddings are {width} wide and its layers {hidden}: a projector needs them to "
            "be equal; use another language model"
        )
    tokenizer = processor.tokenizer.wrapped
    template = tokenizer.chat_template
    return Language(model, tokenizer, template["default"] if isinstance(template, dict) else template, {}, 0)


def with_image_tokens(language: Language, tokens: tuple[str, ...], path: str) -> Language:
    """`language`, changed: its tokenizer has `tokens`, its embeddings have a row for each, its template writes
    IMAGE_TOKEN for an image.

    Rows are added only where there are too few. They are drawn, with torch's own generator, from the normal
    distribution with the mean and covariance of the others (Hewitt 2021, "Initializing new word embeddings for
    pretrained language models"). Raises UserError if the tokenizer cannot take a token.
    """
    model, tokenizer = language.model, language.tokenizer
    try:
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], True)
        ids = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in tokens}
        taken = all(tokenizer.encode(f"a{token}b", add_special_tokens=False).count(ids[token]) == 1 for token in tokens)
        reason = "it does not encode it as one token"
    except Exception as error:  # a tokenizer that cannot add tokens can raise anything
        taken, reason, ids = False, one_line(error), {}
    if not taken:
        raise UserError(
            f"--language {path}: the tokenizer cannot take the token {shown(tokens[0])} ({reason}): "
            "use a model with a tokenizer.json"
        )
    num_rows = model.get_input_embeddings().num_embeddings
    num_new = max(0, max(ids.values()) + 1 - num_rows)
    if num_new:
        model.resize_token_embeddings(num_rows + num_new)
    content = _AS_STRING if _takes_strings(tokenizer) else _AS_PART
    template = _PARTS_AS_TEXT.replace("IMAGE", IMAGE_TOKEN).replace("CONTENT", content) + language.template
    return Language(model, tokenizer, template, ids, num_new)


def _takes_strings(tokenizer: Any) -> bool:
    """Whether the chat template shows content that is a string. Some templates take content in parts only."""
    turns = [{"role": role, "content": f"Zq-{role}-qZ"} for role in ("user", "assistant")]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # a template can raise anything
        return False
    return all(turn["content"] in text for turn in turns)
