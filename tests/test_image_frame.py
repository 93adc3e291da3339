"""A processor that wants special tokens around its placeholder gets those that the chat template writes there."""

from pathlib import Path

import torch

from mmtrain.encoding.encode import Encoder
from mmtrain.encoding.load import load_processor
from mmtrain.model.load import load_model
from mmtrain.model.packing_trial import try_rows
from support.family_reference import as_messages, conversations, directory, own_ids, save_images


def test_the_ids_are_the_familys_own_and_its_rope_may_have_four_axes(tmp_path: Path) -> None:
    """HunYuan-VL: its processor refuses a bare placeholder, and its positions have four axes but no row of text."""
    root, processor = save_images(tmp_path), load_processor(str(directory("hunyuan_vl")))
    encoder = Encoder(processor)
    for case in ("one_image", "two_images"):
        conversation = conversations("hunyuan_vl")[case]
        messages = as_messages("hunyuan_vl", conversation, root)
        assert encoder.encode(conversation, root).ids.tolist() == own_ids("hunyuan_vl", messages)
    model = load_model(str(directory("hunyuan_vl")), "float32", processor)
    fault = try_rows(model, processor, torch.float32).fault
    assert fault is not None  # but padded rows pass, or it would have raised
    assert fault.startswith("this model cannot run packed rows: ValueError: Expected 4 multimodal RoPE channels")
