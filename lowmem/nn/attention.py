"""Causal self-attention, full or with low-rank query, key and value maps, and what decoding remembers of the tokens so far.

Shapes: B batch, T time, C model width, H heads, D head width, W width of a cache. In a cache every sequence begins in slot 0 and has a
length of its own, so a slot is a position and sequences of different lengths are decoded together: what lies beyond the length of one is
masked, and written over by its next tokens.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import nn

from lowmem.nn.causal_attention import cached_attention, causal_attention
from lowmem.nn.linear import Linear
from lowmem.nn.lorpt import LinearFactory, break_even_rank
from lowmem.nn.positions import RotaryTable, rotate, token_positions
from lowmem.nn.recompute import follow
from lowmem.system.errors import ConfigError

C = TypeVar("C", bound="RowCache")


class RowCache(Protocol):
    """What the caches of all layers offer; each method does what `LayerCache` says."""

    @property
    def lengths(self) -> np.ndarray: ...

    def nbytes(self) -> int: ...

    def rows(self, start: int, stop: int) -> Any: ...

    def keep(self, rows: Sequence[int]) -> None: ...

    def reset(self) -> None: ...


class LayerCache:
    """Preallocated rows for one layer: keys and values, or their low-rank latents.

    Args:
        batch_size: B.
        max_len: tokens it can hold.
        widths: one buffer per width.
    Attributes:
        buffers: (B, max_len, W) each.
        lengths: tokens held by each sequence. A numpy array, because it is read for every token and real also in a dry run.
    Memory: batch_size * max_len * sum(widths) elements, allocated here.
    """

    def __init__(self, batch_size: int, max_len: int, widths: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self.buffers = [torch.zeros(batch_size, max_len, width, dtype=dtype, device=device) for width in widths]
        self.lengths = np.zeros(batch_size, dtype=np.int64)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.lengths.max())

    @property
    def start(self) -> int | tuple[int, ...]:
        """Position of the next token: one number if it is the same for all sequences, else one for each."""
        return next_positions(self.lengths)

    def append(self, *new_BTW: torch.Tensor) -> list[torch.Tensor]:
        """Store the new rows and return everything held, (B, length, W) each; of shorter sequences only the beginning means anything.

        Raises:
            ValueError: more tokens than the cache was made for, or another batch size.
        """
        batch, capacity = self.buffers[0].shape[:2]
        time = new_BTW[0].shape[1]
        if self.length + time > capacity or new_BTW[0].shape[0] != batch:
            raise ValueError(
                f"found {new_BTW[0].shape[0]} sequences of {self.length} + {time} tokens, the cache holds {batch} of at most "
                f"{capacity}; make a larger one with new_cache"
            )
        start = self.start
        for buffer, new in zip(self.buffers, new_BTW, strict=True):
            if isinstance(start, int):
                buffer[:, start : start + time] = new
            else:
                row_B1 = torch.arange(batch, device=buffer.device).unsqueeze(1)
                buffer[row_B1, token_positions(start, time, buffer.device)] = new.to(buffer.dtype)
        self.lengths += time
        return [buffer[:, : self.length] for buffer in self.buffers]

    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def rows(self, start: int, stop: int) -> "LayerCache":
        """Some of the sequences, sharing memory with this cache."""
        view = copy.copy(self)
        view.buffers = [buffer[start:stop] for buffer in self.buffers]
        view.lengths = self.lengths[start:stop]
        return view

    def keep(self, rows: Sequence[int]) -> None:
        """Move the sequences `rows`, ascending, to the front, in place; the others are overwritten or left behind."""
        for new, old in enumerate(rows):
            if new != old:
                length = self.lengths[new] = self.lengths[old]
                for buffer in self.buffers:
                    buffer[new, :length] = buffer[old, :length]

    def reset(self) -> None:
        """Forget every sequence."""
        self.lengths[:] = 0


@dataclass
class ModelCache(Generic[C]):
    """One cache per block; what is asked of it is asked of all."""

    layers: list[C]

    @property
    def lengths(self) -> np.ndarray:
        """(B,) int64: tokens that each sequence holds."""
        return self.layers[0].lengths

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.lengths.max())

    @property
    def start(self) -> int | tuple[int, ...]:
        """Position of the next token, of all sequences or of each."""
        return next_positions(self.lengths)

    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(layer.nbytes() for layer in self.layers)

    def rows(self, start: int, stop: int) -> "ModelCache[C]":
        """Some of the sequences, sharing memory with this cache."""
        return ModelCache([layer.rows(start, stop) for layer in self.layers])

    def keep(self, rows: Sequence[int]) -> None:
        """Move the sequences `rows`, ascending, to the front, in place."""
        for layer in self.layers:
            layer.keep(rows)

    def reset(self) -> None:
        """Forget every sequence."""
        for layer in self.layers:
            layer.reset()


def next_positions(lengths: np.ndarray) -> int | tuple[int, ...]:
    """Where new tokens go: one position if all sequences are equally long, else one for each."""
    first = int(lengths[0])
    return first if (lengths == first).all() else tuple(lengths.tolist())


class Attention(nn.Module):
    """Multi-head attention with one fused q, k, v map.

    Args:
        dim: C.
        num_heads: H, divides C.
        factory: makes the linear layers.
        name: dotted name of this module in the model.
        rotary: rotary tables, or None.
        slopes: ALiBi slopes per head, or empty.
        out_std: initial std of the output map.
        bias: biases in every map.
        num_kv_heads: heads of keys and values, divides H; 0 takes H.
    Memory: saves its input, q, k, v and its output per token: 5 * C numbers.
    Source: Ainslie et al. 2023, arXiv:2305.13245 (heads of keys and values that query heads share).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        factory: LinearFactory,
        name: str,
        *,
        rotary: RotaryTable | None = None,
        slopes: tuple[float, ...] = (),
        out_std: float = 0.02,
        bias: bool = False,
        num_kv_heads: int = 0,
    ):
        super().__init__()
        self.num_heads, self.rotary, self.slopes = num_heads, rotary, slopes
        self.num_kv_heads, self.head_dim = num_kv_heads or num_heads, dim // num_heads
        self.make_maps(dim, factory, name, bias)
        self.out = factory.linear(dim, dim, bias, group="attention", name=f"{name}.out", dense_std=out_std)

    def make_maps(self, dim: int, factory: LinearFactory, name: str, bias: bool) -> None:
        """Create the query, key and value maps."""
        shared = self.num_kv_heads * self.head_dim
        self.qkv = factory.split(dim, {"q": dim, "k": shared, "v": shared}, bias, group="attention", name=f"{name}.qkv")

    def project(self, x_BTC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (B, T, C), keys and values of `num_kv_heads` heads."""
        return self.qkv(x_BTC)

    @property
    def cache_widths(self) -> tuple[int, ...]:
        """Numbers per token that the cache keeps."""
        return (self.num_kv_heads * self.head_dim,) * 2

    def forward(self, x_BTC: torch.Tensor, cache: LayerCache | None = None, segments_BT: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T, C) -> (B, T, C); with a cache, x continues what it holds; tokens of one segment attend none of another."""
        if cache is not None:
            return self.out(self.attend_cached(x_BTC, cache))
        q, k, v = self.project(x_BTC)
        keys, values = self.for_queries(self.positioned(k)), self.for_queries(self.heads(v).transpose(1, 2))
        return self.out(causal_attention(self.positioned(q), keys, values, self.slopes, segments_BT))

    def attend_cached(self, x_BTC: torch.Tensor, cache: LayerCache) -> torch.Tensor:
        """Attention over everything in the cache; keys are stored already rotated."""
        q, k, v = self.project(x_BTC)
        start = cache.start
        q_BHTD = self.positioned(q, start)
        k = self.positioned(k, start).transpose(1, 2).flatten(2)
        keys, values = cache.append(k, v)
        return self.over_cache(q_BHTD, self.heads(keys).transpose(1, 2), self.heads(values).transpose(1, 2), start)

    def over_cache(self, q_BHTD: torch.Tensor, k_BHKD: torch.Tensor, v_BHKD: torch.Tensor, start: int | tuple[int, ...]) -> torch.Tensor:
        """Attention of new queries, from position `start` on, over cached keys, in the dtype of the queries."""
        keys, values = (self.for_queries(x.to(q_BHTD.dtype)) for x in (k_BHKD, v_BHKD))
        return cached_attention(q_BHTD, keys, values, self.slopes, start)

    def for_queries(self, x_BHTD: torch.Tensor) -> torch.Tensor:
        """Heads of keys or values, each as often as query heads share it."""
        times = self.num_heads // self.num_kv_heads
        return x_BHTD if times == 1 else follow(_repeat_heads, x_BHTD, times)

    def heads(self, x_BTC: torch.Tensor) -> torch.Tensor:
        """(B, T, H * D) -> (B, T, H, D)."""
        return x_BTC.unflatten(-1, (-1, self.head_dim))

    def positioned(self, x_BTC: torch.Tensor, start: int | tuple[int, ...] = 0) -> torch.Tensor:
        """(B, T, C) -> (B, H, T, D), rotated where positions are rotary; `start` is one for all sequences or one for each."""
        x_BTHD = self.heads(x_BTC)
        if self.rotary is None:
            return x_BTHD.transpose(1, 2)
        return follow(rotate, x_BTHD, *self.rotary.get(start, x_BTC.shape[1], x_BTC))


def _repeat_heads(x_BHTD: torch.Tensor, times: int) -> torch.Tensor:
    return x_BHTD.repeat_interleave(times, dim=1)


class LowRankAttention(Attention):
    """Attention whose query, key and value maps are products of (C, rank) and (rank, C) factors.

    The cache keeps the rank-wide latents of keys and values and expands them when they are attended: 2 * rank numbers
    per token instead of 2 * C.

    Args:
        rank: below C*C/(C+C) = C/2, where the factors hold fewer weights than the whole maps.
    Raises:
        ConfigError: the rank saves nothing.
    """

    def __init__(self, dim: int, num_heads: int, factory: LinearFactory, name: str, *, rank: int, factor_std: float, **choices):  # type: ignore[no-untyped-def]
        limit = break_even_rank(dim, dim)
        if not 1 <= rank < limit:
            raise ConfigError(
                f"model.attention_rank is {rank}, must be at least 1 and below model.dim / 2 = {limit:g}, the break-even at which the "
                "factors hold as many weights as full maps; lower it, or set 0 for full attention"
            )
        self.rank, self.factor_std = rank, factor_std
        super().__init__(dim, num_heads, factory, name, **choices)

    def make_maps(self, dim: int, factory: LinearFactory, name: str, bias: bool) -> None:
        """Create the factors; they are low-rank already, so LoRPt leaves them alone."""
        self.latents = Linear(dim, 3 * self.rank, bias, std=self.factor_std, splits=(self.rank,) * 3)
        self.q_up = Linear(self.rank, dim, bias, std=self.factor_std)
        self.k_up = Linear(self.rank, dim, bias, std=self.factor_std)
        self.v_up = Linear(self.rank, dim, bias, std=self.factor_std)

    def project(self, x_BTC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, (B, T, C) each."""
        q, k, v = self.latents(x_BTC)
        return self.q_up(q), self.k_up(k), self.v_up(v)

    @property
    def cache_widths(self) -> tuple[int, ...]:
        """Numbers per token that the cache keeps."""
        return self.rank, self.rank

    def attend_cached(self, x_BTC: torch.Tensor, cache: LayerCache) -> torch.Tensor:
        """Attention over everything in the cache; the latents are expanded and rotated for this call."""
        q, k, v = self.latents(x_BTC)
        start = cache.start
        keys, values = cache.append(k, v)
        q_BHTD = self.positioned(self.q_up(q), start)
        return self.over_cache(q_BHTD, self.positioned(self.k_up(keys)), self.heads(self.v_up(values)).transpose(1, 2), start)
