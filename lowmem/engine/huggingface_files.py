"""A directory of transformers, or a model's name on the hub: what it describes, and the model that it holds, read tensor by tensor.

Nothing of it is run: code of its own is never imported, and of weights only safetensors are read.
"""

import json
import math
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowmem.memory.limits import is_out_of_memory
from lowmem.models.base import Place, stays
from lowmem.models.block_arrivals import Arrivals
from lowmem.system.dry_run import on_meta
from lowmem.system.errors import CheckpointError, ConfigError
from lowmem.system.files import file_sha256, json_sha256
from lowmem.system.tensors import FilePlace, all_finite, read_place, tensor_places, tensor_shapes, weight_files

if TYPE_CHECKING:
    from lowmem.models.huggingface_weights import Kept

GENERATION_CONFIG = "generation_config.json"
_SAMPLED = ("temperature", "top_k", "top_p", "min_p")  # count where tokens are drawn at random


def read_generation_config(folder: Path) -> dict[str, Any]:
    """What the file says; empty if there is none.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / GENERATION_CONFIG
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is damaged; restore it, or remove it")
    return values


def first_generation_config(folders: Iterable[Path]) -> tuple[dict[str, Any], Path | None]:
    """What the first of several folders that has the file says, and which folder that is.

    Raises:
        CheckpointError: the file is damaged.
    """
    for folder in folders:
        if (folder / GENERATION_CONFIG).exists():
            return read_generation_config(folder), folder
    return {}, None


def end_ids(values: dict[str, Any], place: str) -> frozenset[int]:
    """The tokens that end a text: eos_token_id, one or a list. Those that the model does not have end none.

    Args:
        place: the file, for the message.
    Raises:
        CheckpointError: they are no tokens.
    """
    found = values.get("eos_token_id")
    listed = found if isinstance(found, list) else [] if found is None else [found]
    if any(type(token) is not int for token in listed):
        raise CheckpointError(f"{place}: eos_token_id is {found!r:.80}, expected the number of a token, or a list of such; mend it")
    return frozenset(listed)


def sampling_values(values: dict[str, Any]) -> dict[str, Any]:
    """How the model's authors draw tokens: what `do_sample` makes count, and the repetition penalty, which always does."""
    names = [*(_SAMPLED if values.get("do_sample") is True else ()), "repetition_penalty"]
    return {name: values[name] for name in names if values.get(name) is not None}


# keys of config.json that say nothing of the model: heads of classifiers, how a forward pass answers, what the weights were stored in
_IGNORED = (
    "num_labels", "id2label", "label2id", "problem_type", "return_dict", "use_return_dict", "output_attentions", "output_hidden_states",
    "dtype", "torch_dtype",
)  # fmt: skip
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "attention_types")
_SIZES = re.compile("size|layer|head|position|embd|inner|dim|width|group|window")
_LARGEST_SIZE = 1 << 31
_LARGEST_BUFFERS = 1 << 30  # numbers that are computed and not read, such as tables of positions
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+|[\w-][\w.-]*")
_HUB_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt")
_NUMBERS = {"F64", "F32", "F16", "BF16"}
_MASKS = ("bias", "mask")  # ends of names of what older files hold beside weights, in other dtypes


@dataclass(frozen=True)
class ModelFacts:
    """What a directory's config.json says, and what the model that it describes can do.

    Attributes:
        vocab_size: rows of the embedding.
        max_seq_len: positions that the model was made for; 0 if it does not say.
        position_limit: where learned positions end; 0 where they are computed.
        keeps_segments_apart: whether a row may hold several texts.
    """

    family: str
    vocab_size: int
    max_seq_len: int
    position_limit: int
    keeps_segments_apart: bool


def check_transformers() -> None:
    """See that transformers is installed, before anything imports it.

    Raises:
        ConfigError: it is not.
    """
    if "transformers" not in sys.modules and find_spec("transformers") is None:
        raise ConfigError("a model of transformers needs transformers; run: pip install 'lowmem[finetune]'")


def resolve_model_path(path: str, revision: str = "") -> Path:
    """The directory that `model.path` names: itself, or the files of that name on the hub, fetched once.

    Raises:
        ConfigError: no such directory, and no name of the hub; or a package is missing.
        CheckpointError: the hub cannot be reached or has no such model, or the directory has no config.json.
    """
    check_transformers()
    place = Path(path).expanduser()
    if place.is_dir():
        if revision:
            raise ConfigError(
                f"model.revision is {revision}, but model.path is the directory {path}; remove it, or give the name on the hub"
            )
    elif place.exists() or not _HUB_NAME.fullmatch(path) or path.startswith("."):
        raise ConfigError(f"model.path is {path}: no such directory; give one with config.json and safetensors files, or a name of the hub")
    else:
        place = _fetched(path, revision)
    if not (place / "config.json").is_file():
        run = (
            ": it is a lowmem run, which train.init_from takes, and lowmem export makes such a directory of"
            if (place / "config.yaml").is_file()
            else ""
        )
        raise CheckpointError(f"model.path is {path}, which has no config.json{run}; give a directory that save_pretrained wrote")
    return place


def _fetched(name: str, revision: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConfigError("model.path needs huggingface_hub for a name of the hub; pip install 'lowmem[finetune]'") from error
    try:
        return Path(
            snapshot_download(name, revision=revision or None, allow_patterns=list(_HUB_FILES), ignore_patterns=["*/*", "consolidated*"])
        )
    except Exception as error:
        if isinstance(error, MemoryError):
            raise
        said = re.sub(r"\b[A-Za-z]+Error: ", "", " ".join(str(error).split()))[:200]
        raise CheckpointError(
            f"model.path is {name}: no such directory here, and the hub does not give it ({said}); check the name, go online, "
            "or give a directory"
        ) from error


def model_facts(path: str, revision: str = "") -> ModelFacts:
    """What can be known of a model without reading its weights.

    Raises:
        ConfigError, CheckpointError: see `resolve_model_path`, `outline` and `HuggingFaceModel`.
    Memory: none for the model.
    """
    directory = resolve_model_path(path, revision)
    return _facts(str(directory), (directory / "config.json").stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _facts(directory: str, changed: int) -> ModelFacts:
    from lowmem.models.huggingface import HuggingFaceModel

    with _quiet_transformers(), reported_as_damage(Path(directory)), on_meta():
        model = HuggingFaceModel(outline(Path(directory), torch.float32))
        model.flops_per_token(1)  # reads keys that making the model does not
    made_for = getattr(model.lm.config, "max_position_embeddings", None)
    return ModelFacts(
        model.family, model.vocab_size, made_for if isinstance(made_for, int) else 0, model.position_limit, model.keeps_segments_apart
    )


def base_sha256(directory: Path) -> str:
    """Of the configuration and the weights in a directory of transformers, by which a run that goes on sees that they are the same.

    Raises:
        CheckpointError: see `weight_files`.
    """
    files = [directory / "config.json", *weight_files(directory)]
    return json_sha256([[file.name, file_sha256(file)] for file in files])


def load_model(directory: Path, dtype: torch.dtype, *, kept: "Kept | None" = None, place: Place = stays) -> Any:
    """The model of transformers on the CPU, as `from_pretrained` makes it of the same files.

    Args:
        dtype: of all weights.
        kept: how they are kept, each from the moment it is read; None keeps them in `dtype`.
        place: is given each block as soon as it is there, and says where it lives.
    Raises:
        ConfigError: transformers or bitsandbytes is missing, or there are no layers that can be kept so.
        CheckpointError: see `outline`; or weights are missing, damaged, of another shape, quantised, or not finite.
    Memory: the weights as they are kept, and one tensor; where layers are factored also its singular vectors in fp32.
    """
    described = outline(directory, dtype)
    stored = {name: tensor for file in weight_files(directory) for name, tensor in stored_tensors(file, dtype).items()}
    arrivals = None if place is stays else Arrivals(place)
    model, told = _given(directory, described, dtype, stored, kept, arrivals)
    _check_loaded(directory, told, stored)
    if arrivals is not None:
        arrivals.finish(model)
    model.config.name_or_path = model.name_or_path = str(directory)
    head = model.get_output_embeddings()
    if head is not None:  # a file with both, and with differing numbers, is not tied, whatever its config.json says
        model.config.tie_word_embeddings = head.weight is model.get_input_embeddings().weight
    return model


def _given(
    directory: Path,
    described: Any,
    dtype: torch.dtype,
    tensors: Mapping[str, Any],
    kept: "Kept | None",
    arrivals: Arrivals | None = None,
) -> tuple[Any, dict[str, Any]]:
    """The described model with these tensors, and what transformers tells of them.

    Args:
        tensors: by name, read one by one with `tensor[...]`.
    """
    kind, finish = type(described), []

    def build(model: Any, config: Any, *more: Any, **settings: Any) -> None:
        from lowmem.models.huggingface_body import find_blocks, find_body
        from lowmem.models.huggingface_weights import convert_on_arrival

        kind.__init__(model, config, *more, **settings)
        if kept is not None and kept.changes_layers():
            finish.append(convert_on_arrival(model, kept))
        if arrivals is not None:
            arrivals.watch(find_blocks(find_body(model), model.config)[1])

    prepared: Any = type(kind.__name__, (kind,), {"__module__": kind.__module__, "__init__": build})
    with _quiet_transformers(), reported_as_damage(directory):
        model, told = prepared.from_pretrained(
            None, config=described.config, state_dict=tensors, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True,
            attn_implementation="eager",
        )  # fmt: skip
    model.__class__ = kind
    while finish:  # the class outlives this, until cycles are collected, and must not hold the model
        finish.pop()()
    return model, told


def outline(directory: Path, dtype: torch.dtype) -> Any:
    """The model that a directory describes, on the device of the context: with initial weights, or on the meta device without any.

    Raises:
        ConfigError: transformers is missing.
        CheckpointError: see `model_config`; or the model that is described has tensors without elements, or is much larger than its files.
    """
    config = model_config(directory)
    from transformers import AutoModelForCausalLM

    with _quiet_transformers(), reported_as_damage(directory), on_meta(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # refused below
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=dtype, attn_implementation="eager")
    if empty := [f"{name} {tuple(tensor.shape)}" for name, tensor in model.named_parameters() if not tensor.numel()]:
        raise CheckpointError(f"{directory / 'config.json'} describes tensors without elements: {empty[0]}; restore the file")
    described = model.num_parameters()
    held = sum(math.prod(shape) for file in weight_files(directory) for shape in tensor_shapes(file).values())
    # a head that the file ties to its embedding counts twice at most
    if described > 2 * held or sum(buffer.numel() for buffer in model.buffers()) > max(held, _LARGEST_BUFFERS):
        raise CheckpointError(
            f"{directory / 'config.json'} describes a model far larger than its files, which hold {held} numbers; restore it"
        )
    model.config.name_or_path = model.name_or_path = str(directory)
    return model


def initial_model(directory: Path, dtype: torch.dtype, *, kept: "Kept | None" = None, place: Place = stays) -> Any:
    """The model that a directory describes, with weights that mean nothing, to be given those of a checkpoint.

    Args:
        kept: its low-rank layers; None has none.
        place: see `load_model`.
    Raises:
        ConfigError, CheckpointError: see `outline`.
    Memory: the weights; where layers are low-rank none until they are written.
    """
    described, changes = outline(directory, dtype), kept is not None and kept.changes_layers()
    if changes or place is not stays:
        from lowmem.models.huggingface_weights import convert_shapes

        if kept is not None and torch.get_default_device().type == "meta":
            convert_shapes(described, kept)
            return described
        kept_once = reversed(described.state_dict(keep_vars=True).items())  # of tied weights the first
        names = {id(tensor): name for name, tensor in kept_once}
        tensors = described.state_dict()
        arrivals = None if place is stays else Arrivals(place)
        model = _given(directory, described, dtype, {name: _Empty(tensors[name]) for name in names.values()}, kept, arrivals)[0]
        if arrivals is not None:
            arrivals.finish(model)
        return model
    config = described.config
    from transformers import AutoModelForCausalLM

    with _quiet_transformers(), reported_as_damage(directory):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=dtype, attn_implementation="eager")


def model_config(directory: Path) -> Any:
    """The configuration of a causal language model of transformers.

    Raises:
        ConfigError: transformers is missing.
        CheckpointError: config.json is damaged, names no such model, needs code of its own, or its weights are quantised.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    values, path = read_config_json(directory), directory / "config.json"
    family = values.get("model_type")
    own = ", which brings code of its own (auto_map) that is never run" if values.get("auto_map") else ""
    if family == "lowmem":
        raise CheckpointError(
            f"{path} describes a model of lowmem's own kind; use the run it was exported from, which train.init_from takes"
        )
    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        raise CheckpointError(f"{path}: found model_type {family!r:.60}{own}, expected one that the installed transformers knows")
    kind = CONFIG_MAPPING[family]
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(
            f"{path}: found model_type {family!r}, which is no causal language model; give one that predicts the next token"
        )
    for key in ("quantization_config", "compression_config"):
        if values.get(key):
            method = values[key].get("quant_method", "unnamed") if isinstance(values[key], dict) else values[key]
            raise CheckpointError(f"{path} has {key} ({str(method)[:40]}); give the model with plain fp32, bf16 or fp16 weights")
    _check_sizes(values, directory)
    with _quiet_transformers(), reported_as_damage(directory):
        config = kind.from_dict({key: _number(value) for key, value in values.items() if key not in _IGNORED})
        config.tie_word_embeddings = getattr(config, "tie_word_embeddings", False)
    if getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(f"{path}: model_type {family} has an encoder; give a model that only decodes")
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


def _number(value: Any) -> Any:
    """`value` with infinities and NaN as numbers, for which JSON has none and transformers writes {"__float__": "Infinity"}."""
    if isinstance(value, list):
        return [_number(item) for item in value]
    if isinstance(value, dict) and set(value) == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
        return float(value["__float__"])
    return value


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
    except (CheckpointError, ConfigError, MemoryError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        said = re.sub(r"\b[A-Za-z]+Error: |<class '([A-Za-z]+)'>", r"\1", " ".join(str(error).split())).replace("NoneType", "null")
        raise CheckpointError(f"{directory} is no model that transformers can read ({said[:200]})") from error


def quiet_transformers() -> None:
    """Have transformers say nothing for the rest of this process: what matters is checked and said by lowmem."""
    from transformers.utils import logging

    logging.set_verbosity(logging.CRITICAL)


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


def _check_loaded(directory: Path, told: dict[str, Any], stored: dict[str, "StoredTensor"]) -> None:
    """What transformers only warns of.

    Raises:
        CheckpointError: weights are missing, of another shape, not finite, or of a dtype that stands for quantised ones.
    """
    if coded := [f"{name} is {tensor.dtype}" for name, tensor in stored.items() if tensor.coded_and_read]:
        raise CheckpointError(f"{directory} holds quantised weights ({_some(coded)}); give the model in fp32, bf16 or fp16")
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


class _Empty:
    """In the place of a `StoredTensor`: zeros, whose memory the system gives when they are written."""

    def __init__(self, like: torch.Tensor):
        self._like = like

    def get_shape(self) -> list[int]:
        """As slices of safetensors give it."""
        return list(self._like.shape)

    def get_dtype(self) -> str:
        """As slices of safetensors give it."""
        return {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}.get(self._like.dtype, "I64")

    def __getitem__(self, index: Any) -> torch.Tensor:
        return torch.zeros(self._like.shape, dtype=self._like.dtype, device="cpu")[index]


class StoredTensor:
    """A tensor of a file, which transformers reads by `tensor[...]`.

    Attributes:
        dtype: as the file names it.
        coded_and_read: it was asked for, and its numbers are no weights but codes of them.
        finite: what was asked for has neither NaN nor infinity in the dtype that it is kept in.
    Memory: one tensor.
    """

    def __init__(self, path: Path, name: str, place: FilePlace, wanted: torch.dtype):
        self.path, self.name, self.dtype = path, name, place.dtype
        self.coded_and_read, self.finite = False, True
        self._place, self._wanted = place, wanted

    def get_shape(self) -> list[int]:
        """As slices of safetensors give it."""
        return list(self._place.shape)

    def get_dtype(self) -> str:
        """As slices of safetensors give it."""
        return self.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        self.coded_and_read = self.dtype not in _NUMBERS and not self.name.endswith(_MASKS)
        tensor = read_place(self.path, self._place)[index]  # in memory of its own: the file may be rewritten while the model is in use
        if self.dtype in _NUMBERS and not self.name.endswith("mask"):
            self.finite = self.finite and all_finite(tensor, self._wanted)
        return tensor


def stored_tensors(path: Path, wanted: torch.dtype) -> dict[str, StoredTensor]:
    """Each tensor of a file by name, unread.

    Args:
        wanted: what the model is kept in.
    Raises:
        CheckpointError: the file is missing or damaged.
    """
    return {name: StoredTensor(path, name, place, wanted) for name, place in tensor_places(path).items()}
