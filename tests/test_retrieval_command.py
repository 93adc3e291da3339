"""`mmtrain eval retrieval`, from a config to its figures, its page and its refusals."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, CLIPModel
from typer.testing import CliRunner

from mmtrain import api
from mmtrain.cli import app
from mmtrain.config import Config, dump_config
from mmtrain.contrastive.embed_all import embed_all
from mmtrain.encoding.tower_processor import load_tower_processor
from mmtrain.errors import UserError
from mmtrain.progress import QUIET
from mmtrain.retrieval.command import RetrievalOptions, retrieval_figures
from mmtrain.retrieval.evaluated import loaded_embedder
from mmtrain.retrieval.evaluation import RetrievalEvaluation
from mmtrain.retrieval.page import page_of_retrieval
from mmtrain.runtime.processes import Runtime
from mmtrain.safe_text import path_end
from support.builders import TINY
from support.tower_models import LENGTH, make_clip

COLOURS = ("red", "green", "blue", "yellow", "black", "white")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip") / "model")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def write_pairs(folder: Path, records: Sequence[dict[str, Any]], name: str = "pairs.jsonl") -> Path:
    for colour in COLOURS:
        PIL.Image.new("RGB", (40, 32), colour).save(folder / f"{colour}.png")
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return folder / name


def captioned() -> list[dict[str, Any]]:
    """Six images; the first has two captions, and the last two share one."""
    texts: list[Any] = [f"it is {colour}" for colour in COLOURS]
    texts[0] = ["it is red", "a warm one"]
    texts[5] = "it is black"
    return [{"image": f"{colour}.png", "text": text} for colour, text in zip(COLOURS, texts, strict=True)]


def config_of(model: Path, folder: Path, *files: Path, **keys: Any) -> Config:
    sources = [{"path": str(file)} for file in files]
    return Config.model_validate(
        {
            "model": {"path": str(model), "dtype": "float32"},
            "tune": {"vision": {"mode": "full"}, "language": {"mode": "full"}},
            "data": {"train": sources[:1], "eval": sources},
            "objective": {"kind": "contrastive"},
            "run": {"output_dir": str(folder / "run"), "device": "cpu"},
        }
        | keys
    )


def scores_by_transformers(model: Path, folder: Path) -> tuple[np.ndarray, list[str]]:
    """(num_images, num_texts) cosines of the model's own forward, and the distinct texts in order."""
    processor, loaded = load_tower_processor(str(model), {}), CLIPModel.from_pretrained(model).eval()
    texts = ["it is red", "a warm one", *(f"it is {colour}" for colour in COLOURS[1:5])]
    images = [PIL.Image.open(folder / f"{colour}.png") for colour in COLOURS]
    tokens = processor.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        made = loaded(**tokens, **processor.images(images=images, return_tensors="pt"))
    return (made.image_embeds @ made.text_embeds.T).double().numpy(), texts


def test_figures_equal_a_brute_force_over_the_models_own_scores(clip: Path, tmp_path: Path) -> None:
    row, _ = retrieval_figures(config_of(clip, tmp_path, write_pairs(tmp_path, captioned())), RetrievalOptions())
    scores, texts = scores_by_transformers(clip, tmp_path)
    right = np.zeros(scores.shape, bool)
    for image, record in enumerate(captioned()):
        for text in [record["text"]] if isinstance(record["text"], str) else record["text"]:
            right[image, texts.index(text)] = True
    for name, of_queries, is_right in (
        ("image_to_text", scores, right),
        ("text_to_image", scores.T, right.T),
    ):
        ranks = [
            min(1 + int((own[~is_own] >= own[at] - 1e-6).sum()) for at in np.flatnonzero(is_own))
            for own, is_own in zip(of_queries, is_right, strict=True)
        ]
        found = row[name]
        assert (found["num_queries"], found["num_candidates"]) == of_queries.shape
        assert found["mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]), rel=1e-12)
        for k in (1, 5, 10):
            assert found[f"recall@{k}"] == np.mean([rank <= k for rank in ranks])
            low, high = found["interval"][f"recall@{k}"]
            assert low <= found[f"recall@{k}"] <= high
    assert row["sources"] == {}
    assert row["num_samples"] == 6


def test_the_most_confused_queries_are_named(clip: Path, tmp_path: Path) -> None:
    row, _ = retrieval_figures(config_of(clip, tmp_path, write_pairs(tmp_path, captioned())), RetrievalOptions())
    scores, texts = scores_by_transformers(clip, tmp_path)
    confused = row["image_to_text"]["most_confused"]
    assert confused
    for one in confused:
        image = COLOURS.index(one["query"]["images"][0].removesuffix(".png"))
        assert one["query"]["place"] == f"{tmp_path / 'pairs.jsonl'}:{image + 1}"
        assert one["wrong_score"] == pytest.approx(scores[image, texts.index(one["wrong"]["text"])], abs=1e-5)
        assert one["right_score"] == pytest.approx(scores[image, texts.index(one["right"]["text"])], abs=1e-5)
        assert one["wrong_score"] > one["right_score"]
    leads = [one["wrong_score"] - one["right_score"] for one in confused]
    assert leads == sorted(leads, reverse=True)


def test_several_sources_are_also_searched_alone(clip: Path, tmp_path: Path) -> None:
    first = write_pairs(tmp_path, captioned()[:4], "first.jsonl")
    second = write_pairs(tmp_path, captioned()[4:], "second.jsonl")
    row, _ = retrieval_figures(config_of(clip, tmp_path, first, second), RetrievalOptions())
    assert row["text_to_image"]["num_candidates"] == 6
    candidates = {name: found["text_to_image"]["num_candidates"] for name, found in row["sources"].items()}
    assert candidates == {"first.jsonl": 4, "second.jsonl": 2}
    assert row["sources"]["second.jsonl"]["text_to_image"]["recall@1"] == 1.0  # both images have the text


def test_pairs_of_queries_and_documents(clip: Path, tmp_path: Path) -> None:
    """A negative is a candidate, and nobody searches with it."""
    records = [{"query": "red", "positive": "it is red", "negatives": ["it is blue", "it is green"]}]
    row, _ = retrieval_figures(config_of(clip, tmp_path, write_pairs(tmp_path, records)), RetrievalOptions())
    assert (row["query_to_document"]["num_queries"], row["query_to_document"]["num_candidates"]) == (1, 3)
    assert (row["document_to_query"]["num_queries"], row["document_to_query"]["num_candidates"]) == (1, 1)


def test_zero_shot_classification(clip: Path, tmp_path: Path) -> None:
    path = write_pairs(tmp_path, [{"image": f"{colour}.png", "text": colour} for colour in COLOURS])
    (tmp_path / "classes.txt").write_text("".join(f"{colour}\n" for colour in COLOURS), encoding="utf-8")
    templates = ("it is {}", "a {} one")
    options = RetrievalOptions(classes=tmp_path / "classes.txt", templates=templates)
    found = retrieval_figures(config_of(clip, tmp_path, path), options)[0]["zero_shot"]
    processor, loaded = load_tower_processor(str(clip), {}), CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        images = [PIL.Image.open(tmp_path / f"{colour}.png") for colour in COLOURS]
        pixels = processor.images(images=images, return_tensors="pt")
        of_class = []
        for colour in COLOURS:
            texts = [template.replace("{}", colour) for template in templates]
            embedded = loaded.get_text_features(**processor.tokenizer(texts, padding=True, return_tensors="pt"))
            of_class.append(torch.nn.functional.normalize(embedded.pooler_output, dim=-1).mean(0))
        scores = (
            loaded.get_image_features(**pixels).pooler_output
            @ torch.nn.functional.normalize(torch.stack(of_class), dim=-1).T
        )
    right = (scores.argmax(1) == torch.arange(6)).float()
    assert found["accuracy@1"] == pytest.approx(float(right.mean()))
    assert found["by_class"] == dict(zip(COLOURS, right.tolist(), strict=True))
    assert found["mean_class_accuracy"] == pytest.approx(float(right.mean()))
    top = scores.topk(5, dim=1).indices
    assert found["accuracy@5"] == pytest.approx(np.mean([i in top[i].tolist() for i in range(6)]))


def test_an_image_without_a_class_is_refused_by_its_line(clip: Path, tmp_path: Path) -> None:
    path = write_pairs(tmp_path, [{"image": "red.png", "text": "red"}, {"image": "blue.png", "text": "cyan"}])
    (tmp_path / "classes.txt").write_text("red\nblue\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"pairs\.jsonl:2: expected an image with the name of a class, found 'cyan'"):
        retrieval_figures(config_of(clip, tmp_path, path), RetrievalOptions(classes=tmp_path / "classes.txt"))


@pytest.mark.parametrize(
    ("content", "templates", "reason"),
    [
        ("red\n", (), "expected at least two different classes"),
        ("red\nred\n", (), "expected at least two different classes"),
        ("red\nblue\n", ("a photo",), r"--template 'a photo': expected one {} in it"),
        (None, (), "cannot be read: No such file"),
        ("red\n" + "very " * LENGTH + "blue\n", (), "tokens, over the"),
    ],
)
def test_classes_that_cannot_be_used(
    clip: Path, tmp_path: Path, content: str | None, templates: tuple[str, ...], reason: str
) -> None:
    path = write_pairs(tmp_path, [{"image": "red.png", "text": "red"}])
    if content is not None:
        (tmp_path / "classes.txt").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=reason):
        retrieval_figures(
            config_of(clip, tmp_path, path), RetrievalOptions(classes=tmp_path / "classes.txt", templates=templates)
        )


def test_a_model_that_was_saved_whole_is_compared_with_the_base_model(clip: Path, tmp_path: Path) -> None:
    other = make_clip(tmp_path / "run" / "model")
    weights = CLIPModel.from_pretrained(other)
    with torch.no_grad():
        weights.visual_projection.weight.neg_()  # the farthest text becomes the nearest
    weights.save_pretrained(other)
    config = config_of(clip, tmp_path, write_pairs(tmp_path, captioned()))
    base = retrieval_figures(config, RetrievalOptions())[0]["image_to_text"]
    found = retrieval_figures(config, RetrievalOptions(adapter=tmp_path / "run", compare="base"))[0]["image_to_text"]
    assert found["base"]["mrr"] == base["mrr"]
    assert found["mrr"] != base["mrr"]
    assert found["minus_base"]["mrr"] == pytest.approx(found["mrr"] - base["mrr"])


def test_a_model_that_was_saved_whole_gets_the_processor_of_the_config(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(clip, tmp_path, write_pairs(tmp_path, captioned()))
    base = retrieval_figures(config, RetrievalOptions())[0]
    saved = Path(shutil.copytree(clip, tmp_path / "run" / "model")) / "preprocessor_config.json"
    saved.write_text(json.dumps(json.loads(saved.read_text()) | {"image_mean": [9.0, 9.0, 9.0]}))
    found = retrieval_figures(config, RetrievalOptions(adapter=tmp_path / "run"))[0]
    assert found == base
    words = "was trained with another processor, and the config's is used: model.image_processor.image_mean"
    assert words in capsys.readouterr().err


def command(config: Config, folder: Path, *words: str) -> Any:
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    return CliRunner().invoke(app, ["eval", "retrieval", str(folder / "config.yaml"), *words])


def test_the_report_fits_80_columns_and_the_page_escapes_text(clip: Path, tmp_path: Path) -> None:
    records = captioned()
    records[1]["text"] = "<script>alert(1)</script>"
    config = config_of(clip, tmp_path, write_pairs(tmp_path, records))
    done = command(config, tmp_path, "--html", str(tmp_path / "page.html"))
    assert done.exit_code == 0, done.output
    table = [line for line in done.output.splitlines() if "recall@" in line or "ndcg" in line]
    assert len(table) == 2 * 4
    assert all(len(line) <= 80 for line in table)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "data:image/png;base64," in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_page_names_an_image_that_can_no_longer_be_read(clip: Path, tmp_path: Path) -> None:
    config = config_of(clip, tmp_path, write_pairs(tmp_path, captioned()))
    row, evaluation = retrieval_figures(config, RetrievalOptions())
    confused = {one["query"]["images"][0] for one in row["image_to_text"]["most_confused"]}
    gone = confused.pop()
    (tmp_path / gone).unlink()
    page = page_of_retrieval(row, evaluation.content)
    assert f"<bdi>{gone}</bdi> can no longer be read" in page
    assert page.count("can no longer be read") == page.count(f"<bdi>{gone}</bdi> can no longer")
    assert all(f'alt="{other}"' in page for other in confused)


def test_json_has_both_directions_and_is_what_the_python_function_gives(clip: Path, tmp_path: Path) -> None:
    config = config_of(clip, tmp_path, write_pairs(tmp_path, captioned()))
    row = json.loads(command(config, tmp_path, "--json").stdout)
    assert row == api.evaluate(config, measure="retrieval")
    for name in ("image_to_text", "text_to_image"):
        assert {"recall@1", "recall@5", "recall@10", "mrr", "ndcg@10", "interval"} <= row[name].keys()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (RetrievalOptions(compare="base"), "--compare base: there is nothing to compare"),
        (RetrievalOptions(templates=("a {}",)), "--template: it is for zero-shot classification"),
        (
            RetrievalOptions(html=Path("none/page.html")),
            "--html 'none/page.html': there is no folder",
        ),
        (
            RetrievalOptions(adapter=Path("none")),
            "--adapter none: expected the directory of an adapter or of a finished run",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(
    clip: Path, tmp_path: Path, options: RetrievalOptions, reason: str
) -> None:
    with pytest.raises(UserError) as caught:
        retrieval_figures(config_of(clip, tmp_path, write_pairs(tmp_path, captioned())), options)
    assert reason in str(caught.value)


def test_a_config_for_chats_is_refused(clip: Path, tmp_path: Path) -> None:
    config = config_of(clip, tmp_path, write_pairs(tmp_path, captioned()), objective={"kind": "chat"})
    with pytest.raises(UserError, match=r"eval retrieval: it is for objective\.kind: contrastive, the config has chat"):
        retrieval_figures(config, RetrievalOptions())


@pytest.mark.parametrize("command", [["eval", "perplexity"], ["eval", "answers"]])
def test_commands_for_chats_refuse_pairs_by_name(clip: Path, tmp_path: Path, command: list[str]) -> None:
    config = config_of(clip, tmp_path, write_pairs(tmp_path, captioned()))
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    error = CliRunner().invoke(app, [*command, str(tmp_path / "config.yaml")]).exception
    assert isinstance(error, UserError)
    assert f"{' '.join(command)}: it is for objective.kind: chat, the config has contrastive; use " in str(error)


def test_an_adapter_is_compared_with_the_base_model(clip: Path, tmp_path: Path) -> None:
    """The embeddings are those of peft; the base model's are as without the adapter."""
    targets = ["q_proj", "v_proj"]
    settings = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="FEATURE_EXTRACTION")
    torch.manual_seed(0)
    adapted = get_peft_model(CLIPModel.from_pretrained(clip), settings)
    adapted.save_pretrained(tmp_path / "adapter")
    config = config_of(clip, tmp_path, write_pairs(tmp_path, captioned()))
    base = retrieval_figures(config, RetrievalOptions())[0]["text_to_image"]
    found = retrieval_figures(config, RetrievalOptions(adapter=tmp_path / "adapter", compare="base"))[0][
        "text_to_image"
    ]
    assert found["base"] == {key: base[key] for key in found["base"]}
    processor = load_tower_processor(str(clip), {})
    with torch.no_grad():
        tokens = processor.tokenizer(["it is green"], padding=True, return_tensors="pt")
        images = [PIL.Image.open(tmp_path / f"{colour}.png") for colour in COLOURS]
        made = adapted.eval().get_base_model()(**tokens, **processor.images(images=images, return_tensors="pt"))
    scores = (made.image_embeds @ made.text_embeds.T)[:, 0]
    (one,) = [one for one in found["most_confused"] if one["query"]["text"] == "it is green"] or [None]
    rank = 1 + int((scores[[0, 2, 3, 4, 5]] >= scores[1]).sum())
    assert (one is None) == (rank == 1)
    if one is not None:
        assert one["rank"] == rank
        assert one["right_score"] == pytest.approx(float(scores[1]), abs=1e-5)


@pytest.mark.slow("several commands")
def test_a_vision_language_model_searches_documents_of_images_and_texts(tmp_path: Path) -> None:
    """Also with an adapter, whose base model is as without it."""
    records: list[dict[str, Any]] = [
        {
            "query": {"text": "which is red?", "instruction": "Find it."},
            "positive": {"image": "red.png", "text": "one"},
        },
        {"query": {"text": "which is blue?"}, "positive": {"image": "blue.png"}, "negatives": ["a blue one"]},
    ]
    keys = {
        "tune": {"language": {"mode": "lora"}},
        "objective": {"kind": "contrastive", "scale": 20.0, "pooling": "last"},
    }
    config = config_of(TINY, tmp_path, write_pairs(tmp_path, records), **keys)
    base = retrieval_figures(config, RetrievalOptions())[0]
    assert (base["query_to_document"]["num_queries"], base["query_to_document"]["num_candidates"]) == (2, 3)
    assert (base["document_to_query"]["num_queries"], base["document_to_query"]["num_candidates"]) == (2, 2)
    targets = r"^(?:model\.language_model\.layers\.0\.self_attn\.q_proj)$"
    settings = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    get_peft_model(AutoModelForImageTextToText.from_pretrained(TINY), settings).save_pretrained(tmp_path / "adapter")
    found = retrieval_figures(config, RetrievalOptions(adapter=tmp_path / "adapter", compare="base"))[0]
    assert found["query_to_document"]["base"]["mrr"] == base["query_to_document"]["mrr"]
    adapted, alone = (
        embeddings_of(config, options) for options in (RetrievalOptions(tmp_path / "adapter"), RetrievalOptions())
    )
    assert adapted.shape == alone.shape
    assert not torch.allclose(adapted, alone, atol=1e-3)


def test_processes_that_share_the_items_embed_each_once(clip: Path, tmp_path: Path) -> None:
    """Every row is zero in all processes but one, and has the bits there that it has without sharing."""
    config = config_of(
        clip,
        tmp_path,
        write_pairs(tmp_path, captioned()),
        run={"output_dir": "r", "device": "cpu", "microbatch_tokens": 40},
    )
    embedder = loaded_embedder(config, None, Runtime(config.model.dtype, device="cpu"), QUIET)
    samples = RetrievalEvaluation(config, config.data.eval, embedder, QUIET).samples
    expected = embed_all(embedder, samples.items, samples.loaded, 40)
    shares = [embed_all(embedder, samples.items, samples.loaded, 40, share=(index, 3)) for index in range(3)]
    assert torch.equal(sum(shares, torch.zeros_like(expected)), expected)
    assert all(0 < share.any(1).sum() < len(expected) for share in shares)
    assert sum(int(share.any(1).sum()) for share in shares) == len(expected)


def embeddings_of(config: Config, options: RetrievalOptions) -> torch.Tensor:
    runtime = Runtime(config.model.dtype, device="cpu")
    embedder = loaded_embedder(config, options.adapter, runtime, QUIET)
    return RetrievalEvaluation(config, config.data.eval, embedder, QUIET).embed(embedder).items


def test_the_end_of_a_long_path_is_shown() -> None:
    assert path_end("a/b.png", 7) == "a/b.png"
    assert path_end("images/of/cats/001.png", 11) == "…ts/001.png"
