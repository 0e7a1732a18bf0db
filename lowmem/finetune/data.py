"""Tokenizer, template and conversations of a fine-tuning run."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.config.finetune import FinetuneConfig
from lowmem.config.schema import SourceConfig
from lowmem.data.chat import ChatSource, ChatStream, ChatValidation, Conversations, build_chat_tokens
from lowmem.data.chat_template import TEMPLATE_FILE, ChatTemplate, choose_chat_template, save_chat_template
from lowmem.data.text_source import ProgressCallback
from lowmem.data.tokenizer_loading import load_tokenizer
from lowmem.data.tokenizers import Tokenizer
from lowmem.system.errors import ConfigError
from lowmem.system.files import cache_root, json_sha256, make_directory

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "lowmem_tokenizer.json", "tokenization_lowmem.py", TEMPLATE_FILE,
)  # fmt: skip


@dataclass
class ChatData:
    """What is learned from.

    Attributes:
        train, validation: packed conversations; validation is None if nothing is held out.
        template: how they are written.
        notes: what was cut or left out, for people.
        content: hashes of what the run learns from: records, template, tokenizer.
    """

    train: ChatStream
    validation: ChatValidation | None
    template: ChatTemplate
    notes: str
    content: dict[str, str]


def tokenizer_folder(config: FinetuneConfig, directory: Path, model: Any) -> tuple[Path, list[int]]:
    """The folder with the tokenizer of the run, and the ids of new tokens, for which `model` has got rows.

    Raises:
        ConfigError: new tokens, and a tokenizer that cannot take any, or has them already.
        CheckpointError: transformers cannot read the tokenizer without running code that comes with it.
    """
    if not config.add_tokens:
        return directory, []
    from transformers import AutoTokenizer

    from lowmem.finetune.base_model import reported_as_damage
    from lowmem.finetune.methods import add_tokens

    if not (directory / "tokenizer.json").is_file():
        raise ConfigError(f"add_tokens needs a tokenizer.json, which {directory} has not; leave it out")
    with reported_as_damage(directory):
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    ids = add_tokens(model, tokenizer, config.add_tokens)
    folder = Path(config.out) / "tokenizer"
    tokenizer.save_pretrained(folder)
    return folder, ids


def read_tokenizer(config: FinetuneConfig, folder: Path) -> Tokenizer:
    """lowmem's view of the tokenizer: of the run itself where its kind is lowmem's own."""
    own = Path(config.base) / "tokenizer.json"
    return load_tokenizer(own if (folder / "lowmem_tokenizer.json").is_file() and own.is_file() else folder)


def chat_data(config: FinetuneConfig, folder: Path, *, one_per_row: bool, progress: ProgressCallback) -> ChatData:
    """The conversations, tokenised once and kept in the cache.

    Raises:
        DataError: malformed records, or too few.
    """
    tokenizer = read_tokenizer(config, folder)
    template = choose_chat_template(config.template, folder, tokenizer)
    tokens = build_chat_tokens(ChatSource(SourceConfig(path=config.data), template), tokenizer, cache_root(""), progress)
    part = Conversations(tokens, seq_len=config.seq_len, truncation=config.truncation, val_fraction=config.val_fraction, options="")
    train = ChatStream([part], [1.0], seq_len=config.seq_len, seed=config.seed, one_per_row=one_per_row)
    validation = ChatValidation([part], seq_len=config.seq_len, one_per_row=one_per_row) if config.val_fraction else None
    written = json_sha256([template.source, template.names])
    content = {"data": tokens.sha256, "template": written, "tokenizer": tokenizer.sha256()}
    return ChatData(train, validation, template, part.counts.describe(config.truncation, config.seq_len), content)


def check_chat(config: FinetuneConfig, folder: Path) -> None:
    """See that the records are there and the template is one, without reading the records.

    Args:
        folder: of the base, which may have a template.
    Raises:
        DataError: they are not.
    """
    ChatSource(SourceConfig(path=config.data), choose_chat_template(config.template, folder, None))


def copy_tokenizer(source: Path, target: Path, template: ChatTemplate) -> None:
    """The tokenizer's files, and the template that the run was trained with."""
    make_directory(target)
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    save_chat_template(template, target)
