"""The training loop, the same for every method: batches from `method.loader`, a loss from `method(batch)`."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from copy import copy
from dataclasses import replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from tqdm import tqdm

from pc_clip.core import environment
from pc_clip.core.config.train import FinetuneConfig
from pc_clip.core.environment import resolve_device
from pc_clip.core.errors import UserError
from pc_clip.core.files import write_text
from pc_clip.core.paths import MODEL_FILE, STATE_FILE, checkpoint_file
from pc_clip.core.prefetch import prefetch
from pc_clip.data.dataset import Dataset
from pc_clip.data.training_data import load_dataset
from pc_clip.models import loading, lora
from pc_clip.models.clip import SCRATCH, Clip
from pc_clip.models.loading import create_model
from pc_clip.train import methods, run_folder, state
from pc_clip.train.optim import check_settings, learning_rate, make_optimizer, resolve_precision
from pc_clip.train.retention import Retention
from pc_clip.train.state import BestCheckpoint

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
PATIENCE = InitProcessGroupKwargs(timeout=timedelta(hours=12))  # the others wait while one process embeds


def finetune(config: FinetuneConfig) -> Path:
    """Run one finetuning from its settings to a finished folder; returns the folder.

    Raises UserError for mistakes a user can fix, and for a loss that is not finite.
    """
    run, train, model = Path(config.out) / config.name, config.train, config.model
    resolve_device(config.device)
    check_settings(train)
    lora.check(model.lora_rank, model.lora_alpha)
    if model.start and model.pretrained:
        raise UserError("model.start and model.pretrained both say which weights to begin with; leave one out")
    if model.start and checkpoint_file(model.start).resolve().is_relative_to(run.resolve()):
        raise UserError(f"model.start {model.start} lies in the run that would take its place; choose another --name")
    process = PartialState(cpu=config.device == "cpu", **PATIENCE.to_kwargs())
    config = copy(config)  # not replace, which would lose the options of the method
    config.train = replace(train, precision=resolve_precision(train.precision, process.device))
    data = load_dataset(config.data, config.seed)  # before the model, whose weights may take long to fetch
    with run_folder.locked(run) if process.is_main_process else nullcontext():  # it alone writes into the folder
        return _run(config, run, data)


def _run(config: FinetuneConfig, run: Path, data: Dataset) -> Path:
    train, learnt_from = config.train, run_folder.hashes(data, config)
    if run_folder.already_done(run, config, learnt_from):
        return run
    if train.threads:
        torch.set_num_threads(train.threads)
    accelerator = Accelerator(
        mixed_precision=train.precision,
        cpu=config.device == "cpu",
        log_with=train.tracker or None,
        project_dir=run if train.tracker else None,
        kwargs_handlers=[PATIENCE],
    )
    _check_launch(accelerator, train.precision)
    clip = _start(config, accelerator.device)
    with accelerator.autocast():
        text_way = clip.choose_text_way(config.model.fast_text, train.recompute)
    method = methods.find(config.method).Method(clip, data, config)
    if config.retain.weights:
        method.retention = Retention(method, data)
    method.clip.start = {"weights": clip.weights_hash()}
    if config.model.start:
        method.clip.start["checkpoint"] = str(loading.checkpoint_file(config.model.start))
    learn = method.trainable()  # first, so that a wrong model.train is an error before anything is deleted
    rank, adapted = config.model.lora_rank, []
    if rank:
        adapted = [n for n in lora.weights_to_adapt(clip.model, config.model.train, clip.name) if n in learn]
        method.notes.append(f"adapters of rank {rank} on {len(adapted)} weights")
    method.notes[:0] = [text_way, data.note] if data.note else [text_way]
    if accelerator.is_main_process:
        also = {"validation": method.chosen_on} if method.chosen_on else {}
        also |= {"retain": method.retention.fingerprint} if method.retention else {}
        also |= {} if clip.pretrained == SCRATCH else {"starting weights": method.clip.start["weights"]}
        if config.resume and (run / "config.yaml").is_file():
            run_folder.check_data(run, also)
        else:
            if config.overwrite and not config.resume:
                run_folder.delete(run)  # only now, when nothing is left that could be refused
            about = {"data": learnt_from | also, "start": method.clip.start["weights"], "notes": method.notes}
            run_folder.begin(run, config, environment.describe() | about)
    accelerator.wait_for_everyone()
    lora.add(clip.model, adapted, rank, config.model.lora_alpha, config.seed)  # what is kept of the start has none
    with _Stop() as stop:
        _loop(accelerator, method, config, run, stop)
    lora.merge(clip.model)
    if accelerator.is_main_process:
        if train.blend != 1.0:
            start = _start(config, "cpu").model.state_dict()
            end = {name: value.cpu() for name, value in clip.model.state_dict().items()}
            clip.model.load_state_dict(loading.blend(start, end, train.blend))
        loading.save_model(run / MODEL_FILE, method.clip)
    accelerator.end_training()
    return run


def _check_launch(accelerator: Accelerator, precision: str) -> None:
    """Raises UserError for what `accelerate launch` or its config file asks for and this loop does not do."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", precision):
        raise UserError(f"accelerate was asked for {asked}, and train.precision is {precision}; set --train.precision")
    if (steps := accelerator.gradient_accumulation_steps) != 1:
        raise UserError(
            f"accelerate was asked for gradient_accumulation_steps {steps}, which would have no effect. For a batch "
            "that does not fit set --train.recompute true: its gradient is that of the whole batch"
        )
    kind = accelerator.distributed_type.value
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP"):
        raise UserError(f"accelerate was asked for {kind}; here each process holds the whole model: --multi_gpu")


def _start(config: FinetuneConfig, device: torch.device | str) -> Clip:
    """The model as it is before training."""
    model = config.model
    if model.start:
        return loading.load_model(model.start, model.name or None, device=device, tag=model.tag)
    return create_model(*model.source(config.data.dataset), device=device, seed=config.seed)


def _loop(accelerator: Accelerator, method: nn.Module, config: FinetuneConfig, run: Path, stop: _Stop) -> None:
    train, parameters = config.train, method.trainable()
    for parameter in method.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = make_optimizer(train, list(parameters.values()), [method.rate(name) for name in parameters])
    per_epoch, main = method.steps_per_epoch, accelerator.is_main_process
    total = method.total_steps
    done, memory = state.load_state(run, parameters, optimizer) if config.resume else (0, {})
    method.restore(memory)
    best = BestCheckpoint(run, done, parameters, method.chosen_by) if method.chosen_by else None
    model, optimizer = accelerator.prepare(method, optimizer)

    if main:
        cut_log(run / METRICS_FILE, done)
        accelerator.init_trackers("pc_clip")
        count = sum(p.numel() for p in parameters.values())
        for line in method.notes:
            log.info("%s", line)
        log.info("%s: %d steps of %d, %.1f M parameters learn", config.method, total, train.batch_size, count / 1e6)
    since, then = done, time.perf_counter()
    bar = tqdm(total=total, initial=done, desc=config.name, disable=None if main else True)
    with closing(batches(method, done, total, accelerator.device)) as coming:
        for step, batch in enumerate(coming, start=done + 1):
            lr = learning_rate(train, step - 1, per_epoch, total)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["rate"]
            loss, logs = model(to_device(batch, accelerator.device))
            asked, broken = _agree(accelerator, stop.asked, not math.isfinite(loss.item()))
            if broken:
                _stop_at_nan(run, step, batch.ids, loss.item())
            accelerator.backward(loss)
            if train.clip_norm:
                accelerator.clip_grad_norm_(parameters.values(), train.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            method.after_step()
            bar.update()
            if step % train.log_every == 0 or step == total:
                rate = (step - since) * train.batch_size / (time.perf_counter() - then)
                since, then = step, time.perf_counter()
                means = {k: v.item() for k, v in accelerator.reduce({"loss": loss.detach()} | logs, "mean").items()}
                row = {"epoch": step / per_epoch, "lr": lr, "pairs_per_second": rate} | means
                if main:
                    with (run / METRICS_FILE).open("a") as file:
                        file.write(json.dumps({"step": step} | row) + "\n")
                    accelerator.log(row, step=step)
                    tqdm.write(f"step {step}/{total}  loss {means['loss']:.4f}  lr {lr:.2e}  {rate:.0f} pairs/s")
            if best and (step % per_epoch == 0 or step == total):
                if main:
                    with accelerator.autocast():
                        best.after(step, method.validate)
                accelerator.wait_for_everyone()
            if step % train.save_every == 0 or step == total or asked:
                if not all(torch.isfinite(p).all() for p in parameters.values()):  # the same in every process
                    _stop_at_nan(run, step, batch.ids, math.nan)
                if main:
                    state.save_state(run, step, parameters, optimizer.optimizer, method.state())
            if asked:
                raise KeyboardInterrupt
    bar.close()
    if best and main:
        log.info("%s", best.restore())


def _agree(accelerator: Accelerator, *wishes: bool) -> list[bool]:
    """Whether any process wants to stop: all stop together, or the others would wait for ever."""
    if accelerator.num_processes == 1:
        return list(wishes)
    return (accelerator.reduce(torch.tensor(wishes, device=accelerator.device).float(), "sum") > 0).tolist()


class _Stop:
    """Turns the first Ctrl-C (or SIGTERM) into a wish, so that the step ends and is saved; the second acts at once."""

    def __enter__(self) -> _Stop:
        self.asked = False
        here = threading.current_thread() is threading.main_thread()  # only there may handlers be set
        self.before = {n: signal.signal(n, self._ask) for n in (signal.SIGINT, signal.SIGTERM) if here}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def _stop_at_nan(run: Path, step: int, ids: list[str], value: float) -> None:
    value = value if not math.isfinite(value) else math.nan  # it is another process's that is not
    kept = f"the last good state is {run / STATE_FILE}" if (run / STATE_FILE).is_file() else "nothing was saved yet"
    raise UserError(
        f"the loss or a weight became {value} at step {step}, on {len(ids)} items beginning with {', '.join(ids[:5])}; "
        f"{kept}. Lower train.lr, set train.clip_norm 1, or look at these items."
    )


# -- batches and the log -----------------------------------------------------------------------------------


def batches(method: nn.Module, done: int, total: int, device: torch.device) -> Iterator[Any]:
    """Batches from step `done` on, those a straight run would have; made ahead within an epoch and not beyond it.

    What a method puts into an epoch's batches may depend on the weights at its beginning.
    """
    while done < total:
        epoch, skip = divmod(done, method.steps_per_epoch)
        count = min(method.steps_per_epoch - skip, total - done)
        method.begin_epoch(epoch)
        with closing(prefetch(pinned(islice(method.loader(epoch, skip), count), device))) as coming:
            yield from coming
        done += count


def pinned(made: Iterator[Any], device: torch.device) -> Iterator[Any]:
    """Batches in memory that a GPU reads without the CPU's help; as they are for a CPU."""
    for batch in made:
        yield _of_each(batch, lambda x: x.contiguous().pin_memory()) if device.type == "cuda" else batch


def to_device(batch: Any, device: torch.device) -> Any:
    return _of_each(batch, lambda x: x.to(device, non_blocking=True))


def _of_each(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A batch, or a batch of batches, with each tensor changed."""
    values = batch._asdict().items()
    changed = {name: change(value) for name, value in values if isinstance(value, Tensor)}
    changed |= {name: _of_each(value, change) for name, value in values if hasattr(value, "_asdict")}
    return batch._replace(**changed)


def cut_log(path: Path, done: int) -> None:
    """Cut a log back to the step that a resumed run starts from; a line may be cut short by a kill."""
    lines = path.read_text().splitlines() if path.is_file() and done else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= done]
    write_text(path, "".join(line + "\n" for line in kept))  # whole: a kill must not lose the rows kept
