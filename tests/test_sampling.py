import math

import pytest
import torch

from lowmem.generation.sampling import SamplingOptions, penalize_repetition, sample_token, token_probabilities
from lowmem.system.errors import ConfigError


def brute_force(logits: list[float], options: SamplingOptions) -> list[float]:
    """The definition of the filters, one token at a time, in Python floats."""
    scaled = [value / options.temperature for value in logits]
    order = sorted(range(len(scaled)), key=lambda token: (-scaled[token], token))
    if options.top_k:
        order = order[: options.top_k]
    weight = {token: math.exp(scaled[token] - scaled[order[0]]) for token in order}
    total = sum(weight.values())
    kept, reached = [], 0.0
    for token in order:
        if options.top_p == 1 or reached < options.top_p:
            kept.append(token)
        reached += weight[token] / total
    kept = [token for token in kept if weight[token] >= options.min_p * weight[order[0]]]
    total = sum(weight[token] for token in kept)
    return [weight[token] / total if token in kept else 0.0 for token in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 1}, {"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.8, "min_p": 0.05}, {"top_k": 500}]
)
def test_probabilities_are_those_of_the_definition(temperature, filters):
    generator = torch.Generator().manual_seed(1)
    options = SamplingOptions(temperature=temperature, **filters)
    for _ in range(20):
        logits = 3 * torch.randn(40, generator=generator)
        expected = torch.tensor(brute_force(logits.tolist(), options), dtype=torch.float64)
        found = token_probabilities(logits, options).double()
        assert torch.equal(found > 0, expected > 0)
        # fp32: the exponent, up to 2 * 3 * 4 / 0.3 = 80 in size, is off by 80 eps, which exp turns into a relative error of as
        # much; each of two normalisations adds 40 terms. Together 80 + 2 * 40 eps.
        assert torch.allclose(found, expected, rtol=160 * 2**-23, atol=0)


def test_equal_logits_keep_the_lower_ids():
    assert token_probabilities(torch.zeros(6), SamplingOptions(temperature=1, top_k=2)).nonzero().flatten().tolist() == [0, 1]
    assert token_probabilities(torch.zeros(4), SamplingOptions(temperature=1, top_p=0.5)).nonzero().flatten().tolist() == [0, 1]


def test_sampled_frequencies():
    options = SamplingOptions(temperature=1.0, top_k=3)
    logits = torch.tensor([0.5, 1.0, -2.0, 2.0, 0.0])
    expected = token_probabilities(logits, options)
    generator = torch.Generator().manual_seed(0)
    draws = 20_000
    counts = torch.bincount(torch.tensor([sample_token(logits, options, (), generator) for _ in range(draws)]), minlength=5)
    assert counts[2] == counts[4] == 0
    # five standard deviations of a binomial count: a wrong generator fails, a right one does 1 time in 10**6
    assert torch.all((counts - draws * expected).abs() <= 5 * (draws * expected * (1 - expected)).sqrt())


def test_temperature_zero_is_greedy_and_leaves_the_generator_alone():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert sample_token(torch.tensor([1.0, 3.0, 2.0]), SamplingOptions(temperature=0), (), generator) == 1
    assert torch.equal(generator.get_state(), before)


def test_tiny_temperatures_do_not_overflow():
    found = token_probabilities(torch.tensor([1e4, 1e4 - 1, -1e4]), SamplingOptions(temperature=1e-38))
    assert found.tolist() == [1.0, 0.0, 0.0]


def test_repetition_penalty_moves_both_signs_down():
    logits = torch.tensor([2.0, -2.0, 0.0, 1.0])
    assert penalize_repetition(logits, [0, 1, 1, 2], 2.0).tolist() == [1.0, -4.0, 0.0, 1.0]
    assert penalize_repetition(logits, [], 2.0).tolist() == logits.tolist()
    assert logits.tolist() == [2.0, -2.0, 0.0, 1.0]
    generator = torch.Generator()
    assert sample_token(logits, SamplingOptions(temperature=0, repetition_penalty=3.0), {0}, generator) == 3


def test_the_same_seed_gives_the_same_tokens_in_any_dtype():
    options = SamplingOptions(temperature=1.0)
    logits = torch.arange(8).to(torch.bfloat16)  # exact in both dtypes
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        first, second = (torch.Generator().manual_seed(5) for _ in range(2))
        expected = [sample_token(logits.float(), options, (), first) for _ in range(20)]
        assert [sample_token(logits.to(dtype), options, (), second) for _ in range(20)] == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_logits_are_refused(bad):
    with pytest.raises(ValueError, match="not finite"):
        sample_token(torch.tensor([1.0, bad]), SamplingOptions(), (), torch.Generator())
    with pytest.raises(ValueError, match="not finite"):
        sample_token(torch.full((3,), -math.inf), SamplingOptions(), (), torch.Generator())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("top_k", -1), ("top_k", 2.5), ("top_p", 0.0),
        ("top_p", 1.1), ("min_p", -0.1), ("min_p", 1.5), ("repetition_penalty", 0.0), ("seed", -1), ("seed", 2**63),
    ],
)  # fmt: skip
def test_impossible_values_are_refused(name, value):
    with pytest.raises(ConfigError, match=rf"^{name} is {value}; allowed: "):
        SamplingOptions(**{name: value})


def test_all_problems_are_listed_at_once():
    with pytest.raises(ConfigError) as error:
        SamplingOptions(temperature=-1, top_p=2)
    assert [line.split()[0] for line in str(error.value).splitlines()] == ["temperature", "top_p"]
