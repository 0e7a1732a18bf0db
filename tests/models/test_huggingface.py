"""Models of transformers under lowmem's contract compute what they compute by themselves: logits, loss, every gradient, segments, decoding.

Tolerances: both sides add the same numbers in another order, some hundred roundings of 2**-24 of the largest value.
"""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lowmem.config.schema import OptimConfig, TrainConfig
from lowmem.data.batch import IGNORE_INDEX, Batch
from lowmem.engine.layerwise import LayerwiseEngine
from lowmem.engine.local import LocalEngine
from lowmem.models.base import LossOptions
from lowmem.models.huggingface import HuggingFaceModel, check_contract
from lowmem.nn.loss import SoftTargets
from lowmem.system.errors import CheckpointError, ConfigError
from tests.reference.tiny_families import SHAPES

ROUNDINGS = 300 * 2**-24
WINDOW = {"sliding_window": 5}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}  # fmt: skip
CHUNKED = {"layer_types": ["sliding_attention", "full_attention"], **WINDOW}
LATENT = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8,
    "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip
SHAPES = SHAPES | {
    "deepseek_v3": {key: value for key, value in SHAPES["llama"].items() if key != "head_dim"} | LATENT,
    "falcon": {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "qwen2_moe": SHAPES["qwen3_moe"],
    "llama4_text": SHAPES["llama"] | {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 48},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {family: (family, {}) for family in SHAPES} | {
    "llama4_text, short chunks": ("llama4_text", {"attention_chunk_size": 5}),
    "llama, rope llama3, tied": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama, no groups, bias": ("llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "mistral, short window": ("mistral", WINDOW),
    "qwen3, short window": ("qwen3", {"use_sliding_window": True, "max_window_layers": 1, **WINDOW}),
    "gemma2, all caps and window": ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, **CHUNKED}),
    "gemma3_text, short window": ("gemma3_text", CHUNKED),
    "gpt_oss, short window": ("gpt_oss", CHUNKED),
    "smollm3, a layer without positions": ("smollm3", {"no_rope_layers": [1, 0]}),
    "phi3, half of it rotates": ("phi3", {"partial_rotary_factor": 0.5}),
    "cohere, steep logits": ("cohere", {"logit_scale": 0.25}),
    "gpt2, untied": ("gpt2", {"tie_word_embeddings": False}),
}
RECURRENT = ("falcon_h1", "lfm2", "mamba", "qwen3_5_text", "qwen3_next", "recurrent_gemma")
EAGER = ("bloom", "codegen", "falcon", "gpt_neo", "gpt_oss", "gpt_oss, short window", "gptj", "mamba", "xglm")
WHOLE_ROWS = (*RECURRENT, "bloom")
ENGINES = ("llama, rope llama3, tied", "gemma2, all caps and window", "gpt2", "gptj", "phi3", "falcon_h1")


def original(name: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    family, choices = VARIANTS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SHAPES[family] | choices)), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
        model.get_input_embeddings().weight[7] *= 10  # one token is louder than all others
    return model.eval()


def pair(name: str) -> tuple[Any, HuggingFaceModel]:
    """The model as it is, and lowmem's of a copy."""
    model = original(name)
    ours = HuggingFaceModel(copy.deepcopy(model))
    ours.loss_options = LossOptions(chunk_tokens=5)
    return model, ours


def tokens(rows: int = 2, time: int = 12, seed: int = 0) -> torch.Tensor:
    """Some tokens are frequent, as in text."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randint(3, 10, (rows, time), generator=generator)
    rare = torch.randint(3, 300, (rows, time), generator=generator)
    return torch.where(torch.rand(rows, time, generator=generator) < 0.5, common, rare)


def targets_of(inputs: torch.Tensor) -> torch.Tensor:
    targets = inputs.roll(-1, 1)
    targets[:, -1] = IGNORE_INDEX
    return targets


def close(found: torch.Tensor, expected: torch.Tensor, roundings: float = ROUNDINGS) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=roundings * expected.abs().max().item())


def all_gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_loss_and_gradients_are_the_models_own(name):
    theirs, ours = pair(name)
    inputs = tokens()
    logits = theirs(input_ids=inputs, use_cache=False).logits
    with torch.no_grad():
        close(ours.eval()(inputs), logits)
        close(ours(inputs[:1]), logits[:1])
    targets = targets_of(inputs)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / 7
    ours.train()
    found = ours(inputs, targets, 7.0)
    assert found.item() == pytest.approx(loss.item(), rel=ROUNDINGS)
    expected, gradients = all_gradients(theirs, loss), all_gradients(ours.lm, found)
    assert expected.keys() == gradients.keys()
    # a gradient passes every layer twice; one near zero beside the others is the rest of large terms that cancel
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for key, gradient in expected.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=0, atol=ROUNDINGS * (20 * gradient.abs().max().item() + largest), msg=key)


@pytest.mark.parametrize("name", VARIANTS)
def test_attention_and_segments_are_as_expected(name):
    ours = HuggingFaceModel(original(name))
    assert ours.keeps_segments_apart == (name not in WHOLE_ROWS)
    assert ours._body.attention == ("eager" if name in EAGER else "lowmem")
    check_contract(ours)
    assert sum(ours.component_parameters().values()) == ours.num_parameters() == sum(p.numel() for p in ours.lm.parameters())
    assert ours.flops_per_token(16) > 0


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in WHOLE_ROWS])
def test_packed_segments_are_the_texts_alone(name):
    theirs, ours = pair(name)
    lengths = (7, 4, 6, 9)
    texts = [tokens(1, length, seed) for seed, length in enumerate(lengths)]
    rows = torch.cat([torch.cat(texts[:2], 1).new_zeros(1, 15), torch.zeros(1, 15, dtype=torch.int64)])
    segments = torch.ones(2, 15, dtype=torch.int32) * 3
    rows[0, :11], rows[1] = torch.cat(texts[:2], 1), torch.cat(texts[2:], 1)
    segments[0, :7], segments[0, 7:11], segments[1, :6] = 1, 2, 1
    with torch.no_grad():
        alone = [theirs(input_ids=text, use_cache=False).logits for text in texts]
        found = ours.eval()(rows, segments_BT=segments)
    for row, place, expected in zip((0, 0, 1, 1), (slice(0, 7), slice(7, 11), slice(0, 6), slice(6, 15)), alone, strict=True):
        close(found[row : row + 1, place], expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_recomputed_blocks_have_the_same_gradients_to_the_bit(name):
    _, ours = pair(name)
    inputs, segments = tokens(), None if name in WHOLE_ROWS else torch.tensor([[1] * 5 + [2] * 7, [1] * 12], dtype=torch.int32)
    ours.train()
    kept = all_gradients(ours.lm, ours(inputs, targets_of(inputs), segments_BT=segments))
    ours.activation_checkpointing = "block"
    again = all_gradients(ours.lm, ours(inputs, targets_of(inputs), segments_BT=segments))
    assert kept.keys() == again.keys()
    for key, gradient in kept.items():
        assert torch.equal(again[key], gradient), key


@pytest.mark.parametrize("name", VARIANTS)
def test_decoding_in_a_batch_of_unequal_texts_is_the_model_on_whole_texts(name):
    theirs, ours = pair(name)
    ours.eval()
    texts = [tokens(1, length, seed) for seed, length in enumerate((9, 8, 11))]
    with torch.inference_mode():
        cache = ours.new_cache(3, 14)
        for row, text in enumerate(texts):
            part = cache.rows(row, row + 1)
            ours(text[:, :4], cache=part)
            close(ours(text[:, 4:-2], cache=part)[:, -1], theirs(input_ids=text[:, :-2], use_cache=False).logits[:, -1])
        for place in (-2, -1):
            found = ours(torch.cat([text[:, place] for text in texts]).unsqueeze(1), cache=cache)
            for row, text in enumerate(texts):
                seen = text[:, : text.shape[1] + place + 1]
                close(found[row : row + 1, 0], theirs(input_ids=seen, use_cache=False).logits[:, -1])
        cache.keep([0, 2])
        assert cache.rows(0, 2).lengths.tolist() == [9, 11]
        following = ours(torch.tensor([[5], [6]]), cache=cache.rows(0, 2))
        for row, (text, token) in enumerate(((texts[0], 5), (texts[2], 6))):
            whole = torch.cat([text, torch.tensor([[token]])], 1)
            close(following[row : row + 1, 0], theirs(input_ids=whole, use_cache=False).logits[:, -1])
        assert len(cache.layers) == (1 if name in EAGER or name in RECURRENT else len(ours.blocks))


def batch(apart: bool, rows: int = 6) -> Batch:
    inputs = tokens(rows)
    segments = torch.ones(rows, 12, dtype=torch.int32)
    segments[:, 5:] = 2
    segments[2] = 1
    return Batch(inputs.numpy(), targets_of(inputs).numpy(), segments.numpy() if apart else None)


@pytest.mark.parametrize("name", ENGINES)
def test_a_layerwise_step_is_an_accumulated_one(name):
    optim = OptimConfig(lr=1e-2, clip=0.0, state_bits=32, eps=10.0)  # so large that the step is nearly proportional to the gradient
    cpu, states, losses = torch.device("cpu"), [], []
    for layerwise in (False, True):
        _, ours = pair(name)
        before = {key: tensor.clone() for key, tensor in ours.state_dict().items()}
        ours.activation_checkpointing = "block"
        common: dict[str, Any] = {"device": cpu, "precision": "fp32", "micro_batch_size": 2}
        engine = (
            LayerwiseEngine(ours, optim, TrainConfig(update="layerwise"), **common) if layerwise else LocalEngine(ours, optim, **common)
        )
        losses.append([engine.step(batch(ours.keeps_segments_apart), 1e-3).loss for _ in range(2)])
        states.append(ours.state_dict())
    # the loss is a sum over tokens in chunks of one global batch or of three micro-batches
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for key, tensor in states[0].items():
        # two steps of 1e-3 * gradient / 10; the gradients differ by roundings, the weights by two of their own
        assert (states[1][key] - tensor).abs().max() < 2e-4 * 20 * ROUNDINGS + 2**-23 * tensor.abs().max(), key
    assert sum(not torch.equal(tensor, before[key]) for key, tensor in states[0].items()) > 0.9 * len(before)


def test_a_model_on_the_meta_device_takes_the_same_paths():
    for name in VARIANTS:
        with torch.device("meta"):
            outline = HuggingFaceModel(original_outline(name))
        real = HuggingFaceModel(original(name))
        assert (outline._body.attention, outline.keeps_segments_apart, outline._body.by_row) == (
            real._body.attention, real.keeps_segments_apart, real._body.by_row,
        ), name  # fmt: skip
        inputs = torch.zeros(2, 12, dtype=torch.int64, device="meta")
        segments = torch.zeros(2, 12, dtype=torch.int32, device="meta") if outline.keeps_segments_apart else None
        outline.activation_checkpointing = "block"
        outline.train()(inputs, inputs, segments_BT=segments).backward()
        assert outline.component_parameters() == real.component_parameters()


def original_outline(name: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    family, choices = VARIANTS[name]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SHAPES[family] | choices)), attn_implementation="eager")


def test_masks_are_recorded_once_for_all_micro_batches_and_dropped_with_their_batch():
    _, ours = pair("mistral, short window")
    segments = torch.randint(1, 3, (6, 12), dtype=torch.int32).sort(1).values
    passes = 0
    record = ours._body.arguments

    def counted(*args, **kwargs):
        nonlocal passes
        passes += 1
        return record(*args, **kwargs)

    ours._body.arguments = counted
    hidden = ours.embed(tokens(6), segments_BT=segments).detach()
    for index in range(2):
        for start in (0, 2, 4):
            ours.block(index, segments[start : start + 2])(hidden[start : start + 2])
    assert passes == 3
    other = segments.clone()
    ours.block(0, other[:2])(hidden[:2])
    assert passes == 4
    assert len(ours._arguments) == 1
    for arguments in next(iter(ours._arguments.values())):
        assert not any(tensor.shape[-2:] == (12, 12) for tensor in arguments.tensors())


def test_backward_uses_the_arguments_of_its_own_forward_whatever_came_between():
    _, ours = pair("mistral, short window")
    ours.train().activation_checkpointing = "block"
    inputs, segments = tokens(), torch.ones(2, 12, dtype=torch.int32)
    loss = ours(inputs, targets_of(inputs), segments_BT=segments)
    with torch.no_grad():
        ours(inputs, segments_BT=segments * 2)

    def never(*_):
        raise AssertionError("recorded again")

    ours._body.arguments = never
    loss.backward()


def test_segments_changed_in_place_are_seen():
    _, ours = pair("llama")
    inputs, segments = tokens(), torch.ones(2, 12, dtype=torch.int32)
    with torch.no_grad():
        ours(inputs, segments_BT=segments)
        segments[:, 6:] = 2
        close(ours(inputs, segments_BT=segments), ours(inputs, segments_BT=segments.clone()), 0)


@pytest.mark.parametrize("name", ["cohere, steep logits", "granite", "qwen2"])
def test_a_teachers_product_has_its_logits(name):
    theirs, ours = pair(name)
    with torch.no_grad():
        hidden = ours.embed(tokens())
        for index in range(len(ours.blocks)):
            hidden = ours.block(index)(hidden)
        x, weight, bias = ours.head_product(hidden)
        close(F.linear(x, weight, bias), theirs(input_ids=tokens(), use_cache=False).logits)


def test_what_is_no_product_neither_teaches_nor_learns():
    _, ours = pair("gemma2, all caps and window")
    with pytest.raises(ConfigError, match="logits of this gemma2 model are no product of one matrix"):
        ours.head_product(ours.embed(tokens()))
    taught = SoftTargets(torch.zeros(1), torch.zeros(1), None, 0.5, 1.0)
    with pytest.raises(ConfigError, match="gemma2 scale or cap their logits and cannot learn from a teacher"):
        ours.train().head_loss(ours.embed(tokens()), tokens(), soft_targets=taught)


def test_learned_positions_end_where_they_end():
    _, ours = pair("gpt2")
    assert ours.position_limit == ours.max_seq_len == 128
    with pytest.raises(ConfigError, match="a sequence of 129 tokens, but the learned positions of this gpt2 model end at 128"):
        ours.embed(torch.zeros(1, 129, dtype=torch.int64))


class AddedHead(torch.nn.Module):
    """A head with an adapter on it, as PEFT would put there."""

    def __init__(self, base):
        super().__init__()
        self.base, self.extra = base, torch.nn.Linear(base.in_features, base.out_features)

    def forward(self, hidden):
        return self.base(hidden) + self.extra(hidden)


def test_a_head_of_any_kind_has_the_loss_of_its_whole_logits():
    _, ours = pair("gemma2, all caps and window")
    ours.lm.set_output_embeddings(AddedHead(ours.head))
    assert ours.dense_head() is None
    ours.train().loss_options = LossOptions(chunk_tokens=5, label_smoothing=0.1, z_loss=1e-3)
    inputs, targets = tokens(), targets_of(tokens())
    loss = ours(inputs, targets, 7.0)
    logits = ours(inputs)
    live = targets != IGNORE_INDEX
    expected = F.cross_entropy(logits[live], targets[live], reduction="sum", label_smoothing=0.1)
    expected = (expected + 1e-3 * logits[live].logsumexp(-1).square().sum()) / 7
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found, wanted = all_gradients(ours.lm, loss), all_gradients(ours.lm, expected)
    for key, gradient in wanted.items():
        close(found[key], gradient, 1e-4)


def test_dropout_is_off_and_named():
    _, ours = pair("gpt2")
    assert ours.silenced == ["dropout"]
    assert torch.equal(ours.train()(tokens()), ours.eval()(tokens()))


def test_weights_go_through_a_state_dict_by_their_own_names():
    theirs, ours = pair("llama, rope llama3, tied")
    state = ours.state_dict()
    assert set(state) == set(theirs.state_dict()) - {"lm_head.weight"}
    with torch.no_grad():
        for tensor in state.values():
            tensor.mul_(2)
    assert torch.equal(ours.head.weight, 2 * theirs.lm_head.weight)


def test_a_model_that_computes_something_else_is_refused():
    _, ours = pair("granite")
    ours.logit_scale = 1.0
    with pytest.raises(CheckpointError, match="models of type granite cannot be trained here: lowmem's logits differ"):
        check_contract(ours)
    _, ours = pair("llama")
    with torch.no_grad():
        ours.head.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="computes logits of nan: its weights are not finite"):
        check_contract(ours)


def test_blocks_that_do_more_than_pass_hidden_states_on_are_refused():
    model = original("llama")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(CheckpointError, match="models of type llama cannot be trained here: its blocks share weights"):
        HuggingFaceModel(model)
    model = original("llama")
    model.model.layers = torch.nn.ModuleList([model.model.layers[0]])
    with pytest.raises(CheckpointError, match="it has no list of num_hidden_layers = 2 blocks"):
        HuggingFaceModel(model)
