"""Experts as linears of their own: what a GPU is asked for, one wait for all of them."""

import pytest
import torch
from conftest import REPOSITORY
from pretend_gpu import pretend_gpu
from transformers import MixtralConfig, MixtralForCausalLM

from stepdown.models.linears import SeparateExperts, as_linears_

EXPERTS = 24


def experts():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=EXPERTS, **sizes)
    model = MixtralForCausalLM(config).eval()
    fused = next(module for module in model.modules() if hasattr(module, "gate_up_proj"))
    before = {name: parameter.detach().clone() for name, parameter in fused.named_parameters()}
    as_linears_(model)
    return next(module for module in model.modules() if isinstance(module, SeparateExperts)), before


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what a pretended GPU is given to do")
def test_a_gpu_is_waited_for_once_by_all_experts():
    separate, before = experts()
    states, weights = torch.randn(40, 16), torch.rand(40, 3)
    # One expert is given no token, and none more than once.
    index = torch.stack([torch.randperm(EXPERTS - 1)[:3] for _ in range(40)])
    with pretend_gpu(str(REPOSITORY)) as counts, torch.no_grad():
        moved = states.cuda(), index.cuda(), weights.cuda()
        separate.cuda()
        before_waiting = counts.totals()["waits"]
        found = separate(*moved).cpu()
        waits = counts.totals()["waits"] - before_waiting
        separate.cpu()
    assert waits == 1
    expected = torch.zeros(40, 16)
    for token, place in ((token, place) for token in range(40) for place in range(3)):
        number = index[token, place]
        gate, up = (before["gate_up_proj"][number] @ states[token]).chunk(2)
        expected[token] += weights[token, place] * (before["down_proj"][number] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(found, expected)
