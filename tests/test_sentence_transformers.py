"""What a contrastive run saves as sentence-transformers reads it: by that library where it is installed, and by a
reader of its files that is written here."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
)

from mmtrain.config.schema import Config
from mmtrain.contrastive.embedder import EncodedItem
from mmtrain.contrastive.sentence_folder import FILES, name_processor
from mmtrain.contrastive.towers import Towers
from mmtrain.progress import QUIET
from mmtrain.records.chat import Image
from mmtrain.records.pairs import Item
from mmtrain.retrieval.evaluated import loaded_embedder
from mmtrain.runtime.processes import Runtime
from mmtrain.train.run import train
from support.builders import TINY, make_text
from support.pair_data import FULL, pair_config, write_pairs
from support.tower_models import TOWERS

LORA = {"mode": "lora", "rank": 4, "alpha": 32.0}
SMALL = {"train": {"steps": 2, "batch_size": 8, "learning_rate": 1e-2}}
CLASSES = {
    "feature-extraction": AutoModel,
    "text-generation": AutoModelForCausalLM,
    "any-to-any": AutoModelForMultimodalLM,
}
TEXTS = ("a red circle", "two", "a large yellow square on the left of another one")
Make = Callable[..., Config]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sentence")
    write_pairs(made)
    return made


@pytest.fixture
def make(folder: Path, tmp_path: Path) -> Make:
    def made(name: str, file: str = "pairs.jsonl", **sections: Any) -> Config:
        path = TINY if name == "vlm" else folder / name
        if not path.exists():
            make_text(path) if name == "text" else TOWERS[name](path)
        chat = {"tune": {"language": LORA}, "objective": {"scale": 20.0, "pooling": "last"}}
        given = {**SMALL, **(chat if name in ("vlm", "text") else {}), **sections}
        return pair_config(path, folder / file, tmp_path / "run", **given)

    return made


def saved(config: Config) -> Path:
    (path,) = (path.parent for path in Path(config.run.output_dir).glob("*/modules.json"))
    return path


def own_embeddings(config: Config, items: Sequence[Item], folder: Path) -> Tensor:
    """(num_items, width) unit vectors of the trained embedder, one item at a time."""
    embedder = loaded_embedder(config, saved(config), Runtime("float32", device="cpu"), QUIET)
    found = []
    for number, one in enumerate(embedder.encode([(item, folder) for item in items])):
        assert isinstance(one, EncodedItem)
        encoded = dataclasses.replace(one, key=f"{number:064x}")
        with torch.no_grad():
            found.append(F.normalize(embedder.embed(embedder.batch([encoded]), encoded.kind), dim=1))
    return torch.cat(found)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def by_the_files(path: Path, prompt: str = "") -> Tensor:
    """(num_texts, width) the embeddings of TEXTS, as the documentation of the files says, without mmtrain."""
    settings = read(path / "sentence_bert_config.json")
    model = CLASSES[settings["transformer_task"]].from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    found = []
    for text in TEXTS:
        how = settings["modality_config"].get("message", settings["modality_config"]["text"])
        if "format" in how:
            turns = [("system", prompt), ("user", text)] if prompt else [("user", text)]
            content = [
                {"role": role, "content": said if how["format"] == "flat" else [{"type": "text", "text": said}]}
                for role, said in turns
            ]
            chat = settings["processing_kwargs"]["chat_template"]
            inputs = tokenizer.apply_chat_template(content, return_dict=True, return_tensors="pt", **chat)
            with torch.no_grad():
                tokens = model(**inputs, output_hidden_states=True).hidden_states[-1][0]
            assert how["method_output_name"] == ["hidden_states", -1]
            pooling = read(path / "1_Pooling" / "config.json")["pooling_mode"]
            found.append(tokens[-1] if pooling == "lasttoken" else tokens.mean(0))
        else:
            padded = {"padding": True} | settings["processing_kwargs"]["text"]
            with torch.no_grad():
                output = getattr(model, how["method"])(
                    **tokenizer([text], return_tensors="pt", truncation=True, **padded)
                )
            found.append(output[how["method_output_name"]][0])
    assert read(path / "modules.json")[-1]["path"] == "2_Normalize"
    return F.normalize(torch.stack(found), dim=1)


RUNS: list[Any] = [
    pytest.param("clip", {}, id="clip-full"),
    pytest.param("clip", {"tune": {"vision": LORA, "language": LORA}, "objective": {"scale": 20.0}}, id="clip-lora"),
    pytest.param("siglip", {"objective": {"loss": "sigmoid"}}, id="siglip-full"),
    pytest.param(
        "vlm",
        {"objective": {"scale": 20.0, "pooling": "mean"}},
        id="vlm-mean",
        marks=pytest.mark.slow("one more run"),
    ),
    pytest.param("vlm", {"tune": FULL}, id="vlm-full", marks=pytest.mark.slow("one more run")),
    pytest.param("text", {}, id="text", marks=pytest.mark.slow("one more run")),
    *(
        pytest.param(name, {}, id=f"{name}-full", marks=pytest.mark.slow("the same of other families"))
        for name in ("chinese_clip", "align")
    ),
]


@pytest.mark.parametrize(("name", "sections"), RUNS)
def test_the_files_give_the_trained_embeddings(
    name: str, sections: dict[str, Any], make: Make, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make(name, **({"file": "texts.jsonl"} if name == "text" else {}), **sections)
    if name == "text":
        write_texts(folder)
    train(config)
    assert "by the files for sentence-transformers, by" in capsys.readouterr().err
    own = own_embeddings(config, [Item(text) for text in TEXTS], folder)
    assert (by_the_files(saved(config)) - own).norm(dim=1).max() <= 1e-5
    assert (own[0] - own[1]).norm() > 1e-2  # texts have embeddings of their own


def write_texts(folder: Path, instructions: Sequence[str] = ("",)) -> None:
    rows = [
        {
            "query": {
                "text": f"what is {n}",
                **({"instruction": own} if (own := instructions[n % len(instructions)]) else {}),
            },
            "positive": f"number {n}",
        }
        for n in range(12)
    ]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow("a run")
def test_an_instruction_becomes_the_prompt_of_queries(make: Make, folder: Path) -> None:
    write_texts(folder, ["Find the number."])
    config = make("vlm", "texts.jsonl")
    train(config)
    prompts = read(saved(config) / "config_sentence_transformers.json")["prompts"]
    assert prompts == {"query": "Find the number.", "document": ""}
    own = own_embeddings(config, [Item(text, (), "Find the number.") for text in TEXTS], folder)
    assert (by_the_files(saved(config), prompts["query"]) - own).norm(dim=1).max() <= 1e-5
    assert (by_the_files(saved(config)) - own).norm(dim=1).max() > 1e-3


@pytest.mark.slow("one more run")
def test_several_instructions_have_no_default(make: Make, folder: Path) -> None:
    write_texts(folder, ["Find the number.", "Find the word."])
    config = make("vlm", "texts.jsonl")
    train(config)
    assert read(saved(config) / "config_sentence_transformers.json")["prompts"] == {"query": "", "document": ""}
    card = (saved(config) / "README.md").read_text()
    assert "Each query of the training data had one of 2 instructions: give one as `prompt=`." in card


FAULTS: dict[str, dict[str, Any]] = {
    "its embeddings would differ by": {"processing": {"text": {"max_length": 3}}},
    "the model refuses its inputs": {"methods": {"image": {"method": "get_nothing", "method_output_name": "nothing"}}},
}


@pytest.mark.parametrize("reason", FAULTS)
def test_files_that_give_other_embeddings_are_not_kept(
    reason: str, make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right: Any = vars(Towers)["sentence_modules"]
    wrong = property(lambda towers: dataclasses.replace(right.fget(towers), **FAULTS[reason]))
    monkeypatch.setattr(Towers, "sentence_modules", wrong)
    config = make("clip")
    train(config)
    assert f"sentence-transformers cannot load it: {reason}" in capsys.readouterr().err
    target = Path(config.run.output_dir) / "model"
    assert (target / "model.safetensors").exists()
    assert not any((target / name).exists() for name in ("1_Pooling", "2_Normalize", *FILES))
    assert "sentence" not in (target / "README.md").read_text()


@pytest.mark.slow("one more family")
def test_a_processor_that_overrides_its_image_processor_is_found_out(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """That of SigLIP 2 makes patches of 16 pixels, whatever its image processor says; this model's have 8."""
    train(make("siglip2"))
    assert "sentence-transformers cannot load it: the model refuses its inputs" in capsys.readouterr().err


def test_the_class_of_the_processor_is_named_where_no_file_does(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 8}')
    name_processor(tmp_path, "CLIPProcessor")
    assert read(tmp_path / "tokenizer_config.json") == {"model_max_length": 8, "processor_class": "CLIPProcessor"}
    (tmp_path / "preprocessor_config.json").write_text('{"processor_class": "Own"}')
    (tmp_path / "tokenizer_config.json").write_text("{}")
    name_processor(tmp_path, "CLIPProcessor")
    assert read(tmp_path / "tokenizer_config.json") == {}


@pytest.mark.slow("loads the library")
@pytest.mark.parametrize(("name", "sections"), RUNS)
def test_the_library_gives_the_trained_embeddings(
    name: str, sections: dict[str, Any], make: Make, folder: Path, tmp_path: Path
) -> None:
    """Texts and images, of different lengths in one batch."""
    library = pytest.importorskip("sentence_transformers")
    config = make(name, **({"file": "texts.jsonl"} if name == "text" else {}), **sections)
    if name == "text":
        write_texts(folder)
    train(config)
    model = library.SentenceTransformer(str(saved(config)), device="cpu")
    items, inputs = [Item(text) for text in TEXTS], list[Any](TEXTS)
    image = PIL.Image.new("RGB", (60, 40), "red")
    image.save(tmp_path / "one.png")
    if name != "text":
        items.append(Item(None, (Image("one.png"),)))
        inputs.append(image)
    if name == "vlm":
        items += [Item("which?", (Image("one.png"),)), Item("which?", (Image("one.png"),) * 2)]
        inputs += [{"image": image, "text": "which?"}, {"image": [image, image], "text": "which?"}]
    found = [
        model.encode(inputs[:3], convert_to_tensor=True),
        *(model.encode([one], convert_to_tensor=True) for one in inputs[3:]),
    ]
    own = own_embeddings(config, items, tmp_path)
    assert (torch.cat(found) - own).norm(dim=1).max() <= 1e-5
