"""A trained model that another one learns from."""

from pathlib import Path

import torch

from lowmem.config.load import load_run_config
from lowmem.config.schema import DistillConfig, RunConfig
from lowmem.data.tokenizers import Tokenizer
from lowmem.engine.run_model import checkpoint_path, load_run_model, load_run_tokenizer
from lowmem.models.base import LanguageModel
from lowmem.nn.loss import SoftTargets
from lowmem.system.errors import ConfigError


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
        config.train.weight_dtype = "fp32"  # as `lowmem.engine.run_model` reads them
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


def load_teacher(config: RunConfig, device: torch.device) -> LanguageModel | None:
    """The model that `train.distill` names; None if it names none.

    Raises:
        ConfigError: it is no run, has another tokenizer than this one's data, positions that end too early, or cannot keep documents
            apart that `data.document_mask` does.
        CheckpointError: its weights are missing or damaged.
    """
    distill = config.train.distill
    if not distill.teacher:
        return None
    teacher_config(distill, vocab_size=config.model.vocab_size, seq_len=config.data.seq_len)
    model = load_run_model(distill.teacher, device=device).model
    if config.data.document_mask is True and not model.keeps_segments_apart:
        raise ConfigError(
            f"train.distill.teacher is {distill.teacher}, a recurrent model that cannot keep documents apart; set data.document_mask=false"
        )
    return model


def check_teacher_tokenizer(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Equal sizes of vocabulary do not make equal tokens.

    Raises:
        ConfigError: the teacher has another tokenizer.
    """
    teacher = config.train.distill.teacher
    path = Path(teacher) / "tokenizer.json"
    if not teacher or not path.is_file():
        return
    if load_run_tokenizer(path.parent, checkpoint_path(path.parent, "latest")).sha256() != tokenizer.sha256():
        raise ConfigError(f"{path} is another tokenizer than this run's; give the student data.tokenizer={path}")
