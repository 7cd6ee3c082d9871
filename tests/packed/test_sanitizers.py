"""The C++ under the address and undefined-behaviour sanitizers: every kernel, every tier, ragged shapes, odd rows."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stepdown.packed import cpu

TESTS = Path(__file__).parents[1]
FLAGS = (*cpu.FLAGS, "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")

# Run in a process of its own, into which the sanitizer is loaded first.
EXERCISE = """
import sys
import torch
from stepdown.packed import cpu
from stepdown.packed.format import pack
from stepdown.packed.integers import pack_integers
from stepdown.packed.linear import INTEGER_KERNELS, ThreeTierLinear
from stepdown.tensors.block_rounding import round_in_blocks
from test_decoding import TOKENS, logits_of, model_of, quickened
from three_tiers import random_three_tier

library = cpu.load_library(sys.argv[1])
cpu.compiled_kernels = lambda: library
# What is read beyond a tensor is seen where each has a place of its own.
cpu.in_huge_pages = torch.Tensor.clone
level = library.three_tier_instructions()
for kernel in (name for name, needed in cpu.INSTRUCTIONS.items() if level >= needed):
    for seed, (shape, k) in enumerate([((96, 160), 10), ((100, 130), 16), ((48, 24), 1), ((1, 1), 1), ((70, 40), 256)]):
        weight, tiers = random_three_tier(shape, k, seed)
        for chosen in (tiers, *(torch.full_like(tiers, tier) for tier in range(3))):
            weight = random_three_tier(shape, k, seed, chosen)[0]
            matrices = [pack(weight, chosen, k)]
            for bits in (8, 4) if kernel in INTEGER_KERNELS else ():
                matrices.append(pack_integers(weight, round_in_blocks(weight, chosen, bits), chosen, k, bits))
            for matrix in matrices:
                layer = ThreeTierLinear(matrix, torch.zeros(shape[0]), kernel)
                for rows in (0, 1, 2, 3, 5, 9, 16, 37, 260):
                    layer(torch.randn(rows, shape[1]))
                layer.multiply.unpack_from = 1
                layer(torch.randn(3, shape[1]))
    for bits in (None, 8):
        logits_of(quickened(model_of("qwen3", kernel, bits)), TOKENS, 3)
print("all clean")
"""


def test_kernels_are_clean(monkeypatch):
    if platform.machine() != "x86_64":
        pytest.skip("the kernels are for x86 processors")
    if not shutil.which("g++"):
        pytest.skip("no g++ here")
    sanitizer = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(sanitizer).is_file():
        pytest.skip("g++ has no address sanitizer here")
    environment = os.environ | {
        "LD_PRELOAD": sanitizer,
        # At their end Python and torch do not free everything.
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": os.pathsep.join(map(str, (TESTS, TESTS / "packed", Path(cpu.__file__).parents[2]))),
    }
    monkeypatch.setenv("CXX", "g++")
    command = [sys.executable, "-c", EXERCISE, str(cpu.build(FLAGS))]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[:3000]
    assert finished.stdout.splitlines()[-1] == "all clean"
