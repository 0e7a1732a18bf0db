"""Modules of other libraries whose 16-bit gradients PyTorch would sum in 16 bits, made to sum them in fp32."""

import torch
from torch import nn

from lowmem.nn.embedding import Embedding
from lowmem.nn.norm import layer_norm


class ExactLayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the last dimension with the gradients of `lowmem.nn.norm.layer_norm`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        return layer_norm(input, self.weight, self.bias, self.eps)


def use_exact_gradients(model: nn.Module) -> None:
    """Have the embeddings and layer norms of any model sum the gradients of their weights in fp32.

    What they compute, their names and their weights stay. A class derived from nn.Embedding keeps its own forward, of which
    nn.Embedding's is a part: one that scales what was looked up scales it still. Embeddings that rescale their rows (max_norm), weigh
    gradients by frequency or make sparse ones are left alone, and so are norms over several dimensions.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding) and not (module.sparse or module.scale_grad_by_freq or module.max_norm is not None):
            _derive(module, nn.Embedding, Embedding)
        elif isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
            _derive(module, nn.LayerNorm, ExactLayerNorm)


def _derive(module: nn.Module, general: type[nn.Module], exact: type[nn.Module]) -> None:
    """Put `exact` before `general` among the classes that `module` inherits from."""
    kind = type(module)
    if not issubclass(kind, exact):
        module.__class__ = exact if kind is general else type(kind.__name__, (kind, exact), {})
