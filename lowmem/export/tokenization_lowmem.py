"""lowmem's chunk tokenizer for transformers: `AutoTokenizer.from_pretrained(DIR, trust_remote_code=True)`.

This file needs transformers alone and is copied into exported directories, beside lowmem_tokenizer.json. A text is cut into chunks of
two or three characters by a fixed rule; the id of a chunk is its place in that file.
"""
# mypy: ignore-errors

import json
import os
import re
import shutil

from transformers import PreTrainedTokenizer

UNKNOWN, END_OF_TEXT = "<UNK>", "<|endoftext|>"
TRIGRAMS = (
    "the", "and", "ing", "ion", "tio", "for", "tha", "ter", "hat", "his", "ere", "ent", "her", "was",
    "you", "are", "not", "but", "can", "all", "whi", "one", "our", "out", "whe", "hav", "thi", "wit",
)  # fmt: skip
# Three characters if they are one of the trigrams, or follow a space, or are followed by one; else two; a short tail as it is.
CHUNK = re.compile(rf"{'|'.join(TRIGRAMS)}|(?<= ).{{3}}|.{{3}}(?= )|..?", re.DOTALL)


class LowmemTokenizer(PreTrainedTokenizer):
    """Text to ids as lowmem does it.

    Args:
        lowmem_tokenizer_file: the tokenizer as lowmem saves it.
    """

    vocab_files_names = {"lowmem_tokenizer_file": "lowmem_tokenizer.json"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, lowmem_tokenizer_file=None, **kwargs):
        with open(lowmem_tokenizer_file, encoding="utf-8") as file:
            saved = json.load(file)
        self.file, self.lowercase = lowmem_tokenizer_file, saved["lowercase"]
        self.texts = [UNKNOWN, *saved["chunks"], END_OF_TEXT]
        self.ids = {text: number for number, text in enumerate(self.texts)}
        kwargs = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT} | kwargs
        kwargs["clean_up_tokenization_spaces"] = False
        kwargs["split_special_tokens"] = True  # what a text says is text, as in lowmem
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return len(self.texts)

    def get_vocab(self):
        return dict(self.ids) | self.added_tokens_encoder

    def tokenize(self, text, **kwargs):
        """Chunks of a text. One without an id is tried by its first two characters, then its first one, else one character is passed
        over as unknown; the rule goes on after whatever was taken."""
        text, found, position = text.lower() if self.lowercase else text, [], 0
        while position < len(text):
            for match in CHUNK.finditer(text, position):
                chunk = match.group()
                if chunk in self.ids:
                    found.append(chunk)
                    continue
                shorter = next((chunk[:length] for length in (2, 1) if length < len(chunk) and chunk[:length] in self.ids), "")
                found.append(shorter or UNKNOWN)
                position = match.start() + (len(shorter) or 1)
                break
            else:
                break
        return found

    def _convert_token_to_id(self, token):
        return self.ids.get(token, 0)

    def _convert_id_to_token(self, index):
        return self.texts[index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)

    def save_vocabulary(self, save_directory, filename_prefix=None):
        path = os.path.join(save_directory, (f"{filename_prefix}-" if filename_prefix else "") + "lowmem_tokenizer.json")
        if os.path.abspath(path) != os.path.abspath(self.file):
            shutil.copyfile(self.file, path)
        return (path,)
