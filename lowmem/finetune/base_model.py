"""The base of a fine-tuning run as a model of transformers, in full or in 4-bit NF4, read tensor by tensor."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowmem.data.storage import make_directory
from lowmem.devices import resolve_device
from lowmem.errors import CheckpointError, ConfigError
from lowmem.finetune.stream import stream_tensors
from lowmem.nn.exact import use_exact_gradients
from lowmem.run_model import load_run_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
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
    """The model on the CPU, or on the GPU where there is one.

    Args:
        nf4: keep the weights of linear layers, except the head, in NF4 of bitsandbytes.
        dtype: of all other weights, and what is computed in.
    Raises:
        ConfigError: transformers or bitsandbytes is missing, or the directory needs code that is not lowmem's own.
        CheckpointError: weights are missing.
    Memory: the weights as they are kept, and one tensor.
    """
    model = empty_model(directory, dtype)
    if nf4:
        make_nf4(model, double_quant, dtype)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory} has no .safetensors; save the model with save_pretrained")
    device = compute_device()
    for file in files:
        for name, tensor in stream_tensors(file):
            _set(model, name, tensor, device, dtype)
            del tensor  # its mapping must go before the next one comes
    model.tie_weights()
    _fresh_buffers(model, device)
    if missing := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise CheckpointError(f"{directory} lacks the weights {', '.join(missing[:5])}; restore its files")
    return model


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
        ConfigError: transformers is missing, or does not know it.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ConfigError("fine-tuning needs transformers and peft; pip install 'lowmem[finetune]'") from error
    _register()
    try:
        config = AutoConfig.from_pretrained(directory)
        config.tie_word_embeddings = getattr(config, "tie_word_embeddings", False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{directory} is no causal language model that transformers knows ({' '.join(str(error).split())[:200]})"
        ) from error
    model.config.name_or_path = model.name_or_path = str(directory)
    use_exact_gradients(model)
    return model.to(dtype)


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


def _set(model: Any, name: str, tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> None:
    owner, _, last = name.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        print(f"lowmem: {name} is in the file and not in the model; it is left out", file=sys.stderr)
        return
    if type(module).__name__ == "Linear4bit" and last == "weight":
        import bitsandbytes

        old = module.weight
        packed: Any = bitsandbytes.nn.Params4bit(
            tensor.to(dtype),
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=old.compress_statistics,
            blocksize=NF4_BLOCK,
            module=module,
        )
        module.weight = packed.to(device)
    else:
        kept = dtype if tensor.is_floating_point() else tensor.dtype
        # a copy: the file may be rewritten while the model is in use
        setattr(module, last, nn.Parameter(tensor.to(device, kept, copy=True), requires_grad=False))


def _fresh_buffers(model: Any, device: torch.device) -> None:
    """Buffers that no file holds, such as rotary frequencies, computed anew."""
    for owner in {name.rpartition(".")[0] for name, buffer in model.named_buffers() if buffer.is_meta}:
        module = model.get_submodule(owner)
        with torch.device(device):
            fresh = type(module)(model.config)
        for name, buffer in fresh.named_buffers(recurse=False):
            module.register_buffer(name, buffer, persistent=False)
            if hasattr(module, f"original_{name}"):
                setattr(module, f"original_{name}", buffer)
