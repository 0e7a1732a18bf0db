"""The `finetune` command: `pretrain` with the defaults of fine-tuning."""

from collections.abc import Sequence

from lowmem.cli.pretrain import pretrain_main

DEFAULTS = (
    "data.kind=chat", "data.seq_len=256", "data.val_fraction=0.05", "adapter.method=lora", "optim.lr=1e-3", "optim.weight_decay=0",
    "optim.warmup_steps=10", "optim.betas=[0.9, 0.999]", "train.steps=100", "train.global_batch_size=8", "train.save_every=50",
    "train.eval_every=50", "run_dir=runs/finetuned",
)  # fmt: skip


def finetune_main(argv: Sequence[str]) -> int:
    """Run `lowmem finetune`; see `pretrain_main`."""
    return pretrain_main(argv, command="finetune", defaults=DEFAULTS)
