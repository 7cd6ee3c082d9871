"""What a block can be. Standard library only."""

from ..errors import UserError

KEYS = "config key pruning.block_size", "config key pruning.k"


def check_block(block_size: int, k: int, names: tuple[str, str] = KEYS) -> None:
    """A block holds whole groups of four inputs and at least the k entries that TopK keeps; names: of both."""
    if block_size % 4:
        raise UserError(f"{names[0]}: found {block_size}; write a multiple of 4 such as 16")
    if k > block_size**2:
        entries = f"a block of {block_size}x{block_size} has {block_size**2} entries"
        raise UserError(f"{names[1]}: found {k}; {entries}, write at most that")
