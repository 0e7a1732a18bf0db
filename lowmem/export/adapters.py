"""What training a model of transformers leaves: an adapter that PEFT loads, and a merged model that transformers loads.

Both are written tensor by tensor: layers are merged, and weights kept in 4 bits made whole, one at a time as they are written.
"""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lowmem.config.checks import QUANTIZED
from lowmem.data.chat_template import TEMPLATE_FILE, ChatTemplate, has_chat_template, load_chat_template, save_chat_template
from lowmem.data.hf_tokenizer import HuggingFaceTokenizer
from lowmem.data.tokenizer_loading import load_tokenizer
from lowmem.data.tokenizers import Tokenizer
from lowmem.engine.huggingface_files import GENERATION_CONFIG, read_config_json, resolve_model_path
from lowmem.engine.peft_files import CONFIG, WEIGHTS
from lowmem.engine.run_model import RunModel
from lowmem.engine.storage.blocks import Storage
from lowmem.export.hf import DTYPES, check_out
from lowmem.models.prefix import PROMPT_EMBEDDINGS, prefix_config, prompt_embeddings
from lowmem.nn.lorpt import LoRPtLinear
from lowmem.nn.lorptize import LoRPtConv1D
from lowmem.nn.loss import row_blocks
from lowmem.nn.quantized import CodedWeight, dense
from lowmem.nn.rows import MatrixRows
from lowmem.system.dry_run import on_meta
from lowmem.system.errors import CheckpointError, ConfigError, DataError
from lowmem.system.files import make_directory, storage_errors, write_json, written_whole
from lowmem.system.tensors import INDEX_NAME, LazyTensor, all_finite, meta_tensors, weight_files, write_tensors

SHARD_BYTES = 5 * 10**9
_FAST_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", TEMPLATE_FILE)
_SLOW_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "spiece.model", "vocab.txt")  # of the same vocabulary
_FILES = (CONFIG, WEIGHTS, "config.json", "model.safetensors", INDEX_NAME, GENERATION_CONFIG, *_FAST_FILES, *_SLOW_FILES)
Tensor = torch.Tensor | LazyTensor


@torch.no_grad()
def export_of_transformers(
    run: RunModel,
    out: Path,
    *,
    adapter: bool,
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    overwrite: bool = False,
    storage: Storage | None = None,
) -> tuple[Path, int]:
    """Write the adapter of a model of transformers, or the model with its adapter or its low-rank factors multiplied in.

    Args:
        run: of a run on model.path, or of another directory.
        adapter: write the adapter alone.
        dtype: of a merged model; see `save_merged`.
        overwrite: take a folder that is not empty: an earlier export there is replaced, and other files are left alone.
        storage: where its blocks are; None has all of them here.
    Returns:
        The directory of its base, and bytes of the weights.
    Raises:
        ConfigError, CheckpointError, StorageError: see `save_adapter` and `save_merged`; or `out` is not empty, or no folder.
    Memory: one tensor.
    """
    if not adapter:
        _check_merge(run.model)
    check_out(out, overwrite=overwrite)
    base = resolve_model_path(run.config.model.path, run.config.model.revision)
    folder = next((folder for folder in run.folders if has_chat_template(folder)), None)
    beside: dict[str, Any] = {
        "tokenizer": run.tokenizer, "template": None if folder in (None, base) else load_chat_template(str(folder), run.tokenizer)
    }  # fmt: skip
    earlier = {*_FILES, *(path.name for path in out.glob("model-*-of-*.safetensors"))} if out.is_dir() else _FILES
    with written_whole(out, earlier) as target:
        if adapter:
            save_adapter(run.model, base, target, **beside)
        else:
            chosen = None if dtype is None else DTYPES[dtype]
            if chosen is None and run.config.train.weight_dtype in QUANTIZED:  # which were read as what they stand for
                chosen = _base_dtype(base)
            save_merged(run.model, base, target, dtype=chosen, **beside, storage=storage)
    return base, sum(path.stat().st_size for path in out.glob("*.safetensors"))


def save_adapter(model: Any, base: Path, out: Path, *, tokenizer: Tokenizer | None = None, template: ChatTemplate | None = None) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which name the base by its absolute path.

    Args:
        model: a `HuggingFaceModel` with an adapter.
        base: the directory of its base.
        tokenizer, template: of the run, which are written beside; None takes those of the base.
    Raises:
        ConfigError: it has no adapter.
        StorageError: the disk is full, or not writable.
    Memory: one tensor.
    """
    if not has_adapter(model):
        raise ConfigError("this model has no adapter to write: its own weights were trained; export it without --format=adapter")
    if _prefix_tokens(model):
        tensors, said = {PROMPT_EMBEDDINGS: prompt_embeddings(model)}, prefix_config(model)
    else:
        from peft import get_peft_model_state_dict

        adapted = _peft(model)
        tensors, said = get_peft_model_state_dict(adapted, save_embedding_layers=False), adapted.peft_config["default"].to_dict()
    make_directory(out)
    values = _plain({**said, "base_model_name_or_path": str(base.resolve()), "inference_mode": True})
    with storage_errors(out):
        write_tensors(out / WEIGHTS, tensors, {"format": "pt"})
    write_json(out / CONFIG, values)
    _write_beside(base, out, tokenizer, template)


def has_adapter(model: Any) -> bool:
    """Whether there is something for `save_adapter`."""
    return _peft(model) is not None or _prefix_tokens(model) > 0


def merge_problem(model: Any) -> str:
    """Why the adapter of a model cannot be multiplied into its weights; empty if it can."""
    return "a prefix is keys and values beside the weights and cannot be merged into them" if _prefix_tokens(model) else ""


def _check_merge(model: Any) -> None:
    if problem := merge_problem(model):
        raise ConfigError(f"{problem}; write it alone with --format=adapter")


def adapter_note(model: Any) -> str:
    """What others compute otherwise with an adapter than lowmem does; empty if that is nothing."""
    window = model.prefix_window() if _prefix_tokens(model) else 0
    if not window:
        return ""
    return (
        f"every token attends the prefix here; in PEFT it counts as a part of the sliding window of {window}, so that only the first "
        f"{window - _prefix_tokens(model)} tokens of a text see all of it in those layers"
    )


@torch.no_grad()
def save_merged(
    model: Any,
    base: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: Tokenizer | None = None,
    template: ChatTemplate | None = None,
    shard_bytes: int = SHARD_BYTES,
    storage: Storage | None = None,
) -> int:
    """Write config.json, the weights with the adapter or low-rank factors multiplied in, generation_config.json, tokenizer and template.

    Args:
        model: a `HuggingFaceModel`; it is left as it is.
        base: the directory of its base.
        dtype: of the weights. None takes what is trained, where the weights themselves are and no codes, else that of the base's files.
        tokenizer, template: of the run; None takes those of the base.
        shard_bytes: most bytes of a file; larger models have several and an index.
        storage: where its blocks and its matrices are; None has all of them here.
    Returns:
        Bytes of the weights.
    Raises:
        ConfigError: two adapters sit on one layer, or it is a prefix.
        CheckpointError: weights are not finite in `dtype`.
        StorageError: the disk is full, or not writable.
    Memory: one tensor in fp32; where blocks are elsewhere, the block that it is of.
    """
    _check_merge(model)
    if dtype is None and (_frozen(model) or any(isinstance(parameter, CodedWeight) for parameter in model.parameters())):
        dtype = _base_dtype(base)
    lm, storage = model.lm, storage or Storage()
    untied = _untied(lm)
    tensors = {name: _in_dtype(name, value, dtype, made_of, storage) for name, value, made_of in _merged_tensors(lm, untied)}
    make_directory(out)
    _write_shards(out, tensors, shard_bytes)
    stored = next(iter(tensors.values())).dtype
    config = read_config_json(base)
    config.pop("torch_dtype", None)
    config |= {"architectures": [type(lm).__name__], "dtype": str(stored).removeprefix("torch.")}
    rows = lm.get_input_embeddings().weight.shape[0]
    config |= {"vocab_size": rows} if "vocab_size" in config else {}
    config["tie_word_embeddings"] = bool(getattr(lm.config, "tie_word_embeddings", False)) and not untied
    write_json(out / "config.json", config)
    _write_beside(base, out, tokenizer, template)
    return sum(_bytes(tensor) for tensor in tensors.values())


def _peft(model: Any) -> Any:
    return getattr(model, "peft", None)


def _prefix_tokens(model: Any) -> int:
    return getattr(model, "prefix_tokens", 0)


def _frozen(model: Any) -> bool:
    """Whether most weights are the base's own."""
    return _peft(model) is not None or any(not parameter.requires_grad for parameter in model.lm.parameters())


def _base_dtype(base: Path) -> torch.dtype | None:
    """The dtype of all weights of the base's files; None if they have several."""
    found = {tensor.dtype for file in weight_files(base) for _, tensor in meta_tensors(file) if tensor.is_floating_point()}
    return found.pop() if len(found) == 1 else None


def _untied(lm: Any) -> bool:
    """Whether embedding and head share a weight that adapters change: merged, they are two, also where each has one of its own."""
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    if head is None or _inner(embedding).weight is not _inner(head).weight:
        return False
    saved = [_saved_whole(layer) for layer in (embedding, head)]
    if any(layer is not None for layer in saved):
        return saved[0] is None or saved[1] is None or saved[0].weight is not saved[1].weight
    return _is_adapted(embedding) or _is_adapted(head)


def _saved_whole(layer: Any) -> Any:
    """The copy of a layer that an adapter has in its place (`modules_to_save`); None where it has none."""
    return layer.modules_to_save[layer.active_adapters[0]] if type(layer).__name__ == "ModulesToSaveWrapper" else None


def _inner(layer: Any) -> Any:
    """The base's own layer below PEFT's."""
    while True:
        below = getattr(layer, "base_layer", None) or getattr(layer, "original_module", None)
        if below is None:
            return layer
        layer = below


def _is_adapted(layer: Any) -> bool:
    """Whether a layer's numbers are changed by more than new rows, which both ends of a tie share."""
    return hasattr(layer, "merge") and hasattr(layer, "active_adapters") and type(layer).__name__ != "TrainableTokensWrapper"


def _merged_tensors(lm: Any, untied: bool) -> Iterator[tuple[str, Tensor, list[torch.Tensor]]]:
    """Weights and persistent buffers by the names of transformers, tied ones once, and what each is made of."""
    done: list[str] = []
    seen: set[int] = set()
    head = lm.get_output_embeddings()
    tied_head = head is not None and not untied and _inner(lm.get_input_embeddings()).weight is _inner(head).weight
    for name, module in lm.named_modules():
        if any(name.startswith(prefix) for prefix in done):
            continue
        dot = f"{name}." if name else ""
        base = _inner(module)
        if module is head and tied_head:
            done.append(dot)
        elif isinstance(module, LoRPtLinear):
            done.append(dot)
            shape = (module.out_features, module.in_features)
            shape = shape[::-1] if isinstance(module, LoRPtConv1D) else shape
            yield f"{dot}weight", LazyTensor(shape, module.up.dtype, partial(_product, module)), list(module.parameters())
            if module.bias is not None:
                yield f"{dot}bias", module.bias, [module.bias]
        elif base is not module:
            done.append(dot)
            for part in ("weight", "bias"):
                if (held := getattr(base, part, None)) is not None:
                    value = LazyTensor(tuple(held.shape), torch.float32, partial(_whole, module, base, part, name))
                    saved = _saved_whole(module)
                    yield dot + part, value, list(module.parameters()) if saved is None else [getattr(saved, part)]
        else:
            for key, value in [*module._parameters.items(), *module._buffers.items()]:
                if value is not None and key not in module._non_persistent_buffers_set and id(value) not in seen:
                    seen.add(id(value))
                    coded = hasattr(value, "dense")
                    yield dot + key, LazyTensor(tuple(value.shape), torch.float32, partial(_dense, value)) if coded else value, [value]


@torch.no_grad()
def _product(layer: LoRPtLinear) -> torch.Tensor:
    """The weight that two factors stand for, as the files of its family hold it."""
    weight = layer.merged_weight()
    return weight.t().contiguous() if isinstance(layer, LoRPtConv1D) else weight


@torch.no_grad()
def _whole(layer: Any, base: Any, part: str, name: str) -> torch.Tensor:
    """The weight or the bias that an adapted layer computes with, in fp32.

    Raises:
        ConfigError: two adapters sit on it.
    """
    outer = layer.token_adapter if type(layer).__name__ == "TrainableTokensWrapper" else layer
    if (saved := _saved_whole(layer)) is not None:
        return _dense(getattr(saved, part))
    if outer.base_layer is not base or len(layer.active_adapters) > 1:
        raise ConfigError(f"{name} has several adapters, one upon the other, which cannot be merged here; merge them with PEFT")
    if outer is not layer:  # some rows
        return outer.get_merged_weights(outer.active_adapters).float() if part == "weight" else _dense(base.bias)
    layer.base_layer = copy = _copy_in_fp32(base)
    try:
        layer.merge()
        return getattr(copy, part)
    finally:
        layer.base_layer = base
        layer.merged_adapters.clear()
        getattr(layer, "_caches", {}).clear()


def _dense(weight: torch.Tensor) -> torch.Tensor:
    """The numbers of a weight in fp32, in memory of their own."""
    coded: Any = weight.detach()
    return coded.dense(torch.float32) if hasattr(coded, "dense") else coded.to(torch.float32, copy=True)


def _copy_in_fp32(base: Any) -> Any:
    """A layer of the kind of `base` with its numbers in fp32, for `merge` to change."""
    with on_meta():
        if isinstance(base, nn.Linear):
            copy: Any = nn.Linear(base.in_features, base.out_features, bias=False)
        elif isinstance(base, nn.Embedding):
            copy = nn.Embedding(*base.weight.shape)
        else:
            copy = type(base)(base.nf, base.nx)  # Conv1D of transformers
    for part in ("weight", "bias"):
        if (held := getattr(base, part, None)) is not None:
            setattr(copy, part, nn.Parameter(_dense(held), requires_grad=False))
    return copy


def _in_dtype(name: str, value: Tensor, dtype: torch.dtype | None, made_of: list[torch.Tensor], storage: Storage) -> LazyTensor:
    """A tensor as it is written, refused if it is not finite then."""
    kept = dtype if dtype is not None and value.dtype.is_floating_point else value.dtype
    matrix = storage.matrix(made_of[0]) if len(made_of) == 1 else None

    def checked(made: torch.Tensor) -> torch.Tensor:
        if not all_finite(made, kept):
            raise CheckpointError(
                f"{name} is not finite in {str(kept).removeprefix('torch.')}; choose another --checkpoint, or --dtype=fp32"
            )
        return made.to(kept)

    def pieces() -> Iterator[torch.Tensor]:
        if matrix is not None:
            yield from map(checked, _rows(matrix, value.dtype))
            return
        with storage.holding(made_of):
            yield checked(value.get() if isinstance(value, LazyTensor) else value.detach())

    return LazyTensor(tuple(value.shape), kept, lambda: torch.cat([*pieces()]), pieces=pieces)


def _rows(matrix: MatrixRows, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    for rows in row_blocks(matrix.shape[0]):
        yield dense(matrix.read(rows).detach(), dtype)


def _bytes(tensor: Tensor) -> int:
    return torch.Size(tensor.shape).numel() * tensor.dtype.itemsize


def _write_shards(out: Path, tensors: dict[str, LazyTensor], shard_bytes: int) -> None:
    """model.safetensors, or several files with an index."""
    parts: list[dict[str, LazyTensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if parts[-1] and filled + _bytes(tensor) > shard_bytes:
            parts.append({})
            filled = 0
        parts[-1][name] = tensor
        filled += _bytes(tensor)
    with storage_errors(out):
        if len(parts) == 1:
            write_tensors(out / "model.safetensors", parts[0], {"format": "pt"})
            return
        files = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
        for file, part in zip(files, parts, strict=True):
            write_tensors(out / file, part, {"format": "pt"})
    places = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    total = sum(_bytes(tensor) for tensor in tensors.values())
    write_json(out / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": places})


def _write_beside(base: Path, out: Path, tokenizer: Tokenizer | None, template: ChatTemplate | None) -> None:
    """The base's generation_config.json and tokenizer; the run's tokenizer and template where they are others."""
    own = tokenizer is None or _is_that_of(base, tokenizer)
    with storage_errors(out):
        for name in (GENERATION_CONFIG, *_FAST_FILES, *(_SLOW_FILES if own else ())):
            if (base / name).is_file():
                shutil.copyfile(base / name, out / name)
    if not own and isinstance(tokenizer, HuggingFaceTokenizer):
        write_json(out / "tokenizer.json", tokenizer.to_json())
    if template is not None:
        save_chat_template(template, out)


def _is_that_of(base: Path, tokenizer: Tokenizer) -> bool:
    try:
        return load_tokenizer(base).sha256() == tokenizer.sha256()
    except DataError:
        return False


def _plain(value: Any) -> Any:
    """What JSON can hold: sets as sorted lists, enumerations as their values."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(_plain(item) for item in value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    inner = getattr(value, "value", value)
    return inner if isinstance(inner, str | int | float | bool | None) else str(inner)
