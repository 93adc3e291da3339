"""Every key of a config does what it says: with each of its values something else is seen, and it is what was set.

What is expected is written out in the tables. `seen.py` has what is looked at.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

import PIL.Image
import pytest
import torch
from pydantic import BaseModel, ValidationError

from mmtrain.config.schema import Config
from support import seen, seen_contrastive
from support.builders import mixed_rows, write_jsonl
from support.seen import REFUSED

QWEN = "qwen2_5_vl"
RATE, RANK, ALPHA = 0.01, 4, 8.0
LORA = {"mode": "lora", "rank": RANK, "alpha": ALPHA}


@dataclass(frozen=True)
class Key:
    """What `seen` gives for a config in which the key has a value: the values of the key and what is expected."""

    seen: Callable[[Config], Any]
    expected: Sequence[tuple[Any, Any]]
    given: dict[str, Any] = field(default_factory=dict)
    """Other keys of the config."""
    kind: str = "text"


@pytest.fixture(autouse=True)
def _own_cache_and_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder_of_files(tmp_path_factory: pytest.TempPathFactory, model_dirs: dict[str, Path]) -> Path:
    """The files that the tables name."""
    folder = tmp_path_factory.mktemp("files")
    for kind, path in model_dirs.items():
        (folder / kind).symlink_to(path)
    rows = mixed_rows(folder, with_images=False)
    write_jsonl(folder / "eight.jsonl", rows)
    write_jsonl(folder / "three.jsonl", rows[:3])
    write_jsonl(folder / "splits" / "train.jsonl", rows[:1])
    for number in range(2):
        write_jsonl(folder / "splits" / "data" / f"test-{number}.jsonl", rows[:1])
    write_jsonl(folder / "mixed.jsonl", mixed_rows(folder, with_images=True))
    turns = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "one"}]
    turns += [{"role": "user", "content": "b?"}, {"role": "assistant", "content": "two"}]
    write_jsonl(folder / "turns.jsonl", [{"messages": turns}])
    (folder / "dashes.jinja").write_text(
        "{% for m in messages %}- {{ m.content }}<|endoftext|>\n{% endfor %}{% if add_generation_prompt %}- {% endif %}"
    )
    reasoned = [turns[0], {"role": "assistant", "content": "<think>hm</think>one"}, *turns[2:]]
    write_jsonl(folder / "reasoned.jsonl", [{"messages": reasoned}])
    write_jsonl(folder / "extra.jsonl", [{"messages": turns, "bbox": [1, 2]}])
    llava = [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "one"}]
    write_jsonl(folder / "llava.jsonl", [{"conversations": llava}])
    faulty = [{"question": question, "answer": "one"} for question in ("a?", 5, "b?")]
    write_jsonl(folder / "faulty.jsonl", faulty)
    write_jsonl(folder / "twice.jsonl", [{"question": "a?", "answer": "one"}] * 2)
    write_jsonl(folder / "columns.jsonl", [{"q": "a?", "a": "one"}])
    write_jsonl(folder / "caption.jsonl", [{"caption": "one"}])
    write_jsonl(folder / "pairs.jsonl", [{"query": "a", "positive": "b", "topic": 7, "brand_id": "b"}])
    image = [{"role": "user", "content": "<image>a?"}, {"role": "assistant", "content": "one"}]
    for name in ("small", "large", "broken"):
        write_jsonl(folder / name / "one.jsonl", [{"messages": image, "images": ["0.png"]}])
    marked = {"query": "<pic> [IMG] <img> a?", "response": "one", "images": ["0.png"]}
    write_jsonl(folder / "small" / "marked.jsonl", [marked])
    PIL.Image.new("RGB", (64, 64)).save(folder / "small" / "0.png")
    PIL.Image.new("RGB", (128, 128)).save(folder / "large" / "0.png")
    content = (folder / "small" / "0.png").read_bytes()
    middle = content.index(b"IDAT") + 4
    (folder / "broken" / "0.png").write_bytes(content[:middle] + bytes(8) + content[middle + 8 :])
    return folder


@pytest.fixture
def files(folder_of_files: Path, tmp_path: Path) -> None:
    """Them, in the working directory."""
    for path in folder_of_files.iterdir():
        if path.is_symlink() or path.is_file():
            (tmp_path / path.name).symlink_to(path)
        else:  # files of a folder may not lead out of it
            shutil.copytree(path, tmp_path / path.name)


def config_with(kind: str, keys: dict[str, Any]) -> Config:
    data: dict[str, Any] = {
        "model": {"path": kind, "dtype": "float32"},
        "tune": {"language": LORA},
        "data": {"train": [{"path": "eight.jsonl"}], "eval": [{"path": "three.jsonl"}]},
        "train": {"steps": 2, "batch_size": 2, "learning_rate": RATE, "schedule": "constant"},
        "run": {"output_dir": "run", "checkpoint_every": 1, "keep_checkpoints": 9},
    }
    for key, value in keys.items():
        *sections, last = (int(word) if word.isdecimal() else word for word in key.split("."))
        here: Any = data
        for section in sections:
            here = here.setdefault(section, {}) if isinstance(here, dict) else here[section]
        here[last] = deepcopy(value)
    return Config.model_validate(data)


PROJECTIONS = {"vision": ("qkv", "proj"), "projector": ("mlp.0", "mlp.2"), "language": ("q_proj", "o_proj")}


def keys_of(component: str) -> dict[str, Key]:
    """The keys of one component; another one is trained in full, so that something always is."""
    of, (first, second) = f"tune.{component}", PROJECTIONS[component]
    other = {"tune.vision" if component == "projector" else "tune.projector": {"mode": "full"}}
    given = {"tune.language": {"mode": "frozen"}} | other | {of: LORA}
    plain = ALPHA / RANK

    def key(look: Callable[[Config, str], Any], *expected: tuple[Any, Any]) -> Key:
        return Key(lambda config: look(config, component), expected, given | {"data.train.0.path": "mixed.jsonl"}, QWEN)

    modes = Key(
        lambda config: seen.trainable_kinds(config, component),
        [({"mode": "frozen"}, set()), ({"mode": "full"}, {"own"}), (LORA, {"adapter"})],
        given,
        QWEN,
    )
    return {
        of: modes,
        f"{of}.learning_rate": key(seen.rates, (None, {RATE}), (0.5, {0.5})),
        f"{of}.rank": key(seen.ranks, (2, {2}), (8, {8})),
        f"{of}.alpha": key(seen.scalings, (2.0, {(2.0 / RANK, False)}), (16.0, {(16.0 / RANK, False)})),
        f"{of}.dropout": key(seen.computes_without_dropout, (0.0, True), (0.5, False)),
        f"{of}.targets": key(
            seen.adapted,
            ([first], {first.split(".")[-1]}),
            ([first, second], {first.split(".")[-1], second.split(".")[-1]}),
        ),
        f"{of}.variant": key(
            seen.scalings,
            ("lora", {(plain, False)}),
            ("rslora", {(ALPHA / math.sqrt(RANK), False)}),
            ("dora", {(plain, True)}),
        ),
    }


def sources(at: str, number: Callable[[Config], Any], tokens: Callable[[Config], Any]) -> dict[str, Key]:
    """The keys that a source of `data.train` and one of `data.eval` have."""
    image = {f"{at}.path": "small/one.jsonl"}
    formats = [("auto", 1), ("conversations", 1), ("openai", REFUSED), ("messages", REFUSED), ("alpaca", REFUSED)]
    columns = [({}, REFUSED), ({"question": "q", "answer": "a"}, 1)]
    return {
        f"{at}.path": Key(number, [("eight.jsonl", 8), ("three.jsonl", 3)]),
        f"{at}.split": Key(number, [("train", 1), ("test", 2), ("validation", REFUSED)], {f"{at}.path": "splits"}),
        f"{at}.root": Key(tokens, [(None, 16), ("large", 64)], image, QWEN),
        f"{at}.format": Key(number, formats, {f"{at}.path": "llava.jsonl"}),
        f"{at}.fields": Key(number, columns, {f"{at}.path": "columns.jsonl"}),
        f"{at}.prompt": Key(number, [(None, REFUSED), ("What is it?", 1)], {f"{at}.path": "caption.jsonl"}),
        f"{at}.image_mark": Key(tokens, [(None, REFUSED), ("<pic>", 16)], {f"{at}.path": "small/marked.jsonl"}, QWEN),
    }


def component_modules() -> dict[str, Key]:
    """A module of another component is trained where it is named."""

    def key(component: str, module: str, weight: str) -> Key:
        given = {"tune.language": {"mode": "frozen"}} | {f"tune.{component}": {"mode": "full"}}
        return Key(seen.is_trainable(f"{module}.{weight}"), [([], False), ([module], True)], given, QWEN)

    return {
        "tune.components.vision": key("vision", "model.visual.merger", "ln_q.weight"),
        "tune.components.projector": key("projector", "model.visual.patch_embed", "proj.weight"),
        "tune.components.language": key("language", "model.visual.merger", "ln_q.weight"),
    }


SKIP = {"data.on_fault": "skip"}
SKIP_ONE = {"data.max_skipped": 1}
ONE_IMAGE = {"data.train.0.path": "small/one.jsonl", "train.batch_size": 1}
DATA = {
    "model.path": Key(seen.model_type, [("text", "qwen3"), (QWEN, QWEN)]),
    "model.chat_template": Key(
        seen.text_trained_on,
        [(None, "one<|im_end|>two<|im_end|>"), ("dashes.jinja", "one<|endoftext|>two<|endoftext|>")],
        {"data.train.0.path": "turns.jsonl"},
    ),
    "model.image_processor": Key(
        seen.image_tokens,
        [({}, 64), ({"max_pixels": 4096}, 16)],  # 128x128 pixels, of which one token covers 16x16
        {"data.train.0.path": "large/one.jsonl", "train.batch_size": 1},
        kind=QWEN,
    ),
    "model.adapter": Key(seen.starts_with_new_adapters, [(None, True), ("earlier", False)]),
    "model.dtype": Key(seen.frozen_types, [("float32", {torch.float32}), ("bfloat16", {torch.bfloat16})]),
    "model.quantization": Key(seen.quantized_layers, [(None, 0), ("nf4", 14)]),
    **sources("data.train.0", seen.num_samples, seen.image_tokens),
    **sources("data.eval.0", seen.num_eval_samples, seen.eval_image_tokens),
    "data.train.0.max_samples": Key(seen.num_samples, [(None, 8), (3, 3)]),
    "data.eval.0.max_samples": Key(seen.num_eval_samples, [(None, 3), (2, 2)]),
    "data.eval.0.from": Key(
        seen.num_samples_of_both_sides,
        [(None, REFUSED), ("train", 8)],
        {"data.eval": [{"share": 0.5}]},
    ),
    "data.eval.0.share": Key(
        seen.num_eval_samples,
        [(0.01, 1), (0.999, 7)],  # each side has a sample
        {"data.eval": [{"from": "train"}]},
    ),
    "data.dedup": Key(seen.num_samples, [(False, 2), (True, 1)], {"data.train.0.path": "twice.jsonl"}),
    **{
        f"data.{section}.0.group": Key(
            seen.group_of_a_pair(section),
            [("topic", "7"), ("brand_id", "b")],
            {f"data.{section}.0.path": "pairs.jsonl", "objective": {"kind": "contrastive", "scale": "fixed"}},
        )
        for section in ("train", "eval")
    },
    "data.train.0.weight": Key(seen.steps_of_an_epoch, [(1.0, 4), (2.5, 10)]),
    "data.train.0.batch": Key(
        seen.sources_of_the_first_step,
        [("mixed", {0, 1}), ("own", {0})],
        {"data.train": [{"path": "three.jsonl"}, {"path": "three.jsonl"}], "train.batch_size": 6},
    ),
    "data.eval.0.name": Key(seen.eval_name, [(None, "three.jsonl"), ("held-out", "held-out")]),
    "data.eval.0.metric": Key(seen.metric_of_answers, [(None, "exact_match"), ("chrf", "chrf"), ("anls", "anls")]),
    "data.max_length": Key(seen.num_samples, [(4096, 8), (5, REFUSED)]),
    "data.on_fault": Key(
        seen.num_skipped, [("error", REFUSED), ("skip", 1)], {"data.train.0.path": "faulty.jsonl", **SKIP_ONE}
    ),
    "data.streaming": Key(seen.sizes_of_windows, [(None, None), (False, None), (True, [8]), ({"window": 7}, [7, 1])]),
    "data.streaming.window": Key(seen.sizes_of_windows, [(3, [3, 3, 2]), (8, [8])]),
    "data.max_skipped": Key(
        seen.num_skipped,
        [(0, REFUSED), (0.2, REFUSED), (0.4, 1), (1, 1)],
        {"data.train.0.path": "faulty.jsonl", **SKIP},
    ),
    "data.too_long": Key(seen.num_dropped, [("error", REFUSED), ("drop", 1)], {"data.max_length": 89}),
    "data.decode_images": Key(
        seen.num_samples, [(True, REFUSED), (False, 1)], {"data.train.0.path": "broken/one.jsonl"}, QWEN
    ),
    "data.ignore_fields": Key(seen.num_samples, [([], REFUSED), (["bbox"], 1)], {"data.train.0.path": "extra.jsonl"}),
    "labels.train_on": Key(
        seen.text_trained_on,
        [("assistant", "one<|im_end|>two<|im_end|>"), ("last", "two<|im_end|>")],
        {"data.train.0.path": "turns.jsonl"},
    ),
    "labels.reasoning": Key(
        seen.text_trained_on,
        [("keep", "<think>hm</think>one<|im_end|>two<|im_end|>"), ("drop", "one<|im_end|>two<|im_end|>")],
        {"data.train.0.path": "reasoned.jsonl"},
    ),
    "labels.end_of_turn": Key(
        seen.text_trained_on,
        [(True, "one<|im_end|>two<|im_end|>"), (False, "onetwo")],
        {"data.train.0.path": "turns.jsonl"},
    ),
}
TRAIN = {
    "train.steps": Key(seen.num_steps, [(3, 3), (5, 5)]),
    "train.epochs": Key(seen.num_steps, [(None, 4), (2.6, 11)], {"train.steps": None}),
    "train.batch_size": Key(seen.samples_of_a_step, [(2, 2), (5, 5)]),
    "train.learning_rate": Key(seen.rate_at(1), [(0.01, 0.01), (0.003, 0.003)]),
    "train.schedule": Key(
        seen.rate_at(2),
        [("constant", RATE), ("linear", RATE * 0.75), ("cosine", RATE * (1 + math.cos(math.pi / 4)) / 2)],
        {"train.steps": 4},
    ),
    "train.warmup_steps": Key(seen.rate_at(1), [(0, RATE), (4, RATE / 4)], {"train.steps": 5}),
    "train.weight_decay": Key(seen.weight_decay, [(0.0, 0.0), (10.0, 10.0)]),
    "train.max_grad_norm": Key(seen.norm_of_the_first_gradient, [(None, None), (0.05, 0.05), (0.1, 0.1)]),
    "train.seed": Key(seen.same_as_seed_0, [(0, (True, True)), (1, (False, False))]),
}
WATCHED = {"train.steps": 4, "run.eval_every": 1}
STOPPING = {"metric": "eval/nll", "patience": 1}
TRAIN |= {
    "train.early_stopping": Key(seen.last_step, [(None, 4), (STOPPING, 2)], WATCHED),
    "train.early_stopping.metric": Key(
        seen.last_step, [("eval/nll", 2), ("eval/token_accuracy", 4)], {**WATCHED, "train.early_stopping.patience": 1}
    ),
    "train.early_stopping.patience": Key(
        seen.last_step, [(1, 2), (2, 3)], {**WATCHED, "train.early_stopping.metric": "eval/nll"}
    ),
}
FULL = {"mode": "full"}
PAIRS = {"objective.kind": "contrastive", "tune": {"vision": FULL, "projector": FULL, "language": FULL}}
NO_SCALE = PAIRS | {"objective.scale": 1e-6, "train.batch_size": 3}
"""All similarities are 0: a positive among n items costs ln n."""
ACROSS, DOWN = (math.log(3) + 2 * math.log(4)) / 3, math.log(3)
OBJECTIVE = {
    "objective.kind": Key(
        seen_contrastive.what_a_step_counts,
        [("chat", {"num_supervised"}), ("contrastive", {"num_pairs"})],
        {"tune": {"language": FULL}},
    ),
    "objective.loss": Key(
        seen_contrastive.loss,
        [("infonce", round((ACROSS + DOWN) / 2, 4)), ("sigmoid", round((3 + 8) * math.log(2) / 3, 4))],
        NO_SCALE,
    ),
    "objective.symmetric": Key(
        seen_contrastive.loss,
        [("auto", round((ACROSS + DOWN) / 2, 4)), (True, round((ACROSS + DOWN) / 2, 4)), (False, round(ACROSS, 4))],
        NO_SCALE,
    ),
    "objective.scale": Key(
        seen_contrastive.scale, [("trained", (14.285, True)), ("fixed", (14.285, False)), (20.0, (20.0, False))], PAIRS
    ),
    "objective.bias": Key(
        seen_contrastive.bias,
        [(None, (0.0, True)), ("trained", (0.0, True)), ("fixed", (0.0, False)), (-10.0, (-10.0, False))],
        PAIRS | {"objective.loss": "sigmoid"},
    ),
    "objective.temperature_max": Key(seen_contrastive.scale, [(100.0, (14.285, True)), (5.0, (5.0, True))], PAIRS),
    "objective.pooling": Key(
        seen_contrastive.num_pooled_tokens,
        [("last", 1), ("mean", 32), ("family", REFUSED)],  # by transformers the prompt has 32 tokens
        {"objective.kind": "contrastive", "objective.scale": 20.0},
    ),
    "objective.dims": Key(seen_contrastive.num_trained_values, [((), 16), ([4], 4), ([4, 8], 8)], PAIRS),
}
RUN = {
    "run.output_dir": Key(seen.folders_written, [("run", ["run"]), ("other", ["other"])]),
    "run.microbatch_tokens": Key(seen.microbatches, [(1, [(2, True)]), (10_000, [(1, True)])]),
    "run.microbatches": Key(seen.microbatches, [("auto", [(1, True)]), (2, [(2, True)])]),
    "run.packing": Key(seen.microbatches, [("auto", [(1, True)]), (True, [(1, True)]), (False, [(1, False)])]),
    "run.weights": Key(seen.num_shardings, [("replicate", 0), ("shard", 1)]),
    "run.device": Key(seen.device, [("cpu", "cpu"), ("cuda", REFUSED)]),
    "run.threads": Key(seen.num_threads, [(1, 1), (2, 2)]),
    "run.hang_timeout": Key(seen.seconds_of_the_supervisor, [(100.0, [100.0]), (200.0, [200.0])]),
    "run.activation_checkpointing": Key(seen.forward_passes_of_a_layer, [(False, 1), (True, 2), ("auto", 1)]),
    "run.kernels": Key(seen.has_kernels, [("auto", True), ("off", False)]),
    "run.compile": Key(seen.is_compiled, [(False, False), (True, True)]),
    "run.image_cache.memory_gib": Key(
        seen.calls_of_the_tower_again, [(0.0, (1, False)), (1.0, (0, False))], ONE_IMAGE, QWEN
    ),
    "run.image_cache.disk_gib": Key(
        seen.calls_of_the_tower_again,
        [(0.0, (1, False)), (1.0, (0, True))],
        ONE_IMAGE | {"run.image_cache.memory_gib": 0.0},
        QWEN,
    ),
    "run.graph_memory_gib": Key(seen_contrastive.num_kept_graphs, [(0.0, 0), (1.0, 2)], PAIRS),
    "run.checkpoint_every": Key(seen.saved_steps, [(1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3, 4])], {"train.steps": 4}),
    "run.keep_checkpoints": Key(seen.saved_steps, [(2, [3, 4]), (3, [2, 3, 4])], {"train.steps": 4}),
    "run.eval_every": Key(seen.steps_evaluated, [(2, [0, 2, 4]), (3, [0, 3, 4])], {"train.steps": 4}),
    # of the three samples one, which seed 0 takes first, has two questions
    "run.eval_answers": Key(seen.times_asked, [(None, []), ({}, [(0, 4), (2, 4)])]),
    "run.eval_answers.samples": Key(seen.times_asked, [(1, [(0, 2), (2, 2)]), (2, [(0, 3), (2, 3)])]),
    "run.eval_answers.every": Key(
        seen.times_asked, [(2, [(0, 4), (2, 4), (4, 4)]), (3, [(0, 4), (3, 4), (4, 4)])], {"train.steps": 4}
    ),
    "run.keep_best": Key(seen.best_step, [(None, None), ("eval/nll", 1), ("eval/token_accuracy", 4)], WATCHED),
    "run.trackers": Key(seen.trackers_started, [([], []), (["wandb", "mlflow"], ["wandb", "mlflow"])]),
    "run.eval_answers.batch_size": Key(seen.questions_at_a_time, [(2, [2, 2]), (3, [3, 1])]),
}
TUNE = {**keys_of("vision"), **keys_of("projector"), **keys_of("language"), **component_modules()}
KEYS = {**DATA, **TUNE, **TRAIN, **OBJECTIVE, **RUN}


def seen_with(key: Key, keys: dict[str, Any]) -> Any:
    """What is seen under a config with `keys`; REFUSED where the schema refuses them."""
    try:
        config = config_with(key.kind, keys)
    except ValidationError:
        return REFUSED
    return key.seen(config)


def leaves(annotation: Any, at: str) -> Iterator[str]:
    """The keys below `at` that hold a value; of a component the keys of all modes, `at` itself for the mode."""
    inner = [one for one in get_args(annotation) if one is not type(None)]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, of in annotation.model_fields.items():
            if name != "mode":
                yield from leaves(of.annotation, f"{at}.{of.alias or name}".strip("."))
    elif get_origin(annotation) is tuple and isinstance(inner[0], type) and issubclass(inner[0], BaseModel):
        yield from leaves(inner[0], f"{at}.0")
    elif any(isinstance(one, type) and issubclass(one, BaseModel) for one in inner):
        yield at
        for one in inner:
            yield from leaves(one, at)
    else:
        yield at


def test_every_key_of_the_schema_is_in_the_table() -> None:
    assert set(leaves(Config, "")) == set(KEYS)


SLOW = pytest.mark.slow("several runs for a key; the keys of model, data, labels and objective are always tried")
IS_SLOW = ("tune.", "train.", "run.", "model.path", "model.adapter")


@pytest.mark.filterwarnings("ignore")  # of torch.compile
@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW if name.startswith(IS_SLOW) else ()) for name in KEYS])
def test_a_key_does_what_it_says(name: str, files: None, tmp_path: Path) -> None:
    key = KEYS[name]
    if name == "model.quantization":
        pytest.importorskip("bitsandbytes")
    assert len(key.expected) >= 2
    assert len({repr(expected) for _, expected in key.expected}) >= 2  # a dead key cannot pass
    for number, (value, expected) in enumerate(key.expected):
        out = {} if name == "run.output_dir" else {"run.output_dir": f"run-{number}"}
        assert seen_with(key, out | key.given | {name: value}) == expected, value
