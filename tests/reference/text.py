"""Text as a source yields it, whole."""

from lowmem.config.schema import SourceConfig
from lowmem.data.text import open_source
from lowmem.data.text_source import ReadCounters


def documents(path, errors="fail", counters=None, **settings) -> list[str]:
    source = open_source(SourceConfig(path=str(path), **settings), errors)
    found, text = [], ""
    for piece in source.pieces(counters or ReadCounters()):
        text += piece.text
        if piece.ends_document:
            found.append(text)
            text = ""
    assert text == ""
    return found
