"""Reconstruction: layers that make again what they made before pruning, zeros kept."""

from pathlib import Path

import pytest
import torch
from families import make_model

from stepdown.errors import UserError
from stepdown.models.checkpoint import Checkpoint, rewrite_checkpoint, rewriting_layers
from stepdown.models.decoder import open_decoder
from stepdown.models.layer_walk import LayerWalk
from stepdown.prune.reconstruction import Settings, reconstruct_layers
from stepdown.tensors.masks import keep_n_of_m

WINDOWS = torch.randint(0, 128, (16, 32), generator=torch.Generator().manual_seed(1))


def halve(tensors):
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and any(part.isdigit() for part in name.split(".")):
            tensor.mul_(keep_n_of_m(tensor.abs(), 2, 4))


def free(_, weight):
    return weight != 0


@pytest.fixture(params=["llama", "opt", "gpt2", "bloom"])
def folders(request, tmp_path) -> tuple[Path, Path]:
    dense = make_model(request.param, tmp_path / "dense")
    checkpoint = open_decoder(dense, "cpu").checkpoint
    rewrite_checkpoint(checkpoint, tmp_path / "pruned", halve, checkpoint.identity())
    return dense, tmp_path / "pruned"


def last_states(folder):
    walk = LayerWalk(open_decoder(folder, "cpu"), list(WINDOWS.split(4)))
    for _, _, replay in walk.layers("states"):
        replay()
    return torch.cat(walk.states)


def reconstruct(dense: Path, pruned: Path, target: Path, batch_size: int = 8, rate: float = 0.03) -> Checkpoint:
    decoders = open_decoder(dense, "cpu"), open_decoder(pruned, "cpu")
    source = decoders[1].checkpoint
    with rewriting_layers(source, target, source.identity()) as write:
        for tensors in reconstruct_layers(*decoders, free, WINDOWS, batch_size, Settings(20, rate)):
            write(tensors)
    return Checkpoint(target)


def changed(before: Checkpoint, after: Checkpoint) -> set[str]:
    return {name for name in before.names if not torch.equal(*(each.tensors([name])[name] for each in (before, after)))}


def test_a_reconstructed_model_is_nearer_to_the_dense_one_and_as_sparse(folders, tmp_path):
    dense, pruned = folders
    found, decoder = reconstruct(dense, pruned, tmp_path / "reconstructed"), open_decoder(pruned, "cpu")
    layers = {name for name in decoder.checkpoint.names if any(part.isdigit() for part in name.split("."))}
    # The keys' bias moves no attention; what is nothing but zeros has no size to take steps by.
    empty = {name for name in layers if not decoder.checkpoint.tensors([name])[name].any()}
    assert layers - changed(decoder.checkpoint, found) - empty <= {n for n in layers if n.endswith("k_proj.bias")}
    assert changed(decoder.checkpoint, found) <= layers
    for name in decoder.linears():
        before, after = (checkpoint.matrix(name) for checkpoint in (decoder.checkpoint, found))
        assert after[before == 0].count_nonzero() == 0
    wanted = last_states(dense)
    before, after = ((last_states(folder) - wanted).norm() for folder in (pruned, found.folder))
    assert after < 0.8 * before


def test_what_does_not_come_nearer_stays_as_it_is(tmp_path):
    dense = make_model("llama", tmp_path / "dense")
    assert not changed(Checkpoint(dense), reconstruct(dense, dense, tmp_path / "reconstructed"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_bytes_however_many_windows_go_through_at_a_time(tmp_path, dtype):
    """Weights keep their type; steps are of as many windows, and only rounding depends on how they are added up."""
    dense = make_model("llama", tmp_path / "dense", dtype=dtype)
    rewrite_checkpoint(dense, tmp_path / "pruned", halve, Checkpoint(dense).identity())
    once, again, singly = (
        reconstruct(dense, tmp_path / "pruned", tmp_path / name, batch_size, rate=0.003)
        for name, batch_size in (("once", 8), ("again", 8), ("singly", 1))
    )
    assert once.content_hash() == again.content_hash()
    for name in once.names:
        one, other = (checkpoint.tensors([name])[name] for checkpoint in (once, singly))
        assert one.dtype == getattr(torch, dtype)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3 if dtype == "float32" else 2e-2)


def test_states_that_are_not_finite_are_told(tmp_path):
    dense = make_model("llama", tmp_path / "dense")

    def spoil(tensors):
        if "model.layers.1.input_layernorm.weight" in tensors:
            tensors["model.layers.1.input_layernorm.weight"][3] = torch.nan

    rewrite_checkpoint(dense, tmp_path / "broken", spoil, Checkpoint(dense).identity())
    with pytest.raises(UserError, match=r"broken: what model\.layers\.1 makes of the calibration text is not finite"):
        reconstruct(dense, tmp_path / "broken", tmp_path / "reconstructed")
    assert not (tmp_path / "reconstructed").exists()
