"""A trained model that another one learns from."""

from pathlib import Path

import torch

from lowmem.config import DistillConfig, RunConfig
from lowmem.config_load import load_run_config
from lowmem.errors import ConfigError
from lowmem.models.base import LanguageModel
from lowmem.nn.distill import SoftTargets


class Teacher:
    """A model in evaluation mode, without gradients.

    Args:
        model: on the device of the run.
        distill: how much it counts.
    Memory: its weights; while it computes, one block's activations, and its last hidden states until the student's loss is known.
    """

    def __init__(self, model: LanguageModel, distill: DistillConfig):
        self.model, self.distill = model.eval().requires_grad_(False), distill

    @torch.no_grad()
    def soft_targets(self, tokens_BT: torch.Tensor, segments_BT: torch.Tensor | None = None) -> SoftTargets:
        """What the model predicts after each token, to be multiplied out chunk by chunk."""
        hidden = self.model.embed(tokens_BT, segments_BT=segments_BT)
        for index in range(len(self.model.blocks)):
            hidden = self.model.block(index, segments_BT)(hidden)
        return SoftTargets(*self.model.head_product(hidden), self.distill.weight, self.distill.temperature)


def teacher_config(distill: DistillConfig, *, vocab_size: int, seq_len: int) -> RunConfig:
    """The configuration of the teacher's run.

    Raises:
        ConfigError: there is none, or its vocabulary or its positions do not reach as far as the student's.
    """
    path = Path(distill.teacher) / "config.yaml"
    if not path.is_file():
        raise ConfigError(
            f"train.distill.teacher is {distill.teacher}, which has no config.yaml; give the run_dir of a finished lowmem run"
        )
    config = load_run_config(path, check=False)
    if config.train.weight_dtype in ("int8", "int4"):
        config.train.weight_dtype = "fp32"  # as `lowmem.run_model` reads them
    shape = config.model
    if shape.vocab_size != vocab_size:
        raise ConfigError(
            f"the teacher {distill.teacher} has model.vocab_size {shape.vocab_size}, the student {vocab_size}; they must share a tokenizer"
        )
    if (shape.positions == "learned" or shape.name == "i3") and shape.max_seq_len < seq_len:
        raise ConfigError(
            f"the teacher {distill.teacher} has learned positions up to {shape.max_seq_len}, data.seq_len is {seq_len}; lower it"
        )
    return config
