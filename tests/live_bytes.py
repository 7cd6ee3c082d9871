"""Bytes of the tensors that are alive, counted as torch makes them and lets them go."""

import weakref
from collections.abc import Iterable

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary


class LiveBytes(TorchDispatchMode):
    """While open, `now` are the bytes of all storages made since, and `peak` the most there were at once.

    held: tensors from before that count too.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()
        for tensor in held:
            self._count(tensor.untyped_storage())

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for each in tree_iter(result):
            if isinstance(each, Tensor) and each.device.type != "meta":
                self._count(each.untyped_storage())
        return result

    def _count(self, storage: UntypedStorage) -> None:
        if storage not in self._known:
            self._known[storage] = size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.now -= size
