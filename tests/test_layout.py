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
    {"__main__"},
    {"cli"},
    {"train", "generation", "export", "reporting"},
    {"planning"},
    {"engine"},
    {"models", "optim", "data", "memory"},
    {"nn"},
    {"config"},
    {"system"},
]
FLOOR_OF = {name: height for height, names in enumerate(reversed(FLOORS)) for name in names}
SOURCES = sorted([*(ROOT / "lowmem").rglob("*.py"), *(ROOT / "launch").glob("*.py"), *(ROOT / "profiling").glob("*.py")])
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}


def part_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "lowmem" and len(parts) > 1 else parts[0]


def imported_modules(path: Path) -> set[str]:
    """Modules of the project that a file imports anywhere, also inside functions and for types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name if name in MODULES else name.rpartition(".")[0] for name in names}
    return found & set(MODULES)


IMPORTS = {module: imported_modules(path) - {module} for module, path in MODULES.items()}


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downwards(module):
    if module == "lowmem":
        pytest.skip("the package's front door")
    here = part_of(module)
    above = [other for other in IMPORTS[module] - {"lowmem"} if part_of(other) != here and FLOOR_OF[part_of(other)] >= FLOOR_OF[here]]
    assert above == []


def test_no_circle_of_imports():
    """Modules are taken away while some import none of those that are left; a circle stays."""
    left = {module: set(others) for module, others in IMPORTS.items()}
    while free := {module for module, others in left.items() if not others & set(left)}:
        left = {module: others for module, others in left.items() if module not in free}
    assert {module: sorted(others & set(left)) for module, others in left.items()} == {}


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
