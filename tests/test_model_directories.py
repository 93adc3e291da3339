"""Model directories that are broken or hostile: one line each, in time, and nothing of them runs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mmtrain.encoding import template_trial
from mmtrain.encoding.load import load_processor
from mmtrain.errors import UserError
from support.builders import TINY, write_jsonl
from support.forked import Server
from support.label_models import TEMPLATES, make_directory

CHATML = TEMPLATES["chatml"].text
BOMBS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
    "{% endfor %}" + CHATML,
    "a product": "{% set x = 'a' * 3000000000 %}" + CHATML,
    "a doubling": "{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
    + CHATML,
    "a long text": CHATML + "{% for m in messages %}{{ 'a' * 2000000 }}{% endfor %}",
    "a wide field": "{% set x = '%3000000000d' % 1 %}" + CHATML,
    "a bomb for replies": CHATML
    + "{% if messages[-1].role == 'assistant' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
    "{% endfor %}{% endif %}",
    "a bomb for tools": CHATML + "{% if tools %}{{ 'a' * 2000000 }}{% endif %}",
    "a bomb for calls": CHATML + "{% for m in messages if m.tool_calls %}{{ 'a' * 2000000 }}{% endfor %}",
    "a bomb for results": CHATML + "{% for m in messages if m.role == 'tool' %}{{ 'a' * 2000000 }}{% endfor %}",
    "a bomb for reasoning": CHATML + "{% for m in messages if m.reasoning_content %}{{ 'a' * 2000000 }}{% endfor %}",
    "a large file": CHATML + "{#" + "a" * 1_100_000 + "#}",
}


BOMBS_AND_MARKS = [
    pytest.param(name, marks=[pytest.mark.slow("runs into the limits")] if name.startswith("a bomb for") else [])
    for name in BOMBS
]


@pytest.mark.parametrize("name", BOMBS_AND_MARKS)
def test_a_template_that_takes_too_much_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_trial, "SECONDS", 1.0)
    path = make_directory(tmp_path / "model", "byte_level", BOMBS[name])
    with pytest.raises(UserError, match=r"model: the chat template (is refused: .* takes|is refused: .* makes|has 1,)"):
        load_processor(str(path))


def test_what_a_template_says_is_printed_on_one_line(tmp_path: Path) -> None:
    template = "{{ raise_exception('no\x1b[31m\nway') }}"
    path = make_directory(tmp_path / "model", "byte_level", template)
    with pytest.raises(UserError, match="no") as caught:
        load_processor(str(path))
    assert all(fault.isprintable() for fault in caught.value.faults)


def _moved(file: Path, to: Path) -> None:
    to.parent.mkdir()
    file.rename(to)


def _without(name: str) -> Callable[[Path], object]:
    return lambda path: (path / name).unlink()


def _with(name: str, text: str) -> Callable[[Path], object]:
    return lambda path: (path / name).write_text(text)


def _changed(name: str, **values: object) -> Callable[[Path], object]:
    return lambda path: (path / name).write_text(json.dumps(json.loads((path / name).read_text()) | values))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tokenizer": (_without("tokenizer.json"), r"is tokenizer\.json missing\?$"),
    "a tokenizer that is cut": (_with("tokenizer.json", '{"version": "1.0", "model": {'), r"cannot be loaded"),
    "a tokenizer of another class": (_changed("tokenizer_config.json", tokenizer_class="T5Tokenizer"), r"."),
    "a class that nobody knows": (_changed("tokenizer_config.json", tokenizer_class="NoSuchTokenizer"), r"."),
    "no config": (_without("config.json"), r"^no config\.json: expected a model in the transformers format$"),
    "weights in GGUF alone": (
        lambda path: [_without("config.json")(path), _with("q4.gguf", "GGUF")(path)],
        r"no config\.json: .*, found 'q4\.gguf', which only serves for inference",
    ),
    "an adapter": (
        lambda path: (path / "config.json").rename(path / "adapter_config.json"),
        r"^an adapter: expected its base model here",
    ),
    "a run with an adapter": (
        lambda path: _moved(path / "config.json", path / "adapter" / "adapter_config.json"),
        r"^a run with an adapter: expected its base model here",
    ),
    "a run with a model": (
        lambda path: _moved(path / "config.json", path / "model" / "config.json"),
        r"^no config\.json: the model is in .*/model/model$",
    ),
    "code of its own": (
        _changed("config.json", model_type="my_vlm", auto_map={"AutoConfig": "code.Config"}),
        r"^the model needs code that is in its directory, which mmtrain never runs",
    ),
    "a chat model with others": (
        _with("config.json", '{"model_type": "qwen2_5_omni"}'),
        r"of which only qwen2_5_omni_thinker replies in chats: expected it alone: Qwen2_5OmniThinkerForConditional",
    ),
    "a family without a processor": (
        lambda path: [
            _with("config.json", '{"model_type": "kosmos-2.5"}')(path),
            *(_changed(f"{name}_config.json", processor_class=None)(path) for name in ("tokenizer", "preprocessor")),
        ],
        r"^no processor for a model of the type kosmos-2\.5: expected processor_class",
    ),
    "a model of other tasks": (_changed("config.json", model_type="vit"), r"^a model of the type vit, which neither"),
    "a template that says the same four times": (
        _with("chat_template.jinja", "{{ raise_exception('no') }}"),
        r"^[^;]*refuses[^;]*no$",
    ),
    "a config that is a list": (_with("config.json", "[]"), r"."),
    "a model that nobody knows": (_changed("config.json", model_type="no_such_model"), r"no_such_model"),
    "no template": (_without("chat_template.jinja"), r"no chat template"),
    "a template that is cut": (_with("chat_template.jinja", "{% for m in messages %}"), r"chat template"),
    "generation settings that are no JSON": (
        _with("generation_config.json", "{"),
        r"generation_config\.json: not JSON",
    ),
    "generation settings that are a list": (_with("generation_config.json", "[]"), r"expected an object"),
    "an end that is no id": (_with("generation_config.json", '{"eos_token_id": "</s>"}'), r"eos_token_id is '</s>'"),
    "no image processor": (_without("preprocessor_config.json"), r"cannot be loaded"),
    "an image processor that is no JSON": (_with("preprocessor_config.json", "{"), r"cannot be loaded|not JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_directory_is_named_in_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(TINY, path)
    do, reason = BROKEN[name]
    do(path)
    try:
        load_processor(str(path))
    except UserError as error:
        (fault,) = error.faults
        assert fault.startswith(f"{path}: ")
        assert fault.isprintable()
        import re

        assert re.search(reason, fault.removeprefix(f"{path}: ")), fault
    else:
        assert name == "a class that nobody knows"  # transformers takes the tokenizer's file for what it is


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_link_of_the_cache_that_was_copied_without_its_file_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(TINY, path)
    (path / name).unlink()
    (path / name).symlink_to("../../blobs/gone")
    with pytest.raises(UserError, match=rf"{name}: a link that leads nowhere: copy .* \(cp -rL\)$"):
        load_processor(str(path))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_is_named_with_the_command_that_fetches_the_file(name: str, tmp_path: Path) -> None:
    path = shutil.copytree(TINY, tmp_path / "model")
    (path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(UserError) as caught:
        load_processor(str(path))
    assert caught.value.faults == [
        f"{path}/{name}: a pointer of git-lfs, not the file itself: run `git lfs pull` there"
    ]


@pytest.mark.slow("commands on a hostile directory, each in its own process")
@pytest.mark.parametrize("known", [True, False], ids=["a known model", "an unknown model"])
def test_no_code_of_a_directory_runs_even_where_the_user_says_yes(known: bool, tmp_path: Path, server: Server) -> None:
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    canary = tmp_path / "canary"
    (model / "code.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass Anything:\n    pass\n")
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        content = json.loads((model / name).read_text())
        autos = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor")
        content["auto_map"] = dict.fromkeys(autos, "code.Anything")
        content |= (
            {} if known else {"model_type": "no_such_model", "tokenizer_class": "NoSuch", "processor_class": "No"}
        )
        (model / name).write_text(json.dumps(content))
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}]
    data = write_jsonl(tmp_path / "data.jsonl", [{"messages": turns}])
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {{path: {model}, dtype: float32}}\ndata: {{train: [{{path: {data}}}]}}\n"
        f"train: {{steps: 1}}\nrun: {{output_dir: {tmp_path / 'run'}}}\n"
    )
    (tmp_path / "yes").write_text("y\n" * 50)
    for command in ("inspect-labels", "train"):
        run = server.start(tmp_path / "logs", [command, str(config)], stdin=tmp_path / "yes")
        assert run.wait(120) == [0 if known else 2], run.text
        assert "Traceback" not in run.text
        assert not canary.exists()
