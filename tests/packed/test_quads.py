"""Quads: every TopK weight is in one of them, where the kernel looks for it."""

import struct

import pytest
import torch
from three_tiers import random_three_tier

from stepdown.packed.format import pack
from stepdown.packed.quads import BLOCKS, MORE, top_k_quads
from stepdown.tensors.tiers import Tier


def read(quads, start):
    """The quad that begins there: blocks, filled, values, columns, and where the next begins."""
    stream = quads.numpy().tobytes()
    *blocks, vectors, weights = struct.unpack_from("<6H", stream, start)
    filled = struct.unpack_from(f"<{vectors}I", stream, start + 12)
    start += 12 + 4 * vectors
    values = quads[start : start + 2 * weights].clone().view(torch.bfloat16).tolist()
    columns = quads[start + 2 * weights : start + 3 * weights].tolist()
    return blocks, filled, values, columns, -(-(start + 3 * weights) // 4) * 4


@pytest.mark.parametrize(("shape", "k"), [((96, 160), 10), ((40, 500), 1), ((64, 96), 256), ((32, 4096), 10)])
def test_every_weight_is_where_the_kernel_looks(shape, k):
    weight, tiers = random_three_tier(shape, k, seed=1)
    matrix = pack(weight, tiers, k)
    quads, before = top_k_quads(matrix.tiers, matrix.top_k, matrix.top_k_positions)

    found = torch.zeros(matrix.tiers.shape).repeat_interleave(16, 0).repeat_interleave(16, 1)
    for strip in range(len(tiers)):
        start = int(before[strip, 1])
        for _ in range(before[strip, 0], before[strip + 1, 0]):
            blocks, filled, values, columns, start = read(quads, start)
            kept = iter(zip(values, columns, strict=True))
            for vector in filled:
                for lane in (lane for lane in range(32) if vector >> lane & 1):
                    value, place = next(kept)
                    which, column = divmod(place, 16)
                    assert tiers[strip, blocks[which]] == Tier.TOP_K
                    found[16 * strip + lane // 2, 16 * blocks[which] + column] += value
            assert next(kept, None) is None
        assert start == before[strip + 1, 1]

    top_k = (tiers == Tier.TOP_K).repeat_interleave(16, 0).repeat_interleave(16, 1)[: shape[0], : shape[1]]
    assert torch.equal(found[: shape[0], : shape[1]], weight * top_k)
    assert len(quads) == before[-1, 1] + MORE and not quads[-MORE:].any()
    assert int(before[-1, 0]) == sum(-(-int(count) // BLOCKS) for count in (tiers == Tier.TOP_K).sum(1))


def test_in_a_strip_quads_of_most_vectors_come_first():
    weight, tiers = random_three_tier((32, 8192), 10, tiers=torch.full((2, 512), int(Tier.TOP_K), dtype=torch.uint8))
    matrix = pack(weight, tiers, 10)
    quads, before = top_k_quads(matrix.tiers, matrix.top_k, matrix.top_k_positions)
    for strip in range(2):
        vectors, start = [], int(before[strip, 1])
        while start < before[strip + 1, 1]:
            _, filled, *_, start = read(quads, start)
            vectors.append(len(filled))
        assert vectors == sorted(vectors, reverse=True)
        assert len(set(vectors)) > 1
