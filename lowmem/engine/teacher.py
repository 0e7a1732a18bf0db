"""The trained model that `train.distill.teacher` names, and whether it can teach the run's model."""

from pathlib import Path

import torch

from lowmem.config.schema import DistillConfig, RunConfig
from lowmem.data.tokenizers import Tokenizer
from lowmem.engine.run_model import is_model_directory, load_run_model, model_description, model_tokenizer
from lowmem.models.base import LanguageModel
from lowmem.system.errors import ConfigError


def teacher_config(distill: DistillConfig, *, vocab_size: int, seq_len: int) -> RunConfig:
    """The configuration of the teacher: that of its run, or one with its directory as model.path.

    Raises:
        ConfigError: there is none, or its vocabulary or its positions do not reach as far as the student's.
        CheckpointError: it is a directory whose model cannot be read.
    """
    teacher = distill.teacher
    if not is_model_directory(Path(teacher)):
        raise ConfigError(
            f"train.distill.teacher is {teacher}, which has no config.yaml and no config.json; give the run_dir of a finished lowmem run, "
            "or a directory of transformers"
        )
    described = model_description(Path(teacher))
    config = described.config
    if config.train.weight_dtype in ("int8", "int4"):
        config.train.weight_dtype = "fp32"  # as `lowmem.engine.run_model` reads them
    shape = config.model
    if shape.vocab_size != vocab_size:
        raise ConfigError(
            f"the teacher {teacher} has model.vocab_size {shape.vocab_size}, the student {vocab_size}; they must share a tokenizer"
        )
    if 0 < described.position_limit < seq_len:
        raise ConfigError(
            f"the teacher {teacher} has learned positions up to {described.position_limit}, data.seq_len is {seq_len}; lower it"
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
    teacher = Path(config.train.distill.teacher)
    if not config.train.distill.teacher or not is_model_directory(teacher):
        return
    theirs, place = model_tokenizer(teacher)
    if theirs.sha256() != tokenizer.sha256():
        raise ConfigError(f"{place} is another tokenizer than this run's; give the student data.tokenizer={place}")
