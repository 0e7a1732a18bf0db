"""LoRPt: linear layers kept and computed as two factors (D1)."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from lowmem.config.schema import LorptConfig
from lowmem.nn.linear import Linear, compute_dtype, linear
from lowmem.nn.quantized import QuantizedWeight, dense, dense_rows
from lowmem.nn.recompute import remember
from lowmem.system.dry_run import autocast_kind
from lowmem.system.errors import ConfigError


class Factors(NamedTuple):
    """One low-rank layer.

    Attributes:
        down: (rank, in).
        up: (out, rank).
        bias: (out,) or None.
        splits: sizes that sum to `out`; one output per size.
        silu: apply SiLU between the factors.
    """

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None
    splits: tuple[int, ...]
    silu: bool


def low_rank(x: torch.Tensor, layers: Sequence[Factors]) -> tuple[torch.Tensor, ...]:
    """Outputs of every layer, cut as their `splits` say.

    The downward products of all layers are one product, and so are their gradients; the gradient of x is formed once.

    Args:
        x: (..., in); cast to the autocast dtype where autocast is on.
    Returns:
        One contiguous (..., size) tensor per split per layer.
    Memory: saves x and the (..., R) latents in the computing dtype, weights by reference.
    """
    dtype = compute_dtype(x)
    layout = tuple((layer.splits, layer.silu) for layer in layers)
    weights = [tensor for layer in layers for tensor in layer[:3]]
    with torch.autocast(autocast_kind(x), enabled=False):
        return _LowRank.apply(x, dtype, layout, *weights)


class _LowRank(torch.autograd.Function):
    """Saves the weights themselves: no 16-bit copies of them live until backward, and ZeRO-3 may partition them in between."""

    @staticmethod
    def forward(ctx, x, dtype, layout, *weights):  # type: ignore[no-untyped-def]
        x_NI = x.reshape(-1, x.shape[-1]).to(dtype)
        downs, ups, biases = weights[0::3], weights[1::3], weights[2::3]
        latent_NR = x_NI @ _stack(downs, dtype).t()
        ctx.save_for_backward(x_NI, latent_NR, *weights)
        ctx.layout, ctx.dtype, ctx.shape, ctx.x_dtype = layout, dtype, x.shape, x.dtype
        outputs = []
        for (splits, silu), latent, up, bias in zip(layout, latent_NR.split([d.shape[0] for d in downs], 1), ups, biases, strict=True):
            bias_parts = (None,) * len(splits) if bias is None else bias.split(splits)
            for stop, size, bias_part in zip(accumulate(splits), splits, bias_parts, strict=True):
                rows = slice(stop - size, stop)
                output = _expand(latent, up, rows, bias_part, silu)
                remember(output, _expand, latent, up, rows, bias_part, silu)
                outputs.append(output.view(*x.shape[:-1], -1))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        x_NI, latent_NR, *weights = ctx.saved_tensors
        needs = ctx.needs_input_grad
        downs, ups, biases = weights[0::3], weights[1::3], weights[2::3]
        ranks = [down.shape[0] for down in downs]
        grad_latent_NR = torch.empty_like(latent_NR)
        weight_grads: list[torch.Tensor | None] = [None] * len(weights)
        remaining = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        for index, (splits, silu) in enumerate(ctx.layout):
            own, remaining = remaining[: len(splits)], remaining[len(splits) :]
            latent, grad_latent = latent_NR.split(ranks, 1)[index], grad_latent_NR.split(ranks, 1)[index]
            _gradient_of_latent(grad_latent, own, dense(ups[index], ctx.dtype).split(splits))
            if needs[3 + 3 * index + 1]:
                hidden = F.silu(latent) if silu else latent
                grad_up = latent.new_empty(sum(splits), ranks[index])
                for grad, part in zip(own, grad_up.split(splits), strict=True):
                    torch.mm(grad.t(), hidden, out=part)
                weight_grads[3 * index + 1] = grad_up.to(ups[index].dtype)
            if biases[index] is not None and needs[3 + 3 * index + 2]:
                weight_grads[3 * index + 2] = torch.cat([grad.sum(0) for grad in own]).to(biases[index].dtype)
            if silu:
                grad_latent.copy_(torch.ops.aten.silu_backward(grad_latent, latent))
        if any(needs[3::3]):
            stacked = grad_latent_NR.t() @ x_NI
            weight_grads[0::3] = [grad.to(down.dtype) for grad, down in zip(stacked.split(ranks), downs, strict=True)]
        grad_x = None
        if needs[0]:
            grad_x = (grad_latent_NR @ _stack(downs, ctx.dtype)).view(ctx.shape).to(ctx.x_dtype)
        return grad_x, None, None, *weight_grads


def _stack(downs: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """(R, I) in `dtype`."""
    return dense(downs[0], dtype) if len(downs) == 1 else torch.cat([dense(down, dtype) for down in downs])


def _expand(latent_NR: torch.Tensor, up: torch.Tensor, rows: slice, bias: torch.Tensor | None, silu: bool) -> torch.Tensor:
    """(N, rank) -> (N, O) by `rows` of `up`, in the dtype of the latents."""
    hidden = F.silu(latent_NR) if silu else latent_NR
    return F.linear(hidden, dense_rows(up, rows, hidden.dtype), None if bias is None else bias.to(hidden.dtype))


def _gradient_of_latent(grad_latent: torch.Tensor, grads: Sequence[torch.Tensor], ups: Sequence[torch.Tensor]) -> None:
    torch.mm(grads[0], ups[0], out=grad_latent)
    for grad, up in zip(grads[1:], ups[1:], strict=True):
        grad_latent.addmm_(grad, up)


ORIGINAL_STD = 0.02
ORIGINAL_NAMES = {"lora_A": "up", "lora_B": "down"}
AUTO_SHARE = 0.5  # of the dense layer's weights: see docs/ranks.md
Init = Literal["original", "product_variance", "spectral"]


def break_even_rank(in_features: int, out_features: int) -> float:
    """The rank at which two factors hold as many weights as the dense matrix."""
    return in_features * out_features / (in_features + out_features)


def auto_rank(in_features: int, out_features: int) -> int:
    """The largest rank, a multiple of 8 from 8 on, whose factors hold at most half as many weights as the dense matrix: a quarter of
    the width of a square one."""
    rank = int(AUTO_SHARE * break_even_rank(in_features, out_features))
    return max(1, rank if rank < 8 else rank // 8 * 8)


def product_wins(tokens: int, in_features: int, out_features: int, rank: int, *, cached: bool = False) -> bool:
    """Whether building up @ down and multiplying by it takes fewer operations than multiplying by one factor after the other.

    Never at a rank that saves weights; above the break-even, with enough tokens to pay for the product.

    Args:
        tokens: rows that are multiplied.
        cached: the product is there already.
    """
    factored = tokens * rank * (in_features + out_features)
    return tokens * in_features * out_features + (0 if cached else rank * in_features * out_features) < factored


class LoRPtLinear(nn.Module):
    """y = up(down(x)) + bias, never building the product where that takes more work.

    Args:
        in_features, out_features: widths.
        rank: inner width, below in*out/(in+out); "auto" takes `auto_rank`.
        bias: add a bias, initially zero.
        bottleneck: "silu" applies SiLU between the factors; such a layer cannot be merged.
        init: "original" draws both factors with std 0.02; "product_variance" gives the product the variance of a dense layer of std
            `dense_std`: each factor has std sqrt(dense_std) * rank^(-1/4); "spectral" takes U sqrt(S) and sqrt(S) V of the `rank`
            largest singular values of such a dense layer.
        dense_std: what the dense layer's initial std would be.
        splits: output sizes that share one `down`; given, forward returns one contiguous tensor per size.
        strict: refuse a rank that saves nothing; false is for checkpoints of the original layer, which knew no limit.
    Raises:
        ConfigError: the rank is below 1 or saves nothing.
    Memory: rank * (in + out) + out weights; saves the input and the (tokens, rank) activation. Without gradients and above the
        break-even the product is kept, and is smaller than the factors.
    Source: the LoRPt layer of FlameF0X/Low-Rank-Pretraining, computed factored; init after arXiv:2502.10940 (CoLA) and arXiv:2105.01029.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int | Literal["auto"] = 64,
        bias: bool = True,
        bottleneck: Literal["linear", "silu"] = "linear",
        init: Init = "product_variance",
        dense_std: float = 0.02,
        *,
        splits: Sequence[int] = (),
        strict: bool = True,
    ):
        super().__init__()
        if rank == "auto":
            rank = auto_rank(in_features, out_features)
        limit = break_even_rank(in_features, out_features)
        if rank < 1 or (strict and rank >= limit):
            raise ConfigError(
                f"the LoRPt rank of a {out_features}x{in_features} layer is {rank}, must be at least 1 and below "
                f"in*out/(in+out) = {limit:.1f} to save weights; lower the rank, use auto, or keep the layer dense (rank 0)"
            )
        self.in_features, self.out_features, self.splits = in_features, out_features, tuple(splits)
        self.bottleneck, self.init, self.dense_std = bottleneck, init, dense_std
        self.down = nn.Parameter(torch.empty(rank, in_features))
        self.up = nn.Parameter(torch.empty(out_features, rank))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self._product: tuple[Any, torch.Tensor] | None = None
        self.reset_parameters()

    @property
    def rank(self) -> int:
        """Inner width now; `lowmem.nn.lorptize` may change it."""
        return self.down.shape[0]

    def reset_parameters(self) -> None:
        """Draw the initial factors from the global generator."""
        if self.init == "spectral":
            _spectral_init(self.down, self.up, self.dense_std)
        else:
            std = ORIGINAL_STD if self.init == "original" else math.sqrt(self.dense_std) * self.rank**-0.25
            nn.init.normal_(self.down, std=std)
            nn.init.normal_(self.up, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor):  # type: ignore[no-untyped-def]
        """(..., in) -> (..., out), or a tuple of (..., size) when `splits` is given."""
        cached = not torch.is_grad_enabled()
        if self.bottleneck == "linear" and product_wins(
            x.numel() // self.in_features, self.in_features, self.out_features, self.rank, cached=cached
        ):
            y = linear(x, self._cached_product() if cached else self.up @ self.down, self.bias)
            return tuple(part.contiguous() for part in y.split(self.splits, -1)) if self.splits else y
        outputs = low_rank(x, [self.factors()])
        return outputs if self.splits else outputs[0]

    def factors(self) -> Factors:
        """What `low_rank` needs of this layer."""
        return Factors(self.down, self.up, self.bias, self.splits or (self.out_features,), self.bottleneck == "silu")

    def latent(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., rank): what `up` multiplies."""
        hidden = linear(x, self.down)
        return F.silu(hidden) if self.bottleneck == "silu" else hidden

    def merged_weight(self) -> torch.Tensor:
        """The (out, in) matrix this layer applies, summed in fp32 and returned in the dtype of the factors.

        Raises:
            ConfigError: a non-linear bottleneck has no single matrix.
        Memory: out * in weights.
        """
        if self.bottleneck != "linear":
            raise ConfigError(
                f"a LoRPt layer with bottleneck={self.bottleneck} is no single matrix and cannot be merged; "
                "train with model.lorpt.bottleneck=linear, or export unmerged"
            )
        dtype = torch.promote_types(self.up.dtype, torch.float32)
        return (dense(self.up.detach(), dtype) @ dense(self.down.detach(), dtype)).to(self.up.dtype)

    def _cached_product(self) -> torch.Tensor:
        if isinstance(self.up, QuantizedWeight) or isinstance(self.down, QuantizedWeight):
            return self.merged_weight()  # kernels change their codes, which no version counts
        if self.up.is_inference() or self.down.is_inference():
            return self.merged_weight()  # they have no version
        key = tuple((factor.data_ptr(), factor._version, factor.shape, factor.dtype) for factor in (self.up, self.down))
        if self._product is None or self._product[0] != key:
            self._product = (key, self.merged_weight())
        return self._product[1]

    def forget_product(self) -> None:
        """Drop the kept product: for whoever changes the factors in a way that no version counts."""
        self._product = None

    def train(self, mode: bool = True) -> "LoRPtLinear":
        """As nn.Module; the product is not kept from one mode to the other, as a training step lies in between."""
        self.forget_product()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.forget_product()
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Shape and choices, for printing."""
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}, bottleneck={self.bottleneck}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Checkpoints of the original layer name the factors the other way round than LoRA does.
        for old, new in ORIGINAL_NAMES.items():
            if prefix + old in state_dict and prefix + new not in state_dict:
                state_dict[prefix + new] = state_dict.pop(prefix + old)
        self.forget_product()
        super()._load_from_state_dict(state_dict, prefix, *args)


class LoRPtSplit(nn.Module):
    """Several LoRPt layers of one input, computed together; the low-rank sibling of `Linear(splits=...)`.

    Args:
        layers: by the name of their output.
    """

    def __init__(self, layers: dict[str, LoRPtLinear]):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(..., in) -> one (..., out) per layer."""
        if any(hasattr(parameter, "ds_id") for parameter in self.parameters()):
            return tuple(layer(x) for layer in self.children())  # ZeRO-3 gathers the weights of a module around its own forward
        return low_rank(x, [layer.factors() for layer in self.children()])  # type: ignore[operator, misc]


@torch.no_grad()
def _spectral_init(down: torch.Tensor, up: torch.Tensor, dense_std: float) -> None:
    """U sqrt(S) and sqrt(S) V of a random dense matrix.

    Memory: the dense matrix and its singular vectors.
    """
    rank = down.shape[0]
    dense = torch.empty(up.shape[0], down.shape[1], dtype=torch.float32, device=up.device).normal_(std=dense_std)
    left, values, right = top_singular(dense, rank)
    up.copy_(left * values.sqrt())
    down.copy_(values.sqrt().unsqueeze(1) * right)


def top_singular(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest `rank` singular values of an (out, in) matrix, largest first, with their vectors: (out, rank), (rank,), (rank, in)."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank], values[:rank], right[:rank]


def lorpt_rank(lorpt: LorptConfig, group: str, name: str) -> int | Literal["auto"]:
    """Rank of one layer; 0 is dense.

    Args:
        group: attention, mlp or head; a group that is not in `lorpt.targets` stays dense.
        name: dotted module name that the patterns of `lorpt.ranks` are matched against.
    """
    if group not in lorpt.targets:
        return 0
    matches = (rank for pattern, rank in lorpt.ranks.items() if fnmatchcase(name, pattern))
    return next(matches, lorpt.rank)


def bottleneck_of(lorpt: LorptConfig) -> Literal["linear", "silu"]:
    """What stands between the factors of a model that is trained from scratch."""
    return "silu" if lorpt.bottleneck == "auto" else lorpt.bottleneck


def make_linear(
    in_features: int,
    out_features: int,
    bias: bool,
    *,
    group: str,
    name: str,
    lorpt: LorptConfig,
    dense_std: float = 0.02,
    splits: Sequence[int] = (),
) -> Linear | LoRPtLinear:
    """The layer that `lorpt` asks for under this name.

    Raises:
        ConfigError: the rank is negative or saves nothing; the message names the layer.
    """
    rank = lorpt_rank(lorpt, group, name)
    if rank == 0:
        return Linear(in_features, out_features, bias, std=dense_std, splits=splits)
    try:
        return LoRPtLinear(in_features, out_features, rank, bias, bottleneck_of(lorpt), lorpt.init, dense_std, splits=splits)
    except ConfigError as error:
        raise ConfigError(f"model.lorpt, layer {name}: {error}") from None


class MixedSplit(nn.Module):
    """Several layers of one input, some dense and some low-rank, applied one after another."""

    def __init__(self, layers: Mapping[str, nn.Module]):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(..., in) -> one (..., out) per layer."""
        return tuple(layer(x) for layer in self.children())


class LinearFactory:
    """Makes the linear layers of one model and remembers their names, so that a pattern without a match is refused.

    Args:
        lorpt: which layers are low-rank.
    """

    def __init__(self, lorpt: LorptConfig):
        self.lorpt = lorpt
        self._names: list[str] = []

    def linear(self, in_features: int, out_features: int, bias: bool, *, group: str, name: str, dense_std: float = 0.02) -> nn.Module:
        """One layer; see `make_linear`."""
        self.note(group, name)
        return make_linear(in_features, out_features, bias, group=group, name=name, lorpt=self.lorpt, dense_std=dense_std)

    def split(self, in_features: int, outputs: Mapping[str, int], bias: bool, *, group: str, name: str) -> nn.Module:
        """Several layers of one input, named `name.output`: one fused matrix where all are dense, computed together where all are
        low-rank. With `lorpt.share_down` they are one low-rank layer called `name`."""
        if self.lorpt.share_down and self.lorpt.rank and group in self.lorpt.targets:
            self.note(group, name)
            sizes = tuple(outputs.values())
            return make_linear(in_features, sum(sizes), bias, group=group, name=name, lorpt=self.lorpt, splits=sizes)
        names = {output: f"{name}.{output}" for output in outputs}
        for full_name in names.values():
            self.note(group, full_name)
        ranks = [lorpt_rank(self.lorpt, group, full_name) for full_name in names.values()]
        if not any(ranks):
            return Linear(in_features, sum(outputs.values()), bias, splits=tuple(outputs.values()))
        layers = {
            output: make_linear(in_features, size, bias, group=group, name=names[output], lorpt=self.lorpt)
            for output, size in outputs.items()
        }
        return LoRPtSplit(layers) if all(ranks) else MixedSplit(layers)  # type: ignore[arg-type]

    def note(self, group: str, name: str) -> None:
        """Remember a layer that the patterns may name."""
        if group in self.lorpt.targets:
            self._names.append(name)

    def check_patterns(self) -> None:
        """Call when every layer is made.

        Raises:
            ConfigError: a pattern of `lorpt.ranks` matches no layer of the targets.
        """
        idle = [pattern for pattern in self.lorpt.ranks if not any(fnmatchcase(name, pattern) for name in self._names)]
        if idle:
            known = ", ".join(dict.fromkeys(self._names)) if len(self._names) <= 12 else ", ".join(self._names[:12]) + ", ..."
            raise ConfigError(
                f"model.lorpt.ranks has {', '.join(idle)}, which matches no layer of model.lorpt.targets "
                f"({', '.join(self.lorpt.targets)}); layers: {known or 'none'}; correct the pattern or the targets"
            )
