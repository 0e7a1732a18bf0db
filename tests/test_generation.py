"""The decoding loop with a model simple enough to be evaluated by hand: logits are a sum over the tokens in view."""

import itertools

import pytest
import torch
from torch import nn

from lowmem.data.tokenizers import ByteTokenizer
from lowmem.generation import PREFILL_TOKENS, generate
from lowmem.generation.sampling import SamplingOptions
from lowmem.models.base import LanguageModel
from lowmem.nn.attention import LayerCache, ModelCache
from lowmem.system.errors import CheckpointError, ConfigError

GREEDY = SamplingOptions(temperature=0)
VOCAB = 300  # more rows than the 257 tokens of the tokenizer


class SumModel(LanguageModel):
    """Logits after position i: the sum over j <= i of table[token_j] * (1 + j), so that order and positions matter."""

    def __init__(self, favourite: int | None = None):
        super().__init__()
        self.blocks, self.vocab_size, self.max_seq_len = nn.ModuleList(), VOCAB, 8
        self.table = nn.Parameter(torch.randint(-50, 50, (VOCAB, VOCAB), generator=torch.Generator().manual_seed(0)).float())
        self.table.data[:, 256:] = -1000.0  # neither eos nor a row without token, unless told so
        if favourite is not None:
            self.table.data[:, favourite] = 1000.0
        self.caches: list[ModelCache] = []

    def forward(self, tokens_BT, targets_BT=None, denominator=1.0, cache=None):
        starts, held = [0] * len(tokens_BT), tokens_BT
        if cache is not None:
            starts = cache.lengths.tolist()
            held = cache.layers[0].append(tokens_BT.unsqueeze(-1))[0][..., 0]
        rows = []
        for start, row in zip(starts, held, strict=True):
            tokens = row[: start + tokens_BT.shape[1]]
            rows.append((self.table[tokens] * torch.arange(1.0, len(tokens) + 1)[:, None]).cumsum(0)[start:])
        return torch.stack(rows)

    def embed(self, tokens_BT, start=0):
        raise AssertionError("generation calls forward")

    def head_loss(self, hidden_BTC, targets_BT, denominator=1.0):
        raise AssertionError("generation calls forward")

    def new_cache(self, batch_size, max_len):
        self.caches.append(ModelCache([LayerCache(batch_size, max_len, (1,), torch.int64, torch.device("cpu"))]))
        return self.caches[-1]

    def flops_per_token(self, seq_len):
        return 0

    def component_parameters(self):
        return {"table": self.table.numel()}


def write_without_cache(model: SumModel, ids: list[int], count: int, window: int | None) -> list[int]:
    """Greedy text by recomputing everything for every token; the window rule in its plainest form."""
    view, new = list(ids), []
    with torch.no_grad():
        for _ in range(count):
            if window and len(view) > window:
                view = view[-max(1, window // 2) :]
            token = int(model(torch.tensor([view]))[0, -1, :257].argmax())
            view.append(token)
            new.append(token)
    return new


@pytest.mark.parametrize("window", [None, 1, 2, 8, 30, 61])
@pytest.mark.parametrize("prompt", ["a", "hello", "x" * 31])
def test_cached_text_equals_text_recomputed_for_every_token(prompt, window):
    model = SumModel()
    result = generate(model, ByteTokenizer(), prompt, GREEDY, 30, window=window)
    assert result.token_ids == write_without_cache(model, list(prompt.encode()), 30, window)
    assert (result.prompt_tokens, result.stop_reason) == (len(prompt), "length")
    assert result.text == bytes(result.token_ids).decode(errors="replace") or "\ufffd" in result.text
    assert (result.window_slides > 0) is (window is not None and len(prompt) + 30 - 1 > window)
    assert all(cache.layers[0].buffers[0].shape[1] == min(len(prompt) + 30, window or 1000) for cache in model.caches)


def test_a_long_prompt_is_computed_in_pieces():
    model, prompt, longest = SumModel(), "ab" * PREFILL_TOKENS, []
    original = model.forward
    model.forward = lambda tokens, **named: longest.append(tokens.shape[1]) or original(tokens, **named)
    result = generate(model, ByteTokenizer(), prompt + "c", GREEDY, 3)
    assert longest == [PREFILL_TOKENS, PREFILL_TOKENS, 1, 1, 1]
    model.forward = original
    assert result.token_ids == write_without_cache(model, list((prompt + "c").encode()), 3, None)


def test_it_stops_where_the_document_ends_and_does_not_write_that():
    result = generate(SumModel(favourite=256), ByteTokenizer(), "a", GREEDY, 10)
    assert (result.text, result.token_ids, result.stop_reason) == ("", [], "eos")


def test_rows_without_a_token_are_never_chosen():
    assert 290 not in generate(SumModel(favourite=290), ByteTokenizer(), "a", GREEDY, 5).token_ids


def test_an_empty_prompt_starts_a_document():
    model = SumModel()
    result = generate(model, ByteTokenizer(), "", GREEDY, 4)
    assert result.prompt_tokens == 1
    assert result.token_ids == write_without_cache(model, [256], 4, None)


def test_text_arrives_in_pieces_of_whole_characters():
    model, pieces = SumModel(), []
    # A chain of bytes: each one's favourite successor is the next, whatever came before (its weight beats the sum of the rest).
    text = "é€𝄞!"
    model.table.data.zero_()
    chain = b"a" + text.encode()
    for position, (byte, following) in enumerate(itertools.pairwise(chain)):
        model.table.data[byte, following] += 10.0 ** (position + 1)
    result = generate(model, ByteTokenizer(), "a", GREEDY, len(chain) - 1, on_text=pieces.append)
    assert result.text == "".join(pieces) == text
    assert pieces == list(text)


def test_a_seed_repeats_a_text_and_a_missing_one_is_reported():
    model, options = SumModel(), SamplingOptions(temperature=300.0)
    first = generate(model, ByteTokenizer(), "a", options, 20)
    again = generate(model, ByteTokenizer(), "a", SamplingOptions(temperature=300.0, seed=first.seed), 20)
    other = generate(model, ByteTokenizer(), "a", SamplingOptions(temperature=300.0, seed=first.seed + 1), 20)
    assert first.token_ids == again.token_ids != other.token_ids


def test_global_randomness_and_training_mode_are_left_alone():
    model = SumModel()
    model.train()
    before = torch.get_rng_state()
    generate(model, ByteTokenizer(), "a", SamplingOptions(seed=3), 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_repetition_penalty_sees_prompt_and_text():
    model = SumModel()
    model.table.data.zero_()
    model.table.data[:, 97:100] = torch.tensor([3.0, 2.0, 1.0])
    options = SamplingOptions(temperature=0, repetition_penalty=1e6)
    assert generate(model, ByteTokenizer(), "a", options, 2).text == "bc"


def test_a_diverged_model_is_reported():
    model = SumModel()
    model.table.data.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="not finite after 0 new tokens"):
        generate(model, ByteTokenizer(), "a", GREEDY, 3)


def test_no_tokens_are_refused():
    with pytest.raises(ConfigError, match="max_new_tokens is 0; allowed: 1 or more"):
        generate(SumModel(), ByteTokenizer(), "a", GREEDY, 0)
