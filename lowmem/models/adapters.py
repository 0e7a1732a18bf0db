"""What is trained of a model of transformers: an adapter of PEFT beside frozen weights, or a part of the weights.

PEFT's own modules take the places of the layers that they adapt, so they are parts of blocks like any others; `model.peft` is the model as
PEFT sees it, for saving and merging.

Shapes: V vocabulary, K rows that are trained, C width.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lowmem.config.schema import AdapterConfig
from lowmem.models.huggingface import HuggingFaceModel, leaves
from lowmem.models.huggingface_weights import FUSED
from lowmem.models.prefix import add_prefix
from lowmem.nn.layers import embedding, use_exact_gradients
from lowmem.system.errors import ConfigError
from lowmem.system.light_imports import absent

LORA_KIN = ("lora", "dora", "rslora", "lora_plus")
UNUSED_BY_PEFT = ("bitsandbytes", "torchao")  # PEFT would import them for layers that are not here, which costs 50 MB and 60 MB
PARTS = ("head", "last_k")  # methods that train some of the weights themselves
_SHOWN = 8  # names of layers that a message lists


def apply_adapter(model: HuggingFaceModel, adapter: AdapterConfig, *, seed: int, new_tokens: Sequence[int] = ()) -> None:
    """Make exactly the parameters of the method trainable, in place. At the start the model computes what it computed before, with a prefix
    what it computes after some tokens.

    Args:
        seed: of the adapter's initial weights.
        new_tokens: ids of rows of embedding and head that begin at the mean of the rows before them and are trained, too; where there are
            no such rows they are added.
    Raises:
        ConfigError: PEFT is missing, no layer has a name that is asked for, or the method cannot train what is asked for.
    Memory: the adapter, in fp32; a second embedding for a moment where rows are added.
    """
    method = adapter.method
    if new_tokens and method not in ("none", *LORA_KIN):
        raise ConfigError(
            f"data.add_tokens needs rows that are trained, which adapter.method={method} does not train; use lora or its kin, or none"
        )
    if new_tokens:
        _make_rows(model, new_tokens)
    if method == "none":
        return
    model.requires_grad_(False)
    if method in PARTS:
        for parameter in _part_of_weights(model, adapter):
            parameter.requires_grad_(True)
        return
    if method == "prefix":
        add_prefix(model, adapter.num_virtual_tokens, seed=seed)
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _add_adapter(model, adapter, new_tokens)
    scale = adapter.loraplus_lr_ratio if method == "lora_plus" else 1.0
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.set_training_rules(
        lr_scales={name: scale for name in trained if scale != 1 and (".lora_B." in name or ".lora_embedding_B." in name)},
        # factors that begin at 1, and rows of an embedding, which no other method decays either
        undecayed={name for name in trained if ".ia3_l." in name or "trainable_tokens_delta" in name},
    )


def check_adapter_is_used(model: HuggingFaceModel) -> None:
    """See that the loss depends on every adapter: a model may read the weight of a layer past what is around it.

    Layers of experts are left out, which not every token reaches.

    Raises:
        ConfigError: it does not; the message names the layer.
    Memory: activations of some tokens.
    """
    if model.peft is None:
        return
    training = model.training
    tokens = torch.arange(1, 8, device=model.device).view(1, -1)
    with torch.enable_grad():
        used = leaves(model.eval()(tokens, tokens))
    model.train(training)
    rows = "trainable_tokens_"  # of embedding and head, which are called
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in used and "expert" not in name and rows not in name:
            layer = re.split(r"\.(?:lora|ia3)_", name.removeprefix("lm."))[0]
            raise ConfigError(f"adapter.target_modules: {layer} is not computed as a layer by this {model.family} model; leave it out")


def _part_of_weights(model: HuggingFaceModel, adapter: AdapterConfig) -> Iterator[nn.Parameter]:
    if adapter.method == "head":
        yield from model.head.parameters()
        return
    count = len(model.blocks)
    if not 1 <= adapter.last_k <= count:
        raise ConfigError(f"adapter.last_k is {adapter.last_k}, the model has {count} blocks; use 1 to {count}")
    yield from model.blocks[count - adapter.last_k :].parameters()
    yield from model.norm.parameters()


def _make_rows(model: HuggingFaceModel, new_tokens: Sequence[int]) -> None:
    """Rows for new tokens, each the mean of the rows before the first of them; also of a head of its own, and of its bias."""
    lm, first, there = model.lm, min(new_tokens), model.vocab_size
    if max(new_tokens) >= there:
        with torch.random.fork_rng(devices=[]):
            lm.resize_token_embeddings(max(new_tokens) + 1, mean_resizing=False)
        use_exact_gradients(lm)
        model.rows_have_changed()
    ids = torch.tensor([*new_tokens, *(row for row in range(there, model.vocab_size) if row not in new_tokens)])
    tables = [lm.get_input_embeddings().weight] + ([] if model.head_is_tied() else list(model.head.parameters()))
    with torch.no_grad():
        for table in tables:
            table[ids.to(table.device)] = table[:first].mean(0, dtype=torch.float32).to(table.dtype)


def _add_adapter(model: HuggingFaceModel, adapter: AdapterConfig, new_tokens: Sequence[int]) -> None:
    lm = model.lm
    names = _target_names(model, adapter, new_tokens)
    try:
        with absent(*UNUSED_BY_PEFT), warnings.catch_warnings():
            import peft

            # PEFT 0.21 asks transformers 5 for a switch by its old name, and warns of ties, which `save_merged` undoes
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
            warnings.filterwarnings("ignore", ".*tie_word_embeddings.*", UserWarning)
            adapted = peft.get_peft_model(lm, _peft_config(peft, model, adapter, names, new_tokens))
    except ImportError as error:
        raise ConfigError("adapter.method needs peft; pip install 'lowmem[finetune]'") from error
    except (ValueError, KeyError, NotImplementedError) as error:
        said = re.sub(r"^\[PEFT:[^]]*\] ", "", " ".join(str(error).split()))[:300]
        raise ConfigError(f"adapter.method={adapter.method} cannot be applied: {said}") from error
    model.__dict__["peft"] = adapted  # its parameters are the model's: registered, each would have two names
    for module in lm.modules():
        if type(module).__name__ == "TrainableTokensLayer":
            module.__class__ = type("TrainedRows", (_TrainedRows, type(module)), {})


def _target_names(model: HuggingFaceModel, adapter: AdapterConfig, new_tokens: Sequence[int]) -> list[str]:
    """The layers that get an adapter, by full name or by the end of it.

    Raises:
        ConfigError: a name is no layer's, or one of a layer of which rows are trained, too.
    """
    lm, head = model.lm, model.head
    linears = [
        name for name, module in lm.named_modules()
        if _is_linear(module) and module is not head and model.family not in FUSED.get(name.rpartition(".")[2], ())
    ]  # fmt: skip
    if not adapter.target_modules:
        if not linears:
            raise ConfigError(f"adapter.method={adapter.method} found no linear layers in this {model.family} model; use last_k")
        return linears
    matches = {
        wanted: [module for name, module in lm.named_modules() if name == wanted or name.endswith(f".{wanted}")]
        for wanted in adapter.target_modules
    }
    if missing := [name for name, found in matches.items() if not found]:
        there = list(dict.fromkeys(name.rpartition(".")[2] for name in linears))[:_SHOWN]
        raise ConfigError(
            f"adapter.target_modules has {', '.join(missing)}, which no layer of this {model.family} model is called; there are "
            + ", ".join(there)
        )
    ends = (lm.get_input_embeddings(), head)
    if new_tokens and (both := [name for name, found in matches.items() if any(module in ends for module in found)]):
        raise ConfigError(
            f"adapter.target_modules has {', '.join(both)}, of which data.add_tokens trains rows, and PEFT puts no adapter upon those; "
            "leave out one of the two"
        )
    return adapter.target_modules


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _peft_config(peft: Any, model: HuggingFaceModel, adapter: AdapterConfig, names: list[str], new_tokens: Sequence[int]) -> Any:
    """The configuration that PEFT saves beside an adapter."""
    lm = model.lm
    common = {"task_type": "CAUSAL_LM", "target_modules": names, "fan_in_fan_out": any(type(m).__name__ == "Conv1D" for m in lm.modules())}
    if adapter.method == "ia3":
        inner = [name for name in names if name.rpartition(".")[2] in ("down", "down_proj", "c_proj") and "attn" not in name]
        return peft.IA3Config(feedforward_modules=inner, **common)
    rows: dict[str, list[int]] = {}
    if new_tokens:
        words, head = lm.get_input_embeddings(), None if model.head_is_tied() else model.head
        rows = {name.rpartition(".")[2]: list(new_tokens) for name, module in lm.named_modules() if module in (words, head)}
    return peft.LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        use_dora=adapter.method == "dora",
        use_rslora=adapter.method == "rslora",
        trainable_token_indices=rows or None,
        **common,
    )


class _TrainedRows:
    """PEFT's layer of some trained rows of an embedding or head, computed without a copy of the whole matrix, and its gradients in fp32."""

    def forward_adapters(self: Any, x: torch.Tensor, active_adapters: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Looked-up rows of token ids, or logits of hidden states."""
        if self.disable_adapters or self.merged or not active_adapters:
            return super().forward_adapters(x, active_adapters, *args, **kwargs)  # type: ignore[misc]
        (name,) = active_adapters
        base, rows_KC = self.base_layer, self.trainable_tokens_delta[name]
        ids_K = torch.tensor(self.token_indices[name], device=x.device)
        out = base(x)
        if isinstance(base, nn.Linear):
            bias = None if base.bias is None else base.bias[ids_K].to(out.dtype)
            return out.index_copy(-1, ids_K, F.linear(x.to(out.dtype), rows_KC.to(out.dtype), bias).to(out.dtype))
        ids_K, order = ids_K.sort()
        place = torch.searchsorted(ids_K, x.contiguous()).clamp_(max=len(ids_K) - 1)
        trained = (ids_K[place] == x).unsqueeze(-1)
        looked_up = embedding(order[place], rows_KC).to(out.dtype)
        scale = self._get_embed_scale()
        return torch.where(trained, looked_up if scale is None else looked_up * scale.to(out.dtype), out)
