"""What models did wrong with their parameters and caches."""

import copy
import io
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lowmem.cli import generate as command
from lowmem.config.schema import DataConfig, LorptConfig, ModelConfig, RunConfig
from lowmem.data.tokenizers import ByteTokenizer
from lowmem.engine.run_model import RunModel
from lowmem.models.registry import build_model
from lowmem.nn.lorpt import LoRPtLinear
from lowmem.nn.lorptize import change_rank


def small(positions: str = "rope", **choices):
    config = ModelConfig(**{"dim": 32, "num_layers": 1, "num_heads": 2, "positions": positions, **choices})
    return build_model(config, vocab_size=50, max_seq_len=16, seed=0)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_model_that_was_read_in_inference_mode_can_be_trained(stored):
    """What rotary positions keep was made in inference mode, and such tensors cannot be saved for backward."""
    model, tokens = small().to(stored), torch.arange(8).view(1, 8)
    with torch.inference_mode():
        expected = model(tokens, tokens)
    loss = model(tokens, tokens)
    loss.backward()
    assert torch.equal(loss, expected)
    assert all(parameter.grad is not None for parameter in model.parameters())


def wide_layer() -> LoRPtLinear:
    """Above its break-even, so that without gradients its product is kept."""
    return LoRPtLinear(8, 8, rank=6, bias=False, strict=False)


def kernel_update(tensor: torch.Tensor) -> None:
    """Writes through the address alone, as compiled kernels do."""
    tensor.detach().numpy()[:] *= 2


def test_a_product_of_factors_does_not_outlive_a_training_step():
    layer, x = wide_layer().eval(), torch.randn(1000, 8)
    with torch.no_grad():
        before = layer(x)
    layer.train()
    kernel_update(layer.up)
    layer.eval()
    with torch.no_grad():
        # the factor 2 is exact
        assert torch.equal(layer(x), 2 * before)


@pytest.mark.parametrize("change", ["load", "to", "rank"])
def test_a_product_of_factors_does_not_outlive_them(change):
    layer, x = wide_layer().eval(), torch.randn(1000, 8)
    with torch.no_grad():
        before = layer(x)
    kernel_update(layer.up)
    if change == "load":
        layer.load_state_dict({}, strict=False)
    elif change == "to":
        layer.to("cpu")
    else:
        change_rank(layer, 6, torch.Generator())
    with torch.no_grad():
        assert torch.equal(layer(x), 2 * before)


def test_a_layer_made_in_inference_mode_computes():
    with torch.inference_mode():
        layer, x = wide_layer(), torch.randn(1000, 8)
        first = layer(x)
        layer.up.mul_(2)
        assert torch.equal(layer(x), 2 * first)


def generated(monkeypatch, tmp_path, positions: str, *arguments: str, **changes) -> None:
    """`lowmem generate` of a model that was trained on 16 tokens, whatever --run says."""
    config = ModelConfig(dim=32, num_layers=1, num_heads=2, positions=positions)
    model = build_model(config, vocab_size=257, max_seq_len=64, seed=0).eval()
    run = replace(RunModel(model, ByteTokenizer(), RunConfig(data=DataConfig(seq_len=16)), 10, tmp_path), **changes)

    def load(*_, outline=False):
        return replace(run, model=copy.deepcopy(model).to("meta")) if outline else run

    monkeypatch.setattr(command, "load_run_model", load)
    assert command.generate_main(["--run", "r", "--top_k", "1", "--device", "cpu", *arguments]) == 0


def test_rotary_positions_past_their_training_are_warned_of_once(monkeypatch, tmp_path, capsys):
    generated(monkeypatch, tmp_path, "rope", "--prompt", "abcdef", "--prompt", "abcd", "--max_new_tokens", "20")
    told = capsys.readouterr()
    (warning,) = [line for line in told.err.splitlines() if line.startswith("warning")]
    assert warning == (
        "warning: prompt and max_new_tokens are 26 tokens, the rotary positions of this run were trained on 16: what is written past them "
        "gets worse with every token; lower --max_new_tokens, or train with data.seq_len=26 or model.positions=alibi"
    )
    assert "warning" not in told.out


def test_each_line_of_a_person_is_counted(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("abc\nabcdefghijkl\nabcdefghijklm\n"))
    generated(monkeypatch, tmp_path, "rope", "--interactive", "--max_new_tokens", "5")
    assert capsys.readouterr().err.count("are 17 tokens") == 1


def unstable_i3(max_seq_len: int, w_mix: float = 1.5, norm: float = 10.0):
    """i3 whose averages and states would grow with every step."""
    config = ModelConfig(name="i3", dim=16, num_layers=2, state_dim=8, attention_rank=4, lorpt=LorptConfig(rank=4))
    model = build_model(config, vocab_size=50, max_seq_len=max_seq_len, seed=0)
    with torch.no_grad():
        for block in model.blocks:
            block.hybrid.w_mix.fill_(w_mix)
            matrix = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
            block.hybrid.transition.copy_(norm * matrix / torch.linalg.matrix_norm(matrix, 2))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("w_mix", "norm"), [(1.5, 0.5), (-1.5, 0.5), (0.5, 10.0), (1.5, 10.0)])
def test_i3_is_finite_whatever_its_decay_and_its_state_matrix(dtype, w_mix, norm):
    model = unstable_i3(2048, w_mix, norm).to(dtype)
    tokens = torch.randint(0, 50, (1, 2049), generator=torch.Generator().manual_seed(2))
    loss = model(tokens[:, :-1], tokens[:, 1:], 2048.0)
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
    for block in model.blocks:  # none is where no gradient could lead it back
        assert block.hybrid.w_mix.grad.any()
        assert block.hybrid.transition.grad.any()


def test_i3_decodes_as_it_trains_beyond_its_stable_region():
    model = unstable_i3(64).eval()
    tokens = torch.randint(0, 50, (2, 64), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = model(tokens)
        cache = model.new_cache(2, 64)
        pieces = [model(tokens[:, :20], cache=cache), *(model(tokens[:, i : i + 1], cache=cache) for i in range(20, 64))]
    # logits below 1 after 64 steps of sums of fp32
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-5)


def test_an_exported_i3_computes_the_same_beyond_its_stable_region():
    pytest.importorskip("transformers")
    from lowmem.export.modeling_lowmem import HybridCell

    cell = unstable_i3(64).blocks[0].hybrid
    exported = HybridCell(SimpleNamespace(hidden_size=16, state_dim=8), 0)
    exported.load_state_dict(cell.state_dict())
    x = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = cell(x)
        # 64 steps of sums of fp32 of size 1
        torch.testing.assert_close(exported(x, None), expected, rtol=0, atol=1e-5)
    assert expected.abs().max() < 10
