"""What a model is given at inference: the text of its own chat template, and the ids that its tokenizer makes of it."""

from collections.abc import Sequence
from contextlib import suppress

from mmtrain.checks.earlier_prompts import EarlierPrompts
from mmtrain.encoding.messages import as_messages, as_tools
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.encoding.segments import Known
from mmtrain.records.chat import Conversation, SampleError

Prompts = dict[int, list[int]]
"""By turn of a conversation, the ids of the prompt for it."""


class Inference:
    """Texts and ids as inference with one model makes them."""

    def __init__(self, processor: ChatProcessor) -> None:
        self._processor = processor
        self._earlier = EarlierPrompts(processor, self._prompt)

    def rendered(self, conversation: Conversation, end: int, begun: bool = False) -> str:
        """The turns before `end` as the template writes them, `begun`: up to where the reply of the next one begins.
        Raises SampleError where the template refuses them."""
        messages, tools = as_messages(conversation.messages[:end]), as_tools(conversation)
        return self._processor.template.render(messages, add_generation_prompt=begun, tools=tools)

    def ids(self, text: str) -> list[int]:
        """The ids of a rendered text."""
        text, adds = self._input(text)
        return self._processor.tokenizer.encode_for_inference([text], adds)[0]

    def prompts(self, asked: Sequence[tuple[Conversation, Sequence[int]]], known: Known) -> list[Prompts]:
        """The prompts for some turns of each conversation, all encoded at once; without turns for which the template
        refuses to write one. `known`: the ids of texts that were encoded before."""
        forms = [self._earlier.form(*one) for one in asked]
        found = self._encoded(
            [(one, turns if form is None else turns[-1:]) for form, (one, turns) in zip(forms, asked, strict=True)],
            known,
        )
        made: list[Prompts] = []
        for form, (_, turns), ids in zip(forms, asked, found, strict=True):
            derived = {} if form is None or turns[-1] not in ids else self._earlier.derived(form, ids[turns[-1]]) or {}
            made.append(derived | ids)
        return made

    def _encoded(self, asked: Sequence[tuple[Conversation, Sequence[int]]], known: Known) -> list[Prompts]:
        found: list[Prompts] = [{} for _ in asked]
        texts: list[tuple[int, int, str, bool]] = []
        for number, (conversation, turns) in enumerate(asked):
            with suppress(SampleError):
                texts += [(number, turn, *self._prompt(conversation, turn)) for turn in turns]
        for adds in (False, True):
            own = [one for one in texts if one[3] == adds]
            encoded = self._processor.tokenizer.encode_in_segments([text for _, _, text, _ in own], adds, known)
            for (number, turn, _, _), ids in zip(own, encoded, strict=True):
                found[number][turn] = ids
        return found

    def _prompt(self, conversation: Conversation, turn: int) -> tuple[str, bool]:
        """The prompt for a turn as the tokenizer is given it."""
        return self._input(self.rendered(conversation, turn, begun=True))

    def _input(self, text: str) -> tuple[str, bool]:
        """A rendered text as the tokenizer is given it, and whether that adds its special tokens: a processor's does,
        and may put text of its own first, unless the text starts with the BOS."""
        tokenizer, images = self._processor.tokenizer, self._processor.images
        if images is not None:  # some families write another token for the placeholder
            text = text.replace(images.token, images.placeholder)
        if images is None or (tokenizer.traits.bos and text.startswith(tokenizer.traits.bos)):
            return text, False
        return tokenizer.traits.processor_text + text, True
