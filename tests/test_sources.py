"""Records are found in files, folders and globs, each with its exact line, and broken ones are refused by name."""

import gzip
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mmtrain.encoding.images import find_image
from mmtrain.errors import UserError
from mmtrain.records.chat import SampleError
from mmtrain.records.formats import read_record
from mmtrain.records.json_text import parse_json
from mmtrain.records.sources import json_list, line_index
from mmtrain.records.sources.json_lines import JsonlFile
from mmtrain.records.sources.json_list import JsonFile
from mmtrain.records.sources.open import open_records

SHARED = Path(__file__).parents[2] / "shared" / "data"
BAD_JSON = sorted((SHARED / "bad_inputs" / "json").glob("*.json"))
FUZZ = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
BOM = b"\xef\xbb\xbf"


def write(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines_of(path: Path) -> list[tuple[Any, int]]:
    (file,) = open_records(str(path))
    return [(file.record(i), file.place(i).line) for i in range(len(file))]


def fault_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_records(str(path))
    (fault,) = caught.value.faults
    assert fault.isprintable()
    return fault


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"1\n2\n3\n", [(1, 1), (2, 2), (3, 3)]),
        (b"1\n2", [(1, 1), (2, 2)]),
        (b"\n1\n\n  \t\n2\n\n", [(1, 2), (2, 5)]),
        (b"1\r\n\r\n2\r\n", [(1, 1), (2, 3)]),
        (BOM + b'{"a": 1}\n{"b": 2}\n', [({"a": 1}, 1), ({"b": 2}, 2)]),
        (BOM + b"\n1\n", [(1, 2)]),
        (' "é\u2028\x85"\n2\n'.encode(), [("é\u2028\x85", 1), (2, 2)]),
        (b'{"a": [1,\t{"b": "\\n"}]}\n2', [({"a": [1, {"b": "\n"}]}, 1), (2, 2)]),
    ],
)
def test_the_lines_of_a_jsonl_file_are_exact(tmp_path: Path, content: bytes, expected: list[tuple[Any, int]]) -> None:
    assert lines_of(write(tmp_path, "a.jsonl", content)) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[1, 2,\n3]", [(1, 1), (2, 1), (3, 2)]),
        (b'[\n  {\n    "a": [\n1]\n  },\n\n  {"b": "x"}\n]\n', [({"a": [1]}, 2), ({"b": "x"}, 7)]),
        (b"\n\n [\n\n1\n,\n2\n]\n", [(1, 5), (2, 7)]),
        (b'[\r\n1,\r\n"a",\r\n\r\n3]\r\n', [(1, 2), ("a", 3), (3, 5)]),
        (BOM + b"[1,\n2]", [(1, 1), (2, 2)]),
        ('["é\u2028\x85\\n",\n2]'.encode(), [("é\u2028\x85\n", 1), (2, 2)]),
        (b"[[1,\n[2]],\n[3]]", [([1, [2]], 1), ([3], 3)]),
        (b'[{"]": "[,"},\n"}{"]', [({"]": "[,"}, 1), ("}{", 2)]),
        (b"[null,\ntrue,\n1.5e3]", [(None, 1), (True, 2), (1500.0, 3)]),
    ],
)
def test_the_lines_of_the_items_of_a_json_file_are_exact(
    tmp_path: Path, content: bytes, expected: list[tuple[Any, int]]
) -> None:
    assert lines_of(write(tmp_path, "a.json", content)) == expected


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        (b'[{"a": 1},\n{"a": }]', 2, "not JSON"),
        (b'[{"a":\n1},\n{"a":\n\nx}]', 5, "not JSON"),
        (b"[1,\n2\n3]", 3, "','"),
        (b"[1,\n2]\n]", 3, "more after"),
        (b"[1,\n2", 2, "not JSON"),
        (b"[1,\n2,", 2, "not JSON"),
        (b"[1,\n2,\n]", 3, "not JSON"),
        (b"[1,\n,2]", 2, "not JSON"),
        (b"[", 1, "not JSON"),
        (b"[1,\nNaN]", 2, "NaN"),
        (b"[1,\n-Infinity]", 2, "Infinity"),
        (b'[1,\n{"a": 1,\n"a": 2}]', 2, "'a' is given twice"),
        (b"[1,\n" + b"9" * 5000 + b"]", 2, "not JSON"),
        (b"[1,\n" + b"[" * 100_000 + b"]", 2, "nested too deeply"),
        (b'[1,\n"\xff"]', 2, "UTF-8"),
        (b'{"a":\n[1]},\n{}', 2, "expected an object after the one before it"),
        (b"", 1, "expected a JSON list"),
        (b"words", 1, "expected a JSON list"),
        ('["a"]'.encode("utf-16"), 1, "UTF-8"),
    ],
)
def test_a_broken_json_file_is_refused_with_the_line(tmp_path: Path, content: bytes, line: int, words: str) -> None:
    path = write(tmp_path, "a.json", content)
    fault = fault_of(path)
    assert fault.startswith(f"{path}:{line}: ")
    assert words in fault
    assert len(fault) < len(str(path)) + 200


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"a": }', "column 7"),
        (b'{"a": 1} x', "not JSON"),
        (b'{"a": 1}{"a": 1}', "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b"[1,]", "not JSON"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": Infinity}', "Infinity"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "'b' is given twice"),
        (b'{"a": ' + b"7" * 5000 + b"}", "not JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "nested too deeply"),
        (b'"\xff"', "UTF-8"),
        (b'"\xed\xa0\x80"', "UTF-8"),
        (b'"a\tb"', "not JSON"),
        (b"\x00", "not JSON"),
        (b"", "not JSON"),
        (b"\xc2\xa01", "not JSON"),
    ],
)
def test_a_broken_line_is_refused_by_name_and_leaves_the_others(tmp_path: Path, line: bytes, words: str) -> None:
    with pytest.raises(SampleError, match=words) as caught:
        parse_json(line)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200
    if line:
        (file,) = open_records(str(write(tmp_path, "a.jsonl", b'"before"\n' + line + b'\n"after"\n')))
        assert [file.place(i).line for i in range(3)] == [1, 2, 3]
        assert (file.record(0), file.record(2)) == ("before", "after")
        with pytest.raises(SampleError, match=words):
            file.record(1)


@pytest.mark.parametrize("depth", range(900, 1000, 3))
def test_a_record_nested_nearly_too_deep_is_still_refused_plainly(depth: int) -> None:
    with pytest.raises(SampleError):
        read_record(parse_json(b"[" * depth + b"]" * depth), "auto")


def test_records_are_read_in_any_order(tmp_path: Path) -> None:
    values = [{"n": n, "text": "é" * (n % 7)} for n in range(50)]
    for name, content in (
        ("a.jsonl", "\n\n".join(json.dumps(value, ensure_ascii=n % 2 == 0) for n, value in enumerate(values))),
        ("b.json", json.dumps(values, indent=1)),
    ):
        (file,) = open_records(str(write(tmp_path, name, content)))
        assert len(file) == 50
        for n in (49, 0, 7, 7, 48, 1):
            assert file.record(n) == values[n]


def test_a_place_is_the_file_and_the_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", b"\n\n1\n")
    assert str(open_records(str(path))[0].place(0)) == f"{path}:3"


def test_a_folder_gives_its_record_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.json", "c.txt", "d.png", "deeper/e.png"):
        write(tmp_path, name, b"[1]")
    assert [file.path.name for file in open_records(str(tmp_path))] == ["a.json", "b.jsonl"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("part-*.jsonl", ["part-1.jsonl", "part-2.jsonl"]),
        ("**/*.jsonl", ["deeper/part-3.jsonl", "part-1.jsonl", "part-2.jsonl"]),
        ("part-[2]*", ["part-2.jsonl"]),
        ("*.json*", ["all.json", "part-1.jsonl", "part-2.jsonl"]),
    ],
)
def test_a_glob_gives_what_it_names_in_order(tmp_path: Path, pattern: str, names: list[str]) -> None:
    for name in ("part-2.jsonl", "part-1.jsonl", "deeper/part-3.jsonl", "all.json"):
        write(tmp_path, name, b"[1]")
    found = open_records(f"{tmp_path}/{pattern}")
    assert [str(file.path.relative_to(tmp_path)) for file in found] == names


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    write(tmp_path, "a[1].jsonl", b"1")
    write(tmp_path, "a1.jsonl", b"2")
    assert lines_of(tmp_path / "a[1].jsonl") == [(1, 1)]


def test_what_holds_no_records_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "empty.jsonl", b"")
    write(tmp_path, "blank.jsonl", b"\n \n")
    write(tmp_path, "none.json", b" [ ] ")
    write(tmp_path, "table.csv", b"a,b")
    write(tmp_path, "table.xlsx", b"a,b")
    write(tmp_path, "folder/words.txt", b"1")
    (tmp_path / "named.jsonl").mkdir()
    for name, words in {
        "empty.jsonl": "no records",
        "blank.jsonl": "no records",
        "none.json": "no records",
        "table.csv": "no records",
        "table.xlsx": "not a file of records: save the table as CSV",
        "folder": "there is no file of records",
        "named.jsonl": "there is no file of records",
        "nowhere.jsonl": "there is no file of records",
        "*.parquet": "there is no file of records",
    }.items():
        fault = fault_of(tmp_path / name)
        assert fault.startswith(f"{tmp_path / name}: ")
        assert words in fault


@pytest.mark.parametrize("block", [1, 2, 3, 7])
def test_a_json_file_is_read_in_pieces_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(json_list, "_BLOCK", block)
    content = '[\r\n 1.5e-3,\r\n\r\n-12\r,{"é": ["]"]},\n"\\u00e9ü",\rtrue]\r\n'.encode()
    path = write(tmp_path, "a.json", content)
    assert lines_of(path) == [(1.5e-3, 2), (-12, 4), ({"é": ["]"]}, 5), ("éü", 6), (True, 7)]
    path.write_bytes(content.replace(b"true", '{"é": x'.encode()))
    assert fault_of(path) == f"{path}:7: not JSON: Expecting value at column 7"
    path.write_bytes(content.replace(b"true", b'{"\xc3\xa9": 1, "\xc3\xa9": 1}'))
    assert fault_of(path) == f"{path}:7: not JSON: the key 'é' is given twice"


def test_a_json_file_costs_memory_for_its_index_alone(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", json.dumps([{"text": "x" * 2000}] * 10_000, indent=1))
    tracemalloc.start()
    file = JsonFile(path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(file) == 10_000
    assert file.record(9_999) == {"text": "x" * 2000}
    assert kept < 400_000  # 20 MB of records
    assert peak < 8_000_000


def test_a_jsonl_file_costs_memory_for_its_index_alone(tmp_path: Path) -> None:
    line = json.dumps({"text": "x" * 2000}) + "\n"
    path = write(tmp_path, "a.jsonl", line * 10_000)
    tracemalloc.start()
    file = JsonlFile(path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(file) == 10_000
    assert file.record(9_999) == {"text": "x" * 2000}
    assert kept < 400_000  # 20 MB of records
    assert peak < 1_000_000


# --- strange JSON ---


def plainly(record: Any, root: Path) -> None:
    """What is done with a parsed record: nothing but SampleError may come of it."""
    try:
        for image in read_record(record, "auto").images:
            find_image(image, root)
    except SampleError as error:
        message = str(error)
        assert message.isprintable()


@pytest.mark.skipif(not BAD_JSON, reason="the shared data is not there")
@pytest.mark.parametrize("path", BAD_JSON, ids=[path.stem for path in BAD_JSON])
def test_the_json_test_suite_is_taken_and_refused_as_it_says(tmp_path: Path, path: Path) -> None:
    """`y_` must be taken, `n_` refused, `i_` may be either; equal keys are refused though JSON allows them."""
    content = path.read_bytes()
    must, twice = path.name[0], "duplicated_key" in path.name
    try:
        value = parse_json(content)
    except SampleError as error:
        message = str(error)
        assert message.isprintable()
        assert must != "y" or twice
    else:
        assert must != "n"
        assert not twice
        assert value == json.loads(content.decode("utf-8-sig"))
        plainly(value, tmp_path)
    for wrapped in (content, b"[" + content + b"]"):
        copy = write(tmp_path, "a.json", wrapped)
        try:
            (file,) = open_records(str(copy))
        except UserError as error:
            (fault,) = error.faults
            assert fault.startswith(str(copy))
            assert fault.isprintable()
            assert must != "y" or twice or not content.lstrip().startswith((b"[", b"{"))
        else:
            assert must != "n" or wrapped is not content
            found = json.loads(wrapped.decode("utf-8-sig"))
            assert isinstance(file, JsonFile) or not isinstance(found, list)
            assert [file.record(i) for i in range(len(file))] == (found if isinstance(found, list) else [found])


BASE = [
    {"messages": [{"role": "user", "content": "<image>Q"}, {"role": "assistant", "content": "A"}], "images": ["a.png"]},
    {"conversations": [{"from": "human", "value": "é"}, {"from": "gpt", "value": "A\n"}], "id": 1.5e-3},
    {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}
        ]
    },
    {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q", "train": True}]},
]
PIECES = [b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"-", b".", b"1", b"/", b"..", b"null", b"true", b"NaN"]
PIECES += [b"-Infinity", b"1e999", b'"\\ud800"', b"\\ud800", b"\\u0000", b'"role"', b"<image>", b"http://["]
PIECES += [b"\n", b"\r", b" ", b"\0", b"\xff", b"\xc3", b"\xc2\x85", b"\xe2\x80\xa8", BOM, b"x" * 500]
PIECES += [b"7" * 5000, b"[" * 2000, b'{"":' * 2000, b'"messages": 1, ', b'"video": 1, ', b"file://"]
PIECES += [b"data:image/png;base64,\xc3\xa9"]
MUTATION = st.tuples(st.booleans(), st.floats(0, 1), st.sampled_from(PIECES))


def mutated(content: bytes, mutations: list[tuple[bool, float, bytes]]) -> bytes:
    for insert, share, piece in mutations:
        at = int(share * len(content))
        content = content[:at] + (piece if insert else b"") + content[at + (0 if insert else min(len(piece), 9)) :]
    return content


@settings(FUZZ, max_examples=500)
@given(mutations=st.lists(MUTATION, min_size=1, max_size=4))
def test_a_mutated_jsonl_file_gives_records_or_plain_refusals(
    tmp_path: Path, mutations: list[tuple[bool, float, bytes]]
) -> None:
    content = mutated("\n".join(json.dumps(record, ensure_ascii=False) for record in BASE).encode(), mutations)
    file = JsonlFile(write(tmp_path, "a.jsonl", content))
    lines = content.split(b"\n")
    filled = [number for number, line in enumerate(lines, start=1) if line.removeprefix(BOM).strip()]
    assert [file.place(i).line for i in range(len(file))] == filled
    for i in range(len(file)):
        try:
            plainly(file.record(i), tmp_path)
        except SampleError as error:
            message = str(error)
            assert message.isprintable()


def strict_json(content: bytes) -> Any:
    """The value of a JSON file by Python's own reader, or ValueError."""

    def no_constant(name: str) -> Any:
        raise ValueError(name)

    def no_equal_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("equal keys")
        return dict(pairs)

    try:
        return json.loads(content.decode("utf-8-sig"), parse_constant=no_constant, object_pairs_hook=no_equal_keys)
    except RecursionError:
        raise ValueError("too deep") from None


@pytest.mark.slow("a fuzz test of many files")
@settings(FUZZ, max_examples=500)
@given(mutations=st.lists(MUTATION, max_size=3))
def test_a_mutated_json_file_is_read_as_python_reads_it_or_refused_with_a_line(
    tmp_path: Path, mutations: list[tuple[bool, float, bytes]]
) -> None:
    content = mutated(json.dumps(BASE, ensure_ascii=False, indent=1).encode(), mutations)
    path = write(tmp_path, "a.json", content)
    try:
        expected = strict_json(content)
    except ValueError:
        expected = None
    try:
        (file,) = open_records(str(path))
    except UserError as error:
        (fault,) = error.faults
        assert fault.startswith(f"{path}:")
        assert fault.isprintable()
        assert not isinstance(expected, list) or not expected
    else:
        records = [file.record(i) for i in range(len(file))]
        assert records == expected
        for record in records:
            plainly(record, tmp_path)


OPENING = b'{"messages": [{"role": "user", "content": [{"type": "image", "image": "'


@pytest.mark.parametrize("name", ["\\ud800.png", "a\\u0000.png", "x" * 5000, "/", "..", "a\\nb.png", "\\u2028", ""])
def test_a_strange_image_path_is_refused_plainly(tmp_path: Path, name: str) -> None:
    record = parse_json(OPENING + name.encode() + b'"}]}]}')
    try:
        (image,) = read_record(record, "auto").images
        find_image(image, tmp_path)
        pytest.fail("the image was found")
    except SampleError as error:
        message = str(error)
    assert message.isprintable()
    assert len(message) < 400 + len(str(tmp_path))


def test_records_that_share_a_line_are_distinguished_by_their_number(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_text('[{"a": 1}, {"b": 2},\n {"c": 3}]')
    (records,) = open_records(str(path))
    assert [str(records.place(i)) for i in range(3)] == [f"{path}:1 item 1", f"{path}:1 item 2", f"{path}:2"]


@pytest.mark.parametrize(
    ("name", "content", "records"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": 2}\n', [(1, {"a": 1}), (3, {"a": 2})]),
        ("a.json", b'[{"a": 1},\n{"a": 2}]', [(1, {"a": 1}), (2, {"a": 2})]),
        ("a.csv", b'a\n"1\n"\n2\n', [(2, {"a": "1\n"}), (4, {"a": "2"})]),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n{"a": 2}\n', mtime=0), [(1, {"a": 1}), (2, {"a": 2})]),
    ],
    ids=["lines", "list", "table", "compressed"],
)
def test_the_index_of_a_large_file_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, records: list[tuple[int, Any]]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(line_index, "_WORTH_KEEPING", 2)
    path = write(tmp_path, name, content)
    made: list[Path] = []
    for index in (line_index.LineIndex, json_list._ListIndex):
        scan = index._scan

        def noted(self: Any, file: Any, scan: Any = scan) -> int:
            made.append(self.path)
            return int(scan(self, file))

        monkeypatch.setattr(index, "_scan", noted)
    for _ in range(2):
        (file,) = open_records(str(path))
        assert [(file.place(i).line, file.record(i)) for i in range(len(file))] == records
    assert made == [path]
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    open_records(str(path))
    assert made == [path, path]
