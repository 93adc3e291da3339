"""Training, the audit and what is shown read the same ids; what the audit calls a fault, training refuses."""

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from tokenizers import Tokenizer, decoders

from mmtrain.checks.findings import MARK, REPLY
from mmtrain.config.schema import Config
from mmtrain.dataset import decoded_images as image_check
from mmtrain.dataset.encoding_spec import EncodingSpec
from mmtrain.dataset.samples import StoredSamples
from mmtrain.dataset.store import find_store
from mmtrain.dataset.validate import FaultPolicy, LengthLimit, check_samples
from mmtrain.encoding.images import decode
from mmtrain.encoding.load import load_processor
from mmtrain.errors import UserError
from mmtrain.inspect_labels.audit import audit
from mmtrain.inspect_labels.view import view_sample
from support.builders import TINY, mixed_rows, write_jsonl
from support.label_models import TEMPLATES, make_directory

LIMIT = LengthLimit(4096, "data.max_length")


def config_for(model: Path, data: Path, **keys: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"path": str(model)},
            "data": {"train": [{"path": str(data)}], **keys},
            "run": {"output_dir": "runs/none"},
        }
    )


def checked(config: Config) -> StoredSamples:
    return check_samples(EncodingSpec.of(config, config.data.train), load_processor(config.model.path), LIMIT)[0]


def chat(question: str, answer: str, **keys: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **keys}


def test_what_is_shown_is_what_training_reads(tmp_path: Path, model_dirs: dict[str, Path], kind: str) -> None:
    data = write_jsonl(tmp_path / "mixed.jsonl", mixed_rows(tmp_path, with_images=kind != "text"))
    config = config_for(model_dirs[kind], data)
    spec, processor = EncodingSpec.of(config, config.data.train), load_processor(config.model.path)
    trained, records = checked(config), spec.records()
    store = find_store(spec, records, processor)
    assert store is not None
    shown = StoredSamples(records, store)
    for index in range(len(shown)):
        view, encoded = view_sample(shown, spec.encoder(processor), index), trained.encoded(index)
        assert [token.id for token in view.tokens] == encoded.ids.tolist()
        assert [token.supervised for token in view.tokens] == encoded.supervised.tolist()


def test_a_tokenizer_that_pads_and_cuts_by_its_file_does_neither(tmp_path: Path) -> None:
    model = make_directory(tmp_path / "model", "byte_level", TEMPLATES["chatml"].text)
    data = write_jsonl(tmp_path / "data.jsonl", [chat("what?", "red"), chat("and what is it then?", "a blue circle")])
    plain = checked(config_for(model, data))
    expected = [plain.encoded(index).ids.tolist() for index in range(2)]
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.enable_padding(length=64, pad_id=3, pad_token="<pad>")
    tokenizer.enable_truncation(4)
    tokenizer.save(str(model / "tokenizer.json"))
    padded = checked(config_for(model, data))
    assert [padded.encoded(index).ids.tolist() for index in range(2)] == expected


def test_a_tokenizer_that_loses_white_space_is_refused(tmp_path: Path) -> None:
    model = make_directory(tmp_path / "model", "metaspace_first", TEMPLATES["chatml"].text)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", ""), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.save(str(model / "tokenizer.json"))
    with pytest.raises(UserError, match=r"does not give back ordinary text.*'Thequickbrown"):
        load_processor(str(model))


def test_training_refuses_what_the_audit_calls_a_fault(tmp_path: Path) -> None:
    """The tokenizer has no ▁ of its own: it becomes a space."""
    model = make_directory(tmp_path / "model", "metaspace_first", TEMPLATES["chatml"].text)
    data = write_jsonl(tmp_path / "data.jsonl", [chat("what?", "red"), chat("what?", "the▁word")])
    config = config_for(model, data)
    assert {kind: [place for place, _ in found] for kind, found in audit(config).faults.items()} == {
        REPLY: [f"{data}:2"]
    }
    with pytest.raises(UserError, match=rf"data\.jsonl:2: {REPLY}: .*the▁word"):
        checked(config)


def test_a_mark_that_no_image_stands_for_is_refused(tmp_path: Path) -> None:
    rows = [chat("what?", "red"), chat("<image>what?", "red"), chat("a <video> of it", "red")]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    config = config_for(TINY, data)
    found = audit(config).faults
    assert [place for place, _ in found[MARK]] == [f"{data}:2", f"{data}:3"]
    with pytest.raises(UserError, match=r"data\.jsonl:2: .*'<image>' as text.*ignore_fields"):
        checked(config)
    assert len(checked(config_for(TINY, data, ignore_fields=["<image>", "<video>"]))) == 3
    text_model = make_directory(tmp_path / "text", "byte_level", TEMPLATES["chatml"].text)
    assert len(checked(config_for(text_model, data))) == 3


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A PNG whose header and end are sound, and a sound one, in two samples."""
    PIL.Image.effect_noise((90, 60), 80).convert("RGB").save(tmp_path / "whole.png", compress_level=0)
    whole = (tmp_path / "whole.png").read_bytes()
    at = whole.index(b"IDAT") + 4
    (tmp_path / "broken.png").write_bytes(whole[:at] + bytes(20) + whole[at + 20 :])
    rows = [chat("<image>what?", "red", images=[name]) for name in ("whole.png", "broken.png")]
    return write_jsonl(tmp_path / "data.jsonl", rows)


def test_an_image_that_is_broken_in_the_middle_is_refused_before_the_first_step(broken: Path) -> None:
    with pytest.raises(UserError, match=r"data\.jsonl:2: does not decode: the image 'broken\.png' does not decode"):
        checked(config_for(TINY, broken))
    assert len(checked(config_for(TINY, broken, decode_images=False))) == 2


def test_an_image_is_decoded_once_whatever_its_name(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []

    def counted(found: Any) -> Any:
        decoded.append(found.name)
        return decode(found)

    monkeypatch.setattr(image_check, "decode", counted)
    folder = broken.parent
    PIL.Image.effect_noise((70, 70), 90).convert("RGB").save(folder / "one.png")
    (folder / "two.png").write_bytes((folder / "one.png").read_bytes())
    for answer, names in (("red", ["one.png"]), ("blue", ["one.png", "two.png"])):
        rows = [chat("<image>what?", answer, images=[name]) for name in names]
        checked(config_for(TINY, write_jsonl(folder / "more.jsonl", rows)))
    assert decoded == ["one.png"]
    assert json.loads((folder / "more.jsonl").read_text().splitlines()[1])["images"] == ["two.png"]


def test_where_every_sample_is_dropped_each_is_named_with_the_reason(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [chat("what?", "red"), chat("what is it?", "blue")])
    config = config_for(TINY, data)
    spec = EncodingSpec.of(config, config.data.train)
    with pytest.raises(UserError) as caught:
        check_samples(spec, load_processor(str(TINY)), LengthLimit(5, "data.max_length"), FaultPolicy("drop"))
    assert len(caught.value.faults) == 2
    for line, fault in enumerate(caught.value.faults, start=1):
        assert fault.startswith(f"{data}:{line}: dropped, no sample is left: ")
        assert fault.endswith("over the 5 allowed (data.max_length)")
