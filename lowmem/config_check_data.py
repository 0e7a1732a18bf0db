"""Contradictions in what a run learns from: sources, phases, and the lengths of sequences."""

from collections.abc import Sequence

from lowmem.config import PhaseConfig, RunConfig, SourceConfig
from lowmem.units import parse_count


def source_problems(sources: Sequence[SourceConfig], where: str, exhausted: str) -> list[str]:
    """What is wrong with a list of sources.

    Args:
        where: its key, such as data.sources.
        exhausted: what is to happen at the end of a source.
    """
    problems = []
    for index, source in enumerate(sources):
        key = f"{where}[{index}]"
        given = [name for name in ("path", "hub", "stdlib") if getattr(source, name)]
        if len(given) != 1:
            problems.append(f"{key} has {' and '.join(given) or 'no source'}; set exactly one of path, hub, stdlib")
        if source.streaming and not source.hub:
            problems.append(f"{key}.streaming is for hub datasets; files are streamed anyway")
        if source.streaming and exhausted != "repeat":
            problems.append(f"{key} is streamed, so nobody knows when it is exhausted; use data.exhausted=repeat, or store it")
    points = sorted({step for source in sources for step in source.weight_schedule})
    for step in points:
        if not any(source.weight_at(step) > 0 for source in sources):
            problems.append(f"{where}: all weights are 0 at step {step}; leave one above 0")
    return problems


def length_problems(where: str, steps: int, tokens: int | float | str) -> list[str]:
    """Exactly one of steps and tokens is set."""
    try:
        count = parse_count(tokens)
    except ValueError as error:
        return [f"{where}.tokens: {error}"]
    return [f"{where}.steps is {steps} and {where}.tokens is {tokens}; set exactly one of the two"] if bool(steps) == bool(count) else []


def phase_problems(config: RunConfig) -> list[str]:
    """What is wrong with the phases and with the schedule of lengths."""
    problems = _schedule_problems(config)
    if config.phases and (config.train.steps or config.train.tokens):
        problems.append(
            f"train.steps is {config.train.steps} and train.tokens is {config.train.tokens}, but each phase has its own; remove them here"
        )
    names = [phase.name for phase in config.phases if phase.name]
    problems += [
        f"two phases are called {name!r}; give each a name of its own" for name in sorted({n for n in names if names.count(n) > 1})
    ]
    for index, phase in enumerate(config.phases):
        key = f"phases[{index}]"
        problems += length_problems(key, phase.steps, phase.tokens)
        problems += source_problems(phase.sources, f"{key}.sources", config.data.exhausted)
        problems += (_chat_problems if phase.kind == "chat" else _text_problems)(phase, key)
    if any(phase.kind == "chat" for phase in config.phases) and config.train.distill.teacher and config.model.name == "i3":
        problems.append("train.distill with a chat phase needs model.name=decoder; drop one of the two")
    if config.data.document_mask is True and config.model.name == "i3":
        problems.append("data.document_mask needs model.name=decoder: the recurrent state of i3 goes on into the next document")
    return problems


def _text_problems(phase: PhaseConfig, key: str) -> list[str]:
    if phase.template or phase.truncation != "cut":
        return [f"{key} has a template or a truncation, which only kind: chat uses; remove them, or set kind: chat"]
    return []


def _chat_problems(phase: PhaseConfig, key: str) -> list[str]:
    problems = [] if phase.sources else [f"{key} is of kind chat and has no sources; name files of conversations"]
    for index, source in enumerate(phase.sources):
        text_field = source.text_field != "text"
        idle = {"stdlib": source.stdlib, "streaming": source.streaming, "max_bytes": source.max_bytes, "text_field": text_field}
        if names := [name for name, is_set in idle.items() if is_set]:
            found = " and ".join(names)
            problems.append(f"{key}.sources[{index}] has {found}, which conversations do not have; remove it, or use kind: text")
    return problems


def _schedule_problems(config: RunConfig) -> list[str]:
    schedule, longest = config.train.seq_len_schedule, config.data.seq_len
    if not schedule:
        return []
    text = "train.seq_len_schedule"
    if min(schedule) < 0 or min(schedule.values()) < 1 or 0 not in schedule:
        return [f"{text} is {schedule}; it needs a length for step 0, steps of at least 0 and lengths of at least 1"]
    if max(schedule.values()) != longest:
        return [f"{text} reaches {max(schedule.values())}, but data.seq_len is {longest}; set data.seq_len={max(schedule.values())}"]
    tokens = config.train.global_batch_size * longest
    if uneven := sorted({length for length in schedule.values() if tokens % length}):
        return [
            f"{text}: the {tokens} tokens of a step are no whole number of sequences of {uneven[0]}; use lengths that divide "
            f"train.global_batch_size * data.seq_len, such as {next(d for d in range(uneven[0] - 1, 0, -1) if tokens % d == 0)}"
        ]
    return []
