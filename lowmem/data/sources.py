"""Where text comes from: files, hub datasets and the standard library."""

from lowmem.config import SourceConfig
from lowmem.data.hub import HubSource, StreamedSource
from lowmem.data.stdlib_source import StdlibSource
from lowmem.data.text_files import FileSource, find_files
from lowmem.data.text_source import LimitedSource, TextSource
from lowmem.data.utf8 import DecodeErrors
from lowmem.errors import ConfigError


def open_source(config: SourceConfig, decode_errors: DecodeErrors) -> TextSource:
    """The source that `config` describes; reads no text yet.

    Raises:
        ConfigError: not exactly one of path, hub and stdlib is set, or a setting has no effect on the one that is.
        DataError: no such file or dataset.
    """
    _check_settings(config)
    source: TextSource
    if config.path:
        source = FileSource(config.path, find_files(config.path), config.text_field, decode_errors)
    elif config.hub:
        source = StreamedSource(config) if config.streaming else HubSource(config, decode_errors)
    else:
        source = StdlibSource()
    return LimitedSource(source, config.max_bytes) if config.max_bytes else source


def _check_settings(config: SourceConfig) -> None:
    given = [name for name in ("path", "hub", "stdlib") if getattr(config, name)]
    if len(given) != 1:
        raise ConfigError(f"a source of data.sources has {' and '.join(given) or 'no source'}; set exactly one of path, hub, stdlib")
    if config.max_bytes < 0:
        raise ConfigError(f"max_bytes of a source is {config.max_bytes}, must be 0 (everything) or more")
    if not config.hub:
        idle = {"subset": config.subset != "", "split": config.split != "train", "streaming": config.streaming}
        idle["text_field"] = config.stdlib and config.text_field != "text"
        if names := [name for name, is_set in idle.items() if is_set]:
            raise ConfigError(f"{' and '.join(names)} of a source has no effect on {given[0]}; remove it, or use hub")
