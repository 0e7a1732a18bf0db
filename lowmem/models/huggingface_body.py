"""The body of a causal language model of transformers, taken apart without knowing its family.

A block is given more than hidden states: masks, rotary tables, what its kind of layer needs. All of that is made by the body's own
forward pass, so that is run once with every block standing aside: what each would have been given is recorded, and its input is passed on.

Shapes: B rows, T time, C width.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, Cache, PreTrainedModel

from lowmem.models.huggingface_attention import NAME, PREFIX, MaskRequest, UnsupportedModelError, lowmem_attention, masks_for, register
from lowmem.nn.attention import LayerCache, ModelCache
from lowmem.nn.positions import segment_positions, token_positions

_PROBE_TOKENS = 4
# what carries a state from token to token, which packed sequences would hand on: such layers by the names configurations give them
_RECURRENT = ("linear", "conv", "recurrent", "mamba", "ssm", "delta", "rwkv")


@dataclass(frozen=True)
class BlockArguments:
    """What one block is given beside its hidden states.

    Attributes:
        keyword: by which name the hidden states come; "" for the first positional argument.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str

    def call(self, block: nn.Module, hidden_BTC: torch.Tensor) -> torch.Tensor:
        """The block's output, (B, T, C)."""
        if self.keyword:
            output = block(*self.args, **{self.keyword: hidden_BTC}, **self.kwargs)
        else:
            output = block(hidden_BTC, *self.args, **self.kwargs)
        return output if isinstance(output, torch.Tensor) else output[0]

    def with_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "BlockArguments":
        """The same with every tensor changed; one that several blocks share is looked up by `change`."""
        return BlockArguments(_map(change, self.args), _map(change, self.kwargs), self.keyword)

    def tensors(self) -> list[torch.Tensor]:
        """All of them, in order."""
        found: list[torch.Tensor] = []
        _map(lambda x: found.append(x) or x, (self.args, self.kwargs))  # type: ignore[func-returns-value]
        return found


@dataclass(frozen=True)
class Recording:
    """What a forward pass gives its blocks.

    Attributes:
        embedded_BTC: the first block's hidden states, with their graph.
        blocks: the rest, by block.
    """

    embedded_BTC: torch.Tensor
    blocks: list[BlockArguments]


class _Embedded(Exception):
    """The first block was reached; the pass need not go on."""


class Body:
    """Blocks of a model, what they are given, and what comes before and after them.

    Args:
        model: of transformers with a language-modelling head; its attention is set to lowmem's where it can take one.
    Attributes:
        body: whose forward makes hidden states of tokens.
        blocks: its decoder layers.
        tail: modules that run after the last block, in order.
        attention: "lowmem", or "eager" where blocks compute attention by themselves.
        by_row: whether arguments have a row for each of the batch; false if they are the same for all.
        keeps_segments_apart: whether a row may hold several segments.
        prefix: keys and values that every attention has before a text, whose positions begin after them.
    Raises:
        UnsupportedModelError: there are no such blocks, or more happens around them than hidden states passing through.
    Memory: hidden states of some tokens.
    """

    def __init__(self, model: Any):
        register()
        self.model = model
        self.body = find_body(model)
        self._stack, self.blocks = find_blocks(self.body, model.config)
        self._inputs = set(inspect.signature(self.body.forward).parameters)
        self._tuples = False
        self.prefix = 0
        self.tail: list[nn.Module] = []
        self.by_row = self.keeps_segments_apart = False
        seen = [parameter for block in self.blocks for parameter in set(block.parameters())]
        if len(seen) != len(set(seen)):
            raise UnsupportedModelError("its blocks share weights")
        self.attention = "eager"
        problems = []
        for name in (NAME, "eager"):
            try:
                self._set_attention(name)
                break
            except UnsupportedModelError as error:
                problems.append(str(error))
        else:
            raise UnsupportedModelError(problems[-1])

    def embed(self, tokens_BT: torch.Tensor, start: int | tuple[int, ...], segments_BT: torch.Tensor | None) -> torch.Tensor:
        """(B, T) -> (B, T, C): what the first block is given, with its graph."""
        positions = self.token_positions(tokens_BT, start, segments_BT)
        return self._pass(tokens_BT, positions, MaskRequest(wanted=False), embed_only=True).embedded_BTC

    def token_positions(
        self, tokens_BT: torch.Tensor, start: int | tuple[int, ...] = 0, segments_BT: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Where tokens stand; None where that is 0, 1, 2, ..."""
        if segments_BT is not None:
            return segment_positions(segments_BT) + self.prefix
        if start == 0 and not self.prefix:
            return None
        begins = torch.tensor(start, device=tokens_BT.device).view(-1, 1) + self.prefix
        return (begins + torch.arange(tokens_BT.shape[1], device=tokens_BT.device)).expand(tokens_BT.shape)

    def arguments(self, rows: int, time: int, device: torch.device, segments_BT: torch.Tensor | None) -> Recording:
        """What blocks are given for any tokens of this shape.

        Memory: rotary tables and whatever else they are given; of masks one number a token, or with eager attention whole ones.
        """
        shape = (rows if self.by_row or segments_BT is not None else 1, time)
        with torch.inference_mode(False), torch.no_grad():  # kept for a later training step
            tokens = torch.zeros(shape, dtype=torch.int64, device=device)
            return self._pass(tokens, self.token_positions(tokens, 0, segments_BT), MaskRequest(segments_BT))

    @torch.no_grad()
    def add_prefix(self, tokens_P: torch.Tensor) -> None:
        """Give the attention of every block a trainable prefix: at first the keys and values that these tokens have before a text.

        Raises:
            UnsupportedModelError: blocks are not of one plain attention each, all with the same heads.
        Memory: the prefix in fp32; hidden states of these tokens.
        """
        found: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []
        if self.attention != NAME or not self.keeps_segments_apart:
            raise UnsupportedModelError("its blocks are more than plain attention")
        with _noted(lambda module, key, value, mask: found.append((module, key, value))):
            recording = self._pass(tokens_P.unsqueeze(0), None, MaskRequest())
            self._run_blocks(recording.embedded_BTC, recording.blocks)
        inside = [{id(module) for module in block.modules()} for block in self.blocks]
        if len(found) != len(inside) or any(id(module) not in part for (module, *_), part in zip(found, inside, strict=True)):
            raise UnsupportedModelError("its blocks have no attention, or several each")
        if len({(tuple(x.shape)) for _, *both in found for x in both}) > 1:
            raise UnsupportedModelError("its keys and values have heads of different numbers or widths")
        for module, key, value in found:
            both = torch.stack([key[0], value[0]]).permute(2, 0, 1, 3).to(torch.promote_types(key.dtype, torch.float32), copy=True)
            module.register_parameter(PREFIX, nn.Parameter(both.contiguous()))
        self.prefix = len(tokens_P)

    def prefixes(self) -> list[nn.Parameter]:
        """(P, 2, H, D) keys and values of each block's prefix."""
        return [parameter for name, parameter in self.blocks.named_parameters() if name.rpartition(".")[2] == PREFIX]

    def _pass(
        self, tokens_BT: torch.Tensor, positions_BT: torch.Tensor | None, request: MaskRequest, embed_only: bool = False
    ) -> Recording:
        """Run the body with its blocks standing aside."""
        known = self._known(tokens_BT, positions_BT)
        if positions_BT is not None and "position_ids" not in self._inputs:
            raise UnsupportedModelError("it takes no positions, so that segments of a row cannot begin anew")
        taken: list[tuple[torch.Tensor, BlockArguments]] = []
        with masks_for(request), self._blocks_aside(taken, embed_only):
            try:
                self.body(**known)
            except _Embedded:
                return Recording(taken[0][0], [])
        if len(taken) != len(self.blocks):
            raise UnsupportedModelError(f"{len(taken)} of its {len(self.blocks)} blocks are called")
        return Recording(taken[0][0], [arguments for _, arguments in taken])

    def _known(self, tokens_BT: torch.Tensor, positions_BT: torch.Tensor | None) -> dict[str, Any]:
        """Arguments of the body. A mask of ones or none: whichever spares it a look at values, which a dry run does not have."""
        known = {
            "input_ids": tokens_BT, "position_ids": positions_BT, "use_cache": False,
            "attention_mask": None if self._is_recurrent() else torch.ones_like(tokens_BT),
        }  # fmt: skip
        return {name: value for name, value in known.items() if name in self._inputs and value is not None}

    @contextmanager
    def _blocks_aside(self, taken: list[tuple[torch.Tensor, BlockArguments]], embed_only: bool) -> Iterator[None]:
        """Have each block append what it is given to `taken` and return its input, past its hooks: those of ZeRO-3 copy what passes."""
        before = [block.__dict__.get("_call_impl") for block in self.blocks]

        def aside(index: int, name: str) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, args, keyword = (args[0], args[1:], "") if args else (kwargs.pop(name), args, name)
                if index != len(taken) or (taken and hidden is not taken[0][0]):
                    raise UnsupportedModelError("more happens between its blocks than hidden states passing through")
                taken.append((hidden, BlockArguments(args, kwargs, keyword)))
                if embed_only:
                    raise _Embedded
                return (hidden,) if self._tuples else hidden

            return forward

        try:
            for index, block in enumerate(self.blocks):
                block.__dict__["_call_impl"] = aside(index, list(inspect.signature(type(block).forward).parameters)[1])
            yield
        finally:
            for block, old in zip(self.blocks, before, strict=True):
                del block.__dict__["_call_impl"]
                if old is not None:
                    block.__dict__["_call_impl"] = old

    def _set_attention(self, name: str) -> None:
        """Use one attention, and learn the rest of what is to be known by running some tokens through.

        Raises:
            UnsupportedModelError: it does not go with these blocks.
        """
        self.model.config._attn_implementation = self.attention = name
        device = next(self.model.parameters()).device
        masks: list[Any] = []
        try:
            with _noted(lambda module, key, value, mask: masks.append(mask)):
                self._learn(device)
                if name == NAME:
                    self._check_masks_arrive(masks, device)
        except UnsupportedModelError:
            raise
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, NotImplementedError) as error:
            raise UnsupportedModelError(f"its parts do not run by themselves: {' '.join(str(error).split())[:160]}") from error

    def _check_masks_arrive(self, masks: list[Any], device: torch.device) -> None:
        """See that attention gets the very masks that blocks were given, which it alone can read.

        Raises:
            UnsupportedModelError: it does not.
        """
        if not masks:
            raise UnsupportedModelError("its blocks compute attention by themselves")
        if not self.keeps_segments_apart:
            return
        segments = torch.ones(2, _PROBE_TOKENS, dtype=torch.int32, device=device)
        masks.clear()
        recording = self.arguments(2, _PROBE_TOKENS, device, segments)
        self._run_blocks(recording.embedded_BTC, recording.blocks)
        given = {id(x) for block in recording.blocks for x in block.tensors()}
        if not masks or any(id(mask) not in given for mask in masks):
            raise UnsupportedModelError("its blocks make masks of their own")

    @torch.no_grad()
    def _run_blocks(self, hidden: torch.Tensor, arguments: list[BlockArguments]) -> None:
        for block, given in zip(self.blocks, arguments, strict=True):
            output = given.call(block, hidden)
            if output.shape != hidden.shape:
                raise UnsupportedModelError("a block changes the shape of hidden states")
            hidden = output

    def _learn(self, device: torch.device) -> None:
        tokens = torch.zeros(2, _PROBE_TOKENS, dtype=torch.int64, device=device)
        request = MaskRequest()
        try:
            self._tuples = False
            self._pass(tokens, None, request)
        except (UnsupportedModelError, RuntimeError, IndexError, TypeError, ValueError):
            self._tuples = True
            self._pass(tokens, None, request)
        with torch.enable_grad():
            two, one = self._pass(tokens, None, request), self._pass(tokens[:1], None, request)
        if any(x.requires_grad for block in two.blocks for x in block.tensors()):
            raise UnsupportedModelError("its blocks are given more that is trained than hidden states")
        pairs = [pair for a, b in zip(two.blocks, one.blocks, strict=True) for pair in zip(a.tensors(), b.tensors(), strict=True)]
        self.by_row = not all(_broadcasts(x.shape, y.shape) for x, y in pairs)
        self.keeps_segments_apart = "position_ids" in self._inputs and request.made > 0 and not self._is_recurrent()
        hidden = two.embedded_BTC.detach()
        try:
            self._run_blocks(hidden, (two if self.by_row else one).blocks)
        except ValueError:  # some insist on a mask for each row
            self.by_row = True
            self._run_blocks(hidden, two.blocks)
        with torch.no_grad():
            self.tail = self._find_tail(tokens)

    def _find_tail(self, tokens: torch.Tensor) -> list[nn.Module]:
        """The modules through which the last block's output becomes the body's."""
        after: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []
        children = [module for module in self._stack.children() if module is not self.blocks]

        def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if len(taken) == len(self.blocks) and inputs and isinstance(inputs[0], torch.Tensor) and isinstance(output, torch.Tensor):
                after.append((module, inputs[0], output))

        taken: list[tuple[torch.Tensor, BlockArguments]] = []
        hooks = [module.register_forward_hook(note) for module in children]
        try:
            with masks_for(MaskRequest()), self._blocks_aside(taken, embed_only=False):
                result = self.body(**self._known(tokens, None))
        finally:
            for hook in hooks:
                hook.remove()
        passed, tail = taken[-1][0], []
        for module, given, output in after:
            if _same(given, passed):
                tail.append(module)
                passed = output
        last = result if isinstance(result, torch.Tensor) else result[0]
        if not _same(last, passed):
            raise UnsupportedModelError("more happens between its last block and its head than modules called in turn")
        return tail

    def _is_recurrent(self) -> bool:
        kinds = getattr(self.model.config, "layer_types", None) or getattr(self.model.config, "layers_block_type", None) or []
        convolutions = any(isinstance(module, nn.Conv1d) for module in self.blocks.modules())
        return convolutions or any(name in str(kind) for kind in kinds for name in _RECURRENT)


@contextmanager
def _noted(note: Callable[[nn.Module, Any, Any, Any], Any]) -> Iterator[None]:
    """Have each attention tell `note` its module, keys, values and mask."""

    def noting(module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, **more: Any) -> Any:
        note(module, key, value, attention_mask)
        return lowmem_attention(module, query, key, value, attention_mask, **more)

    AttentionInterface.register(NAME, noting)
    try:
        yield
    finally:
        AttentionInterface.register(NAME, lowmem_attention)


def find_body(model: Any) -> Any:
    """What makes hidden states of tokens.

    Raises:
        UnsupportedModelError: nothing but the whole model does.
    """
    body = model.base_model
    if body is model:  # some classes name their body wrongly
        body = next((child for child in model.children() if isinstance(child, PreTrainedModel)), None)
    if body is None:
        raise UnsupportedModelError("it has no body apart from its head")
    return body


def find_blocks(body: nn.Module, config: Any) -> tuple[nn.Module, nn.ModuleList]:
    """The list of `num_hidden_layers` decoder layers, and the module that has it.

    Raises:
        UnsupportedModelError: there is none.
    """
    count = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    for module in body.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return module, child
    raise UnsupportedModelError(f"it has no list of num_hidden_layers = {count} blocks")


def _map(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """`value` with its tensors changed, also those inside of tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(change, item) for key, item in value.items()}
    return type(value)([_map(change, item) for item in value]) if type(value) in (tuple, list) else value


def _broadcasts(of_two: torch.Size, of_one: torch.Size) -> bool:
    """Whether what one row is given serves two rows as well."""
    return of_two == of_one or (len(of_two) > 1 and of_two[1:] == of_one[1:] and (of_two[0], of_one[0]) == (2, 1))


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same numbers in the same order, shapes aside."""
    place = [(x.untyped_storage()._cdata, x.storage_offset(), x.numel(), x.is_contiguous()) for x in (a, b)]
    return a is b or place[0] == place[1]


class UsesOfIds(TorchDispatchMode):
    """Notes, while active, what is computed from token ids.

    Args:
        ids: of the tokens.
    Attributes:
        lookups: matrices of which rows were looked up by them, in order.
        others: operations that made anything else of them.
    """

    def __init__(self, ids: torch.Tensor):
        super().__init__()
        self.lookups: list[Any] = []
        self.others: list[str] = []
        self._ids = [ids]  # and copies; kept, so that no other tensor gets their place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not any(self._is_ids(value) for value in (*args, *(kwargs or {}).values())):
            return result
        name = func._overloadpacket.__name__
        if name == "embedding" and not self._is_ids(args[0]):
            self.lookups.append(args[0])
        elif name in ("clone", "_to_copy"):
            self._ids.append(result)
        elif not self._is_ids(result) and not name.startswith(("new_", "ones_like", "zeros_like", "empty_like", "full_like")):
            self.others.append(name)
        return result

    def _is_ids(self, value: Any) -> bool:
        if isinstance(value, list | tuple):
            return any(self._is_ids(part) for part in value)
        if not isinstance(value, torch.Tensor) or value.is_floating_point():
            return False
        return any(value.untyped_storage()._cdata == ids.untyped_storage()._cdata for ids in self._ids)


class TokenCache(ModelCache[LayerCache]):
    """The tokens so far; all of them are computed again for every new one. Right for every model, and slow.

    Memory: batch_size * max_len int64 numbers; each forward pass takes that of one over the whole texts.
    """

    def rows(self, start: int, stop: int) -> "TokenCache":
        """Some of the sequences, sharing memory with this cache."""
        return TokenCache([layer.rows(start, stop) for layer in self.layers])


class KeyValueCache(Cache):
    """`LayerCache`s in the shape of a cache of transformers, for one forward pass.

    Args:
        layers: where each layer's keys and values go, by its index.
        start: position of the first new token of each row, or of all.
    """

    def __init__(self, layers: dict[int, LayerCache], start: int | tuple[int, ...], device: torch.device):
        super().__init__(layers=[])
        self._layers = layers
        self._longest = start if isinstance(start, int) else max(start)
        self._offset = start if isinstance(start, int) else torch.tensor(start, device=device).view(-1, 1, 1, 1)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:  # type: ignore[override]
        """Append (B, H, T, D) and return everything held, (B, H, K, D) each."""
        heads = key_states.shape[1]
        rows = [x.transpose(1, 2).flatten(2) for x in (key_states, value_states)]
        held = self._layers[layer_idx].append(*rows)
        return tuple(x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in held)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest row before this pass."""
        return self._longest

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Keys after this pass, and the position of the first."""
        return self._longest + query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Positions of the first new tokens."""
        return self._offset

    is_sliding = is_linear = is_dummy = property(lambda self: [False] * len(self._layers))  # type: ignore[assignment]


class _Widths(Cache):
    """Notes what each layer would store."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.found: dict[int, tuple[tuple[int, int], torch.dtype]] = {}

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:  # type: ignore[override]
        widths = (key_states[0, :, 0].numel(), value_states[0, :, 0].numel())
        self.found[layer_idx] = widths, torch.promote_types(key_states.dtype, value_states.dtype)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0


@torch.no_grad()
def new_cache(body: Body, batch_size: int, max_len: int) -> ModelCache[LayerCache]:
    """Room for the keys and values of every layer, or for tokens where layers keep anything else.

    Memory: see `LayerCache`.
    """
    device = next(body.model.parameters()).device
    if body.attention == NAME and body.keeps_segments_apart:
        widths = _Widths()
        token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        body.body(input_ids=token, position_ids=token, past_key_values=widths, use_cache=True)
        if sorted(widths.found) == list(range(len(body.blocks))):
            found = [widths.found[index] for index in range(len(body.blocks))]
            return ModelCache([LayerCache(batch_size, max_len, each, dtype, device) for each, dtype in found])
    return TokenCache([LayerCache(batch_size, max_len, (1,), torch.int64, device)])


def continued(body: Body, tokens_BT: torch.Tensor, cache: ModelCache[LayerCache]) -> torch.Tensor:
    """(B, T, C): the body's output for tokens that continue what `cache` holds, which is extended in place."""
    start, time = cache.start, tokens_BT.shape[1]
    positions = token_positions(start, time, tokens_BT.device).expand(tokens_BT.shape)
    if isinstance(cache, TokenCache):
        (held,) = cache.layers[0].append(tokens_BT.unsqueeze(-1))
        where = body.token_positions(held[..., 0])
        output = body.body(input_ids=held[..., 0], use_cache=False, **({} if where is None else {"position_ids": where}))
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        return hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
    layers = dict(enumerate(cache.layers))
    past = KeyValueCache(layers, start, tokens_BT.device)
    return body.body(input_ids=tokens_BT, position_ids=positions + body.prefix, past_key_values=past, use_cache=True)[0]
