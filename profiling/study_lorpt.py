"""Does low-rank pretraining learn as well as dense? Every published fix alone, the best together, against a tuned dense model.

    python profiling/study_lorpt.py --text FILE --out profiling/results      # three hours on two cores
    python profiling/study_lorpt.py --parts small --steps 50                 # a quick look, on the standard library's text

Parts, each adding to results/study_lorpt.json; a run that is there already is not repeated:

    small     4.8M block parameters dense: learning rates of dense, of the published layer and of the candidates
    fixes     4.8M: each fix alone, added to the published layer at its best learning rate, at half the tokens
    seeds     4.8M: the finalists with three seeds
    large     19.3M block parameters dense: dense at two learning rates, the published layer, the finalists
    large_seeds  the best of them and dense with three seeds
    combinations  4.8M: SiLU and Spectron with one fix more, at half the tokens
    ranks     4.8M: the finalist by rank, at half the tokens
    grow      4.8M: rank 16 that becomes 64 half-way, at half the tokens
    wall      4.8M: the finalist for as long as dense takes, by step times measured in turn, one process at a time

Same tokens, same data order, same initial embeddings per seed. Two runs go on at once, one thread each, except in `wall`.
"""

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lorpt_runs import GLOBAL_BATCH, SCALES, SEQ_LEN, WARMUP, run_child

SEEDS = (0, 1, 2)
ALL = {"rank": "auto", "targets": ["attention", "mlp"], "bottleneck": "linear"}
PUBLISHED = {**ALL, "init": "original"}
SPECTRON = {"name": "spectron", "lr": 4e-3}
VARIANTS = {
    "dense, AdamW": {"optim": {"lr": 2e-3}},
    "dense, Spectron": {"optim": {**SPECTRON, "matrix_lr": 8e-3}},
    "published": {"lorpt": PUBLISHED, "optim": {"lr": 4e-3}},
    "linear, AdamW": {"lorpt": ALL, "optim": {"lr": 4e-3}},
    "SiLU, AdamW": {"lorpt": {**ALL, "bottleneck": "silu"}, "optim": {"lr": 4e-3}},
    "linear, Spectron": {"lorpt": ALL, "optim": {**SPECTRON, "matrix_lr": 2e-2}},
    "SiLU, Spectron": {"lorpt": {**ALL, "bottleneck": "silu"}, "optim": {**SPECTRON, "matrix_lr": 2e-2}},
}
TRIED = {  # learning rates besides the one above
    "dense, AdamW": (1e-3, 4e-3),
    "dense, Spectron": (4e-3,),
    "published": (5e-4, 1e-3, 2e-3, 8e-3),
    "SiLU, AdamW": (8e-3,),
    "linear, Spectron": (5e-3, 1e-2, 4e-2),
    "SiLU, Spectron": (1e-2, 4e-2),
}
FINALISTS = ("dense, AdamW", "SiLU, Spectron", "linear, Spectron", "published", "dense, Spectron")
LARGE = FINALISTS[:4]
SEEDED = ("dense, AdamW", "SiLU, Spectron", "published")
RANKS = (16, 32, 64)


def main() -> None:
    """Parse the command line, run what is missing, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", default=["small", "large", "seeds", "fixes", "combinations", "grow", "ranks", "large_seeds", "wall"]
    )
    parser.add_argument("--text", default="", help="a text file; empty takes the standard library's own text")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, help="folder of study_lorpt.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(run_child(json.loads(arguments.child))))
        return
    study = Study(arguments)
    for part in arguments.parts:
        getattr(study, part)()
    print(json.dumps(study.summary(), indent=1))


class Study:
    """Runs by name, on disk after each of them."""

    def __init__(self, arguments: argparse.Namespace):
        self.text, self.steps = arguments.text, arguments.steps
        self.path = arguments.out and arguments.out / "study_lorpt.json"
        self.runs: dict[str, dict] = {}
        if self.path and self.path.exists():
            self.runs = json.loads(self.path.read_text())["runs"]

    def small(self) -> None:
        """Learning rates."""
        self.run({name: s for variant in VARIANTS for name, s in self.rates("small", variant).items()})

    def fixes(self) -> None:
        """Each alone."""
        self.run(self.single_fixes())

    def seeds(self) -> None:
        """Finalists."""
        self.run({f"small, {v}, seed {seed}": {**self.best("small", v), "seed": seed} for seed in SEEDS[1:] for v in SEEDED})

    def large(self) -> None:
        """At the learning rate that was best for small; dense also at a half and a quarter of it, which is where wider models tend."""
        best = {variant: {**self.best("small", variant), "scale": "large"} for variant in LARGE}
        rates = [share * best["dense, AdamW"]["optim"]["lr"] for share in (0.5, 0.25)]
        others = {f"large, dense, AdamW, lr {lr:g}": {**best["dense, AdamW"], "optim": {"lr": lr}} for lr in rates}
        self.run({f"large, {variant}": setting for variant, setting in best.items()} | others)

    def large_seeds(self) -> None:
        """The two that matter most."""
        for seed in SEEDS[1:]:
            self.run({f"large, {variant}, seed {seed}": {**self.best("large", variant), "seed": seed} for variant in LARGE[:2]})

    def combinations(self) -> None:
        """One more change each, from SiLU and Spectron."""
        best = self.best("small", "SiLU, Spectron")
        changes = {
            "original init": {"init": "original"},
            "spectral init": {"init": "spectral"},
            "first block dense": {"ranks": {"blocks.0.*": 0}},
        }
        runs = {"nothing": best} | {n: {**best, "lorpt": {**best["lorpt"], **change}} for n, change in changes.items()}
        self.run({f"small, SiLU, Spectron + {name}": {**setting, "steps": self.steps // 2} for name, setting in runs.items()})

    def ranks(self) -> None:
        """SiLU, Spectron by rank of every layer; auto has 64 in square ones and 88 in the feed-forward layers."""
        self.run({f"small, SiLU, Spectron, rank {rank}": self.of_rank(rank) for rank in RANKS})

    def grow(self) -> None:
        """A rank that grows half-way, against those of `ranks` that keep it."""
        half_way = {"at": self.steps // 4, "rank": RANKS[-1]}
        self.run({f"small, SiLU, Spectron, rank {RANKS[0]} grown to {RANKS[-1]}": {**self.of_rank(RANKS[0]), "grow": half_way}})

    def of_rank(self, rank: int) -> dict:
        """SiLU, Spectron with this rank in every layer, at half the tokens."""
        best = self.best("small", "SiLU, Spectron")
        return {**best, "lorpt": {**best["lorpt"], "rank": rank}, "steps": self.steps // 2}

    def wall(self) -> None:
        """Step times and peak memory of each, quietly; then dense against the others, whose steps are as many as fit its time."""
        names = ["dense, AdamW", "dense, Spectron", "published", "SiLU, Spectron"]
        settings = {name: self.best("small", name) for name in names}
        ranked = {f"SiLU, Spectron, rank {r}" for r in RANKS} & {name.removeprefix("small, ") for name in self.runs}
        settings |= {name: self.runs[f"small, {name}"]["setting"] for name in sorted(ranked)}
        large = {f"large, {name}": {**settings[name], "scale": "large"} for name in ("dense, AdamW", "SiLU, Spectron")}
        for scale, group in (("small", settings), ("large", large)):
            if f"{scale}, step times" not in self.runs:
                self.runs[f"{scale}, step times"] = {"names": list(group), **self.child({"time": list(group.values())})}
            for name, setting in group.items():
                own = self.runs[name if name in self.runs else f"{scale}, {name}"]
                own.setdefault("quiet_peak_bytes", self.child({**setting, "steps": 6})["peak_bytes"])
        self._write()
        ratios = dict(zip(self.runs["small, step times"]["names"], self.runs["small, step times"]["ratios"], strict=True))
        for name in ("dense, Spectron", "SiLU, Spectron"):
            self.run({f"small, {name}, wall-clock of dense": {**settings[name], "steps": round(self.steps / ratios[name])}})

    def rates(self, scale: str, variant: str) -> dict[str, dict]:
        """Runs of one variant by name: its usual learning rate, and the others."""
        setting = {**VARIANTS[variant], "scale": scale}
        key = "matrix_lr" if "Spectron" in variant else "lr"
        others = {f"{scale}, {variant}, {key} {lr:g}": {**setting, "optim": {**setting["optim"], key: lr}} for lr in TRIED.get(variant, ())}
        return {f"{scale}, {variant}": setting, **others}

    def best(self, scale: str, variant: str) -> dict:
        """The setting with the lowest loss over learning rates, seed 0."""
        prefix = f"{scale}, {variant}"
        found = {n: r for n, r in self.runs.items() if n == prefix or n.startswith((f"{prefix}, lr", f"{prefix}, matrix_lr"))}
        setting = dict(min(found.values(), key=lambda run: run["val_loss"])["setting"])
        setting.pop("steps", None)
        return setting

    def single_fixes(self) -> dict[str, dict]:
        """One change each, from the published layer, all at half the tokens."""
        base = {**self.best("small", "published"), "steps": self.steps // 2}
        lorpt, optim = base["lorpt"], base["optim"]

        def with_lorpt(**changes) -> dict:  # type: ignore[no-untyped-def]
            return {**base, "lorpt": {**lorpt, **changes}}

        alone = {
            "nothing": base,
            "product-variance init": with_lorpt(init="product_variance"),
            "spectral init": with_lorpt(init="spectral"),
            "SiLU bottleneck": with_lorpt(bottleneck="silu"),
            "first block dense": with_lorpt(ranks={"blocks.0.*": 0}),
            "shared down": with_lorpt(share_down=True),
            "Spectron": {**base, "optim": self.best("small", "linear, Spectron")["optim"]},
        }
        from lorpt_fixes import FIXES

        alone |= {name: {**base, "fix": name} for name in FIXES}
        alone |= {
            "clip 0.5": {**base, "optim": {**optim, "clip": 0.5}},
            "MLP only": with_lorpt(targets=["mlp"]),
            "attention only": with_lorpt(targets=["attention"]),
        }
        return {f"small, published + {name}": setting for name, setting in alone.items()}

    def run(self, settings: dict[str, dict]) -> None:
        """Those that are not there yet, two at a time."""
        missing = [(name, setting) for name, setting in settings.items() if name not in self.runs]
        with ThreadPoolExecutor(2) as pool:
            for name, result in zip([n for n, _ in missing], pool.map(lambda pair: self.child(pair[1]), missing), strict=True):
                self.runs[name] = result
                print(f"{name}: {result['val_loss']:.4f} ({result['seconds']:.0f} s)", file=sys.stderr, flush=True)
                self._write()

    def child(self, setting: dict) -> dict:
        """In a process of its own."""
        setting = {"steps": self.steps, **setting, "text": self.text}
        command = [sys.executable, __file__, "--child", json.dumps(setting)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise SystemExit(f"{setting} failed:\n{result.stderr[-2000:]}")
        found = json.loads(result.stdout.splitlines()[-1])
        return {"setting": {key: value for key, value in setting.items() if key not in ("text", "time")}, **found}

    def summary(self) -> dict:
        """By scale: parameters of the blocks, loss over seeds, distance from tuned dense AdamW, paired by seed, in per cent."""
        table = {}
        for scale in SCALES:
            dense = self._by_seed(scale, "dense, AdamW")
            for variant in FINALISTS:
                losses = self._by_seed(scale, variant)
                if not losses:
                    continue
                percent = [100 * (loss / dense[seed] - 1) for seed, loss in losses.items() if seed in dense]
                table[f"{scale}, {variant}"] = {
                    "block_parameters": self.runs[f"{scale}, {variant}"]["block_parameters"],
                    "val_loss": round(statistics.mean(losses.values()), 4),
                    "percent_above_dense": round(statistics.mean(percent), 2),
                    "by_seed": [round(p, 2) for p in percent],
                }
        return table

    def _by_seed(self, scale: str, variant: str) -> dict[int, float]:
        if f"{scale}, {variant}" not in self.runs:
            return {}
        setting = self.best(scale, variant)
        first = min(run["val_loss"] for run in self.runs.values() if run.get("setting") == {**setting, "steps": self.steps})
        seeded = {seed: self.runs.get(f"{scale}, {variant}, seed {seed}") for seed in SEEDS[1:]}
        return {0: first} | {seed: run["val_loss"] for seed, run in seeded.items() if run}

    def _write(self) -> None:
        from machine import describe_machine

        if self.path:
            shape = {"scales": SCALES, "seq_len": SEQ_LEN, "global_batch_size": GLOBAL_BATCH, "steps": self.steps, "warmup_steps": WARMUP}
            shape["text"] = Path(self.text).name if self.text else "the standard library"
            document = {"machine": describe_machine(), "shape": shape, "summary": self.summary(), "runs": self.runs}
            self.path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
