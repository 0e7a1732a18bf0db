"""Decoding with a model of transformers: its keys and values in lowmem's caches, or, where it has other states, its tokens.

Shapes: B rows, T new tokens, K cached keys, H heads, D head width.
"""

from typing import Any

import torch
from transformers import Cache

from lowmem.models.huggingface_attention import NAME
from lowmem.models.huggingface_body import Body
from lowmem.nn.attention import LayerCache, ModelCache
from lowmem.nn.positions import token_positions


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
        output = body.body(input_ids=held[..., 0], use_cache=False)
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        return hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
    layers = dict(enumerate(cache.layers))
    past = KeyValueCache(layers, start, tokens_BT.device)
    return body.body(input_ids=tokens_BT, position_ids=positions, past_key_values=past, use_cache=True)[0]
