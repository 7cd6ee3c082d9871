"""Quads: every TopK weight is in one of them, where the kernel looks for it."""

import pytest
import torch
from three_tiers import random_three_tier

from stepdown.packed.format import pack
from stepdown.packed.quads import BLOCKS, MORE, top_k_quads
from stepdown.tensors.tiers import Tier


@pytest.mark.parametrize(("shape", "k"), [((96, 160), 10), ((40, 500), 1), ((64, 96), 256), ((32, 4096), 10)])
def test_every_weight_is_where_the_kernel_looks(shape, k):
    weight, tiers = random_three_tier(shape, k, seed=1)
    matrix = pack(weight, tiers, k)
    quads = top_k_quads(matrix.tiers, matrix.top_k, matrix.top_k_positions)

    found = torch.zeros(matrix.tiers.shape).repeat_interleave(16, 0).repeat_interleave(16, 1)
    for strip in range(len(tiers)):
        for quad in range(quads.quads_before[strip], quads.quads_before[strip + 1]):
            place, first = quads.starts[quad].tolist()
            for filled in quads.filled[first : quads.starts[quad + 1, 1]].tolist():
                for lane in (lane for lane in range(32) if filled >> lane & 1):
                    which, column = divmod(int(quads.columns[place]), 16)
                    block = int(quads.blocks[quad, which])
                    assert tiers[strip, block] == Tier.TOP_K
                    found[16 * strip + lane // 2, 16 * block + column] += quads.values[place]
                    place += 1
            assert place == quads.starts[quad + 1, 0]

    top_k = (tiers == Tier.TOP_K).repeat_interleave(16, 0).repeat_interleave(16, 1)[: shape[0], : shape[1]]
    assert torch.equal(found[: shape[0], : shape[1]], weight * top_k)
    assert not quads.values[-MORE:].any()
    assert int(quads.quads_before[-1]) == sum(-(-int(count) // BLOCKS) for count in (tiers == Tier.TOP_K).sum(1))


def test_in_a_strip_quads_of_most_vectors_come_first():
    weight, tiers = random_three_tier((32, 8192), 10, tiers=torch.full((2, 512), int(Tier.TOP_K), dtype=torch.uint8))
    matrix = pack(weight, tiers, 10)
    quads = top_k_quads(matrix.tiers, matrix.top_k, matrix.top_k_positions)
    vectors = quads.starts[:, 1].diff()
    for first, end in zip(quads.quads_before[:-1], quads.quads_before[1:], strict=True):
        assert (vectors[first:end].diff() <= 0).all()
        assert len(vectors[first:end].unique()) > 1
