"""Traced chat templates: the text of every conversation is Jinja's, and a template that could read a text unseen is
left to Jinja."""

import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from mmtrain.encoding.fast_template import renderer
from mmtrain.encoding.messages import Tools
from mmtrain.encoding.traceable import ASKED, MADE, is_traceable
from mmtrain.encoding.traced_template import TracedTemplate, _StandIn, _Trace, _UnknownUseError
from mmtrain.records.chat import Messages
from support.label_models import OTHER_TEMPLATES, TEMPLATES

SHARED = Path(__file__).parents[2] / "shared" / "data" / "models" / "chat_templates_trl"
ALL = {name: template.text for name, template in {**TEMPLATES, **OTHER_TEMPLATES}.items()}
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
WORDS = (
    *("word", " ", "\n", "", "a", "A", "</think>", "<think>", "literal", "image", "text", "user", "ß", "İ", "\ue000"),
    *("'", '"', "\\", "<", "&", "{{", "%s", "{0}", "\ue001", "\u2028", "\x1f", "é", "👍", "0", "1", "\t", "end"),
)


class Jinja:
    """A template rendered by Jinja, which counts."""

    def __init__(self, source: str) -> None:
        self.num_rendered = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of what random templates say
            self._compiled: Any = chat_template_utils._compile_jinja_template(source)
        self.is_traceable = is_traceable(self._compiled.environment.parse(source))

    def __call__(self, messages: Messages, begun: bool, tools: Tools | None = None) -> str:
        self.num_rendered += 1
        return str(self._compiled.render(self._variables(messages, begun)))

    def run(self, messages: Messages, begun: bool) -> Iterator[str]:
        found: Iterator[str] = self._compiled.root_render_func(
            self._compiled.new_context(self._variables(messages, begun))
        )
        return found

    def _variables(self, messages: Messages, begun: bool) -> dict[str, Any]:
        return {"messages": messages, "tools": None, "add_generation_prompt": begun, **SPECIAL_TOKENS}


def text_of(rng: random.Random) -> str:
    return "".join(rng.choices(WORDS, k=rng.randint(0, 5)))


def conversation_of(rng: random.Random, in_parts: bool) -> Messages:
    """One of a few forms, with random texts."""
    roles = rng.choice((["user"], ["user", "assistant"], ["system", "user", "assistant"], ["user", "assistant"] * 2))
    return [{"role": role, "content": parts_of(rng, role) if in_parts else text_of(rng)} for role in roles]


def parts_of(rng: random.Random, role: str) -> list[dict[str, str]]:
    text = {"type": "text", "text": text_of(rng)}
    return [{"type": "image"}, text] if role == "user" and rng.random() < 0.5 else [text]


def outcome(render: Any, messages: Messages, begun: bool) -> str:
    try:
        return str(render(messages, begun))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def check_equal(source: str, rng: random.Random, count: int) -> tuple[int, int]:
    """Compare random conversations. Returns how many were rendered without an error, and how many of them by Jinja."""
    jinja, reference = Jinja(source), Jinja(source)
    if not jinja.is_traceable:
        return 0, 0
    traced, num_fine = TracedTemplate(jinja, jinja.run), 0
    for number in range(count):
        messages, begun = conversation_of(rng, in_parts=number % 2 == 0), rng.random() < 0.5
        expected = outcome(reference, messages, begun)
        assert outcome(traced, messages, begun) == expected, (source, messages)
        num_fine += "Error" not in expected
    return num_fine, jinja.num_rendered


@pytest.mark.parametrize("name", ALL)
def test_a_traced_template_writes_what_jinja_writes(name: str) -> None:
    num_fine, _ = check_equal(ALL[name], random.Random(name), 1500)
    assert num_fine > 300


@pytest.mark.parametrize("name", [path.name for path in sorted(SHARED.glob("*.jinja"))])
def test_so_do_those_of_models(name: str) -> None:
    num_fine, _ = check_equal((SHARED / name).read_text(encoding="utf-8"), random.Random(name), 1500)
    assert num_fine > 300


def test_jinja_runs_for_a_few_conversations_of_a_form_only() -> None:
    """Eight forms of each content, with and without a prompt: one trace each, and one text in 256 that is checked."""
    num_fine, num_rendered = check_equal(ALL["chatml"], random.Random(1), 3000)
    assert num_fine == 3000
    assert num_rendered < 40 + 3000 / 256


def test_answers_decide_which_trace_is_taken() -> None:
    source = (
        "{% for m in messages %}{% if 'x' in m.content %}[{{ m.content | trim }}]{% else %}-{% endif %}{% endfor %}"
    )
    jinja = Jinja(source)
    traced = TracedTemplate(jinja, jinja.run)
    texts = ["a", " x ", "b", "xy\n", "\tc x", "d"]
    assert [traced([{"role": "user", "content": text}], False) for text in texts] == [
        "-",
        "[x]",
        "-",
        "[xy]",
        "[c x]",
        "-",
    ]
    assert jinja.num_rendered == 2


MESSAGE = "{% set m = messages[-1] %}{% set c = m.content if m.content is string else m.content[-1].text %}"
READS_UNSEEN = (
    "{{ 'yes' if c in 'literal' }}",
    "{{ 'yes' if c not in 'literal word' }}",
    "{{ 'yes' if 'a' in c in 'literal' }}",
    "{{ c in bos_token }}",
    "{{ c ~ 'a' }}",
    "{{ (c ~ '') | length }}",
    "{{ '%s' % c }}",
    "{{ '%s' | format(c) }}",
    "{{ '{}'.format(c) }}",
    "{{ c.format('a') }}",
    "{{ [c] | join }}",
    "{{ ','.join([c, c]) }}",
    "{{ c | tojson }}",
    "{{ c | replace('a', 'b') }}",
    "{{ 'abc'.replace('a', c) }}",
    "{{ 'literal'.startswith(c) }}",
    "{{ 'literal' | trim(c) }}",
    "{{ 'a literal'.split(c) }}",
    "{{ {'a': 1}.get(c, 2) }}",
    "{{ {'a': 1}[c] }}",
    "{{ messages[c] }}",
    "{{ m[c] }}",
    "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(c) | length }}",
    "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(c)[0] }}",
    "{% set x %}{{ c }}{% endset %}{{ x[:2] }}",
    "{% call f() %}{% endcall %}",
    "{% filter upper %}{{ c }}{% endfilter %}",
    "{% set range = 'literal'.find %}{{ range(c) }}",
    "{% for namespace in ['literal'.count] %}{{ namespace(c) }}{% endfor %}",
    "{% set f = 'literal'.find %}{{ f(c) }}",
    "{{ c is in 'literal' }}",
    "{{ c is upper }}",
    "{{ c is sequence }}",
    "{{ [c, 'b'] | sort | first }}",
    "{{ [c, 'b'] | unique | list | length }}",
    "{{ [c, 'b'] | map('length') | list }}",
    "{{ messages | selectattr('content', 'in', 'literal') | list | length }}",
    "{{ c | int }}",
    "{{ c | title }}",
    "{{ c | wordcount }}",
    "{{ c | e }}",
    "{{ (c | e) | length }}",
    "{{ c | indent }}",
    "{{ c | string | length }}",
    "{{ loop.changed(c) }}",
    "{{ raise_exception(*[c]) }}",
)
SPOILS = (
    "{{ c | length }}",
    "{{ c | count > 3 }}",
    "{{ c[:3] }}",
    "{{ c[0] }}",
    "{{ c[-1] }}",
    "{{ ('a' + c + 'b')[0] }}",
    "{{ c[1 + 1] }}",
    "{% for x in c %}{{ x }}.{% endfor %}",
    "{% for x in [c] if x[0] == 'a' %}{{ x }}{% endfor %}",
    "{% set a, b = c %}{{ a }}",
    "{{ c.split('a') }}",
    "{{ c.split()[-1] }}",
    "{{ c | first }}",
    "{{ c | last }}",
    "{{ c | list }}",
    "{{ [c] }}",
    "{{ m }}",
    "{{ messages }}",
    "{{ [c] | trim }}",
    "{{ {'a': c} }}",
    "{{ {c: 1} }}",
    "{{ c < 'm' }}",
    "{{ 'm' >= c }}",
    "{{ c % 2 }}",
    "{{ namespace(a=c) }}",
    "{{ c.split }}",
    "{% if c < 'm' %}a{% else %}b{% endif %}",
)
SEEN = (
    "{{ c }}",
    "{{ c == 'word' }}{{ 'word' == c }}{{ c != 'a' }}",
    "{{ 'literal' in c }}{{ 'a' not in c }}",
    "{{ c in ['a', 'word', bos_token] }}{{ c in (c, 'a') }}",
    "{{ [c] == ['word'] }}{{ [c, 'a'] in [['a', 'a'], ['word', 'a']] }}",
    "{{ messages[0] == m }}",
    "{{ c | trim }}|{{ c.strip() }}|{{ c.strip('\\n ') }}|{{ c | trim('a') }}",
    "{{ c.lstrip().rstrip('a') }}|{{ c | upper }}|{{ (c | lower).capitalize() }}",
    "{{ c.startswith('a') }}{{ c.strip().endswith('d') }}",
    "{{ c.startswith('a', 1) }}{{ c.replace('a', 'b', 1) }}{{ c.removeprefix('w').removesuffix('d') }}",
    "{{ 'a' + c + 'b' }}{{ c + c }}{{ ('x' + c) | trim }}",
    "{% if c %}yes{% else %}no{% endif %}{{ c or 'none' }}{{ c and 'some' }}{{ not c }}",
    "{{ c if c.strip() else 'empty' }}",
    "{{ c is string }}{{ c is iterable }}{{ c is mapping }}{{ c is none }}{{ c is defined }}{{ c is number }}",
    "{{ c.missing is defined }}{{ c['missing'] is defined }}{{ c._trace is defined }}{{ c['_number'] is defined }}",
    "{{ c.missing }}{{ m.missing | default(c) }}{{ c | default('none', true) }}",
    "{{ c is equalto 'word' }}{{ c is ne 'word' }}{{ c == none }}{{ c == 1 }}{{ c == [] }}",
    "{% set ns = namespace(x=c) %}{% set ns.x = ns.x + 'a' %}{{ ns.x }}{{ ns.x == 'aa' }}",
    "{% for x in messages %}{{ loop.index }}{{ loop.first }}{{ x.content if x.content is string else '' }}{% endfor %}",
    "{% for x in messages if x.content %}{{ loop.last }}{% endfor %}",
    "{% for k, v in m.items() %}{{ k }}{{ v if v is string else '' }}{% endfor %}",
    "{{ messages | selectattr('content', 'equalto', 'word') | list | length }}",
    "{{ (messages | last).content if m.content is string }}{{ messages[1:] | length }}",
    "{% for x in messages %}{% if x.content == c %}{% break %}{% endif %}{{ loop.index0 % 2 }}{% endfor %}",
    "{{ raise_exception('no') if 'a' in c else c }}",
    "{{ c.split('a') if 'literal' in c else c }}",
    "{{ m.get('content') if m.get('content') is string }}",
)


@pytest.mark.parametrize("source", READS_UNSEEN)
def test_a_template_that_could_read_a_text_unseen_is_left_to_jinja(source: str) -> None:
    assert not Jinja(MESSAGE + source).is_traceable


@pytest.mark.parametrize("source", SPOILS)
def test_what_is_not_recorded_is_left_to_jinja(source: str) -> None:
    assert Jinja(MESSAGE + source).is_traceable
    num_fine, num_rendered = check_equal(MESSAGE + source, random.Random(source), 200)
    assert num_rendered >= num_fine


@pytest.mark.parametrize("source", SEEN)
def test_what_is_recorded_is_what_jinja_writes(source: str) -> None:
    assert Jinja(MESSAGE + source).is_traceable
    num_fine, num_rendered = check_equal(MESSAGE + source, random.Random(source), 2000)
    assert num_fine > 200
    assert num_rendered < 2000 - num_fine / 4


TERMS = (
    *(
        "c",
        "c",
        "c",
        "'a'",
        "'literal'",
        "bos_token",
        "m.role",
        "loop.index",
        "none",
        "m.missing",
        "messages[0].content",
    ),
    *("c.strip()", "c | trim", "c.rstrip('a')", "c | upper", "c.removeprefix('a')", "ns.x", "messages | length"),
)
FORMS = (
    *("{0} + {1}", "{0} + {1}", "({0}) if {1} else ({2})", "{0} == {1}", "'a' in ({0})", "({0}) in [{1}, {2}]"),
    *("({0}) and ({1})", "({0}) or ({1})", "not ({0})", "({0}) | default({1})", "({0}).strip()", "({0}) is string"),
    *("({0}).startswith('l')", "({0})[1:]", "({0}) | length", "({0}) in ({1})", "({0}) ~ ({1})", "({0}) < ({1})"),
    *("[{0}, {1}]", "({0}).split('a')", "({0}) != ({1})", "({0}) | replace('a', {1})", "{{'a': {0}}}[{1}]"),
)


def expression(rng: random.Random, depth: int) -> str:
    if not depth or rng.random() < 0.25:
        return rng.choice(TERMS)
    return rng.choice(FORMS).format(*(f"({expression(rng, depth - 1)})" for _ in range(3)))


STATEMENTS = ("{{{{ {0} }}}};", "{{% if ({0}) %}}1{{% else %}}{{{{ {1} }}}}{{% endif %}}", "{{% set ns.x = ({0}) %}}")


def random_template(rng: random.Random) -> str:
    chosen = rng.choices(STATEMENTS, k=rng.randint(1, 3))
    body = "".join(one.format(expression(rng, 2), expression(rng, 1)) for one in chosen)
    return (
        "{% set ns = namespace(x='') %}{% for m in messages %}"
        "{% set c = m.content if m.content is string else m.content[-1].text %}" + body + "{% endfor %}"
    )


MORE = pytest.mark.slow("40 seconds of the same")


@pytest.mark.parametrize("count", [100, pytest.param(1500, marks=MORE)])
def test_random_templates(count: int) -> None:
    num_traceable = num_fine = 0
    for seed in range(count):
        rng = random.Random(seed)
        source = random_template(rng)
        num_traceable += Jinja(source).is_traceable
        num_fine += check_equal(source, rng, 40)[0]
    assert num_traceable > count / 5
    assert num_fine > 4 * count


def test_a_text_can_do_nothing_that_is_neither_recorded_nor_spoils_the_trace() -> None:
    """Every method of `str`, also those of Python versions to come."""
    recorded = {*MADE, *ASKED, "__add__", "__contains__", "__eq__", "__ne__"}
    harmless = {"__new__", "__getattribute__", "__doc__", "__str__"}
    for name in vars(str).keys() - recorded - harmless:
        trace = _Trace(["word"])
        (text,) = trace.stand_ins()
        with pytest.raises(_UnknownUseError):
            list(getattr(text, name)(*([0] * (name == "__getitem__"))))
        assert trace.is_spoilt, name
    assert all(name in vars(_StandIn) for name in recorded)


def test_a_trace_that_differs_from_jinja_is_refused() -> None:
    """A renderer that looks at the texts behind the back of the template."""

    def render(messages: Messages, begun: bool, tools: Tools | None = None) -> str:
        return "rare" if messages[0]["content"] == "300" else "usual"

    traced = TracedTemplate(render, lambda messages, begun: iter(["usual"]))
    usual, rare = ([{"role": "user", "content": content}] for content in ("1", "300"))
    for _ in range(256):
        assert traced(usual, False) == "usual"
    with pytest.raises(ValueError, match="another text than Jinja"):
        traced(rare, False)


def test_messages_with_more_than_texts_and_images_are_left_to_jinja() -> None:
    jinja = Jinja(ALL["chatml"])
    traced = TracedTemplate(jinja, jinja.run)
    others: list[dict[str, Any]] = [
        {"role": "assistant", "content": "a", "reasoning_content": "b"},
        {"role": "assistant", "content": "a", "tool_calls": []},
        {"role": "user", "content": [{"type": "text", "text": "a", "more": "b"}]},
        {"role": "user", "content": [{"type": "image", "image": "b"}]},
        {"role": "user", "content": [{"type": "text", "text": 1}]},
    ]
    for message in others:
        for _ in range(2):
            traced([message], False)
    assert jinja.num_rendered == 2 * len(others)


def test_the_renderer_of_a_model_traces() -> None:
    class Tokenizer:
        special_tokens_map = SPECIAL_TOKENS

        def apply_chat_template(self, messages: Messages, tools: Any, chat_template: str, **settings: Any) -> str:
            return Jinja(chat_template)(messages, settings["add_generation_prompt"])

    assert isinstance(renderer(Tokenizer(), ALL["llama3"]), TracedTemplate)
    assert not isinstance(renderer(Tokenizer(), ALL["llama3"] + "{{ bos_token ~ '' }}"), TracedTemplate)
