"""Directories of models as people have them: loaded as transformers loads them, or refused in one line before training."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowmem.cli import main
from lowmem.engine.tensor_file import meta_tensors, weight_files
from lowmem.errors import CheckpointError
from lowmem.finetune.base_model import load_base
from tests.reference.tiny_families import save_tiny

TOKENS = torch.arange(20)[None] * 7 % 300


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, use_cache=False).logits


def theirs(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "llama"
    save_tiny(folder, "llama")
    return folder


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"some words {n % 7}", "response": "the other words"}) for n in range(40)))
    return path


def change_config(folder, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(folder, change) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


def finetune(base, chat, out, *more: str) -> int:
    settings = {"base": base, "data": chat, "out": out, "seq_len": 64, "steps": 2, "batch_size": 2, "micro_batch_size": 2}
    settings |= {"val_fraction": 0.1, "optim.warmup_steps": 1}
    return main(["finetune", "--quiet", *(f"--{key}={value}" for key, value in settings.items()), *more])


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text", "gpt_neo"])
def test_buffers_of_every_family_are_as_transformers_makes_them(family, tmp_path):
    save_tiny(tmp_path, family)
    assert torch.equal(logits(load_base(tmp_path, nf4=False)), logits(theirs(tmp_path)))


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
    assert torch.equal(logits(load_base(folder, nf4=False)), logits(theirs(llama)))


def test_names_and_masks_of_gpt2_on_the_hub(tmp_path):
    """Weights without `transformer.`, and buffers that files of that time hold: uint8 masks."""
    save_tiny(tmp_path, "gpt2")
    expected = logits(theirs(tmp_path))
    mask = torch.ones(1, 1, 128, 128, dtype=torch.uint8).tril()
    change_weights(tmp_path, lambda w: {k.removeprefix("transformer."): v for k, v in w.items()} | {"h.0.attn.bias": mask})
    model = load_base(tmp_path, nf4=False)
    assert torch.equal(logits(model), expected)
    model.requires_grad_(True)  # as method=full does it


@pytest.mark.parametrize("quantised", ["quantization_config", "compression_config", "numbers"])
def test_quantised_bases_are_refused(quantised, llama, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(llama, folder)
    if quantised == "numbers":
        change_weights(folder, lambda w: {k: v.to(torch.float8_e4m3fn) if "proj" in k else v for k, v in w.items()})
        wanted = "holds quantised weights .*proj.weight is F8_E4M3"
    else:
        change_config(folder, **{quantised: {"quant_method": "awq", "bits": 4}})
        wanted = rf"has {quantised} \(awq\); give the base with plain fp32, bf16 or fp16 weights"
    with pytest.raises(CheckpointError, match=wanted):
        load_base(folder, nf4=False)


@pytest.mark.parametrize("family", ["mixtral", "mamba"])
def test_families_that_are_not_trained_are_named(family, chat, tmp_path, capsys):
    save_tiny(tmp_path / "base", family)
    assert finetune(tmp_path / "base", chat, tmp_path / "out") == 5
    assert f"found model_type '{family}', lowmem finetune takes apertus" in capsys.readouterr().err


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
        (lambda w: w | {"model.norm.weight": torch.full((32,), torch.nan)}, "computes a loss of nan: its weights are not finite"),
    ],
)
def test_weights_of_other_shapes_are_refused_before_training(change, wanted, llama, tmp_path):
    from lowmem.finetune.probe import check_loss

    folder = tmp_path / "base"
    shutil.copytree(llama, folder)
    change_weights(folder, change)
    with pytest.raises(CheckpointError, match=wanted):
        check_loss(load_base(folder, nf4=False), torch.device("cpu"), packed=True)


def test_a_tokenizer_larger_than_the_embedding_is_refused(llama, chat, tmp_path, capsys):
    folder = tmp_path / "base"
    save_tiny(folder, "llama", vocab_size=200)
    assert finetune(folder, chat, tmp_path / "out", "--dry_run") == 5
    assert "tokens, its model 200; give files that belong together" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_rows_longer_than_the_positions_of_the_base_are_refused(family, chat, tmp_path, capsys):
    save_tiny(tmp_path / "base", family)
    assert finetune(tmp_path / "base", chat, tmp_path / "out", "--seq_len=256", "--dry_run") == 2
    assert "seq_len is 256, the base " in (error := capsys.readouterr().err)
    assert "has 128 positions; use seq_len=128 or less" in error


@pytest.mark.parametrize(
    "values",
    [{"hidden_size": "32"}, {"num_hidden_layers": 10**9}, {"num_attention_heads": 0}, {"vocab_size": -3}, {"sliding_window": ["a"]}],
)
def test_nonsense_in_config_json_is_one_line(values, llama, chat, tmp_path, capsys):
    folder = tmp_path / "base"
    shutil.copytree(llama, folder)
    change_config(folder, **values)
    assert finetune(folder, chat, tmp_path / "out", "--dry_run") == 5
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_the_index_decides_and_names_files_of_its_folder(llama, tmp_path):
    for names in (["../model.safetensors"], ["/dev/zero"], ["model-1.bin"], [], ["x" * 5000]):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(enumerate(names))}))
        with pytest.raises(CheckpointError):
            weight_files(tmp_path)
    save_file({"a": torch.zeros(2).to(torch.float8_e5m2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="a is F8_E5M2, allowed: "):
        list(meta_tensors(tmp_path / "model.safetensors"))


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")  # PEFT's own, when the test loads the adapter
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_adapter_on_a_tied_layer_is_merged_into_that_layer_alone(target, method, chat, tmp_path):
    from peft import PeftModel

    save_tiny(tmp_path / "base", "llama", tie_word_embeddings=True)
    more = (f'--adapter.target_modules=["{target}", "q_proj"]', f"--method={method}", "--optim.lr=0.05", "--steps=8")
    assert finetune(tmp_path / "base", chat, tmp_path / "out", *more) == 0
    base = load_base(tmp_path / "base", nf4=method == "qlora")
    adapted, merged = logits(PeftModel.from_pretrained(base, tmp_path / "out/adapter")), logits(theirs(tmp_path / "out/merged"))
    # a merged weight is rounded once more, to 2**-24 of it, in each of 7 products of 32 terms; 4-bit kernels sum in blocks of their own
    assert torch.allclose(adapted, merged, rtol=0, atol=(30 if method == "qlora" else 1) * 2e-6 * float(merged.abs().max()))
    assert not torch.allclose(merged, logits(theirs(tmp_path / "base")), rtol=0, atol=0.1)


def test_what_ends_and_samples_an_answer_is_kept(chat, tmp_path):
    save_tiny(tmp_path / "base", "llama")
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
        code = finetune(base, data, tmp_path / "out", f"--template={template}", f"--steps={steps}", *more)
        return code, capsys.readouterr().err

    assert again(1)[0] == 0
    before = {path: path.read_bytes() for path in (data, template, base / "model.safetensors")}
    data.write_text("\n".join(json.dumps(record | {"response": "other words the"}) for record in records))
    template.write_text("{% for message in messages %}{{ message['content'] + ' ' + eos_token }}{% endfor %}")
    change_weights(base, lambda w: {name: tensor * 1.01 for name, tensor in w.items()})
    for path, name in zip(before, ("data", "template", "base"), strict=True):
        changed = {other: other.read_bytes() for other in before}
        for other in before:
            other.write_bytes(changed[other] if other == path else before[other])
        code, error = again(2)
        assert code == 2
        assert f"holds a run of other content (SHA-256): {name} was " in error
        for other in before:
            other.write_bytes(changed[other])
    for path, content in before.items():
        path.write_bytes(content)
    assert again(2)[0] == 0
    (tmp_path / "out/finetune.json").write_text("{")
    code, error = again(3)
    assert code == 5
    assert "finetune.json is damaged" in error
    assert error.rstrip().endswith("or start over with --fresh")
    assert again(1, "--fresh")[0] == 0
    assert (tmp_path / "out.old-1/adapter").is_dir()


@pytest.mark.parametrize(
    "key, value",
    [
        ("hidden_size", "32"), ("num_hidden_layers", [2]), ("num_hidden_layers", 10**30), ("num_attention_heads", -4), ("head_dim", "8"),
        ("num_key_value_heads", 2.0), ("intermediate_size", None), ("vocab_size", True), ("rms_norm_eps", "small"), ("rms_norm_eps", -1.0),
        ("rope_parameters", "default"), ("rope_parameters", {"rope_type": 3}), ("rope_parameters", {"rope_theta": "x"}),
        ("tie_word_embeddings", "no"), ("hidden_act", ["silu"]), ("max_position_embeddings", {}), ("attention_bias", 2),
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


def test_generate_says_what_a_folder_is_instead_of_a_run(llama, tmp_path, capsys):
    (tmp_path / "finetune.json").write_text("{}")
    for folder, wanted in ((tmp_path, "PEFT its adapter/"), (llama, "lowmem import ")):
        assert main(["generate", f"--run={folder}", "--prompt=a"]) == 5
        assert wanted in capsys.readouterr().err
