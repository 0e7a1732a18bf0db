"""Whether the texts that were asked for fit the memory that is free."""

import argparse
import json
from collections.abc import Sequence

from lowmem.errors import MemoryBudgetError
from lowmem.generation.batch import BATCH_SIZE
from lowmem.generation.context import PREFILL_TOKENS, position_window
from lowmem.planning.generation_memory import generation_memory, generation_refusal
from lowmem.planning.hardware import this_hardware
from lowmem.run_model import RunModel


def check_memory(run: RunModel, flags: argparse.Namespace, prompts: Sequence[str], max_new_tokens: int, device: str) -> None:
    """Refuse what will not fit, before the weights are read; with --dry_run print what it will take.

    Args:
        run: an outline.
        flags: dry_run, json, force, chat and batch_size of `lowmem generate`.
        prompts: none are texts as long as those of training, `batch_size` of them.
        device: "cpu" or "cuda".
    Raises:
        MemoryBudgetError: it will not fit; the message has the remedy. Never with --force, unless it is a dry run.
    """
    context = max((len(run.tokenizer.encode(prompt)) or 1 for prompt in prompts), default=run.model.max_seq_len) + max_new_tokens
    if flags.chat:
        context = run.model.max_seq_len + max_new_tokens
    window = position_window(run.model)
    context = min(context, window) if window else context
    alone = flags.chat or flags.interactive
    batch_size = 1 if alone else min(flags.batch_size or BATCH_SIZE, len(prompts)) if prompts else flags.batch_size or 1
    memory = generation_memory(run.model, batch_size, context, PREFILL_TOKENS, device)
    free = this_hardware()
    problem = "" if flags.force and not flags.dry_run else generation_refusal(run.model, memory, free, PREFILL_TOKENS)
    if flags.dry_run:
        available = {"ram_bytes": free.ram_bytes, "vram_bytes": free.vram_bytes}
        print(json.dumps({"predicted": memory.as_dict(), "free": available, "fits": not problem}) if flags.json else memory)
    if problem:
        raise MemoryBudgetError(problem)
