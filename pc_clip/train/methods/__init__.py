"""Training methods, one file each: `methods/NAME.py` is `--method NAME`.

Its settings are a dataclass in core/config/train.py, where METHODS lists it; they appear as `--NAME.setting`. The file
has a class `Method`, a torch module (a `BaseMethod` of base.py, which has what they share) with

    Method(clip, data, config)   config: the run's FinetuneConfig; its own options are config.NAME
    loss(batch)              -> (loss, logs): a scalar, and numbers for the log; `forward` adds what retention asks for
    begin_epoch(epoch)       called before each epoch, when the weights are as they then are
    draw(chosen, rng, epoch, n), image_rows(part), batch(part, images)
                             what is in batch n of an epoch: this process's part of the chosen examples, the images
                             that it needs, and the batch itself; BaseMethod.loader calls them
    loader(epoch, skip)      batches of one epoch, the same every time, without the first `skip`; batch.ids names
                             what is in one
    steps_per_epoch          how many batches that is
    trainable()              the parameters that learn, by name
    rate(name)               what train.lr is multiplied by for one of them
    after_step()             called after each step of the optimizer
    chosen_by, validate()    the figure by which the best epoch is kept, and a way to find it; "" for the last epoch
    chosen_on                what that is found on, by content
    state(), restore(state)  tensors by name: what the next step depends on besides weights and optimizer
    notes                    lines for the log: what was counted, dropped, truncated

loop.py asks for nothing else.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from pc_clip.core.config.train import METHODS
from pc_clip.core.errors import check_choice


def find(name: str) -> ModuleType:
    """The module of a method. Raises UserError for an unknown one."""
    check_choice("method", name, METHODS)
    return importlib.import_module(f"{__name__}.{name}")
