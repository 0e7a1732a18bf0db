"""Predicts a run in a process of its own, before the run begins: the predictor's memory must not become the run's.

`python -m lowmem.planning.check` reads a JSON request on standard input and writes a JSON answer on standard output.
"""

import json
import signal
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from lowmem.config.load import config_from_values
from lowmem.config.schema import RunConfig
from lowmem.system.errors import EXIT_INTERRUPTED, ConfigError, MemoryBudgetError
from lowmem.system.process import KILLED, with_parent


def check_run(config: RunConfig, world_size: int = 1, local_ranks: int = 0) -> dict[str, Any]:
    """Predicted peaks of a run, and why it does not fit its budget.

    Args:
        config: checked.
        world_size, local_ranks: see `predict_peak`.
    Returns:
        `predicted`, as in memory.json; `summary` of it for people; `micro_batch_size`: the one asked for, or where that is auto the
        largest that fits; `refusal`: one paragraph, empty if the run fits.
    Raises:
        ConfigError: the configuration cannot be predicted.
        MemoryBudgetError: there is not enough memory to predict it, let alone to run it.
    Memory: none in this process.
    """
    request = json.dumps({"config": asdict(config), "world_size": world_size, "local_ranks": local_ranks})
    command = with_parent([sys.executable, "-m", "lowmem.planning.check"])
    result = subprocess.run(command, input=request, capture_output=True, text=True)
    if result.returncode in (EXIT_INTERRUPTED, -signal.SIGINT):
        raise KeyboardInterrupt
    if not result.returncode:
        return json.loads(result.stdout)
    lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
    if result.returncode in KILLED:
        raise MemoryBudgetError(
            "the memory of this run could not be predicted: the process that predicts it takes some 400 MB and was killed, as the "
            "system does when memory runs out; free memory, raise the control group's limit, or start without a prediction: --force"
        )
    error = MemoryBudgetError if result.returncode == MemoryBudgetError.exit_code else ConfigError
    raise error(f"the memory of this run could not be predicted: {lines[-1]}")


def main() -> None:
    """Answer the request on standard input."""
    from lowmem.planning.levers import predict_fitting, refusal

    request = json.load(sys.stdin)
    config = config_from(request["config"])
    try:
        prediction = predict_fitting(config, request["world_size"], request["local_ranks"])
    except (MemoryBudgetError, MemoryError) as error:
        print(f"memory ran out: {error}" if isinstance(error, MemoryError) else error, file=sys.stderr)
        sys.exit(MemoryBudgetError.exit_code)
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(ConfigError.exit_code)
    answer = {
        "predicted": prediction.as_dict(),
        "summary": "; ".join(prediction.lines()[1:]),
        "micro_batch_size": prediction.config.train.micro_batch_size,
        "refusal": refusal(prediction, request["world_size"], request["local_ranks"]),
    }
    json.dump(answer, sys.stdout)


def config_from(values: dict[str, Any]) -> RunConfig:
    """A configuration from its dictionary."""
    return config_from_values(RunConfig, values)


if __name__ == "__main__":
    main()
