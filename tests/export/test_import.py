"""Llama and GPT-2 directories become runs with the same logits, are trained on, converted, and exported again."""

import json
import shutil

import pytest
import torch

from lowmem.cli.main import main
from lowmem.config.schema import LorptConfig
from lowmem.engine.run_model import load_run_model
from lowmem.export.hf import export_run_model
from lowmem.export.import_hf import import_directory
from lowmem.system.errors import CheckpointError, ConfigError
from tests.reference.random_models import read_header, save_theirs, tolerance
from tests.train.tiny_run import tiny_arguments, write_text

THEIRS = {
    "llama": ("llama", {}),
    "llama-tied-biased": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "rms_norm_eps": 1e-4}),
    "llama-sharded": ("llama", {"max_shard_size": "20kB", "num_key_value_heads": 4, "mlp_bias": True}),
    "gpt2": ("gpt2", {"layer_norm_epsilon": 1e-3}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 40}),
}


@pytest.mark.parametrize("name", THEIRS)
def test_logits_survive_the_way_in_and_out(name, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    family, choices = THEIRS[name]
    theirs = save_theirs(tmp_path / "hf", family, **choices)
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists() == ("max_shard_size" in choices)
    assert import_directory(tmp_path / "hf", tmp_path / "run").parameters >= theirs.num_parameters()
    run = load_run_model(tmp_path / "run", "best")
    tokens = torch.arange(40).view(1, 40) * 7 % 300
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert torch.allclose(run.model(tokens), expected, rtol=0, atol=tolerance(expected))
        assert export_run_model(run, tmp_path / "back").family == family
        back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
        assert torch.allclose(back(tokens).logits, expected, rtol=0, atol=tolerance(expected))
    chat = [{"role": "user", "content": "some words"}]
    text = AutoTokenizer.from_pretrained(tmp_path / "back").apply_chat_template(chat, tokenize=False)
    assert text == "<s>some words<|endoftext|>"


def test_names_of_the_model_without_its_head_and_old_buffers_are_understood(tmp_path):
    """As the files of the first GPT-2 are; and its 16-bit weights stay so on the way in and out."""
    from safetensors.torch import load_file, save_file

    theirs = save_theirs(tmp_path / "hf", "gpt2", torch.bfloat16)
    file = tmp_path / "hf" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 64, 64)}, file)
    import_directory(tmp_path / "hf", tmp_path / "run")
    run = load_run_model(tmp_path / "run")
    tokens = torch.arange(40).view(1, 40)
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert torch.allclose(run.model.float()(tokens), expected, rtol=0, atol=tolerance(expected))
    export_run_model(load_run_model(tmp_path / "run"), tmp_path / "back")
    header = read_header(tmp_path / "back" / "model.safetensors")
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"BF16"}
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("share_down", [False, True])
def test_conversion_is_the_best_approximation_of_the_rank(share_down, tmp_path):
    """The product of the factors of q is q cut off after its largest singular values; what was not named is as it was."""
    save_theirs(tmp_path / "hf", attention_bias=True)
    lorpt = LorptConfig(rank=8, ranks={"*.down": 0, "blocks.1.*": 0}, share_down=share_down)
    done = import_directory(tmp_path / "hf", tmp_path / "low", lorpt)
    import_directory(tmp_path / "hf", tmp_path / "dense")
    low, dense = (load_run_model(tmp_path / name).model for name in ("low", "dense"))
    names = [layer.name for layer in done.converted]
    fused = ["blocks.0.attention.qkv", "blocks.0.attention.out", "blocks.0.mlp.gate_up"]
    apart = [f"{fused[0]}.q", f"{fused[0]}.k", f"{fused[0]}.v", fused[1], f"{fused[2]}.gate", f"{fused[2]}.up"]
    assert names == (fused if share_down else apart)
    layer = low.get_submodule(names[0])
    whole = dense.get_submodule(fused[0]).weight.detach()[: layer.out_features]
    left, values, right = torch.linalg.svd(whole, full_matrices=False)
    best = (left[:, :8] * values[:8]) @ right[:8]
    assert torch.allclose(layer.merged_weight(), best, rtol=0, atol=1e-5 * values[0].item())
    assert done.converted[0].retained_energy == pytest.approx((values[:8].square().sum() / values.square().sum()).item(), rel=1e-5)
    assert torch.equal(layer.bias, dense.get_submodule(fused[0]).bias[: layer.out_features])
    before, after = (dict(model.state_dict()) for model in (dense, low))
    kept = [name for name in before if name in after]
    assert {"norm.weight", "blocks.0.mlp.down.weight", "blocks.1.attention.out.weight"} <= set(kept)
    assert all(torch.equal(before[name], after[name]) for name in kept if "qkv" not in name)


def test_pretraining_goes_on_from_an_imported_model_made_low_rank(theirs, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["import", str(theirs), "--out", str(run), "--lorpt.rank=8", "--lorpt.targets=[mlp]"]) == 0
    said = capsys.readouterr().out
    assert "6 layers are low-rank now and keep" in said
    assert f"lowmem pretrain --config {run}/config.yaml" in said
    assert load_run_model(run).config.model.lorpt.rank == 8
    own = {"model.dim", "model.num_layers", "model.num_heads", "data.tokenizer", "train.steps"}
    text = write_text(tmp_path / "a.txt", 60)
    rest = [word for word in tiny_arguments(tmp_path / "new", text) if word[2:].partition("=")[0] not in own]
    arguments = ["pretrain", "--quiet", "--config", str(run / "config.yaml"), *rest, "--train.eval_every=0"]
    assert main([*arguments, "--train.steps=2", "--optim.lr=0"]) == 0
    before, after = (load_run_model(folder).model.state_dict() for folder in (run, tmp_path / "new"))
    assert all(torch.equal(before[name], after[name]) for name in before)  # at a rate of 0 it still has the imported weights
    assert main([*arguments, "--train.steps=2", "--fresh"]) == 0
    trained = load_run_model(tmp_path / "new").model.state_dict()
    assert not torch.equal(before["norm.weight"], trained["norm.weight"])
    assert main([*arguments, "--train.steps=2", "--run_dir", str(tmp_path / "other"), "--model.hidden_dim=56"]) == 2
    said = capsys.readouterr().err
    assert "a model of another shape: blocks.0.mlp.down.down has shape (8, 48), expected (8, 56); " in said
    assert "; take model.* from " in said
    assert main([*arguments, "--train.steps=2", "--run_dir", str(tmp_path / "other"), "--data.tokenizer=bytes"]) == 2
    assert f"which has another tokenizer than this run; set data.tokenizer={run}/tokenizer.json" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints")
    assert main([*arguments, "--train.steps=4", "--train.save_every=2"]) == 0  # a resumed run has its own weights
    assert load_run_model(tmp_path / "new").step == 4
    assert main([*arguments, "--train.steps=4", "--fresh"]) == 5


def test_what_cannot_be_imported_is_named(theirs, tmp_path):
    shutil.copytree(theirs, tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    refusals = {
        r"model_type bert, allowed: llama, gpt2; lowmem pretrain --model.path=\S+/hf takes any causal language model as it is": {
            "model_type": "bert"
        },
        r"rope_type yarn, which lowmem's decoder does not have; lowmem pretrain --model.path=\S+/hf takes it as it is": {
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}
        },
        r"rope_type linear": {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
        r"head_dim 16 with hidden_size 32 and 4 heads": {"head_dim": 16},
        r"hidden_act gelu": {"hidden_act": "gelu"},
        r"quantization_config, which lowmem's decoder does not have; give a model with plain weights": {
            "quantization_config": {"load_in_4bit": True}
        },
        r"the tokenizer has \d+ tokens, the model 200": {"vocab_size": 200},
    }
    for message, changes in refusals.items():
        path.write_text(json.dumps(config | changes))
        with pytest.raises(ConfigError, match=message):
            import_directory(tmp_path / "hf", tmp_path / "run")
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "hidden_size"}))
    with pytest.raises(ConfigError, match="lacks 'hidden_size'"):
        import_directory(tmp_path / "hf", tmp_path / "run")
    path.write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(CheckpointError, match=r"mlp.gate_proj.weight has shape \(48, 32\), expected \(64, 32\)"):
        import_directory(tmp_path / "hf", tmp_path / "run")
    path.write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"model.layers.2.input_layernorm.weight is missing"):
        import_directory(tmp_path / "hf", tmp_path / "run")
    path.write_text(json.dumps(config))
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no model.safetensors \(weights found: pytorch_model.bin\)"):
        import_directory(tmp_path / "hf", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "option, message",
    [
        ("--lorpt.rank=500", "layer blocks.0.attention.qkv.q: "),
        ("--lorpt.bottleneck=silu", "which trained weights cannot follow; allowed: --lorpt.rank"),
        ("--lorpt.ranks={nothing: 4}", "matches no layer"),
        ("--lorpt.targets=[mlp]", "leaves every layer dense"),
        ("--rank=4", "--rank is given, which is unknown"),
    ],
)
def test_conversions_that_cannot_be_are_refused(option, message, theirs, tmp_path, capsys):
    assert main(["import", str(theirs), "--out", str(tmp_path / "run"), option]) == 2
    assert message in capsys.readouterr().err
