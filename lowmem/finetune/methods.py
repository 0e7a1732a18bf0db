"""What each method trains: an adapter of PEFT, or a part of the base."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lowmem.config.finetune import FinetuneConfig
from lowmem.finetune.families import one_conversation_per_row
from lowmem.system.errors import ConfigError

LORA_KIN = ("lora", "qlora", "dora", "lora_plus", "rslora")
WITHOUT_ADAPTER = ("head", "last_k", "full")


def apply_method(model: Any, config: FinetuneConfig, new_tokens: list[int]) -> Any:
    """The model with exactly the parameters of the method trainable.

    At the start it computes what the base computes, whatever the method, except prefix tuning.

    Args:
        model: from `load_base`.
        new_tokens: ids of rows that are trained, too.
    Returns:
        A peft.PeftModel, or the model itself for methods without adapter.
    Raises:
        ConfigError: PEFT is missing, or no layer has the names asked for.
    """
    torch.manual_seed(config.seed)
    model.requires_grad_(False)
    if config.method in WITHOUT_ADAPTER:
        for parameter in part_of_base(model, config):
            parameter.requires_grad_(True)
        return model
    try:
        import peft
    except ImportError as error:
        raise ConfigError("fine-tuning needs peft; pip install 'lowmem[finetune]'") from error
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", ".*is_gradient_checkpointing.*", FutureWarning
            )  # PEFT 0.21 asks transformers 5 by its old name
            warnings.filterwarnings("ignore", ".*tie_word_embeddings.*", UserWarning)  # `lowmem.finetune.save` unties what is merged
            adapted = peft.get_peft_model(model, peft_config(model, config, new_tokens))
    except (ValueError, KeyError) as error:
        raise ConfigError(f"method={config.method} cannot be applied: {' '.join(str(error).split())[:300]}") from error
    _refuse_half_of_a_tie(model, config)
    return adapted


def _refuse_half_of_a_tie(model: Any, config: FinetuneConfig) -> None:
    """An adapter on one of two layers that share a weight needs a head of its own to be merged into.

    Raises:
        ConfigError: there is no such layer, or new tokens are rows of both.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not any(hasattr(layer, "get_delta_weight") for layer in (embedding, head)):
        return
    if head is None or (config.add_tokens and model.config.tie_word_embeddings):
        names = ", ".join(config.adapter.target_modules)
        raise ConfigError(
            f"adapter.target_modules ({names}) names one of two layers that share a weight, the embedding and the head, which "
            f"cannot be told apart {'with add_tokens' if config.add_tokens else 'in this base'}; leave it out"
        )


def peft_config(model: Any, config: FinetuneConfig, new_tokens: list[int]) -> Any:
    """The configuration that PEFT saves beside an adapter."""
    import peft

    adapter = config.adapter
    common: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if config.method == "prefix":
        return peft.PrefixTuningConfig(num_virtual_tokens=adapter.num_virtual_tokens, **common)
    names = adapter.target_modules or linear_names(model)
    conv1d = any(type(module).__name__ == "Conv1D" for module in model.modules())
    if config.method == "ia3":
        inner = [name for name in names if name.rpartition(".")[2] in ("down", "down_proj", "c_proj") and "attn" not in name]
        return peft.IA3Config(target_modules=names, feedforward_modules=inner, fan_in_fan_out=conv1d, **common)
    extra: dict[str, Any] = {}
    if new_tokens:
        embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
        extra["trainable_token_indices"] = {embedding.rpartition(".")[2]: new_tokens}
        head = model.get_output_embeddings()
        if head is not None and not getattr(model.config, "tie_word_embeddings", False):
            extra["trainable_token_indices"][next(n for n, m in model.named_modules() if m is head).rpartition(".")[2]] = new_tokens
    return peft.LoraConfig(
        r=adapter.r, lora_alpha=adapter.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=adapter.lora_dropout, target_modules=names,
        use_dora=config.method == "dora", use_rslora=config.method == "rslora", fan_in_fan_out=conv1d, **extra, **common,
    )  # fmt: skip


def one_per_row(model: Any, config: FinetuneConfig) -> bool:
    """Whether the conversations of a row cannot be kept apart: a prefix belongs to a row, and so does what some families compute."""
    return config.method == "prefix" or one_conversation_per_row(model.config, config.seq_len)


def can_checkpoint(config: FinetuneConfig) -> bool:
    """Whether blocks may be computed again: a prefix is a cache of keys and values, to which a checkpointed block gives no gradient."""
    return config.method != "prefix"


def linear_names(model: Any) -> list[str]:
    """Every linear layer but the head, by full name."""
    head = model.get_output_embeddings()
    kinds = ("Linear", "Linear4bit", "Conv1D")
    return [name for name, module in model.named_modules() if type(module).__name__ in kinds and module is not head and name != "head"]


def part_of_base(model: Any, config: FinetuneConfig) -> Iterator[nn.Parameter]:
    """The parameters of the methods that have no adapter."""
    if config.method == "full":
        yield from model.parameters()
        return
    if config.method == "head":
        head = model.get_output_embeddings() or model.get_input_embeddings()
        yield from head.parameters()
        return
    blocks = blocks_of(model)
    for block in blocks[len(blocks) - min(config.adapter.last_k, len(blocks)) :]:
        yield from block.parameters()
    seen = {id(parameter) for parameter in blocks.parameters()}
    norms = [m for m in model.modules() if "norm" in type(m).__name__.lower() and not any(id(p) in seen for p in m.parameters())]
    for norm in norms:
        yield from norm.parameters()


def blocks_of(model: Any) -> nn.ModuleList:
    """The longest list of equal blocks."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ConfigError("method=last_k needs a model with a list of blocks; use another method")
    return max(lists, key=len)


def parameter_groups(model: nn.Module, config: FinetuneConfig) -> list[dict[str, Any]]:
    """Groups for the optimizer; with lora_plus the B factors have `loraplus_lr_ratio` times the learning rate of the others.

    Source: Hayou et al. 2024, arXiv:2402.12354.
    """
    decay = config.optim.weight_decay
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    fast = [parameter for name, parameter in trainable if config.method == "lora_plus" and "lora_B" in name]
    chosen = {id(parameter) for parameter in fast}
    slow = [parameter for _, parameter in trainable if id(parameter) not in chosen]
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed = [parameter for parameter in slow if parameter.ndim >= 2 and id(parameter) not in embeddings]
    others = {id(parameter) for parameter in decayed}
    groups = [
        {"params": decayed, "weight_decay": decay},
        {"params": [parameter for parameter in slow if id(parameter) not in others], "weight_decay": 0.0},
        {"params": fast, "weight_decay": decay, "lr_scale": config.adapter.loraplus_lr_ratio},
    ]
    return [group for group in groups if group["params"]]


def add_tokens(model: Any, tokenizer: Any, tokens: list[str]) -> list[int]:
    """Give the tokenizer of transformers new tokens, and the model rows for them: the mean of the old ones.

    Returns:
        Their ids.
    Raises:
        ConfigError: one is there already.
    """
    if known := [token for token in tokens if token in tokenizer.get_vocab()]:
        raise ConfigError(f"add_tokens has {', '.join(known)}, which the tokenizer has already; leave it out")
    if not tokens:
        return []
    old = model.get_input_embeddings().weight.shape[0]
    first = len(tokenizer)
    tokenizer.add_tokens(tokens)
    if len(tokenizer) > old:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is not None:
                layer.weight[first : len(tokenizer)] = layer.weight[:first].mean(0)
    return list(range(first, len(tokenizer)))
