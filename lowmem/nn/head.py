"""Output heads: from hidden vectors to logits, or straight to the loss. Each does its work in its own forward, so that
weights that are partitioned between uses (ZeRO-3) are there when it is called.
"""

from torch import nn

from lowmem.nn.factory import LinearFactory, bottleneck_of, lorpt_rank
from lowmem.nn.linear import Linear, linear
from lowmem.nn.lorpt import LoRPtLinear
from lowmem.nn.loss import CrossEntropyOptions, chunked_cross_entropy


class DenseHead(Linear):
    """A (V, C) matrix, with or without bias."""

    def forward(self, hidden, targets=None, denominator=1.0, options=CrossEntropyOptions()):  # type: ignore[no-untyped-def, override] # noqa: B008
        """Logits (..., V), or with `targets` the loss of `chunked_cross_entropy`."""
        if targets is None:
            return super().forward(hidden)
        return chunked_cross_entropy(hidden, self.weight, self.bias, targets, denominator, options)


class LoRPtHead(LoRPtLinear):
    """Two factors; the loss runs over chunks of the second one."""

    def forward(self, hidden, targets=None, denominator=1.0, options=CrossEntropyOptions()):  # type: ignore[no-untyped-def, override] # noqa: B008
        """Logits (..., V), or with `targets` the loss of `chunked_cross_entropy`."""
        if targets is None:
            return super().forward(hidden)
        return chunked_cross_entropy(self.latent(hidden), self.up, self.bias, targets, denominator, options)


class TiedHead(nn.Module):
    """No weights of its own: it is handed the embedding's."""

    def forward(self, hidden, weight, targets=None, denominator=1.0, options=CrossEntropyOptions()):  # type: ignore[no-untyped-def] # noqa: B008
        """Logits (..., V), or with `targets` the loss of `chunked_cross_entropy`."""
        if targets is None:
            return linear(hidden, weight)
        return chunked_cross_entropy(hidden, weight, None, targets, denominator, options)


def make_head(dim: int, vocab_size: int, bias: bool, factory: LinearFactory, name: str = "head") -> DenseHead | LoRPtHead:
    """The untied head that the factory's LoRPt settings ask for under this name.

    Raises:
        ConfigError: the rank saves nothing.
    """
    factory.note("head", name)
    lorpt = factory.lorpt
    rank = lorpt_rank(lorpt, "head", name)
    if rank == 0:
        return DenseHead(dim, vocab_size, bias)
    return LoRPtHead(dim, vocab_size, rank, bias, bottleneck_of(lorpt), lorpt.init)
