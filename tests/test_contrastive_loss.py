"""The contrastive losses against autograd of dense float64 formulas and against transformers' own."""

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SiglipConfig, SiglipModel
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from mmtrain.contrastive.loss import LossGradients, LossKind, LossSettings, contrastive_loss
from mmtrain.contrastive.relation import PairItems, Relation, relate

SCALE, BIAS = 7.0, -3.0
UNIQUE = [PairItems(n, (100 + n,)) for n in range(9)]
REPEATED = [
    PairItems(0, (100,), (200, 201)),
    PairItems(0, (101,)),  # the same query with another positive
    PairItems(1, (100,), (202,)),  # the same positive for another query
    PairItems(2, (102, 103, 104)),  # several positives
    PairItems(3, (105,)),
    PairItems(3, (105,)),  # the same pair twice
    PairItems(4, (3,), (4,)),  # query 3 is a document too, and query 4 its own negative
    PairItems(5, (106,), group="g"),
    PairItems(6, (107, 108), group="g"),
]
CASES = {"unique": UNIQUE, "repeated": REPEATED, "one": [PairItems(0, (100,))]}


def embeddings(relation: Relation, width: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    counts = len(relation.queries), len(relation.documents)
    return tuple(torch.randn(n, width, generator=generator, dtype=torch.float64).to(dtype) * 2 for n in counts)  # type: ignore[return-value]


def reference(
    pairs: Sequence[PairItems],
    relation: Relation,
    x: Tensor,
    y: Tensor,
    settings: LossSettings,
    scale: Tensor,
    bias: Tensor,
) -> Tensor:
    """One pair and one positive at a time, from the definition."""
    queries, documents = relation.queries.tolist(), relation.documents.tolist()

    def is_negative(query: int, document: int) -> bool:
        own = [pair for pair in pairs if pair.query == query]
        groups = {pair.group for pair in own} - {None}
        friends = [*own, *(pair for pair in pairs if pair.group in groups)]
        return document != query and all(document not in pair.positives for pair in friends)

    total = torch.zeros((), dtype=x.dtype)
    for width in settings.dims or (x.shape[1],):
        u, v = F.normalize(x[:, :width], dim=1), F.normalize(y[:, :width], dim=1)
        logits = scale * (u @ v.T) + bias
        negatives = torch.tensor([[is_negative(query, document) for document in documents] for query in queries])
        one = torch.zeros((), dtype=x.dtype)
        for pair in pairs:
            row, own = queries.index(pair.query), pair.positives
            for number in own:
                column = documents.index(number)
                if settings.kind == "sigmoid":
                    one = one - F.logsigmoid(logits[row, column]) / len(own)
                    continue
                choices = [logits[row][negatives[row]]]
                choices += [logits[:, column][negatives[:, column]]] if settings.symmetric else []
                for others in choices:
                    both = torch.cat([logits[row, column][None], others])
                    one = one + (both.logsumexp(0) - logits[row, column]) / len(own) / len(choices)
        if settings.kind == "sigmoid":
            one = one - F.logsigmoid(-logits[negatives]).sum()
        total = total + one / len(pairs) / len(settings.dims or (0,))
    return total


def differentiated(
    pairs: Sequence[PairItems], x: Tensor, y: Tensor, settings: LossSettings
) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.double().clone(), y.double().clone(), torch.tensor(SCALE).double(), torch.tensor(BIAS).double()]
    for leaf in leaves:
        leaf.requires_grad_()
    loss = reference(pairs, relate(pairs), leaves[0], leaves[1], settings, leaves[2], leaves[3])
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return loss, [torch.zeros_like(leaf) if one is None else one for leaf, one in zip(leaves, found, strict=True)]


def computed(pairs: Sequence[PairItems], x: Tensor, y: Tensor, settings: LossSettings) -> LossGradients:
    return contrastive_loss(x, y, relate(pairs), settings, torch.tensor(SCALE), torch.tensor(BIAS))


def far(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.mark.parametrize("block", [1, 2, 5, None])
@pytest.mark.parametrize("dims", [(), (3, 6)])
@pytest.mark.parametrize(("kind", "symmetric"), [("infonce", True), ("infonce", False), ("sigmoid", True)])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_autograd(
    name: str, kind: LossKind, symmetric: bool, dims: tuple[int, ...], block: int | None
) -> None:
    pairs, settings = CASES[name], LossSettings(kind, symmetric, dims, block)
    x, y = embeddings(relate(pairs))
    loss, gradients = differentiated(pairs, x, y, settings)
    found = computed(pairs, x, y, settings)
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-13, abs=1e-15)
    for one, expected in zip((found.queries, found.documents, found.scale, found.bias), gradients, strict=True):
        assert (one.double() - expected).norm() <= 1e-12 * expected.norm() + 1e-15


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_float32_is_within_rounding(kind: LossKind) -> None:
    pairs = [PairItems(n, (1000 + n // 2,)) for n in range(300)]
    settings = LossSettings(kind, block=64)
    x, y = embeddings(relate(pairs), 32, torch.float32)
    loss, gradients = differentiated(pairs, x, y, settings)
    found = computed(pairs, x, y, settings)
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert max(far(found.queries, gradients[0]), far(found.documents, gradients[1])) <= 2e-6
    assert far(found.scale, gradients[2]) <= 2e-6
    if kind == "sigmoid":
        assert far(found.bias, gradients[3]) <= 2e-6


def test_without_repetition_it_is_the_loss_of_clip() -> None:
    x, y = embeddings(relate(UNIQUE), 16, torch.float32)
    images, texts = F.normalize(x, dim=1), F.normalize(y, dim=1)
    expected = image_text_contrastive_loss(SCALE * texts @ images.T)
    assert computed(UNIQUE, x, y, LossSettings("infonce")).loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_without_repetition_it_is_the_loss_of_siglip() -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config={**small, "vocab_size": 50, "max_position_embeddings": 8},
        vision_config={**small, "image_size": 16, "patch_size": 8},
    )
    torch.manual_seed(0)
    model = SiglipModel(config).eval()
    with torch.no_grad():
        model.logit_scale.fill_(math.log(SCALE))
        model.logit_bias.fill_(BIAS)
        out = model(input_ids=torch.randint(0, 50, (9, 8)), pixel_values=torch.randn(9, 3, 16, 16), return_loss=True)
    found = computed(UNIQUE, out.image_embeds, out.text_embeds, LossSettings("sigmoid"))
    assert found.loss.item() == pytest.approx(out.loss.item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_perfect_embeddings_with_duplicates_have_no_loss_and_no_gradient(kind: LossKind) -> None:
    pairs = [PairItems(n, (100 + n % 5,)) for n in range(10)]  # every document has two queries
    x = torch.eye(5, dtype=torch.float32)[[n % 5 for n in range(10)]] * 2 - 1 / 5
    y = torch.eye(5, dtype=torch.float32) * 2 - 1 / 5
    scale, bias = torch.tensor(400.0), torch.tensor(-200.0)
    found = contrastive_loss(x, y, relate(pairs), LossSettings(kind), scale, bias)
    assert found.loss.item() <= 1e-30
    assert max(one.abs().max().item() for one in (found.queries, found.documents, found.scale, found.bias)) <= 1e-30


def test_the_order_of_the_pairs_does_not_matter() -> None:
    x, y = embeddings(relate(REPEATED))
    first, second = (computed(pairs, x, y, LossSettings("infonce")) for pairs in (REPEATED, REPEATED[::-1]))
    assert torch.equal(first.queries, second.queries)
    assert first.loss == second.loss
