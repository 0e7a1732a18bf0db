"""The runs of `study_lorpt.py`, each in a process of its own: training, and step times taken in turn."""

import math
import statistics
import time

SCALES = {
    "small": {"dim": 256, "num_layers": 6, "num_heads": 4, "vocab_size": 4096},
    "large": {"dim": 512, "num_layers": 6, "num_heads": 8, "vocab_size": 4096},
}
SEQ_LEN, GLOBAL_BATCH, EVAL_SEQUENCES, WARMUP = 128, 16, 512, 40


def run_child(setting: dict) -> dict:
    """One run, or the step times of several settings taken in turn."""
    import torch

    torch.set_num_threads(2 if "time" in setting else 1)
    return time_steps(setting) if "time" in setting else train(setting)


class Trainee:
    """A model of one setting, its engine and its data."""

    def __init__(self, setting: dict):
        import torch
        from lorpt_fixes import FIXES

        from lowmem.config.schema import DataConfig, LorptConfig, ModelConfig, OptimConfig, SourceConfig
        from lowmem.data.prepare import prepare_data
        from lowmem.engine.local import LocalEngine
        from lowmem.models.registry import build_model

        seed = setting.get("seed", 0)
        source = SourceConfig(path=setting["text"]) if setting["text"] else SourceConfig(stdlib=True)
        shape = SCALES[setting["scale"]]
        self.steps, self.grow, self.grown = setting["steps"], setting.get("grow", {}), {}
        self.data = prepare_data(DataConfig(sources=[source], tokenizer_vocab_size=shape["vocab_size"], seq_len=SEQ_LEN), seed=seed)
        config = ModelConfig(**shape, lorpt=LorptConfig(**setting.get("lorpt", {})))
        model = build_model(config, vocab_size=shape["vocab_size"], max_seq_len=SEQ_LEN, seed=seed)
        self.parameters = model.component_parameters()
        self.optim = OptimConfig(warmup_steps=WARMUP, **setting["optim"])
        cpu = torch.device("cpu")
        self.engine = LocalEngine(model, self.optim, device=cpu, precision="bf16", micro_batch_size=GLOBAL_BATCH, seed=seed)
        self.after = FIXES[setting["fix"]](model, self.engine.optimizer, self.optim, self.steps) if "fix" in setting else lambda step: None

    def evaluate(self, sequences: int) -> float:
        """Loss on so many held-out windows."""
        from lowmem.data.batch import Batch

        return self.engine.evaluate(Batch.from_windows(part) for part in self.data.validation.windows(sequences))

    def step(self, number: int) -> float:
        """The loss of step `number`, from 1."""
        from lowmem.data.batch import Batch
        from lowmem.optim.from_config import learning_rate

        if number == self.grow.get("at", -1) + 1:
            before = self.evaluate(EVAL_SEQUENCES)
            self.engine.set_rank(self.grow["rank"], {}, seed=1)
            self.grown = {"loss_before": before, "loss_after": self.evaluate(EVAL_SEQUENCES)}
        batch = Batch.from_windows(self.data.train.next(GLOBAL_BATCH))
        loss = self.engine.step(batch, learning_rate(self.optim, number, self.steps)).loss
        self.after(number)
        return loss


def train(setting: dict) -> dict:
    """In the child: one run."""
    from lowmem.memory.allocator import set_up_host_memory
    from lowmem.memory.measure import host_peak_bytes
    from lowmem.system.files import compiled_root

    set_up_host_memory(compiled_root())
    trainee = Trainee(setting)
    started = time.perf_counter()
    losses = [trainee.step(number) for number in range(1, setting["steps"] + 1)]
    seconds = time.perf_counter() - started
    peak_bytes = host_peak_bytes()
    val_loss = trainee.evaluate(EVAL_SEQUENCES)
    return {
        **trainee.grown,
        "val_loss": round(val_loss, 5),
        "train_loss_last_50": round(math.fsum(losses[-50:]) / len(losses[-50:]), 5),
        "finite": all(math.isfinite(loss) for loss in losses),
        "block_parameters": trainee.parameters["attention"] + trainee.parameters["mlp"],
        "parameters": sum(trainee.parameters.values()),
        "seconds": round(seconds, 1),
        "peak_bytes": peak_bytes,
    }


def time_steps(setting: dict) -> dict:
    """Median seconds of a step of each setting, one step of each in turn; the ratio is to the first."""
    trainees = [Trainee({"steps": 30, "text": setting["text"], **one}) for one in setting["time"]]
    times: list[list[float]] = [[] for _ in trainees]
    for number in range(1, 25):
        for trainee, taken in zip(trainees, times, strict=True):
            started = time.perf_counter()
            trainee.step(number)
            taken.append(time.perf_counter() - started)
    medians = [statistics.median(taken[4:]) for taken in times]
    return {"seconds_per_step": [round(m, 4) for m in medians], "ratios": [round(m / medians[0], 4) for m in medians]}
