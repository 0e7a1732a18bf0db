"""Exported directories against the models they came from: logits, generation, tokenizers; and that they need nothing of lowmem."""

import json
import subprocess
import sys

import pytest
import torch

from lowmem.data.hf_tokenizer import HuggingFaceTokenizer
from lowmem.data.tokenizers import ByteTokenizer, CharTokenizer, ChunkTokenizer
from lowmem.engine.run_model import RunModel
from lowmem.export.hf import export_run_model, hf_model
from lowmem.system.errors import ConfigError
from tests.reference.random_models import SHAPES, make_run, tolerance

TEXT = "The ship sails with them; héllo wörld 42.\n\n  <|endoftext|> ends"


@pytest.mark.parametrize("name", SHAPES)
def test_logits_and_generation_equal_lowmems(name, tmp_path):
    from transformers import AutoModelForCausalLM

    choices, family = SHAPES[name]
    run = make_run(choices)
    tokens = torch.tensor([run.tokenizer.encode(TEXT)[:40], run.tokenizer.encode(TEXT[::-1])[:40]])
    with torch.no_grad():
        expected = run.model(tokens)
    done = export_run_model(run, tmp_path / "out")
    assert (done.family, done.model_code) == (family, family == "lowmem")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=done.model_code).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(tokens).logits, expected, rtol=0, atol=tolerance(expected))
        # padding on the left changes nothing
        padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), tokens], 1)
        mask = torch.cat([torch.zeros(2, 5), torch.ones(2, 40)], 1).long()
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        found = loaded(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
        assert torch.allclose(found, expected, rtol=0, atol=tolerance(expected))
        written = loaded.generate(tokens[:1, :7], max_new_tokens=12, do_sample=False)[0]
    assert written.tolist() == greedy(run, tokens[0, :7].tolist(), 12)


@pytest.mark.parametrize("name", ["llama", "gpt2", "silu", "i3"])
def test_the_model_in_memory_is_the_one_in_the_directory(name):
    run = make_run(SHAPES[name][0])
    tokens = torch.tensor([run.tokenizer.encode(TEXT)[:40]])
    with torch.no_grad():
        expected = run.model(tokens)
        assert torch.allclose(hf_model(run)(tokens).logits, expected, rtol=0, atol=tolerance(expected))


def test_factors_may_be_kept(tmp_path):
    run = make_run(SHAPES["llama-from-lorpt"][0])
    before = run.model.num_parameters()
    done = export_run_model(run, tmp_path / "out", keep_factors=True, dtype="bf16")
    assert (done.family, done.parameters) == ("lowmem", before)
    assert done.weight_bytes < 2.5 * before


CHUNKS = ChunkTokenizer.train([TEXT * 3, "the cat and the hat"], lowercase=True)
TOKENIZERS = {
    "bytes": ByteTokenizer(),
    "chars": CharTokenizer("".join(set(TEXT) - {"w"})),
    "chars-replacement": CharTokenizer("ab\ufffd\n"),
    "chunk": CHUNKS,
    "chunk-capped": ChunkTokenizer.train([TEXT], lowercase=False, vocab_size=60),
    "bpe": HuggingFaceTokenizer.train([TEXT * 3], 300),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_give_the_same_ids_and_text(name, tmp_path):
    from transformers import AutoTokenizer

    ours = TOKENIZERS[name]
    done = export_run_model(make_run({}, ours), tmp_path / "out")
    assert done.tokenizer_code == name.startswith("chunk")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=done.tokenizer_code)
    for text in (TEXT, "Other ẞtuff\twas\u2003here", "a", "", " the  the hat", "日本語 the \ufffd", "e\u0301\r\n\x00👩\u200d🚀"):
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(ids) == ours.decode(ids)
    everything = [*range(0, ours.vocab_size, 2), ours.eos_id, *range(ours.vocab_size)]  # ids in an order that no text has
    assert theirs.decode(everything) == ours.decode(everything)
    assert theirs.eos_token_id == ours.eos_id
    assert len(theirs) == ours.vocab_size
    theirs.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=done.tokenizer_code)
    assert again(TEXT)["input_ids"] == theirs(TEXT)["input_ids"]


PIPELINE = """
import json, sys
for name in ("lowmem", "peft", "torchao", "deepspeed", "bitsandbytes"):
    sys.modules[name] = None  # as if it were not installed
from transformers import pipeline
write = pipeline("text-generation", model=sys.argv[1], trust_remote_code=True)
print(json.dumps(write(["the", "the cat"], max_new_tokens=5, do_sample=False, batch_size=2)))
"""


def test_a_directory_that_carries_everything_runs_where_lowmem_is_not(tmp_path):
    run = make_run(SHAPES["i3"][0], CHUNKS)
    export_run_model(run, tmp_path / "out")
    result = subprocess.run([sys.executable, "-c", PIPELINE, str(tmp_path / "out")], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for (found,), prompt in zip(json.loads(result.stdout.splitlines()[-1]), ("the", "the cat"), strict=True):
        ids = greedy(run, run.tokenizer.encode(prompt), 5)
        assert found["generated_text"] == run.tokenizer.decode(ids).replace("<|endoftext|>", "")


@pytest.mark.parametrize("name", ["alibi", "i3"])
def test_beams_and_padded_batches_with_a_cache_are_those_without(name, tmp_path):
    """Beams are reordered and shorter texts padded; the recurrent state of i3 has to follow."""
    run = make_run(SHAPES[name][0])
    model = hf_model(run)
    texts = [run.tokenizer.encode(TEXT)[:9], run.tokenizer.encode(TEXT)[20:24]]
    tokens = torch.tensor([texts[0], [0] * 5 + texts[1]])
    choices = {"attention_mask": (torch.arange(9) >= torch.tensor([[0], [5]])).long(), "max_new_tokens": 8, "do_sample": False}
    for beams in (1, 3):
        with_cache, without = (model.generate(tokens, num_beams=beams, use_cache=use_cache, **choices) for use_cache in (True, False))
        assert torch.equal(with_cache, without)
        if beams == 1:
            assert with_cache[1, 5:].tolist() == greedy(run, texts[1], 8)


def test_texts_that_a_mask_keeps_apart_are_as_if_alone():
    run = make_run(SHAPES["rope-layernorm"][0])
    texts = [run.tokenizer.encode(TEXT)[:9], run.tokenizer.encode(TEXT)[20:31]]
    segment = torch.tensor([0] * 9 + [1] * 11)
    positions = torch.tensor([[*range(9), *range(11)]])
    with torch.no_grad():
        expected = torch.cat([run.model(torch.tensor([ids])) for ids in texts], 1)
        mask = (segment[:, None] == segment).view(1, 1, 20, 20)
        found = hf_model(run)(torch.tensor([texts[0] + texts[1]]), attention_mask=mask, position_ids=positions).logits
    assert torch.allclose(found, expected, rtol=0, atol=tolerance(expected))


def greedy(run: RunModel, ids: list[int], count: int) -> list[int]:
    """`ids` and the likeliest `count` tokens after them by lowmem's model, or up to the end of the text."""
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(run.model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == run.tokenizer.eos_id:
            break
    return ids


@pytest.mark.parametrize("name", ["llama", "silu-some", "i3"])
def test_what_transformers_saves_of_the_model_in_memory_is_whole(name, tmp_path):
    from transformers import AutoModelForCausalLM

    run = make_run(SHAPES[name][0])
    tokens = torch.tensor([run.tokenizer.encode(TEXT)[:40]])
    hf_model(run).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=name != "llama").eval()
    with torch.no_grad():
        expected = run.model(tokens)
        assert torch.allclose(loaded(tokens).logits, expected, rtol=0, atol=tolerance(expected))


def test_learned_positions_end_with_a_message():
    model = hf_model(make_run(SHAPES["i3"][0]))
    with pytest.raises(ValueError, match="more tokens than the 48 positions"):
        model(torch.zeros(1, 49, dtype=torch.long))
    with pytest.raises(ValueError, match="attention_mask of two dimensions"):
        model(torch.zeros(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))


def test_a_full_folder_is_refused_unless_told_otherwise(tmp_path):
    run = make_run(SHAPES["i3"][0], CHUNKS)
    export_run_model(run, tmp_path / "out")
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="which is not empty; choose another folder, or --overwrite"):
        export_run_model(run, tmp_path / "out")
    export_run_model(make_run({}), tmp_path / "out", overwrite=True)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"mine.txt", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
