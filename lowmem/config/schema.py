"""The configuration of a run: one dataclass per section, a docstring under every field. Imports no torch.

`lowmem.config.checks` finds contradictions between fields, `lowmem.config.load` reads YAML and the command line.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from lowmem.system.units import parse_count


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
    kind: Literal["text", "chat"] = "text"
    """text: predict every token. chat: conversations, of which only what the assistant says is learned. Where there are phases each has a
    kind of its own."""
    template: str = ""
    """chat only: a Jinja file, as in transformers; empty takes the one that comes with the tokenizer, else [INST] and [/INST] around
    what the user says."""
    truncation: Literal["cut", "drop"] = "cut"
    """chat only: conversations longer than data.seq_len are cut there, or left out. Either is counted and said."""
    add_tokens: list[str] = field(default_factory=list)
    """New tokens of a model of transformers and of its tokenizer. Their rows begin at the mean of the old ones and are trained."""
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


@dataclass
class LorptConfig:
    """Low-rank pretraining: which linear layers are stored as two thin factors (D1). With model.path these are linear layers of its blocks,
    and the factors begin as the best approximation of their weights, by truncated SVD while they are read."""

    rank: int | Literal["auto"] = 0
    """Rank of the factored layers; 0 keeps every layer dense. Must save parameters: below in*out/(in+out). auto: half of each dense
    layer's weights, which is a quarter of the width of a square one."""
    targets: list[Literal["attention", "mlp", "head"]] = field(default_factory=lambda: ["attention", "mlp"])
    """Which groups of linear layers are factored: attention (q, k, v, out), mlp, head (untied only, and not with model.path)."""
    ranks: dict[str, int | Literal["auto"]] = field(default_factory=dict)
    """Rank by module-name pattern, such as {"blocks.0.*": 0, "*.down": 128}; first match wins over `rank`; 0 is dense. With model.path
    names are those of transformers, such as {"model.layers.0.*": 0, "*.down_proj": 128}."""
    bottleneck: Literal["auto", "linear", "silu"] = "auto"
    """Non-linearity between the two factors. silu learns far better, but cannot be merged into one matrix; linear can. auto: silu; for i3
    linear, as published; with model.path linear, the only one."""
    init: Literal["original", "product_variance", "spectral"] = "product_variance"
    """original: 0.02 * randn for both factors, as published. product_variance: the product has the variance of a dense layer. spectral:
    the largest singular values of a random dense layer."""
    schedule: dict[int, int] = field(default_factory=dict)
    """Rank from a step on, such as {1000: 64, 2000: 128}. Growing leaves the function as it is, shrinking keeps its largest parts;
    optimizer states follow. Layers named in `ranks` keep theirs. May be changed when a run is resumed."""
    grow_to: int = 0
    """Double the rank, up to this, whenever `grow_patience` evaluations in a row were not 0.1 % better than the best before; 0 is never."""
    grow_patience: int = 3
    """Evaluations; see `grow_to`."""
    share_down: bool = False
    """Let gate and up share one downward factor, and q, k and v another: one latent for all that read the same input. Their rank is then
    that of the one layer they form."""

    def largest_rank(self) -> int:
        """The highest rank that the schedule or plateaus may reach; 0 without either."""
        return max([0, *self.schedule.values(), self.grow_to])


@dataclass
class ModelConfig:
    """The shape of the model. Defaults are a Llama-like decoder."""

    path: str = ""
    """A directory of a causal language model of transformers, or its name on the hub; empty: lowmem's own model.name. Shape, vocabulary
    and weights are then its own, and so is the tokenizer unless data.tokenizer names another than its default."""
    revision: str = ""
    """Branch, tag or commit of a model.path on the hub; empty is the newest."""
    name: Literal["decoder", "i3"] = "decoder"
    """decoder: a transformer. i3: the recurrent-hybrid model with low-rank attention (a reconstruction of i3-12m)."""
    dim: int = 256
    """Width of the residual stream."""
    hidden_dim: int = 0
    """Width inside the MLP; 0 picks 8/3 * dim rounded up to a multiple of 64 for swiglu, 4 * dim for gelu."""
    num_layers: int = 4
    """Number of blocks."""
    num_heads: int = 4
    """Attention heads; must divide dim. i3 uses one."""
    num_kv_heads: int = 0
    """Heads of keys and values, each of which serves as many query heads as the others (grouped-query attention): fewer keep a smaller
    cache. Must divide num_heads; 0 takes num_heads."""
    vocab_size: int = 0
    """Rows of the embedding; 0 takes the tokenizer's size. Larger than the tokenizer's is allowed, smaller is not."""
    max_seq_len: int = 0
    """Longest sequence the model accepts; 0 takes data.seq_len. Only learned positions cost memory with it."""
    positions: Literal["rope", "alibi", "learned"] = "rope"
    """How order is told: rotary, a linear bias on attention scores, or a learned table."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation before each sub-layer."""
    norm_eps: float = 0.0
    """Added to the variance; 0 takes 1e-6 for rmsnorm and 1e-5 for layernorm."""
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    """swiglu has three matrices in the MLP, gelu two; gelu_tanh is gelu by tanh, as in GPT-2."""
    bias: bool = False
    """Biases in the linear layers of the blocks, as in GPT-2; i3 always has them."""
    tie_embeddings: bool = False
    """Use the embedding matrix as the output head."""
    attention_rank: int = 0
    """Low-rank KQV: rank of the query, key and value maps, and width of what the KV cache keeps; 0 is full rank. Must be below dim / 2."""
    state_dim: int = 32
    """Width of the recurrent state of i3's hybrid cell."""
    lorpt: LorptConfig = field(default_factory=LorptConfig)
    """Low-rank pretraining of the linear layers."""


AUTO_MICRO_BATCH_TOKENS = 4096
STATE_WIDTHS = {"adamw": (32, 8, 4), "lion": (32, 8), "spectron": (32, 8)}  # bits that the states of an optimizer may have


@dataclass
class OptimConfig:
    """The optimizer and its schedule."""

    name: Literal["adamw", "lion", "spectron"] = "adamw"
    """adamw; lion (half the states; use about a third of AdamW's lr); or spectron: orthogonal momentum for matrices and LoRPt factors
    (half the states), AdamW for the rest. Learns fastest, and costs little where matrices are thin, as LoRPt's are."""
    lr: float = 1e-3
    """Peak learning rate."""
    matrix_lr: float = 0.0
    """spectron only: peak learning rate of matrices and factors; 0 takes `lr`."""
    momentum: float = 0.95
    """spectron only: decay of the running average of the gradient of matrices and factors."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running averages."""
    eps: float = 1e-8
    """AdamW's denominator offset."""
    weight_decay: float = 0.1
    """Decoupled decay; never applied to norms, biases, embeddings and other 1-D parameters."""
    state_bits: Literal[32, 8, 4] = 32
    """Bits per optimizer state. 8 and 4 cost 2 and 1 bytes a parameter for adamw; 8 costs 1 for lion and spectron, which have no 4. Norms,
    biases and tensors of fewer than 4096 elements keep 32; where 4 is asked for, matrices whose rows are no multiple of 128 have 8."""
    backend: Literal["lowmem", "bitsandbytes"] = "lowmem"
    """Whose kernels keep 8-bit states: lowmem's, on every device, or bitsandbytes', which are quick on CUDA."""
    clip: float = 1.0
    """Global gradient norm is clipped to this; 0 does not clip."""
    clip_by: Literal["auto", "global", "previous", "block"] = "auto"
    """Which norm decides. global: this step's. A layerwise update knows it too late: previous estimates it from this step's norm so
    far and the share that it had in previous steps; block clips each block's own norm to clip / sqrt(blocks), so that the global norm stays
    below clip. auto: previous if layerwise, else global."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Decay after warm-up, until the last step of the run; of each phase, where there are several. wsd is constant until the last
    `decay_fraction` of those steps, then linear."""
    warmup_steps: int = 100
    """Linear warm-up from 0, at the beginning of the run and of each phase; cut to its steps where it is longer."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end of the decay, relative to lr."""
    decay_fraction: float = 0.2
    """wsd only: share of the steps, warm-up included, that are spent decaying; what the warm-up takes is not decayed in."""


@dataclass
class DistillConfig:
    """Learning from the predictions of a larger model, besides the text."""

    teacher: str = ""
    """Run directory of a trained model with the same tokenizer; empty does without. Its weights are part of the run's memory."""
    weight: float = 0.5
    """Share of the loss that is the distance from the teacher's predictions; the rest is the usual loss."""
    temperature: float = 1.0
    """Softens both distributions; above 1 the teacher's unlikely tokens count more."""


@dataclass
class TrainConfig:
    """How long and how a step is computed."""

    steps: int = 0
    """Optimizer steps; 0 derives them from `tokens`. Exactly one of the two is set."""
    tokens: int | float | str = 0
    """Tokens to train on, such as 5M or 1.5B; rounded up to whole steps."""
    global_batch_size: int = 32
    """Sequences per optimizer step, over all ranks and micro-batches."""
    seq_len_schedule: dict[int, int] = field(default_factory=dict)
    """Length of sequences from given steps on, such as {0: 256, 500: 512, 1000: 1024}; the longest is data.seq_len. Every step has as many
    tokens, so shorter sequences are more of them: global_batch_size and micro_batch_size count sequences of data.seq_len."""
    micro_batch_size: int | Literal["auto"] = "auto"
    """Sequences computed at once on one rank: memory and speed, never the result beyond the rounding of fp32 sums. auto: at most 4096
    tokens, and no more than is predicted to fit the budget. 16-bit weights have 16-bit gradients where a step is one micro-batch, and
    fp32 sums of them where it is several."""
    update: Literal["accumulate", "layerwise"] = "accumulate"
    """accumulate: gradients of all micro-batches are summed, then the optimizer steps. layerwise: each block's gradient is summed over
    the global batch, applied and freed before the next one exists; gradients cost one block, boundary activations the global batch."""
    boundary_dtype: Literal["same", "bf16"] = "same"
    """layerwise: what boundary activations are kept in; same is the dtype of the residual stream. bf16 rounds it at every block."""
    boundary_offload: Literal["none", "cpu", "disk"] = "none"
    """layerwise: cpu keeps boundary activations of a GPU in host memory, copied while it computes; disk keeps them in a scratch file."""
    weights_at: Literal["device", "host", "disk"] = "device"
    """layerwise: where the weights and optimizer states of blocks live. host: of a GPU in pinned host memory; disk: in a scratch file. Two
    blocks are on the device then, one computed with, one on its way, and the result is the same to the bit. See
    docs/larger-than-memory.md."""
    storage_dir: str = ""
    """Folder of the scratch files of weights_at=disk and boundary_offload=disk, best on an SSD; empty is run_dir. They have no name and are
    gone when the run ends, however it ends."""
    activation_checkpointing: Literal["auto", "none", "block", "selective", "low_rank"] = "auto"
    """selective: compute norms and activation functions again instead of keeping them, at no measurable cost; low_rank: of LoRPt layers
    keep only the rank-sized latents; block: keep only each block's input; none: keep everything. The result is the same to the bit. auto:
    selective for lowmem's own models, block for those of model.path, which have no selective and no low_rank."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = "auto"
    """What is computed in. auto: bf16 where the device has it natively, else fp16 on a GPU and fp32 on a CPU. fp8: products of dense layers
    in fp8 on GPUs that have it, all else in bf16. See docs/precision.md."""
    weight_dtype: Literal["fp32", "bf16", "fp16", "int8", "int4", "nf4"] = "fp32"
    """What is stored. bf16 and fp16 halve weights and gradients and keep no master copy: updates are rounded stochastically. bf16 needs
    precision bf16; fp16, for GPUs without bf16, needs precision fp16 and a layerwise update. int8 and int4 store matrices in 1.03
    and 0.53 bytes an element (embedding and head never below int8), the rest in the dtype of `precision`; with model.path each is quantised
    as it is read. nf4 stores the frozen linear
    layers of a model of transformers below an adapter in 0.53 (QLoRA). See docs/precision.md."""
    double_quant: bool = True
    """nf4 only: keep its scales in 8 bits, too."""
    loss_chunk_tokens: int = 0
    """Tokens whose logits are alive at once in the loss; 0 picks about 16 MiB of logits, but no fewer than dim / 2 tokens."""
    label_smoothing: float = 0.0
    """Share of the target's probability spread over the vocabulary."""
    z_loss: float = 0.0
    """Weight of log(Z)^2, which keeps logits from drifting; 1e-4 is usual."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """Learn from a teacher's predictions, too."""
    init_from: str = ""
    """Run directory, trained or imported, whose weights a new run starts from; empty starts from random ones. Same model and tokenizer."""
    seed: int = 0
    """Seed of the initial weights and of the data order."""
    save_every: int = 100
    """Steps between checkpoints; 0 saves only at the end and on a signal."""
    keep_last: int = 2
    """Checkpoints kept besides the best one."""
    eval_every: int = 100
    """Steps between evaluations on the held-out text; 0 never evaluates."""
    eval_sequences: int = 64
    """Sequences per evaluation, always the same ones; 0 takes the whole held-out text."""
    max_bad_steps: int = 10
    """Stop with exit code 6 after this many steps in a row with a non-finite loss or gradient; each such update is skipped."""
    threads: int = 0
    """CPU threads per process; 0 uses every core the process may run on, divided among the ranks of this machine."""


AdapterMethod = Literal["none", "lora", "dora", "rslora", "lora_plus", "prefix", "ia3", "head", "last_k"]


@dataclass
class AdapterConfig:
    """What is trained besides or instead of the weights of a model of transformers; names are PEFT's."""

    method: AdapterMethod = "none"
    """none: every weight. An adapter beside frozen weights: lora, dora, rslora, lora_plus, ia3, prefix. A part of the weights: head, or
    last_k blocks. QLoRA is lora with train.weight_dtype=nf4."""
    r: int = 8
    """Rank of LoRA and its kin."""
    lora_alpha: float = 16.0
    """Scale: the adapter counts alpha / r, with rslora alpha / sqrt(r)."""
    lora_dropout: float = 0.0
    """Dropout on what enters the adapter; train.update=accumulate only."""
    target_modules: list[str] = field(default_factory=list)
    """Names of the layers that get an adapter; empty is every linear layer but the head."""
    loraplus_lr_ratio: float = 16.0
    """lora_plus only: the learning rate of B is so many times that of A; at least 1."""
    num_virtual_tokens: int = 20
    """prefix only: trained keys and values in each layer, which every token attends; texts begin at the position after them."""
    last_k: int = 1
    """last_k only: blocks that are trained, counted from the end, with the final norm."""
    merge: bool = True
    """At the end of a run on model.path write run_dir/merged, the whole model as transformers loads it, beside run_dir/adapter. A prefix
    cannot be merged."""

    def prefix_tokens(self) -> int:
        """Positions before a text that a prefix takes."""
        return self.num_virtual_tokens if self.method == "prefix" else 0


@dataclass
class EngineConfig:
    """Who computes the step (D4)."""

    name: Literal["local", "deepspeed"] = "local"
    """local: one process, one device, the least memory. deepspeed: ZeRO, several devices or machines. Its launcher selects deepspeed."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What DeepSpeed partitions over ranks: 1 states, 2 and gradients, 3 and weights."""
    offload: Literal["none", "cpu"] = "none"
    """DeepSpeed: keep optimizer states (and, at stage 3, weights) in host memory. Needs zero_stage 1, 2 or 3."""
    config: str = ""
    """A DeepSpeed JSON file for everything else; its zero stage and offload win over the two fields above."""


@dataclass
class BudgetConfig:
    """Memory and disk the run may use; empty is no limit, "0" is no such device."""

    ram: str = ""
    """Host memory, such as 4GiB; enforced: a run past it ends with exit code 3 instead of the kernel's OOM killer."""
    vram: str = ""
    """Device memory, such as 6GiB; enforced through the allocator."""
    disk: str = ""
    """Room on disks, such as 40GiB, for scratch files, the checkpoints that are kept, and token shards where their size is known; a run
    predicted to take more is refused. 0: blocks and boundaries stay in memory."""


@dataclass
class RunConfig:
    """Everything that determines a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model's shape."""
    data: DataConfig = field(default_factory=DataConfig)
    """Text, tokenizer and sequences."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and schedule."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length, batch, precision, saving."""
    phases: list[PhaseConfig] = field(default_factory=list)
    """Parts of the run, one after the other, such as pretraining and chat; empty is one phase of train.steps on data.sources."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """What is trained of a model of transformers, if not all of it."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Local or DeepSpeed."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    """Memory limits."""
    loggers: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    """Extra places for metrics, beside metrics.jsonl."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if there is a usable one."""
    run_dir: str = "runs/default"
    """Where the run's files go; running the same command again resumes it."""

    def all_phases(self) -> list[PhaseConfig]:
        """The phases with their names and steps; one where none is given."""
        data, train = self.data, self.train
        whole = PhaseConfig(kind=data.kind, steps=train.steps, tokens=train.tokens, template=data.template, truncation=data.truncation)
        given = self.phases or [whole]
        per_step = self.train.global_batch_size * self.data.seq_len
        return [
            replace(phase, name=phase.name or f"{phase.kind}-{number}", steps=phase.steps or -(-parse_count(phase.tokens) // per_step))
            for number, phase in enumerate(given, start=1)
        ]

    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return sum(phase.steps for phase in self.all_phases())

    def seq_len_at(self, step: int) -> int:
        """Tokens a sequence of text predicts in the step after `step`."""
        due = [start for start in self.train.seq_len_schedule if start <= step]
        return self.train.seq_len_schedule[max(due)] if due else self.data.seq_len

    def max_seq_len(self) -> int:
        """Longest sequence the model accepts."""
        return self.model.max_seq_len or self.data.seq_len


def auto_micro_batch_sizes(sequences: int, seq_len: int) -> list[int]:
    """Divisors of `sequences` of at most 4096 tokens, the largest first."""
    limit = max(1, AUTO_MICRO_BATCH_TOKENS // seq_len)
    return [size for size in range(min(sequences, limit), 0, -1) if sequences % size == 0]


def state_width_problems(optim: OptimConfig) -> list[str]:
    """States narrower than the optimizer can learn with."""
    allowed = STATE_WIDTHS[optim.name]
    if optim.state_bits in allowed:
        return []
    widths = " or ".join(str(width) for width in allowed)
    return [
        f"optim.state_bits is {optim.state_bits}, but optim.name={optim.name} learns only with {widths}: its momentum would be mostly "
        f"rounding; use optim.state_bits={min(allowed)}, or optim.name=adamw"
    ]


def resolve_micro_batch_size(config: RunConfig, world_size: int) -> int:
    """Sequences computed at once on one rank.

    Args:
        world_size: ranks that share the global batch.
    Raises:
        ValueError: the global batch does not split evenly; the message says what would.
    """
    per_rank, rest = divmod(config.train.global_batch_size, world_size)
    if rest or not per_rank:
        raise ValueError(
            f"train.global_batch_size is {config.train.global_batch_size}, which {world_size} ranks cannot share evenly; "
            f"use a multiple of {world_size}"
        )
    wanted = config.train.micro_batch_size
    if wanted == "auto":
        return auto_micro_batch_sizes(per_rank, config.data.seq_len)[0]
    if per_rank % wanted:
        low = [size for size in range(1, math.isqrt(per_rank) + 1) if per_rank % size == 0]
        divisors = sorted({*low, *(per_rank // size for size in low)})
        nearest = [*(size for size in divisors if size < wanted)][-8:] + [*(size for size in divisors if size > wanted)][:8]
        raise ValueError(
            f"train.micro_batch_size is {wanted}, which does not divide the {per_rank} sequences of a rank; "
            f"allowed: {', '.join(map(str, nearest))} or auto"
        )
    return wanted
