"""Tools, calls of tools and their results, in the forms in which records give them.

OpenAI: `tools` in the record, `tool_calls` in a turn of the assistant, turns of the role `tool`; before that
`functions`, `function_call` and the role `function`. ShareGPT: the roles `function_call` and `observation`. ms-swift:
`tool_call` and `tool_response`. LLaMA-Factory: parts of the type `tool_call`. Gemma: `tool_responses` in a turn.
Anthropic: parts of the types `tool_use` and `tool_result`, tools with an `input_schema`. Gemini: parts with a
`functionCall` or `functionResponse`, tools in `functionDeclarations`.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

from mmtrain.records.chat import SampleError, ToolCall
from mmtrain.records.json_text import parsed_value
from mmtrain.records.record_keys import Record, refuse_keys, unknown_keys
from mmtrain.safe_text import shown

RECORD_KEYS = ("tools", "functions")
CALL_KEYS = ("tool_calls", "function_call")
RESULT_KEYS = ("tool_call_id", "name", "tool_responses")
TURN_KEYS = (*CALL_KEYS, *RESULT_KEYS)
CALLER_ROLES = ("function_call", "tool_call")
"""Roles of turns whose content is a call."""
RESULT_ROLES = ("tool", "observation", "tool_response", "function", "ipython")

_PLAIN_KEYS = frozenset({"role", "content"})
_EMPTY: tuple[Any, ...] = (None, "", [], {})
_OF_CALL = frozenset({"type", "function", "name", "arguments", "id", "index"})
_CALL_PARTS = ("tool_call", "tool_use")
_OF_USE = frozenset({"type", "name", "input", "id"})
_RESULT_PART = "tool_result"
_OF_RESULT = frozenset({"type", "name", "content", "tool_use_id", "id"})
_OF_RESPONSE = frozenset({"name", "response", "content", "tool_call_id", "id"})


def tools_of(record: Record) -> tuple[str, ...]:
    """The functions that the record offers, as JSON in the form of OpenAI. Raises SampleError where one is none."""
    given = [key for key in RECORD_KEYS if record.get(key) not in _EMPTY]
    if len(given) > 1:
        raise SampleError("both 'tools' and 'functions' are given: keep one")
    found = parsed_value(record[given[0]], given[0]) if given else []
    if not isinstance(found, list):
        raise SampleError(f"{shown(given[0])} must be a list, not {shown(found)}")
    return tuple(_tool(tool) for one in found for tool in _declared(one))


def _declared(tool: Any) -> list[Any]:
    """The functions of an entry of `tools`: one, or in the form of Gemini a list of declarations."""
    if not isinstance(tool, dict) or len(tool) != 1:
        return [tool]
    ((key, value),) = tool.items()
    return value if key in ("functionDeclarations", "function_declarations") and isinstance(value, list) else [tool]


def _tool(tool: Any) -> str:
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else tool
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise SampleError(
            f"a tool must be an object with 'type': 'function' and a 'function' that has a 'name', not {shown(tool)}"
        )
    if "input_schema" in function:
        if "parameters" in function:
            raise SampleError("a tool has both 'input_schema' and 'parameters': keep one")
        function = {("parameters" if key == "input_schema" else key): value for key, value in function.items()}
        tool = {"type": "function", "function": function}
    return _as_json(tool if function is not tool else {"type": "function", "function": function})


def with_calls(turns: Sequence[Record]) -> list[Record]:
    """`turns` in the form of OpenAI: a call is in `tool_calls` of a turn of the assistant, a result a turn of its own.

    Calls right after a turn of the assistant, or after other calls, are made in that turn: so does a model.
    """
    if all(map(_is_plain, turns)):
        return list(turns)
    made: list[Record] = []
    for turn in itertools.chain.from_iterable(map(_with_results, turns)):
        turn = _with_listed_calls(turn)
        if turn.get("role") in CALLER_ROLES:
            turn = {**turn, "role": "assistant", "content": None, "tool_calls": _calls_in(turn.get("content"))}
            if made and made[-1].get("role") in ("assistant", "gpt", "model"):
                made[-1] = _joined(made[-1], turn)
                continue
        responses = turn.get("tool_responses")
        made += [turn] if responses in _EMPTY else _with_responses(turn, responses)
    return made


def _is_plain(turn: Record) -> bool:
    """Whether a turn has neither calls nor results: a role and a text."""
    return turn.keys() <= _PLAIN_KEYS and isinstance(turn.get("content"), str) and turn.get("role") not in CALLER_ROLES


def calls_of(turn: Record) -> tuple[ToolCall, ...]:
    """The calls of a turn of the assistant. Raises SampleError where one is none."""
    return tuple(_call(call) for call in _list_of_calls(turn.get("tool_calls")))


def result_text(content: Any) -> Any:
    """What a tool gave: text as it is, any other value as JSON."""
    is_parts = isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content)
    return content if content is None or isinstance(content, str) or (is_parts and content) else _as_json(content)


def _with_listed_calls(turn: Record) -> Record:
    """`turn` with the older `function_call`, and parts that are calls, in `tool_calls`."""
    content, older = turn.get("content"), turn.get("function_call")
    entries = content if isinstance(content, list) else []
    parts = [part for part in entries if _is_call(part)]
    if older in _EMPTY and not parts:
        return turn
    if turn.get("tool_calls") not in _EMPTY or (older not in _EMPTY and parts):
        raise SampleError("a turn gives its calls twice: keep 'tool_calls'")
    calls = [older] if older not in _EMPTY else [call for part in parts for call in _calls_of_part(part)]
    kept = [part for part in entries if not _is_call(part)]
    if entries[: len(kept)] != kept:
        raise SampleError("a turn has more after its calls: move it before them, or into a turn of its own")
    return {**turn, "content": kept if parts else content, "tool_calls": calls, "function_call": None}


def _is_call(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in _CALL_PARTS


def _calls_of_part(part: Record) -> list[Any]:
    if part["type"] == "tool_call":
        return _calls_in(part.get("value"))
    refuse_keys(unknown_keys(part, _OF_USE))
    return [{"name": part.get("name"), "arguments": part.get("input"), "id": part.get("id")}]


def _with_results(turn: Record) -> Iterator[Record]:
    """`turn`, with each part that is the result of a call as a turn of a tool, in their order."""
    content = turn.get("content")
    if not isinstance(content, list) or not any(map(_is_result, content)):
        yield turn
        return
    if turn.get("role") not in ("user", "human", *RESULT_ROLES):
        raise SampleError(f"the result of a call in a turn of the {shown(turn.get('role'))}: expected 'user' or 'tool'")
    for is_result, parts in itertools.groupby(content, _is_result):
        if not is_result:
            yield {**turn, "content": list(parts)}
            continue
        for part in parts:
            refuse_keys(unknown_keys({k: v for k, v in part.items() if v is not False}, _OF_RESULT))  # `is_error`
            call_id = part.get("tool_use_id", part.get("id"))
            own = {"role": "tool", "content": part.get("content"), "name": part.get("name"), "tool_call_id": call_id}
            yield {**turn, **own}


def _is_result(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == _RESULT_PART


def _joined(before: Record, turn: Record) -> Record:
    """A turn of the assistant with the calls of the next one, which says the same about training."""
    own = {"role", "content", "tool_calls"}
    flags = [{key: one[key] for key in one.keys() - own if one[key] is not None} for one in (before, turn)]
    if flags[1] and flags[0] != flags[1]:
        raise SampleError("a call and the turn of the assistant that makes it say different things: make them equal")
    return {**before, "tool_calls": [*_list_of_calls(before.get("tool_calls")), *turn["tool_calls"]]}


def _calls_in(content: Any) -> list[Any]:
    """The calls that the content of a turn is: an object, a list of them, or the JSON text of either."""
    found = parsed_value(content, "a call")
    return found if isinstance(found, list) else [found]


def _with_responses(turn: Record, responses: Any) -> Iterator[Record]:
    """The turn without its `tool_responses`, unless nothing is left of it, then a turn of a tool for each."""
    rest = {key: value for key, value in turn.items() if key != "tool_responses"}
    if turn.get("role") not in RESULT_ROLES:
        yield rest
    elif turn.get("content") not in _EMPTY:
        raise SampleError("a turn has both 'content' and 'tool_responses': keep one")
    for response in parsed_value(responses, "tool_responses"):
        if not isinstance(response, dict) or ("response" in response) == ("content" in response):
            raise SampleError(f"one of 'tool_responses' must have a 'name' and a 'response', not {shown(response)}")
        refuse_keys(unknown_keys(response, _OF_RESPONSE))
        content = response.get("response", response.get("content"))
        call_id = response.get("tool_call_id", response.get("id"))
        yield {"role": "tool", "content": content, "name": response.get("name"), "tool_call_id": call_id}


def _list_of_calls(value: Any) -> list[Any]:
    if value in _EMPTY:
        return []
    found = parsed_value(value, "tool_calls")
    if not isinstance(found, list):
        raise SampleError(f"'tool_calls' must be a list, not {shown(found)}")
    return found


def _call(call: Any) -> ToolCall:
    """`{"type": "function", "function": {"name", "arguments"}, "id"}`, or `{"name", "arguments"}`."""
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        raise SampleError(f"a call must be an object with a 'name' and 'arguments', not {shown(call)}")
    refuse_keys(
        [key for one in ([call] if function is call else [call, function]) for key in unknown_keys(one, _OF_CALL)]
    )
    given, number = function.get("arguments"), call.get("id")
    arguments = {} if given in (None, "") else parsed_value(given, f"the arguments of {name}")
    if not isinstance(arguments, dict):
        raise SampleError(f"the arguments of {shown(name, 40)} must be an object, not {shown(arguments)}")
    if number is not None and not isinstance(number, str):
        raise SampleError(f"the 'id' of a call must be text, not {shown(number)}")
    text = _as_json(arguments)
    return ToolCall(name, given if isinstance(given, str) and given else text, number or None)


def _as_json(value: Any) -> str:
    """As templates write it. Raises SampleError where the value is none of JSON, as tables may have it."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
    except (TypeError, ValueError, RecursionError):
        raise SampleError(f"{shown(value)} cannot be written as JSON") from None
    return text
