"""A run's tokenizer as files that transformers' AutoTokenizer reads."""

import json
import shutil
from pathlib import Path
from typing import Any

from lowmem.data.chat_template import TEMPLATE_FILE, ChatTemplate, load_chat_template
from lowmem.data.hf_tokenizer import HuggingFaceTokenizer
from lowmem.data.tokenizers import END_OF_TEXT, UNKNOWN_CHARACTER, ByteTokenizer, CharTokenizer, Tokenizer
from lowmem.system.errors import DataError
from lowmem.system.files import storage_errors, write_json

_CODE = Path(__file__).parent / "tokenization_lowmem.py"
OWN_TOKENIZER = "lowmem_tokenizer.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", OWN_TOKENIZER, _CODE.name, TEMPLATE_FILE)
UNKNOWN = "<unk>"  # longer than a character, so that none is called that


def export_tokenizer(tokenizer: Tokenizer, out: Path, *, run_dir: Path | None, max_seq_len: int) -> bool:
    """Write tokenizer.json or lowmem's own tokenizer with its code, tokenizer_config.json, and the chat template if the run has one.

    Args:
        run_dir: where a chat template may be.
        max_seq_len: what the model takes.
    Returns:
        Whether the directory carries code, for which transformers asks for trust_remote_code.
    Raises:
        StorageError: the disk is full, or not writable.
    """
    eos = tokenizer.decode([tokenizer.eos_id])
    config: dict[str, Any] = {"eos_token": eos, "pad_token": eos, "model_max_length": max_seq_len, "clean_up_tokenization_spaces": False}
    template = run_template(run_dir, tokenizer)
    if template is not None:
        with storage_errors(out):
            (out / TEMPLATE_FILE).write_text(template.source, encoding="utf-8")
        config |= {"bos_token": template.bos_token} if template.bos_token else {}
    plain = plain_tokenizer(tokenizer)
    if plain is None:
        with storage_errors(out):
            shutil.copyfile(_CODE, out / _CODE.name)
        write_json(out / OWN_TOKENIZER, tokenizer.to_json())
        config |= {"tokenizer_class": "LowmemTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_lowmem.LowmemTokenizer", None]}}
    else:
        write_json(out / "tokenizer.json", plain)
        # lowmem's own take <|endoftext|> in a text for text
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": not isinstance(tokenizer, HuggingFaceTokenizer)}
    write_json(out / "tokenizer_config.json", config)
    return plain is None


def plain_tokenizer(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """A tokenizer.json of the tokenizers library that does what `tokenizer` does; None if that library cannot."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.to_json()
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    if isinstance(tokenizer, ByteTokenizer):
        vocab = {character: byte for byte, character in enumerate(byte_characters())}
        library = Library(models.BPE(vocab | {END_OF_TEXT: tokenizer.eos_id}, []))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.decoder = decoders.ByteLevel()
    elif isinstance(tokenizer, CharTokenizer):
        names = [*tokenizer.characters, END_OF_TEXT, UNKNOWN]
        library = Library(models.WordLevel({name: number for number, name in enumerate(names)}, UNKNOWN))
        library.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        library.decoder = decoders.Sequence([decoders.Replace(UNKNOWN, UNKNOWN_CHARACTER), decoders.Fuse()])
    else:
        return None
    values: dict[str, Any] = json.loads(library.to_str())
    return values


def byte_characters() -> list[str]:
    """The character that stands for each byte in the byte-level tokenizers of GPT-2: itself where it is printable, else one from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def run_template(run_dir: Path | None, tokenizer: Tokenizer | None) -> ChatTemplate | None:
    """The chat template of a run, if it has one."""
    try:
        return None if run_dir is None else load_chat_template(run_dir, tokenizer)
    except DataError:
        return None
