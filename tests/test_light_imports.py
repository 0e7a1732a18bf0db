"""What lowmem's own processes leave out, that whoever asks for it has it all the same, and what each kind of run is left with."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FIRST = "import sys\nfrom lowmem.system.light_imports import keep_imports_light\nkeep_imports_light()\nimport torch\n"
HEAVY = ("torch._dynamo.eval_frame", "torch._inductor", "torch.onnx", "torch.distributed.fsdp", "torch.distributed.tensor", "sympy.core",
         "torch.utils._sympy.functions", "torchao.quantization", "PIL.Image", "bitsandbytes", "scipy", "sklearn", "pandas", "onnx",
         "deepspeed", "torchvision", "datasets", "matplotlib", "tensorboard")  # fmt: skip


def fresh(code: str) -> str:
    result = subprocess.run([sys.executable, "-W", "error", "-c", FIRST + code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_marks_are_answered_without_the_compiler():
    fresh("""if True:
        import torch._dynamo
        function = lambda: 3
        assert torch._dynamo.disable(function) is function and torch._dynamo.disable(recursive=False)(function) is function
        assert torch.compiler.disable(function)() == 3 and torch._dynamo.allow_in_graph(function) is function
        weight = torch.nn.Parameter(torch.ones(8))
        optimizer = torch.optim.AdamW([weight], fused=True)
        weight.grad = torch.ones(8)
        optimizer.step(), optimizer.zero_grad(), optimizer.load_state_dict(optimizer.state_dict())
        torch.empty(4, device="meta").normal_()
        torch.arange(4, device="meta") + 1
        torch.autograd.grad(weight * 2, weight, torch.ones(8))
        heavy = [name for name in ("torch._dynamo.eval_frame", "sympy.core", "torch._inductor") if name in sys.modules]
        assert not heavy, heavy
    """)


@pytest.mark.slow
@pytest.mark.parametrize("use", [
    "torch._dynamo.disable(print)\nassert torch._dynamo.config.suppress_errors is False",
    "torch._dynamo.disable(print)\nfrom torch._dynamo import config\nassert config.suppress_errors is False",
    "torch._dynamo.disable(print)\nimport torch._dynamo.utils as utils\nassert utils.counters is not None and utils.__spec__.loader.path",
    "import torch._inductor.config as config\nassert config.max_autotune is False",
    'torch.optim.AdamW([torch.ones(2)])\nassert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).sum() == 4',
], ids=["attribute", "from", "submodule", "inductor", "compile"])  # fmt: skip
def test_whoever_needs_the_compiler_gets_the_whole_of_it(use):
    fresh(f"""import warnings
warnings.simplefilter("ignore")
{use}
from torch._dynamo.convert_frame import convert_frame
import torch._dynamo.eval_frame
assert type(sys.modules["torch._dynamo"]).__name__ == "module"
assert torch._dynamo is sys.modules["torch._dynamo"]
assert torch._dynamo.disable is torch._dynamo.decorators.disable
""")


@pytest.mark.slow
def test_whoever_needs_symbols_gets_sympy():
    """Also who has kept the stand-in's class, or a function for numbers."""
    fresh("""if True:
        import sympy
        from sympy import Basic
        from torch.fx.experimental.symbolic_shapes import guard_or_false, sym_eq, sym_and, sym_or
        assert not isinstance(3, Basic) and "sympy.core" not in sys.modules
        assert sym_eq((2, 3), torch.Size([2, 3])) and not sym_eq(2, 3) and not sym_eq((2,), (2, 3))
        assert sym_and(True, True) and not sym_and(True, False) and sym_or(False, True) and not guard_or_false(False)
        assert sym_eq(((1, 2), 3), ((1, 2), 3)) is True  # of shapes within shapes it does not answer itself
        from sympy.logic.boolalg import BooleanTrue
        x = sympy.Symbol("x")
        assert isinstance(x, Basic) and isinstance(x, sympy.Basic) and sympy.expand((x + 1) ** 2).coeff(x) == 2
        from torch.fx.experimental.symbolic_shapes import ShapeEnv
        size = ShapeEnv().create_unbacked_symint()
        assert isinstance(size, torch.SymInt) and guard_or_false(sym_eq((size, 2), (size, 2))) and not guard_or_false(size == 5)
    """)


def test_packages_are_absent_only_for_a_while_and_not_where_they_are_in_use():
    from lowmem.system.light_imports import absent

    with absent("colorsys_of_nobody", "json"):
        assert sys.modules["colorsys_of_nobody"] is None
        assert sys.modules["json"] is json
    assert "colorsys_of_nobody" not in sys.modules


def test_only_a_process_of_its_own_is_changed(monkeypatch, capsys):
    from lowmem.cli import main
    from lowmem.system import light_imports

    kept: list[bool] = []
    monkeypatch.setattr(main, "keep_imports_light", lambda: kept.append(True))
    assert main.main(["--version"]) == 0
    assert not kept
    monkeypatch.setattr(sys, "argv", ["lowmem", "--version"])
    assert main.main() == 0
    assert kept
    assert not any(isinstance(finder, light_imports._Finder) for finder in sys.meta_path)
    capsys.readouterr()


RUN = """
import json, sys
from lowmem.cli.main import main
path, sys.argv[1:] = sys.argv[1], sys.argv[2:]
code = main()
memory = {line.split(":")[0]: int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("Vm") and "kB" in line}
open(path, "w").write(json.dumps({"modules": sorted(sys.modules), "rss": memory.get("VmRSS", 0)}))
sys.exit(code)
"""


def run(tmp_path: Path, *words: str) -> dict:
    record = tmp_path / "record.json"
    result = subprocess.run([sys.executable, "-c", RUN, str(record), *words], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(record.read_text())


def heavy(found: dict) -> list[str]:
    return [name for name in HEAVY if name in found["modules"]]


SHORT = ("--data.seq_len=32", "--train.global_batch_size=4", "--train.micro_batch_size=2", "--train.steps=2", "--train.eval_every=2",
         "--train.eval_sequences=2", "--train.save_every=2", "--device=cpu", "--quiet")  # fmt: skip
SMALL = ("--model.dim=128", "--model.num_layers=2", "--model.num_heads=2", "--data.tokenizer=bytes")


def text_options(tmp_path: Path) -> list[str]:
    (tmp_path / "text.txt").write_text("some words to train on\n" * 2000)
    return [f"--data.sources=[{{path: {tmp_path}/text.txt}}]", f"--data.cache_dir={tmp_path}/cache", f"--run_dir={tmp_path}/run"]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [[], ["--optim.name=lion"], ["--train.update=layerwise", "--optim.state_bits=4"],
    ["--model.name=i3", "--model.num_heads=1", "--model.attention_rank=16", "--model.lorpt.rank=16"],
    ["--train.activation_checkpointing=block", "--optim.name=spectron"],
], ids=["fp32", "lion", "layerwise", "i3", "spectron"])  # fmt: skip
def test_a_run_of_its_own_models_imports_no_compiler(tmp_path, settings):
    assert heavy(run(tmp_path, "pretrain", *SHORT, *SMALL, *text_options(tmp_path), *settings)) == []
    assert heavy(run(tmp_path, "generate", f"--run={tmp_path}/run", "--prompt=some", "--max_new_tokens=2")) == []
    assert heavy(run(tmp_path, "export", f"--run={tmp_path}/run", "--format=hf", f"--out={tmp_path}/out")) == []


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "lora"])
def test_a_run_of_a_model_of_transformers_imports_no_compiler(tmp_path, base, chat, method):
    options = [f"--model.path={base}", f"--data={chat}", f"--data.cache_dir={tmp_path}/cache", f"--run_dir={tmp_path}/run"]
    assert heavy(run(tmp_path, "finetune", *SHORT, *options, f"--adapter.method={method}")) == []
    assert heavy(run(tmp_path, "generate", f"--run={tmp_path}/run", "--prompt=some", "--max_new_tokens=2")) == []
    assert heavy(run(tmp_path, "export", f"--run={tmp_path}/run", "--format=hf", f"--out={tmp_path}/out")) == []


@pytest.mark.slow
def test_a_plan_imports_no_compiler(tmp_path):
    assert heavy(run(tmp_path, "plan", "--budget.ram=2GiB", *SMALL, *SHORT[:-1], *text_options(tmp_path))) == []


BEFORE_ITS_FIRST_TENSOR = """
import sys
from lowmem.cli.main import main
from lowmem.memory.procfs import status_bytes
import lowmem.train.setup as setup
build = setup.build_configured_model
def measured(*arguments):
    print(status_bytes()["VmRSS"])
    return build(*arguments)
setup.build_configured_model = measured
sys.exit(main())
"""


@pytest.mark.memory
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_the_demo_takes_less_than_260_mb_before_its_first_tensor(tmp_path):
    demo = [f"--config={Path(__file__).parent.parent / 'configs/cpu/demo.yaml'}", *SHORT, *text_options(tmp_path), "--data.tokenizer=bytes"]
    result = subprocess.run([sys.executable, "-c", BEFORE_ITS_FIRST_TENSOR, "pretrain", *demo], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[0]) < 260e6


@pytest.mark.memory
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("method", ["none", "lora"])
def test_fine_tuning_takes_less_than_320_mb_before_its_first_tensor(tmp_path, base, chat, method):
    options = [f"--model.path={base}", f"--data={chat}", f"--data.cache_dir={tmp_path}/cache", f"--run_dir={tmp_path}/run"]
    command = [sys.executable, "-c", BEFORE_ITS_FIRST_TENSOR, "finetune", *SHORT, *options, f"--adapter.method={method}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[0]) < 320e6
