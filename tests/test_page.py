"""The HTML page: every token with its label, nothing from outside, foreign text harmless, and at work in a browser."""

import base64
import html
import io
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from mmtrain.command_output import write_page
from mmtrain.config.data_section import Source
from mmtrain.encoding.encode import Encoder
from mmtrain.encoding.load import load_processor
from mmtrain.inspect_labels.page import page_of_samples
from mmtrain.inspect_labels.page_tokens import clusters, divide_text
from mmtrain.inspect_labels.view import SampleView, TokenView, view_sample
from mmtrain.records.record_set import RecordSet
from support.builders import TINY, write_jsonl
from support.fresh_samples import FreshSamples

MARKUP = "</script><img src=x onerror=alert(1)>"
EVIL_NAME = f'images/{MARKUP}"\u202e\x1b[31m.png'
ANSWER = "A set \U0001f642 \u202eabc \x1b[31mred\x1b[0m\n\nIt has\ttwo <parts> & هذه صورة جميلة 很漂亮 <|im_end|>."
VOID = {"meta", "img", "input", "path", "br", "link"}


class Page(HTMLParser):
    """All tags with their attributes, and the text inside each token."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: dict[tuple[str, int], tuple[dict[str, str | None], str]] = {}
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self._sample = ""
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        if tag == "article":
            self._sample = values["id"] or ""
        if "data-p" in values:
            self.tokens[self._sample, int(values["data-p"] or "")] = (values, "")
        if tag not in VOID:
            self._open.append((tag, values))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        for _, values in self._open:
            if "data-c" in values:
                return
        for _, values in self._open:
            if "data-p" in values:
                key = (self._sample, int(values["data-p"] or ""))
                self.tokens[key] = (self.tokens[key][0], self.tokens[key][1] + data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [values for name, values in self.tags if name == tag]


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> list[SampleView]:
    folder = tmp_path_factory.mktemp("page")
    for name, size in (("images/wide.png", (160, 96)), (EVIL_NAME, (50, 120))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.linear_gradient("L").resize(size).save(folder / name, "png")
    rows: list[dict[str, Any]] = [
        {
            "messages": [
                {"role": "system", "content": f"Plain words. {MARKUP}"},
                {"role": "user", "content": f"<image>What? {MARKUP} <image>"},
                {"role": "assistant", "content": ANSWER},
            ],
            "images": ["images/wide.png", EVIL_NAME],
        },
        {
            "messages": [
                {"role": "user", "content": "1+1?"},
                {"role": "assistant", "content": "3", "train": False},
                {"role": "user", "content": "Are you sure of it?"},
                {"role": "assistant", "content": "2, of course."},
            ]
        },
    ]
    data = write_jsonl(folder / f"{MARKUP}.jsonl", rows)
    encoder = Encoder(load_processor(str(TINY)))
    samples: Any = FreshSamples(RecordSet([Source(path=str(data), root=str(folder))]), encoder)
    return [view_sample(samples, samples.encoder, index) for index in range(len(samples))]


def losses_of(views: list[SampleView]) -> dict[int, dict[int, float]]:
    return {v.index: {t.position: t.position * 0.01 for t in v.tokens if t.supervised} for v in views}


@pytest.fixture(scope="module")
def written(views: list[SampleView], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp("out") / "labels.html"
    write_page(path, page_of_samples(views, losses_of(views)))
    return path.read_text(encoding="utf-8"), path


def test_every_token_is_there_with_its_label(views: list[SampleView], written: tuple[str, Path]) -> None:
    page = Page(written[0])
    expected = {(f"s{v.index}", t.position): t for v in views for t in v.tokens if t.kind != "image"}
    assert page.tokens.keys() == expected.keys()
    for key, token in expected.items():
        values, _ = page.tokens[key]
        assert (values["data-i"], values["data-l"]) == (str(token.id), str(token.label))
        assert ("sp" in (values["class"] or "").split()) == (token.kind == "special")


def test_the_text_of_the_page_is_that_of_the_sample(views: list[SampleView], written: tuple[str, Path]) -> None:
    """What is drawn of a span is its text, save the characters that are drawn as their number."""
    page = Page(written[0])
    for view in views:
        for span in view.spans:
            if span.kind != "image":
                drawn = "".join(page.tokens[f"s{view.index}", p][1] for p in range(span.start, span.end))
                assert drawn == span.text.replace("\x1b", "").replace("\u202e", "")


def test_supervised_runs_and_turns(views: list[SampleView], written: tuple[str, Path]) -> None:
    page = Page(written[0])
    runs = [values for values in page.named("bdi") if "run" in (values.get("class") or "").split()]
    for values in runs:
        supervised = "supervised" in (values["data-has"] or "").split()
        assert supervised == ("on" in (values["class"] or "").split())
        assert values["data-role"] in (values["data-has"] or "").split()
    turns = [values["class"] for values in page.named("section")]
    assert turns == ["turn system", "turn user", "turn assistant", *["turn user", "turn assistant"] * 2]
    assert "the record says not to train on this turn" in written[0]


def test_nothing_comes_from_outside(written: tuple[str, Path]) -> None:
    page = Page(written[0])
    assert not page.named("link")
    for tag, values in page.tags:
        for name, value in values.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "action", "srcset"):
                assert (value or "").startswith(("data:image/", "#")), (tag, value)
    assert len(page.named("script")) == 1
    assert not page.named("script")[0]
    assert not re.search(r"https?://|url\(|@import", written[0])
    (policy,) = [v["content"] or "" for v in page.named("meta") if v.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy


def test_text_from_outside_is_escaped(written: tuple[str, Path]) -> None:
    text = written[0]
    assert text.count("</script>") == 1
    assert "<img src=x" not in text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    assert 'data-c="U+202E"' in text
    assert 'data-c="U+001B"' in text
    assert html.escape(MARKUP) in text


def test_an_image_is_shown_at_its_used_size_with_its_grid(views: list[SampleView], written: tuple[str, Path]) -> None:
    page = Page(written[0])
    images = [image for view in views for image in view.images]
    figures = page.named("figure")
    assert [int(f["data-start"] or "") for f in figures] == [image.start for image in images]
    for shown, grid, image in zip(page.named("img"), page.named("svg"), images, strict=True):
        encoded = (shown["src"] or "").partition("base64,")[2]
        with PIL.Image.open(io.BytesIO(base64.b64decode(encoded))) as opened:
            assert opened.size == image.tokens.used_size
        assert image.tokens.grid is not None
        assert grid["viewbox"] == f"0 0 {image.tokens.grid[0]} {image.tokens.grid[1]}"
        assert f"{image.tokens.num_placeholders} placeholders" in written[0]
    assert "image_pad" not in written[0]


def test_an_image_that_changes_shape_has_no_grid(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    """LLaVA's processor crops to a square: a grid over the whole image would be wrong, one over the crop is right."""
    PIL.Image.linear_gradient("L").resize((200, 80)).save(tmp_path / "wide.png")
    messages = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "a"}]
    data = write_jsonl(tmp_path / "data.jsonl", [{"messages": messages, "images": ["wide.png"]}])
    encoder = Encoder(load_processor(str(model_dirs["llava"])))
    samples: Any = FreshSamples(RecordSet([Source(path=str(data))]), encoder)
    view = view_sample(samples, samples.encoder, 0)
    write_page(tmp_path / "whole.html", page_of_samples([view]))
    text = (tmp_path / "whole.html").read_text(encoding="utf-8")
    assert not Page(text).named("svg")
    assert "crops, pads or stretches" in text
    write_page(
        tmp_path / "crop.html",
        page_of_samples([view], pixels=lambda image: PIL.Image.new("RGB", image.tokens.used_size)),
    )
    assert len(Page((tmp_path / "crop.html").read_text(encoding="utf-8")).named("svg")) == 1


def test_an_image_that_is_gone_is_reported(views: list[SampleView], tmp_path: Path) -> None:
    image = views[0].images[0]
    assert isinstance(image.found.source, Path)
    moved = image.found.source.rename(tmp_path / "moved.png")
    try:
        write_page(tmp_path / "labels.html", page_of_samples(views))
    finally:
        moved.rename(image.found.source)
    assert 'class="broken"' in (tmp_path / "labels.html").read_text(encoding="utf-8")


def test_losses_shade_and_list(views: list[SampleView], written: tuple[str, Path], tmp_path: Path) -> None:
    page = Page(written[0])
    shaded = {key: float(v["data-n"] or "") for key, (v, _) in page.tokens.items() if "data-n" in v}
    expected = {(f"s{i}", p): loss for i, of in losses_of(views).items() for p, loss in of.items()}
    assert shaded == pytest.approx(expected, abs=1e-3)
    worst = sorted(expected, key=lambda key: -expected[key])[:20]
    assert [values["href"] for values in page.named("a")] == [f"#{name}-{position}" for name, position in worst]
    ids = [values["id"] for _, values in page.tags if "id" in values]
    assert len(ids) == len(set(ids))
    assert {f"{name}-{position}" for name, position in worst} <= set(ids)

    write_page(tmp_path / "plain.html", page_of_samples(views))
    plain = (tmp_path / "plain.html").read_text(encoding="utf-8")
    assert "data-n=" not in plain
    assert 'class="surprising"' not in plain


def test_a_loss_that_is_no_number_comes_first(views: list[SampleView], tmp_path: Path) -> None:
    losses = losses_of(views)
    position = min(losses[1])
    losses[1][position] = math.nan
    write_page(tmp_path / "labels.html", page_of_samples(views, losses))
    page = Page((tmp_path / "labels.html").read_text(encoding="utf-8"))
    assert page.named("a")[0]["href"] == f"#s1-{position}"


def token(position: int, text: str) -> TokenView:
    return TokenView(position, position, text, -100, "user", 0, "text")


@pytest.mark.parametrize(
    ("texts", "whole", "drawn"),
    [
        (["The", "cat"], "The cat", ["The", " cat"]),  # SentencePiece: a token alone loses its space
        (["a", "\ufffd", "\ufffd", "b"], "a\u00e9b", ["a", "\u00e9", "", "b"]),
        (["\ufffd"] * 4 + ["."], "\u00e9\u00e8.", ["\u00e9", "", "\u00e8", "", "."]),
        (["\ufffd", "\ufffd"], "\u6f02\u4eae", ["\u6f02\u4eae", ""]),
        (["x", "", "y"], "xy", ["x", "", "y"]),
        (["lost"], "other", ["other"]),
    ],
)
def test_text_is_shared_out_among_tokens(texts: list[str], whole: str, drawn: list[str]) -> None:
    tokens = [token(position, text) for position, text in enumerate(texts)]
    cells = list(divide_text(tokens, whole))
    assert [cell.token for cell in cells] == tokens
    assert [cell.text for cell in cells] == drawn


def test_joined_letters_stay_joined() -> None:
    assert clusters("e\u0301a") == ["e\u0301", "a"]
    assert clusters("\u062c\u062f\u0627\u6f02\u4eae") == ["\u062c\u062f\u0627", "\u6f02", "\u4eae"]
    assert clusters("\U0001f469\u200d\U0001f467\U0001f642") == ["\U0001f469\u200d\U0001f467", "\U0001f642"]
    assert clusters("") == []


PROBE = """
const seen = {};
const count = () => samples.filter((sample) => !sample.hidden).length;
const visible = (selector) => all(selector).filter((element) => element.getClientRects().length).length;
seen.all = count();
find.value = "SURE of"; find.dispatchEvent(new Event("input"));
seen.found = count(); seen.foundIs = samples.find((sample) => !sample.hidden).id;
find.value = ""; find.dispatchEvent(new Event("input"));
document.querySelector("[value=supervised]").click();
seen.onlySupervised = visible("article .run:not(.on)") === 0 && visible("article .run.on") > 0;
document.querySelector(".surprising a").click();
seen.reset = document.body.dataset.show;
const chat = document.querySelector("#s1 .chat"); chat.focus();
chat.dispatchEvent(new KeyboardEvent("keydown", { key: "End", bubbles: true }));
chat.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft", bubbles: true }));
chat.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
seen.tip = tip.textContent;
seen.wide = document.documentElement.scrollWidth <= innerWidth;
seen.ran = all("img[src=x], article script").length;
document.body.dataset.seen = JSON.stringify(seen);
"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [pytest.param(500, marks=pytest.mark.slow("a second width")), 1400])
def test_the_page_works_in_a_browser(
    views: list[SampleView], written: tuple[str, Path], tmp_path: Path, width: int
) -> None:
    """Its own script runs under its own policy and a planted one does not; a probe, let in, finds all at work."""
    planted, probed = tmp_path / "planted.html", tmp_path / "probed.html"
    page = written[0].replace("</body>", f"<script>{PROBE}</script></body>")
    planted.write_text(page, encoding="utf-8")
    probed.write_text(page.replace("script-src '", "script-src 'unsafe-inline' 'no-", 1), encoding="utf-8")
    made = dump(planted, tmp_path, width)
    assert "data-seen=" not in made
    assert f"{len(views)} of {len(views)} samples" in made
    match = re.search(r'data-seen="([^"]*)"', dump(probed, tmp_path, width))
    assert match is not None
    seen = json.loads(html.unescape(match[1]))
    last = views[1].tokens[-1]
    assert f"position {last.position} · id {last.id}label -100 (not trained on)role template" in seen.pop("tip")
    assert seen == {
        "all": 2,
        "found": 1,
        "foundIs": "s1",
        "onlySupervised": True,
        "reset": "all",
        "wide": True,
        "ran": 0,
    }


def dump(page: Path, folder: Path, width: int) -> str:
    """The page's elements after its script ran."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},1000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True, env=dict(os.environ))
    return done.stdout.decode("utf-8")
