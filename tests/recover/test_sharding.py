"""A model in shards: each process reads, holds and saves its rows and no others, of every family."""

from pathlib import Path

import pytest
import torch
from families import make_model
from safetensors.torch import load_file
from test_recovery import WINDOWS, prune
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from stepdown import memory as system_memory
from stepdown.models.decoder import open_decoder
from stepdown.models.linears import as_linears_
from stepdown.models.loading import load_model
from stepdown.models.tensor_files import save_tensors
from stepdown.plan.training_memory import GRADIENT, MASK, MOMENTS, WEIGHT, read_model_size
from stepdown.recover.processes import is_first, run_in_processes
from stepdown.recover.recovery import recover
from stepdown.recover.settings import RecoverySettings
from stepdown.recover.sharding import local, own_rows, reader, save_whole, shard_

# With a head that is the embedding, with matrices stored transposed, with experts stored alone and fused.
FAMILIES = ("llama", "opt", "gpt2", "mixtral", "gpt_oss", "gpt_neox")


@pytest.mark.parametrize("count", range(8))
def test_rows_are_shared_out_as_torch_chunks_them(monkeypatch, count):
    monkeypatch.setenv("WORLD_SIZE", "3")
    found = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        found += range(count)[own_rows(count)]
        chunks = torch.arange(count).chunk(3)
        expected = len(chunks[rank]) if rank < len(chunks) else 0
        assert len(range(count)[own_rows(count)]) == expected
    assert found == list(range(count))


def compare_with_whole(folder, dtype):
    torch.distributed.init_process_group("gloo")
    for family in FAMILIES:
        whole = load_model(folder / family, dtype)
        as_linears_(whole)
        decoder = open_decoder(folder / family, "cpu", dtype=dtype)
        shard_(decoder.model, "cpu", reader(decoder))
        expected, held = whole.state_dict(), decoder.model.state_dict()
        assert expected.keys() == held.keys()
        for name, tensor in expected.items():
            rows = own_rows(len(tensor)) if isinstance(held[name], DTensor) else slice(None)
            assert held[name].dtype == tensor.dtype and torch.equal(local(held[name]), tensor[rows]), (family, name)
        assert all(isinstance(parameter, DTensor) for parameter in decoder.model.parameters())
        tied = whole.get_input_embeddings().weight is whole.get_output_embeddings().weight
        ends = decoder.model.get_input_embeddings().weight, decoder.model.get_output_embeddings().weight
        assert (ends[0] is ends[1]) == tied, family
        save_whole(held, folder / f"{family}.safetensors", {})
        torch.distributed.barrier()
        if is_first():
            gathered = load_file(folder / f"{family}.safetensors")
            assert all(torch.equal(gathered[name], tensor) for name, tensor in expected.items()), family


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_process_reads_its_rows_of_what_transformers_loads(tmp_path, dtype):
    for family in FAMILIES:
        make_model(family, tmp_path / family)
    run_in_processes(compare_with_whole, 2, tmp_path, dtype)


def memory(line):
    """What the kernel says of this process in a line of its status, in bytes."""
    return int(Path("/proc/self/status").read_text().partition(f"{line}:")[2].split()[0]) * 1024


def train_measured(folder, kind):
    """One step in this process, and the most memory that it took beside what libraries take."""
    torch.set_num_threads(1)
    # Matrices this small would come from the heap, which keeps what is freed.
    system_memory.LARGE_BYTES = 1 << 16
    system_memory.map_large_tensors()
    settings = {"processes": 2, "sharded": True, "gradient_checkpointing": True, "learning_rate": 1e-3}
    wanted = RecoverySettings(epochs=1, batch_size=1, gradient_accumulation=1, memory=kind, **settings)
    decoder = open_decoder(folder / "model", "cpu", dtype=wanted.weights_dtype)
    masks = {name: keep[own_rows(len(keep))].bool() for name, keep in load_file(folder / "masks.safetensors").items()}
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    recover(decoder.model, masks, WINDOWS[:2], WINDOWS[:2], wanted, folder, read=reader(decoder))
    (folder / f"peak {own_rows(2).start}").write_text(str(memory("VmHWM") - before))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc to see a peak of memory")
def test_each_process_holds_its_part_of_a_training(tmp_path):
    config = LlamaConfig(
        vocab_size=256, hidden_size=384, intermediate_size=1032, num_hidden_layers=24, num_attention_heads=6
    )
    model = LlamaForCausalLM(config).bfloat16()
    masks = {name: keep.to(torch.uint8) for name, keep in prune(model).items()}
    save_tensors(masks, tmp_path / "masks.safetensors", {})
    model.save_pretrained(tmp_path / "model")
    size = read_model_size(tmp_path / "model")
    run_in_processes(train_measured, 2, tmp_path, "full")
    state = size.parameters * (WEIGHT["full"] + GRADIENT["full"] + MOMENTS["full"]) + size.matrices * MASK["full"]
    layer = size.matrices / size.layers * WEIGHT["full"]
    for process in (0, 1):
        peak = int((tmp_path / f"peak {process}").read_text())
        assert 0.4 * state < peak < 0.6 * state + layer, (peak / state, layer / state)
