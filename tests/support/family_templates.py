"""Chat templates in the manner of the published ones of many families: what each does with parts, spaces and ends.

Shortened: no tools, no default preambles of many lines. Kept: which content a template takes (a string or parts), in
what order it writes images and texts, what it trims, what it refuses, how it opens and closes a turn.
"""


def _parts(image: str, text: str = "p.text", content: str = "m.content") -> str:
    """Writes a string as it is, or the parts in their order."""
    return (
        "{% if " + content + " is string %}{{ " + content + " }}{% else %}{% for p in " + content + " %}"
        "{% if p.type == 'image' %}" + image + "{% elif p.type == 'text' %}{{ " + text + " }}{% endif %}"
        "{% endfor %}{% endif %}"
    )


_ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
_CHATML_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def _chatml(image: str, default_system: str = "", before: str = "") -> str:
    default = (
        "{% if loop.first and m.role != 'system' %}<|im_start|>system\n" + default_system + "<|im_end|>\n{% endif %}"
    )
    return (
        before + "{% for m in messages %}" + (default if default_system else "") + "<|im_start|>{{ m.role }}\n"
        "" + _parts(image) + "<|im_end|>\n{% endfor %}" + _CHATML_PROMPT
    )


_VISION = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN2_VL = _chatml(_VISION, "You are a helpful assistant.")
QWEN3_VL = _chatml(_VISION)
INTERNVL = _chatml("<IMG_CONTEXT>\n")
MINICPM = _chatml("<|image_pad|>")

# The last reply gets an empty thought, earlier ones none; the prompt for a reply holds the empty thought.
QWEN3_5 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% macro show(m) %}" + _parts(_VISION) + "{% endmacro %}{% for m in messages %}"
    "{% set content = show(m) | trim %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)

# Every text is trimmed; the system's goes before the first question.
GEMMA3 = (
    "{{ bos_token }}{% set prefix = '' %}{% set turns = messages %}{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content %}"
    "{% set prefix = (system if system is string else system[0].text) + '\n\n' %}"
    "{% set turns = messages[1:] %}{% endif %}{% for m in turns %}" + _ALTERNATE + "<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ prefix if loop.first else '' }}"
    "{% if m.content is string %}{{ m.content | trim }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<start_of_image>{% else %}{{ p.text | trim }}{% endif %}{% endfor %}{% endif %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA4 = (
    "{{ bos_token }}{% for m in messages %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% if m.content is string %}{{ m.content | trim }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<|image|>{% else %}{{ p.text | trim }}{% endif %}{% endfor %}{% endif %}"
    "<turn|>\n{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)


def _cohere(content: str, prompt: str) -> str:
    turn = (
        "<|START_OF_TURN_TOKEN|>{% if m.role == 'user' %}<|USER_TOKEN|>" + content + "{% elif m.role == 'assistant' %}"
        "<|CHATBOT_TOKEN|><|START_RESPONSE|>" + content + "<|END_RESPONSE|>{% else %}<|SYSTEM_TOKEN|>"
        "" + content + "{% endif %}<|END_OF_TURN_TOKEN|>"
    )
    return (
        "{{ bos_token }}{% for m in messages %}" + turn + "{% endfor %}"
        "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>" + prompt + "{% endif %}"
    )


_IMAGES_THEN_TEXTS = (
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content | selectattr('type', 'equalto', 'image') %}<image>{% endfor %}"
    "{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text }}{% endfor %}{% endif %}"
)
COHERE2 = _cohere("{{ m.content }}", "<|START_RESPONSE|>")  # parts are printed as Python
COHERE2_VISION = _cohere(_parts("<|IMG_PATCH|>"), "<|START_RESPONSE|>")
AYA_VISION = _cohere(_IMAGES_THEN_TEXTS, "")

# A string has no parts that are named: its words are dropped.
_ROLE_COLON = (
    "{% for m in messages %}{{ m.role | capitalize }}{% if m.content[0].type == 'image' %}:{% else %}{{ ': ' }}"
    "{% endif %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% elif p.type == 'image' %}<image>"
    "{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
IDEFICS3 = "<|begin_of_text|>" + _ROLE_COLON
SMOLVLM = "<|im_start|>" + _ROLE_COLON

LLAVA_NEXT = (
    "{% for m in messages %}{% if m.role == 'system' %}<<SYS>>\n{{ m.content[0].text }}\n<</SYS>>\n\n"
    "{% elif m.role == 'user' %}[INST] {% for p in m.content | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text }}"
    "{% endfor %}{{ ' [/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content[0].text + '</s> ' }}{% endif %}"
    "{% endfor %}"
)
# The header of a reply is `assistant ` and a newline, that of the prompt lacks the space.
LLAVA_ONEVISION = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' }}"
    "{% for p in m.content | selectattr('type', 'equalto', 'image') %}<image>{% endfor %}"
    "{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ '\n' + p.text }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}" + _CHATML_PROMPT
)


def _mistral(system: str, question: str, parts: str) -> str:
    return (
        "{{ bos_token }}" + system + "{% for m in turns %}" + _ALTERNATE + "{% if m.role == 'user' %}[INST]"
        "" + question + _parts("[IMG]") + "[/INST]{% else %}" + parts + "{{ eos_token }}{% endif %}{% endfor %}"
    )


_SYSTEM_APART = (
    "{% set turns = messages %}{% if messages[0].role == 'system' %}{% set system = messages[0].content if "
    "messages[0].content is string else messages[0].content[0].text %}{% set turns = messages[1:] %}{% endif %}"
)
# The system's text stands in the last question, and only where nothing follows it.
PIXTRAL = _mistral(
    _SYSTEM_APART, "{% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}", _parts("[IMG]")
)
MISTRAL3 = _mistral(
    _SYSTEM_APART + "{% set today = strftime_now('%Y-%m-%d') %}[SYSTEM_PROMPT]{{ system if system is defined else "
    "'You are Mistral Small 3. Today is ' + today }}[/SYSTEM_PROMPT]",
    "",
    "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}",
)

# Only the last reply closes with the token that ends generation; parts raise.
GPT_OSS = (
    "{{ '<|start|>system<|message|>You are ChatGPT.\nCurrent date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}"
    "{% set turns = messages %}{% if messages[0].role == 'system' %}"
    "{{ '<|start|>developer<|message|># Instructions\n\n' + messages[0].content + '\n\n<|end|>' }}"
    "{% set turns = messages[1:] %}{% endif %}{% for m in turns %}{% if m.role == 'assistant' %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% else %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# Parts become JSON.
LFM2 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ m.content if m.content is string else m.content | tojson }}<|im_end|>\n{% endfor %}" + _CHATML_PROMPT
)
LFM2_VL = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}" + _parts("<image>") + "<|im_end|>\n{% endgeneration %}{% else %}" + _parts("<image>") + ""
    "<|im_end|>\n{% endif %}{% endfor %}" + _CHATML_PROMPT
)
# The system's parts are printed as Python; an image and a system turn together are refused.
MLLAMA = (
    "{{ bos_token }}{% set system = '' %}{% set turns = messages %}{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content | trim %}{% set turns = messages[1:] %}{% endif %}"
    "{% set ns = namespace(images=false) %}{% for m in turns %}{% for p in m.content %}{% if p.type == 'image' %}"
    "{% set ns.images = true %}{% endif %}{% endfor %}{% endfor %}{% if ns.images and system %}"
    "{{ raise_exception('Prompting with images is incompatible with system messages.') }}{% endif %}"
    "{% if not ns.images %}<|start_header_id|>system<|end_header_id|>\n\n"
    "{{ 'Cutting Knowledge Date: December 2023\nToday Date: ' + strftime_now('%d %b %Y') + '\n\n' + system }}"
    "<|eot_id|>{% endif %}{% for m in turns %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n" + _parts("<|image|>") + "<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# A system's and an assistant's parts are printed as Python; the next turn's header is all that ends a reply.
GLM4V = (
    "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'user' %}"
    "" + _parts("<|begin_of_image|><|image|><|end_of_image|>") + "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# The role follows the text.
HUNYUAN_VL = (
    "<｜hy_begin▁of▁sentence｜>{% for m in messages %}"
    "" + _parts("<｜hy_place▁holder▁no▁100｜><｜hy_place▁holder▁no▁102｜><｜hy_place▁holder▁no▁101｜>") + ""
    "{% if m.role == 'system' %}<｜hy_place▁holder▁no▁3｜>{% elif m.role == 'user' %}<｜hy_User｜>{% else %}"
    "<｜hy_Assistant｜>{% endif %}{% endfor %}"
)
# No end token, and the words are stripped and lose their empty lines.
FALCON_MAMBA = (
    "{% set turns = messages %}{% set system = '' %}{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content %}{% set turns = messages[1:] %}{% endif %}{% for m in turns %}"
    "" + _ALTERNATE + "{% if loop.first %}{{ system.strip() }}{% endif %}"
    "{{ '\n\n' + ('User: ' if m.role == 'user' else 'Assistant: ') + m.content.strip().replace('\n\n', '\n') }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
GRANITE = (
    "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)

# A user's own, for a family without one. Its processor puts BOS after the images and a line break at the end.
PALIGEMMA = (
    "{% for m in messages %}{% if m.role == 'user' %}" + _parts("<image>") + "{% else %}{{ m.content if m.content is "
    "string else m.content[0].text }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endif %}{% endfor %}"
)
