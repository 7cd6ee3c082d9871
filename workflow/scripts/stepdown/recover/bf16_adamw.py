"""AdamW (Loshchilov & Hutter 2019) of bfloat16 weights, with moments in bfloat16: 6 bytes a weight, 12 in float32.

A step is computed in float32, and what it comes to is rounded to one of the two nearest numbers of bfloat16, up as
often as it lies near the upper one (stochastic rounding), so that nothing is lost on average. Rounded to the nearest,
an update below 1/512 of its weight would never happen, and a second moment never decay.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from .sharding import local

# Weights computed at a time: what a step holds in float32, whatever the size of a matrix. A CPU has them in its caches.
CHUNK, GPU_CHUNK = 2**20, 2**24


class BFloat16AdamW(torch.optim.Optimizer):
    """Its state is called what torch's AdamW calls it. The rounding of a step depends on seed and step alone.

    So processes with the same gradients make the same steps, and so does a training that was interrupted.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.seed = seed

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        trained = [(group, each) for group in self.param_groups for each in group["params"] if each.grad is not None]
        # All moments before the first is computed: between what that leaves they would stand apart, and hold it.
        for _, weight in trained:
            if not self.state[weight]:
                moments = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
                self.state[weight].update(step=torch.zeros(()), **moments)
        generator = None
        for group, weight in trained:
            state = self.state[weight]
            # On the CPU, wherever a checkpoint was read to: counting is not to wait for a GPU.
            state["step"] = state["step"].cpu() + 1
            step = int(state["step"])
            if generator is None:
                generator = torch.Generator(weight.device).manual_seed((self.seed << 32) + step)
            held = (weight, weight.grad, state["exp_avg"], state["exp_avg_sq"])
            chunk_size = CHUNK if weight.device.type == "cpu" else GPU_CHUNK
            for chunk in zip(*(local(each).view(-1).split(chunk_size) for each in held), strict=True):
                _step_(*chunk, step, group, generator)


def _step_(
    weight: Tensor, gradient: Tensor, mean: Tensor, mean_square: Tensor, step: int, group: dict, generator
) -> None:
    """One step of some weights, [n], and of the two moments of their gradients."""
    beta1, beta2 = group["betas"]
    g = gradient.float()
    m = mean.float().lerp_(g, 1 - beta1)
    v = mean_square.float().mul_(beta2).addcmul_(g, g, value=1 - beta2)
    mean.copy_(round_stochastically(m, generator))
    mean_square.copy_(round_stochastically(v, generator))
    update = m.div_(1 - beta1**step).div_(v.div_(1 - beta2**step).sqrt_().add_(group["eps"]))
    w = weight.float().mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
    weight.copy_(round_stochastically(w, generator))


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Float32 values as bfloat16: one of the two neighbours, each as likely as the value is near to it.

    What bfloat16 can hold, zero among it, stays as it is.
    """
    # A bfloat16 is the upper half of a float32: a random lower half is added, and what does not carry over is cut off.
    noise = torch.randint(0, 2**16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    rounded = noise.add_(values.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32)
    # A GPU's NaN has all bits set, which would carry over into the sign and come out as a zero.
    return torch.where(values.isnan(), values, rounded).bfloat16()
