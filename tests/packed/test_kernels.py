"""Every kernel computes what float64 does, up to bf16 rounding, on any tiers, shape and number of rows."""

import itertools
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from three_tiers import random_three_tier
from torch.nn.functional import linear

from stepdown.errors import UserError
from stepdown.packed import cpu, huge_pages
from stepdown.packed.format import pack
from stepdown.packed.integers import pack_integers
from stepdown.packed.linear import ThreeTierLinear, choose_kernel, dense_linear
from stepdown.tensors.block_rounding import round_in_blocks
from stepdown.tensors.blocks import grid_shape
from stepdown.tensors.tiers import Tier

SHAPES = [(96, 160), (100, 130), (48, 24), (16, 16), (1, 1), (200, 64)]


def available(kernel):
    """The kernel, or the test is skipped with the reason why this machine has it not."""
    try:
        return choose_kernel(kernel, torch.device("cpu"))
    except UserError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module", params=["avx512", "avx2", "torch"])
def kernel(request):
    return available(request.param)


def relative_error(y, exact):
    return ((y.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def assert_as_good_as_dense(layer, weight, x, bias=None):
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    error, dense_error = relative_error(layer(x), exact), relative_error(linear(x, weight, bias), exact)
    assert error < 1e-2
    # Both round each result to bf16 once; the order they add in is not the same.
    assert error <= 1.05 * dense_error + 1e-4


@settings(max_examples=60)
@given(st.data())
def test_any_matrix_and_any_rows(kernel, data):
    shape, k = data.draw(st.sampled_from(SHAPES)), data.draw(st.sampled_from([1, 10, 16, 40]))
    rows, seed = data.draw(st.sampled_from([1, 2, 3, 4, 5, 8, 9, 16, 17, 40])), data.draw(st.integers(0, 99))
    weight, tiers = random_three_tier(shape, k, seed)
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(shape[0], generator=generator).bfloat16() if data.draw(st.booleans()) else None
    x = torch.randn(rows, shape[1], generator=generator).bfloat16()
    assert_as_good_as_dense(ThreeTierLinear(pack(weight, tiers, k), bias, kernel), weight, x, bias)


@pytest.mark.parametrize("tier", Tier)
@pytest.mark.parametrize("rows", [1, 6, 300])
def test_all_blocks_on_one_tier(kernel, tier, rows):
    tiers = torch.full(grid_shape((100, 130), 16), tier, dtype=torch.uint8)
    weight, _ = random_three_tier((100, 130), 10, tiers=tiers)
    x = torch.randn(rows, 130, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert_as_good_as_dense(ThreeTierLinear(pack(weight, tiers, 10), None, kernel), weight, x)


def test_each_row_of_x_is_on_its_own(kernel):
    weight, tiers = random_three_tier((96, 160), 10)
    layer, x = ThreeTierLinear(pack(weight, tiers, 10), None, kernel), torch.randn(21, 160).bfloat16()
    one_by_one = torch.cat([layer(row[None]) for row in x])
    torch.testing.assert_close(layer(x), one_by_one, rtol=2**-7, atol=2**-12)


def test_forms_of_x(kernel):
    """More dimensions, none, no rows, strides, float32: as an nn.Linear takes them."""
    weight, tiers = random_three_tier((48, 24), 10)
    layer = ThreeTierLinear(pack(weight, tiers, 10), None, kernel)
    x = torch.randn(24, 5, 3).bfloat16().permute(2, 1, 0)
    assert layer(x).shape == (3, 5, 48) and torch.equal(layer(x), layer(x.contiguous()))
    assert layer(x[0, 0]).shape == (48,)
    assert layer(x[:0]).shape == (0, 5, 48)
    assert layer(x.float()).dtype == torch.float32 and torch.equal(layer(x.float()), layer(x).float())


def test_many_threads_and_calls_agree(kernel):
    weight, tiers = random_three_tier((400, 320), 10)
    layer, x = ThreeTierLinear(pack(weight, tiers, 10), None, kernel), torch.randn(9, 320).bfloat16()
    before, threads = layer(x), torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert kernel == "torch" or all(torch.equal(layer(x), before) for _ in range(20))
    finally:
        torch.set_num_threads(threads)


def test_the_weight_can_be_looked_at(kernel):
    weight, tiers = random_three_tier((100, 130), 10)
    assert torch.equal(ThreeTierLinear(pack(weight, tiers, 10), None, kernel).weight, weight)
    assert torch.equal(dense_linear(weight, None, kernel).weight, weight)


def test_not_a_number_stays_one(kernel):
    weight, tiers = random_three_tier((16, 16), 10, tiers=torch.zeros(1, 1, dtype=torch.uint8))
    layer = ThreeTierLinear(pack(weight, tiers, 10), None, kernel)
    assert layer(torch.full((1, 16), torch.nan).bfloat16()).isnan().all()
    assert layer(torch.full((1, 16), torch.inf).bfloat16()).float().isfinite().logical_not().all()


def test_an_infinite_input_meets_the_weights_of_top_k_alone(kernel):
    weight, tiers = random_three_tier((16, 64), 3, tiers=torch.full((1, 4), int(Tier.TOP_K), dtype=torch.uint8))
    layer, x = ThreeTierLinear(pack(weight, tiers, 3), None, kernel), torch.ones(1, 64).bfloat16()
    # Of the first input, which a place that is not filled would meet.
    x[0, 0] = torch.inf
    met = weight[:, 0] != 0
    assert layer(x)[0, met].isinf().all()
    # torch multiplies zeros as well.
    assert kernel == "torch" or layer(x)[0, ~met].isfinite().all()


def test_a_matrix_too_wide_is_refused(kernel, monkeypatch):
    if kernel == "torch":
        pytest.skip("takes any")
    monkeypatch.setattr(cpu, "MOST_BLOCK_COLUMNS", 3)
    weight, tiers = random_three_tier((16, 64), 3)
    with pytest.raises(UserError, match="64 inputs is too wide for a CPU kernel: use kernel 'torch'"):
        ThreeTierLinear(pack(weight, tiers, 3), None, kernel)


def test_parts_that_do_not_fit_reach_no_kernel(kernel):
    weight, tiers = random_three_tier((48, 48), 10)
    matrix = pack(weight, tiers, 10)
    for part in ("dense", "two_four", "positions", "top_k"):
        with pytest.raises(UserError, match=part):
            ThreeTierLinear(replace(matrix, **{part: getattr(matrix, part)[1:]}), None, kernel)


# ---------------------------------------------------------------- where weights are


def test_tensors_in_huge_pages_are_copies_on_lines_of_their_own(monkeypatch):
    monkeypatch.setattr(huge_pages, "RUN", huge_pages.PAGE)
    monkeypatch.setattr(huge_pages, "_free", memoryview(b""))
    tensors = [torch.randn(7, 3), torch.arange(5), torch.randn(2**20).bfloat16(), torch.empty(0, 4), torch.ones(3, 2).T]
    copies = [huge_pages.in_huge_pages(tensor) for tensor in tensors]
    places = sorted((copy.data_ptr(), copy.nbytes) for copy in copies if copy.numel())
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(copies, tensors, strict=True))
    assert all(place % 64 == 0 for place, _ in places)
    assert all(place + size <= after for (place, size), (after, _) in itertools.pairwise(places))


# ---------------------------------------------------------------- building and choosing


def test_a_kernel_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="'fast': not one of auto, avx512"):
        choose_kernel("fast", torch.device("cpu"))


@pytest.mark.parametrize(("compiler", "reason"), [("/no/such/g++", "could not be run"), ("false", "could not build")])
def test_without_a_compiler_torch_computes_and_says_so(compiler, reason, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("stepdown.cli.log.propagate", True)
    cpu.compiled_kernels.cache_clear()
    try:
        assert choose_kernel("auto", torch.device("cpu")) == "torch"
        assert reason in caplog.text and "in torch" in caplog.text
        with pytest.raises(UserError, match=f"avx2.*{reason}.*use 'torch'"):
            choose_kernel("avx2", torch.device("cpu"))
    finally:
        cpu.compiled_kernels.cache_clear()


def test_a_kernel_is_for_its_device(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="'triton': runs on cuda, and the model is to be on cpu"):
        choose_kernel("triton", torch.device("cpu"))
    with pytest.raises(UserError, match="'avx2': runs on cpu, and the model is to be on cuda"):
        choose_kernel("avx2", torch.device("cuda"))


def test_on_a_gpu_without_triton_torch_computes_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr("stepdown.packed.linear.find_spec", lambda name: None)
    monkeypatch.setattr("stepdown.cli.log.propagate", True)
    assert choose_kernel("auto", torch.device("cuda")) == "torch"
    assert "in torch" in caplog.text and "Triton is not installed" in caplog.text
    with pytest.raises(UserError, match="'triton': Triton is not installed; use 'torch'"):
        choose_kernel("triton", torch.device("cuda"))


def test_a_damaged_library_is_no_kernel(tmp_path):
    (tmp_path / "broken.so").write_bytes(b"no library")
    with pytest.raises(cpu.NoKernel, match=r"broken\.so could not be loaded"):
        cpu.load_library(tmp_path / "broken.so")


def test_kernels_are_built_once(monkeypatch, tmp_path):
    available("avx2")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = cpu.build()
    date = first.stat().st_mtime_ns
    assert cpu.build() == first and first.stat().st_mtime_ns == date
    assert [path.name for path in (tmp_path / "stepdown").iterdir()] == [first.name]


def test_without_a_home_kernels_are_kept_for_the_process(monkeypatch):
    """As in a container that runs as a number."""
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 2)
    monkeypatch.setenv("CXX", "c++")
    monkeypatch.setattr(cpu, "_run", lambda command: Path(command[-1]).touch() if "-o" in command else "")
    library = cpu.build()
    assert library.exists() and library.parent.name.startswith("stepdown-")
    shutil.rmtree(library.parent)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see which libraries are loaded")
def test_kernels_share_the_threads_of_torch():
    available("avx2")
    code = "from stepdown.packed import cpu; cpu.compiled_kernels(); print(open('/proc/self/maps').read())"
    environment = os.environ | {"PYTHONPATH": str(Path(cpu.__file__).parents[2])}
    maps = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    libraries = {line.split()[-1] for line in maps.stdout.splitlines() if "libgomp" in line}
    assert len(libraries) == 1


# ---------------------------------------------------------------- where there are tiles


@pytest.mark.parametrize("bits", [None, 8, 4])
@given(st.sampled_from(SHAPES), st.sampled_from([1, 10, 40]), st.integers(0, 99))
def test_many_rows_where_there_are_tiles(bits, shape, k, seed):
    """Strips are unpacked bit for bit and multiplied by torch; so is what AMX speeds up, here without it."""
    available("avx2")
    weight, tiers = random_three_tier(shape, k, seed)
    matrix = pack(weight, tiers, k)
    if bits:
        matrix = pack_integers(weight, round_in_blocks(weight, tiers, bits), tiers, k, bits)
    x, bias = torch.randn(40, shape[1]).bfloat16(), torch.randn(shape[0]).bfloat16()
    layer, plain = ThreeTierLinear(matrix, bias, "avx2"), ThreeTierLinear(matrix, None, "avx2")
    layer.multiply.unpack_from = plain.multiply.unpack_from = 1
    with pytest.MonkeyPatch.context() as patch:
        # A strip or two at a time.
        patch.setattr(cpu, "UNPACKED_BYTES", 3000)
        assert relative_error(layer(x), linear(x, layer.weight, bias).double()) < 5e-3
        assert torch.equal(plain(torch.eye(shape[1])).T.bfloat16(), plain.weight)
