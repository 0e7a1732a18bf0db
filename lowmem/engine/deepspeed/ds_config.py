"""The configuration DeepSpeed gets: the user's JSON file, plus everything lowmem already decides, without contradictions."""

import difflib
import json
import math
from pathlib import Path
from typing import Any

from lowmem.config.keys import NVME_REFUSAL, shown
from lowmem.config.load import read_config_text
from lowmem.config.schema import EngineConfig, RunConfig
from lowmem.system.errors import ConfigError
from lowmem.system.files import distinct_keys

AUTO = "auto"
_MOST_SHOWN = 10  # problems of one file
# Elements per communication buffer. DeepSpeed's own 500 million reserve 2 GB of fp32 for any model.
BUCKET_ELEMENTS = 4_000_000

_DECIDED_ELSEWHERE = {
    "optimizer": "set optim.* in lowmem's configuration",
    "scheduler": "set optim.schedule in lowmem's configuration",
    "activation_checkpointing": "set train.activation_checkpointing in lowmem's configuration",
    "gradient_allreduce_op": "lowmem needs the mean over ranks",
    "prescale_gradients": "lowmem needs the mean over ranks",
    "gradient_predivide_factor": "lowmem needs the mean over ranks",
    "checkpoint": "lowmem writes checkpoints without pickle",
    "amp": "set train.precision in lowmem's configuration",
}
_PASSED_ON = {
    "zero_optimization", "bf16", "fp16", "torch_autocast", "data_types", "communication_data_type", "train_batch_size",
    "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "comms_logger", "flops_profiler",
}  # fmt: skip
# What the keys of a section hold, as DeepSpeed's documentation has it: its own messages name classes of its validator.
_FLAG, _COUNT, _NUMBER, _SHARE, _TEXT, _LIST = "true or false", "a whole number of at least 0", "a number", "in [0, 1]", "text", "a list"
_OFFLOAD = {"device": "none | cpu | nvme", "nvme_path": _TEXT, "buffer_count": _COUNT, "pin_memory": _FLAG}
_KNOWN: dict[str, Any] = {
    "train_batch_size": _COUNT,
    "train_micro_batch_size_per_gpu": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "gradient_clipping": _NUMBER,
    "steps_per_print": _COUNT,
    "communication_data_type": "fp32 | fp16 | bf16",
    **dict.fromkeys(("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "wall_clock_breakdown", "memory_breakdown"), _FLAG),
    "zero_optimization": {
        "stage": "0 | 1 | 2 | 3",
        **dict.fromkeys(
            (
                "contiguous_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce", "allgather_partitions", "overlap_comm",
                "cpu_offload_use_pin_memory", "stage3_gather_16bit_weights_on_model_save", "stage3_use_all_reduce_for_fetch_params",
                "stage3_allgather_sequential", "stage3_gather_fp16_weights_on_model_save", "ignore_unused_parameters",
                "round_robin_gradients", "zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients",
                "memory_efficient_linear", "override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks",
                "save_muon_momentum_buffer_in_memory", "parameter_alignment",
            ),
            _FLAG,
        ),
        **dict.fromkeys(
            (
                "reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "stage3_prefetch_bucket_size",
                "stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "stage3_max_live_parameters",
                "stage3_max_reuse_distance", "stage3_module_granularity_threshold", "zero_hpz_partition_size",
            ),
            _COUNT,
        ),
        "offload_param": _OFFLOAD | {"buffer_size": _COUNT, "max_in_cpu": _COUNT},
        "offload_optimizer": _OFFLOAD
        | dict.fromkeys(("pipeline_read", "pipeline_write", "fast_init", "super_offload"), _FLAG)
        | {"ratio": _SHARE, "cpuadam_cores_perc": _SHARE},
        "leaf_module": None,
    },
    "bf16": dict.fromkeys(
        ("enabled", "immediate_grad_update", "check_grad_overflow", "bf16_master_weights_and_grads", "bf16_optimizer_states"), _FLAG
    ),
    "fp16": dict.fromkeys(("enabled", "auto_cast", "consecutive_hysteresis", "fp16_master_weights_and_grads"), _FLAG)
    | dict.fromkeys(("initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale"), _COUNT)
    | {"loss_scale": _NUMBER},
    "torch_autocast": {"enabled": _FLAG, "dtype": "float32 | bfloat16 | float16", "lower_precision_safe_modules": _LIST},
    "data_types": {"grad_accum_dtype": "fp32 | fp16 | bf16"},
    "comms_logger": dict.fromkeys(("enabled", "prof_all", "verbose", "debug"), _FLAG) | {"prof_ops": _LIST},
    "flops_profiler": {
        "enabled": _FLAG, "recompute_fwd_factor": _NUMBER, "profile_step": _COUNT, "module_depth": None, "top_modules": _COUNT,
        "detailed": _FLAG, "output_file": None,
    },
}  # fmt: skip
_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_REFUSED_ZERO = {
    "zenflow": "it delays updates, and its state is not in lowmem's checkpoints",
    "elastic_checkpoint": "lowmem's checkpoints are written for a fixed number of ranks",
    "legacy_stage1": "DeepSpeed dropped it",
    "compute_grad_norm": "lowmem reports the norm and finds bad steps by it",
    "cpu_offload": "write offload_optimizer",
    "cpu_offload_params": "write offload_param",
    "load_from_fp32_weights": "lowmem restores the fp32 weights exactly",
    "pipeline_loading_checkpoint": "lowmem reads checkpoints its own way",
}


def build_deepspeed_config(config: RunConfig, *, world_size: int, micro_batch_size: int) -> dict[str, Any]:
    """What `deepspeed.initialize` gets.

    Args:
        config: resolved; train.precision is not "auto".
        micro_batch_size: sequences computed at once on one rank.
    Raises:
        ConfigError: the JSON file cannot be read, or contradicts lowmem's configuration, or asks for what the engine cannot do.
    """
    where, document = _read(config.engine)
    stage = zero_stage(document)
    offload = _offloads(document)
    problems = _refusals(where, document, config, stage, offload)
    decided = _decided(config, stage, offload, world_size, micro_batch_size)
    problems += _contradictions(where, document, decided)
    if problems:
        raise ConfigError("\n".join(problems))
    merged = _merge(_without_auto(document), decided)
    if stage == 0:
        merged["gradient_clipping"] = 0.0  # the engine clips itself: DeepSpeed reports no norm there
    return merged


def check_deepspeed_file(config: RunConfig) -> None:
    """Before any work: that the JSON file is there and has the keys and the kinds of values that DeepSpeed takes.

    Raises:
        ConfigError: names the file, and every such key.
    """
    if config.engine.name == "deepspeed":
        _read(config.engine)


def zero_stage(document: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed configuration."""
    return int(document.get("zero_optimization", {}).get("stage", 0))


def offloads_optimizer(document: dict[str, Any]) -> bool:
    """Whether a DeepSpeed configuration keeps the optimizer in host memory."""
    return bool(_offloads(document).get("offload_optimizer"))


def default_document(stage: int, offload: bool) -> dict[str, Any]:
    """The contents of configs/deepspeed/zero{stage}[_offload].json, used when engine.config names no file."""
    zero: dict[str, Any] = {"stage": stage}
    if stage:
        zero |= {"overlap_comm": False, "contiguous_gradients": True, "reduce_bucket_size": BUCKET_ELEMENTS}
    if stage in (1, 2):
        zero["allgather_bucket_size"] = BUCKET_ELEMENTS
    if stage == 3:
        zero |= {
            "sub_group_size": 4 * BUCKET_ELEMENTS,
            "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
            "stage3_max_live_parameters": 4 * BUCKET_ELEMENTS,
            "stage3_max_reuse_distance": 4 * BUCKET_ELEMENTS,
            "stage3_param_persistence_threshold": 10_000,
        }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if offload and stage == 3:
        zero["offload_param"] = {"device": "cpu", "pin_memory": False}
    return {
        "train_batch_size": AUTO,
        "train_micro_batch_size_per_gpu": AUTO,
        "gradient_accumulation_steps": AUTO,
        "gradient_clipping": AUTO,
        "bf16": {"enabled": AUTO},
        "fp16": {"enabled": AUTO},
        "zero_optimization": zero,
    }


def _read(engine: EngineConfig) -> tuple[str, dict[str, Any]]:
    if not engine.config:
        return "engine", default_document(engine.zero_stage, engine.offload == "cpu")
    where = f"engine.config is {engine.config}"
    try:
        document = json.loads(read_config_text(Path(engine.config)), object_pairs_hook=distinct_keys, parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ConfigError(f"{where}, which is no readable JSON file ({why}); see configs/deepspeed") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{where}, which holds no JSON object; see configs/deepspeed")
    if problems := _wrong_kinds(engine.config, "", document, _KNOWN):
        rest = [f"and {len(problems) - _MOST_SHOWN} more"] if len(problems) > _MOST_SHOWN else []
        raise ConfigError("\n".join(problems[:_MOST_SHOWN] + rest))
    return engine.config, document


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"it has {name}, which is no JSON")


def _wrong_kinds(where: str, prefix: str, section: dict[str, Any], known: dict[str, Any]) -> list[str]:
    """Unknown keys below the top, where `_refusals` tells what each is for, and values of the wrong kind."""
    problems = []
    for key, value in section.items():
        kind = known.get(key)
        if key not in known:
            if prefix and not (prefix == "zero_optimization." and key in _REFUSED_ZERO):
                nearest = difflib.get_close_matches(key[:100], known, n=1)
                remedy = f"the nearest key is {nearest[0]}" if nearest else "remove it"
                problems.append(f"{where}: {prefix}{shown(key, quotes=False)} is not known to DeepSpeed; {remedy}")
        elif isinstance(kind, dict) and isinstance(value, dict):
            problems += _wrong_kinds(where, f"{prefix}{key}.", value, kind)
        elif isinstance(kind, dict):
            if value is not None or not key.startswith("offload_"):
                problems.append(f"{where}: {prefix}{key} is {shown(value)}, must be an object; see configs/deepspeed")
        elif kind and not (value == AUTO and key != "stage") and not _is_kind(value, kind):
            problems.append(f"{where}: {prefix}{key} is {shown(value)}, must be {kind}")
    return problems


def _is_kind(value: Any, kind: str) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and abs(value) < 2**63
    if kind == _FLAG:
        return isinstance(value, bool)
    if kind == _COUNT:
        return number and value >= 0 and value == int(value)
    if kind in (_NUMBER, _SHARE):
        return number and (kind == _NUMBER or 0 <= value <= 1)
    if kind in (_TEXT, _LIST):
        return isinstance(value, str if kind == _TEXT else list)
    return not isinstance(value, bool) and isinstance(value, (str, int)) and str(value) in kind.split(" | ")


def _offloads(document: dict[str, Any]) -> dict[str, str]:
    zero = document.get("zero_optimization", {})
    devices = {name: (zero.get(name) or {}).get("device", "none") for name in ("offload_optimizer", "offload_param")}
    return {name: device for name, device in devices.items() if device != "none"}


def _decided(config: RunConfig, stage: int, offload: dict[str, str], world_size: int, micro_batch_size: int) -> dict[str, Any]:
    """The entries that lowmem's configuration determines."""
    train = config.train
    # Weights stored in fp32 and no ZeRO: autocast, exactly as the local engine computes. ZeRO keeps 16-bit weights and an fp32
    # master copy of this rank's share, which is smaller than fp32 weights everywhere.
    autocast = stage == 0 and train.precision != "fp32" and train.weight_dtype == "fp32"
    decided: dict[str, Any] = {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": train.global_batch_size // (micro_batch_size * world_size),
        "gradient_clipping": config.optim.clip,
        "bf16": {"enabled": stage > 0 and train.precision == "bf16"},
        "fp16": {"enabled": stage > 0 and train.precision == "fp16"},
        "torch_autocast": {"enabled": autocast} | ({"dtype": _TORCH_NAMES[train.precision]} if autocast else {}),
        "zero_allow_untested_optimizer": True,  # those used here update element by element or block by block
    }
    if offload:
        decided["zero_force_ds_cpu_optimizer"] = config.optim.state_bits == 32
    if stage and train.precision == "bf16":
        # DeepSpeed would add up micro-batches in bf16, where small gradients vanish beside large sums.
        decided["data_types"] = {"grad_accum_dtype": "fp32"}
    return decided


def _refusals(where: str, document: dict[str, Any], config: RunConfig, stage: int, offload: dict[str, str]) -> list[str]:
    problems = [
        f"{where}: {key} is not lowmem's to pass on; {_DECIDED_ELSEWHERE.get(key, 'remove it')}"
        for key in document
        if key not in _PASSED_ON
    ]
    problems += [
        f"{where}: zero_optimization.{key} cannot be used; {reason}"
        for key, reason in _REFUSED_ZERO.items()
        if key in document.get("zero_optimization", {})
    ]
    problems += [
        f"{where}: zero_optimization.{name}.device is {device}; allowed: none, cpu; {NVME_REFUSAL}"
        for name, device in offload.items()
        if device != "cpu"
    ]
    if "offload_param" in offload and stage != 3:
        problems.append(f"{where}: zero_optimization.offload_param needs stage 3, found stage {stage}")
    if "offload_optimizer" in offload and stage == 0:
        problems.append(f"{where}: zero_optimization.offload_optimizer needs stage 1, 2 or 3, found stage 0")
    for name in ("bf16_master_weights_and_grads", "bf16_optimizer_states", "immediate_grad_update"):
        if document.get("bf16", {}).get(name):
            problems.append(f"{where}: bf16.{name} cannot be used; lowmem trains ZeRO stages with an fp32 master copy")
    if document.get("fp16", {}).get("fp16_master_weights_and_grads"):
        problems.append(f"{where}: fp16.fp16_master_weights_and_grads cannot be used; lowmem keeps an fp32 master copy")
    if config.train.weight_dtype == "bf16" and stage:
        problems.append(
            f"train.weight_dtype is bf16 with ZeRO stage {stage}, which always keeps a master copy (fp32, or bf16 only with "
            "DeepSpeedCPUAdam and no stochastic rounding); use train.weight_dtype=fp32, or stage 0"
        )
    return problems


def _contradictions(where: str, document: dict[str, Any], decided: dict[str, Any]) -> list[str]:
    problems = []
    for key, wanted in _leaves(decided):
        found: Any = document
        for part in key.split("."):
            found = found.get(part, AUTO) if isinstance(found, dict) else found
        if found != AUTO and found != wanted:
            problems.append(f'{where}: {key} is {json.dumps(found)}, lowmem\'s configuration makes it {json.dumps(wanted)}; write "auto"')
    return problems


def _leaves(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves = []
    for key, value in values.items():
        leaves += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return leaves


def _without_auto(values: dict[str, Any]) -> dict[str, Any]:
    """Entries that say something; DeepSpeed itself understands "auto" in few places."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value for key, value in values.items() if value != AUTO
    }  # fmt: skip


def _merge(document: dict[str, Any], decided: dict[str, Any]) -> dict[str, Any]:
    merged = dict(document)
    for key, value in decided.items():
        merged[key] = _merge(merged.get(key, {}), value) if isinstance(value, dict) else value
    return merged
