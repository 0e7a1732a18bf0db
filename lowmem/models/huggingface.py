"""Any causal language model of transformers as a `LanguageModel` of lowmem, made of its own modules.

Its blocks are called as they are, with the arguments that its own forward pass would give them (`huggingface_body`); their attention is
lowmem's (`huggingface_attention`), so that windows and segments cost one number a token, and 32-bit sums are kept everywhere. Logits exist
chunk by chunk. Engines, planner and generation see no difference from lowmem's own models.

Shapes: B batch, T time, C width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache

from lowmem.models.base import LanguageModel, MatrixHead, head_loss_options
from lowmem.models.huggingface_attention import PREFIX, UnsupportedModelError
from lowmem.models.huggingface_body import BlockArguments, Body, UsesOfIds, continued, new_cache
from lowmem.nn.attention import ModelCache
from lowmem.nn.layers import use_exact_gradients
from lowmem.nn.linear import accumulate_dtype, linear
from lowmem.nn.loss import IGNORE_INDEX, CrossEntropyOptions, SoftTargets, auto_chunk_tokens, chunked_cross_entropy
from lowmem.nn.quantized import stored_bytes
from lowmem.nn.recompute import run_block
from lowmem.system.dry_run import is_fake
from lowmem.system.errors import CheckpointError, ConfigError

# what families do to the products of their head, by the key in their configuration: a factor, a divisor, a soft-cap
_LOGIT_FACTORS = ("logit_scale", "lm_head_multiplier")
_LOGIT_DIVISORS = ("logits_scaling",)
_LOGIT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "logits_softcap")
_KEPT_SHAPES = 8  # lengths whose rotary tables and masks are kept
_ADAPTERS = ("lora_", "ia3_", "trainable_tokens_", PREFIX)  # begin of the names that PEFT and `add_prefix` give
_ATTENTION, _MLP, _NORM = (
    ("attn", "attention"),
    ("mlp", "ffn", "feed_forward", "moe", "expert", "fc1", "fc2", "fc_"),
    ("norm", "ln_", "ln1", "ln2"),
)


class HuggingFaceModel(LanguageModel):
    """A causal language model of transformers.

    Dropout of every kind is switched off: lowmem computes blocks twice and trains without it.

    Args:
        model: of transformers, with a language-modelling head; its attention, gradients of embeddings and layer norms, and dropout are
            changed in place. On the meta device it serves for predictions.
        max_seq_len: longest sequence; 0 takes what the model was made for. Learned positions end where they end.
    Attributes:
        lm: the model itself; its parameters and buffers are all that this module has.
        silenced: names of settings that were switched off.
        peft: the model as PEFT sees it, where it has an adapter; else None.
    Raises:
        CheckpointError: the model cannot be taken apart; the message names its family and says why.
    Memory: the model's weights.
    """

    embedding: nn.Module
    blocks_take_caches = False

    def __init__(self, model: Any, max_seq_len: int = 0):
        super().__init__()
        self.lm = model
        self.__dict__["peft"] = None
        self._lr_scales: dict[str, float] = {}
        self._undecayed: set[str] = set()
        self.family = str(getattr(model.config, "model_type", "unknown"))
        use_exact_gradients(model)
        for module in model.modules():  # lowmem computes blocks again by itself
            if getattr(module, "gradient_checkpointing", False):
                module.gradient_checkpointing = False
        self.silenced = switch_off_randomness(model)
        try:
            self._body = Body(model)
        except UnsupportedModelError as error:
            raise CheckpointError(f"models of type {self.family} cannot be trained here: {error}") from error
        self.keeps_segments_apart = self._body.keeps_segments_apart
        self.rows_have_changed()
        self.position_limit = learned_positions(model)
        self.max_seq_len = max_seq_len or self.position_limit or getattr(model.config, "max_position_embeddings", None) or 1 << 30
        self.logit_scale, self.logit_softcap = _logit_settings(model)
        self._arguments: dict[Any, list[BlockArguments]] = {}
        self._segments: torch.Tensor | None = None  # kept alive, so that no other tensor gets its address

    def rows_have_changed(self) -> None:
        """Learn the size of the vocabulary from the embedding, and give the head its loss."""
        self.vocab_size = self.lm.get_input_embeddings().weight.shape[0]
        head = self.lm.get_output_embeddings()
        if type(head) is nn.Linear:
            head.__class__ = PlainHead

    @property
    def prefix_tokens(self) -> int:
        """Trained keys and values that every token attends beside its text; see `lowmem.models.prefix`."""
        return self._body.prefix

    def prefixes(self) -> list[nn.Parameter]:
        """(P, 2, H, D) of each block: the keys and values of its prefix."""
        return self._body.prefixes()

    def add_prefix(self, tokens_P: torch.Tensor) -> None:
        """Put the keys and values of some tokens before every text, as parameters of the blocks.

        Raises:
            UnsupportedModelError: the blocks are not of one plain attention each.
        """
        self._body.add_prefix(tokens_P)
        self._arguments.clear()  # texts begin at later positions now
        if self.position_limit:
            self.position_limit -= len(tokens_P)
            self.max_seq_len = min(self.max_seq_len, self.position_limit)

    def prefix_window(self) -> int:
        """The narrowest sliding window of the blocks; 0 if there is none."""
        windows = _windows(self.lm.config.get_text_config(decoder=True), len(self.blocks))
        return min((window for window in windows if window), default=0)

    def named_layers(self) -> Iterator[tuple[str, nn.Module]]:
        """See `LanguageModel.named_layers`; the names are those of transformers."""
        return self.lm.named_modules()

    def set_training_rules(self, lr_scales: dict[str, float], undecayed: set[str]) -> None:
        """What `lr_scales` and `undecayed` answer, by names of parameters."""
        self._lr_scales, self._undecayed = lr_scales, undecayed

    def lr_scales(self) -> dict[int, float]:
        """See `LanguageModel.lr_scales`."""
        return {id(p): self._lr_scales[name] for name, p in self.named_parameters() if name in self._lr_scales}

    def undecayed(self) -> set[int]:
        """See `LanguageModel.undecayed`."""
        return {id(p) for name, p in self.named_parameters() if name in self._undecayed}

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        """The decoder layers of the model."""
        return self._body.blocks

    @property
    def head(self) -> nn.Module:  # type: ignore[override]
        """What makes logits of normalised hidden states."""
        return self.lm.get_output_embeddings()

    @property
    def norm(self) -> nn.Module:  # type: ignore[override]
        """What lies between the last block and the head."""
        return self._body.tail[0] if len(self._body.tail) == 1 else nn.Sequential(*self._body.tail)

    def forward(self, tokens_BT, targets_BT=None, denominator=1.0, cache=None, segments_BT=None, soft_targets=None):  # type: ignore[no-untyped-def, override]
        """See `LanguageModel.forward`."""
        if cache is not None:
            return self._products_to_logits(self.head(continued(self._body, tokens_BT, cache)))
        hidden = self.embed(tokens_BT, 0, segments_BT)
        mode = self.activation_checkpointing if self.training else "none"
        for index in range(len(self.blocks)):
            hidden = run_block(self.block(index, segments_BT), hidden, mode)
        return self.logits(hidden) if targets_BT is None else self.head_loss(hidden, targets_BT, denominator, soft_targets)

    def embed(self, tokens_BT: torch.Tensor, start: int | tuple[int, ...] = 0, segments_BT: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T) -> (B, T, C): what the first block is given, learned positions and scales included.

        Raises:
            ConfigError: learned positions end before the last token.
        """
        stop = (start if isinstance(start, int) else max(start)) + tokens_BT.shape[1]
        if 0 < self.position_limit < stop:
            raise ConfigError(
                f"a sequence of {stop} tokens, but the learned positions of this {self.family} model end at {self.position_limit}; "
                "shorten it"
            )
        return self._body.embed(tokens_BT, start, self._usable(segments_BT))

    def block(self, index: int, segments_BT: torch.Tensor | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
        """Block number `index` as a function of its input alone."""
        return _BoundBlock(self, index, self._usable(segments_BT))

    def _usable(self, segments_BT: torch.Tensor | None) -> torch.Tensor | None:
        """The segments, where they can be kept apart; else there is one a row, and padding after it changes nothing.

        Raises:
            ValueError: there are several, which a recurrent state would mix.
        """
        if self.keeps_segments_apart or segments_BT is None:
            return segments_BT
        if not is_fake(segments_BT) and int(segments_BT.max()) > 1:
            raise ValueError(f"found rows with {int(segments_BT.max())} segments; a {self.family} model takes one text a row")
        return None

    def head_loss(
        self,
        hidden_BTC: torch.Tensor,
        targets_BT: torch.Tensor,
        denominator: float | torch.Tensor = 1.0,
        soft_targets: SoftTargets | None = None,
    ) -> torch.Tensor:
        """Loss from the last block's output; see `forward`.

        Raises:
            ConfigError: a teacher's predictions are given and the logits are more than a product.
        """
        options = head_loss_options(self, soft_targets)
        if options.soft_targets is not None and options.reshapes():
            raise ConfigError(f"models of type {self.family} scale or cap their logits and cannot learn from a teacher; drop train.distill")
        normed, head = self.norm(hidden_BTC), self.head
        if type(head) is PlainHead:
            return head(normed, targets_BT, denominator, options)
        return _loss_through(head, normed, targets_BT, options, self.vocab_size) / denominator

    def logits(self, hidden_BTC: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, V)."""
        return self._products_to_logits(self.head(self.norm(hidden_BTC)))

    def _products_to_logits(self, products: torch.Tensor) -> torch.Tensor:
        scaled = products if self.logit_scale == 1 else products * self.logit_scale
        return torch.tanh(scaled / self.logit_softcap) * self.logit_softcap if self.logit_softcap else scaled

    def head_is_tied(self) -> bool:
        """Whether the head's weight is the embedding's."""
        return matrix_of(self.head) is matrix_of(self.lm.get_input_embeddings())

    def tied_parameters(self) -> list[nn.Parameter]:
        """What embedding and head share: the matrix, and rows of it that are trained."""
        in_embedding = {id(parameter) for parameter in self.lm.get_input_embeddings().parameters()}
        return [parameter for parameter in self.head.parameters() if id(parameter) in in_embedding] if self.head_is_tied() else []

    def embed_parameters(self) -> list[nn.Parameter]:
        """What `embed` uses: every parameter outside of blocks, tail and head that its result depends on."""
        elsewhere = {id(p) for part in (self.blocks, *self._body.tail) for p in part.parameters()}
        words = {id(p) for p in self.lm.get_input_embeddings().parameters()}
        with torch.enable_grad():
            used = leaves(self._body.embed(torch.zeros(1, 2, dtype=torch.int64, device=self.device), 0, None))
        return [p for p in self.lm.parameters() if id(p) not in elsewhere and (id(p) in used or id(p) in words)]

    def dense_head(self) -> MatrixHead | None:
        """What comes before the head, and its matrix, where no adapter is around it."""
        head = self.head
        return MatrixHead(self.norm, head.weight, head.bias) if type(head) is PlainHead else None  # type: ignore[arg-type]

    def lookup_parameter(self) -> nn.Parameter | None:
        """The embedding's matrix, where `embed` was seen to do nothing else with token ids."""
        weight = matrix_of(self.lm.get_input_embeddings())
        tokens = torch.zeros(1, 2, dtype=torch.int64, device=self.device)
        with torch.no_grad(), UsesOfIds(tokens) as uses:
            self._body.embed(tokens, 0, None)
        return weight if not uses.others and len(uses.lookups) == 1 and uses.lookups[0] is weight else None

    def head_product(self, hidden_BTC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """x, weight and bias of which the logits are the product.

        Raises:
            ConfigError: they are no such product.
        """
        head = self.head
        if self.logit_softcap or type(head) is not PlainHead:
            raise ConfigError(
                f"the logits of this {self.family} model are no product of one matrix, it cannot teach; choose another teacher"
            )
        bias = None if head.bias is None else head.bias * self.logit_scale
        return self.norm(hidden_BTC) * self.logit_scale, head.weight, bias

    def new_cache(self, batch_size: int, max_len: int) -> ModelCache[Any]:
        """State for decoding up to `max_len` tokens: keys and values, or where layers keep other things the tokens, all computed again.

        Memory: layers * batch_size * max_len * (widths of keys and values), or 8 bytes a token.
        """
        return new_cache(self._body, batch_size, max_len)

    def flops_per_token(self, seq_len: int) -> int:
        """6 per weight that a token is multiplied by, 4 where it is frozen, of experts those it is sent to; attention over the keys it sees
        on average."""
        config = self.lm.config.get_text_config(decoder=True)
        chosen = getattr(config, "num_experts_per_tok", None) or 1
        matrices = 0
        for parameter in (*self.head.parameters(), *self.blocks.parameters()):
            used = parameter.numel() if parameter.ndim == 2 else 0
            if parameter.ndim == 3 and parameter.shape[0] > chosen:
                used = parameter.numel() // parameter.shape[0] * chosen
            matrices += used * (6 if parameter.requires_grad else 4)  # a frozen one has no gradient
        heads = getattr(config, "num_attention_heads", None) or 0
        width = heads * (getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0))
        return matrices + sum(
            round(12 * width * (_mean_keys(window, seq_len) + self.prefix_tokens)) for window in _windows(config, len(self.blocks))
        )

    def component_parameters(self) -> dict[str, int]:
        """Parameters of embedding, positions, attention, mlp, norm, head and adapter; components without any are left out."""
        return self._by_component(lambda parameter: parameter.numel())

    def component_bytes(self) -> dict[str, int]:
        """Bytes of the weights by component, as they are stored now."""
        return self._by_component(lambda parameter: stored_bytes([parameter]))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Tensors by the names that transformers gives them, each once: of tied weights the first."""
        if args or kwargs.keys() - {"keep_vars"}:
            return super().state_dict(*args, **kwargs)
        seen: set[int] = set()
        named = {}
        for name, tensor in self.lm.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                named[name] = tensor if kwargs.get("keep_vars") else tensor.detach()
        return named

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return matrix_of(self.lm.get_input_embeddings()).device

    def _by_component(self, size: Callable[[nn.Parameter], int]) -> dict[str, int]:
        embedding = {id(p) for p in self.lm.get_input_embeddings().parameters()}
        head = {id(p) for p in self.head.parameters()}
        inside = {id(p): name for name, p in self.blocks.named_parameters()}
        tail = {id(p) for module in self._body.tail for p in module.parameters()}
        sizes: dict[str, int] = {}
        for name, parameter in self.lm.named_parameters():
            if any(part.startswith(_ADAPTERS) for part in name.split(".")):
                component = "adapter"
            elif id(parameter) in embedding:
                component = "embedding"
            elif id(parameter) in inside:
                component = component_of(inside[id(parameter)])
            elif id(parameter) in head:
                component = "head"
            else:
                component = "norm" if id(parameter) in tail or "norm" in name else "positions"
            sizes[component] = sizes.get(component, 0) + size(parameter)
        return sizes

    def block_arguments(self, index: int, hidden_BTC: torch.Tensor, segments_BT: torch.Tensor | None) -> BlockArguments:
        """What a block is given beside `hidden_BTC`; kept for the segments of one global batch, and for some lengths of whole rows."""
        rows, time = hidden_BTC.shape[:2]
        kept = hidden_BTC.dtype, hidden_BTC.device, time, rows if self._body.by_row or segments_BT is not None else 1
        if segments_BT is None:
            key: tuple[Any, ...] = kept
        else:
            if self._segments is None or self._segments.untyped_storage()._cdata != segments_BT.untyped_storage()._cdata:
                self._segments = segments_BT
                self._arguments = {key: value for key, value in self._arguments.items() if len(key) == len(kept)}
            key = (*kept, segments_BT.storage_offset(), segments_BT.stride(), segments_BT._version)
        found = self._arguments.get(key)
        if found is None:
            if self._body.attention == "eager":  # whole masks: one at a time
                self._arguments.clear()
            elif len(self._arguments) >= _KEPT_SHAPES:
                self._arguments = {key: value for key, value in self._arguments.items() if len(key) > len(kept)}
            found = self._arguments[key] = self._recorded(hidden_BTC, segments_BT)
        return found[index]

    def _recorded(self, hidden_BTC: torch.Tensor, segments_BT: torch.Tensor | None) -> list[BlockArguments]:
        recording = self._body.arguments(hidden_BTC.shape[0], hidden_BTC.shape[1], hidden_BTC.device, segments_BT)
        made, wanted = recording.embedded_BTC.dtype, hidden_BTC.dtype
        if made == wanted:
            return recording.blocks
        changed: dict[int, torch.Tensor] = {}

        def cast(x: torch.Tensor) -> torch.Tensor:
            if x.dtype != made:
                return x
            if id(x) not in changed:
                changed[id(x)] = x.to(wanted)
            return changed[id(x)]

        return [arguments.with_tensors(cast) for arguments in recording.blocks]


class PlainHead(nn.Linear):
    """A head that is one matrix. It computes the loss in its own forward, around which ZeRO-3 gathers its weight."""

    def forward(self, input, targets=None, denominator=1.0, options=CrossEntropyOptions()):  # type: ignore[no-untyped-def, override] # noqa: B008
        """Products (..., V), or with `targets` the loss of `chunked_cross_entropy`."""
        if targets is None:
            return linear(input, self.weight, self.bias)
        return chunked_cross_entropy(input, self.weight, self.bias, targets, denominator, options)


class _BoundBlock:
    """A block with its arguments, which stay bound when backward calls it again, perhaps in another thread."""

    def __init__(self, model: HuggingFaceModel, index: int, segments_BT: torch.Tensor | None):
        self._model, self._index, self._segments = model, index, segments_BT
        self._bound: tuple[Any, BlockArguments] | None = None

    def __call__(self, hidden_BTC: torch.Tensor) -> torch.Tensor:
        kind = hidden_BTC.shape, hidden_BTC.dtype, hidden_BTC.device
        if self._bound is None or self._bound[0] != kind:
            self._bound = kind, self._model.block_arguments(self._index, hidden_BTC, self._segments)
        return self._bound[1].call(self._model.blocks[self._index], hidden_BTC)


def matrix_of(layer: Any) -> Any:
    """The weight of a layer that an adapter may be around."""
    while layer is not None:
        inner = getattr(layer, "token_adapter", None) or getattr(layer, "base_layer", None)
        if inner is None:
            return getattr(layer, "weight", None)
        layer = inner
    return None


def switch_off_randomness(model: nn.Module) -> list[str]:
    """Set every dropout, layer drop and jitter of a model to 0; the names of those that were not, each once."""
    found: list[str] = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            found += ["dropout"] if module.p else []
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and value and ("drop" in name or "jitter" in name):
                found.append(name)
                setattr(module, name, 0.0)
    return sorted(set(found))


def learned_positions(model: Any) -> int:
    """How many positions the model has weights or a table for; 0 if they are computed as they come."""
    words, config = model.get_input_embeddings(), model.config
    rows = [
        module.num_embeddings for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module is not words and any(part in name for part in ("position", "wpe"))
    ]  # fmt: skip
    rows += [buffer.shape[0] for name, buffer in model.named_buffers() if name.endswith("embed_positions")]
    return min([getattr(config, "max_position_embeddings", None) or rows[0], *rows]) if rows else 0


def _logit_settings(model: Any) -> tuple[float, float]:
    """Factor and soft-cap of the logits, as the configuration has them; `check_contract` sees whether that is all."""
    values: dict[str, Any] = {name: getattr(model.config, name, None) for name in (*_LOGIT_FACTORS, *_LOGIT_DIVISORS, *_LOGIT_CAPS)}
    scale = 1.0
    for name in _LOGIT_FACTORS:
        scale *= 1.0 if values[name] is None else values[name]
    for name in _LOGIT_DIVISORS:
        scale /= 1.0 if values[name] is None else values[name]
    return scale, next((float(values[name]) for name in _LOGIT_CAPS if values[name]), 0.0)


def _loss_through(
    head: nn.Module, normed_BTC: torch.Tensor, targets_BT: torch.Tensor, options: CrossEntropyOptions, vocab_size: int
) -> torch.Tensor:
    """Summed loss where the head is a module of any kind: its logits are computed chunk by chunk, and again in backward.

    Memory: one chunk of logits, in the dtype of the head and in fp32, and their gradients.
    """
    hidden_NC, targets_N = normed_BTC.flatten(0, -2), targets_BT.flatten()
    chunk = options.chunk_tokens or auto_chunk_tokens(vocab_size, hidden_NC.shape[1], hidden_NC.element_size())
    total = hidden_NC.new_zeros((), dtype=accumulate_dtype(hidden_NC.dtype))
    for hidden, targets in zip(hidden_NC.split(chunk), targets_N.split(chunk), strict=True):
        total = total + run_block(partial(_chunk_loss, head, targets, options), hidden, "block")
    return total


def _chunk_loss(head: nn.Module, targets: torch.Tensor, options: CrossEntropyOptions, hidden: torch.Tensor) -> torch.Tensor:
    products = head(hidden)
    logits = products.to(accumulate_dtype(products.dtype)) * options.scale
    if options.softcap:
        logits = torch.tanh(logits / options.softcap) * options.softcap
    smoothing = options.label_smoothing
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=smoothing)
    if options.z_loss:
        loss = loss + options.z_loss * (torch.logsumexp(logits, 1).square() * (targets != IGNORE_INDEX)).sum()
    return loss


def leaves(tensor: torch.Tensor) -> set[int]:
    """The ids of the parameters that a result depends on."""
    found, seen, waiting = set(), set(), [tensor.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting += [following for following, _ in node.next_functions]
    return found


def component_of(name: str) -> str:
    """What a parameter of a block is for, by its name: the innermost part that says so."""
    for part in reversed(name.split(".")[1:]):
        for component, hints in (("norm", _NORM), ("attention", _ATTENTION), ("mlp", _MLP)):
            if any(hint in part for hint in hints):
                return component
    return "other"


def _windows(config: Any, layers: int) -> list[int]:
    """The window of each layer; 0 where it sees everything."""
    kinds = getattr(config, "layer_types", None) or []
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) is not False else None
    if not kinds:
        return [window or 0] * layers
    return [
        (window or 0) if "sliding" in str(kind) else 0 for kind in kinds[:layers] if "attention" in str(kind) and "linear" not in str(kind)
    ]


def _mean_keys(window: int, seq_len: int) -> float:
    if not 0 < window < seq_len:
        return (seq_len + 1) / 2
    return (window * (seq_len - window) + window * (window + 1) / 2) / seq_len


# Both sides compute the same sums in another order: a thousand roundings of 2**-24 of the largest logit. In 16 bits every activation is
# rounded to 2**-9, layers add theirs, and a token near the border between two experts may go to the other one: there the mean counts.
_TOLERANCES = {torch.float32: 1000 * 2**-24, torch.float64: 1e-9}
_TOLERANCE_16 = 2**-4
_CHECKED = 7  # tokens of a text that is compared


def check_contract(model: HuggingFaceModel, *, briefly: bool = False) -> None:
    """Compare what lowmem computes with the model's own forward pass on a handful of tokens: in training, in segments, and decoding.

    Args:
        briefly: logits alone, for a model whose blocks come from elsewhere for each pass.
    Raises:
        CheckpointError: they differ, are not finite, or cannot be computed in this dtype; the message names the family.
    Memory: logits of some tokens.
    """
    training = model.training
    if 0 < model.prefix_window() < model.prefix_tokens + _CHECKED:
        return  # transformers would hide a part of the prefix
    try:
        for what, ours, theirs in _comparisons(model):
            _compare(model, what, ours, theirs)
            if briefly:
                break
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, UnsupportedModelError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "memory" in str(error):
            raise
        said, dtype = " ".join(str(error).split())[:160], str(next(model.parameters()).dtype).removeprefix("torch.")
        raise CheckpointError(f"models of type {model.family} cannot be trained here in {dtype}: {said}") from error
    finally:
        model.train(training)


@torch.no_grad()
def _comparisons(model: HuggingFaceModel) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """What is compared, lowmem's logits, the model's own."""
    model.eval()
    first, second = ((torch.arange(start, start + 14, device=model.device) * 7 % model.vocab_size).view(2, 7) for start in (3, 91))
    expected = own_logits(model, first)
    yield "logits", model(first), expected
    yield "logits", model(second), own_logits(model, second)  # with arguments that were recorded for other tokens
    yield "logits in training", model.train()(first), expected
    model.eval()
    if model.keeps_segments_apart:
        segments = torch.tensor([[1] * 7 + [2] * 7], dtype=torch.int32, device=model.device)
        yield "packed segments", model(first.view(1, 14), segments_BT=segments).view(2, 7, -1), expected
    cache = model.new_cache(2, 7)
    yield "decoding", torch.cat([model(first[:, :4], cache=cache), model(first[:, 4:], cache=cache)], 1), expected


def _compare(model: HuggingFaceModel, what: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    size = theirs.abs().max().item()
    if not size < float("inf"):
        raise CheckpointError(
            f"this {model.family} model computes logits of {size}: its weights are not finite, or too large; restore its files"
        )
    difference, tolerance = ours.double() - theirs.double(), _TOLERANCES.get(theirs.dtype)
    error = difference.abs().max().item()
    if tolerance is None:
        error, size, tolerance = difference.square().mean().sqrt().item(), theirs.double().square().mean().sqrt().item(), _TOLERANCE_16
    if not error <= tolerance * size:
        raise CheckpointError(
            f"models of type {model.family} cannot be trained here: lowmem's {what} differ from the model's own by {error:.3g} of "
            f"{size:.3g}"
        )


def own_logits(model: HuggingFaceModel, tokens_BT: torch.Tensor) -> torch.Tensor:
    """(B, T, V): the logits of the model's own forward pass with its own eager attention; a prefix is what its cache holds, as for PEFT."""
    config, past = model.lm.config, None
    if model.prefix_tokens:
        both = [prefix.permute(1, 2, 0, 3).unsqueeze(1).expand(-1, len(tokens_BT), -1, -1, -1) for prefix in model.prefixes()]
        past = DynamicCache([tuple(layer.to(next(model.parameters()).dtype)) for layer in both])
    before = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        return model.lm(input_ids=tokens_BT, past_key_values=past, use_cache=past is not None).logits
    finally:
        config._attn_implementation = before
