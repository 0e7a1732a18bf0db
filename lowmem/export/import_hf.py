"""Llama and GPT-2 directories of transformers as run directories: to train on, to convert to LoRPt, to write, to export again."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from lowmem.config import DataConfig, LorptConfig, ModelConfig, RunConfig, TrainConfig
from lowmem.config_dump import dump_config
from lowmem.data.chat_template import save_chat_template
from lowmem.data.storage import UNFINISHED, make_directory, storage_errors, write_json, written_whole
from lowmem.data.tokenizers import Tokenizer, load_tokenizer
from lowmem.engine.manifest import MANIFEST_NAME, TOKENIZER_KEY, file_hashes
from lowmem.engine.tensor_file import WEIGHT_DTYPES, all_finite, meta_tensors, read_tensors, tensor_shapes, weight_files, write_tensors
from lowmem.errors import CheckpointError, ConfigError
from lowmem.export.import_config import TheirModel, read_model_config
from lowmem.export.plain import gpt2_weights, llama_weights
from lowmem.export.tokenizer_files import GENERATION_CONFIG, OWN_TOKENIZER, read_generation_config, run_template
from lowmem.models.base import LanguageModel
from lowmem.models.registry import build_model
from lowmem.nn.factory import MixedSplit
from lowmem.nn.linear import Linear
from lowmem.nn.lorpt import LoRPtLinear
from lowmem.nn.lorptize import Converted, lorptize

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
    folder = checkpoints / "step-00000000"
    make_directory(folder)
    with storage_errors(out):
        (out / "config.yaml").write_text(dump_config(config, comments=True), encoding="utf-8")
        write_tensors(folder / "model.safetensors", model.state_dict())
        # in the manifest, for there is no state of a training
        write_json(folder / MANIFEST_NAME, {"step": 0, TOKENIZER_KEY: tokenizer.sha256(), "files": file_hashes(folder)})
        for pointer in ("latest", "best"):
            (checkpoints / pointer).write_text("step-00000000\n", encoding="utf-8")
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
    with torch.device("meta"):
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
