"""What a chat template makes of the reasoning of a reply, and whether a reply suits the prompt for it."""

from mmtrain.encoding.messages import as_messages
from mmtrain.encoding.stand_ins import Form, Marks, TurnForm, reasoned_text, stand_in, stand_ins
from mmtrain.encoding.template import ChatTemplate
from mmtrain.records.chat import SampleError
from mmtrain.records.reasoning import CLOSE, OPEN


def rewrites_reasoning(template: ChatTemplate) -> bool:
    """Whether the template treats reasoning in a reply as more than text: drops it, or writes it in another way."""
    if (template.traits.generation_prompt or "").rstrip().endswith((OPEN, CLOSE)):
        return True
    marks = Marks(f"{OPEN}\n", f"\n{CLOSE}\n\n")
    for num_replies in (2, 1):
        plain, reasoned = (
            Form((TurnForm("user", ("text",)), TurnForm("assistant", (kind,))) * num_replies)
            for kind in ("text", marks)
        )
        try:
            expected, found = (template.render(as_messages(stand_ins(form).messages)) for form in (plain, reasoned))
        except SampleError:  # such as a template that takes one reply
            continue
        numbers = iter(range(3 * num_replies))
        for number in range(2 * num_replies):
            text = stand_in(next(numbers)) if number % 2 == 0 else reasoned_text(marks, next(numbers), next(numbers))
            expected = expected.replace(stand_in(number), f"<{number}>")
            found = found.replace(text, f"<{number}>")
        return found != expected
    return False


def opens(prompt: str) -> bool:
    """Whether the prompt for a reply begins its reasoning."""
    return prompt.rstrip().endswith(OPEN)


def check_reasoning(prompt: str, form: TurnForm, turn: int) -> None:
    """Raises SampleError where a reply reasons and the prompt for it says that it does not, or the other way round."""
    if form.is_reasoned and prompt.rstrip().endswith(CLOSE):
        raise SampleError(
            f"turn {turn + 1} has reasoning, and the prompt for it ends with {CLOSE}: set labels.reasoning to drop, or "
            "give a template whose prompt lets the model reason as model.chat_template"
        )
    if not form.is_reasoned and opens(prompt):
        raise SampleError(
            f"turn {turn + 1} has no reasoning, and the prompt for it ends with {OPEN}: begin the reply with "
            f"{OPEN}...{CLOSE}, or give a template whose prompt does not reason as model.chat_template"
        )
