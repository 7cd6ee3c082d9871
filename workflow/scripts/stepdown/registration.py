"""Packed folders among what transformers can load, once both packages are imported, whichever comes first.

transformers looks `quant_method` of a config.json up in a table, and imports that table when it loads models. It is
waited for: importing it here would load torch, which most scripts do not need.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

QUANT_METHOD = "stepdown"
TABLE = "transformers.quantizers.auto"


class PackedFolders:
    """In the table until the first packed folder is met: `auto_model` needs a transformers that is imported whole."""

    @staticmethod
    def from_dict(words: dict) -> object:
        return importlib.import_module("stepdown.packed.auto_model").PackedConfig.from_dict(words)


class TableFinder(MetaPathFinder):
    """Finds nothing by itself: has the table filled when the finders after this one have found and loaded it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        load = spec.loader.exec_module

        def load_and_fill(table: ModuleType) -> None:
            load(table)
            fill(table)

        spec.loader.exec_module = load_and_fill
        return spec


def fill(table: ModuleType) -> None:
    table.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, PackedFolders)


def make_packed_folders_known() -> None:
    if TABLE in sys.modules:
        fill(sys.modules[TABLE])
    else:
        sys.meta_path.insert(0, TableFinder())
