"""What a fine-tuning run leaves: an adapter that PEFT loads, a merged model that transformers loads; and adapters exchanged on a base."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowmem.config_finetune import FinetuneConfig
from lowmem.finetune.base_model import load_base
from lowmem.finetune.methods import WITHOUT_ADAPTER

_CODE = "modeling_lowmem.py"


def save_adapter(model: Any, base: Path, out: Path) -> None:
    """adapter_config.json and adapter_model.safetensors, which name the base by its absolute path."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = str(base.resolve())
    model.save_pretrained(out, save_embedding_layers=False)


def merged_model(model: Any, config: FinetuneConfig, base: Path, adapter: Path) -> Any | None:
    """The model with its adapter multiplied in; None for prefix tuning, which has no weights to add.

    A 4-bit base is widened first: the merged model computes what was trained, rounded nowhere.

    Memory: the whole model in fp32.
    """
    if config.method in WITHOUT_ADAPTER:
        return model
    if config.method == "prefix":
        return None
    if config.method != "qlora":
        return model.merge_and_unload()
    from peft import PeftModel

    wide = widened(load_base(base, nf4=True, double_quant=config.adapter.double_quant))
    if config.add_tokens:
        rows = model.get_base_model().get_input_embeddings().weight.shape[0]
        if rows != wide.get_input_embeddings().weight.shape[0]:
            wide.resize_token_embeddings(rows, mean_resizing=False)
    return PeftModel.from_pretrained(wide, adapter).merge_and_unload()


@torch.no_grad()
def widened(model: Any) -> Any:
    """Every 4-bit layer as an ordinary one with the numbers it stands for."""
    import bitsandbytes

    for name, layer in list(model.named_modules()):
        if type(layer).__name__ == "Linear4bit":
            with torch.device("meta"):
                new = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            dense = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            new.weight = nn.Parameter(dense, requires_grad=False)
            if layer.bias is not None:
                new.bias = layer.bias
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new)
    model.is_loaded_in_4bit = False
    return model


def save_merged(model: Any, base: Path, out: Path) -> None:
    """config.json and safetensors; where the base carries its model file, that file too."""
    model.save_pretrained(out)
    if (base / _CODE).is_file():
        shutil.copyfile(base / _CODE, out / _CODE)


def swap_adapter(model: Any, adapter: Path, name: str) -> Any:
    """Load an adapter beside those that are there, and use it alone.

    Args:
        model: a base, or a peft.PeftModel. `with model.disable_adapter():` computes the base, whose weights never change.
    Returns:
        The peft.PeftModel.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return PeftModel.from_pretrained(model, adapter, adapter_name=name)
    if name not in model.peft_config:
        model.load_adapter(str(adapter), adapter_name=name)
    model.set_adapter(name)
    return model
