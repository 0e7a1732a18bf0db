"""Imports run downwards only, functions stay short, and importing lowmem stays quick."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    {"launch", "profiling"},
    {"cli"},
    {"doctor"},
    {"doctor_table"},
    {"machine"},
    {"profile", "plan"},
    {"finetune"},
    {"train", "export", "generate", "reporting"},
    {"generation"},
    {"run_model", "sampling"},
    {"planning"},
    {"engine"},
    {"models", "optim", "data", "memory"},
    {"nn"},
    {"devices", "fake"},
    {"config_load", "config_dump"},
    {"config_yaml"},
    {"config_schema", "config_check"},
    {"config_check_data"},
    {"config", "config_data", "config_finetune", "config_model", "config_values", "arguments", "units", "errors", "process"},
]
FLOOR_OF = {name: height for height, names in enumerate(reversed(FLOORS)) for name in names}
SOURCES = sorted([*(ROOT / "lowmem").rglob("*.py"), *(ROOT / "launch").glob("*.py"), *(ROOT / "profiling").glob("*.py")])


def part_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    if relative.parts[0] != "lowmem":
        return relative.parts[0]
    return relative.parts[1].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """Parts of lowmem that a file imports anywhere, also inside functions."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "lowmem" else [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        parts |= {name.split(".")[1] for name in names if name.startswith("lowmem.")}
    return parts


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards(path):
    here = part_of(path)
    if here == "__init__":
        pytest.skip("the package's front door")
    for other in imported_parts(path):
        if other == "__version__":
            continue
        assert FLOOR_OF[other] < FLOOR_OF[here] or other == here or ({other, here} <= set(FLOORS[-1])), f"{path} imports lowmem.{other}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_stay_short(path):
    """Triton kernels excepted: a launch is one function."""
    nodes = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    functions = [node for node in nodes if not any("_jit" in ast.unparse(decorator) for decorator in node.decorator_list)]
    assert [f"{f.name}: {f.end_lineno - f.lineno + 1} lines" for f in functions if f.end_lineno - f.lineno >= 60] == []


def test_import_is_quick_and_light():
    code = "import sys, lowmem; print(sorted({'torch', 'deepspeed', 'transformers', 'datasets'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_architecture_names_every_file():
    page = (ROOT / "ARCHITECTURE.md").read_text()
    assert [str(path.relative_to(ROOT)) for path in SOURCES if path.name != "__init__.py" and f"`{path.name}`" not in page] == []


def test_what_users_script_against_is_there():
    import lowmem

    assert lowmem.LoRPtLinear(64, 64, rank=8).up.shape == (64, 8)
    assert {lowmem.optim.AdamW.__name__, lowmem.optim.Lion.__name__} == {"AdamW", "Lion"}
    with lowmem.memory.measure_peak() as peak:
        pass
    assert peak.host_peak_bytes > 0
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lowmem.nothing  # noqa: B018


def test_no_test_file_imports_another():
    """What test files share lies in conftest.py files (fixtures) and in modules without tests (functions and constants)."""
    found = []
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            names = [prefix + alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            found += [f"{path.relative_to(ROOT)}: {name}" for name in names if re.match(r"tests\.(.*\.)?(test_\w+|conftest)\b", name)]
    assert found == []
