"""What the encoder refuses, each with a conversation that nothing else refuses, and what it says of it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from transformers import AutoTokenizer

from mmtrain.encoding.encode import Encoder
from mmtrain.encoding.load import load_processor
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.records.chat import Conversation, Image, Message, SampleError, Text
from support.label_models import NUM_PLACEHOLDERS, TEMPLATES, make_directory

USER, RED = Message("user", (Text("what?"),)), Message("assistant", (Text("red"),))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("encode")
    for name, size in (("0.png", (64, 64)), ("1.png", (40, 130))):
        PIL.Image.new("RGB", size).save(made / name)
    return made


@pytest.fixture(scope="module")
def chatml(folder: Path) -> ChatProcessor:
    return load_processor(str(make_directory(folder / "chatml", "byte_level", TEMPLATES["chatml"].text)))


@pytest.fixture(scope="module")
def vision(folder: Path) -> ChatProcessor:
    text = TEMPLATES["chatml"].text
    return load_processor(str(make_directory(folder / "vision", "byte_level", text, vision=True, bos_in_front=True)))


def template(folder: Path, text: str) -> ChatProcessor:
    return load_processor(str(make_directory(folder / "model", "byte_level", text)), tried=True)


def talk(*messages: Message) -> Conversation:
    return Conversation(messages)


@pytest.mark.parametrize(
    ("conversation", "train_on", "reason"),
    [
        (talk(USER), "assistant", "no assistant turn to train on"),
        (talk(USER, replace(RED, train=False)), "assistant", "no assistant turn to train on"),
        (talk(USER, RED, USER, replace(RED, train=False)), "last", "no assistant turn to train on"),
        (talk(RED, USER, RED), "assistant", "begins with the assistant"),
    ],
)
def test_a_conversation_without_a_reply_to_train_on_is_refused(
    conversation: Conversation, train_on: str, reason: str, chatml: ChatProcessor
) -> None:
    encoder = Encoder(chatml, train_on)
    with pytest.raises(SampleError, match=reason):
        encoder.trained_turns(conversation.messages)
    with pytest.raises(SampleError, match=reason):
        encoder.encode(conversation, Path())


def test_a_first_reply_that_is_not_trained_on_is_context(chatml: ChatProcessor) -> None:
    conversation = talk(replace(RED, train=False), USER, RED)
    assert Encoder(chatml).trained_turns(conversation.messages) == [2]
    assert Encoder(chatml, "last").trained_turns(talk(RED, USER, RED, USER, RED).messages) == [4]
    ids = Encoder(chatml).encode(conversation, Path())
    assert ids.supervised.any()


def test_a_sample_without_a_supervised_token_is_refused(chatml: ChatProcessor) -> None:
    """A reply without text, and its end is not trained on."""
    silent = talk(USER, Message("assistant", (Text(""),)))
    with pytest.raises(SampleError, match="no token of it is trained on"):
        Encoder(chatml, end_of_turn=False).encode(silent, Path())
    assert Encoder(chatml).encode(silent, Path()).num_supervised == 1


def test_a_missing_end_token_is_refused_where_one_is_wanted(folder: Path, tmp_path: Path) -> None:
    path = make_directory(tmp_path / "model", "byte_level", TEMPLATES["no_end"].text)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    processor = load_processor(str(path))
    with pytest.raises(SampleError, match=r"has an end token: set labels\.end_of_turn to false"):
        Encoder(processor).encode(talk(USER, RED), Path())
    assert Encoder(processor, end_of_turn=False).encode(talk(USER, RED), Path()).supervised.any()


OPEN = "{% if add_generation_prompt %}assistant:{% endif %}"


def test_a_reply_that_is_rewritten_once_others_follow_has_a_sequence_of_its_own(tmp_path: Path) -> None:
    text = "{% for m in messages %}{{ m.role }}{{ '!' if not loop.last and m.role == 'assistant' }}:{{ m.content }}\n"
    encoder = Encoder(template(tmp_path, text + "{% endfor %}" + OPEN))
    decode = encoder.processor.tokenizer.decode

    def texts(*messages: Message) -> list[tuple[int | None, str]]:
        found = encoder.sequences(talk(*messages))
        return [(turn, decode(encoder.encode(one, Path()).ids.tolist())) for turn, one in found]

    first, second = "user:what?\nassistant:red</s>\n", "user:what?\nassistant!:red\nuser:what?\nassistant:red</s>\n"
    assert texts(USER, RED, USER, RED) == [(1, first), (3, second)]
    assert texts(USER, RED, USER) == [(1, first)]
    assert texts(USER, replace(RED, train=False), USER, RED) == [(None, second)]
    with pytest.raises(SampleError, match="it has several sequences"):
        encoder.encode(talk(USER, RED, USER, RED), Path())


def test_a_reply_that_does_not_begin_as_the_prompt_does_follows_the_prompt(tmp_path: Path) -> None:
    text = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}" + OPEN.replace("assistant:", "model:")
    encoder = Encoder(template(tmp_path, text))
    ids = encoder.encode(talk(USER, replace(RED, train=False), USER, RED), Path()).ids.tolist()
    said = encoder.processor.tokenizer.decode(ids)
    assert said == "user:what?\nassistant:red\nuser:what?\nmodel:red</s>\n"


def test_each_turn_that_is_trained_on_has_its_weight(chatml: ChatProcessor, tmp_path: Path) -> None:
    encoder, half = Encoder(chatml), replace(RED, weight=0.5)
    assert encoder.encode(talk(USER, RED, USER, RED), Path()).weights == ()
    encoded = encoder.encode(talk(USER, half, USER, replace(half, train=False), USER, RED), Path())
    assert encoded.weights == (0.5, 1.0)
    lengths = encoded.run_lengths.tolist()
    assert lengths == [len(chatml.tokenizer.wrapped.encode("red<|im_end|>", add_special_tokens=False))] * 2
    assert encoded.token_weights.tolist() == [0.5] * lengths[0] + [1.0] * lengths[1]
    joined = "{% for m in messages %}{{ m.content if m.role == 'assistant' else m.content ~ ':' }}{% endfor %}"
    encoder = Encoder(template(tmp_path, joined), end_of_turn=False)
    with pytest.raises(SampleError, match="two turns with weights of their own have nothing between them"):
        encoder.encode(talk(USER, half, RED), Path())


def test_images_for_a_model_without_them_are_refused(chatml: ChatProcessor, folder: Path) -> None:
    with pytest.raises(SampleError, match="has images and this model takes none"):
        Encoder(chatml).encode(talk(Message("user", (Image("0.png"), Text("what?"))), RED), folder)


def test_one_sample_that_is_refused_leaves_the_others_as_they_are(chatml: ChatProcessor) -> None:
    encoder = Encoder(chatml, end_of_turn=False)
    good, silent = talk(USER, RED), talk(USER, Message("assistant", (Text(""),)))
    found = encoder.encode_many([(talk(USER), Path()), (good, Path()), (silent, Path()), (good, Path())])
    assert [type(one).__name__ for one in found] == ["SampleError", "Encoded", "SampleError", "Encoded"]
    alone = encoder.encode(good, Path())
    assert all(one.ids.tolist() == alone.ids.tolist() for one in found if not isinstance(one, SampleError))


def test_every_image_has_its_own_span(vision: ChatProcessor, folder: Path) -> None:
    """Its ids stand where the span says, and the images are in their order."""
    images = (Image("0.png"), Text(" and "), Image("1.png"))
    encoded = Encoder(vision).encode(talk(Message("user", images), RED), folder)
    placeholder = vision.tokenizer.id_of("<image>")
    assert [span.image.size for span in encoded.images] == [(64, 64), (40, 130)]
    assert [span.num_placeholders for span in encoded.images] == [NUM_PLACEHOLDERS] * 2
    spans = [encoded.ids[span.start : span.start + span.length].tolist() for span in encoded.images]
    assert spans == [[placeholder] * NUM_PLACEHOLDERS] * 2
    assert encoded.ids.tolist().count(placeholder) == 2 * NUM_PLACEHOLDERS
    assert encoded.ids[0] == vision.tokenizer.wrapped.bos_token_id
    assert (encoded.ids.dtype, encoded.supervised.dtype) == (np.dtype(np.int32), np.dtype(np.bool_))
    traced = Encoder(vision).trace(talk(Message("user", images), RED), encoded)
    pieces = [i for i, piece in enumerate(traced.pieces) if piece.kind == "image"]
    owners = [traced.owners[span.start : span.start + span.length] for span in encoded.images]
    assert owners == [(piece,) * NUM_PLACEHOLDERS for piece in pieces]
    assert traced.owners[0] == -1  # BOS is the tokenizer's
    assert traced.encoded is encoded


def test_a_template_that_writes_bos_gets_no_second_one(folder: Path, tmp_path: Path) -> None:
    """The tokenizer of this one puts BOS before every text, too."""
    path = make_directory(tmp_path, "byte_level", TEMPLATES["gemma"].text, vision=True, bos_in_front=True)
    encoded = Encoder(load_processor(str(path))).encode(talk(Message("user", (Image("0.png"),)), RED), folder)
    bos = AutoTokenizer.from_pretrained(path).bos_token_id
    assert [i for i, id_ in enumerate(encoded.ids) if id_ == bos] == [0]


@pytest.mark.parametrize("what", ["ids", "supervised"])
def test_a_trace_of_what_is_not_stored_now_is_refused(what: str, chatml: ChatProcessor) -> None:
    encoder, conversation = Encoder(chatml), talk(USER, RED)
    encoded = encoder.encode(conversation, Path())
    changed = getattr(encoded, what).copy()
    changed[-2] = not changed[-2] if what == "supervised" else changed[-2] + 1
    changes: Any = {what: changed}
    with pytest.raises(SampleError, match="is not what the encoder makes of the sample now"):
        encoder.trace(conversation, replace(encoded, **changes))


def test_every_id_is_traced_to_the_text_it_comes_from(chatml: ChatProcessor) -> None:
    encoder, conversation = Encoder(chatml), talk(USER, RED)
    encoded = encoder.encode(conversation, Path())
    traced = encoder.trace(conversation, encoded)
    kinds = [traced.pieces[owner].kind for owner in traced.owners]
    texts = [str(chatml.tokenizer.decode([id_])) for id_ in encoded.ids]
    assert len(traced.owners) == encoded.num_tokens
    assert "".join(text for text, kind in zip(texts, kinds, strict=True) if kind == "text") == "what?red"
    trained = [(text, kind) for text, kind, on in zip(texts, kinds, encoded.supervised, strict=True) if on]
    assert trained[-1] == ("<|im_end|>", "template")
    assert {kind for _, kind in trained[:-1]} == {"text"}


def test_an_end_that_the_template_lacks_comes_from_no_text(folder: Path, tmp_path: Path) -> None:
    encoder = Encoder(template(tmp_path, TEMPLATES["no_end"].text))
    encoded = encoder.encode(talk(USER, RED, USER, RED), Path())
    eos = encoder.processor.tokenizer.traits.eos_id
    owners = encoder.trace(talk(USER, RED, USER, RED), encoded).owners
    assert [i for i, owner in enumerate(owners) if owner == -1] == [
        i for i, id_ in enumerate(encoded.ids) if id_ == eos
    ]
    assert owners.count(-1) == 2


SPOKEN = [" what? ", "a circle", "is it red:", "12 30\n", "", "**bold**"]


def spoken(*texts: str) -> Conversation:
    """Texts of the user and the assistant in turn."""
    turns = [Message("assistant" if n % 2 else "user", (Text(text),)) for n, text in enumerate(texts)]
    return talk(*turns)


@pytest.mark.parametrize("template", ["chatml", "gemma", "llama3", "mistral"])
@pytest.mark.parametrize("tokenizer", ["metaspace_first", "legacy"])
def test_ids_are_the_tokenizers_own_where_they_depend_on_what_is_before(
    tokenizer: str, template: str, tmp_path: Path
) -> None:
    made = TEMPLATES[template]
    path = make_directory(tmp_path, tokenizer, made.text, bos_in_front=template == "llama3")
    encoded = Encoder(load_processor(str(path), tried=True)).encode(spoken(*SPOKEN), Path())
    messages: list[dict[str, Any]] = [
        {
            "role": "assistant" if n % 2 else "user",
            "content": [{"type": "text", "text": text}] if made.parts else text,
        }
        for n, text in enumerate(SPOKEN)
    ]
    theirs = AutoTokenizer.from_pretrained(path)
    assert encoded.ids.tolist() == theirs.apply_chat_template(messages, return_dict=False)


@pytest.mark.parametrize("tokenizer", ["metaspace_first", "legacy"])
def test_an_added_end_does_not_change_what_follows(tokenizer: str, tmp_path: Path) -> None:
    path = make_directory(tmp_path, tokenizer, TEMPLATES["no_end"].text)
    processor = load_processor(str(path), tried=True)
    without = Encoder(processor, end_of_turn=False).encode(spoken(*SPOKEN), Path())
    encoded = Encoder(processor).encode(spoken(*SPOKEN), Path())
    eos = processor.tokenizer.traits.eos_id
    assert eos not in without.ids
    assert [id_ for id_ in encoded.ids if id_ != eos] == without.ids.tolist()
    ends = [i for i, id_ in enumerate(encoded.ids) if id_ == eos]
    assert len(ends) == 3
    assert encoded.supervised[ends].all()
    assert encoded.num_supervised == without.num_supervised + 3


@pytest.mark.parametrize("tokenizer", ["metaspace_first", "legacy", "byte_level"])
def test_a_special_token_in_a_text_is_characters(tokenizer: str, tmp_path: Path) -> None:
    path = make_directory(tmp_path, tokenizer, TEMPLATES["chatml"].text)
    processor = load_processor(str(path), tried=True)
    plain, literal = (Encoder(processor).encode(spoken(word, f"so {word}"), Path()) for word in ("word", "</s>"))
    special = set(processor.tokenizer.wrapped.convert_tokens_to_ids(["</s>", "<|im_start|>", "<|im_end|>"]))
    assert [id_ for id_ in plain.ids if id_ in special] == [id_ for id_ in literal.ids if id_ in special]
    trained = processor.tokenizer.wrapped.decode(literal.ids[literal.supervised], clean_up_tokenization_spaces=False)
    assert trained.strip() == "so </s><|im_end|>"
    traced = Encoder(processor).trace(spoken("</s>", "so </s>"), literal)
    words = [id_ for id_, owner in zip(literal.ids, traced.owners, strict=True) if traced.pieces[owner].kind == "text"]
    assert processor.tokenizer.wrapped.decode(words, clean_up_tokenization_spaces=False).count("</s>") == 2


def test_a_long_text_brings_no_warning_of_the_library(chatml: ChatProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = chatml.tokenizer
    monkeypatch.setattr(tokenizer.wrapped, "model_max_length", 8)
    monkeypatch.setattr("transformers.tokenization_utils_base.logger.warning", lambda text: pytest.fail(text))
    assert len(tokenizer.last_characters("word " * 9, None)) == len(tokenizer.encode("word " * 9, None)) > 8
