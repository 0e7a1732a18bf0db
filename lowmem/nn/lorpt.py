"""LoRPt: linear layers whose weight is a product of two thin factors from the first step on (D1)."""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from lowmem.errors import ConfigError
from lowmem.nn.linear import linear

ORIGINAL_STD = 0.02
ORIGINAL_NAMES = {"lora_A": "up", "lora_B": "down"}


def break_even_rank(in_features: int, out_features: int) -> float:
    """The rank at which two factors hold as many weights as the dense matrix."""
    return in_features * out_features / (in_features + out_features)


class LoRPtLinear(nn.Module):
    """y = up(down(x)) + bias, never building the product.

    Args:
        in_features, out_features: widths.
        rank: inner width; must be below in*out/(in+out).
        bias: add a bias, initially zero.
        bottleneck: "silu" applies SiLU between the factors; such a layer cannot be merged.
        init: "original" draws both factors with std 0.02; "product_variance" gives the product the variance of a dense
            layer of std `dense_std`: each factor has std sqrt(dense_std) * rank^(-1/4).
        dense_std: what the dense layer's initial std would be.
    Raises:
        ConfigError: the rank is below 1 or saves nothing.
    Memory: rank * (in + out) + out weights; saves the input and the (tokens, rank) activation.
    Source: the LoRPt layer of FlameF0X/Low-Rank-Pretraining, computed factored; init after arXiv:2502.10940 (CoLA).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 64,
        bias: bool = True,
        bottleneck: Literal["linear", "silu"] = "linear",
        init: Literal["original", "product_variance"] = "product_variance",
        dense_std: float = 0.02,
    ):
        super().__init__()
        limit = break_even_rank(in_features, out_features)
        if not 1 <= rank < limit:
            raise ConfigError(
                f"the LoRPt rank of a {out_features}x{in_features} layer is {rank}, must be at least 1 and below "
                f"in*out/(in+out) = {limit:.1f} to save weights; lower the rank or keep the layer dense (rank 0)"
            )
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.bottleneck, self.init, self.dense_std = bottleneck, init, dense_std
        self.down = nn.Parameter(torch.empty(rank, in_features))
        self.up = nn.Parameter(torch.empty(out_features, rank))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial factors from the global generator."""
        std = ORIGINAL_STD if self.init == "original" else math.sqrt(self.dense_std) * self.rank**-0.25
        nn.init.normal_(self.down, std=std)
        nn.init.normal_(self.up, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        return linear(self.latent(x), self.up, self.bias)

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
        return (self.up.detach().to(dtype) @ self.down.detach().to(dtype)).to(self.up.dtype)

    def extra_repr(self) -> str:
        """Shape and choices, for printing."""
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}, bottleneck={self.bottleneck}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Checkpoints of the original layer name the factors the other way round than LoRA does.
        for old, new in ORIGINAL_NAMES.items():
            if prefix + old in state_dict and prefix + new not in state_dict:
                state_dict[prefix + new] = state_dict.pop(prefix + old)
        super()._load_from_state_dict(state_dict, prefix, *args)
