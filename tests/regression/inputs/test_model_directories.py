"""Directories of models as people have them: loaded as transformers loads them, or refused in one line before training."""

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowmem.cli.main import main
from lowmem.engine.huggingface_files import load_model
from lowmem.engine.run_model import load_run_model
from lowmem.export.import_hf import import_directory
from lowmem.models.huggingface import HuggingFaceModel, check_contract
from lowmem.system.errors import CheckpointError
from lowmem.system.tensors import meta_tensors, weight_files
from tests.reference.tiny_families import save_tiny
from tests.train.tiny_run import finetune_arguments

TOKENS = torch.arange(20)[None] * 7 % 300


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, use_cache=False).logits


def theirs(folder):
    """With the attention that `load_model` leaves to the model: sums in one order."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def ours(folder):
    return load_model(folder, torch.float32)


def change_config(folder, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(folder, change) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


def finetune(base, chat, run_dir, *more: str) -> int:
    return main(["finetune", "--quiet", *finetune_arguments(base, chat, run_dir), *more])


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text", "gpt_neo"])
def test_buffers_of_every_family_are_as_transformers_makes_them(family, tmp_path):
    save_tiny(tmp_path, family)
    assert torch.equal(logits(ours(tmp_path)), logits(theirs(tmp_path)))


@pytest.mark.parametrize(
    "key, reason",
    [
        ("hidden_size", "describes tensors without elements"), ("intermediate_size", "describes tensors without elements"),
        ("vocab_size", "is no model that transformers can read"),
    ],
)  # fmt: skip
def test_tensors_without_elements_are_refused(llama, chat, tmp_path, capsys, key, reason):
    shutil.copytree(llama, tmp_path / "base")
    change_config(tmp_path / "base", **{key: 0})
    assert finetune(tmp_path / "base", chat, tmp_path / "out") == 5
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("lowmem: error: ")
    assert reason in error


def test_other_safetensors_beside_the_models_are_left_alone(llama, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(llama, folder)
    save_file({name: torch.zeros_like(t) for name, t in load_file(folder / "model.safetensors").items()}, folder / "zz-backup.safetensors")
    assert torch.equal(logits(ours(folder)), logits(theirs(llama)))


def test_names_and_masks_of_gpt2_on_the_hub(tmp_path):
    """Weights without `transformer.`, and buffers that files of that time hold: uint8 masks."""
    save_tiny(tmp_path, "gpt2")
    expected = logits(theirs(tmp_path))
    mask = torch.ones(1, 1, 128, 128, dtype=torch.uint8).tril()
    change_weights(tmp_path, lambda w: {k.removeprefix("transformer."): v for k, v in w.items()} | {"h.0.attn.bias": mask})
    model = ours(tmp_path)
    assert torch.equal(logits(model), expected)
    model.requires_grad_(True)  # as adapter.method=none has it


@pytest.mark.parametrize("quantised", ["quantization_config", "compression_config", "numbers"])
def test_quantised_bases_are_refused(quantised, llama, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(llama, folder)
    if quantised == "numbers":
        change_weights(folder, lambda w: {k: v.to(torch.float8_e4m3fn) if "proj" in k else v for k, v in w.items()})
        wanted = "holds quantised weights .*proj.weight is F8_E4M3"
    else:
        change_config(folder, **{quantised: {"quant_method": "awq", "bits": 4}})
        wanted = rf"has {quantised} \(awq\); give the model with plain fp32, bf16 or fp16 weights"
    with pytest.raises(CheckpointError, match=wanted):
        ours(folder)


@pytest.mark.parametrize(
    "family, wanted",
    [("t5", "is no causal language model; give one that predicts the next token"), ("none-such", "expected one that the installed")],
)
def test_models_that_are_not_trained_are_named(family, wanted, llama, chat, tmp_path, capsys):
    shutil.copytree(llama, tmp_path / "base")
    change_config(tmp_path / "base", model_type=family)
    assert finetune(tmp_path / "base", chat, tmp_path / "run") == 5
    error = capsys.readouterr().err
    assert f"found model_type '{family}'" in error
    assert wanted in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "change, wanted",
    [
        (
            lambda w: {k: v[:, :8].contiguous() if "q_proj" in k else v for k, v in w.items()},
            r"q_proj.weight has shape \(32, 8\), expected",
        ),
        (
            lambda w: {k: v[:300] if "embed" in k else v for k, v in w.items()},
            r"embed_tokens.weight has shape \(300, 32\), expected \(320,",
        ),
        (lambda w: w | {"model.norm.weight": torch.full((32,), torch.nan)}, r"weights that are not finite \(model.norm"),
        (lambda w: w | {"model.norm.weight": torch.full((32,), 3e38)}, "computes logits of .*: its weights are not finite, or too large"),
    ],
)
def test_weights_of_other_shapes_are_refused_before_training(change, wanted, llama, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(llama, folder)
    change_weights(folder, change)
    with pytest.raises(CheckpointError, match=wanted):
        check_contract(HuggingFaceModel(ours(folder)))


@pytest.mark.parametrize("token", [21, 70, 112, 317])
def test_the_check_of_a_model_tells_nan_from_a_family_that_is_not_trained(token, llama):
    """Wherever the NaN is: in the first text of a row, in the second, or in a later batch."""
    model = ours(llama)
    model.get_input_embeddings().weight.data[token] = torch.nan
    with pytest.raises(CheckpointError, match="computes logits of nan: its weights are not finite"):
        check_contract(HuggingFaceModel(model))


def test_a_tokenizer_larger_than_the_embedding_is_refused(llama, chat, tmp_path, capsys):
    folder = tmp_path / "base"
    save_tiny(folder, "llama", vocab_size=200)
    capsys.readouterr()
    assert finetune(folder, chat, tmp_path / "out", "--dry_run") in (4, 5)
    error = capsys.readouterr().err
    assert "tokens" in error
    assert "200" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_rows_longer_than_the_positions_of_the_base_are_refused(family, chat, tmp_path, capsys):
    save_tiny(tmp_path / "base", family)
    assert finetune(tmp_path / "base", chat, tmp_path / "out", "--data.seq_len=256", "--dry_run") == 2
    assert "data.seq_len is 256, but the learned positions of " in (error := capsys.readouterr().err)
    assert "end at 128; lower it" in error


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": "32"},
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": 0},
        {"vocab_size": -3},
        {"sliding_window": ["a"]},
        {"hidden_act": None},
    ],
)
def test_nonsense_in_config_json_is_one_line(values, llama, chat, tmp_path, capsys):
    folder = tmp_path / "base"
    shutil.copytree(llama, folder)
    change_config(folder, **values)
    assert finetune(folder, chat, tmp_path / "out", "--dry_run") == 5
    assert len((error := capsys.readouterr().err.strip()).splitlines()) == 1
    assert "Error" not in error
    assert "NoneType" not in error


@pytest.mark.parametrize(
    "values",
    [
        {"num_labels": 10**9}, {"num_labels": -1}, {"id2label": 3}, {"return_dict": False}, {"use_return_dict": False}, {"dtype": 5},
        {"output_attentions": True}, {"output_hidden_states": True}, {"torch_dtype": "float7"}, {"problem_type": "regression"},
    ],
)  # fmt: skip
def test_what_says_nothing_of_a_language_model_is_ignored(values, llama, chat, tmp_path):
    shutil.copytree(llama, tmp_path / "base")
    change_config(tmp_path / "base", **values)
    assert torch.equal(logits(ours(tmp_path / "base")), logits(theirs(llama)))
    assert finetune(tmp_path / "base", chat, tmp_path / "out", "--train.steps=1") == 0


@pytest.mark.parametrize(
    "family, values",
    [
        ("llama", {"num_hidden_layers": 10**9}), ("llama", {"vocab_size": 10**12}), ("llama", {"vocab_size": 10**9}),
        ("llama", {"max_position_embeddings": 10**12}), ("llama", {"intermediate_size": 10**8}), ("llama", {"hidden_size": 10**9}),
        ("llama", {"num_attention_heads": 10**8}), ("llama", {"head_dim": 10**8}), ("llama", {"num_key_value_heads": 10**9}),
        ("qwen2", {"num_hidden_layers": 10**9, "layer_types": None}), ("gpt_neo", {"attention_types": [[["global"], 10**9]]}),
        ("gpt2", {"n_layer": 10**9}), ("gpt2", {"n_positions": 10**9}), ("gptj", {"n_positions": 10**9}), ("gptj", {"n_layer": 10**10}),
        ("gpt_neo", {"max_position_embeddings": 10**9}), ("xglm", {"max_position_embeddings": 10**9}),
        ("llama", {"attention_dropout": 5}), ("llama", {"attention_dropout": -0.1}), ("gpt2", {"resid_pdrop": 1.5}),
    ],
)  # fmt: skip
def test_sizes_that_no_file_has_are_refused_at_once(family, values, chat, tmp_path, capsys):
    """Before anything of that size is made: the limits of this process would end it."""
    save_tiny(tmp_path / "base", family)
    change_config(tmp_path / "base", **values)
    capsys.readouterr()
    started = time.monotonic()
    for more in ("--dry_run", "--train.steps=1"):
        assert finetune(tmp_path / "base", chat, tmp_path / "out", more) == 5
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1, error
        assert "Error" not in error
    assert time.monotonic() - started < 20


def test_the_index_decides_and_names_files_of_its_folder(llama, tmp_path):
    for names in (["../model.safetensors"], ["/dev/zero"], ["model-1.bin"], [], ["x" * 5000]):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(enumerate(names))}))
        with pytest.raises(CheckpointError):
            weight_files(tmp_path)
    save_file({"a": torch.zeros(2).to(torch.float8_e5m2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="a is F8_E5M2, allowed: "):
        list(meta_tensors(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("dtype", ["fp32", "nf4"])
def test_adapters_on_tied_layers_are_merged_into_two(targets, dtype, chat, tmp_path):
    """Merged into the one weight, each would change the other layer, too."""
    save_tiny(tmp_path / "base", "llama", tie_word_embeddings=True)
    more = (f"--adapter.target_modules={json.dumps([*targets, 'q_proj'])}", f"--train.weight_dtype={dtype}", "--train.steps=8")
    assert finetune(tmp_path / "base", chat, tmp_path / "out", *more) == 0
    assert json.loads((tmp_path / "out/merged/config.json").read_text())["tie_word_embeddings"] is False
    inputs = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        before, after = (load_run_model(tmp_path / "out" / name).model(inputs, inputs.roll(-1, 1), 40.0) for name in ("", "merged"))
    assert after.item() == pytest.approx(before.item(), rel=1e-5)
    weights = load_file(tmp_path / "out/merged/model.safetensors")
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])


def test_what_ends_and_samples_an_answer_is_kept(llama, chat, tmp_path):
    shutil.copytree(llama, tmp_path / "base")
    settings = {"eos_token_id": [0, 2], "temperature": 0.7, "do_sample": True, "top_p": 0.9}
    (tmp_path / "base/generation_config.json").write_text(json.dumps(settings))
    assert finetune(tmp_path / "base", chat, tmp_path / "out") == 0
    for folder in ("adapter", "merged"):
        assert json.loads((tmp_path / "out" / folder / "generation_config.json").read_text()) == settings


def test_a_finetuning_goes_on_only_with_what_it_was_trained_on(llama, tmp_path, capsys):
    base, data, template = tmp_path / "base", tmp_path / "data.jsonl", tmp_path / "template.jinja"
    shutil.copytree(llama, base)
    records = [{"prompt": f"some words {n % 7}", "response": "the other words"} for n in range(40)]
    data.write_text("\n".join(json.dumps(record) for record in records))
    template.write_text("{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}")

    def again(steps: int, *more: str) -> tuple[int, str]:
        capsys.readouterr()
        code = finetune(base, data, tmp_path / "out", f"--data.template={template}", f"--train.steps={steps}", *more)
        return code, capsys.readouterr().err

    assert again(1)[0] == 0
    before = {path: path.read_bytes() for path in (data, template, base / "model.safetensors")}
    data.write_text("\n".join(json.dumps(record | {"response": "other words the"}) for record in records))
    template.write_text("{% for message in messages %}{{ message['content'] + ' ' + eos_token }}{% endfor %}")
    change_weights(base, lambda w: {name: tensor * 1.01 for name, tensor in w.items()})
    changed = {path: path.read_bytes() for path in before}
    for path in before:
        for other in before:
            other.write_bytes(changed[other] if other == path else before[other])
        code, error = again(2)
        assert code == 2, path
        assert len(error.splitlines()) == 1
    for path, content in before.items():
        path.write_bytes(content)
    assert again(2)[0] == 0
    (tmp_path / "out/checkpoints/step-00000002/state.json").write_text("{")
    code, error = again(3)
    assert code == 5
    assert "is damaged: state.json" in error
    assert again(1, "--fresh")[0] == 0
    assert (tmp_path / "out.old-1/adapter").is_dir()


@pytest.mark.parametrize(
    "key, value",
    [
        ("hidden_size", "32"), ("num_hidden_layers", [2]), ("num_hidden_layers", 10**30), ("num_attention_heads", -4), ("head_dim", "8"),
        ("num_key_value_heads", 2.0), ("intermediate_size", None), ("vocab_size", True), ("rms_norm_eps", "small"), ("rms_norm_eps", -1.0),
        ("rope_parameters", "default"), ("rope_parameters", {"rope_type": 3}), ("rope_parameters", {"rope_theta": "x"}),
        ("tie_word_embeddings", "no"), ("hidden_act", ["silu"]), ("max_position_embeddings", {}), ("attention_bias", 2),
        ("rms_norm_eps", None), ("tie_word_embeddings", None), ("mlp_bias", None), ("hidden_act", None),
        ("rope_parameters", {"rope_type": None}), ("rope_parameters", {"rope_theta": None}),
    ],
)  # fmt: skip
def test_import_refuses_other_types_in_config_json(key, value, llama, tmp_path, capsys):
    folder = tmp_path / "base"
    folder.mkdir()
    shutil.copyfile(llama / "config.json", folder / "config.json")
    change_config(folder, **{key: value})
    assert main(["import", str(folder), f"--out={tmp_path / 'run'}"]) == 5
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert "config.json has " in error
    assert "expected " in error


@pytest.mark.parametrize("key", ["layer_norm_epsilon", "activation_function", "scale_attn_weights", "tie_word_embeddings", "n_positions"])
def test_import_refuses_null_where_transformers_does(key, tmp_path, capsys):
    save_tiny(tmp_path / "base", "gpt2")
    change_config(tmp_path / "base", **{key: None})
    assert main(["import", str(tmp_path / "base"), f"--out={tmp_path / 'run'}"]) == 5
    assert f"config.json has {key} null, expected " in capsys.readouterr().err


@pytest.mark.parametrize("values", [{"num_key_value_heads": None, "head_dim": None, "rope_theta": None}, {"partial_rotary_factor": None}])
def test_null_is_a_missing_key_where_transformers_takes_it_so(values, tmp_path):
    from lowmem.export.import_hf import read_model_config

    save_tiny(tmp_path / "base", "llama", num_key_value_heads=4)
    expected = read_model_config(tmp_path / "base")
    change_config(tmp_path / "base", **values)
    assert read_model_config(tmp_path / "base") == expected


@pytest.mark.parametrize("family, prefix", [("llama", "model."), ("llama", ""), ("gpt2", "transformer."), ("gpt2", "")])
def test_a_head_of_its_own_is_imported_whatever_config_json_says(family, prefix, tmp_path):
    """Files with a head that differs from the embedding hold an untied model; with an equal one it is tied."""
    folder = tmp_path / "base"
    save_tiny(folder, family, tie_word_embeddings=False)
    change_weights(folder, lambda w: {name if name == "lm_head.weight" else prefix + name.partition(".")[2]: w[name] for name in w})
    expected = logits(theirs(folder))
    change_config(folder, tie_word_embeddings=True)
    assert torch.equal(logits(theirs(folder)), expected)
    imported = import_directory(folder, tmp_path / "run")
    assert imported.config.model.tie_embeddings is False
    assert torch.allclose(load_run_model(tmp_path / "run").model(TOKENS), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
    embedding = next(name for name in load_file(folder / "model.safetensors") if name.endswith(("embed_tokens.weight", "wte.weight")))
    change_weights(folder, lambda w: w | {"lm_head.weight": w[embedding].clone()})
    assert import_directory(folder, tmp_path / "tied").config.model.tie_embeddings is True
    change_weights(folder, lambda w: w | {"lm_head.weight": w[embedding][:200].clone()})
    with pytest.raises(CheckpointError, match=r"lm_head.weight has shape \(200, 32\), expected \(320, 32\)"):
        import_directory(folder, tmp_path / "short")


@pytest.mark.parametrize("older", [{"rope_type": "linear", "factor": 4.0}, {"type": "dynamic", "factor": 2.0}])
def test_import_reads_of_two_rope_settings_that_of_transformers(older, llama, tmp_path, capsys):
    shutil.copytree(llama, tmp_path / "base")
    change_config(tmp_path / "base", rope_parameters={"rope_type": "default", "rope_theta": 1e4}, rope_scaling=older)
    assert main(["import", str(tmp_path / "base"), f"--out={tmp_path / 'run'}"]) == 2
    assert f"has rope_type {older.get('rope_type', older.get('type'))}, which lowmem's decoder does not have" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int64, torch.float64, torch.uint8])
def test_import_refuses_codes_beside_weights(dtype, llama, tmp_path, capsys):
    shutil.copytree(llama, tmp_path / "base")
    name = "model.layers.0.self_attn.q_proj.weight"
    change_weights(tmp_path / "base", lambda w: w | {name: w[name].to(dtype)})
    assert main(["import", str(tmp_path / "base"), f"--out={tmp_path / 'run'}"]) == 5
    assert f"has weights of {dtype} ({name}), allowed: float32, bfloat16, float16" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"])
def test_a_number_that_is_not_finite_is_refused_by_import_and_finetune(name, number, llama, chat, tmp_path, capsys):
    """Also in a row that the check of the loss does not look up."""
    shutil.copytree(llama, tmp_path / "base")
    change_weights(tmp_path / "base", lambda w: w | {name: w[name].index_put((torch.tensor(7), torch.tensor(5)), torch.tensor(number))})
    assert main(["import", str(tmp_path / "base"), f"--out={tmp_path / 'run'}"]) == 5
    assert f"holds weights that are not finite ({name}); restore its files" in capsys.readouterr().err
    for more in ((), ("--adapter.method=none", "--train.update=layerwise")):
        assert finetune(tmp_path / "base", chat, tmp_path / "out", *more) == 5
        assert f"holds weights that are not finite ({name}); restore its files" in capsys.readouterr().err


def test_generate_says_which_folders_it_takes(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("nothing")
    assert main(["generate", f"--run={tmp_path}", "--prompt=a"]) == 5
    said = capsys.readouterr().err
    for kind in ("config.yaml", "config.json and safetensors", "adapter_config.json"):
        assert kind in said
