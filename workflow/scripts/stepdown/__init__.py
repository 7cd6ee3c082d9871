"""stepdown: progressive three-tier block pruning (Dense -> 2:4 -> TopK) of causal language models.

`stepdown.load_packed(folder)` gives the model that pack.py wrote, ready to run; where this package is imported,
`from_pretrained` of transformers gives it too.
"""

import importlib

from .registration import make_packed_folders_known

# `__init__.pyi` says the same to type checkers.
HOMES = {"load_packed": "stepdown.packed.model", "__version__": "stepdown.version"}


def __getattr__(name: str) -> object:
    # Looked up when asked for, and by name: every script imports this file, and most need no torch and none of this.
    if name in HOMES:
        return getattr(importlib.import_module(HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


make_packed_folders_known()
