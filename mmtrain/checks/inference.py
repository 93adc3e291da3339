"""What a model is given at inference: the text of its own chat template, and the ids that its tokenizer makes of it."""

from collections.abc import Sequence
from contextlib import suppress

from mmtrain.encoding.messages import as_messages, as_tools
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.records.chat import Conversation, SampleError

Prompts = dict[int, list[int]]
"""By turn, the ids of the prompt for it."""


class Inference:
    """Texts and ids as inference with one model makes them."""

    def __init__(self, processor: ChatProcessor) -> None:
        self._processor = processor

    def rendered(self, conversation: Conversation, end: int, begun: bool = False) -> str:
        """The turns before `end` as the template writes them, `begun`: up to where the reply of the next one begins.
        Raises SampleError where the template refuses them."""
        messages, tools = as_messages(conversation.messages[:end]), as_tools(conversation)
        return self._processor.template.render(messages, add_generation_prompt=begun, tools=tools)

    def ids(self, text: str) -> list[int]:
        """The ids of a rendered text."""
        text, adds = self._input(text)
        return self._processor.tokenizer.encode_for_inference([text], adds)[0]

    def prompts(self, asked: Sequence[tuple[Conversation, Sequence[int]]]) -> list[Prompts]:
        """The prompts for some turns of each conversation, all encoded at once; without turns for which the template
        refuses to write one."""
        found: list[Prompts] = [{} for _ in asked]
        texts: list[tuple[int, int, str, bool]] = []
        for number, (conversation, turns) in enumerate(asked):
            with suppress(SampleError):
                texts += [(number, turn, *self._input(self.rendered(conversation, turn, begun=True))) for turn in turns]
        for adds in (False, True):
            own = [one for one in texts if one[3] == adds]
            encoded = self._processor.tokenizer.encode_for_inference([text for _, _, text, _ in own], adds)
            for (number, turn, _, _), ids in zip(own, encoded, strict=True):
                found[number][turn] = ids
        return found

    def _input(self, text: str) -> tuple[str, bool]:
        """A rendered text as the tokenizer is given it, and whether that adds its special tokens: a processor's does,
        and may put text of its own first, unless the text starts with the BOS."""
        tokenizer, images = self._processor.tokenizer, self._processor.images
        if images is not None:  # some families write another token for the placeholder
            text = text.replace(images.token, images.placeholder)
        if images is None or (tokenizer.traits.bos and text.startswith(tokenizer.traits.bos)):
            return text, False
        return tokenizer.traits.processor_text + text, True
