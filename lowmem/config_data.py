"""The part of the configuration that says what is learned from: sources, their tokenizer, and the phases of a run. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class SourceConfig:
    """One source of text. Exactly one of `path`, `hub`, `stdlib` is set."""

    path: str = ""
    """A file, a folder or a glob: .txt .jsonl .parquet, each also .gz .bz2 .xz .zst. Relative to the working directory. Links are followed;
    names that begin with a dot are passed over unless they are spelled out."""
    hub: str = ""
    """A Hugging Face dataset by name."""
    stdlib: bool = False
    """The sources and docstrings of the running Python's own standard library: tens of megabytes on every machine."""
    weight: float = 1.0
    """Share of the training sequences drawn from this source, relative to the other sources' weights."""
    weight_schedule: dict[int, float] = field(default_factory=dict)
    """Weight from given steps of the phase on, instead of `weight`: {0: 1, 2000: 0.2} goes from one to the other in a straight line and
    stays there. 0 draws nothing."""
    text_field: str = "text"
    """Field that holds the text, in .jsonl, .parquet and hub datasets."""
    subset: str = ""
    """Configuration name of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset."""
    streaming: bool = False
    """Stream a hub dataset too large to store: it is tokenised on the fly, its position kept in the checkpoint."""
    max_bytes: int = 0
    """Stop after this many bytes of text; 0 reads everything."""

    def weight_at(self, step: int) -> float:
        """The weight at a step of the phase: `weight`, or what the straight lines of `weight_schedule` give."""
        points = sorted(self.weight_schedule.items())
        if not points:
            return self.weight
        before = [point for point in points if point[0] <= step]
        after = [point for point in points if point[0] > step]
        if not before or not after:
            return (before[-1:] or after[:1])[0][1]
        (start, low), (stop, high) = before[-1], after[0]
        return low + (high - low) * (step - start) / (stop - start)


@dataclass
class DataConfig:
    """Text, tokenizer and sequences."""

    sources: list[SourceConfig] = field(default_factory=lambda: [SourceConfig(stdlib=True)])
    """Where text comes from; several sources are mixed by weight."""
    exhausted: Literal["repeat", "drop", "stop"] = "repeat"
    """When a source has been gone through once: repeat it in another order; drop it and mix the others; or stop, ending the phase."""
    tokenizer: str = "bpe"
    """bpe | chunk | bytes | chars (trained on the corpus where that applies), a tokenizer.json, a folder with one, or a hub name."""
    tokenizer_vocab_size: int = 4096
    """Vocabulary to train, for bpe and chunk; the other tokenizers have a size of their own and refuse another value."""
    lowercase: bool = True
    """Chunk tokenizer only: lower-case the text first, as published; false makes it lossless."""
    seq_len: int = 256
    """Tokens a training sequence predicts; the longest ones, where `train.seq_len_schedule` begins with shorter ones."""
    document_mask: bool | Literal["auto"] = "auto"
    """Keep the documents of a window apart: no token sees one of the document before, and positions begin anew; where a document ends is
    marked by every tokenizer. auto: on for decoders on a CPU; off on GPUs, whose fused attention kernel cannot, and for i3, whose state
    goes on into the next document."""
    decode_errors: Literal["fail", "replace"] = "fail"
    """Bytes that are not UTF-8: stop naming file and line, or replace them with U+FFFD and count them."""
    val_fraction: float = 0.01
    """Share of the text held out for validation: whole blocks of tokens that training never sees."""
    val_split: Literal["blocks", "tail"] = "blocks"
    """blocks: blocks spread over the whole text. tail: the last val_fraction of each source, the usual split of small benchmarks."""
    val_source: str = ""
    """A file or glob of validation text instead of a held-out share."""
    cache_dir: str = ""
    """Where token shards are kept; empty puts them below the user's cache directory."""


@dataclass
class PhaseConfig:
    """A part of a run with data of its own: pretraining on text, fine-tuning on conversations. Weights, optimizer states and tokenizer
    carry over to the next phase; the learning rate's schedule begins anew."""

    name: str = ""
    """For messages and metrics; empty is the kind and the number."""
    kind: Literal["text", "chat"] = "text"
    """text: predict every token. chat: conversations, of which only what the assistant says is learned."""
    steps: int = 0
    """Optimizer steps; 0 derives them from `tokens`. Exactly one of the two is set."""
    tokens: int | float | str = 0
    """Tokens of batches, padding included, such as 5M; rounded up to whole steps."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Data of this phase; empty takes data.sources. chat takes files (.json .jsonl .txt .parquet) or hub datasets of messages,
    prompt/response, instruction/output or [INST] text."""
    lr: float = 0.0
    """Peak learning rate; 0 takes optim.lr."""
    warmup_steps: int = -1
    """Linear warm-up of this phase; -1 takes optim.warmup_steps."""
    template: str = ""
    """chat only: a Jinja file, as in transformers; empty takes the one that comes with the tokenizer, else [INST] and [/INST] around
    what the user says."""
    truncation: Literal["cut", "drop"] = "cut"
    """chat only: conversations longer than data.seq_len are cut there, or left out. Either is counted and said."""
