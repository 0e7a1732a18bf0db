"""Several texts at once: each as if it were alone. Stop strings, presets and penalties."""

from dataclasses import replace

import pytest
import torch

from lowmem.config.schema import LorptConfig, ModelConfig
from lowmem.data.tokenizers import ByteTokenizer
from lowmem.generation import generate, generate_batch, position_window
from lowmem.generation.sampling import PRESETS, SamplingOptions, penalize_counts, row_seed, sample_token
from lowmem.generation.settings import DEFAULTS, Settings
from lowmem.generation.texts import StopFilter
from lowmem.models.registry import build_model
from lowmem.system.errors import ConfigError
from tests.reference.markdown import table

I3 = {"name": "i3", "attention_rank": 4, "num_heads": 1, "lorpt": LorptConfig(rank=4)}
PROMPTS = ["a", "hello there", "", "xyz", "hello there, and more words"]
STOPS = list("0123456789ABCDEFGHIJ")
GREEDY = SamplingOptions(temperature=0, seed=0)


def tiny_model(**changes):
    config = ModelConfig(**{"dim": 32, "num_layers": 2, "num_heads": 2, **changes})
    model = build_model(config, vocab_size=257, max_seq_len=16, seed=0).eval()
    with torch.no_grad():  # ten times the logits, so that texts differ and rounding decides nothing
        weight = next(parameter for parameter in [*model.head.parameters(), model.embedding.weight] if parameter.shape[0] == 257)
        weight.mul_(30)
    return model


@pytest.mark.parametrize("changes", [{}, {"positions": "alibi"}, {"positions": "learned"}, {"attention_rank": 4}, I3])
@pytest.mark.parametrize(
    "options",
    [GREEDY, SamplingOptions(temperature=1.0, seed=5, repetition_penalty=1.2, frequency_penalty=0.2)],
    ids=["greedy", "drawn"],
)
def test_a_text_of_a_batch_is_the_one_written_alone(changes, options):
    model, finished = tiny_model(**changes), []
    results = generate_batch(
        model, ByteTokenizer(), PROMPTS, options, 18, batch_size=3, stop=STOPS, on_result=lambda index, result: finished.append(index)
    )
    assert sorted(finished) == [0, 1, 2, 3, 4]
    assert len({len(result.token_ids) for result in results}) > 1  # so that texts leave and join in the middle
    assert len({tuple(result.token_ids) for result in results}) == 5
    for index, (prompt, result) in enumerate(zip(PROMPTS, results, strict=True)):
        alone = generate(model, ByteTokenizer(), prompt, replace(options, seed=row_seed(options.seed, index)), 18, stop=STOPS)
        assert (result.token_ids, result.text, result.stop_reason) == (alone.token_ids, alone.text, alone.stop_reason)
        assert (result.seed, result.window_slides, result.prompt_tokens) == (alone.seed, alone.window_slides, max(1, len(prompt)))


@pytest.mark.parametrize(
    "changes", [{}, {"positions": "alibi"}, {"positions": "learned"}, {"attention_rank": 4}, {"tie_embeddings": True}, I3]
)
def test_real_models_write_the_same_with_and_without_a_cache_past_the_training_length(changes):
    model = tiny_model(**changes)
    window = position_window(model)
    assert window == (16 if changes.get("positions") == "learned" or "name" in changes else None)
    result = generate(model, ByteTokenizer(), "hello", GREEDY, 24)
    view, expected = list(b"hello"), []
    with torch.no_grad():
        while len(expected) < len(result.token_ids):
            if window and len(view) > window:
                view = view[-window // 2 :]
            expected.append(int(model(torch.tensor([view]))[0, -1].argmax()))
            view.append(expected[-1])
    assert result.token_ids == expected
    assert len(result.token_ids) == 24
    assert (result.window_slides > 0) is (window is not None)


def test_the_same_prompt_twice_gives_two_texts_when_drawn_and_one_when_not():
    model = tiny_model()
    drawn = generate_batch(model, ByteTokenizer(), ["a", "a"], SamplingOptions(temperature=1.5, seed=1), 12)
    assert drawn[0].token_ids != drawn[1].token_ids
    greedy = generate_batch(model, ByteTokenizer(), ["a", "a"], GREEDY, 12)
    assert greedy[0].token_ids == greedy[1].token_ids


def test_misuse_of_a_batch():
    model = tiny_model()
    assert generate_batch(model, ByteTokenizer(), [], GREEDY, 3) == []
    with pytest.raises(ConfigError, match="batch_size is 0; allowed: 1 or more"):
        generate_batch(model, ByteTokenizer(), ["a"], GREEDY, 3, batch_size=0)
    with pytest.raises(ConfigError, match="on_text with 2 prompts"):
        generate_batch(model, ByteTokenizer(), ["a", "b"], GREEDY, 3, on_text=print)


def first_stop(text, stops):
    """By trying every end of the text in turn: the text before the stop string that ends first, of several the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


@pytest.mark.parametrize("stops", [["END"], ["aab"], ["ab", "aab"], ["abc", "b"], ["aa", "a"], ["ba", "abab"], ["zz"], []])
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_stop_strings_are_found_across_pieces_and_never_shown(stops, size):
    for text in ("aaab END aab", "abababEN END", "xxENxENDx", "zababz", "aaaa", "EN"):
        stop_filter, shown = StopFilter(stops), []
        for start in range(0, len(text), size):
            shown.append(stop_filter.push(text[start : start + size]))
        shown.append(stop_filter.finish())
        assert "".join(shown) == first_stop(text, stops)
        assert (stop_filter.found is not None) is any(stop in text for stop in stops)


def test_only_a_possible_beginning_is_held_back():
    stop_filter = StopFilter(["END", "\n\n"])
    assert [stop_filter.push(piece) for piece in ("ab", "c\n", "E", "N", "e", "E")] == ["ab", "c", "\n", "", "ENe", ""]
    assert stop_filter.finish() == "E"


def test_a_stop_string_ends_the_text_and_the_figures_say_so():
    model = tiny_model()
    whole = generate(model, ByteTokenizer(), "a", GREEDY, 18)
    ascii_pairs = [whole.text[i : i + 2] for i in range(4, len(whole.text) - 1)]
    stop = next(pair for pair in ascii_pairs if pair.isascii())
    pieces = []
    cut = generate(model, ByteTokenizer(), "a", GREEDY, 18, stop=[stop], on_text=pieces.append)
    assert cut.stop_reason == "stop"
    assert cut.text == "".join(pieces) == whole.text[: whole.text.index(stop)]
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]


def test_penalties_are_openais():
    logits = torch.tensor([1.0, 1.0, 1.0, -1.0])
    # mu - count * frequency - (count > 0) * presence
    assert penalize_counts(logits, {1: 1, 3: 3, 2: 0}, 0.5, 0.25).tolist() == [1.0, 0.25, 1.0, -2.25]
    assert penalize_counts(logits, {1: 2}, -1.0, 0.0).tolist() == [1.0, 2.0, 1.0, -1.0]
    assert penalize_counts(logits, {}, 1.0, 1.0).tolist() == logits.tolist() == [1.0, 1.0, 1.0, -1.0]
    options = SamplingOptions(temperature=0, presence_penalty=0.5)
    assert sample_token(torch.tensor([1.0, 1.4]), options, (), torch.Generator(), {1: 1}) == 0
    assert sample_token(torch.tensor([1.0, 1.6]), options, (), torch.Generator(), {1: 5}) == 1


def test_penalties_count_what_was_written_and_not_the_prompt():
    model = tiny_model()
    plain = generate(model, ByteTokenizer(), "aaaa", GREEDY, 1).token_ids
    text = chr(plain[0]) if plain[0] < 128 else "a"
    penalized = SamplingOptions(temperature=0, presence_penalty=2.0, frequency_penalty=2.0)
    assert (
        generate(model, ByteTokenizer(), text * 3, penalized, 1).token_ids
        == generate(model, ByteTokenizer(), text * 3, GREEDY, 1).token_ids
    )
    with torch.no_grad():
        model.head.weight.mul_(0.001)  # logits so near each other that a token is never written twice
    assert len(set(generate(model, ByteTokenizer(), "a", penalized, 40).token_ids)) == 40


@pytest.mark.parametrize("preset", PRESETS)
def test_explicit_settings_win_over_a_preset_and_a_preset_over_the_defaults(preset):
    settings = Settings(preset, {"temperature": None, "top_k": 3, "max_new_tokens": 7})
    expected = {**DEFAULTS, **PRESETS[preset], "top_k": 3}
    assert settings.options == SamplingOptions(**{name: value for name, value in expected.items() if name != "max_new_tokens"})
    assert settings.max_new_tokens == 7
    assert Settings(preset, {"temperature": 0.3}).options.temperature == 0.3
    assert Settings().options == SamplingOptions()


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
@pytest.mark.parametrize("value", [-2.1, 2.1, float("nan")])
def test_impossible_penalties_are_refused(name, value):
    with pytest.raises(ConfigError, match=rf"^{name} is {value}; allowed: -2 to 2"):
        SamplingOptions(**{name: value})


def test_the_page_has_the_presets_as_they_are():
    (_, _, *names), *rows = table("generation.md", "setting")
    assert names == list(PRESETS)
    for name, default, *values in [[cell.strip("`-") for cell in row] for row in rows]:
        assert float(default.split()[0]) == DEFAULTS[name]
        assert [float(value) for value in values] == [preset.get(name, DEFAULTS[name]) for preset in PRESETS.values()]
    assert {name for preset in PRESETS.values() for name in preset} <= {row[0].strip("`-") for row in rows}
