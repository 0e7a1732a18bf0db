import json
import re
import shutil
from dataclasses import replace

import pytest
import torch

from lowmem.config.dump import dump_config
from lowmem.config.schema import LorptConfig, ModelConfig, RunConfig
from lowmem.data.tokenizer_loading import load_tokenizer
from lowmem.data.tokenizers import ByteTokenizer
from lowmem.engine import run_model
from lowmem.engine.from_config import temporary_storage
from lowmem.engine.run_model import load_run_model
from lowmem.generation import generate_batch
from lowmem.generation.sampling import SamplingOptions
from lowmem.models.huggingface import HuggingFaceModel
from lowmem.models.registry import build_model
from lowmem.system.errors import CheckpointError, ConfigError, DataError
from lowmem.system.tensors import write_tensors
from tests.reference.tiny_adapters import TOKENS, adapted, logits, save_adapted, save_base

MODEL = ModelConfig(dim=16, hidden_dim=24, num_layers=2, num_heads=2, vocab_size=260, max_seq_len=32)


def write_run(run_dir, model_config=MODEL, *, dtype=torch.float32, steps=(5, 10)):
    """A run directory as training leaves it; returns the newest model."""
    config = RunConfig(model=model_config)
    config.train.steps, config.data.seq_len = 10, 32
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(dump_config(config))
    ByteTokenizer().save(run_dir / "tokenizer.json")
    for step in steps:
        folder = run_dir / f"checkpoints/step-{step:08d}"
        folder.mkdir(parents=True)
        model = build_model(model_config, vocab_size=260, max_seq_len=32, seed=step).to(dtype)
        write_tensors(folder / "model.safetensors", dict(model.state_dict()))
    (run_dir / "checkpoints/latest").write_text(f"step-{steps[-1]:08d}\n")
    (run_dir / "checkpoints/best").write_text(f"step-{steps[0]:08d}\n")
    return model.eval()


def weights_of(path):
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


def rewrite(path, change):
    tensors = {name: tensor.clone() for name, tensor in weights_of(path).items()}
    change(tensors)
    write_tensors(path / "model.safetensors", tensors)


@pytest.mark.parametrize("positions", ["rope", "alibi", "learned"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_model_comes_back_bit_for_bit(tmp_path, positions, tied):
    saved = write_run(tmp_path / "run", replace(MODEL, positions=positions, tie_embeddings=tied))
    run = load_run_model(tmp_path / "run")
    tokens = torch.arange(12)[None]
    assert torch.equal(run.model(tokens), saved(tokens))
    assert (run.step, run.path.name, run.model.training) == (10, "step-00000010", False)
    assert run.tokenizer.encode("a") == [97]


def test_any_checkpoint_can_be_chosen(tmp_path):
    write_run(tmp_path / "run")
    for checkpoint, step in (("latest", 10), ("best", 5), (5, 5), (10, 10)):
        run = load_run_model(tmp_path / "run", checkpoint)
        assert run.step == step
        expected = build_model(MODEL, vocab_size=260, max_seq_len=32, seed=step)
        assert torch.equal(run.model.embedding.weight, expected.embedding.weight)


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bf16_weights_are_widened_where_bf16_is_slow(native, expected, tmp_path, monkeypatch):
    saved = write_run(tmp_path / "run", dtype=torch.bfloat16)
    monkeypatch.setattr("lowmem.engine.run_model.device_has_native_bf16", lambda device: native)
    loaded = load_run_model(tmp_path / "run").model
    assert {parameter.dtype for parameter in loaded.parameters()} == {expected}
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter.float(), saved.get_parameter(name).float())
    outline = load_run_model(tmp_path / "run", outline=True).model
    assert {parameter.device.type for parameter in outline.parameters()} == {"meta"}
    shapes = [[(name, parameter.shape, parameter.dtype) for name, parameter in model.named_parameters()] for model in (loaded, outline)]
    assert shapes[0] == shapes[1]


def break_shape(tensors):
    tensors["embedding.weight"] = tensors["embedding.weight"][:, :8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (break_shape, r"embedding\.weight has shape \(260, 8\), expected \(260, 16\)"),
        (lambda tensors: tensors.pop("embedding.weight"), r"embedding\.weight is missing"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "extra is unknown"),
        (lambda tensors: tensors.clear(), r"is missing; and \d+ more"),
    ],
)
def test_weights_of_another_model_are_refused(change, message, tmp_path):
    write_run(tmp_path / "run")
    rewrite(tmp_path / "run/checkpoints/step-00000010", change)
    with pytest.raises(CheckpointError, match=f"does not hold the model of the run's config.yaml: .*{message}"):
        load_run_model(tmp_path / "run")


def remove(run_dir, name):
    path = run_dir / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.yaml", "is no run directory: config.yaml is missing .found: checkpoints, tokenizer.json"),
        ("tokenizer.json", "tokenizer.json is missing"),
        ("checkpoints", r"latest is missing or unreadable \(No such file or directory\); steps with a checkpoint: none"),
        ("checkpoints/latest", "latest is missing or unreadable .*steps with a checkpoint: 5, 10"),
        ("checkpoints/step-00000010", "latest names 'step-00000010', which is no checkpoint; steps with one: 5"),
        ("checkpoints/step-00000010/model.safetensors", r"model.safetensors is missing; choose another checkpoint with --checkpoint=STEP"),
    ],
)
def test_what_is_missing_is_named(name, message, tmp_path):
    write_run(tmp_path / "run")
    remove(tmp_path / "run", name)
    with pytest.raises(CheckpointError, match=message) as error:
        load_run_model(tmp_path / "run")
    assert error.value.exit_code == 5


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(CheckpointError, match="config.yaml is missing .found: no such folder"):
        load_run_model(tmp_path / "absent")


def test_a_step_without_a_checkpoint(tmp_path):
    write_run(tmp_path / "run")
    with pytest.raises(CheckpointError, match="has no checkpoint of step 7; steps with one: 5, 10"):
        load_run_model(tmp_path / "run", 7)


@pytest.mark.parametrize("name", ["../../elsewhere", "step-10", ""])
def test_a_pointer_that_names_no_checkpoint(name, tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "run/checkpoints/latest").write_text(name)
    with pytest.raises(CheckpointError, match="which is no checkpoint; steps with one: 5, 10"):
        load_run_model(tmp_path / "run")


def test_a_truncated_file(tmp_path):
    write_run(tmp_path / "run")
    path = tmp_path / "run/checkpoints/step-00000010/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged or missing"):
        load_run_model(tmp_path / "run")


def test_a_tokenizer_of_another_run(tmp_path):
    write_run(tmp_path / "run", replace(MODEL, vocab_size=100))
    with pytest.raises(CheckpointError, match="model.vocab_size 100 and model.max_seq_len 32, the tokenizer has 257 tokens"):
        load_run_model(tmp_path / "run")


def test_a_damaged_tokenizer(tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "run/tokenizer.json").write_text(json.dumps({"lowmem_tokenizer": "unheard of"}))
    with pytest.raises(DataError, match="damaged tokenizer file"):
        load_run_model(tmp_path / "run")


@pytest.mark.parametrize("family", ["llama", "gpt2", "lfm2"])
def test_a_directory_of_transformers_is_a_model(tmp_path, family):
    theirs = save_base(tmp_path / "base", family)
    run = load_run_model(tmp_path / "base")
    torch.testing.assert_close(ours(run), logits(theirs), rtol=0, atol=1e-5)
    assert (run.step, run.path, run.folders, run.model.training) == (0, tmp_path / "base", (tmp_path / "base",), False)
    assert run.end_ids == {0}
    outline = load_run_model(tmp_path / "base", outline=True)
    assert {parameter.device.type for parameter in outline.model.parameters()} == {"meta"}
    shapes = [[(name, p.shape, p.dtype) for name, p in each.model.named_parameters()] for each in (run, outline)]
    assert shapes[0] == shapes[1]


@torch.no_grad()
def ours(run):
    return run.model(TOKENS)


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_directory_is_kept_as_it_is_stored_where_that_is_quick(native, expected, tmp_path, monkeypatch):
    save_base(tmp_path / "base").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    monkeypatch.setattr("lowmem.engine.run_model.device_has_native_bf16", lambda device: native)
    assert {parameter.dtype for parameter in load_run_model(tmp_path / "base").model.parameters()} == {expected}


def test_adapters_are_exchanged_on_one_base(tmp_path):
    base = tmp_path / "base"
    plain = logits(save_base(base))
    one, two = save_adapted(base, tmp_path / "one"), save_adapted(base, tmp_path / "two", "ia3")
    for given, adapter, wanted in (
        (base, None, plain), (base, "one", logits(one)), (base, "two", logits(two)), (tmp_path / "one", None, logits(one)),
        (tmp_path / "one", "two", logits(two)),
    ):  # fmt: skip
        run = load_run_model(given, adapter=None if adapter is None else tmp_path / adapter)
        torch.testing.assert_close(ours(run), wanted, rtol=0, atol=1e-5)
    assert run.folders == (tmp_path / "two", base)


def write_adapted_run(base, run_dir, monkeypatch):
    """A run of LoRA on `base`, whose checkpoint holds what was trained; the model as it was then."""
    trained = adapted(base)

    def build(config, new_tokens=(), storage=None):
        meta = torch.get_default_device().type == "meta"
        with torch.device("cpu"):
            fresh = adapted(base)
        for parameter in fresh.parameters():
            if parameter.requires_grad:
                parameter.data.zero_()  # what is not read stays so
        return HuggingFaceModel((fresh.to("meta") if meta else fresh).get_base_model())

    monkeypatch.setattr(run_model, "build_configured_model", build)
    config = RunConfig(model=ModelConfig(path=str(base)))
    config.adapter.method, config.adapter.r, config.train.steps, config.train.precision = "lora", 4, 10, "fp32"
    config.model.vocab_size, config.model.max_seq_len = trained.get_base_model().config.vocab_size, 128
    folder = run_dir / "checkpoints" / "step-00000010"
    folder.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(dump_config(config))
    load_tokenizer(base).save(run_dir / "tokenizer.json")
    write_tensors(folder / "model.safetensors", HuggingFaceModel(trained.get_base_model()).saved_tensors())
    for pointer in ("latest", "best"):
        (run_dir / "checkpoints" / pointer).write_text("step-00000010\n")
    return trained


def test_a_run_with_an_adapter_reads_its_base_again(tmp_path, monkeypatch):
    base, run_dir = tmp_path / "base", tmp_path / "run"
    save_base(base)
    trained = write_adapted_run(base, run_dir, monkeypatch)
    assert all("lora_" in name for name in weights_of(run_dir / "checkpoints" / "step-00000010"))
    run = load_run_model(run_dir)
    torch.testing.assert_close(ours(run), logits(trained), rtol=0, atol=1e-5)
    assert (run.step, run.folders) == (10, (run_dir, base))
    assert load_run_model(run_dir, outline=True).model.lm.model.norm.weight.is_meta
    other = save_adapted(base, tmp_path / "other", "ia3")
    swapped = load_run_model(run_dir, adapter=tmp_path / "other")
    torch.testing.assert_close(ours(swapped), logits(other), rtol=0, atol=1e-5)


def test_a_part_of_an_adapter_is_refused(tmp_path, monkeypatch):
    base, run_dir = tmp_path / "base", tmp_path / "run"
    save_base(base)
    write_adapted_run(base, run_dir, monkeypatch)
    rewrite(run_dir / "checkpoints" / "step-00000010", lambda tensors: tensors.pop(sorted(tensors)[0]))
    with pytest.raises(CheckpointError, match=r"does not hold the model of the run's config.yaml: \S+lora_A\S+ is missing$"):
        load_run_model(run_dir)


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def large_tokenizer(folder):
    values = json.loads((folder / "tokenizer.json").read_text())
    values["added_tokens"].append({**values["added_tokens"][0], "id": 400, "content": "<more>"})
    (folder / "tokenizer.json").write_text(json.dumps(values))


def cut_weights(folder):
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-10])


def change_json(name, **changes):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def pickled(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


OF_THE_BASE = [
    (no_tokenizer, "has no tokenizer.json; put the model's own there"),
    (large_tokenizer, r"the tokenizer has \d+ tokens, the model \d+ rows; the files belong to different models"),
    (cut_weights, "restore the file"),
    (lambda folder: (folder / "config.json").unlink(), "give the run_dir of a lowmem run .*, a directory of transformers .* or an adapter"),
    (lambda folder: (folder / "generation_config.json").write_text("[]"), "generation_config.json is damaged"),
    (change_json("generation_config.json", eos_token_id="end"), "eos_token_id is 'end', expected the number of a token"),
]
OF_THE_ADAPTER = [
    (cut_weights, "adapter_model.safetensors is damaged"),
    (pickled, r"has no adapter_model.safetensors \(found: adapter_model.bin\); .*other formats can carry code"),
    (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json cannot be read"),
    (change_json("adapter_config.json", peft_type="P_TUNING"), "found peft_type 'P_TUNING', allowed: "),
    (change_json("adapter_config.json", task_type="SEQ_CLS"), "found task_type 'SEQ_CLS', allowed: CAUSAL_LM"),
    (change_json("adapter_config.json", init_lora_weights="pissa"), "init_lora_weights is 'pissa', which changes the base"),
    (change_json("adapter_config.json", base_model_name_or_path="/no/where"), "its base is /no/where: no such directory; give the base as"),
    (change_json("adapter_config.json", base_model_name_or_path=None), "names no base_model_name_or_path"),
    (change_json("adapter_config.json", r=8), r"does not fit the base .*lora_A.weight has shape \(4, 32\), expected \(8, 32\)"),
    (change_json("adapter_config.json", target_modules=["q_proj"]), "down_proj.lora_A.weight is unknown"),
    (change_json("adapter_config.json", target_modules=["q_proj", "down_proj", "o_proj"]), "o_proj.lora_A.weight is missing"),
    (change_json("adapter_config.json", target_modules=["c_attn"]), "does not fit the base .*give the base it was made for"),
]


@pytest.mark.parametrize(
    "which, change, message", [("base", *case) for case in OF_THE_BASE] + [("adapter", *case) for case in OF_THE_ADAPTER]
)
@pytest.mark.parametrize("outline", [True, False])
def test_what_is_wrong_with_a_directory_is_one_line(tmp_path, which, change, message, outline):
    save_base(tmp_path / "base")
    save_adapted(tmp_path / "base", tmp_path / "adapter")
    change(tmp_path / which)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_run_model(tmp_path / which, outline=outline)
    assert "\n" not in str(caught.value)
    assert not re.search(r"[a-z]Error\b", str(caught.value))


def test_an_adapter_of_a_wider_model_is_refused(tmp_path):
    save_base(tmp_path / "narrow")
    save_base(tmp_path / "wide", hidden_size=64)
    save_adapted(tmp_path / "wide", tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"does not fit the base \S+narrow: .*has shape \(4, 64\), expected \(4, 32\)"):
        load_run_model(tmp_path / "narrow", adapter=tmp_path / "adapter")


def test_what_only_some_directories_have(tmp_path):
    write_run(tmp_path / "run")
    save_base(tmp_path / "base")
    save_adapted(tmp_path / "base", tmp_path / "adapter")
    with pytest.raises(ConfigError, match="is a model of lowmem's own, which takes none; leave it out"):
        load_run_model(tmp_path / "run", adapter=tmp_path / "adapter")
    with pytest.raises(ConfigError, match="--checkpoint is 5, but .* is no lowmem run and has one state"):
        load_run_model(tmp_path / "base", 5)


def test_rows_that_an_adapter_brought_are_made(tmp_path):
    """Tokens that its base has no rows for, which PEFT alone would look up beyond the end."""
    from transformers import AutoModelForCausalLM

    save_base(tmp_path / "base")
    tokenizer = load_tokenizer(tmp_path / "base")
    rows = tokenizer.vocab_size
    larger = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    larger.resize_token_embeddings(rows + 2, mean_resizing=False)
    larger.save_pretrained(tmp_path / "larger")
    trained = save_adapted(tmp_path / "larger", tmp_path / "adapter", trainable_token_indices={"embed_tokens": [rows, rows + 1]})
    change_json("adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))(tmp_path / "adapter")
    shutil.copyfile(tmp_path / "base" / "tokenizer.json", tmp_path / "adapter" / "tokenizer.json")
    values = json.loads((tmp_path / "adapter" / "tokenizer.json").read_text())
    more = [{**values["added_tokens"][0], "id": rows + number, "content": f"<{number}>"} for number in range(2)]
    (tmp_path / "adapter" / "tokenizer.json").write_text(json.dumps({**values, "added_tokens": values["added_tokens"] + more}))
    run = load_run_model(tmp_path / "adapter")
    assert run.model.vocab_size == rows + 2
    tokens = torch.tensor([[rows, 3, rows + 1, 4]])
    with torch.no_grad():
        made, wanted = run.model(tokens), trained(input_ids=tokens).logits
    torch.testing.assert_close(made[..., :rows], wanted[..., :rows], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "changes"), [(torch.float32, {}), (torch.bfloat16, {"tie_embeddings": True}), (torch.float32, {"lorpt": 4})]
)
def test_blocks_may_be_elsewhere(tmp_path, dtype, changes):
    shape = replace(MODEL, **{**changes, **({"lorpt": LorptConfig(rank=4)} if "lorpt" in changes else {})})
    write_run(tmp_path / "run", shape, dtype=dtype)
    here, tokens = load_run_model(tmp_path / "run"), torch.arange(3, 15).view(1, -1)
    with temporary_storage("disk", tmp_path / "scratch", torch.device("cpu")) as storage, torch.inference_mode():
        elsewhere = load_run_model(tmp_path / "run", storage=storage)
        assert all(parameter.isnan().all() for parameter in elsewhere.model.blocks.parameters())
        assert torch.equal(elsewhere.model(tokens), here.model(tokens))
        assert {p.dtype for p in elsewhere.model.parameters()} == {p.dtype for p in here.model.parameters()}
        texts = [generate_batch(run.model, run.tokenizer, ["some", "a"], SamplingOptions(temperature=0), 9) for run in (here, elsewhere)]
        assert [text.token_ids for text in texts[0]] == [text.token_ids for text in texts[1]]
    assert not list((tmp_path / "scratch").iterdir())


def test_blocks_whose_sizes_change_stay_here(tmp_path):
    write_run(tmp_path / "run", replace(MODEL, lorpt=LorptConfig(rank=4, schedule={5: 6})))
    with temporary_storage("disk", tmp_path, torch.device("cpu")) as storage, pytest.raises(ConfigError, match="whose sizes change"):
        load_run_model(tmp_path / "run", storage=storage)
