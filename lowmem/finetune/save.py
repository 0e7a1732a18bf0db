"""What a fine-tuning run leaves: an adapter that PEFT loads, a merged model that transformers loads; and adapters exchanged on a base."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from lowmem.config.finetune import FinetuneConfig
from lowmem.export.tokenizer_files import GENERATION_CONFIG
from lowmem.finetune.hidden import inner_model
from lowmem.finetune.methods import WITHOUT_ADAPTER
from lowmem.finetune.write import write_model
from lowmem.system.errors import CheckpointError
from lowmem.system.files import storage_errors

_BESIDE = ("configuration_lowmem.py", "modeling_lowmem.py")  # of lowmem's own architecture


def save_adapter(model: Any, base: Path, out: Path) -> None:
    """adapter_config.json and adapter_model.safetensors, which name the base by its absolute path."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = str(base.resolve())
    model.save_pretrained(out, save_embedding_layers=False)
    _copy_beside(base, out, [GENERATION_CONFIG])


def merged_model(model: Any, config: FinetuneConfig) -> Any | None:
    """The model with its adapter multiplied in, for `save_merged`; None for prefix tuning, which has no weights to add.

    The layers of a 4-bit base are merged as they are written: what is saved computes what was trained, rounded nowhere.

    Memory: none that stays.
    """
    if config.method == "prefix":
        return None
    untie(model)
    return model if config.method in (*WITHOUT_ADAPTER, "qlora") else model.merge_and_unload()


def untie(model: Any) -> None:
    """Give the head a weight of its own where it shares the embedding's and an adapter sits on one of them: it changes that one alone.

    Memory: one such weight, only then.
    """
    inner = inner_model(model)
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    if head is None or not any(hasattr(layer, "get_delta_weight") for layer in (embedding, head)):
        return
    rows, matrix = (getattr(layer, "base_layer", layer) for layer in (embedding, head))
    if rows.weight is matrix.weight:
        matrix.weight = nn.Parameter(matrix.weight.detach().clone(), requires_grad=False)
        inner.config.tie_word_embeddings = False


def save_merged(model: Any, base: Path, out: Path) -> None:
    """config.json and safetensors; the base's own generation_config.json, and its model files where it carries them."""
    write_model(model, out)
    _copy_beside(base, out, [*_BESIDE, GENERATION_CONFIG])


def _copy_beside(base: Path, out: Path, names: Iterable[str]) -> None:
    for name in names:
        if (base / name).is_file():
            with storage_errors(out):
                shutil.copyfile(base / name, out / name)


def swap_adapter(model: Any, adapter: Path, name: str) -> Any:
    """Load an adapter beside those that are there, and use it alone.

    Args:
        model: a base, or a peft.PeftModel. `with model.disable_adapter():` computes the base, whose weights never change.
    Returns:
        The peft.PeftModel.
    Raises:
        CheckpointError: there are no safetensors.
    """
    from peft import PeftModel

    if not (adapter / "adapter_model.safetensors").is_file():
        raise CheckpointError(f"{adapter} has no adapter_model.safetensors; other formats are not read, for they can carry code")
    if not isinstance(model, PeftModel):
        return PeftModel.from_pretrained(model, adapter, adapter_name=name)
    if name not in model.peft_config:
        model.load_adapter(str(adapter), adapter_name=name)
    model.set_adapter(name)
    return model
