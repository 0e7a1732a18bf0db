"""One rank of a DeepSpeed launch for tests/engine/test_deepspeed_engine.py: runs a list of cases and writes what each one did.

Usage: deepspeed_worker.py CASES.json OUT_DIR. `launch` does that, with and without DeepSpeed's launcher.
"""

import argparse
import hashlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lowmem.config.schema import AdapterConfig, DataConfig, EngineConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from lowmem.data.batch import IGNORE_INDEX, Batch
from lowmem.system.errors import MemoryBudgetError

VOCAB, DIM, SEQ_LEN, GLOBAL_BATCH = 67, 24, 6, 8


class TinyModel(nn.Module):
    """Embedding, two residual layers, and a head whose weight is used outside its own forward, as a chunked loss does."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, dim)
        self.norm = nn.LayerNorm(dim)
        self.first, self.second = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False)
        self.head = nn.Linear(dim, VOCAB, bias=False)
        self.poison = ""

    def forward(
        self, tokens: torch.Tensor, targets: torch.Tensor, denominator: float = 1.0, segments_BT: None = None, soft_targets: None = None
    ) -> torch.Tensor:
        assert segments_BT is None
        hidden = self.embed(tokens)
        hidden = hidden + torch.tanh(self.first(self.norm(hidden)))
        hidden = hidden + torch.tanh(self.second(hidden))
        logits = F.linear(hidden, self.head.weight)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
        return self._poisoned(loss, hidden) / denominator

    def _poisoned(self, loss: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Three ways in which a step can be bad."""
        if self.poison == "loss":  # only the loss is infinite
            return loss + math.inf
        if self.poison == "gradient":  # only the gradients are NaN: sqrt has slope inf at 0
            return loss + (hidden.sum() * 0.0).sqrt()
        return loss * math.nan if self.poison == "both" else loss


def make_batch(step: int) -> Batch:
    """A batch whose ranks and micro-batches predict different numbers of tokens."""
    random = np.random.default_rng(step)
    batch = Batch.from_windows(random.integers(0, VOCAB, (GLOBAL_BATCH, SEQ_LEN + 1)))
    targets = batch.targets.copy()
    for row in range(GLOBAL_BATCH):
        targets[row, : row % 4] = IGNORE_INDEX
    return Batch(batch.inputs, targets)


def run_config(case: dict[str, Any]) -> RunConfig:
    optim = {"lr": 1e-2, "clip": 0.5, **case.get("optim", {})}
    train = {"steps": 1, "global_batch_size": GLOBAL_BATCH, "micro_batch_size": 2, "precision": "fp32", **case.get("train", {})}
    data, engine = DataConfig(seq_len=SEQ_LEN), EngineConfig(name="deepspeed", **case["engine"])
    config = RunConfig(data=data, optim=OptimConfig(**optim), train=TrainConfig(**train), engine=engine)
    if "path" in case:  # of a model of transformers
        config.model = ModelConfig(path=case["path"], max_seq_len=SEQ_LEN)
        config.adapter = AdapterConfig(**case.get("adapter", {}))
    return config


def make_model(case: dict[str, Any]) -> Any:
    if "path" in case:
        from lowmem.engine.from_config import build_configured_model

        model = build_configured_model(run_config({**case, "engine": {}}), tuple(case.get("new_tokens", ())))
        model.activation_checkpointing = case.get("activation_checkpointing", "none")
        return model
    if "model" not in case:
        return TinyModel(case.get("dim", DIM))
    from lowmem.config.schema import LorptConfig, ModelConfig
    from lowmem.models.registry import build_model

    shape = {**case["model"], "lorpt": LorptConfig(**case["model"].get("lorpt", {}))}
    model = build_model(ModelConfig(**shape), vocab_size=VOCAB, max_seq_len=SEQ_LEN, seed=0)
    model.activation_checkpointing = case.get("activation_checkpointing", "none")
    return model


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    from lowmem.engine.deepspeed.engine import DeepSpeedEngine

    config = run_config(case)
    model = make_model(case)
    if "path" not in case:
        model = model.to(torch.bfloat16 if config.train.weight_dtype == "bf16" else torch.float32)
    engine = DeepSpeedEngine(model, config, device=torch.device("cpu"), micro_batch_size=config.train.micro_batch_size)
    if case.get("load"):
        engine.load(Path(case["load"]), json.loads((Path(case["load"]) / "state.json").read_text()))
    steps: list[Any] = []
    found_random: list[float] = []
    for step in case["steps"]:
        model.poison = case.get("poison", {}).get(str(step), "") if engine.rank == engine.world_size - 1 else ""
        found_random = torch.rand(2).tolist()
        if str(step) in case.get("micro", {}):
            engine.set_micro_batch_size(case["micro"][str(step)])
        if case.get("runs_out", {}).get("step") == step and engine.rank == engine.world_size - 1:
            run_out_of_memory(model, **case["runs_out"])
        try:
            batch = make_batch(step).rows(0, case.get("rows", GLOBAL_BATCH))
            result = engine.step(batch, lr=config.optim.lr * (1 + step) / 20)
        except MemoryBudgetError as error:
            return {"error": str(error)}  # of no use any more
        steps.append([result.loss, result.grad_norm, result.skipped])
    model.poison = ""
    found = {"steps": steps, "memory": engine.memory_components(), "random": found_random, "weights_sha256": weights_sha256(model)}
    found |= {"messages": engine.messages, "micro_batch": engine.micro_batch_state()}
    found["val_loss"] = engine.evaluate([make_batch(1000), make_batch(1001).rows(0, 3)])
    if case.get("save"):
        directory = Path(case["save"])
        if engine.rank == 0:
            directory.mkdir(parents=True)
        engine.barrier()
        found["state"] = engine.save(directory)
        engine.barrier()
        if engine.rank == 0:
            (directory / "state.json").write_text(json.dumps(found["state"]))
    found["any_rank"] = [engine.any_rank(engine.rank == 0), engine.any_rank(False)]
    engine.barrier()
    engine._release()  # the process group stays for the next case
    return found


def run_out_of_memory(model: nn.Module, *, call: int, backward: bool = False, step: int = 0) -> None:
    """Have the model's `call`-th forward pass from now on, or the backward pass of that, run out of memory."""
    forward, calls = model.forward, []

    def fail(*_: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    def limited(*arguments: Any, **more) -> torch.Tensor:
        calls.append(1)
        if len(calls) == call and not backward:
            fail()
        loss = forward(*arguments, **more)
        if len(calls) == call:
            model.embed.weight.register_post_accumulate_grad_hook(fail_once)  # the last gradient of a backward pass
        return loss

    def fail_once(parameter: torch.Tensor) -> None:
        if len(calls) == call:
            calls.append(1)
            fail()

    model.forward = limited


def weights_sha256(model: nn.Module) -> str:
    """Of the weights that this rank holds whole; stage 3 leaves none."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(b"" if hasattr(parameter, "ds_id") else parameter.detach().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def launch(cases: list[dict[str, Any]], out: Path, ranks: int, timeout_s: float = 500.0) -> list[dict[str, dict[str, Any]]]:
    """Run cases one after the other in new processes; what each rank found, by case name. One rank runs without a launcher."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "cases.json").write_text(json.dumps(cases))
    script = [str(Path(__file__)), str(out / "cases.json"), str(out)]
    command = [sys.executable, *script]
    if ranks > 1:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        launcher = str(Path(sys.executable).with_name("deepspeed"))
        command = [sys.executable, launcher, "--num_gpus", str(ranks), "--master_port", str(port), *script]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment["OMP_NUM_THREADS"] = "1"
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    assert process.returncode == 0, output[-4000:]
    return [{case["name"]: json.loads((out / f"{case['name']}-rank{rank}.json").read_text()) for case in cases} for rank in range(ranks)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--local_rank", type=int, default=0)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    from lowmem.engine.deepspeed.processes import destroy_process_group, rank

    for case in json.loads(flags.cases.read_text()):
        found = run_case(case)
        (flags.out / f"{case['name']}-rank{rank()}.json").write_text(json.dumps(found))
    destroy_process_group()


if __name__ == "__main__":
    main()
