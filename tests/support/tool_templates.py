"""Chat templates with tools, in the manner of the published ones of several families.

Shortened: the preambles that explain how to call are a few words. Kept: where tools stand, how a call and its result
are written, what ends a reply with calls, whether arguments are an object or text, what is refused.
"""

from dataclasses import dataclass

_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_TOOLS_IN_SYSTEM = (
    "{% if tools %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
    "# Tools\n<tools>{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n</tools><|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
)
_XML_CALLS = (
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{% if loop.index0 > 0 or m.content %}{{ '\n' }}{% endif %}"
    '<tool_call>\n{{ \'{"name": "\' + c.function.name + \'", "arguments": \' }}{{ c.function.arguments | tojson }}'
    "{{ '}' }}\n</tool_call>{% endfor %}{% endif %}"
)
_XML_RESULTS = (
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
)

QWEN2_5 = (
    _TOOLS_IN_SYSTEM + "{% for m in messages %}{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% elif m.role == 'assistant' %}"
    "<|im_start|>assistant\n{{ m.content or '' }}" + _XML_CALLS + "<|im_end|>\n{% elif m.role == 'tool' %}"
    "" + _XML_RESULTS + "{% endif %}{% endfor %}" + _PROMPT
)

# The last reply gets a thought, empty or not; earlier ones after the last question keep theirs, others lose it.
QWEN3 = (
    _TOOLS_IN_SYSTEM + "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% elif m.role == 'assistant' %}"
    "{% set r = m.reasoning_content if m.reasoning_content is string else '' %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or r) %}<think>\n{{ r.strip('\n') }}\n</think>\n\n"
    "{{ (m.content or '').lstrip('\n') }}{% else %}{{ m.content or '' }}{% endif %}" + _XML_CALLS + "<|im_end|>\n"
    "{% elif m.role == 'tool' %}" + _XML_RESULTS + "{% endif %}{% endfor %}" + _PROMPT
)

# Tools stand in the first question; one call in a turn, without words; a result is written as JSON.
LLAMA3 = (
    "{{ bos_token }}{% set start = '<|start_header_id|>' %}{% set stop = '<|end_header_id|>\n\n' %}"
    "{% set turns = messages %}{% if messages[0].role == 'system' %}{{ start + 'system' + stop }}"
    "{{ messages[0].content | trim }}<|eot_id|>{% set turns = messages[1:] %}{% endif %}{% if tools %}"
    "{{ start + 'user' + stop }}Functions:\n{% for t in tools %}{{ t | tojson(indent=4) }}\n\n{% endfor %}"
    "{{ turns[0].content | trim }}<|eot_id|>{% set turns = turns[1:] %}{% endif %}{% for m in turns %}"
    "{% if m.role in ('user', 'system', 'assistant') and 'tool_calls' not in m %}"
    "{{ start + m.role + stop }}{{ m.content | trim }}<|eot_id|>{% elif 'tool_calls' in m %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('only single tool-calls at once') }}{% endif %}"
    "{{ start + 'assistant' + stop }}{{ '{\"name\": \"' + m.tool_calls[0].function.name + '\", \"parameters\": ' }}"
    "{{ m.tool_calls[0].function.arguments | tojson }}{{ '}' }}<|eot_id|>{% else %}{{ start + 'ipython' + stop }}"
    "{% if m.content is mapping or m.content is iterable %}{{ m.content | tojson }}{% endif %}<|eot_id|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ start + 'assistant' + stop }}{% endif %}"
)

# Tools stand before the last question; a token begins a call, and every call has an id of nine letters.
MISTRAL = (
    "{{ bos_token }}{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% if tools and m == asked[-1] %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]"
    "{% endif %}[INST] {{ m.content }}[/INST]{% elif m.tool_calls is defined %}[TOOL_CALLS] ["
    "{% for c in m.tool_calls %}{% if c.id is not defined or c.id | length != 9 %}"
    "{{ raise_exception('ids must have 9 characters') }}{% endif %}"
    "{{ (c.function | tojson)[:-1] + ', \"id\": \"' + c.id + '\"}' }}{{ ', ' if not loop.last }}{% endfor %}]"
    "{{ eos_token }}{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}{% elif m.role == 'tool' %}"
    "[TOOL_RESULTS] {{ '{\"content\": ' + m.content + ', \"call_id\": \"' + m.tool_call_id + '\"}' }}[/TOOL_RESULTS]"
    "{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
)

# Arguments are text.
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
    "{% elif m.tool_calls is defined %}{{ '<|assistant|>' + m.content }}<|calls|>{% for c in m.tool_calls %}<|call|>"
    "{{ c.function.name + '\n```json\n' + c.function.arguments + '\n```' }}<|call_end|>{% endfor %}<|calls_end|></s>"
    "{% elif m.role == 'assistant' %}<|assistant|>{{ m.content }}</s>{% elif m.role == 'tool' %}<|output|>"
    "{{ m.content }}<|output_end|>{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# Content is a list of parts in every turn; calls stand before the words, as tags for every argument.
TAGS = (
    "{% for m in messages %}<start_of_turn>{{ m.role }}\n{% for c in m.tool_calls or [] %}<call {{ c.function.name }}>"
    "{% for key, value in c.function.arguments.items() %}<{{ key }}>{{ value }}</{{ key }}>{% endfor %}</call>\n"
    "{% endfor %}{% for p in m.content %}{{ p.text }}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class ToolTemplate:
    """A template, and by hand what the model must write for one call, without words, of f({"a": 1})."""

    text: str
    called: str
    specials: tuple[str, ...] = ()
    shows_tools: bool = True


_XML = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
TOOL_TEMPLATES = {
    "qwen2.5": ToolTemplate(QWEN2_5, _XML),
    "qwen3": ToolTemplate(QWEN3, _XML),
    "llama3": ToolTemplate(LLAMA3, '{"name": "f", "parameters": {"a": 1}}<|eot_id|>'),
    "mistral": ToolTemplate(
        MISTRAL,
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abcdefgh1"}]</s>',
        ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]"),
    ),
    "deepseek": ToolTemplate(
        DEEPSEEK,
        '<|calls|><|call|>f\n```json\n{"a": 1}\n```<|call_end|><|calls_end|></s>',
        ("<|user|>", "<|assistant|>", "<|calls|>", "<|call|>", "<|call_end|>", "<|calls_end|>", "<|output|>"),
        shows_tools=False,
    ),
    "tags": ToolTemplate(TAGS, "<call f><a>1</a></call>\n<end_of_turn>", shows_tools=False),
}
