"""Contradictions between the fields of a configuration, all of them at once; `lowmem.config.keys` has what each field may hold."""

from collections.abc import Sequence

from lowmem.config.schema import (
    AdapterConfig,
    DataConfig,
    LorptConfig,
    ModelConfig,
    PhaseConfig,
    RunConfig,
    SourceConfig,
    resolve_micro_batch_size,
    state_width_problems,
)
from lowmem.system.units import parse_bytes, parse_count


def source_problems(sources: Sequence[SourceConfig], where: str, exhausted: str = "repeat") -> list[str]:
    """What is wrong with a list of sources.

    Args:
        where: its key, such as data.sources.
        exhausted: what is to happen at the end of a source.
    """
    problems = []
    for index, source in enumerate(sources):
        key = f"{where}[{index}]"
        given = [name for name in ("path", "hub", "stdlib") if getattr(source, name)]
        if len(given) != 1:
            problems.append(f"{key} has {' and '.join(given) or 'no source'}; set exactly one of path, hub, stdlib")
        if source.max_bytes < 0:
            problems.append(f"{key}.max_bytes is {source.max_bytes}, must be 0 (everything) or more")
        idle = {"subset": source.subset != "", "split": source.split != "train", "streaming": source.streaming}
        idle["text_field"] = source.stdlib and source.text_field != "text"
        if len(given) == 1 and not source.hub and (names := [name for name, is_set in idle.items() if is_set]):
            problems.append(f"{key} has {' and '.join(names)}, which has no effect on {given[0]}; remove it, or use hub")
        if source.streaming and source.hub and exhausted != "repeat":
            problems.append(f"{key} is streamed, so nobody knows when it is exhausted; use data.exhausted=repeat, or store it")
    points = sorted({step for source in sources for step in source.weight_schedule})
    for step in points:
        if not any(source.weight_at(step) > 0 for source in sources):
            problems.append(f"{where}: all weights are 0 at step {step}; leave one above 0")
    return problems


def length_problems(where: str, steps: int, tokens: int | float | str) -> list[str]:
    """Exactly one of steps and tokens is set."""
    try:
        count = parse_count(tokens)
    except ValueError as error:
        return [f"{where}.tokens: {error}"]
    return [f"{where}.steps is {steps} and {where}.tokens is {tokens}; set exactly one of the two"] if bool(steps) == bool(count) else []


def phase_problems(config: RunConfig) -> list[str]:
    """What is wrong with the phases and with the schedule of lengths."""
    problems = _schedule_problems(config)
    data = config.data
    if config.phases and (data.template, data.truncation) != ("", "cut"):
        problems.append("data.template and data.truncation are those of a run without phases; set them in each phase")
    elif data.kind == "text" and not config.phases and (data.template or data.truncation != "cut"):
        problems.append("data.template and data.truncation are for conversations; remove them, or set data.kind=chat")
    elif data.kind == "chat" and not config.phases and any(source.stdlib for source in data.sources):
        problems.append("data.kind is chat, and no conversations are named; give --data=FILE")
    elif data.kind == "chat" and not config.phases:
        problems += _chat_problems(PhaseConfig(kind="chat", sources=data.sources), "data")
    if config.phases and (config.train.steps or config.train.tokens):
        problems.append(
            f"train.steps is {config.train.steps} and train.tokens is {config.train.tokens}, but each phase has its own; remove them here"
        )
    names = [phase.name for phase in config.phases if phase.name]
    problems += [
        f"two phases are called {name!r}; give each a name of its own" for name in sorted({n for n in names if names.count(n) > 1})
    ]
    for index, phase in enumerate(config.phases):
        key = f"phases[{index}]"
        problems += length_problems(key, phase.steps, phase.tokens)
        problems += source_problems(phase.sources, f"{key}.sources", config.data.exhausted)
        problems += (_chat_problems if phase.kind == "chat" else _text_problems)(phase, key)
    chat = any(phase.kind == "chat" for phase in config.phases) or (data.kind == "chat" and not config.phases)
    if chat and config.train.distill.teacher and config.model.name == "i3":
        problems.append("train.distill with a chat phase needs model.name=decoder; drop one of the two")
    if config.data.document_mask is True and config.model.name == "i3":
        problems.append("data.document_mask needs model.name=decoder: the recurrent state of i3 goes on into the next document")
    return problems


def _text_problems(phase: PhaseConfig, key: str) -> list[str]:
    if phase.template or phase.truncation != "cut":
        return [f"{key} has a template or a truncation, which only kind: chat uses; remove them, or set kind: chat"]
    return []


def _chat_problems(phase: PhaseConfig, key: str) -> list[str]:
    problems = [] if phase.sources or key == "data" else [f"{key} is of kind chat and has no sources; name files of conversations"]
    for index, source in enumerate(phase.sources):
        text_field = source.text_field != "text"
        idle = {"stdlib": source.stdlib, "streaming": source.streaming, "max_bytes": source.max_bytes, "text_field": text_field}
        if names := [name for name, is_set in idle.items() if is_set]:
            found = " and ".join(names)
            problems.append(f"{key}.sources[{index}] has {found}, which conversations do not have; remove it, or use kind: text")
    return problems


def _schedule_problems(config: RunConfig) -> list[str]:
    schedule, longest = config.train.seq_len_schedule, config.data.seq_len
    if not schedule:
        return []
    text = "train.seq_len_schedule"
    if min(schedule) < 0 or min(schedule.values()) < 1 or 0 not in schedule:
        return [f"{text} is {schedule}; it needs a length for step 0, steps of at least 0 and lengths of at least 1"]
    if max(schedule.values()) != longest:
        return [f"{text} reaches {max(schedule.values())}, but data.seq_len is {longest}; set data.seq_len={max(schedule.values())}"]
    tokens = config.train.global_batch_size * longest
    if uneven := sorted({length for length in schedule.values() if tokens % length}):
        return [
            f"{text}: the {tokens} tokens of a step are no whole number of sequences of {uneven[0]}; use lengths that divide "
            f"train.global_batch_size * data.seq_len, such as {next(d for d in range(uneven[0] - 1, 0, -1) if tokens % d == 0)}"
        ]
    return []


QUANTIZED = ("int8", "int4")


def config_problems(config: RunConfig) -> list[str]:
    """Every contradiction between fields, one line each; empty when the configuration is sound."""
    return [
        *_path_problems(config),
        *adapter_problems(config),
        *_model_problems(config.model, config.data),
        *_data_problems(config.data),
        *_training_problems(config),
        *phase_problems(config),
        *_place_problems(config),
    ]


_WITH_PATH = ("path", "revision", "vocab_size", "max_seq_len", "lorpt")  # of model.*: what may be set together with model.path


def _path_problems(config: RunConfig) -> list[str]:
    """What does not go with a model of transformers, whose shape is its own."""
    model, train, default = config.model, config.train, ModelConfig()
    if not model.path:
        return [f"model.revision is {model.revision}, but model.path is empty; name the model, or remove it"] if model.revision else []
    shaped = [f"model.{name}" for name, value in vars(model).items() if name not in _WITH_PATH and value != getattr(default, name)]
    problems = _low_rank_path_problems(config)
    if shaped:
        problems.append(f"model.path is {model.path}, whose shape is its own; remove {', '.join(shaped)}, or model.path")
    plain = train.activation_checkpointing in ("auto", "none", "block")
    wrong = (
        (f"train.activation_checkpointing={train.activation_checkpointing}", not plain, "its blocks name nothing cheap; use block or none"),
        (f"train.precision={train.precision}", train.precision == "fp8", "its layers do not multiply fp8 yet; use bf16"),
        (f"train.init_from={train.init_from}", bool(train.init_from), "it has weights of its own; drop one of the two"),
    )
    return [*problems, *(f"{what} does not work with model.path: {why}" for what, found, why in wrong if found)]


def _low_rank_path_problems(config: RunConfig) -> list[str]:
    """What does not go with low-rank factors or codes of the weights of a model of transformers."""
    lorpt, default, method, train = config.model.lorpt, LorptConfig(), config.adapter.method, config.train
    problems = [
        f"model.lorpt.{key} is {getattr(lorpt, key)}, which does not work with model.path: {why}"
        for key, wrong, why in (
            ("bottleneck", lorpt.bottleneck == "silu", "its weights are to be reproduced, which only linear can; use it, or auto"),
            ("init", lorpt.init != default.init, "factors begin as the best approximation of its weights; remove it"),
            ("share_down", lorpt.share_down, "each of its layers has factors of its own; remove it"),
            ("targets", "head" in lorpt.targets, "only layers of its blocks are factored; leave out head"),
        )
        if wrong
    ]
    problems += _rank_problems(lorpt)
    factored = lorpt.rank != 0 or any(lorpt.ranks.values())
    if factored and method != "none":
        problems.append(f"model.lorpt trains factors of all weights and adapter.method={method} a part beside them; drop one of the two")
    coded = f"train.weight_dtype={train.weight_dtype}"
    if train.weight_dtype in QUANTIZED and method != "none":
        problems.append(f"{coded} trains every weight, found adapter.method={method}; use train.weight_dtype=nf4, or adapter.method=none")
    if train.weight_dtype in QUANTIZED and config.data.add_tokens:
        problems.append(f"{coded} does not work with data.add_tokens, which adds rows of floating point; use fp32 or bf16")
    return problems


LORA_KIN = ("lora", "dora", "rslora", "lora_plus")
_ADAPTER_KEYS = {  # of adapter.*: the methods that read each
    "r": LORA_KIN,
    "lora_alpha": LORA_KIN,
    "lora_dropout": LORA_KIN,
    "target_modules": (*LORA_KIN, "ia3"),
    "loraplus_lr_ratio": ("lora_plus",),
    "num_virtual_tokens": ("prefix",),
    "last_k": ("last_k",),
}


def adapter_problems(config: RunConfig) -> list[str]:
    """What does not go with an adapter, with frozen weights in NF4, or with new tokens."""
    adapter, train, model, default = config.adapter, config.train, config.model, AdapterConfig()
    method, nf4, layerwise = adapter.method, train.weight_dtype == "nf4", train.update == "layerwise"
    problems = [
        f"adapter.{key} is {getattr(adapter, key)}, which adapter.method={method} does not use; remove it"
        for key, readers in _ADAPTER_KEYS.items()
        if getattr(adapter, key) != getattr(default, key) and method not in readers
    ]
    trained = method != "none"
    asked = [
        *([f"adapter.method={method}"] if trained else []), *(["data.add_tokens"] if config.data.add_tokens else []),
        *(["train.weight_dtype=nf4"] if nf4 else []),
    ]  # fmt: skip
    if asked and not model.path:
        problems.append(f"{' and '.join(asked)} needs a model of transformers; set model.path, or remove it")
    stage = config.engine.zero_stage
    wrong = {
        f"adapter.method={method} does not work with optim.name=spectron, which orthogonalises whole matrices; use adamw or lion": (
            trained and config.optim.name == "spectron"
        ),
        "adapter.lora_dropout needs train.update=accumulate: a layerwise update computes blocks twice; set it, or lora_dropout=0": (
            adapter.lora_dropout > 0 and layerwise and method in LORA_KIN
        ),
        f"train.weight_dtype=nf4 keeps weights frozen and needs an adapter beside them, found adapter.method={method}; use lora": (
            nf4 and method not in (*LORA_KIN, "ia3", "prefix")
        ),
        f"train.weight_dtype=nf4 does not work with engine.zero_stage={stage}, which cannot gather its codes; use 2": nf4 and stage == 3,
        "train.weight_dtype=nf4 does not work with train.precision=fp8; use bf16": nf4 and train.precision == "fp8",
        "train.double_quant is false, which only train.weight_dtype=nf4 uses; remove it": not nf4 and not train.double_quant,
        f"data.add_tokens needs rows that are trained, which adapter.method={method} does not train; use lora or its kin, or none": (
            bool(config.data.add_tokens) and method in ("ia3", "prefix", "head", "last_k")
        ),
    }
    return problems + [text for text, found in wrong.items() if found]


def _model_problems(model: ModelConfig, data: DataConfig) -> list[str]:
    if model.path:
        return []
    problems = []
    if model.num_heads > 0 and model.dim % model.num_heads:
        problems.append(f"model.dim is {model.dim}, not a multiple of model.num_heads ({model.num_heads})")
    elif model.num_heads > 0 and model.num_kv_heads and (model.num_kv_heads < 0 or model.num_heads % model.num_kv_heads):
        problems.append(f"model.num_kv_heads is {model.num_kv_heads}, must divide model.num_heads ({model.num_heads}), or be 0 for as many")
    elif model.num_heads > 0 and model.positions == "rope" and (model.dim // model.num_heads) % 2:
        problems.append(f"model.positions=rope needs an even head width, model.dim / model.num_heads is {model.dim // model.num_heads}")
    if 2 * model.attention_rank >= model.dim > 0:
        problems.append(
            f"model.attention_rank is {model.attention_rank}, must be below model.dim / 2 ({model.dim / 2:g}): "
            "it would grow attention, not shrink it"
        )
    problems += _rank_problems(model.lorpt)
    if model.tie_embeddings and model.lorpt.rank and "head" in model.lorpt.targets:
        problems.append("model.lorpt.targets has head, but model.tie_embeddings is true: a tied head has no factors; drop one of the two")
    if 0 < model.max_seq_len < data.seq_len:
        problems.append(f"model.max_seq_len is {model.max_seq_len}, below data.seq_len ({data.seq_len})")
    return problems


def _rank_problems(lorpt: LorptConfig) -> list[str]:
    """A rank schedule without low-rank layers, or two of them."""
    problems = []
    if lorpt.schedule and lorpt.grow_to:
        problems.append("model.lorpt.schedule and grow_to are both set; the rank follows one of them: drop the other")
    if (lorpt.schedule or lorpt.grow_to) and not lorpt.rank:
        problems.append(
            "model.lorpt.schedule and grow_to change the rank of low-rank layers, but model.lorpt.rank is 0; set it, or drop them"
        )
    if lorpt.largest_rank() and lorpt.rank == "auto":
        problems.append(f"model.lorpt.rank is auto, which differs by layer, and is to become {lorpt.largest_rank()} in all; set a number")
    return problems


def _data_problems(data: DataConfig) -> list[str]:
    problems = []
    if not data.sources:
        problems.append("data.sources is empty; name a path, a hub dataset or stdlib: true")
    problems += source_problems(data.sources, "data.sources", data.exhausted)
    return problems


def _training_problems(config: RunConfig) -> list[str]:
    train, engine = config.train, config.engine
    problems = []
    if not config.phases:
        problems += length_problems("train", train.steps, train.tokens)
    sound = min(train.global_batch_size, config.data.seq_len) > 0 and (train.micro_batch_size == "auto" or train.micro_batch_size > 0)
    if sound and engine.name == "local":
        try:
            resolve_micro_batch_size(config, world_size=1)
        except ValueError as error:
            problems.append(str(error))
    problems += [*_float8_problems(config), *_quantized_problems(config)]
    fp8_beside_bf16 = (train.weight_dtype, train.precision) == ("bf16", "fp8")
    follows_precision = train.weight_dtype in ("fp32", "nf4", *QUANTIZED)
    if not follows_precision and train.precision not in (train.weight_dtype, "auto") and not fp8_beside_bf16:
        problems.append(
            f"train.weight_dtype={train.weight_dtype} needs train.precision {train.weight_dtype} or auto, found {train.precision}"
        )
    problems += _update_problems(config)
    problems += _distill_problems(config)
    if engine.name == "local" and (engine.zero_stage or engine.offload != "none" or engine.config):
        problems.append("engine.zero_stage, engine.offload and engine.config need engine.name=deepspeed")
    if engine.offload == "cpu" and engine.zero_stage == 0 and not engine.config:
        problems.append("engine.offload=cpu needs engine.zero_stage 1, 2 or 3")
    return problems


def _float8_problems(config: RunConfig) -> list[str]:
    """What does not go with fp8 on any machine."""
    if config.train.precision != "fp8":
        return []
    problems = []
    if config.device == "cpu":
        problems.append("train.precision=fp8 needs a GPU that multiplies fp8, but device is cpu; use train.precision=auto")
    if config.engine.name == "deepspeed":
        problems.append("train.precision=fp8 needs engine.name=local, found deepspeed; use train.precision=bf16, or engine.name=local")
    return problems


def _update_problems(config: RunConfig) -> list[str]:
    """What a layerwise update, low-bit states and narrow weights ask of each other."""
    train, optim = config.train, config.optim
    layerwise, problems = train.update == "layerwise", []
    if layerwise and config.engine.name == "deepspeed":
        problems.append(
            "train.update=layerwise does not work with engine.name=deepspeed: ZeRO reduces and partitions whole gradients after backward; "
            "use engine.name=local, or train.update=accumulate"
        )
    if layerwise and optim.clip_by == "global":
        problems.append(
            "optim.clip_by=global does not work with train.update=layerwise: blocks are updated before the global norm is known; "
            "use previous, block or auto"
        )
    if not layerwise:
        problems += [
            f"{name} is {value}, which only train.update=layerwise uses; remove it or set train.update=layerwise"
            for name, value, unused in (
                ("optim.clip_by", optim.clip_by, ("auto", "global")),
                ("train.boundary_dtype", train.boundary_dtype, ("same",)),
                ("train.boundary_offload", train.boundary_offload, ("none",)),
                ("train.weights_at", train.weights_at, ("device",)),
            )
            if value not in unused
        ]
    if train.weight_dtype == "fp16" and not layerwise:
        problems.append("train.weight_dtype=fp16 needs train.update=layerwise, which unscales gradients as it applies them; or use fp32")
    if train.boundary_offload == "cpu" and config.device == "cpu":
        problems.append("train.boundary_offload=cpu needs a GPU: with device=cpu boundary activations are in host memory already")
    problems += _storage_problems(config)
    problems += _spectron_problems(config)
    problems += state_width_problems(optim)
    if optim.backend == "bitsandbytes":
        wrong = [f"optim.state_bits={optim.state_bits}"] if optim.state_bits != 8 else []
        wrong += ["train.update=layerwise"] if layerwise else []
        if wrong:
            problems.append(
                f"optim.backend=bitsandbytes keeps 8-bit states and updates whole tensors, found {' and '.join(wrong)}; use lowmem"
            )
    return problems


def _storage_problems(config: RunConfig) -> list[str]:
    """What does not go with blocks that live elsewhere."""
    train, lorpt, problems = config.train, config.model.lorpt, []
    if train.storage_dir and "disk" not in (train.weights_at, train.boundary_offload):
        problems.append(
            f"train.storage_dir is {train.storage_dir}, but nothing is kept there; remove it, or set train.weights_at=disk or "
            "train.boundary_offload=disk"
        )
    kept = [key for key in ("weights_at", "boundary_offload") if getattr(train, key) == "disk"]
    if kept and config.budget.disk and not parse_bytes(config.budget.disk):
        problems.append(
            f"budget.disk is {config.budget.disk} (no disk), but train.{kept[0]} is disk; raise it, leave it out, or keep that in memory"
        )
    if train.weights_at == "device" or train.update != "layerwise":
        return problems
    wrong = {
        f"train.activation_checkpointing={train.activation_checkpointing}, which keeps what it was computed with; use block": (
            train.activation_checkpointing not in ("auto", "block")
        ),
        "device=cpu, whose weights are in host memory already; use disk": train.weights_at == "host" and config.device == "cpu",
        "model.lorpt.schedule and grow_to, which change the sizes of weights; drop them": bool(lorpt.schedule or lorpt.grow_to),
        "adapter.method=dora, which measures weights before they are there; use lora": config.adapter.method == "dora",
        "train.precision=fp8; use bf16": train.precision == "fp8",
    }
    return problems + [f"train.weights_at={train.weights_at} does not work with {what}" for what, found in wrong.items() if found]


def _quantized_problems(config: RunConfig) -> list[str]:
    """What does not go with weights that are stored as codes."""
    train, optim, lorpt = config.train, config.optim, config.model.lorpt
    if train.weight_dtype not in QUANTIZED:
        return []
    wrong = {
        "engine.name=deepspeed, which partitions floating-point weights; use engine.name=local": config.engine.name == "deepspeed",
        "optim.name=spectron, which orthogonalises whole matrices; use adamw or lion": optim.name == "spectron",
        "optim.backend=bitsandbytes, which updates floating-point weights; use lowmem": optim.backend == "bitsandbytes",
        "model.lorpt.schedule and grow_to, which add columns to factors; drop them": bool(lorpt.schedule or lorpt.grow_to),
        "train.precision=fp8; use bf16": train.precision == "fp8",
        "train.precision=fp16 and update=accumulate; use train.update=layerwise, which unscales gradients as it applies them": (
            train.precision == "fp16" and train.update == "accumulate"
        ),
    }
    return [f"train.weight_dtype={train.weight_dtype} does not work with {what}" for what, found in wrong.items() if found]


def _distill_problems(config: RunConfig) -> list[str]:
    distill, problems = config.train.distill, []
    if distill.teacher and (config.train.update == "layerwise" or config.engine.name == "deepspeed"):
        problems.append("train.distill needs train.update=accumulate and engine.name=local; set them, or drop the teacher")
    return problems


def _spectron_problems(config: RunConfig) -> list[str]:
    """What orthogonal momentum and changing ranks ask of the engine, and settings that only spectron reads."""
    optim, lorpt, problems = config.optim, config.model.lorpt, []
    deepspeed = config.engine.name == "deepspeed"
    if optim.name == "spectron" and (deepspeed or optim.backend == "bitsandbytes"):
        where = "engine.name=deepspeed, which flattens matrices" if deepspeed else "optim.backend=bitsandbytes, which does not have it"
        problems.append(
            f"optim.name=spectron does not work with {where}; use optim.name=adamw, or engine.name=local and optim.backend=lowmem"
        )
    if deepspeed and (lorpt.schedule or lorpt.grow_to):
        problems.append(
            "model.lorpt.schedule and grow_to need engine.name=local: DeepSpeed partitions parameters once and for all; drop them"
        )
    if lorpt.grow_to and not config.train.eval_every:
        problems.append("model.lorpt.grow_to waits for evaluations, but train.eval_every is 0; set it")
    if optim.name != "spectron" and optim.matrix_lr:
        problems.append(f"optim.matrix_lr is {optim.matrix_lr}, which only optim.name=spectron uses; remove it or set optim.name=spectron")
    return problems


def _place_problems(config: RunConfig) -> list[str]:
    """Device, its memory, and the run's folder."""
    problems = []
    vram = parse_bytes(config.budget.vram) if config.budget.vram else None
    if vram == 0 and config.device == "cuda":
        problems.append(f"budget.vram is {config.budget.vram} (no GPU), but device is cuda; set device=cpu or auto, or raise budget.vram")
    if vram and config.device == "cpu":
        problems.append(f"budget.vram is {config.budget.vram}, but device is cpu, which has none; leave it out, or set device=cuda or auto")
    if not config.run_dir:
        problems.append("run_dir is empty, must name a folder; such as runs/default")
    return problems
