"""How tokens are chosen: the options of the command line, by transformers' names, as its `GenerationConfig`."""

from collections.abc import Collection
from dataclasses import dataclass

from transformers import GenerationConfig

from mmtrain.errors import UserError


@dataclass(frozen=True, slots=True)
class Sampling:
    """Greedy by default. `temperature`, `top_p` and `top_k` are for `do_sample`; None: transformers' own value."""

    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    num_beams: int = 1
    repetition_penalty: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raises UserError for an option that would have no effect."""
        for name, value in self._only_for_sampling().items():
            if not self.do_sample:
                raise UserError(f"--{name.replace('_', '-')} {value}: it has no effect without --do-sample: add that")

    def config(self, stop_ids: Collection[int], pad_id: int) -> GenerationConfig:
        """`stop_ids` end a reply; without any it has all `max_new_tokens`. Raises UserError for a value that
        transformers refuses."""
        try:
            return GenerationConfig(
                max_new_tokens=self.max_new_tokens,
                do_sample=self.do_sample,
                num_beams=self.num_beams,
                repetition_penalty=self.repetition_penalty,
                eos_token_id=sorted(stop_ids) or None,
                pad_token_id=pad_id,
                **self._only_for_sampling(),
            )
        except ValueError as error:
            raise UserError(f"the options of generation: {error}") from None

    def _only_for_sampling(self) -> dict[str, float]:
        values = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {name: value for name, value in values.items() if value is not None}
