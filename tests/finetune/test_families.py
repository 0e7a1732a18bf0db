"""Every family that is trained: what its directory holds is loaded, and the loss of its conversations is the one of its own logits."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lowmem.data.chat import pack_conversations
from lowmem.finetune.base_model import load_base
from lowmem.finetune.families import FAMILIES, ONE_PER_ROW, one_conversation_per_row
from lowmem.finetune.step import batch_loss
from lowmem.system.errors import CheckpointError
from tests.reference.tiny_families import SHAPES, save_tiny

CPU = torch.device("cpu")
REFUSED = ("falcon_h1", "gpt_oss", "mamba", "mixtral", "olmoe", "qwen3_moe", "qwen3_next")


def conversations() -> list[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(0)
    return [(random.integers(3, 250, length), np.arange(length) > 2) for length in (9, 12, 7, 15)]


def own_loss(model) -> float:
    """By the model's own forward pass, each conversation by itself."""
    total = 0.0
    with torch.no_grad():
        for tokens, said in conversations():
            ids = torch.from_numpy(tokens)[None]
            targets = torch.where(torch.from_numpy(said), ids[0], -100)[1:]
            total += F.cross_entropy(model(input_ids=ids[:, :-1], use_cache=False).logits[0], targets, reduction="sum").item()
    return total


def packed_loss(model) -> float:
    items = conversations()
    alone = one_conversation_per_row(model.config, 40)
    batches = [pack_conversations([item], len(item[0]) - 1).batch for item in items] if alone else [pack_conversations(items, 40).batch]
    assert alone or batches[0].segments.max() > 1
    with torch.no_grad():
        return sum(batch_loss(model, batch, 1.0, CPU).item() for batch in batches)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"lowmem"}))
def test_the_loss_of_conversations_is_the_familys_own(family, tmp_path):
    from transformers import AutoModelForCausalLM

    save_tiny(tmp_path, family)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = load_base(tmp_path, nf4=False)
    tokens = torch.arange(20)[None] * 7 % 300
    with torch.no_grad():
        assert torch.equal(ours.eval()(input_ids=tokens, use_cache=False).logits, theirs(input_ids=tokens, use_cache=False).logits)
    # the same sums in another order: a few hundred roundings of 2**-24, which do not add up beyond 1e-5
    assert packed_loss(ours) == pytest.approx(own_loss(theirs), rel=1e-5)


@pytest.mark.parametrize("family", REFUSED)
def test_other_families_are_refused_by_name(family, tmp_path):
    save_tiny(tmp_path, family)
    with pytest.raises(CheckpointError, match=f"found model_type '{family}', lowmem finetune takes apertus, .* xglm$"):
        load_base(tmp_path, nf4=False)


def test_every_family_is_tested():
    assert set(FAMILIES) - {"lowmem"} == set(SHAPES) - set(REFUSED)
    assert set(ONE_PER_ROW) < set(FAMILIES)
