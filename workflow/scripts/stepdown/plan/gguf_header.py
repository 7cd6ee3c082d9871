"""What a GGUF file says of itself before its tensors: the form of llama.cpp's models. Standard library only.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError
from ..files import check_not_pointer

# Entries and bytes of a block of each tensor type that can be dequantised.
BLOCKS = {
    0: (1, 4),  # F32
    1: (1, 2),  # F16
    2: (32, 18),  # Q4_0
    3: (32, 20),  # Q4_1
    6: (32, 22),  # Q5_0
    7: (32, 24),  # Q5_1
    8: (32, 34),  # Q8_0
    10: (256, 84),  # Q2_K
    11: (256, 110),  # Q3_K
    12: (256, 144),  # Q4_K
    13: (256, 176),  # Q5_K
    14: (256, 210),  # Q6_K
    16: (256, 66),  # IQ2_XXS
    17: (256, 74),  # IQ2_XS
    18: (256, 98),  # IQ3_XXS
    19: (256, 50),  # IQ1_S
    20: (32, 18),  # IQ4_NL
    21: (256, 110),  # IQ3_S
    22: (256, 82),  # IQ2_S
    23: (256, 136),  # IQ4_XS
    29: (256, 56),  # IQ1_M
    30: (1, 2),  # BF16
    34: (256, 54),  # TQ1_0
    35: (256, 66),  # TQ2_0
    39: (32, 17),  # MXFP4
}
NUMBERS = dict(enumerate("BbHhIif?", 0)) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class GgufHeader:
    """fields: key -> number, text, or list of them; tensors: name -> how many entries it has."""

    fields: dict[str, Any]
    tensors: dict[str, int]

    @property
    def parameters(self) -> int:
        """Entries of all tensors together."""
        return sum(self.tensors.values())

    def of_architecture(self, key: str) -> Any:
        """What the file says of its own architecture, None where nothing."""
        return self.fields.get(f"{self.fields['general.architecture']}.{key}")

    @property
    def context_length(self) -> int | None:
        """Tokens of the longest sequence the model was trained on."""
        length = self.of_architecture("context_length")
        return length if isinstance(length, int) and length > 0 else None


def is_gguf(model: str) -> bool:
    """Whether a model is named as a GGUF file, and not as a folder or a hub id."""
    return Path(model).suffix == ".gguf" and not Path(model).is_dir()


def read_gguf_header(file: Path) -> GgufHeader:
    """The header of a file that is whole; raises `UserError` for one that is none, truncated, or of an unknown type."""
    if not file.is_file():
        raise UserError(f"config key model: no file {file}; name a GGUF file, a folder with config.json or a hub id")
    check_not_pointer(file)
    size = file.stat().st_size
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            found = "does not begin with GGUF" if size else "is empty"
            raise UserError(f"{file}: not a GGUF file (it {found}); copy or download it again")
        try:
            fields, tensors = _read(opened, size)
            start = _aligned(opened.tell(), fields.get("general.alignment", 32))
        except (struct.error, UnicodeDecodeError, KeyError):
            raise UserError(
                f"{file}: truncated or damaged (its header is unreadable); copy or download it again"
            ) from None
    if not isinstance(fields.get("general.architecture"), str):
        raise UserError(f"{file}: does not say its architecture; it is no language model")
    for name, _, kind, _ in tensors:
        if kind not in BLOCKS:
            raise UserError(
                f"{file}: {name} is of the tensor type {kind}, which cannot be dequantised; use another file"
            )
    entries = [math.prod(shape) for _, shape, _, _ in tensors]
    ends = (
        offset + count // BLOCKS[kind][0] * BLOCKS[kind][1]
        for count, (_, _, kind, offset) in zip(entries, tensors, strict=True)
    )
    expected = start + max(ends, default=0)
    if size < expected:
        raise UserError(f"{file}: truncated ({size} bytes, {expected} expected); copy or download it again")
    return GgufHeader(fields, {name: count for count, (name, *_) in zip(entries, tensors, strict=True)})


def _read(opened: BinaryIO, size: int) -> tuple[dict[str, Any], list[tuple[str, tuple[int, ...], int, int]]]:
    """Fields, and of each tensor name, shape, type and offset."""
    version, tensor_count, field_count = _take(opened, "IQQ")
    if version not in (2, 3) or max(tensor_count, field_count) > size:
        raise struct.error
    fields = {}
    for _ in range(field_count):
        key = _text(opened, size)
        fields[key] = _value(opened, size, *_take(opened, "I"))
    tensors = []
    for _ in range(tensor_count):
        name, (dimensions,) = _text(opened, size), _take(opened, "I")
        shape = _take(opened, f"{min(dimensions, size)}Q")
        tensors.append((name, shape, *_take(opened, "IQ")))
    return fields, tensors


def _aligned(place: int, alignment: Any) -> int:
    if not isinstance(alignment, int) or alignment < 1:
        raise struct.error
    return -(-place // alignment) * alignment


def _value(opened: BinaryIO, size: int, kind: int) -> Any:
    if kind == STRING:
        return _text(opened, size)
    if kind != ARRAY:
        return _take(opened, NUMBERS[kind])[0]
    kind, count = _take(opened, "IQ")
    if count > size:
        raise struct.error
    if kind == STRING:
        return [_text(opened, size) for _ in range(count)]
    return list(_take(opened, f"{count}{NUMBERS[kind]}"))


def _text(opened: BinaryIO, size: int) -> str:
    (length,) = _take(opened, "Q")
    return _take(opened, f"{min(length, size)}s")[0].decode()


def _take(opened: BinaryIO, form: str) -> tuple:
    """The next little-endian values; `struct.error` where the file ends before them."""
    return struct.unpack(f"<{form}", opened.read(struct.calcsize(f"<{form}")))
