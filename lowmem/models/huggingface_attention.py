"""lowmem's attention as an attention of transformers: a registered function, and masks that say each token's first visible key.

transformers describes what a token may see by a function of positions (causal, within a window, within a chunk). It is evaluated here
once for each length, checked to be an interval of keys that ends with the token itself, and handed to the blocks as the first key of each
token: (1, T) or, with segments, (B, T) integers where a mask would have T * T numbers. The blocks hand it to `lowmem_attention`.

Shapes: B rows, T time, K keys, H heads, D head width.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from lowmem.nn.causal_attention import causal_attention, visible_attention
from lowmem.nn.positions import segment_positions
from lowmem.system.dry_run import autocast_kind

NAME = "lowmem"
PREFIX = "prefix_key_value"  # the parameter of an attention that its prefix is
_CHUNK = 1 << 22  # pairs of query and key that a mask function is asked about at once
# tensors that blocks pass on to every attention and that change nothing in it
_HARMLESS = ("position_ids", "position_embeddings", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k")


_UNREADABLE = torch.empty(0, dtype=torch.bool)  # a mask that says no first keys
_NO_INTERVAL = "its tokens see other tokens than the last ones up to themselves"


class UnsupportedModelError(Exception):
    """A model of transformers does what this contract has no place for; the text says what."""


@dataclass
class MaskRequest:
    """What masks are made for.

    Attributes:
        segments_BT: int32; None where rows are whole.
        wanted: false for a pass that stops at the embedding.
        made: how many were asked for.
    """

    segments_BT: torch.Tensor | None = None
    wanted: bool = True
    made: int = 0


_request: ContextVar[MaskRequest | None] = ContextVar("lowmem_mask_request", default=None)


@contextmanager
def masks_for(request: MaskRequest) -> Iterator[None]:
    """Have every mask that transformers asks for within this context, for lowmem's or for eager attention, made for `request`.

    transformers' own search for packed sequences is off meanwhile: it asks for the values of positions, which a dry run does not have.
    """
    interface, search = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, masking_utils.find_packed_sequence_indices
    eager, token = interface["eager"], _request.set(request)
    interface["eager"], masking_utils.find_packed_sequence_indices = additive_mask, lambda position_ids: None
    try:
        yield
    finally:
        interface["eager"], masking_utils.find_packed_sequence_indices = eager, search
        _request.reset(token)


def lowmem_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., torch.Tensor],
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str | None = None,
    **_: Any,
) -> torch.Tensor | None:
    """What transformers calls for a mask.

    Returns:
        Within `masks_for`: (1, T) or (B, T) int32, the first key of each token, None where all see everything before them. Elsewhere, as
        in decoding: (B or 1, 1, T, K) bool.
        A mask that no attention takes stands for what is no interval of keys that ends with the token itself.
    Memory: some 16 MiB while the function is evaluated, or the bool mask.
    """
    device, request = torch.device(device or "cpu"), _request.get()
    if request is None:
        return _visible(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, device)
    request.made += 1
    if not request.wanted:
        return None
    if device.type == "meta":  # values cannot be asked for; the rule by which they would be all zero can
        whole = local_size is None or q_length <= local_size
        first_T = None if whole else torch.zeros(q_length, dtype=torch.int32, device=device)
    else:
        try:
            first_T = first_keys(mask_function, q_length, device)
        except UnsupportedModelError:
            return _UNREADABLE  # of some kind of layer that the model may not have
    if request.segments_BT is None:
        return None if first_T is None else first_T.unsqueeze(0)
    return _within_segments(request.segments_BT, first_T)


def additive_mask(
    *, batch_size: int, q_length: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None, **more: Any
) -> torch.Tensor | None:
    """`lowmem_mask` as eager attention takes it: (B, 1, T, T), 0 where a token looks, the lowest number elsewhere.

    Memory: the result.
    """
    request = _request.get()
    assert request is not None
    first = lowmem_mask(batch_size=batch_size, q_length=q_length, device=device, **more)
    if not request.wanted:
        return None
    if first is _UNREADABLE:
        raise UnsupportedModelError(_NO_INTERVAL)
    key = torch.arange(q_length, device=device)
    hidden = key > key.unsqueeze(1)
    if first is not None:
        hidden = hidden | (key < first.unsqueeze(-1))
    hidden = hidden.view(-1, 1, q_length, q_length).expand(batch_size, -1, -1, -1)
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, torch.finfo(dtype).min)


def first_keys(mask_function: Callable[..., torch.Tensor], time: int, device: torch.device) -> torch.Tensor | None:
    """(T,) int32: the first key each token sees; None if that is key 0 for all.

    Args:
        mask_function: of transformers: (row, head, query, key) -> whether the query sees the key; the same for all rows and heads.
    Raises:
        UnsupportedModelError: some token sees what comes later, not itself, or keys with a gap.
    """
    key, zero = torch.arange(time, device=device).view(1, 1, 1, -1), torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)
    parts = []
    for query in torch.arange(time, device=device).split(max(1, _CHUNK // time)):
        query_T1 = query.view(1, 1, -1, 1)
        visible = mask_function(zero, zero, query_T1, key).expand(1, 1, len(query), time)
        first = visible.to(torch.uint8).argmax(-1)
        if not bool(((visible.sum(-1) == query - first + 1).all()) & ~(visible & (key > query_T1)).any()):
            raise UnsupportedModelError(_NO_INTERVAL)
        parts.append(first.view(-1).int())
    first_T = torch.cat(parts)
    return first_T if bool(first_T.any()) else None


def _within_segments(segments_BT: torch.Tensor, first_T: torch.Tensor | None) -> torch.Tensor:
    """The first key of each token where positions begin anew with each segment."""
    positions = segment_positions(segments_BT)
    begins = torch.arange(segments_BT.shape[1], device=segments_BT.device) - positions
    return (begins if first_T is None else begins + first_T[positions]).int()


def _visible(
    batch: int,
    time: int,
    keys: int,
    q_offset: int | torch.Tensor,
    kv_offset: int,
    mask_function: Callable[..., torch.Tensor],
    attention_mask: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    row = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    query = torch.arange(time, device=device).view(1, 1, -1, 1) + q_offset
    key = torch.arange(keys, device=device).view(1, 1, 1, -1) + kv_offset
    visible = mask_function(row, torch.zeros_like(row[:1]), query, key)
    if attention_mask is not None:
        visible = visible & F.pad(attention_mask.bool(), (0, max(0, keys - attention_mask.shape[1])))[:, None, None, :keys]
    return visible.expand(-1, 1, time, keys)


def lowmem_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """`lowmem.nn.causal_attention`, called as transformers calls an attention function.

    Args:
        query: (B, H, T, D); key and value may have fewer heads, value another width.
        attention_mask: from `lowmem_mask`.
        dropout: not applied: models that are trained here have theirs switched off.
    Returns:
        (B, T, H, width of value), None. A module with a parameter `PREFIX` of (P, 2, H, D) has P keys and values more, which all see.
    Raises:
        UnsupportedModelError: attention sinks, biases or masks that lowmem does not make.
    Memory: see `causal_attention`; repeated keys and values.
    """
    if is_causal is False or not getattr(module, "is_causal", True):
        raise UnsupportedModelError("it has attention that is not causal")
    for name, extra in more.items():
        if isinstance(extra, torch.Tensor) and name not in _HARMLESS:
            raise UnsupportedModelError(f"its attention has {name}")
    if attention_mask is _UNREADABLE:
        raise UnsupportedModelError(_NO_INTERVAL)
    batch, heads, time, width = query.shape
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind := autocast_kind(query)) else value.dtype
    query, key, value = (x.to(dtype) for x in (query, key, value))
    wide = value.shape[-1]
    if wide > width:
        raise UnsupportedModelError("its values are wider than its keys")
    if wide < width:
        value = F.pad(value, (0, width - wide))
    decoding = attention_mask is not None and attention_mask.dtype == torch.bool
    if not decoding and attention_mask is not None and attention_mask.dtype != torch.int32:
        raise UnsupportedModelError("its attention has masks of its own making")
    if not decoding and key.shape[2] != time:
        raise UnsupportedModelError("its blocks attend keys from elsewhere")
    before = getattr(module, PREFIX, None)
    count = 0 if before is None else before.shape[0]
    if before is not None:
        query, key, value, attention_mask = _after_prefix(before, query, key, value, attention_mask)
    if decoding:
        out = visible_attention(query, key, value, attention_mask, scaling, softcap or 0.0)  # type: ignore[arg-type]
    else:
        out = causal_attention(query, key, value, first_BT=attention_mask, prefix=count, scale=scaling, softcap=softcap or 0.0)
    return out.view(batch, -1, heads, width)[:, -time:, :, :wide], None


def _after_prefix(
    prefix_P2HD: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What attention is given where every token attends a prefix, too.

    In training the prefix has queries as well, all zero, whose result nobody uses: so every token still ends its own interval of keys.
    """
    count = prefix_P2HD.shape[0]
    rows = prefix_P2HD.permute(1, 2, 0, 3).unsqueeze(1).expand(-1, len(key), -1, -1, -1).to(key.dtype)  # (2, B, H, P, D)
    key, value = torch.cat([rows[0], key], 2), torch.cat([rows[1], value], 2)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        return query, key, value, F.pad(attention_mask, (count, 0), value=True)
    first_BT = None if attention_mask is None else F.pad(attention_mask + count, (count, 0))
    return F.pad(query, (0, 0, count, 0)), key, value, first_BT


def register() -> None:
    """Make `NAME` an attention implementation of transformers, and let its experts be multiplied in a dry run.

    PyTorch's grouped product takes no other dtype than bf16 on the meta device; transformers' own loop knows the shapes of any.
    """
    AttentionInterface.register(NAME, lowmem_attention)
    AttentionMaskInterface.register(NAME, lowmem_mask)
    experts: Any = sys.modules.get("transformers.integrations.moe")
    usual = getattr(experts, "_can_use_grouped_mm", None)
    if usual is not None and not hasattr(usual, "of_lowmem"):

        def can_use(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> bool:
            return not weight.is_meta and usual(input, weight, offs)

        can_use.of_lowmem = True  # type: ignore[attr-defined]
        experts._can_use_grouped_mm = can_use
