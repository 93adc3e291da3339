"""Dropout masks follow (seed, step, sample, module, position), as law 1 says, and nothing else."""

import hashlib
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from mmtrain.config.schema import Config
from mmtrain.config.tune_section import Tune
from mmtrain.dataset.batch import Batch, Segment
from mmtrain.errors import UserError
from mmtrain.model import dropout as dropout_module
from mmtrain.model.dropout import DropoutContext, SampleDropout, install_dropout
from mmtrain.model.kernels.masks import DroppedProduct, Mask, RowOrigins, gpu_kernel
from support.learning import LORA, learner_for, relative_l2, step_of

LENGTH = 40
WORD = 2**64 - 1


def batch_of(samples: tuple[int, ...], packed: bool = True) -> Batch:
    """Samples of `LENGTH` tokens, in one row or in a row each."""
    places = [(0, n * LENGTH) if packed else (n, 0) for n in range(len(samples))]
    segments = tuple(
        Segment(sample, row, start, LENGTH, 0, 0) for sample, (row, start) in zip(samples, places, strict=True)
    )
    shape = (1, LENGTH * len(samples)) if packed else (len(samples), LENGTH)
    return Batch(torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool), segments, packed, {})


def masks(
    seed: int = 0, step: int = 1, samples: tuple[int, ...] = (5,), module: str = "a", packed: bool = True
) -> list[Tensor]:
    """(LENGTH, 8) bool: where each sample's values are dropped."""
    context, batch = DropoutContext(seed), batch_of(samples, packed)
    dropout = SampleDropout(0.5, module, "language", None, context)
    with context.at(step, batch):
        out = dropout(torch.ones(*batch.input_ids.shape, 8))
    return list((out == 0).reshape(len(samples), LENGTH, 8))


def test_the_mask_follows_the_seed_the_step_the_sample_and_the_module() -> None:
    (expected,) = masks()
    assert torch.equal(masks()[0], expected)
    others = [masks(seed=1), masks(step=2), masks(samples=(6,)), masks(module="b")]
    for one, other in itertools.combinations([expected, *(mask for (mask,) in others)], 2):
        assert 0.4 < float((one != other).float().mean()) < 0.6  # unrelated masks differ in half of their values


def test_each_position_has_its_own_mask() -> None:
    (mask,) = masks()
    assert len({tuple(row.tolist()) for row in mask}) > LENGTH / 2


def test_the_mask_of_a_sample_is_the_same_in_every_cut() -> None:
    (alone,) = masks(samples=(5,))
    for samples, packed in itertools.product([(5, 6, 9), (9, 5, 6), (6, 9, 5)], [True, False]):
        assert torch.equal(masks(samples=samples, packed=packed)[samples.index(5)], alone)


GRIDS = {5: [(1, 2, 4)], 6: [], 9: [(1, 4, 4), (1, 2, 2)]}
"""By sample, the patches of its images."""


def vision_masks(samples: tuple[int, ...], grid_key: str | None, patches_per_row: int) -> dict[int, Tensor]:
    """(num_rows, 8) bool: what is dropped of each sample's images."""
    counts = [len(GRIDS[sample]) for sample in samples]
    segments = tuple(Segment(sample, 0, 40 * n, 40, sum(counts[:n]), counts[n]) for n, sample in enumerate(samples))
    ids = torch.zeros(1, 40 * len(samples), dtype=torch.long)
    grids = torch.tensor([grid for sample in samples for grid in GRIDS[sample]])
    batch = Batch(ids, ids.bool(), segments, True, {"grid": grids})
    sizes = [
        sum(math.prod(grid) if grid_key else 16 for grid in GRIDS[sample]) // patches_per_row for sample in samples
    ]
    context = DropoutContext(0)
    dropout = SampleDropout(0.5, "a", "vision", grid_key, context)
    with context.at(1, batch):
        dropped = dropout(torch.ones(sum(sizes), 8)) == 0
    return dict(zip(samples, dropped.split(sizes), strict=True))


@pytest.mark.parametrize(("grid_key", "patches_per_row"), [("grid", 1), ("grid", 4), (None, 1)])
def test_the_mask_of_a_samples_images_is_the_same_in_every_cut(grid_key: str | None, patches_per_row: int) -> None:
    """Images of a family without grids have equally many rows."""
    alone = {sample: vision_masks((sample,), grid_key, patches_per_row)[sample] for sample in (5, 9)}
    assert all(mask.any() and not mask.all() for mask in alone.values())
    assert not torch.equal(alone[5][:2], alone[9][:2])
    for samples in ((5, 6, 9), (9, 5), (6, 9, 5)):
        found = vision_masks(samples, grid_key, patches_per_row)
        assert all(torch.equal(found[sample], mask) for sample, mask in alone.items())


def test_dropout_is_off_again_after_a_micro_batch_that_fails() -> None:
    context, ones = DropoutContext(0), torch.ones(1, LENGTH, 8)
    dropout = SampleDropout(0.5, "a", "language", None, context)
    assert torch.equal(dropout(ones), ones)
    try:
        with context.at(1, batch_of((5,))):
            assert not torch.equal(dropout(ones), ones)
            raise ValueError
    except ValueError:
        pass
    assert torch.equal(dropout(ones), ones)


def philox4x64_10(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    """Salmon et al. 2011, section 3.3, in whole numbers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        first, second = c0 * 0xD2E7470EE14C6C93, c2 * 0xCA5A826395121157
        c0, c1, c2, c3 = (second >> 64) ^ c1 ^ k0, second & WORD, (first >> 64) ^ c3 ^ k1, first & WORD
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & WORD, (k1 + 0xBB67AE8584CAA73B) & WORD
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0, 0), "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
        ((WORD,) * 4, (WORD, WORD), "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"),
        (
            (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
            (0x452821E638D01377, 0xBE5466CF34E90C6C),
            "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6",
        ),
    ],
)
def test_the_generator_below_is_the_published_one(
    counter: tuple[int, ...], key: tuple[int, int], expected: str
) -> None:
    """kat_vectors of Random123, "philox4x64 10"."""
    assert [f"{word:016x}" for word in philox4x64_10(counter, key)] == expected.split()


@pytest.mark.parametrize("width", [8, 16, 72])
def test_every_value_is_dropped_by_its_own_number(width: int) -> None:
    """From the docstring of the masks, with the generator above: counters, and which number is whose."""
    seed, step, sample, p = 11, 2**31 + 5, 9, 0.3
    context, batch = DropoutContext(seed), batch_of((4, sample))
    dropout = SampleDropout(p, "some.module", "language", None, context)
    with context.at(step, batch):
        found = dropout(torch.ones(*batch.input_ids.shape, width)).reshape(2, LENGTH, width)[1]
    key = int.from_bytes(hashlib.blake2b(b"11 some.module", digest_size=8).digest(), "little")
    num_blocks = -(-width // 16)
    threshold = round(p * 2**16)
    for position, value in itertools.product((0, 1, LENGTH - 1), range(width)):
        block, n = value % num_blocks, value // num_blocks
        words = philox4x64_10((1 + block + num_blocks * position, sample, step, 0), (key, 0))
        is_dropped = (words[n // 4] >> 16 * (n % 4)) % 2**16 < threshold
        expected = 0.0 if is_dropped else 2**16 / (2**16 - threshold)
        assert float(found[position, value]) == pytest.approx(expected, rel=1e-6)


def test_large_keys_keep_all_their_bits() -> None:
    """NumPy turns a list of large and small numbers into floating point."""
    rows, x = RowOrigins(LENGTH, ((0, 0, LENGTH),)), torch.ones(LENGTH, 64)
    found = [Mask(0.5, 2**63 + last, 1, rows).drop(x)[0] for last in (0, 1)]
    assert 0.4 < float((found[0] != found[1]).float().mean()) < 0.6


@pytest.mark.parametrize("p", [1e-9, 0.5, 1 - 1e-9])
def test_every_share_drops_something_and_keeps_something(p: float) -> None:
    rows = RowOrigins(4000, ((0, 0, 4000),))
    (found,) = Mask(p, 1, 1, rows).drop(torch.ones(4000, 128))
    assert 0 < float((found == 0).float().mean()) < 1


def test_the_gradient_passes_where_the_value_did() -> None:
    context, batch = DropoutContext(0), batch_of((5, 6))
    dropout = SampleDropout(0.4, "a", "language", None, context)
    x = torch.ones(*batch.input_ids.shape, 24, requires_grad=True)
    with context.at(1, batch):
        out = dropout(x)
    with context.at(2, batch):  # by now it is another step
        out.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, out.detach())


@pytest.mark.parametrize("selected", [None, torch.tensor([1, 2, 5])])
def test_the_product_with_an_adapter_is_that_of_what_is_kept(selected: Tensor | None) -> None:
    """Against autograd on plain products with the same mask, of all rows or of some."""
    mask = Mask(0.4, 7, 1, RowOrigins(6, ((3, 1, 4), (7, 4, 6)))).at(selected)
    torch.manual_seed(0)
    x, weight = torch.randn(6 if selected is None else 3, 24), torch.randn(5, 24)
    factors = mask.drop(torch.ones_like(x))[0]
    found = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    expected = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    outer = torch.randn(len(x), 5)
    product = DroppedProduct.apply(*found, mask)  # type: ignore[no-untyped-call]
    plain = (expected[0] * factors) @ expected[1].t()
    assert torch.allclose(product, plain, atol=1e-6)
    gradients = [torch.autograd.grad(out, tensors, outer) for out, tensors in ((product, found), (plain, expected))]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))
    assert 0 < int((factors == 0).sum()) < factors.numel() / 2


def test_a_module_that_does_not_see_every_token_is_refused() -> None:
    """Which tokens it sees would be known to the micro-batch alone."""
    context = DropoutContext(0)
    dropout = SampleDropout(0.5, "layers.0.experts.1.up", "language", None, context)
    with (
        context.at(1, batch_of((5,))),
        pytest.raises(UserError, match=r"experts\.1\.up gets 7 of 40 tokens"),
    ):
        dropout(torch.ones(7, 8))


@pytest.mark.slow("steps under several settings")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05)])  # measured: 1e-7, 0.01
def test_fused_layers_drop_what_plain_ones_drop(
    kind: str, dtype: str, tolerance: float, make_config: Callable[..., Config]
) -> None:
    found = {}
    for name, kernels, dropout in (("plain", "off", 0.2), ("fused", "auto", 0.2), ("without", "off", 0.0)):
        tune = {"language": {**LORA, "dropout": dropout}}
        config = make_config(kind, tune, kernels=kernels)
        model = config.model.model_copy(update={"dtype": dtype})
        learner, dataset = learner_for(config.model_copy(update={"model": model}))
        found[name] = step_of(learner, dataset, [[0, 3, 5], [1]], packing=True)
    assert found["fused"][0] == pytest.approx(found["plain"][0], rel=tolerance)
    assert relative_l2(found["fused"][1], found["plain"][1]) < tolerance
    assert relative_l2(found["without"][1], found["plain"][1]) > 2 * tolerance


@pytest.mark.slow("steps under several settings")
def test_dropout_stores_nothing_for_the_backward_pass(make_config: Callable[..., Config]) -> None:
    stored = {}
    for dropout in (0.0, 0.1):
        learner, dataset = learner_for(make_config("qwen2_5_vl", {"language": {**LORA, "dropout": dropout}}))
        storages: dict[int, Tensor] = {}

        def keep(tensor: Tensor, storages: dict[int, Tensor] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            step_of(learner, dataset, [[0, 3, 5]], packing=True)
        stored[dropout] = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    assert stored[0.1] <= 1.01 * stored[0.0]


def reference_drop(
    x: Tensor, origins: Tensor, key: int, step: int, threshold: int, scale: float, per_counter: int
) -> Tensor:
    """What a kernel has to give: x (rows, width) with the generator above for every row that is a sample's."""
    assert per_counter == 16
    found, num_blocks = x.clone(), -(-x.shape[1] // 16)
    for row, (sample, position) in enumerate(origins.tolist()):
        for value in range(x.shape[1]) if sample >= 0 else ():
            block, n = value % num_blocks, value // num_blocks
            words = philox4x64_10((1 + block + num_blocks * position, sample, step, 0), (key, 0))
            found[row, value] *= 0 if (words[n // 4] >> 16 * (n % 4)) % 2**16 < threshold else scale
    return found


@pytest.mark.parametrize("kernel", ["right", "another step", "all rows", "fails"])
def test_a_kernel_is_used_only_where_it_gives_the_masks_of_the_cpu(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drop(x: Tensor, origins: Tensor, key: int, step: int, *others: Any) -> Tensor:
        if kernel == "fails":
            raise RuntimeError("no such GPU")
        origins = origins.abs() if kernel == "all rows" else origins
        return reference_drop(x, origins, key, step + (kernel == "another step"), *others)

    fake = SimpleNamespace(drop=drop)
    monkeypatch.setitem(sys.modules, "mmtrain.model.kernels.masks_triton", fake)
    assert gpu_kernel.__wrapped__(torch.device("cpu")) is (drop if kernel == "right" else None)


class Adapted(nn.Module):
    """Two linear layers with adapters, of vision and of the language model."""

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.language = nn.Linear(4, 4), nn.Linear(4, 4)
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["vision", "language"], lora_dropout=0.0), self)
        self.eval()


@pytest.mark.parametrize(("device", "kernel", "says"), [("cpu", None, False), ("cuda", None, True), ("cuda", 1, False)])
def test_dropout_is_where_the_config_has_it(
    device: str, kernel: Any, says: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a GPU cannot make the masks the run says so."""
    monkeypatch.setattr(dropout_module, "gpu_kernel", lambda device: kernel)
    family: Any = SimpleNamespace(components=SimpleNamespace(component_of=lambda name: name), grid_key="grid")
    for share, says_it in ((0.25, says), (0.0, False)):
        tune = Tune.model_validate({"vision": LORA, "language": {**LORA, "dropout": share}})
        model, lines = Adapted(), list[str]()
        install_dropout(model, family, tune, context := DropoutContext(0), torch.device(device), lines.append)
        made: Any = model.language
        (found,) = made.lora_dropout.values()
        assert isinstance(found, SampleDropout) == made.training == bool(share)
        assert share == 0 or (found._whose, found._context) == ((0.25, "language", "language", "grid"), context)
        assert not any(isinstance(module, SampleDropout) for module in model.vision.modules())
        assert not model.training
        assert [line.partition(": ")[0] for line in lines] == ["dropout"] * says_it


TRITON = """
import torch
from mmtrain.model.kernels.masks import PER_COUNTER, Mask, RowOrigins
from mmtrain.model.kernels.masks_triton import drop

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
rows = RowOrigins(6, ((3, 1, 4), (7, 4, 5)))
for width in (8, 72, 4100):
    for dtype in (torch.float32, torch.bfloat16):
        for key, step in ((5, 1), (2**40, 9), (2**63 + 5, 2**31 + 9)):
            x = torch.randn(6, width).to(dtype)
            mask = Mask(0.3, key, step, rows)
            (expected,) = mask.drop(x)
            found = drop(x.to(device), rows.on(device), key, step, mask._threshold, mask._scale, PER_COUNTER).cpu()
            assert torch.equal(found == 0, expected == 0)
            # Triton's interpreter on the CPU cuts digits off where the GPU rounds
            assert torch.allclose(found.float(), expected.float(), rtol=2e-7 if dtype == torch.float32 else 2**-7)
print("compared on", device)
"""


def test_the_gpu_kernel_drops_what_the_cpu_drops() -> None:
    """On the CPU by Triton's interpreter, which is chosen when Triton is imported."""
    pytest.importorskip("triton")
    interpreted: dict[str, Any] = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", TRITON], capture_output=True, text=True, env=os.environ | interpreted)
    assert done.stdout.startswith("compared on"), done.stderr
