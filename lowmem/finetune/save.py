"""What a fine-tuning run leaves: an adapter that PEFT loads, a merged model that transformers loads; and adapters exchanged on a base."""

import shutil
from pathlib import Path
from typing import Any

from lowmem.config_finetune import FinetuneConfig
from lowmem.finetune.methods import WITHOUT_ADAPTER
from lowmem.finetune.write import write_model

_CODE = ("configuration_lowmem.py", "modeling_lowmem.py")


def save_adapter(model: Any, base: Path, out: Path) -> None:
    """adapter_config.json and adapter_model.safetensors, which name the base by its absolute path."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = str(base.resolve())
    model.save_pretrained(out, save_embedding_layers=False)


def merged_model(model: Any, config: FinetuneConfig) -> Any | None:
    """The model with its adapter multiplied in, for `save_merged`; None for prefix tuning, which has no weights to add.

    The layers of a 4-bit base are merged as they are written: what is saved computes what was trained, rounded nowhere.

    Memory: none that stays.
    """
    if config.method == "prefix":
        return None
    return model if config.method in (*WITHOUT_ADAPTER, "qlora") else model.merge_and_unload()


def save_merged(model: Any, base: Path, out: Path) -> None:
    """config.json and safetensors; where the base carries its model files, those too."""
    write_model(model, out)
    for name in _CODE:
        if (base / name).is_file():
            shutil.copyfile(base / name, out / name)


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
