"""Contradictions between the fields of a configuration, all of them at once."""

from lowmem.config import DataConfig, LorptConfig, ModelConfig, RunConfig, resolve_micro_batch_size
from lowmem.config_check_data import length_problems, phase_problems, source_problems
from lowmem.units import parse_bytes

QUANTIZED = ("int8", "int4")


def config_problems(config: RunConfig) -> list[str]:
    """Every contradiction between fields, one line each; empty when the configuration is sound."""
    return [
        *_model_problems(config.model, config.data),
        *_data_problems(config.data),
        *_training_problems(config),
        *phase_problems(config),
        *_place_problems(config),
    ]


def _model_problems(model: ModelConfig, data: DataConfig) -> list[str]:
    problems = [
        f"model.{name} is {value}, must be at least 1"
        for name, value in (("dim", model.dim), ("num_layers", model.num_layers), ("num_heads", model.num_heads))
        if value < 1
    ]
    problems += [
        f"model.{name} is {value}, must be 0 or more"
        for name, value in (
            ("hidden_dim", model.hidden_dim),
            ("vocab_size", model.vocab_size),
            ("max_seq_len", model.max_seq_len),
            ("attention_rank", model.attention_rank),
            ("lorpt.rank", 0 if model.lorpt.rank == "auto" else model.lorpt.rank),
        )
        if value < 0
    ]
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
    """A rank schedule without low-rank layers, or with impossible numbers."""
    problems = [
        f"model.lorpt.schedule has {step}: {rank}; steps and ranks must be at least 1"
        for step, rank in lorpt.schedule.items()
        if min(step, rank) < 1
    ]
    if lorpt.grow_to < 0 or lorpt.grow_patience < 1:
        problems.append(f"model.lorpt.grow_to is {lorpt.grow_to} and grow_patience {lorpt.grow_patience}; must be at least 0 and 1")
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
    if data.seq_len < 1:
        problems.append(f"data.seq_len is {data.seq_len}, must be at least 1")
    if data.tokenizer_vocab_size < 2:
        problems.append(f"data.tokenizer_vocab_size is {data.tokenizer_vocab_size}, must be at least 2; leave it out for 4096")
    if not 0 <= data.val_fraction < 1:
        problems.append(f"data.val_fraction is {data.val_fraction}, must be in [0, 1)")
    if not data.sources:
        problems.append("data.sources is empty; name a path, a hub dataset or stdlib: true")
    problems += source_problems(data.sources, "data.sources", data.exhausted)
    return problems


def _training_problems(config: RunConfig) -> list[str]:
    train, optim, engine = config.train, config.optim, config.engine
    problems = []
    if not config.phases:
        problems += length_problems("train", train.steps, train.tokens)
    problems += [
        f"train.{name} is {getattr(train, name)}, must be at least {least}"
        for name, least in (
            ("steps", 0), ("global_batch_size", 1), ("save_every", 0), ("keep_last", 1), ("eval_every", 0),
            ("eval_sequences", 0), ("max_bad_steps", 1), ("threads", 0), ("loss_chunk_tokens", 0), ("z_loss", 0),
        )
        if getattr(train, name) < least
    ]  # fmt: skip
    if isinstance(train.micro_batch_size, int) and train.micro_batch_size < 1:
        problems.append(f"train.micro_batch_size is {train.micro_batch_size}, must be at least 1 or auto")
    elif train.global_batch_size > 0 and engine.name == "local" and config.data.seq_len > 0:
        try:
            resolve_micro_batch_size(config, world_size=1)
        except ValueError as error:
            problems.append(str(error))
    if not 0 <= train.label_smoothing < 1:
        problems.append(f"train.label_smoothing is {train.label_smoothing}, must be in [0, 1)")
    problems += [*_float8_problems(config), *_quantized_problems(config)]
    fp8_beside_bf16 = (train.weight_dtype, train.precision) == ("bf16", "fp8")
    follows_precision = train.weight_dtype in ("fp32", *QUANTIZED)
    if not follows_precision and train.precision not in (train.weight_dtype, "auto") and not fp8_beside_bf16:
        problems.append(
            f"train.weight_dtype={train.weight_dtype} needs train.precision {train.weight_dtype} or auto, found {train.precision}"
        )
    problems += _update_problems(config)
    problems += _distill_problems(config)
    if not optim.lr >= 0:
        problems.append(f"optim.lr is {optim.lr}, must be 0 or more")
    problems += [f"optim.betas has {beta}, must be in [0, 1)" for beta in optim.betas if not 0 <= beta < 1]
    problems += [
        f"optim.{name} is {getattr(optim, name)}, must be 0 or more"
        for name in ("eps", "weight_decay", "clip", "warmup_steps", "min_lr_ratio")
        if getattr(optim, name) < 0
    ]
    if not 0 < optim.decay_fraction <= 1:
        problems.append(f"optim.decay_fraction is {optim.decay_fraction}, must be in (0, 1]")
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
            )
            if value not in unused
        ]
    if train.weight_dtype == "fp16" and not layerwise:
        problems.append("train.weight_dtype=fp16 needs train.update=layerwise, which unscales gradients as it applies them; or use fp32")
    if train.boundary_offload == "cpu" and config.device == "cpu":
        problems.append("train.boundary_offload=cpu needs a GPU: with device=cpu boundary activations are in host memory already")
    problems += _spectron_problems(config)
    if optim.backend == "bitsandbytes":
        wrong = [f"optim.state_bits={optim.state_bits}"] if optim.state_bits != 8 else []
        wrong += ["train.update=layerwise"] if layerwise else []
        if wrong:
            problems.append(
                f"optim.backend=bitsandbytes keeps 8-bit states and updates whole tensors, found {' and '.join(wrong)}; use lowmem"
            )
    return problems


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
    if not 0 <= distill.weight <= 1 or not distill.temperature > 0:
        problems.append(f"train.distill.weight is {distill.weight} and temperature {distill.temperature}; must be in [0, 1] and above 0")
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
    if optim.matrix_lr < 0 or not 0 <= optim.momentum < 1:
        problems.append(f"optim.matrix_lr is {optim.matrix_lr} and optim.momentum {optim.momentum}; must be at least 0 and in [0, 1)")
    if optim.name != "spectron" and optim.matrix_lr:
        problems.append(f"optim.matrix_lr is {optim.matrix_lr}, which only optim.name=spectron uses; remove it or set optim.name=spectron")
    return problems


def _place_problems(config: RunConfig) -> list[str]:
    """Device, its memory, and the run's folder."""
    problems, sizes = [], {}
    for name in ("ram", "vram"):
        text = getattr(config.budget, name)
        try:
            sizes[name] = parse_bytes(text) if text else None
        except ValueError as error:
            problems.append(f"budget.{name}: {error}")
    vram = sizes.get("vram")
    if vram == 0 and config.device == "cuda":
        problems.append(f"budget.vram is {config.budget.vram} (no GPU), but device is cuda; set device=cpu or auto, or raise budget.vram")
    if vram and config.device == "cpu":
        problems.append(f"budget.vram is {config.budget.vram}, but device is cpu, which has none; leave it out, or set device=cuda or auto")
    if not config.run_dir:
        problems.append("run_dir is empty, must name a folder; such as runs/default")
    return problems
