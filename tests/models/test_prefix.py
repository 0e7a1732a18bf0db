"""Prefix tuning: PEFT's logits and gradients, every segment and window sees the prefix, decoding, its beginning, what cannot have one."""

from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from lowmem.config.schema import AdapterConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from lowmem.engine.from_config import build_configured_model
from lowmem.models import huggingface
from lowmem.models.huggingface import HuggingFaceModel, check_contract
from lowmem.models.huggingface_attention import PREFIX
from lowmem.models.prefix import add_prefix, prefix_config, prompt_embeddings
from lowmem.nn.loss import IGNORE_INDEX
from lowmem.optim.from_config import build_optimizer
from lowmem.system.errors import CheckpointError, ConfigError
from tests.reference.tiny_families import SHAPES

COUNT = 5
FAMILIES = {
    "llama": {}, "qwen3": {}, "gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 500.0},
    "gemma3_text": {}, "gpt2": {}, "mistral": {"sliding_window": None}, "phi3": {}, "opt": {}, "gpt_bigcode": {},
}  # fmt: skip
# lowmem against lowmem: some hundred terms of each sum in fp64, through two layers, where large ones cancel
LOGITS, GRADIENTS = 1e-11, 1e-9
# transformers' eager attention computes its softmax in fp32 whatever the weights are: some hundred roundings, more in sums that cancel
EAGER_LOGITS, EAGER_GRADIENTS = 100 * 2**-24, 1000 * 2**-24


def tokens(rows: int = 2, time: int = 12) -> torch.Tensor:
    """Some tokens are frequent, as in text."""
    generator = torch.Generator().manual_seed(rows)
    common, rare = (torch.randint(3, high, (rows, time), generator=generator) for high in (8, 300))
    return torch.where(torch.rand(rows, time, generator=generator) < 0.5, common, rare)


def original(family: str, **choices: Any) -> Any:
    """In fp64; some numbers are far larger than others."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SHAPES[family] | choices))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
        model.get_input_embeddings().weight[7] *= 3  # a frequent token is louder than all others
    return model.double().eval().requires_grad_(False)


def prefixed(family: str, count: int = COUNT, **choices: Any) -> HuggingFaceModel:
    """With a prefix of which some numbers are large."""
    model = HuggingFaceModel(original(family, **choices))
    add_prefix(model, count, seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for prefix in model.prefixes():
            prefix += torch.randn(prefix.shape, generator=generator, dtype=torch.float64)
            prefix[1] *= 3
    return model


def close(found: torch.Tensor, expected: torch.Tensor, share: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=share * expected.abs().max().item())


def of_peft(family: str, ours: HuggingFaceModel) -> Any:
    """PEFT's model of the same base with the same prefix, and the shapes that PEFT finds by itself."""
    heads = {} if family != "gpt_bigcode" else {key: prefix_config(ours)[key] for key in ("token_dim", "num_attention_heads")}
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=COUNT, **heads)
    theirs = peft.get_peft_model(original(family, **FAMILIES[family]), config).double().eval()
    encoder = theirs.prompt_encoder["default"]
    assert encoder.embedding.weight.shape == prompt_embeddings(ours).shape
    encoder.load_prompt_embeddings(prompt_embeddings(ours))
    for key, value in prefix_config(ours).items():
        assert getattr(theirs.peft_config["default"], key) == value, key
    return theirs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("checkpointing", ["none", "block"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_peft(family, checkpointing):
    ours = prefixed(family, **FAMILIES[family])
    ours.activation_checkpointing = checkpointing
    theirs, inputs = of_peft(family, ours), tokens()
    targets = inputs.roll(-1, 1)
    targets[:, -1] = IGNORE_INDEX
    expected = theirs(input_ids=inputs).logits
    with torch.no_grad():
        close(ours.eval()(inputs), expected.detach(), EAGER_LOGITS)
    loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum") / 7
    (wanted,) = torch.autograd.grad(loss, [theirs.prompt_encoder["default"].embedding.weight])
    found_loss = ours.train()(inputs, targets, 7.0)
    assert found_loss.item() == pytest.approx(loss.item(), rel=EAGER_LOGITS)
    found = torch.autograd.grad(found_loss, ours.prefixes())
    assert all(gradient.any() for gradient in found)
    close(torch.cat([gradient.flatten(1) for gradient in found], 1), wanted, EAGER_GRADIENTS)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gpt2"])
def test_every_segment_of_a_row_sees_the_prefix_and_begins_after_it(family):
    ours, row = prefixed(family, **FAMILIES[family]), tokens(1, 17)
    parts = row.split([3, 8, 6], 1)
    segments = torch.cat([torch.full_like(part, index, dtype=torch.int32) for index, part in enumerate(parts, 1)], 1)
    packed, alone = ours(row, segments_BT=segments), torch.cat([ours(part) for part in parts], 1)
    close(packed, alone, LOGITS)
    direction = torch.randn(packed.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, expected = (torch.autograd.grad((logits * direction).sum(), ours.prefixes()) for logits in (packed, alone))
    for gradient, wanted in zip(found, expected, strict=True):
        close(gradient, wanted, GRADIENTS)


@pytest.mark.parametrize("decoding", [False, True])
def test_a_sliding_window_hides_text_and_no_prefix(decoding):
    """The oracle is the model's own forward pass with a mask written out."""
    window, inputs = 6, tokens(2, 14)
    ours = prefixed("mistral", sliding_window=window)
    key, query = torch.arange(14), torch.arange(14).view(-1, 1)
    seen = F.pad((key <= query) & (key > query - window), (COUNT, 0), value=True)
    mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill_(~seen, torch.finfo(torch.float64).min).expand(2, 1, -1, -1)
    past = DynamicCache([tuple(prefix.permute(1, 2, 0, 3).unsqueeze(1).expand(-1, 2, -1, -1, -1)) for prefix in ours.prefixes()])
    ours.lm.config._attn_implementation = "eager"
    expected = ours.lm(input_ids=inputs, past_key_values=past, attention_mask=mask, use_cache=True).logits
    ours.lm.config._attn_implementation = "lowmem"
    if decoding:
        with torch.no_grad():
            cache = ours.eval().new_cache(2, 14)
            found = torch.cat([ours(inputs[:, a:b], cache=cache) for a, b in ((0, 8), (8, 9), (9, 10), (10, 14))], 1)
        close(found, expected.detach(), EAGER_LOGITS)
        return
    found = ours(inputs)
    close(found.detach(), expected.detach(), EAGER_LOGITS)
    for gradient, wanted in zip(*(torch.autograd.grad(x.square().sum(), ours.prefixes()) for x in (found, expected)), strict=True):
        close(gradient, wanted, EAGER_GRADIENTS)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_texts_of_several_lengths_are_decoded_together(family):
    ours = prefixed(family).eval()
    with torch.no_grad():
        cache = ours.new_cache(2, 12)
        rows = tokens()
        for row, length in enumerate((3, 7)):
            ours(rows[row : row + 1, :length], cache=cache.rows(row, row + 1))
        found = ours(torch.stack([rows[0, 3], rows[1, 7]]).unsqueeze(1), cache=cache)[:, 0]
        close(found, torch.stack([ours(rows[:1, :4])[0, -1], ours(rows[1:, :8])[0, -1]]), LOGITS)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_it_begins_as_the_activations_of_tokens_before_the_text(family):
    base, text = HuggingFaceModel(original(family, **FAMILIES[family])), tokens()
    drawn = torch.randint(base.vocab_size, (COUNT,), generator=torch.Generator().manual_seed(4))
    expected = base(torch.cat([drawn.expand(2, -1), text], 1))[:, COUNT:]
    assert (base(text) - expected).abs().max() > 0.01 * expected.abs().max()
    add_prefix(base, COUNT, seed=4)
    close(base(text).detach(), expected, LOGITS)


def test_a_loaded_model_is_compared_with_its_own_forward_pass(monkeypatch):
    ours = prefixed("gemma3_text").float()
    check_contract(ours)
    ours._body.prefix -= 1  # texts begin too early
    ours._arguments.clear()
    with pytest.raises(CheckpointError, match="lowmem's logits differ from the model's own"):
        check_contract(ours)
    monkeypatch.setattr(huggingface.HuggingFaceModel, "prefix_window", lambda self: COUNT + 5)  # transformers would hide some of it
    check_contract(ours)


def config_of(path: Any, count: int = COUNT, **train: Any) -> RunConfig:
    settings = TrainConfig(**{"precision": "fp32", "weight_dtype": "fp32", **train})
    adapter = AdapterConfig(method="prefix", num_virtual_tokens=count)
    return RunConfig(model=ModelConfig(path=str(path), max_seq_len=64), adapter=adapter, train=settings)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_exactly_the_prefix_is_trained_and_saved(directories, family):
    model = build_configured_model(config_of(directories(family)))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert [name.rpartition(".")[2] for name in trained] == [PREFIX] * 2
    assert all(name.startswith(("lm.model.layers.", "lm.transformer.h.")) for name in trained)
    assert model.saved_tensors().keys() == {name.removeprefix("lm.") for name in trained}
    heads = {"llama": 2, "gpt2": 4}[family]
    assert model.component_parameters()["adapter"] == model.num_trained_parameters() == 2 * COUNT * 2 * heads * 8
    assert [group["weight_decay"] for group in build_optimizer(model, OptimConfig(weight_decay=0.5)).param_groups] == [0.0]
    assert model.position_limit == (128 - COUNT if family == "gpt2" else 0)
    with torch.device("meta"):
        outline = build_configured_model(config_of(directories(family)))
    assert {n: p.shape for n, p in outline.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert outline.flops_per_token(9) == model.flops_per_token(9)


def test_a_prefix_beside_a_16_bit_base_has_32_bits(directories):
    model = build_configured_model(config_of(directories("gemma3_text"), precision="bf16", weight_dtype="bf16"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(tokens(), tokens().roll(-1, 1), 24.0).backward()
    assert all(prefix.grad.dtype == torch.float32 and prefix.grad.any() for prefix in model.prefixes())


def test_the_seed_draws_the_beginning(directories):
    first, again, other = (prompt_embeddings(build_configured_model(config_of(directories("llama"), seed=seed))) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("family, count, message", [
    ("falcon_h1", 5, "adapter.method=prefix does not work with models of type falcon_h1: its blocks are more than plain attention"),
    ("bloom", 5, "models of type bloom: its blocks are more than plain attention; use lora"),
    ("gptj", 5, "models of type gptj: its blocks are more than plain attention; use lora"),
    ("gpt2", 128, "adapter.num_virtual_tokens is 128, but the learned positions of this gpt2 model end at 128"),
    ("gemma2", 64, "adapter.num_virtual_tokens is 64, the sliding window of this gemma2 model 64; lower it"),
])  # fmt: skip
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_cannot_have_a_prefix_is_said_in_one_line(directories, family, count, message, device):
    with torch.device(device), pytest.raises(ConfigError, match=message) as caught:
        build_configured_model(config_of(directories(family), count))
    assert "\n" not in str(caught.value)
