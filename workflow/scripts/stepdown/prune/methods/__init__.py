"""Pruning methods, one file each: a function `prune` that returns the pruned weight; docs/own-method.md shows how.

Names are found without importing anything, so that they can be checked before the first job.
"""

import difflib
import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from ...errors import UserError

# What `prune` may ask for by naming it as an argument; the statistics take a pass over the calibration text.
STATISTICS = ("squared_norms", "hessian")
ARGUMENTS = ("weight", "pattern", "name", *STATISTICS)


def method_names() -> list[str]:
    """The methods there are: the names of the files in this folder."""
    return sorted(file.stem for folder in __path__ for file in Path(folder).glob("[!_]*.py"))


def load_method(name: str) -> Callable:
    """The function `prune` of a method.

    Raises `UserError` for an unknown method, for a file without the function, and for one that asks for anything else.
    """
    if name not in method_names():
        near = difflib.get_close_matches(name, method_names(), 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"unknown method {name!r}; {hint}the methods are {', '.join(method_names())}")
    module = import_module(f".{name}", __package__)
    prune = getattr(module, "prune", None)
    if not callable(prune):
        raise UserError(f"{module.__file__}: no function prune(weight, ..., pattern); docs/own-method.md shows one")
    unknown = [argument for argument in arguments_of(prune) if argument not in ARGUMENTS]
    if unknown:
        raise UserError(f"{module.__file__}: prune asks for {unknown[0]!r}; it may ask for {', '.join(ARGUMENTS)}")
    return prune


def arguments_of(prune: Callable) -> list[str]:
    """The arguments a function `prune` asks for."""
    return list(inspect.signature(prune).parameters)
