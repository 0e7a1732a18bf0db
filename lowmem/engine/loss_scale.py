"""The loss scale of fp16, moved by hand: gradients are checked and applied block by block, which GradScaler's own step cannot do."""

import torch

MIN_LOSS_SCALE = 1.0


class LossScale:
    """Halved after a step with a gradient that is not finite, doubled after `growth_interval` steps without one.

    Args:
        enabled: otherwise the scale is 1 for good.
    Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2; the numbers are GradScaler's.
    """

    def __init__(self, enabled: bool, initial: float = 2.0**16, growth_interval: int = 2000):
        self.enabled, self.growth_interval = enabled, growth_interval
        self._scale, self._good_steps = initial if enabled else 1.0, 0

    def get_scale(self) -> float:
        """What losses are multiplied by."""
        return self._scale

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The scaled loss."""
        return loss * self._scale if self.enabled else loss

    def may_shrink(self) -> bool:
        """Whether a smaller scale could help."""
        return self.enabled and self._scale > MIN_LOSS_SCALE

    def update_after(self, applied: bool) -> None:
        """Count one step."""
        if not self.enabled:
            return
        self._good_steps = self._good_steps + 1 if applied else 0
        if not applied:
            self._scale = max(self._scale / 2, MIN_LOSS_SCALE)
        elif self._good_steps == self.growth_interval:
            self._scale, self._good_steps = self._scale * 2, 0

    def state_dict(self) -> dict[str, float]:
        """For the checkpoint; empty when not enabled."""
        return {"scale": self._scale, "good_steps": self._good_steps} if self.enabled else {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what `state_dict` returned."""
        self._scale, self._good_steps = state["scale"], int(state["good_steps"])
