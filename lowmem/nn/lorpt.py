"""LoRPt: linear layers whose weight is a product of two thin factors from the first step on (D1)."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from lowmem.errors import ConfigError
from lowmem.nn.linear import linear
from lowmem.nn.low_rank import Factors, low_rank
from lowmem.nn.quantized import QuantizedWeight, dense

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
        """Inner width now; `lowmem.nn.rank_change` may change it."""
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
