"""Llama and GPT-2 directories of transformers as run directories: to train on, to convert to LoRPt, to write, to export again."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowmem.config.dump import dump_config
from lowmem.config.schema import DataConfig, LorptConfig, ModelConfig, RunConfig, TrainConfig
from lowmem.data.chat_template import save_chat_template
from lowmem.data.tokenizer_loading import load_tokenizer
from lowmem.data.tokenizers import Tokenizer
from lowmem.engine.huggingface_files import GENERATION_CONFIG, read_generation_config
from lowmem.engine.manifest import MANIFEST_NAME, TOKENIZER_KEY, checkpoint_name, file_hashes
from lowmem.export.hf import GPT2_ACTIVATIONS, gpt2_weights, llama_weights
from lowmem.export.tokenizer_files import OWN_TOKENIZER, run_template
from lowmem.models.base import LanguageModel
from lowmem.models.registry import build_model
from lowmem.nn.linear import Linear
from lowmem.nn.lorpt import LoRPtLinear, MixedSplit
from lowmem.nn.lorptize import Converted, lorptize
from lowmem.system.dry_run import on_meta
from lowmem.system.errors import CheckpointError, ConfigError
from lowmem.system.files import UNFINISHED, make_directory, storage_errors, write_json, written_whole
from lowmem.system.tensors import WEIGHT_DTYPES, all_finite, meta_tensors, read_tensors, tensor_shapes, weight_files, write_tensors

_ACTIVATIONS: dict[str, Any] = {theirs: ours for ours, theirs in GPT2_ACTIVATIONS.items()} | {"gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class TheirModel:
    """A model of transformers.

    Attributes:
        family: llama or gpt2.
        shape: of lowmem's decoder; vocab_size and max_seq_len are set.
        missing_biases: ends of the names of biases that the directory does not have, and that are zero.
    """

    family: str
    shape: ModelConfig
    missing_biases: tuple[str, ...] = ()


def read_model_config(source: Path) -> TheirModel:
    """The model of a directory.

    Raises:
        ConfigError: there is no config.json, it lacks something, or it asks for what lowmem's decoder does not have.
    """
    path = source / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); give a directory that transformers' save_pretrained has written") from error
    family = values.get("model_type") if isinstance(values, dict) else None
    if not isinstance(family, str) or family not in ("llama", "gpt2"):
        remedy = (
            "use the run it was exported from"
            if family == "lowmem"
            else f"lowmem pretrain --model.path={source} takes any causal language model as it is"
        )
        raise ConfigError(f"{path} has model_type {str(family)[:80]}, allowed: llama, gpt2; {remedy}")
    _check_types(values, path)
    try:
        model = _llama(values, path) if family == "llama" else _gpt2(values, path)
    except KeyError as error:
        raise ConfigError(f"{path} lacks {error}; save the model again with save_pretrained") from error
    shape = model.shape
    if min(shape.dim, shape.num_heads, shape.num_layers, shape.vocab_size, shape.max_seq_len) < 1 or shape.dim % shape.num_heads:
        raise ConfigError(f"{path}: a width of {shape.dim} with {shape.num_heads} heads in {shape.num_layers} layers is no model; mend it")
    return model


# what may stand under a key, and whether null may: it is then as if the key were not there; under all other keys transformers refuses it
_COUNTS = {
    "hidden_size": False, "intermediate_size": False, "num_hidden_layers": False, "num_attention_heads": False, "vocab_size": False,
    "max_position_embeddings": False, "num_key_value_heads": True, "head_dim": True,
    "n_embd": False, "n_layer": False, "n_head": False, "n_positions": False, "n_inner": True,
}  # fmt: skip
_NUMBERS = {"rope_theta": True, "partial_rotary_factor": True, "rope rope_theta": False, "rms_norm_eps": False, "layer_norm_epsilon": False}
_SWITCHES = (
    "attention_bias", "mlp_bias", "tie_word_embeddings", "scale_attn_by_inverse_layer_idx", "scale_attn_weights", "add_cross_attention",
)  # fmt: skip
_NAMES = ("hidden_act", "activation_function")
_LARGEST = {"num_hidden_layers": 10_000, "n_layer": 10_000}  # other sizes meet the shapes of the weights
_LARGEST_COUNT = 1 << 31


def _check_types(values: dict[str, Any], path: Path) -> None:
    """Refuse what no transformers writes under the keys that are read.

    Raises:
        CheckpointError: names the first such key.
    """
    rope = [values.get(key) for key in ("rope_parameters", "rope_scaling")]
    problems = [f"{part!r:.60}, expected an object or null" for part in rope if not isinstance(part, (dict, type(None)))]
    known = values | {f"rope {key}": part[key] for part in rope if isinstance(part, dict) for key in part}
    for key, value in known.items():
        name = key.removeprefix("rope ")
        if name in _COUNTS:
            most = _LARGEST.get(name, _LARGEST_COUNT)
            right, wanted = (type(value) is int and 1 <= value <= most) or (value is None and _COUNTS[name]), f"1 to {most}"
        elif name in _NUMBERS:
            right = (type(value) in (int, float) and 0 < value < math.inf) or (value is None and _NUMBERS.get(key, _NUMBERS[name]))
            wanted = "a number above 0"
        elif name in _SWITCHES:
            right, wanted = isinstance(value, bool), "true or false"
        elif name in _NAMES or key in ("rope rope_type", "rope type"):
            right, wanted = isinstance(value, str), "a name"
        else:
            continue
        found = "null" if value is None else f"{value!r:.60}"
        problems += [] if right else [f"{name} {found}, expected {wanted}"]
    if problems:
        raise CheckpointError(f"{path} has {problems[0]}; restore it")


def _llama(values: Mapping[str, Any], path: Path) -> TheirModel:
    dim, heads = values["hidden_size"], values["num_attention_heads"]
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}  # of both, transformers takes the older name
    kind = rope.get("rope_type", rope.get("type", "default"))
    width = values.get("head_dim") or dim // heads
    biases = {"self_attn": bool(values.get("attention_bias")), "mlp": bool(values.get("mlp_bias"))}
    _refuse(
        {
            f"rope_type {kind}": kind != "default",
            f"partial_rotary_factor {rope.get('partial_rotary_factor')}": rope.get("partial_rotary_factor") not in (None, 1, 1.0),
            f"head_dim {width} with hidden_size {dim} and {heads} heads": width * heads != dim,
            f"hidden_act {values.get('hidden_act')}": values.get("hidden_act", "silu") != "silu",
            "quantization_config": bool(values.get("quantization_config")),
        },
        path,
    )
    shape = ModelConfig(
        dim=dim,
        hidden_dim=values["intermediate_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads") or 0,
        vocab_size=values["vocab_size"],
        max_seq_len=values.get("max_position_embeddings", 2048),
        rope_theta=float(rope.get("rope_theta") or values.get("rope_theta") or ModelConfig.rope_theta),
        norm_eps=values.get("rms_norm_eps", 1e-6),
        bias=any(biases.values()),
        tie_embeddings=bool(values.get("tie_word_embeddings")),
    )
    shape.num_kv_heads = 0 if shape.num_kv_heads == heads else shape.num_kv_heads
    parts = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
    zero = tuple(f"{group}.{part}.bias" for group, there in biases.items() if shape.bias and not there for part in parts[group])
    return TheirModel("llama", shape, zero)


def _gpt2(values: Mapping[str, Any], path: Path) -> TheirModel:
    activation = values.get("activation_function", "gelu_new")
    _refuse(
        {
            f"activation_function {activation}": activation not in _ACTIVATIONS,
            "scale_attn_by_inverse_layer_idx": bool(values.get("scale_attn_by_inverse_layer_idx")),
            "scale_attn_weights false": not values.get("scale_attn_weights", True),
            "add_cross_attention": bool(values.get("add_cross_attention")),
            "quantization_config": bool(values.get("quantization_config")),
        },
        path,
    )
    shape = ModelConfig(
        dim=values["n_embd"],
        hidden_dim=values.get("n_inner") or 0,
        num_layers=values["n_layer"],
        num_heads=values["n_head"],
        vocab_size=values["vocab_size"],
        max_seq_len=values["n_positions"],
        positions="learned",
        norm="layernorm",
        norm_eps=values.get("layer_norm_epsilon", 1e-5),
        activation=_ACTIVATIONS[activation],
        bias=True,
        tie_embeddings=values.get("tie_word_embeddings", True),
    )
    return TheirModel("gpt2", shape)


def _refuse(problems: Mapping[str, bool], path: Path) -> None:
    if found := [name for name, is_so in problems.items() if is_so]:
        taken = f"lowmem pretrain --model.path={path.parent} takes it as it is"
        remedy = "give a model with plain weights" if "quantization_config" in found else taken
        raise ConfigError(f"{path} has {', '.join(found)}, which lowmem's decoder does not have; {remedy}")


SEQ_LEN = 1024  # of the configuration that is written; shorter where the model takes less
_HEAD, _EMBEDDINGS = "lm_head.weight", ("embed_tokens.weight", "wte.weight")
_BUFFERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")  # what older files hold beside weights


@dataclass(frozen=True)
class Imported:
    """What was written.

    Attributes:
        family: llama or gpt2.
        config: of the run directory.
        parameters: numbers in the weights.
        converted: the layers that became low-rank.
    """

    family: str
    config: RunConfig
    parameters: int
    converted: list[Converted]


def import_directory(source: Path | str, out: Path | str, lorpt: LorptConfig | None = None) -> Imported:
    """Write a run directory at step 0 with the model and the tokenizer of a Llama or GPT-2 directory.

    Args:
        source: config.json, model.safetensors or its shards with their index, tokenizer.json.
        out: new or empty. The weights keep their dtype.
        lorpt: layers that become their best low-rank approximation, with a linear bottleneck; None leaves all of them.
    Raises:
        ConfigError: another family, something that lowmem's decoder does not have, a rank that saves nothing, or `out` is not empty.
        CheckpointError: weights are missing, damaged, of other shapes, quantised, not finite, or no safetensors.
        DataError: the tokenizer is missing or malformed.
        StorageError: `out` cannot be written.
    Memory: the model and one tensor; with `lorpt` also the singular vectors of a layer.
    """
    source, out = Path(source), Path(out)
    if out.exists() and (not out.is_dir() or any(not path.name.startswith(UNFINISHED) for path in out.iterdir())):
        raise ConfigError(f"--out is {out}, which is not empty; choose another folder")
    theirs = _with_own_head(source, read_model_config(source))
    shape = theirs.shape
    tokenizer = load_tokenizer(source / OWN_TOKENIZER if (source / OWN_TOKENIZER).is_file() else source)
    if tokenizer.vocab_size > shape.vocab_size:
        raise ConfigError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} tokens, the model {shape.vocab_size}; give those that belong together"
        )
    model, converted = _dense_model(source, theirs), []
    if lorpt is not None:
        shape = replace(shape, lorpt=replace(lorpt, bottleneck="linear"))
        converted = _to_low_rank(model, shape)
    config = RunConfig(
        model=shape,
        data=DataConfig(tokenizer=str(out / "tokenizer.json"), seq_len=min(shape.max_seq_len, SEQ_LEN)),
        train=TrainConfig(init_from=str(out)),
        run_dir=f"{out}-trained",
    )
    template, generation = run_template(source, tokenizer), read_generation_config(source)
    with written_whole(out) as folder:
        _write_run(folder, config, model, tokenizer)
        if template is not None:
            save_chat_template(template, folder)
        if generation:
            write_json(folder / GENERATION_CONFIG, generation)
    return Imported(theirs.family, config, model.num_parameters(), converted)


def _write_run(out: Path, config: RunConfig, model: LanguageModel, tokenizer: Tokenizer) -> None:
    checkpoints = out / "checkpoints"
    folder = checkpoints / checkpoint_name(0)
    make_directory(folder)
    with storage_errors(out):
        (out / "config.yaml").write_text(dump_config(config, comments=True), encoding="utf-8")
        write_tensors(folder / "model.safetensors", model.state_dict())
        # in the manifest, for there is no state of a training
        write_json(folder / MANIFEST_NAME, {"step": 0, TOKENIZER_KEY: tokenizer.sha256(), "files": file_hashes(folder)})
        for pointer in ("latest", "best"):
            (checkpoints / pointer).write_text(f"{checkpoint_name(0)}\n", encoding="utf-8")
    tokenizer.save(out / "tokenizer.json")


def _with_own_head(source: Path, theirs: TheirModel) -> TheirModel:
    """The model untied if its files hold a head that differs from its embedding, whatever its config.json says: as transformers reads it.

    Memory: embedding and head.
    """
    if not theirs.shape.tie_embeddings:
        return theirs
    files = [(file, list(tensor_shapes(file))) for file in weight_files(source)]
    if not any(_HEAD in names for _, names in files):
        return theirs
    both: dict[str, torch.Tensor] = {}
    for file, names in files:
        wanted = [name for name in names if name == _HEAD or name.endswith(_EMBEDDINGS)]
        both |= dict(read_tensors(file, wanted)) if wanted else {}
    head = both.pop(_HEAD)
    same = any(head.shape == other.shape and torch.equal(head.float(), other.float()) for other in both.values())
    return theirs if same else replace(theirs, shape=replace(theirs.shape, tie_embeddings=False))


@torch.no_grad()
def _dense_model(source: Path, theirs: TheirModel) -> LanguageModel:
    """The model with its weights, each copied to its place as it is read.

    Raises:
        CheckpointError: names, shapes or dtypes are not those of the configuration, or numbers are not finite.
    """
    files, shape = weight_files(source), theirs.shape
    dtypes = {name: tensor.dtype for file in files for name, tensor in meta_tensors(file) if not name.endswith(_BUFFERS)}
    for name, found in dtypes.items():
        if found not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{source} has weights of {found} ({name}), allowed: float32, bfloat16, float16; save it again in one of them"
            )
    dtype = dtypes.popitem()[1] if len({*dtypes.values()}) == 1 else torch.float32
    model = build_model(shape, vocab_size=shape.vocab_size, max_seq_len=shape.max_seq_len, seed=0, dtype=dtype)
    places = dict(llama_weights(model) if theirs.family == "llama" else gpt2_weights(model))
    problems, missing = [], {name for name in places if not name.endswith(theirs.missing_biases or (" ",))}
    for name, tensor in _tensors(files, places):
        place = places.get(name)
        if place is None:
            problems += [] if name == _HEAD and shape.tie_embeddings else [f"{name} is unknown"]
        elif place.shape != tensor.shape:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(place.shape)}")
        elif not all_finite(tensor):
            raise CheckpointError(f"{source} holds weights that are not finite ({name}); restore its files")
        else:
            place.copy_(tensor)
        missing.discard(name)
    problems += [f"{name} is missing" for name in sorted(missing)]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointError(f"{source} does not hold the model that its config.json describes: {shown}")
    return model


def _tensors(files: list[Path], places: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights by the names of the model with its head; files of the model without one leave out the first part."""
    prefix = next(iter(places)).partition(".")[0] + "."
    for file in files:
        for name, tensor in read_tensors(file):
            if name.endswith(_BUFFERS) and name not in places:
                continue
            yield (prefix + name if name not in places and prefix + name in places else name), tensor


def _to_low_rank(model: LanguageModel, shape: ModelConfig) -> list[Converted]:
    """Give `model`, in place, the low-rank layers that `shape` describes.

    Raises:
        ConfigError: a rank saves nothing, or a pattern matches no layer.
    """
    with on_meta():
        wanted = build_model(shape, vocab_size=shape.vocab_size, max_seq_len=shape.max_seq_len, seed=0)
    ranks = {name: layer.rank for name, layer in wanted.named_modules() if isinstance(layer, LoRPtLinear)}
    if not ranks:
        raise ConfigError("--lorpt.* leaves every layer dense; give --lorpt.rank, or leave them out")
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Linear) and layer.splits and not isinstance(wanted.get_submodule(name), Linear | LoRPtLinear):
            parent, _, last = name.rpartition(".")
            names = [child for child, _ in wanted.get_submodule(name).named_children()]
            setattr(model.get_submodule(parent), last, _apart(layer, names))
    return lorptize(model, targets=list(ranks), ranks=ranks)


def _apart(layer: Linear, names: list[str]) -> MixedSplit:
    """Several layers of one input that are one matrix, as layers of their own."""
    parts = {}
    biases = [None] * len(names) if layer.bias is None else layer.bias.split(layer.splits)
    for name, weight, bias in zip(names, layer.weight.split(layer.splits), biases, strict=True):
        part = nn.Linear(layer.in_features, weight.shape[0], bias is not None, device="meta")
        part.weight = nn.Parameter(weight.detach())
        if bias is not None:
            part.bias = nn.Parameter(bias.detach())
        parts[name] = part
    return MixedSplit(parts)
