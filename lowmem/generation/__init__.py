"""Writing text with a model: one text, several at once, or a conversation."""

from lowmem.generation.context import PREFILL_TOKENS, position_window
from lowmem.generation.texts import GenerationResult, generate, generate_batch

__all__ = ["PREFILL_TOKENS", "GenerationResult", "generate", "generate_batch", "position_window"]
