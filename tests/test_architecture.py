"""The rules of the architecture, read from the syntax tree."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mmtrain"
FILES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"torch", "transformers", "peft", "accelerate"}
FAMILY_WORDS = re.compile(
    "qwen|llava|idefics|gemma|internvl|pixtral|mistral|mllama|llama|phi[34]|glm|hunyuan|minicpm|kimi|janus|ovis|smolvlm"
    "|deepseek|cohere|granite|jamba|falcon|nemotron|mamba|lfm2|olmo|merger|visual|fullatt|resampler|perceiver"
)


ENVIRONMENT = {
    "mmtrain.runtime.processes",
    "mmtrain.runtime.shard",
    "mmtrain.runtime.launch",
    "mmtrain.runtime.environment",
    "mmtrain.dataset.workers",
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def imports(tree: ast.AST, top_level: bool = False) -> set[str]:
    """Every module imported anywhere in `tree`, or at its top level alone."""
    nodes = tree.body if top_level and isinstance(tree, ast.Module) else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(names: set[str]) -> set[str]:
    return names & MODULES.keys()


def test_the_files_are_found() -> None:
    assert {"mmtrain.cli", "mmtrain.encoding.encode", "mmtrain.model.components", "mmtrain.train.run"} <= MODULES.keys()


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in MODULES
        if n
        in (
            "mmtrain.cli",
            "mmtrain.errors",
            "mmtrain.safe_text",
            "mmtrain.regular_files",
            "mmtrain.text_files",
            "mmtrain.progress",
            "mmtrain.runtime.environment",
            "mmtrain.runtime.host_memory",
        )
        or ".config" in n
    ],
)
def test_the_light_rooms_import_nothing_heavy(name: str) -> None:
    assert not {module.split(".")[0] for module in imports(MODULES[name], top_level=name == "mmtrain.cli")} & HEAVY


FLOORS = [
    ["errors", "safe_text", "regular_files", "file_locks", "parent_death", "progress", "user_cache"],
    ["atomic_files", "text_files"],
    ["command_output"],
    ["config"],
    ["records"],
    ["encoding"],
    ["checks"],
    ["dataset"],
    ["model"],
    ["runtime"],
    ["scoring"],
    ["contrastive"],
    ["generate"],
    ["answers"],
    ["retrieval"],
    ["train"],
    ["evaluate", "inspect_labels", "inspect_model", "merge", "compose", "init", "report", "plan"],
    ["inspect_data"],
    ["api"],
    ["config_commands"],
    ["data_commands", "eval_commands", "model_commands", "run_commands"],
    ["cli"],
    ["__main__"],
]
"""Each imports only from those before it."""


def package_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def used_packages() -> dict[str, set[str]]:
    """By package, the other packages that its modules import."""
    used: dict[str, set[str]] = {}
    for name, tree in MODULES.items():
        found = {package_of(module) for module in own(imports(tree))} - {"__init__", package_of(name)}
        used.setdefault(package_of(name), set()).update(found)
    return used


def test_packages_import_only_from_the_floors_above_them() -> None:
    floor_of = {package: number for number, packages in enumerate(FLOORS) for package in packages}
    used = used_packages()
    assert used.keys() - {"__init__"} == floor_of.keys()
    for package, others in used.items():
        assert all(floor_of[other] < floor_of[package] for other in others), f"{package} imports {others}"


def test_no_module_imports_too_many_others() -> None:
    for name, tree in MODULES.items():
        known = {module for module in own(imports(tree)) if module != "mmtrain" and module != name}
        known -= {module for module in known if any(other.startswith(f"{module}.") for other in known)}
        assert len(known) <= 15, f"{name}: {len(known)}"


def test_there_is_no_import_cycle() -> None:
    graph = {name: own(imports(tree)) - {name} for name, tree in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for inner in graph[name]:
                visit(inner, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_only_the_runtime_asks_the_environment_or_talks_to_other_processes() -> None:
    for name, tree in MODULES.items():
        if name in ENVIRONMENT:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in ("os.environ", "os.getenv", "torch.distributed"), name
        assert not any(module.startswith(("torch.distributed", "accelerate")) for module in imports(tree)), name


def words_of(node: ast.AST) -> Iterator[str]:
    """The names that a node of the syntax tree uses or gives, and short strings: longer ones are prose, which may name
    a family as an example."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value.split()) <= 3:
        yield node.value
    for key in ("attr", "id", "arg", "name", "asname", "module"):
        if isinstance(word := getattr(node, key, None), str):
            yield word


def names_a_family(tree: ast.AST) -> list[str]:
    words = (word for node in ast.walk(tree) for word in words_of(node))
    return [word for word in words if FAMILY_WORDS.search(word.lower())]


@pytest.mark.parametrize(
    "code",
    [
        "config.fullatt_block_indexes",
        "model.visual(x)",
        "def qwen(): ...",
        "f(llava=1)",
        "import gemma",
        "getattr(m, 'merger')",
    ],
)
def test_a_family_is_seen_in_names_attributes_and_strings(code: str) -> None:
    assert names_a_family(ast.parse(code))


def test_family_names_are_in_one_place() -> None:
    """A module tree has names of families, and only `components` reads it; `compose` makes models of one family."""
    assert {name for name, tree in MODULES.items() if names_a_family(tree)} == {
        "mmtrain.model.components",
        "mmtrain.compose.parts",
    }


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_unsafe_is_called(name: str) -> None:
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "torch.save", "yaml.load", "eval", "exec", "os.system"), called
            for keyword in node.keywords:
                assert not (keyword.arg in ("shell", "trust_remote_code") and ast.unparse(keyword.value) == "True")
    assert not imports(MODULES[name]) & {"pickle", "shelve", "marshal", "dill"}


def test_files_and_functions_stay_short() -> None:
    for path in FILES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 350, path
        for node in ast.walk(MODULES[name_of(path)]):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno <= 60, f"{path}: {node.name}"
        assert path.stem not in ("utils", "helpers", "common")


def test_nothing_of_a_model_directory_runs_and_nothing_is_fetched() -> None:
    """Without `trust_remote_code=False` transformers asks the user, who may say yes without knowing to what."""
    calls = [
        (name, {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords})
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained"
    ]
    assert len(calls) >= 6
    for name, keywords in calls:
        assert keywords.get("trust_remote_code") == "False", name
        assert keywords.get("local_files_only") == "True", name
