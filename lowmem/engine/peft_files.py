"""An adapter of PEFT on disk: its base, what it must hold, and a model with it.

Nothing of it is run: only safetensors are read, and only kinds of adapters whose modules are PEFT's own.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch

from lowmem.data.tokenizer_loading import load_tokenizer
from lowmem.data.tokenizers import Tokenizer
from lowmem.engine import huggingface_files
from lowmem.engine.huggingface_files import reported_as_damage, resolve_model_path
from lowmem.engine.weights import coded_weights, stored_weights, summary, weight_problems
from lowmem.models.adapters import UNUSED_BY_PEFT
from lowmem.models.base import Place, stays
from lowmem.models.huggingface import HuggingFaceModel
from lowmem.models.prefix import PROMPT_EMBEDDINGS, add_prefix, load_prompt_embeddings, prompt_embeddings
from lowmem.system.dry_run import on_meta
from lowmem.system.errors import CheckpointError, ConfigError
from lowmem.system.light_imports import absent
from lowmem.system.tensors import read_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KINDS = ("LORA", "IA3", "PREFIX_TUNING")
_PLAIN_INIT = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the base before the adapter is added to it
_INNER = "base_model.model."


def read_adapter_config(adapter: Path) -> dict[str, Any]:
    """What an adapter_config.json says.

    Raises:
        CheckpointError: it cannot be read, is of a kind that lowmem does not take, or there are no safetensors beside it.
    """
    path = adapter / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); give an adapter that PEFT or lowmem has written") from error
    if not isinstance(values, dict) or values.get("peft_type") not in _KINDS:
        found = values.get("peft_type") if isinstance(values, dict) else type(values).__name__
        raise CheckpointError(f"{path}: found peft_type {found!r:.60}, allowed: {', '.join(_KINDS)}; merge it into its base with PEFT")
    if values.get("task_type") not in (None, "CAUSAL_LM"):
        raise CheckpointError(f"{path}: found task_type {values['task_type']!r:.60}, allowed: CAUSAL_LM; give an adapter of such a model")
    if values.get("init_lora_weights", True) not in _PLAIN_INIT:
        raise CheckpointError(
            f"{path}: init_lora_weights is {values['init_lora_weights']!r:.60}, which changes the base; save the adapter as plain LoRA "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if not (adapter / WEIGHTS).is_file():
        others = ", ".join(sorted(file.name for file in adapter.glob("adapter_model.*"))) or "none"
        raise CheckpointError(f"{adapter} has no {WEIGHTS} (found: {others}); save it with safetensors: other formats can carry code")
    return values


def adapter_base(adapter: Path) -> Path:
    """The directory of the model that an adapter is for.

    Raises:
        CheckpointError: it names none, or one that is not there.
    """
    base = read_adapter_config(adapter).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{adapter / CONFIG} names no base_model_name_or_path; give the base as --run and this as --adapter")
    try:
        return resolve_model_path(base)
    except (ConfigError, CheckpointError) as error:
        said = str(error).removeprefix("model.path is ").partition(";")[0]
        raise CheckpointError(f"{adapter / CONFIG}: its base is {said}; give the base as --run and this as --adapter") from error


def base_with_adapter(
    base: Path, dtype: torch.dtype, adapter: Path | None, *, rows: int, outline: bool, place: Place = stays
) -> HuggingFaceModel:
    """The model of a directory of transformers, with an adapter of PEFT if one is given.

    Args:
        rows: tokens of the tokenizer, for which an adapter may have brought new rows.
        place: see `load_model`.
    Raises:
        CheckpointError: see `load_model`; or the adapter is none, is damaged, or is for another base.
    Memory: the base and the adapter; of an outline nothing.
    """
    if outline:
        with on_meta():
            return _adapted(huggingface_files.outline(base, dtype), adapter, rows)
    return _adapted(huggingface_files.load_model(base, dtype, place=place), adapter, rows)


def with_adapter(model: Any, adapter: Path, tokenizer: Tokenizer) -> tuple[HuggingFaceModel, Tokenizer]:
    """A model of transformers without adapter, with one; and the tokenizer, which is the adapter's where it has one.

    Raises:
        CheckpointError: the adapter is none, is damaged, or is for another base.
    """
    own = load_tokenizer(adapter) if (adapter / "tokenizer.json").is_file() else tokenizer
    with torch.device(next(model.parameters()).device):
        return _adapted(model.lm, adapter, own.vocab_size), own


def _adapted(lm: Any, adapter: Path | None, rows: int) -> HuggingFaceModel:
    if adapter is None:
        return HuggingFaceModel(lm)
    values = read_adapter_config(adapter)
    stored = stored_weights(adapter / WEIGHTS, {})
    if coded := coded_weights(stored):
        raise CheckpointError(f"{adapter / WEIGHTS} holds no weights: {summary(coded)}; restore it")
    _take_rows(lm, values, {name: tuple(tensor.shape) for name, tensor in stored.items()}, rows)
    model = HuggingFaceModel(lm)
    if values["peft_type"] == "PREFIX_TUNING":
        _load_prefix(model, adapter, values, stored)
        return model
    adapted = _injected(lm, adapter)
    model.__dict__["peft"] = adapted  # its parameters are the model's: registered, each would have two names
    _load(adapted, adapter, stored)
    return model


def _take_rows(lm: Any, values: dict[str, Any], shapes: dict[str, tuple[int, ...]], rows: int) -> None:
    """Rows for tokens that the adapter has and its base has not."""
    held = lm.get_input_embeddings().weight.shape[0]
    tokens = values.get("trainable_token_indices")
    listed = [token for part in tokens.values() for token in part] if isinstance(tokens, dict) else tokens or []
    whole = [shape[0] for name, shape in shapes.items() if name.endswith(("embed_tokens.weight", "wte.weight")) and len(shape) == 2]
    wanted = max([*(token + 1 for token in listed if type(token) is int), *whole, 0])
    if held < wanted <= max(rows, *whole, 0):
        with reported_as_damage(Path(lm.name_or_path)):
            lm.resize_token_embeddings(wanted, mean_resizing=False)


def _load_prefix(model: HuggingFaceModel, adapter: Path, values: dict[str, Any], stored: dict[str, torch.Tensor]) -> None:
    """A prefix before every text, with the numbers of an adapter; those that PEFT made by reparameterisation are saved like others.

    Raises:
        CheckpointError: the base takes none, or not of this shape.
    """
    count = values.get("num_virtual_tokens")
    if type(count) is not int or not 0 < count < 1 << 20:
        raise CheckpointError(f"{adapter / CONFIG}: found num_virtual_tokens {count!r:.60}, allowed: a positive integer; restore it")
    try:
        add_prefix(model, count, seed=0)
    except ConfigError as error:
        said = str(error).rpartition(";")[0]
        raise CheckpointError(f"the adapter {adapter} does not fit the base {model.lm.name_or_path}: {said}") from error
    wanted = {PROMPT_EMBEDDINGS: prompt_embeddings(model)}
    if problems := weight_problems(stored, wanted):
        base = model.lm.name_or_path
        raise CheckpointError(f"the adapter {adapter} does not fit the base {base}: {summary(problems)}; give the base it was made for")
    if model.device.type != "meta":
        load_prompt_embeddings(model, dict(read_tensors(adapter / WEIGHTS))[PROMPT_EMBEDDINGS])


def _injected(lm: Any, adapter: Path) -> Any:
    """PEFT's modules in place of the base's, as the adapter's configuration says.

    Raises:
        ConfigError: PEFT is missing.
        CheckpointError: the base has no such layers, or the configuration is damaged.
    """
    try:
        with absent(*UNUSED_BY_PEFT):
            import peft
    except ImportError as error:
        raise ConfigError("adapters need peft; pip install 'lowmem[finetune]'") from error
    try:
        with absent(*UNUSED_BY_PEFT), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.get_peft_model(lm, peft.PeftConfig.from_pretrained(str(adapter)))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"the adapter {adapter} does not fit the base {lm.name_or_path}: {said}; give the base it was made for"
        ) from error


def _load(peft_model: Any, adapter: Path, stored: dict[str, torch.Tensor]) -> None:
    """Copy the adapter's tensors, once names and shapes are seen to be those of its configuration on this base.

    Raises:
        CheckpointError: they are not.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    wanted = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    inner = {f"{_INNER}{name}": tensor for name, tensor in peft_model.get_base_model().state_dict().items()}
    wanted |= {name: inner[name] for name in stored if name not in wanted and name in inner}  # rows that PEFT saved whole
    if problems := weight_problems(stored, wanted):
        base = peft_model.get_base_model().name_or_path
        raise CheckpointError(f"the adapter {adapter} does not fit the base {base}: {summary(problems)}; give the base it was made for")
    if not any(tensor.is_meta for tensor in wanted.values()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            set_peft_model_state_dict(peft_model, dict(read_tensors(adapter / WEIGHTS)))
