"""Adam whose small steps are not lost in float32: what rounding takes from a step is added to the next.

At lr 1e-8 a plain addition loses a sizeable part of each step, and all of it where a weight is 0.25 or more, as gains
are: half the distance between two float32 numbers there is 1.5e-8. Kahan's compensated summation carries the lost
part along (Kahan 1965; for training: Zamirai et al. 2020, "Revisiting BFloat16 Training"). torch-optimi does this for
bfloat16 and float16 weights only, hence these lines around torch's own fused step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

CHUNK = 1 << 17  # numbers added at a time on a CPU, so that the three tensors stay in its cache


class CompensatedAdam(torch.optim.Optimizer):
    """Adam, or AdamW with `decoupled`, with a carry of what each weight still owes.

    The fused step of torch is applied to the carry, which is small and so keeps all its digits; then the carry is
    added to the weight and what the addition rounded off stays in it. Memory: one more tensor a weight.
    Raises TypeError for weights that are not float32: the steps they lose are not for a carry to mend.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": True}
        super().__init__(params, defaults)
        self.decoupled = decoupled
        if any(p.dtype != torch.float32 for group in self.param_groups for p in group["params"]):
            raise TypeError("CompensatedAdam takes float32 weights")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # accelerate gives one, always None
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                self._step(weights, group)

    def _step(self, weights: list[nn.Parameter], group: dict[str, Any]) -> None:
        for p in weights:
            if not self.state[p]:
                self.state[p] = {"step": torch.zeros((), device=p.device)} | {
                    name: torch.zeros_like(p) for name in ("carry", "exp_avg", "exp_avg_sq")
                }
        states, gradients = [self.state[p] for p in weights], [p.grad for p in weights]
        carries = [state["carry"] for state in states]
        if group["weight_decay"]:  # torch's step would decay the carry; the weights are what it is about
            if self.decoupled:
                torch._foreach_add_(carries, weights, alpha=-group["lr"] * group["weight_decay"])
            else:
                gradients = torch._foreach_add(gradients, weights, alpha=group["weight_decay"])
        adam(
            carries,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )
        for p, carry in zip(weights, carries):
            add_compensated(p, carry)


def add_compensated(weight: Tensor, carry: Tensor) -> None:
    """weight += carry, in place; what the addition rounded off is left in `carry`. Both of one shape and layout."""
    at_once = weight.is_cuda or not (weight.is_contiguous() and carry.is_contiguous())
    pieces = [(weight, carry)] if at_once else zip(*(t.view(-1).split(CHUNK) for t in (weight, carry)))
    for w, c in pieces:
        new = w + c
        c.sub_(new - w)  # new - w is exact where |c| <= |w| (Dekker's fast two-sum), else off by an ulp of c at most
        w.copy_(new)
