"""The base of a fine-tuning run as a model of transformers, in full or in 4-bit NF4, read tensor by tensor."""

import json
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowmem.engine.run_model import load_run_model
from lowmem.finetune.families import FAMILIES
from lowmem.finetune.stream import StoredTensor, stored_tensors
from lowmem.memory.limits import is_out_of_memory
from lowmem.nn.layers import use_exact_gradients
from lowmem.system.devices import resolve_device
from lowmem.system.errors import CheckpointError, ConfigError, LowmemError
from lowmem.system.files import make_directory
from lowmem.system.tensors import tensor_shapes, weight_files

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# keys of config.json that say nothing of the model: heads of classifiers, how a forward pass answers, what the weights were stored in
_IGNORED = (
    "num_labels", "id2label", "label2id", "problem_type", "return_dict", "use_return_dict", "output_attentions", "output_hidden_states",
    "dtype", "torch_dtype",
)  # fmt: skip
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "attention_types")
_SIZES = re.compile("size|layer|head|position|embd|inner|dim|width|group|window")
_LARGEST_SIZE = 1 << 31
_LARGEST_BUFFERS = 1 << 30  # numbers that are computed and not read, such as tables of positions
NF4_BLOCK = 64  # numbers that share a scale
NF4_SCALE_BLOCK = 256  # scales that share one, with double quantisation


def base_directory(base: str, out: Path) -> Path:
    """`base` itself if it is a directory of transformers; else the run, exported once to `out`/base.

    Raises:
        ConfigError: it is neither.
    """
    place = Path(base)
    if (place / "config.json").is_file():
        return place
    if not (place / "config.yaml").is_file():
        raise ConfigError(f"base is {base}, which has neither config.json (transformers) nor config.yaml (a lowmem run); give one of them")
    exported = out / "base"
    if not (exported / "model.safetensors").is_file():
        from lowmem.export.hf import export_run_model

        make_directory(out)
        export_run_model(load_run_model(place), exported, overwrite=True, run_dir=place)
    return exported


def compute_device() -> torch.device:
    """The GPU where there is one that this PyTorch can use, else the CPU."""
    return resolve_device("auto")


def load_base(directory: Path, *, nf4: bool, double_quant: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    """The model on the CPU, or on the GPU where there is one, as transformers' `from_pretrained` makes it of the same files.

    Args:
        nf4: keep the weights of linear layers, except the head, in NF4 of bitsandbytes.
        dtype: of all other weights, and what is computed in.
    Raises:
        ConfigError: transformers or bitsandbytes is missing.
        CheckpointError: see `base_config`; or weights are missing, damaged, of another shape, quantised, or not finite.
    Memory: the weights as they are kept, and one tensor.
    """
    outline = empty_model(directory, dtype)
    stored = {name: tensor for file in weight_files(directory) for name, tensor in stored_tensors(file, dtype).items()}
    kind, device = type(outline), compute_device()
    if nf4:
        kind = _nf4_kind(kind, double_quant, dtype)
    # 4-bit layers go to the GPU one by one as they are read; transformers would reserve there what they would take in full
    where = {} if nf4 or device.type == "cpu" else {"device_map": {"": str(device)}}
    with _quiet_transformers(), reported_as_damage(directory):
        model, told = kind.from_pretrained(
            None, config=outline.config, state_dict=stored, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **where
        )
    _check_loaded(directory, told, stored)
    if nf4:
        model.__class__ = type(outline)
        for layer in model.modules():
            layer.__class__ = type(layer).__base__ if type(layer).__name__ == "Linear4bit" else type(layer)
    model.config.name_or_path = model.name_or_path = str(directory)
    use_exact_gradients(model)
    head = model.get_output_embeddings()
    if head is not None:  # a file with both, and with differing numbers, is not tied, whatever its config.json says
        model.config.tie_word_embeddings = head.weight is model.get_input_embeddings().weight
    return model.to(device)


def enable_checkpointing(model: Any) -> None:
    """Keep each block's input only; transformers renames the switch in version 5."""
    new = getattr(model, "activation_checkpointing_enable", None)
    if new is not None:
        new(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()


def empty_model(directory: Path, dtype: torch.dtype) -> Any:
    """The model on the meta device.

    Raises:
        ConfigError: transformers is missing.
        CheckpointError: see `base_config`; or the model that is described has tensors without elements, or is much larger than its files.
    """
    config = base_config(directory)
    from transformers import AutoModelForCausalLM

    with _quiet_transformers(), reported_as_damage(directory), torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # refused below
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if empty := [f"{name} {tuple(tensor.shape)}" for name, tensor in model.named_parameters() if not tensor.numel()]:
        raise CheckpointError(f"{directory / 'config.json'} describes tensors without elements: {empty[0]}; restore the file")
    described, held = (
        model.num_parameters(),
        sum(math.prod(shape) for file in weight_files(directory) for shape in tensor_shapes(file).values()),
    )
    # a head that the file ties to its embedding counts twice at most
    if described > 2 * held or sum(buffer.numel() for buffer in model.buffers()) > max(held, _LARGEST_BUFFERS):
        raise CheckpointError(
            f"{directory / 'config.json'} describes a model far larger than its files, which hold {held} numbers; restore it"
        )
    model.config.name_or_path = model.name_or_path = str(directory)
    use_exact_gradients(model)
    return model.to(dtype)


def base_config(directory: Path) -> Any:
    """The configuration of a directory of transformers, of a family that is trained here.

    Raises:
        ConfigError: transformers is missing.
        CheckpointError: config.json is damaged, names another family, needs code of its own, or its weights are quantised.
    """
    try:
        from transformers import CONFIG_MAPPING
    except ImportError as error:
        raise ConfigError("fine-tuning needs transformers and peft; pip install 'lowmem[finetune]'") from error
    values = read_config_json(directory)
    family = values.get("model_type")
    if family not in FAMILIES:
        own = ", which brings code of its own (auto_map) that is never run," if values.get("auto_map") else ","
        raise CheckpointError(f"{directory / 'config.json'}: found model_type {family!r}{own} lowmem finetune takes {', '.join(FAMILIES)}")
    for key in ("quantization_config", "compression_config"):
        if values.get(key):
            kind = values[key].get("quant_method", "unnamed") if isinstance(values[key], dict) else values[key]
            raise CheckpointError(
                f"{directory / 'config.json'} has {key} ({str(kind)[:40]}); give the base with plain fp32, bf16 or fp16 weights, "
                "and method=qlora to keep it in 4 bits"
            )
    _check_sizes(values, directory)
    _register()
    with _quiet_transformers(), reported_as_damage(directory):
        config = CONFIG_MAPPING[family].from_dict({key: value for key, value in values.items() if key not in _IGNORED})
        config.tie_word_embeddings = getattr(config, "tie_word_embeddings", False)
    _check_layers(getattr(config, "num_hidden_layers", 1), directory)
    return config


def _check_sizes(values: dict[str, Any], directory: Path) -> None:
    """Refuse what would take transformers hours or all memory before it meets the shapes of the weights, or fail in the first step.

    Raises:
        CheckpointError: names the first such key.
    """
    for key, value in values.items():
        number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else 0
        wanted = ""
        if "drop" in key and not 0 <= number <= 1:
            wanted = "0 to 1"
        elif isinstance(value, int) and _SIZES.search(key) and number > _LARGEST_SIZE:
            wanted = f"at most {_LARGEST_SIZE}"
        if wanted:
            raise CheckpointError(f"{directory / 'config.json'} has {key} {value!r:.60}, expected {wanted}; restore it")
    for key in _LAYERS:
        for count in _counts(values.get(key)):
            _check_layers(count, directory, key)


def _counts(value: Any) -> list[int]:
    """The integers in a value of JSON."""
    if isinstance(value, list):
        return [count for item in value for count in _counts(item)]
    return [value] if type(value) is int else []


def _check_layers(layers: Any, directory: Path, key: str = "num_hidden_layers") -> None:
    tensors = sum(len(tensor_shapes(file)) for file in weight_files(directory))
    if not isinstance(layers, int) or not 1 <= layers <= tensors:
        raise CheckpointError(f"{directory / 'config.json'}: {key} is {layers!r:.60}, with {tensors} tensors in its files; mend it")


def read_config_json(directory: Path) -> dict[str, Any]:
    """config.json as it is written.

    Raises:
        CheckpointError: it cannot be read, or holds no object.
    """
    path = directory / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); restore it") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, expected an object; restore it")
    return values


@contextmanager
def reported_as_damage(directory: Path) -> Iterator[None]:
    """Report what transformers makes of a directory that it cannot use; it raises whatever its code meets there.

    Raises:
        CheckpointError: instead of any error but lowmem's own and a lack of memory.
    """
    try:
        yield
    except (LowmemError, MemoryError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        said = re.sub(r"\b[A-Za-z]+Error: |<class '([A-Za-z]+)'>", r"\1", " ".join(str(error).split())).replace("NoneType", "null")
        raise CheckpointError(f"{directory} is no model that transformers can read ({said[:200]})") from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Neither bars nor reports, and tensors read one after the other; what matters is checked and said here."""
    from transformers.utils import logging

    verbosity, before = logging.get_verbosity(), os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
        os.environ.pop("HF_DEACTIVATE_ASYNC_LOAD")
        os.environ.update({} if before is None else {"HF_DEACTIVATE_ASYNC_LOAD": before})


def _register() -> None:
    """lowmem's own model class, so that its directories need no trust_remote_code here."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from lowmem.export.modeling_lowmem import LowmemConfig, LowmemForCausalLM

    AutoConfig.register("lowmem", LowmemConfig, exist_ok=True)
    AutoModelForCausalLM.register(LowmemConfig, LowmemForCausalLM, exist_ok=True)


def make_nf4(model: Any, double_quant: bool, dtype: torch.dtype) -> None:
    """Replace the linear layers of a model on the meta device, except its head, by 4-bit ones.

    Raises:
        ConfigError: bitsandbytes is missing, or the model has no such layers.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError("method=qlora needs bitsandbytes; pip install 'lowmem[bnb]'") from error
    head = model.get_output_embeddings()
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and layer is not head:
            with torch.device("meta"):
                new = bitsandbytes.nn.Linear4bit(
                    layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype,
                    compress_statistics=double_quant, quant_type="nf4",
                )  # fmt: skip
            # an evaluation would repack the weights for a kernel without gradients, and later steps would silently train on nothing
            new.support_avx512bf16_for_cpu = False
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new)
    if not any(type(layer).__name__ == "Linear4bit" for layer in model.modules()):
        raise ConfigError(
            "method=qlora quantises linear layers, and this model has none (GPT-2 of transformers keeps its own Conv1D); use lora"
        )
    model.is_loaded_in_4bit = True  # what PEFT asks for


def _check_loaded(directory: Path, told: dict[str, Any], stored: dict[str, StoredTensor]) -> None:
    """What transformers only warns of.

    Raises:
        CheckpointError: weights are missing, of another shape, not finite, or of a dtype that stands for quantised ones.
    """
    if coded := [f"{name} is {tensor.dtype}" for name, tensor in stored.items() if tensor.coded_and_read]:
        raise CheckpointError(f"{directory} holds quantised weights ({_some(coded)}); give the base in fp32, bf16 or fp16")
    problems = [f"{name} is missing" for name in sorted(told["missing_keys"])]
    for name, found, wanted in sorted(told["mismatched_keys"]):
        problems.append(f"{name} has shape {tuple(found)}, expected {tuple(wanted)}")
    if problems:
        raise CheckpointError(f"{directory} does not hold the model that its config.json describes: {_some(problems)}; restore its files")
    if infinite := [name for name, tensor in stored.items() if not tensor.finite]:
        raise CheckpointError(f"{directory} holds weights that are not finite ({_some(infinite)}); restore its files")
    if unknown := sorted(told["unexpected_keys"]):
        print(f"lowmem: in the files of {directory} and not in the model, left out: {_some(unknown)}", file=sys.stderr)


def _some(texts: list[str]) -> str:
    return "; ".join(texts[:5]) + (f"; and {len(texts) - 5} more" if len(texts) > 5 else "")


def _nf4_kind(kind: Any, double_quant: bool, dtype: torch.dtype) -> Any:
    """The class of a model that is built with 4-bit layers, each of which quantises its weight when it is given one."""

    def build(model: Any, config: Any, *more: Any, **settings: Any) -> None:
        kind.__init__(model, config, *more, **settings)
        make_nf4(model, double_quant, dtype)
        for layer in model.modules():
            if type(layer).__name__ == "Linear4bit":
                layer.__class__ = type("Linear4bit", (type(layer),), {"__setattr__": _quantise_on_arrival})

    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "__init__": build})


def _quantise_on_arrival(layer: Any, name: str, value: Any) -> None:
    if name == "weight" and type(value) is nn.Parameter and not value.is_meta:
        import bitsandbytes

        old = layer.weight
        plain: Any = bitsandbytes.nn.Params4bit(
            value.detach(), requires_grad=False, quant_type="nf4", compress_statistics=old.compress_statistics, blocksize=NF4_BLOCK,
            module=layer,
        )  # fmt: skip
        packed = plain.to(compute_device())
        packed._is_hf_initialized = True  # transformers would draw it at random otherwise
        value = packed
    nn.Module.__setattr__(layer, name, value)
