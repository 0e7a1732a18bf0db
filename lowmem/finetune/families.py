"""What is known of the families of transformers that are trained here. Each is tested: its loss on packed conversations is its own.

`lowmem.finetune.probe` asks the same of every base before it is trained.
"""

from typing import Any

from torch import nn

from lowmem.system.errors import CheckpointError

# model types whose conversations are kept apart by a mask over the tokens of a row
PACKED = (
    "apertus", "arcee", "biogpt", "codegen", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4",
    "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "granite", "helium", "hunyuan_v1_dense", "llama", "lowmem", "mistral", "nemotron",
    "olmo", "olmo2", "olmo3", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2", "xglm",
)  # fmt: skip
# model types with a state that goes through a row, or with masks of their own: one conversation a row
ONE_PER_ROW = ("bloom", "lfm2", "qwen3_5_text", "recurrent_gemma")
FAMILIES = tuple(sorted((*PACKED, *ONE_PER_ROW)))


def one_conversation_per_row(config: Any, seq_len: int) -> bool:
    """Whether the conversations of a row of `seq_len` tokens cannot be kept apart in models of this configuration of transformers.

    A mask of one's own takes the place of the sliding window of a family that has one, and may do so only where that ends nowhere.
    """
    recurrent = config.model_type in ONE_PER_ROW or getattr(config, "architecture", "") == "i3"
    window = attention_window(config)
    return recurrent or (window > 0 and seq_len > window)


def attention_window(config: Any) -> int:
    """Tokens that a layer with a sliding window looks back at; 0 if there is none."""
    kinds = getattr(config, "layer_types", None)
    none = getattr(config, "use_sliding_window", True) is False or (kinds and not any("sliding" in str(kind) for kind in kinds))
    return 0 if none else _count(config, "sliding_window")


def learned_positions(model: Any) -> int:
    """How many positions the model has weights or a table for; 0 if they are computed as they come."""
    words = model.get_input_embeddings()
    rows = [
        module.num_embeddings for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module is not words and any(part in name for part in ("position", "wpe"))
    ]  # fmt: skip
    rows += [buffer.shape[0] for name, buffer in model.named_buffers() if name.endswith("embed_positions")]
    return min(config_positions(model.config), *rows) if rows else 0


def config_positions(config: Any) -> int:
    """The positions that the model was made for, as its config.json has it; a large number if it says nothing."""
    return _count(config, "max_position_embeddings") or 1 << 60


def _count(config: Any, key: str) -> int:
    """A size in a configuration; 0 if it is null or not there.

    Raises:
        CheckpointError: it is something else.
    """
    value = getattr(config, key, None)
    if value is not None and (type(value) is not int or value < 0):
        raise CheckpointError(f"config.json has {key} {value!r:.60}, expected a count or null; restore it")
    return value or 0
