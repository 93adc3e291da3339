"""What the README, the docs and the shipped configs promise exists and works."""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import yaml

from mmtrain.config import load_config
from mmtrain.config.reference import reference
from mmtrain.config.schema import json_schema
from mmtrain.errors import FINAL_CODES, PeerError
from mmtrain.runtime.peers import HANG_CODE
from support.builders import ROOT, TINY

README = (ROOT / "README.md").read_text(encoding="utf-8")
DATA_PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "data_samples/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
GENERATED = ROOT / "docs" / "config.md"


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


def without_code(page: str) -> str:
    """The prose of a page: no fenced blocks (output of the program), no inline code (names)."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE))


def anchors(page: str) -> set[str]:
    """The fragments that GitHub gives the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def test_all_pages_are_found() -> None:
    names = [
        "data",
        "models",
        "labels",
        "answers",
        "evaluation",
        "scaling",
        "runs",
        "speed",
        "config",
        "python",
        "architecture",
    ]
    assert {ROOT / "docs" / f"{name}.md" for name in names} <= set(PAGES)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 110


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, open_pages = set(), [ROOT / "README.md"]
    while open_pages:
        page = open_pages.pop()
        if page not in reached and page in PAGES:
            reached.add(page)
            links = re.findall(r"\]\(([^)\s#]+)", page.read_text(encoding="utf-8"))
            open_pages += [(page.parent / link).resolve() for link in links if "://" not in link]
    assert reached == set(PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        name, _, fragment = link.partition("#")
        target = page if not name else page.parent / name
        assert target.exists(), link
        assert not fragment or fragment in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_scripts_and_configs_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"(?<![\w/.])((?:scripts|configs|tests|mmtrain|data_samples)/[\w./-]*\w)", text):
        assert (ROOT / name).exists(), name


UNWANTED = {
    r"pictures?": "image",
    r"learne?d|learnt|learns?|teach(?:es)?|taught": "trained on, trainable",
    r"beside|behind|in front": "next to, besides, after, before",
    r"dear|dearer|dearest": "expensive",
    r"go on|goes on|went on|take up|takes up": "resume, continue",
    r"held|hold|holds|at hand": "stored, kept in memory, cached",
    r"told|tells": "reported",
    r"mend|mends": "fix",
    r"ready made|nothing vanishes|made, not found": "plain words",
}
"""Words that the glossary replaces, as regular expressions, with their replacements."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_pages_use_the_words_of_the_glossary(page: Path) -> None:
    prose = without_code(page.read_text(encoding="utf-8"))
    assert prose.strip()
    for words, instead in UNWANTED.items():
        found = re.search(rf"(?i)\b(?:{words})\b(?![- ]out)", prose)
        assert found is None, f"{found[0]!r}: write {instead}"


def said_by(path: Path) -> list[str]:
    """Strings of a module that are sentences: messages and help. Docstrings are help in the modules of commands."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    is_help = path.stem == "cli" or path.stem.endswith("_commands")
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr) and not is_help}
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in docstrings]
    return [text for text in texts if isinstance(text, str) and len(text.split()) > 2]


def test_messages_and_help_use_the_words_of_the_glossary() -> None:
    said = {path: said_by(path) for path in sorted((ROOT / "mmtrain").rglob("*.py"))}
    assert sum(map(len, said.values())) > 1000
    unwanted = re.compile(rf"(?i)\b(?:{'|'.join(UNWANTED)})\b(?![- ]out)")
    for path, texts in said.items():
        found = [(match[0], text) for text in texts if (match := unwanted.search(without_code(text)))]
        assert not found, f"{path}: {found[0]}: write the word of UNWANTED"


def test_the_exit_codes_of_the_docs_are_those_of_the_errors() -> None:
    section = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8").partition("## Exit codes")[2]
    rows = re.findall(r"^\| ([\d, ]+) \|", section, re.MULTILINE)
    assert {int(code) for row in rows for code in row.split(",")} == {
        0,
        1,
        HANG_CODE,
        PeerError.exit_code,
        *FINAL_CODES,
    }


def test_the_kubernetes_job_fails_at_once_where_a_restart_does_not_help() -> None:
    text = (ROOT / "configs" / "cluster" / "kubernetes.yaml").read_text(encoding="utf-8")
    (job,) = (one for one in yaml.safe_load_all(text) if one["kind"] == "Job")
    codes = job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]
    assert codes == sorted(code for code in FINAL_CODES if code < 128)


def test_the_config_reference_is_the_one_of_the_code() -> None:
    """After a change of the schema: `mmtrain config docs > docs/config.md`."""
    assert GENERATED.read_text(encoding="utf-8") == reference()


def test_the_config_reference_explains_every_key() -> None:
    page = GENERATED.read_text(encoding="utf-8")
    sections = [section for section in json_schema()["$defs"].values() if "properties" in section]
    assert len(sections) >= 9
    for section in sections:
        for key, node in section["properties"].items():
            meaning = re.escape(" ".join(node["description"].split()))
            assert re.search(rf"^\| `(?:[\w.]+\.)?{key}` \| .* \| {meaning} \|$", page, re.MULTILINE), key


def test_the_defaults_of_the_config_reference_are_those_of_a_config_that_sets_none(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").touch()
    (tmp_path / "empty.yaml").write_text(MINIMAL.format(folder=tmp_path))
    values = load_config(tmp_path / "empty.yaml").model_dump(mode="json")
    rows = re.findall(r"^\| `(\w+)\.(\w+)` \| [^|]+ \| `([^`{]*)` \|", GENERATED.read_text("utf-8"), re.MULTILINE)
    assert len(rows) >= 20
    for section, key, default in rows:
        assert yaml.safe_load(default) == values[section][key], key


MINIMAL = """\
model: {{path: {folder}}}
data: {{train: [{{path: {folder}/data.jsonl}}]}}
run: {{output_dir: {folder}/run}}
"""


def test_every_shipped_config_loads_and_names_the_schema() -> None:
    assert {"quickstart.yaml", "qwen2_5_vl_7b_lora.yaml", "qwen2_5_vl_7b_qlora.yaml", "llava_1_5_7b_lora.yaml"} <= {
        path.name for path in CONFIGS
    }
    for path in CONFIGS:
        load_config(path)
        assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n")


def test_the_shipped_schema_is_the_one_of_the_code() -> None:
    assert json.loads((ROOT / "configs" / "schema.json").read_text()) == json_schema()


def own_data(folder: Path) -> None:
    """104 images and the table of captions that docs/data.md describes."""
    colours = [("red", (255, 0, 0)), ("green", (0, 128, 0)), ("blue", (0, 0, 255))]
    (folder / "my_data").mkdir()
    with (folder / "my_data" / "captions.csv").open("w", encoding="utf-8") as file:
        file.write("file,caption\n")
        for number in range(104):
            name, colour = colours[number % 3]
            PIL.Image.new("RGB", (28 + number, 56), colour).save(folder / "my_data" / f"{number}.png")
            file.write(f"{number}.png,a {name} square\n")


@pytest.mark.slow("the commands of a page, each in its own process")
def test_the_way_from_labelled_images_to_an_evaluated_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config and the commands of the README with the source in docs/data.md and the tiny model."""
    from typer.testing import CliRunner

    from mmtrain.cli import app

    own_data(tmp_path)
    (config,) = blocks(README, "yaml")
    assert len(config.splitlines()) <= 8
    source = next(block for block in blocks(DATA_PAGE, "yaml") if "captions.csv" in block)
    both = yaml.safe_load(config)
    both["data"] |= yaml.safe_load(source)["data"]
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(both))
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^mmtrain ([^#\n]* my\.yaml[^#\n]*)", "\n".join(blocks(README, "bash")), re.MULTILINE)
    ran = [command.split()[0] for command in commands]
    assert ran == ["inspect-labels", "inspect-labels", "plan", "train", "eval", "eval"]
    for command in commands:
        result = CliRunner().invoke(app, [*command.split(), f"model.path={TINY}", "model.dtype=float32"])
        assert result.exit_code == 0, result.exception or result.output
    assert "swapped" in result.output
    assert (tmp_path / "runs" / "my" / "adapter" / "adapter_model.safetensors").is_file()


def test_the_script_for_folders_of_images_writes_a_table_that_is_read(tmp_path: Path) -> None:
    from mmtrain.config.data_section import Source
    from mmtrain.records.chat import Text
    from mmtrain.records.record_set import RecordSet

    (script,) = (block for block in blocks(DATA_PAGE, "python") if "parent.name" in block)
    for name in ("guinea pig/b, 1.JPG", "cat/a.png"):
        (tmp_path / "my_data" / name).parent.mkdir(parents=True)
        PIL.Image.new("RGB", (8, 8)).save(tmp_path / "my_data" / name)
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    records = RecordSet([Source(path=str(tmp_path / "my_data" / "classes.csv"))])
    conversations = [records.conversation(index) for index in range(len(records))]
    assert [image.name for talk in conversations for image in talk.images] == ["cat/a.png", "guinea pig/b, 1.JPG"]
    assert [talk.messages[1].parts for talk in conversations] == [(Text("cat"),), (Text("guinea pig"),)]


def test_the_records_of_the_docs_are_read() -> None:
    from mmtrain.records.formats import read_record

    records = [json.loads(block) for page in PAGES for block in blocks(page.read_text(encoding="utf-8"), "json")]
    assert len(records) >= 4
    for record in records:
        conversation = read_record(record, "auto")
        assert [image.name for image in conversation.images] == ["cat.jpg"]
        assert [message.role for message in conversation.messages] == ["user", "assistant"]


def test_the_map_of_files_is_complete() -> None:
    named = re.findall(r"^\| `(mmtrain/[\w/]+\.py)` \|", ARCHITECTURE, re.MULTILINE)
    there = [str(path.relative_to(ROOT)) for path in (ROOT / "mmtrain").rglob("*.py") if not path.name.startswith("__")]
    assert sorted(named) == sorted(there)


def test_the_way_of_a_sample_names_what_is_there() -> None:
    rows = re.findall(r"^\| \d+ \| `([\w.]+)`", ARCHITECTURE, re.MULTILINE)
    assert 20 <= len(rows) <= 30
    for row in rows:
        package, module, *names = row.split(".")
        found = importlib.import_module(f"mmtrain.{package}.{module}")
        for name in names:
            found = getattr(found, name)
        assert callable(found)


def test_commands_and_options_of_the_pages_exist() -> None:
    from typer.main import get_command

    from mmtrain.cli import app

    root = get_command(app)
    used = [
        line.partition("#")[0].split()
        for page in PAGES
        for block in (
            *blocks(page.read_text(encoding="utf-8"), "bash"),
            *blocks(page.read_text(encoding="utf-8"), "text"),
        )
        for line in re.findall(r"^(?:\$ )?(mmtrain .*)$", block, re.MULTILINE)
    ]
    assert {line[1] for line in used} >= {"train", "inspect-labels", "eval"}
    for words in used:
        command, *rest = words[1:]
        found = root.commands[command]  # type: ignore[attr-defined]
        while hasattr(found, "commands"):
            command, *rest = rest
            found = found.commands[command]
        options = {option for parameter in found.params for option in parameter.opts}
        assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= options, words


def test_nothing_shipped_is_too_large() -> None:
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 8_000_000
    others = [p for p in (ROOT / "data_samples").rglob("*") if p.is_file() and TINY not in p.parents]
    assert sum(path.stat().st_size for path in others) < 12_000_000
    assert (ROOT / "docs" / "labels.png").stat().st_size < 200_000


def test_the_project_speaks_of_itself_alone() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    words = re.compile(r"/(?:work|root|home)/\w|artifactory|\bTODO\b|\bFIXME\b")
    if not listed:
        pytest.skip("not in a git checkout")
    texts = [ROOT / name for name in listed if name.endswith((".py", ".md", ".yaml", ".toml", ".txt"))]
    assert len(texts) > 100
    for path in texts:
        if path.is_file() and path != Path(__file__):
            assert not words.search(path.read_text(encoding="utf-8")), path
