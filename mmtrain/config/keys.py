"""Key paths from the schema: those that may change on resume, and those that affect bits."""

from collections.abc import Iterator

from mmtrain.config.run_section import Run
from mmtrain.config.schema import Config
from mmtrain.config.section import Marker, Section


def _marked(marker: Marker, section: type[Section] = Config, inside: str = "") -> Iterator[str]:
    """The key paths of the fields with `marker`, in the order of the schema, without the fields inside them."""
    for name, field in section.model_fields.items():
        if marker in field.metadata:
            yield inside + name
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _marked(marker, field.annotation, f"{inside}{name}.")


CHANGEABLE = tuple(_marked(Marker.SAME_RESULT))
"""Sections and keys that may change on resume: they decide how the result is computed or what is reported."""

EVALUATED = ("data.eval", "run.eval_every", "run.eval_answers")
"""What decides the evaluations of a run, and with `train.early_stopping` the step at which it ends."""

AFFECTS_BITS = tuple(_marked(Marker.AFFECTS_BITS, Run))
"""Keys of `run` whose change may change the bits of the result, within rounding."""
