"""What would end a run later, refused before any work."""

import sys
from importlib.util import find_spec
from pathlib import Path

from lowmem.config.schema import RunConfig
from lowmem.data.prepare import check_sources
from lowmem.data.tokenizer_loading import known_tokenizer
from lowmem.data.tokenizers import check_vocab
from lowmem.engine.deepspeed.ds_config import check_deepspeed_file
from lowmem.engine.resolve import chosen_device, settled_model
from lowmem.engine.run_model import initial_weights
from lowmem.engine.teacher import teacher_config
from lowmem.system.errors import ConfigError, DataError
from lowmem.train.run_dir import CheckpointStore, check_compatible, check_place


def check_beforehand(config: RunConfig, *, fresh: bool) -> None:
    """Refuse what shows without reading text or building the model.

    The `pretrain` command asks it first, for a run and for a dry run.

    Raises:
        ConfigError, DataError, CheckpointError: see `lowmem.system.errors`.
    """
    chosen_device(config)
    _check_packages(config)
    config = settled_model(config)
    check_deepspeed_file(config)
    path = Path(config.run_dir)
    check_place(path)
    resumes = not fresh and bool(CheckpointStore(path, 1).steps())
    if resumes:
        check_compatible(path, config, resolved=False)
    check_sources(config)
    tokenizer, rows = known_tokenizer(config.data), 0 if config.data.add_tokens else config.model.vocab_size
    if tokenizer is not None:
        check_vocab(tokenizer, rows)
    elif config.data.tokenizer in ("bpe", "chunk") and 0 < rows < config.data.tokenizer_vocab_size:
        raise DataError(
            f"the {config.data.tokenizer} tokenizer is trained to {config.data.tokenizer_vocab_size} tokens, model.vocab_size allows "
            f"{rows}; set data.tokenizer_vocab_size to at most {rows}, or model.vocab_size to 0 for as many as there are tokens"
        )
    if config.train.init_from and not resumes:
        initial_weights(config.train.init_from)
    rows = rows or (tokenizer.vocab_size if tokenizer else 0)
    if config.train.distill.teacher and rows:
        teacher_config(config.train.distill, vocab_size=rows, seq_len=config.data.seq_len)


def _check_packages(config: RunConfig) -> None:
    """Every package that a setting asks for is installed."""
    wanted: list[tuple[str, str, str, str]] = [("loggers", name, name, name) for name in config.loggers]
    wanted += [("engine.name", "deepspeed", "deepspeed", "deepspeed")] if config.engine.name == "deepspeed" else []
    wanted += [("optim.backend", "bitsandbytes", "bitsandbytes", "bnb")] if config.optim.backend == "bitsandbytes" else []
    for key, value, package, extra in wanted:
        if package not in sys.modules and find_spec(package) is None:
            raise ConfigError(f"{key} has {value}, which is not installed; run: pip install 'lowmem[{extra}]', or choose another {key}")
