"""What PyTorch and transformers import unasked, left out of lowmem's own processes: 140 to 200 MB of compiler and optional packages.

lowmem compiles nothing with `torch.compile`. Yet torch's optimizers and the modules of transformers import the compiler only to mark
functions that it must leave alone, and shape functions of the meta device import sympy to find that a number is none of its symbols. In a
process of lowmem's own, such an import finds a stand-in that answers these questions; whatever else is asked of it loads the real module
in its place.
"""

import importlib
import importlib.machinery
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.abc import Loader, MetaPathFinder
from threading import RLock
from types import ModuleType
from typing import Any

_COMPILER, _SHAPES, _ALGEBRA = "torch._dynamo", "torch.fx.experimental.symbolic_shapes", "sympy"
_APART = (f"{_COMPILER}._trace_wrapped_higher_order_op",)  # of its modules, those that need no other: transformers takes a class from it
_HIDDEN = ("torchao", "PIL")  # what these import wherever it is installed, for models that lowmem refuses or does not know
_LIGHTER = ("transformers", "peft")
LEFT_OUT = [_COMPILER, _SHAPES, _ALGEBRA, "torch.distributed.tensor", *_HIDDEN]  # for the key of records of what a process takes
_LOCK = RLock()


def keep_imports_light() -> None:
    """Leave out what no command needs, for the rest of this process; only for processes of lowmem's own.

    Functions that were marked before something loads the compiler are not known to it as marked. transformers and PEFT, imported from here
    on, find torchao and Pillow missing, and in a run of one process torch's tensors over several devices, as in a build without them.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


@contextmanager
def absent(*packages: str) -> Iterator[None]:
    """Have whoever looks for optional packages find them missing, unless they are in use."""
    hidden = [package for package in packages if package not in sys.modules]
    for package in hidden:
        sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for package in hidden:
            del sys.modules[package]


class _Finder(MetaPathFinder):
    """Puts stand-ins, and lighter packages, in the place of the real ones; other modules are found as ever."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        package = name.partition(".")[0] if name.startswith(f"{_ALGEBRA}.") else _COMPILER if name.startswith(f"{_COMPILER}.") else ""
        if package:
            waiting = isinstance(sys.modules.get(package), _StandIn) and name not in _APART
            return importlib.machinery.ModuleSpec(name, _AfterTheWhole(package)) if waiting else None
        if name not in (*_ANSWERS, *_LIGHTER):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _StandInLoader(spec.loader) if name in _ANSWERS else _LighterLoader(spec.loader)
        return spec


class _StandIn(ModuleType):
    """A module until something is asked of it that it has no answer to."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(_whole(self.__name__), name)


def _whole(name: str) -> ModuleType:
    """The module of that name, loaded where its stand-in is."""
    module = sys.modules[name]
    with _LOCK:
        if not isinstance(module, _StandIn):
            return module
        setattr(module, "__class__", ModuleType)  # noqa: B010 - mypy takes an assignment for a change of the class of the variable
        for answer in _ANSWERS[name]:
            module.__dict__.pop(answer, None)
        spec = module.__spec__
        assert spec is not None
        assert isinstance(spec.loader, _StandInLoader)
        spec.loader = module.__loader__ = spec.loader.real
        try:
            spec.loader.exec_module(module)
        except BaseException:
            sys.modules.pop(name, None)  # as after any import that failed
            raise
    return module


def _mark(function: Any = None, *_: Any, **__: Any) -> Any:
    """A decorator, with arguments or without, that leaves a function as it is."""
    return (lambda other: other) if function is None else function


def _nothing(*_: Any, **__: Any) -> None:
    """Outside of a compiled function a break of its graph is none, and a tensor's address needs no mark."""


def _plain(value: Any) -> bool:
    """Whether a value is a number, or a shape of numbers, rather than of symbols."""
    return type(value) in (bool, int) or (isinstance(value, tuple | list) and all(type(part) in (bool, int) for part in value))


def _equal(left: Any, right: Any) -> bool:
    return list(left) == list(right) if isinstance(left, tuple | list) and isinstance(right, tuple | list) else left == right


def _of_numbers(name: str, answer: Callable[..., Any]) -> Callable[..., Any]:
    """A function of shapes that answers for numbers itself."""

    def function(*values: Any, **named: Any) -> Any:
        if not named and all(_plain(value) for value in values):
            return answer(*values)
        return getattr(_whole(_SHAPES), name)(*values, **named)

    return function


def _itself(value: Any, *_: Any) -> Any:
    return value


_ON_NUMBERS: dict[str, Callable[..., Any]] = {
    "expect_true": _itself,
    "guard_or_false": _itself,
    "guard_or_true": _itself,
    "guard_size_oblivious": _itself,
    "guarding_hint_or_throw": _itself,
    "has_guarding_hint": lambda value: True,
    "is_nested_int": lambda value: False,
    "statically_known_true": _itself,
    "sym_and": lambda *values: all(values),
    "sym_eq": _equal,
    "sym_or": lambda *values: any(values),
}


class _SymbolKind(type):
    """Tells symbols by sympy's own class, of which there are none before sympy is loaded."""

    def __instancecheck__(cls, value: Any) -> bool:
        return not isinstance(sys.modules[_ALGEBRA], _StandIn) and isinstance(value, sys.modules[_ALGEBRA].Basic)


class _Symbol(metaclass=_SymbolKind):
    """What sympy's class of all its expressions is to `isinstance`."""


_ANSWERS: dict[str, dict[str, Any]] = {
    _COMPILER: {
        "allow_in_graph": _mark,
        "assume_constant_result": _mark,
        "disable": _mark,
        "graph_break": _nothing,
        "mark_static_address": _nothing,
    },
    _ALGEBRA: {"Basic": _Symbol},
    _SHAPES: {name: _of_numbers(name, answer) for name, answer in _ON_NUMBERS.items()},
}


class _StandInLoader(Loader):
    """Makes a stand-in.

    Args:
        real: loads the module.
    """

    def __init__(self, real: Any):
        self.real = real

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__.update(_ANSWERS[module.__name__])


class _AfterTheWhole(Loader):
    """Loads a module by way of its package, which its modules expect to find as a whole.

    Args:
        package: the name of one whose stand-in is there.
    """

    def __init__(self, package: str):
        self.package = package

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        _whole(self.package)
        module = sys.modules.get(spec.name) or importlib.import_module(spec.name)
        self.found = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.found  # it is loaded; the import system has set that of this loader


class _LighterLoader(Loader):
    """Imports a package while what lowmem does not use of it is missing; what it then remembers holds for this process.

    Args:
        real: loads the package.
    """

    def __init__(self, real: Any):
        self.real = real

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        found: ModuleType | None = self.real.create_module(spec)
        return found

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.real
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        with absent(*_HIDDEN), _one_process() if alone else nullcontext():
            self.real.exec_module(module)
            _remember("is_torchao_available", "is_vision_available", *(["is_torch_distributed_available"] if alone else []))


def _remember(*questions: str) -> None:
    """Have transformers find out now, and remember; versions that do not ask or do not remember stay as they are."""
    library = sys.modules.get("transformers.utils.import_utils")
    for question in questions:
        answer: Any = getattr(library, question, None)
        if hasattr(answer, "cache_clear") and not answer.cache_info().currsize:
            answer()


@contextmanager
def _one_process() -> Iterator[None]:
    """torch as if built without its package of distributed computation."""
    import torch

    available = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_available = available
