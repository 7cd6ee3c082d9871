"""Checkpoints and tier maps on disk: whole or not at all, byte-identical, and of the model they say they are of."""

import errno
import json
import shutil
import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from families import make_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stepdown.errors import UserError
from stepdown.models import tensor_files
from stepdown.models.checkpoint import Checkpoint, pass_on_checkpoint, rewrite_checkpoint, rewriting_layers, shard_of
from stepdown.models.decoder import open_decoder
from stepdown.models.fused import Fused
from stepdown.models.tensor_files import load_tensors, save_tensors
from stepdown.models.tier_maps import check_same_model, check_zeros, dense_tier_map, read_tier_map, write_tier_map

IDENTITY = {"base_model": "0" * 64, "iteration": "1"}


@pytest.fixture
def model(tmp_path):
    return make_model("llama", tmp_path / "model")


@pytest.fixture
def tier_map(model):
    shapes = {name: tuple(linear.weight.shape) for name, linear in open_decoder(model, "cpu").linears().items()}
    return dense_tier_map(shapes, 16, 10, Checkpoint(model).content_hash())


def halve(tensors):
    for name in tensors:
        if name.endswith("proj.weight"):
            tensors[name] *= 0.5


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_rewritten_checkpoint_loads_as_usual(model, tmp_path):
    from transformers import AutoModelForCausalLM

    rewrite_checkpoint(model, tmp_path / "half", halve, IDENTITY)
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "half").state_dict()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor * (0.5 if name.endswith("proj.weight") else 1)), name
    assert Checkpoint(tmp_path / "half").identity() == IDENTITY
    assert {"model.layers.0.safetensors", "model.layers.2.safetensors", "rest.safetensors"} <= files(
        tmp_path / "half"
    ).keys()


def test_the_same_bytes_every_time_and_of_any_shards(model, tmp_path):
    for name in ("one", "two"):
        rewrite_checkpoint(model, tmp_path / name, halve, IDENTITY)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    rewrite_checkpoint(model, tmp_path / "same", lambda tensors: None, IDENTITY)
    assert Checkpoint(model).content_hash() == Checkpoint(tmp_path / "same").content_hash()
    assert Checkpoint(model).content_hash() != Checkpoint(tmp_path / "one").content_hash()


def test_types_on_disk_stay(tmp_path):
    from transformers import AutoModelForCausalLM

    model = make_model("llama", tmp_path / "float32")
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(tmp_path / "bfloat16")

    def to_float(tensors):
        tensors.update({name: tensor.float() for name, tensor in tensors.items()})

    rewrite_checkpoint(tmp_path / "bfloat16", tmp_path / "out", to_float, IDENTITY)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "rest.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("existing", [True, False])
def test_a_full_disk_leaves_nothing_half_written(model, tmp_path, monkeypatch, existing):
    target = tmp_path / "target"
    if existing:
        rewrite_checkpoint(model, target, lambda tensors: None, IDENTITY)
        before = files(target)
    written, read = [], tensor_files._bytes

    def full(tensor):
        written.append(tensor)
        if len(written) == 15:
            raise OSError(errno.ENOSPC, "No space left on device")
        return read(tensor)

    monkeypatch.setattr(tensor_files, "_bytes", full)
    with pytest.raises(UserError, match=r"No space left on device\); is the disk full"):
        rewrite_checkpoint(model, target, halve, IDENTITY)
    assert sorted(path.name for path in tmp_path.iterdir()) == (["model", "target"] if existing else ["model"])
    if existing:
        assert files(target) == before


def test_passing_on_takes_no_second_copy(model, tmp_path):
    pass_on_checkpoint(model, tmp_path / "passed")
    assert files(model) == files(tmp_path / "passed")
    weights = "model.safetensors"
    assert (model / weights).stat().st_ino == (tmp_path / "passed" / weights).stat().st_ino


def test_a_passed_on_checkpoint_survives_a_rewrite_of_its_source(model, tmp_path):
    pass_on_checkpoint(model, tmp_path / "passed")
    before = files(tmp_path / "passed")
    rewrite_checkpoint(model, model, halve, IDENTITY)
    assert files(tmp_path / "passed") == before


def test_shards_follow_the_first_number():
    assert shard_of("model.layers.11.mlp.experts.3.w1.weight") == "model.layers.11"
    assert shard_of("model.embed_tokens.weight") == "rest"


def damage_truncate(model):
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[:-100])


def damage_no_weights(model):
    (model / "model.safetensors").unlink()


def damage_no_config(model):
    (model / "config.json").unlink()


def damage_empty(model):
    (model / "model.safetensors").write_bytes(b"")


def damage_missing_shard(model):
    index = {"metadata": {}, "weight_map": {"a.weight": "model-00001.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def damage_garbled_index(model):
    (model / "model.safetensors.index.json").write_text("{")


def damage_outside(model):
    (model / "model.safetensors").rename(model.parent / "outside.safetensors")
    index = {"weight_map": {"a.weight": "../outside.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def damage_numbered_index(model):
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.weight": 3}}))


def damage_two_of_them(model):
    """transformers would read the one file, where there are both."""
    shutil.copyfile(model / "model.safetensors", model / "a.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.weight": "a.safetensors"}}))


def damage_header(model):
    header = json.dumps({"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 0]}}).encode()
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def damage_deep_header(model):
    (model / "model.safetensors").write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, r"model\.safetensors: truncated or damaged"),
        (damage_no_weights, "no weights found"),
        (damage_no_config, "has no config.json"),
        (damage_empty, "truncated"),
        (damage_missing_shard, "model-00001.safetensors, named in .* is missing"),
        (damage_garbled_index, r"index\.json: not JSON"),
        (damage_outside, r"names '\.\./outside\.safetensors'; put every file of the weights beside config\.json"),
        (damage_numbered_index, "not a readable index"),
        (damage_two_of_them, "has model.safetensors, and .* that names a.safetensors instead"),
        (damage_header, "its header is unreadable"),
        (damage_deep_header, "its header is unreadable"),
    ],
)
def test_damaged_folders_are_named(model, damage, message):
    damage(model)
    with pytest.raises(UserError, match=message) as caught:
        Checkpoint(model)
    assert "\n" not in str(caught.value)


def test_tier_maps_come_back_as_written(tier_map, tmp_path):
    write_tier_map(tier_map, tmp_path / "map.safetensors")
    first = (tmp_path / "map.safetensors").read_bytes()
    again = read_tier_map(tmp_path / "map.safetensors")
    write_tier_map(again, tmp_path / "map.safetensors")
    assert (tmp_path / "map.safetensors").read_bytes() == first
    assert again.shapes == tier_map.shapes and again.identity == tier_map.identity


def test_two_names_of_one_tensor_are_two_on_disk(tmp_path):
    tied = torch.arange(6.0).view(2, 3)
    save_tensors({"embedding": tied, "head": tied, "empty": tied[:0]}, tmp_path / "tied.safetensors", {"format": "pt"})
    loaded = load_file(tmp_path / "tied.safetensors")
    assert loaded.keys() == {"embedding", "head", "empty"}
    assert torch.equal(loaded["embedding"], tied) and torch.equal(loaded["head"], tied)


def test_metadata_has_one_order(tmp_path):
    metadata = dict.fromkeys("qwertyuiop", "é " * 3)
    for name in ("one", "two"):
        save_tensors({"a": torch.ones(3)}, tmp_path / name, metadata)
        assert load_tensors(tmp_path / name)[1] == metadata
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_map_of_another_model_or_iteration_is_refused(model, tier_map, tmp_path):
    check_same_model(tier_map, "map", Checkpoint(model))
    other = Checkpoint(make_model("llama", tmp_path / "other", seed=1))
    with pytest.raises(UserError, match="map: tier map of another model"):
        check_same_model(tier_map, "map", other)
    with pytest.raises(UserError, match=r"map: tier map of iteration 0, but .* is of iteration 0"):
        check_same_model(tier_map, "map", Checkpoint(model), iterations_ahead=1)


def test_a_map_of_another_block_size_is_refused(tier_map, tmp_path):
    tensors = tier_map.tiers
    write_tier_map(tier_map, tmp_path / "map.safetensors")
    with safe_open(tmp_path / "map.safetensors", framework="pt") as opened:
        metadata = opened.metadata()
    save_tensors(tensors, tmp_path / "map.safetensors", metadata | {"block_size": "8"})
    with pytest.raises(UserError, match=r"expected .* blocks of size 8"):
        read_tier_map(tmp_path / "map.safetensors")


@pytest.mark.parametrize("content", [b"", b"no tier map", b"\x10\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_broken_map_is_named(tmp_path, content):
    (tmp_path / "map.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"map\.safetensors: not a readable"):
        read_tier_map(tmp_path / "map.safetensors")


def test_other_safetensors_are_no_tier_maps(model):
    with pytest.raises(UserError, match="not a tier map of this version"):
        read_tier_map(model / "model.safetensors")


def test_revived_weights_are_noticed(model, tier_map):
    name = next(iter(tier_map.tiers))
    weight = Checkpoint(model).matrix(name)
    tiers = dict(tier_map.tiers)
    tiers[name] = torch.full_like(tiers[name], 1)
    with pytest.raises(UserError, match=rf"{name}: {tiers[name].numel()} blocks hold more weights"):
        check_zeros(tier_map.with_tiers(tiers), name, weight, model)


def test_a_copy_of_the_folder_is_the_same_model(model, tier_map, tmp_path):
    shutil.copytree(model, tmp_path / "copy")
    check_same_model(tier_map, "map", Checkpoint(tmp_path / "copy"))


def peak():
    """The most memory this process has had since `clear_refs` was written to, in bytes."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc to see a peak of memory")
def test_a_tensor_is_in_memory_once_while_it_is_read(tmp_path):
    weight = torch.ones(1 << 12, 1 << 12)
    save_file({"weight": weight}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint, size = Checkpoint(tmp_path), weight.nbytes
    del weight
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    tensors = checkpoint.tensors(["weight"])
    assert 0.9 * size < peak() - before < 1.3 * size and tensors["weight"].nbytes == size


def test_a_written_shard_is_let_go_of_before_the_next_is_read(model, tmp_path):
    given = []

    def look(tensors):
        assert not any(given)
        given.append(tensors)

    rewrite_checkpoint(model, tmp_path / "same", look, IDENTITY)
    assert len(given) == len(Checkpoint(model).shards())


def test_a_layer_put_aside_is_let_go_of_before_the_next_is_made(model, tmp_path):
    source = Checkpoint(model)
    name = next(iter(open_decoder(model, "cpu").linears())) + ".weight"
    with rewriting_layers(source, tmp_path / "zeroed", IDENTITY) as write:
        layer = {name: torch.zeros(source.shape(name))}
        held = weakref.ref(layer[name])
        write(layer)
        assert held() is None
    assert not Checkpoint(tmp_path / "zeroed").tensors([name])[name].any()


def test_what_a_killed_job_put_aside_goes_with_the_next(model, tmp_path):
    """Killed with -9: nothing of its own could clear it away."""
    source = Checkpoint(model)
    for end in (KeyboardInterrupt, None):
        (tmp_path / "target.layers").mkdir(exist_ok=True)
        (tmp_path / "target.layers/7.safetensors").write_text("left")
        with pytest.raises(end) if end else nullcontext(), rewriting_layers(source, tmp_path / "target", IDENTITY):
            if end:
                raise end
        assert not (tmp_path / "target.layers").exists()
    assert Checkpoint(tmp_path / "target").names == source.names


def test_every_type_is_read_as_it_was_stored(model, tmp_path):
    tensors = {str(kind): torch.ones(3, 5).to(kind) for kind in tensor_files.TYPES.values()}
    tensors |= {"none": torch.empty(0, 4), "one": torch.tensor(7), "Ö": torch.ones(2)}
    save_tensors(tensors, tmp_path / "all.safetensors", {"format": "pt"})
    for name, tensor in load_tensors(tmp_path / "all.safetensors")[0].items():
        assert tensor.dtype == tensors[name].dtype and tensor.shape == tensors[name].shape
        assert torch.equal(tensor.to(torch.complex64), tensors[name].to(torch.complex64))
    save_file(tensors, tmp_path / "library.safetensors", {"format": "pt"})
    assert (tmp_path / "library.safetensors").read_bytes() == (tmp_path / "all.safetensors").read_bytes()


LAYOUTS = {
    "alone": {},
    "transposed": {"transposed": frozenset(["stored"])},
    "experts": {"fused": {"stored": Fused("e", ("gate_proj", "up_proj"), (3, 8, 6))}},
    "experts, interleaved": {"fused": {"stored": Fused("e", ("gate_proj", "up_proj"), (3, 8, 6), interleaved=True)}},
    "experts, transposed": {"fused": {"stored": Fused("e", ("gate_proj", "up_proj"), (3, 6, 8), transposed=True)}},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_rows_are_those_of_the_whole(tmp_path, layout):
    fused = layout.get("fused")
    tensor = torch.arange(144.0).view(fused["stored"].shape if fused else (8, 18))
    save_tensors({"before": torch.ones(5), "stored": tensor}, tmp_path / "model.safetensors", {})
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint(tmp_path)
    for attribute, value in layout.items():
        setattr(checkpoint, attribute, value)
    for name in checkpoint.names:
        whole = checkpoint.tensors([name])[name]
        for rows in (slice(0, 2), slice(1, 4), slice(3, 3), slice(0, len(whole))):
            found = checkpoint.rows(name, rows)
            assert torch.equal(found, whole[rows]) and found.is_contiguous()
