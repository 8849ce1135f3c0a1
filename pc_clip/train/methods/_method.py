"""What all methods have in common: a sampler, and what else a run that is continued has to know."""

from __future__ import annotations

import time

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from torch import Tensor, nn

from pc_clip.core.config.train import FinetuneConfig
from pc_clip.core.distributed import process_slice
from pc_clip.models.clip import SCRATCH, Clip
from pc_clip.train.samplers import Sampler


class BaseMethod(nn.Module):
    """A method without its batches and its loss; methods/__init__.py says what those are."""

    sampler: Sampler  # made by the method, which knows what its examples are

    def __init__(self, clip: Clip, config: FinetuneConfig) -> None:
        super().__init__()
        self.model, self.clip, self.config = clip.model, clip, config
        self.share = process_slice("train.batch_size", config.train.batch_size)
        self.notes: list[str] = []
        self.settling = 0.0  # seconds that the beginnings of epochs have taken
        # Statistics of BatchNorm are learnt from scratch only: a finetuned model keeps those it has.
        self.train(config.model.pretrained == SCRATCH)

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.steps_per_epoch

    def begin_epoch(self, epoch: int) -> None:
        """Called before each epoch, when all steps before it are done."""
        begun = time.perf_counter()
        if self.training and PartialState().num_processes > 1:  # else each process embeds by statistics of its own
            for value in self.model.buffers():
                broadcast(value)
        self.sampler.begin(epoch)
        self.settling += time.perf_counter() - begun

    def is_logged(self, epoch: int, n: int) -> bool:
        """Whether the log has a line of the n-th step of an epoch; what is only for the log need not be found else."""
        train, step = self.config.train, epoch * self.steps_per_epoch + n + 1
        return step % train.log_every == 0 or step == (train.steps or train.epochs * self.steps_per_epoch)

    chosen_on = ""  # what `validate` looks at, by content
    chosen_by = ""  # the figure of `validate` by which the best epoch is chosen; empty for the last epoch

    def validate(self) -> dict[str, float]:
        """Figures on images that are not learnt from, after an epoch; asked for where `chosen_by` names one of them."""
        return {}

    def rate(self, name: str) -> float:
        """What train.lr is multiplied by for a parameter of `trainable`."""
        return 1.0

    def after_step(self) -> None:
        """Called after each step of the optimizer. CLIP keeps its logit scale at 100 or below (Radford et al. 2021)."""
        scale = getattr(self.model, "logit_scale", None)
        if scale is not None and scale.requires_grad:
            with torch.no_grad():
                scale.clamp_(max=LARGEST_LOGIT_SCALE)

    def state(self) -> dict[str, Tensor]:
        """What the next step depends on besides weights and optimizer."""
        found = {f"sampler.{name}": value for name, value in self.sampler.state().items()}
        if self.training:
            found |= {f"buffer.{name}": value for name, value in self.model.named_buffers()}
        return found

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put back what `state` gave; nothing, where an earlier version has saved nothing."""
        of = {
            kind: {name.removeprefix(kind): v for name, v in state.items() if name.startswith(kind)}
            for kind in ("sampler.", "buffer.")
        }
        if of["sampler."]:
            self.sampler.restore(of["sampler."])
        for name, value in self.model.named_buffers():
            if name in of["buffer."]:
                value.copy_(of["buffer."][name])


LARGEST_LOGIT_SCALE = torch.tensor(100.0).log().item()
