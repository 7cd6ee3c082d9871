"""What a GPU must do as the CPU does it; a pretended one will do, see `pretend_gpu`."""

import pytest
import torch
from families import make_model
from matrices import loss, random_case
from three_tiers import random_three_tier

from stepdown.models.checkpoint import Checkpoint, load_tensors
from stepdown.models.decoder import load_whole, open_decoder
from stepdown.models.layer_walk import LayerWalk
from stepdown.models.tier_maps import dense_tier_map
from stepdown.packed.folder import write_packed
from stepdown.packed.format import pack, unpack
from stepdown.packed.linear import ThreeTierLinear, dense_linear
from stepdown.packed.model import load_packed
from stepdown.plan.runs import parse_run
from stepdown.prune.calibrated_packing import pack_calibrated
from stepdown.prune.calibration import squared_input_norms
from stepdown.prune.methods import method_names
from stepdown.prune.oneshot import prune_layers
from stepdown.recover.distillation import load_teacher
from stepdown.recover.recovery import recover
from stepdown.recover.settings import RecoverySettings
from stepdown.recover.sharding import save_whole
from stepdown.tensors.blocks import grid_shape
from stepdown.tensors.least_squares import masked_least_squares
from stepdown.tensors.patterns import TierOptions, pattern_of
from stepdown.tensors.saliency import block_scores
from stepdown.tensors.swaps import swapped_least_squares
from stepdown.tensors.tiers import (
    Tier,
    degrade_dense_to_two_four,
    degrade_two_four_to_top_k,
    keep_mask,
    prune_top_k_,
    prune_two_four_,
    violations,
)

pytestmark = pytest.mark.gpu
SHARES = ("0.35", "0.45", "0.20")
WINDOWS = torch.randint(0, 128, (6, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device("cuda")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("llama"))


def random_weight(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.rand(shape[1], generator=generator)


# ---------------------------------------------------------------- one matrix


@pytest.mark.parametrize("shape", [(96, 160), (100, 130)])
def test_blocks_step_down_as_on_the_cpu(shape, gpu):
    weight, norms = random_weight(shape)
    tiers, found = torch.zeros(grid_shape(shape, 16), dtype=torch.uint8), []
    for device in ("cpu", gpu):
        pruned, squared, before = weight.clone().to(device), norms.to(device), tiers.to(device)
        dense = block_scores(pruned, squared, 16).flatten()
        stage_1 = degrade_dense_to_two_four({"": before}, {"": dense}, SHARES)[""]
        prune_two_four_(pruned, squared, stage_1 != before, 16)
        left = block_scores(pruned, squared, 16)[stage_1 == Tier.TWO_FOUR]
        stage_2 = degrade_two_four_to_top_k({"": stage_1}, {"": left}, SHARES)[""]
        prune_top_k_(pruned, squared, stage_2 != stage_1, 16, 10)
        assert violations(pruned, stage_2, 16, 10) == 0
        found.append((stage_2.cpu(), pruned.cpu()))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["magnitude-2of4", "wanda-unstructured-0.5", "wanda-three-tier", "wanda-hybrid"])
def test_patterns_hold_on_a_gpu(name, gpu):
    run, (weight, norms) = parse_run(name, method_names()), random_weight((100, 130))
    weight = weight.to(gpu)
    pattern = pattern_of(run, run.sparsity, TierOptions(), weight)
    keep = pattern.keep(weight.abs() * norms.to(gpu).sqrt())
    assert keep.device.type == "cuda" and pattern.fault(weight * keep) == "" and pattern.fault(weight) != ""


@pytest.mark.parametrize("shape", [(96, 160), (100, 130)])
def test_packing_on_a_gpu_gives_the_same_bytes(shape, gpu):
    weight, tiers = random_three_tier(shape, 10)
    ours, theirs = pack(weight, tiers, 10), pack(weight.to(gpu), tiers, 10)
    for part, tensor in theirs.tensors.items():
        assert tensor.device.type == "cuda" and torch.equal(tensor.cpu(), ours.tensors[part]), part
    assert torch.equal(unpack(theirs).cpu(), weight)


@pytest.mark.parametrize("kernel", ["triton", "torch"])
@pytest.mark.parametrize("rows", [1, 3, 16, 100])
def test_kernels_compute_what_float64_does(kernel, rows, gpu):
    weight, tiers = random_three_tier((100, 130), 10)
    bias, x = torch.randn(100).bfloat16(), torch.randn(rows, 130).bfloat16()
    exact = x.double() @ weight.double().T + bias.double()
    matrix = pack(weight, tiers, 10).to(device=gpu)
    y = ThreeTierLinear(matrix, bias.to(gpu), kernel)(x.to(gpu)).cpu().double()
    assert ((y - exact).norm() / exact.norm()).item() < 1e-2
    assert torch.equal(ThreeTierLinear(matrix, None, kernel).weight.cpu(), weight)


def test_a_dense_matrix_on_a_gpu(gpu):
    weight = torch.randn(48, 64).bfloat16()
    x = torch.randn(2, 64).bfloat16()
    y = dense_linear(weight.to(gpu), None, "triton")(x.to(gpu)).cpu()
    torch.testing.assert_close(y, x @ weight.T, rtol=2**-6, atol=2**-6)


def test_refit_as_on_the_cpu(gpu):
    weight, _ = random_weight((48, 64))
    inputs = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
    keep, hessian = weight.abs() > 0.5, inputs.T @ inputs
    found = [
        masked_least_squares(*(tensor.to(device) for tensor in (weight * keep, keep, hessian, weight @ hessian))).cpu()
        for device in ("cpu", gpu)
    ]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_swaps_bring_as_much_as_on_the_cpu(gpu):
    weight, tiers = random_three_tier((72, 128), 10, dtype=torch.float32)
    dense, hessian = random_case(72, 128, 0)
    problem = weight, keep_mask(weight, tiers, 16), hessian, dense @ hessian, tiers
    ours, theirs = (
        swapped_least_squares(*(tensor.to(device) for tensor in problem), 16).cpu() for device in ("cpu", gpu)
    )
    assert not violations(theirs, tiers, 16, 10)
    found = [loss(dense, each, hessian) for each in (ours, theirs)]
    torch.testing.assert_close(*found, rtol=1e-2, atol=0)


# ---------------------------------------------------------------- a model


@torch.no_grad()
@pytest.mark.parametrize("waiting", ["device", "cpu"])
def test_walking_layer_by_layer_is_the_models_own_forward(waiting, model, gpu):
    logits = []
    for device in ("cpu", "cuda"):
        walk = LayerWalk(open_decoder(model, device, hidden_states=waiting), list(WINDOWS.split(1)))
        for _, _, replay in walk.layers(None):
            replay()
        assert {state.device.type for state in walk.states} == {"cpu" if waiting == "cpu" else device}
        logits.append(torch.cat([part.cpu() for part in walk.logits()]))
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-3)
    whole = load_whole(model, "cuda")(WINDOWS.to(gpu)).logits.cpu()
    torch.testing.assert_close(logits[1], whole, rtol=1e-3, atol=1e-3)


def test_calibration_as_on_the_cpu(model):
    ours, theirs = (squared_input_norms(open_decoder(model, device), WINDOWS, 4) for device in ("cpu", "cuda"))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["magnitude-2of4", "wanda-three-tier", "sparsegpt-2of4"])
def test_pruning_in_one_shot(name, model):
    run, kept = parse_run(name, method_names()), []

    def pattern_for(_, weight):
        return pattern_of(run, run.sparsity, TierOptions(), weight)

    for device in ("cpu", "cuda"):
        weights: dict[str, torch.Tensor] = {}
        decoder = open_decoder(model, device)
        for layer in prune_layers(decoder, WINDOWS, 4, run.method, pattern_for):
            weights |= layer.weights()
        kept.append(weights)
    same = [(kept[0][name] != 0) == (kept[1][name] != 0) for name in kept[0]]
    assert sum(int(s.sum()) for s in same) >= 0.99 * sum(s.numel() for s in same)


@torch.no_grad()
@pytest.mark.parametrize(("kernel", "values"), [("auto", "bf16"), ("torch", "bf16"), ("torch", "int8")])
def test_a_packed_model(kernel, values, model, tmp_path, gpu):
    checkpoint = Checkpoint(model)
    shapes = {name: checkpoint.shape(f"{name}.weight") for name in open_decoder(model, "cpu").linears()}
    tier_map = dense_tier_map(shapes, 16, 10, checkpoint.identity()["base_model"])
    if values == "bf16":
        write_packed(checkpoint, tier_map, "map", tmp_path / "packed")
    else:
        decoders = [open_decoder(model, "cuda") for _ in range(2)]
        pack_calibrated(*decoders, tier_map, "map", WINDOWS, 2, values, tmp_path / "packed")
    packed = load_packed(tmp_path / "packed", kernel, "cuda")
    dense = load_whole(model, "cpu").bfloat16()
    theirs = dense(WINDOWS[:1, :6]).logits.float()
    # The second time kernels are no longer looked up.
    for _ in range(2):
        ours = packed(WINDOWS[:1, :6].to(gpu)).logits.cpu().float()
        assert ((ours - theirs).norm() / theirs.norm()).item() < 2e-2
    assert packed.generate(WINDOWS[:1, :6].to(gpu), max_new_tokens=2, do_sample=False).shape == (1, 8)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_finetuning_from_a_teacher(method, model, tmp_path):
    """The teacher comes as it is loaded, on the CPU, and ends where the student is."""
    losses = []
    for device in ("cpu", "cuda"):
        student = load_whole(model, "cpu").float().requires_grad_(True)
        name = "model.layers.0.mlp.up_proj"
        weight = student.get_submodule(name).weight
        keep = weight.detach().abs() > 0.05
        with torch.no_grad():
            weight.mul_(keep)
        settings = RecoverySettings(
            epochs=1, method=method, batch_size=2, gradient_accumulation=1, learning_rate=1e-3, evaluation_steps=2,
            distill_weight=0.5, distill_hidden_states=0.1, bf16=False, gradient_checkpointing=method == "full",
        )  # fmt: skip
        teacher = load_teacher(model)
        state = tmp_path / device
        found = recover(
            student, {name: keep}, WINDOWS, WINDOWS[:2], settings, state, device, teacher, keep_moments=True
        )
        assert len(found.moments) > 0
        assert next(teacher.parameters()).device.type == device
        # They stay where they are until they are written, one after the other.
        save_whole(found.moments, tmp_path / "moments.safetensors", {})
        assert load_tensors(tmp_path / "moments.safetensors")[0].keys() == found.moments.keys()
        losses.append([row["loss"] for row in found.log if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_low_memory_trains_as_on_the_cpu_but_for_the_rounding(model, tmp_path):
    losses = []
    for device in ("cpu", "cuda"):
        student = load_whole(model, "cpu").bfloat16().requires_grad_(True)
        name = "model.layers.0.mlp.up_proj"
        keep = torch.rand(student.get_submodule(name).weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
        student.get_submodule(name).weight.data.mul_(keep)
        settings = RecoverySettings(
            epochs=2, memory="low", batch_size=2, gradient_accumulation=1, learning_rate=1e-3, evaluation_steps=4,
            distill_weight=0.5, gradient_checkpointing=True,
        )  # fmt: skip
        state = tmp_path / device
        state.mkdir()
        found = recover(student, {name: keep}, WINDOWS, WINDOWS[:2], settings, state, device, load_teacher(model))
        assert not found.model.get_submodule(name).weight.detach().cpu()[~keep].any()
        losses.append([row["loss"] for row in found.log if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
