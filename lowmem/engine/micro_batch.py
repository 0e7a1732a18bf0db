"""How many sequences are computed at once, and what is known of the sizes that took too much memory."""

import torch


class MicroBatches:
    """What takes its steps in micro-batches and can lower them; see `lowmem.engine.recovery`.

    Attributes:
        device: where it computes.
        micro_batch_size: sequences computed at once; lowered when memory runs out.
        failed_micro_batch_size: the smallest size known to run out of memory; 0 if none is.
        messages: what a person should know of recoveries; whoever shows them empties the list.
        size_keys: names of the settings for the micro-batch and the length of a sequence, for messages.
    """

    device: torch.device
    micro_batch_size: int = 1
    failed_micro_batch_size: int = 0
    messages: list[str]
    size_keys: tuple[str, str] = ("train.micro_batch_size", "data.seq_len")

    def __init__(self) -> None:
        self.messages = []

    def memory_remedies(self) -> list[str]:
        """Settings that are not in force and would take less memory, as "key=value", the most effective first."""
        return []

    def set_micro_batch_size(self, size: int) -> None:
        """Compute `size` sequences at once from now on."""
        self.micro_batch_size = size

    def micro_batch_state(self) -> dict[str, int]:
        """For the checkpoint: the present micro-batch, and the smallest that failed."""
        return {"size": self.micro_batch_size, "failed": self.failed_micro_batch_size}

    def restore_micro_batch(self, state: dict) -> None:
        """Take over from a checkpoint which size failed, and the size found instead if the configured one would fail again.

        Args:
            state: what `save` returned; "micro_batch" may be missing.
        """
        saved = state.get("micro_batch", {"size": self.micro_batch_size, "failed": 0})
        self.failed_micro_batch_size = saved["failed"]
        if 0 < saved["failed"] <= self.micro_batch_size:
            self.set_micro_batch_size(saved["size"])
