"""Tiny tokenizers of the kinds that are in use, each with its own way to begin a text."""

import json
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lowmem.data.hf_tokenizer import HuggingFaceTokenizer

SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
TEXTS = ["hello, how are you? I am fine. the quick brown fox USER: ASSISTANT: [INST] [/INST] user assistant\n"] * 20


KINDS = ("bytes", "lower", "first", "always", "prepend", "unigram")


@cache
def library(kind: str) -> Tokenizer:
    """A tiny tokenizer of a kind that is in use, trained on TEXTS."""
    split = pre_tokenizers.Metaspace(prepend_scheme="always")
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.Unigram() if kind == "unigram" else models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False) if kind in ("bytes", "lower") else split
    options = {"vocab_size": 420, "special_tokens": [*SPECIAL, *([] if kind in ("bytes", "lower") else bytes_)], "show_progress": False}
    if kind == "unigram":
        trainer = trainers.UnigramTrainer(**options, unk_token="<unk>")
    else:
        alphabet = pre_tokenizers.ByteLevel.alphabet() if kind in ("bytes", "lower") else []
        trainer = trainers.BpeTrainer(**options, initial_alphabet=alphabet)
    trained.train_from_iterator(TEXTS, trainer)
    values = json.loads(trained.to_str())
    if kind not in ("bytes", "lower", "unigram"):
        values["model"] |= {"byte_fallback": True, "fuse_unk": True}
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(values))
    if kind == "prepend":
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind in ("first", "always"):
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    elif kind == "unigram":
        tokenizer.normalizer = normalizers.NFKC()
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        tokenizer.decoder = decoders.ByteLevel()
    if kind == "lower":
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.add_special_tokens([AddedToken("<|im_end|>", normalized=True, rstrip=True, special=True)])
    return tokenizer


def tokenizer_of(kind: str) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(Tokenizer.from_str(library(kind).to_str()), "</s>")
