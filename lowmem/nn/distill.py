"""The loss of a student that learns from a teacher's predictions, chunk by chunk like the usual one: neither's logits are ever whole.

Shapes: N tokens, C width of what the teacher's head multiplies, V vocabulary, M tokens of a chunk.
"""

from dataclasses import dataclass
from typing import Any

import torch

from lowmem.fake import representative
from lowmem.nn.loss import IGNORE_INDEX, Chunks


@dataclass(frozen=True)
class SoftTargets:
    """A teacher's predictions, not yet multiplied out: logits = hidden @ weight.T + bias.

    Attributes:
        hidden: (..., C), for the same tokens as the student's.
        weight: (V, C).
        bias: (V,) or None.
        share: a, of the loss.
        temperature: T.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    share: float
    temperature: float

    def chunks(self, *arguments: Any) -> "SoftChunks":
        """The pass over the tokens that computes the loss; for `lowmem.nn.loss`."""
        return SoftChunks(self, *arguments)


class SoftChunks(Chunks):
    """Per token (1 - a) * (usual loss) + a * T^2 * KL(softmax(teacher / T) || softmax(student / T)).

    Memory: one chunk of the teacher's logits more than `Chunks`, and one block in fp32.
    Source: Hinton, Vinyals & Dean 2015, arXiv:1503.02531, section 2.
    """

    def __init__(self, soft: SoftTargets, *arguments: Any):
        super().__init__(*arguments)
        self.soft = soft
        hidden_NC = soft.hidden.detach().reshape(-1, soft.hidden.shape[-1]).to(self.dtype)
        self.teacher_NC = hidden_NC if self.rows is None else hidden_NC[self.rows]

    def loss_and_logit_gradient(self, logits_MV: torch.Tensor, targets_M: torch.Tensor) -> torch.Tensor:
        """See `Chunks`."""
        soft, rows = self.soft, logits_MV.shape[0]
        bias = None if soft.bias is None else soft.bias.to(self.dtype)
        teacher_MV = torch.nn.functional.linear(self.teacher_NC[self.start : self.start + rows], soft.weight.to(self.dtype), bias)
        distance = logits_MV.new_zeros((), dtype=self.wide)
        live = (targets_M != IGNORE_INDEX).unsqueeze(1)
        for first in representative(range(0, rows, self.wide_rows), logits_MV):
            block = slice(first, first + self.wide_rows)
            distance += self._soft_block(logits_MV[block], teacher_MV[block], live[block])
        total_bias, self.grad_bias = self.grad_bias, None  # summed below, from the whole gradient
        loss = super().loss_and_logit_gradient(logits_MV, targets_M)
        self.grad_bias = total_bias
        if self.needs_grad:
            logits_MV.mul_(1 - soft.share).add_(teacher_MV)
            if total_bias is not None:
                total_bias += logits_MV.sum(0, dtype=self.wide)
        return loss.mul_(1 - soft.share).add_(distance, alpha=soft.share * soft.temperature**2)

    def _soft_block(self, student: torch.Tensor, teacher: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
        """Sum of the distances; the teacher's logits are overwritten with the gradient a * T * (q - p) of the student's."""
        temperature = self.soft.temperature
        log_q = torch.log_softmax(student.to(self.wide) / temperature, 1)
        log_p = torch.log_softmax(teacher.to(self.wide) / temperature, 1)
        p = log_p.exp()
        distance = (log_p - log_q).mul_(p).sum(1, keepdim=True).masked_fill_(~live, 0).sum()
        if self.needs_grad:
            teacher.copy_(log_q.exp_().sub_(p).mul_(self.soft.share * temperature).mul_(live))
        return distance
