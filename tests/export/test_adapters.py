"""What is written of a model with an adapter: PEFT and transformers compute with it what was trained."""

import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file

from lowmem.cli.main import main
from lowmem.data.chat_template import ChatTemplate
from lowmem.data.tokenizer_loading import load_tokenizer
from lowmem.engine.run_model import load_run_model
from lowmem.export import adapters as module
from lowmem.export.adapters import has_adapter, save_adapter, save_merged
from lowmem.models.huggingface import HuggingFaceModel
from lowmem.nn.quantized import quantize
from lowmem.planning import hardware
from lowmem.system.errors import CheckpointError, ConfigError
from tests.reference.tiny_adapters import TOKENS, adapted, logits, save_adapted, save_base

CASES = [
    ("llama", False, "lora", {}),
    ("llama", False, "dora", {}),
    ("gpt2", True, "rslora", {}),
    ("gpt2", True, "ia3", {}),  # which scales biases, too
    ("llama", True, "lora", {"target_modules": ["q_proj", "embed_tokens"]}),
    ("llama", True, "lora", {"target_modules": ["q_proj", "lm_head"]}),
    ("llama", True, "lora", {"trainable_token_indices": {"embed_tokens": [5, 7]}}),
    ("llama", True, "lora", {"target_modules": ["embed_tokens", "lm_head"]}),
    ("gemma3_text", True, "dora", {"target_modules": ["embed_tokens", "lm_head"]}),
    ("gpt2", True, "lora", {"target_modules": ["wte", "lm_head"]}),
    ("qwen3", True, "dora", {"target_modules": ["lm_head"]}),
    ("llama", False, "lora", {"modules_to_save": ["lm_head"]}),
    ("llama", True, "lora", {"modules_to_save": ["lm_head"]}),
    ("llama", True, "lora", {"modules_to_save": ["embed_tokens"]}),
    ("llama", True, "lora", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    ("llama", True, "lora", {"modules_to_save": ["embed_tokens"], "target_modules": ["lm_head"]}),
]
PREFIXES = {
    "llama": {}, "qwen3": {}, "gpt2": {}, "gemma2": {"final_logit_softcapping": 500.0}, "gemma3_text": {},
    "mistral": {"sliding_window": 24},
}  # fmt: skip


@pytest.fixture
def base(tmp_path):
    save_base(tmp_path / "base")
    return tmp_path / "base"


def from_transformers(folder):
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    return model.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family, tied, method, settings", CASES)
def test_each_kind_of_adapter_survives_both_ways(tmp_path, family, tied, method, settings):
    from peft import PeftModel

    base = tmp_path / "base"
    save_base(base, family, tie_word_embeddings=tied)
    trained = save_adapted(base, tmp_path / "theirs", method, **settings)
    wanted = logits(trained)
    assert (wanted - logits(from_transformers(base))).abs().max() > 0.1  # the adapter does something
    run = load_run_model(tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(run.model(TOKENS), wanted, rtol=0, atol=1e-5)
    before = {name: tensor.clone() for name, tensor in run.model.lm.state_dict().items()}
    save_adapter(run.model, base, tmp_path / "adapter")
    save_merged(run.model, base, tmp_path / "merged")
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.lm.state_dict().items())
    torch.testing.assert_close(logits(PeftModel.from_pretrained(from_transformers(base), tmp_path / "adapter").eval()), wanted)
    torch.testing.assert_close(logits(from_transformers(tmp_path / "merged")), wanted, rtol=0, atol=2e-5)
    for folder in ("adapter", "merged"):
        with torch.no_grad():
            torch.testing.assert_close(load_run_model(tmp_path / folder).model(TOKENS), wanted, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", PREFIXES)
def test_a_prefix_survives_both_ways_and_is_not_merged(tmp_path, family, capsys):
    import peft

    base = tmp_path / "base"
    save_base(base, family, **PREFIXES[family])
    torch.manual_seed(1)
    trained = peft.get_peft_model(from_transformers(base), peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")).eval()
    trained.save_pretrained(tmp_path / "theirs")
    wanted = logits(trained)
    assert (wanted - logits(from_transformers(base))).abs().max() > 0.1
    run = load_run_model(tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(run.model(TOKENS), wanted, rtol=0, atol=3e-6 * wanted.abs().max().item())
    assert has_adapter(run.model)
    save_adapter(run.model, base, tmp_path / "adapter")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "adapter"))
    assert one.keys() == two.keys() == {"prompt_embeddings"}
    assert torch.equal(one["prompt_embeddings"], two["prompt_embeddings"])
    assert torch.equal(logits(peft.PeftModel.from_pretrained(from_transformers(base), tmp_path / "adapter").eval()), wanted)
    said, written = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("theirs", "adapter"))
    assert {key: said[key] for key in written} == {**written, "base_model_name_or_path": said["base_model_name_or_path"]}
    capsys.readouterr()
    assert main(["export", "--run", str(tmp_path / "theirs"), "--out", str(tmp_path / "merged")]) == 2
    error = capsys.readouterr().err
    assert "a prefix is keys and values beside the weights and cannot be merged into them; write it alone with --format=adapter" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "merged").exists()
    assert main(["export", "--run", str(tmp_path / "theirs"), "--out", str(tmp_path / "again"), "--format=adapter"]) == 0
    window = {"gemma2": 64, "gemma3_text": 64, "mistral": 24}.get(family)
    assert (f"only the first {(window or 0) - 5} tokens of a text see all of it" in capsys.readouterr().out) is bool(window)


@pytest.mark.parametrize("change, message", [
    ({"num_virtual_tokens": 4}, "does not fit the base"), ({"num_virtual_tokens": -1}, "found num_virtual_tokens -1, allowed: a positive"),
    ({"num_virtual_tokens": "x"}, "found num_virtual_tokens 'x', allowed: a positive integer"),
])  # fmt: skip
def test_a_prefix_of_another_shape_is_refused(tmp_path, base, change, message):
    import peft

    trained = peft.get_peft_model(from_transformers(base), peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"))
    trained.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_run_model(tmp_path / "adapter")
    assert "\n" not in str(caught.value)


def test_a_prefix_is_refused_on_a_base_that_takes_none(tmp_path, base):
    import peft

    trained = peft.get_peft_model(from_transformers(base), peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"))
    trained.save_pretrained(tmp_path / "adapter")
    save_base(tmp_path / "bloom", "bloom")
    with pytest.raises(CheckpointError, match=r"does not fit the base .*models of type bloom: its blocks are more than plain attention"):
        load_run_model(tmp_path / "bloom", adapter=tmp_path / "adapter")


def test_a_tie_stays_one_where_it_can(tmp_path):
    base = tmp_path / "base"
    save_base(base, tie_word_embeddings=True)
    for name, settings, tied in (("both", {}, True), ("one", {"target_modules": ["lm_head"]}, False)):
        save_adapted(base, tmp_path / name, **settings)
        save_merged(load_run_model(tmp_path / name).model, base, tmp_path / f"{name}-merged")
        assert ("lm_head.weight" in load_file(tmp_path / f"{name}-merged" / "model.safetensors")) is not tied
        assert json.loads((tmp_path / f"{name}-merged" / "config.json").read_text())["tie_word_embeddings"] is tied


def test_the_merged_model_has_the_dtype_of_its_base(tmp_path, base):
    """Rounded once, from sums in fp32."""
    half = tmp_path / "half"
    from_transformers(base).to(torch.bfloat16).save_pretrained(half)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, half / name)
    save_adapted(half, tmp_path / "adapter")
    model = load_run_model(tmp_path / "adapter").model
    save_merged(model, half, tmp_path / "merged")
    save_merged(model, half, tmp_path / "whole", dtype=torch.float32)
    narrow, wide = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "whole"))
    assert {tensor.dtype for tensor in narrow.values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, wide[name].to(torch.bfloat16)) for name, tensor in narrow.items())
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


def test_large_models_have_several_files_and_an_index(tmp_path, base):
    model = load_run_model(base).model
    size = save_merged(model, base, tmp_path / "merged", shard_bytes=30_000)
    files = sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == size == 4 * model.num_parameters()
    torch.testing.assert_close(logits(from_transformers(tmp_path / "merged")), logits(from_transformers(base)))
    with torch.no_grad():
        torch.testing.assert_close(load_run_model(tmp_path / "merged").model(TOKENS), load_run_model(base).model(TOKENS))


def test_one_layer_is_merged_at_a_time(tmp_path, base, monkeypatch):
    """Each is made when the file comes to it, and is gone before the next."""
    save_adapted(base, tmp_path / "adapter")
    model, alive, most = load_run_model(tmp_path / "adapter").model, [], []
    whole = module._whole

    def watched(*arguments):
        made = whole(*arguments)
        alive.append(weakref.ref(made))
        most.append(sum(ref() is not None for ref in alive))
        return made

    monkeypatch.setattr(module, "_whole", watched)
    save_merged(model, base, tmp_path / "merged")
    assert len(most) == 4  # two layers in two blocks
    assert max(most) <= 2


@torch.no_grad()
def test_a_coded_weight_is_merged_from_the_numbers_that_it_stands_for(tmp_path, base):
    """Never from its base's own, which the adapter was not trained on, and not rounded to codes again."""
    trained = adapted(base).get_base_model()
    layer, plain = trained.model.layers[0].self_attn.q_proj, trained.model.layers[0].self_attn.o_proj
    for linear in (layer.base_layer, plain):
        linear.weight = torch.nn.Parameter(quantize(linear.weight.detach(), 8), requires_grad=False)
    wanted = layer.base_layer.weight.detach().dense(torch.float32) + layer.get_delta_weight("default")
    for parameter in trained.parameters():
        parameter.requires_grad_(False)
    save_merged(HuggingFaceModel(trained), base, tmp_path / "merged")
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    torch.testing.assert_close(tensors["model.layers.0.self_attn.q_proj.weight"], wanted, rtol=0, atol=1e-6)
    assert torch.equal(tensors["model.layers.0.self_attn.o_proj.weight"], plain.weight.detach().dense(torch.float32))
    assert not torch.equal(wanted, load_file(base / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"])
    from_transformers(tmp_path / "merged")


def test_the_run_s_own_tokenizer_is_written(tmp_path, base):
    """Where it has tokens that its base has not."""
    values = json.loads((base / "tokenizer.json").read_text())
    more = {**values["added_tokens"][0], "id": load_tokenizer(base).vocab_size, "content": "<more>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**values, "added_tokens": [*values["added_tokens"], more]}))
    (base / "vocab.json").write_text("{}")
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    template = ChatTemplate("{{ bos_token }}{{ messages[0]['content'] }}", "<more>", tokenizer.decode([tokenizer.eos_id]))
    save_merged(load_run_model(base).model, base, tmp_path / "merged", tokenizer=tokenizer, template=template)
    assert load_tokenizer(tmp_path / "merged").sha256() == tokenizer.sha256() != load_tokenizer(base).sha256()
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == template.source
    assert not (tmp_path / "merged" / "vocab.json").exists()  # which knows nothing of the new token
    assert json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())["bos_token"] == "<more>"


def test_what_lies_beside_the_base_comes_along(tmp_path, base):
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 3], "temperature": 0.5, "do_sample": True}))
    save_adapted(base, tmp_path / "theirs")
    model = load_run_model(tmp_path / "theirs").model
    save_adapter(model, base, tmp_path / "adapter")
    save_merged(model, base, tmp_path / "merged")
    for folder in ("adapter", "merged"):
        for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / folder / name).read_bytes() == (base / name).read_bytes(), name
    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == str(base.resolve())


def test_weights_that_overflow_are_refused(tmp_path, base):
    model = load_run_model(base).model
    with torch.no_grad():
        model.lm.model.norm.weight[0] = 1e6
    with pytest.raises(CheckpointError, match=r"model.norm.weight is not finite in float16; .*--dtype=fp32"):
        save_merged(model, base, tmp_path / "merged", dtype=torch.float16)


def test_a_model_without_an_adapter_has_none_to_write(tmp_path, base):
    model = load_run_model(base).model
    assert not has_adapter(model)
    with pytest.raises(ConfigError, match="has no adapter to write"):
        save_adapter(model, base, tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore")
def test_the_command_merges_an_adapter_and_writes_one(tmp_path, base, capsys):
    save_adapted(base, tmp_path / "theirs")
    wanted = logits(adapted(base))
    capsys.readouterr()
    assert main(["export", "--run", str(tmp_path / "theirs"), "--out", str(tmp_path / "merged")]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path}/merged: a llama directory of transformers; ")
    torch.testing.assert_close(logits(from_transformers(tmp_path / "merged")), wanted, rtol=0, atol=2e-5)
    assert main(["export", "--run", str(tmp_path / "theirs"), "--out", str(tmp_path / "adapter"), "--format=adapter"]) == 0
    assert f"an adapter of PEFT for {base}" in capsys.readouterr().out
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "adapter"))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    # an adapter over a merged model: what was there goes
    assert main(["export", "--run", str(tmp_path / "theirs"), "--out", str(tmp_path / "merged"), "--format=adapter", "--overwrite"]) == 0
    assert not (tmp_path / "merged" / "config.json").exists()


@pytest.mark.parametrize("options, message", [
    (["--keep_factors"], "--keep_factors is given, but"),
    (["--format=adapter"], "has no adapter to write"),
    (["--format=adapter", "--dtype=bf16"], "--dtype is given with --format=adapter"),
    (["--checkpoint=best"], "--checkpoint is best, but"),
])  # fmt: skip
def test_what_a_directory_does_not_have_is_one_line(tmp_path, base, capsys, options, message):
    capsys.readouterr()
    assert main(["export", "--run", str(base), "--out", str(tmp_path / "out"), *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_model_larger_than_the_memory_is_exported_from_a_scratch_file(base, tmp_path, capsys, monkeypatch):
    save_adapted(base, tmp_path / "theirs", "lora")
    given = ["export", "--run", str(tmp_path / "theirs"), "--out"]
    assert main([*given, str(tmp_path / "one")]) == 0
    assert "scratch file" not in capsys.readouterr().err
    monkeypatch.setattr(hardware, "this_hardware", lambda: hardware.Hardware(1000, 0))
    assert main([*given, str(tmp_path / "two")]) == 0
    assert f"1000 B are free: blocks are kept in a scratch file in {tmp_path}" in capsys.readouterr().err
    one, two = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
