"""The loop: resuming is exact, schedules are right, several processes equal one, and NaN stops with names."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import sample_differences
import torch
import yaml
from interrupting import stop_at
from safetensors.torch import load_file

from pc_clip.core.cli import dump
from pc_clip.core.config.train import ContrastiveConfig, FinetuneConfig, PairwiseConfig, TrainConfig
from pc_clip.core.errors import UserError
from pc_clip.data.differences import Difference, swap_roles, to_line
from pc_clip.data.registry import open_dataset
from pc_clip.data.training_data import load_dataset
from pc_clip.models import fast_text, lora
from pc_clip.models.clip import Clip
from pc_clip.train import methods, optim, run_folder
from pc_clip.train.loop import finetune
from pc_clip.train.methods import base, pairwise
from pc_clip.train.optim import learning_rate


@pytest.fixture
def config(small_example, tmp_path) -> FinetuneConfig:
    """A run of twelve steps over the first training scenes, with anchor and mirror pairs."""
    sample_differences.write(Path("d.jsonl"))
    found = FinetuneConfig(name="a", out="runs", device="cpu")
    found.model.train = "text_blocks"
    found.data.split, found.data.differences = "train", "d.jsonl"
    found.train = TrainConfig(batch_size=16, steps=12, lr=1e-3, save_every=5, log_every=2, threads=1)
    found.pairwise = PairwiseConfig(anchor=1.0, anchor_captions=40, anchor_batch=4, mirror=True)
    found.contrastive = ContrastiveConfig()
    return found


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_ctrl_c_ends_the_step_saves_it_and_resuming_loses_nothing(config, monkeypatch):
    straight = weights(finetune(config))
    config.name = "b"
    original = pairwise.Method.forward
    calls = []

    def forward(self, batch):
        calls.append(batch)
        if len(calls) == 8:
            signal.raise_signal(signal.SIGINT)
        return original(self, batch)

    monkeypatch.setattr(pairwise.Method, "forward", forward)
    with pytest.raises(KeyboardInterrupt):
        finetune(config)
    assert len(calls) == 8
    config.resume = True
    assert same(straight, weights(finetune(config)))
    assert len(calls) == 12


@pytest.mark.parametrize("step", [5, 6, 9, 11])
def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(config, monkeypatch, step):
    straight = weights(finetune(config))
    config.name = "b"
    with monkeypatch.context() as context:
        stop_at(context, step)
        with pytest.raises(KeyboardInterrupt):
            finetune(config)
    with pytest.raises(UserError, match="was interrupted. Continue it with --resume true"):
        finetune(config)
    config.resume = True
    assert same(straight, weights(finetune(config)))
    rows = [json.loads(line) for line in Path("runs/b/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    assert rows[-1]["step"] == 12


def test_a_resumed_run_with_compensated_steps_ends_the_same_because_it_keeps_what_is_owed(config, monkeypatch):
    config.train.compensated, config.train.lr = True, 1e-8  # most of each step is owed
    straight = weights(finetune(config))
    config.name = "b"
    with monkeypatch.context() as context:
        stop_at(context, 6)
        with pytest.raises(KeyboardInterrupt):
            finetune(config)
    state = load_file("runs/b/state.safetensors")
    carries = {key: value for key, value in state.items() if key.endswith(".carry")}
    assert {key.split(".")[0] for key in carries} == {"optimizer"}
    assert len(carries) == sum(key.startswith("weight.") for key in state)
    assert all(value.any() for value in carries.values())
    config.resume = True
    assert same(straight, weights(finetune(config)))


def test_the_same_seed_gives_the_same_run_and_another_seed_does_not(config):
    one = weights(finetune(config))
    config.name = "b"
    assert same(one, weights(finetune(config)))
    config.name, config.seed = "c", 1
    assert not same(one, weights(finetune(config)))


@pytest.mark.parametrize("which", ["text_blocks", "all_text_but_embeddings", "text", "both"])
def test_only_what_was_named_changes(config, which):
    config.model.train, config.train.steps = which, 2
    start, end = Clip.create("example"), weights(finetune(config))
    expected = {n for n in lora.trainable(start, which) if not n.startswith("logit_")}
    changed = {n for n, p in start.model.state_dict().items() if not torch.equal(p, end[n])}
    assert changed <= expected
    assert len(changed) > 0.8 * len(expected)


@pytest.mark.parametrize("option", ["mse", "contrastive", "bf16", "compensated", "recompute", "plain"])
def test_every_ablation_learns(config, option, monkeypatch):
    if option == "mse":
        config.pairwise.loss = "mse"
    elif option == "bf16":
        config.train.precision = "bf16"
    elif option in ("compensated", "recompute"):
        setattr(config.train, option, True)
    elif option == "contrastive":
        config.method, config.contrastive.temperature = (
            "contrastive",
            1.0,
        )  # at the model's own it is near its floor already
    else:
        config.pairwise = PairwiseConfig()
    config.train.steps, config.train.lr = 40, 3e-3
    recomputed, original = [], fast_text.checkpoint
    monkeypatch.setattr(fast_text, "checkpoint", lambda *args, **how: recomputed.append(0) or original(*args, **how))
    run = finetune(config)
    assert bool(recomputed) == config.train.recompute
    loss = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert np.mean(loss[-3:]) < np.mean(loss[:3])


def test_the_folder_holds_what_is_needed_to_repeat_it(config):
    run = finetune(config)
    assert yaml.safe_load((run / "config.yaml").read_text()) == yaml.safe_load(dump(config))
    about = json.loads((run / "environment.json").read_text())
    assert about["versions"]["torch"]
    assert about["start"] == Clip.create("example").weights_hash()
    assert set(about["data"]) == {"differences", "images", "captions"}
    assert str(Path.cwd()) not in (run / "environment.json").read_text() + (run / "config.yaml").read_text()


def test_the_folder_says_which_way_texts_were_encoded(config):
    config.train.steps = 1
    for config.name, config.model.fast_text, said in (
        ("a", True, "text tower: the fast way"),
        ("b", False, "text tower: open_clip's own, as model.fast_text false asks"),
    ):
        notes = json.loads((finetune(config) / "environment.json").read_text())["notes"]
        assert [note[: len(said)] for note in notes if note.startswith("text tower")] == [said]


def test_batches_are_made_in_a_thread_of_their_own(config, monkeypatch):
    names, original = [], pairwise.Method.loader

    def loader(self, *args):
        for batch in original(self, *args):
            names.append(threading.current_thread().name)
            yield batch

    monkeypatch.setattr(pairwise.Method, "loader", loader)
    finetune(config)
    assert len(names) >= 12
    assert set(names) == {"batches"}


def test_a_finished_run_is_not_run_again_and_another_is_not_overwritten(config):
    run = finetune(config)
    written = (run / "model.safetensors").stat().st_mtime_ns
    finetune(config)
    assert (run / "model.safetensors").stat().st_mtime_ns == written
    config.train.lr = 2e-3
    with pytest.raises(UserError, match=r"other settings \(train\.lr: 0\.001 there, 0\.002 now\)"):
        finetune(config)
    config.overwrite = True
    finetune(config)
    assert (run / "model.safetensors").stat().st_mtime_ns > written


def without_newer_settings(run: Path) -> None:
    """A config.yaml as it was before these settings were there."""
    path = run / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    for part, name in (("model", "fast_text"), ("train", "compensated"), ("train", "recompute")):
        del settings[part][name]
    path.write_text(yaml.safe_dump(settings, sort_keys=False))


def test_a_run_of_an_earlier_version_is_known_as_finished_and_as_another(config):
    run = finetune(config)
    without_newer_settings(run)
    written = (run / "model.safetensors").stat().st_mtime_ns
    finetune(config)
    assert (run / "model.safetensors").stat().st_mtime_ns == written
    config.train.compensated = True  # which that version did not do
    with pytest.raises(UserError, match=r"other settings \(train\.compensated: False there, True now\)"):
        finetune(config)


def test_a_run_of_an_earlier_version_can_be_continued(config, monkeypatch):
    straight = weights(finetune(config))
    config.name = "b"
    with monkeypatch.context() as context:
        stop_at(context, 6)
        with pytest.raises(KeyboardInterrupt):
            finetune(config)
    without_newer_settings(Path("runs/b"))
    config.resume = True
    assert same(straight, weights(finetune(config)))


@pytest.mark.parametrize("quick, kept", [(True, "bf16"), (False, "no")])
def test_a_run_keeps_what_was_settled(config, monkeypatch, quick, kept):
    """So that it is continued as it began, and known again, on a machine of another kind."""
    monkeypatch.setattr(optim, "multiplies_bf16", lambda device: quick)
    config.train.precision, config.train.steps = "auto", 6
    with pytest.MonkeyPatch.context() as context:
        stop_at(context, 3)
        with pytest.raises(KeyboardInterrupt):
            finetune(config)
    assert config.train.precision == "auto"
    monkeypatch.setattr(optim, "multiplies_bf16", lambda device: not quick)
    config.resume = True
    run = finetune(config)
    config.resume = False
    assert finetune(config) == run  # finished already
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["precision"] == kept
    config.overwrite = True
    assert run_folder.precision(run, config) is None  # settled anew


def test_a_wrong_setting_does_not_overwrite_a_run(config):
    config.train.steps = 1
    run = finetune(config)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    config.overwrite = True
    for part, setting, value, message in (
        ("train", "precision", "fp16", "precision fp16 would keep the weights in half precision"),
        ("train", "schedule", "linear", "schedule is 'linear'"),
        ("train", "tracker", "unknown", "tracker 'unknown' is not installed"),
        ("train", "optimizer", "sgd", "optimizer is 'sgd'"),
        ("train", "batch_size", 4000, "do not fill one batch of 4000"),
        ("pairwise", "loss", "nonsense", "pairwise.loss is 'nonsense'"),
        ("pairwise", "anchor_batch", 0, "anchor_batch is 0"),
        ("model", "train", "text_block", "model.train is 'text_block'"),
        ("data", "differences", "absent.jsonl", "absent.jsonl"),
    ):
        options = getattr(config, part)
        right = getattr(options, setting)
        setattr(options, setting, value)
        with pytest.raises(UserError, match=message):
            finetune(config)
        setattr(options, setting, right)
        changed = [path.name for path in run.iterdir() if before.get(path.name) != path.read_bytes()]
        assert not changed and len(list(run.iterdir())) == len(before), f"{part}.{setting} {value}"


def test_a_run_whose_sentences_changed_is_neither_finished_nor_resumed(config):
    finetune(config)
    lines = Path("d.jsonl").read_text().splitlines(keepends=True)
    Path("d.jsonl").write_text("".join(reversed(lines)))
    for config.resume in (False, True):
        with pytest.raises(UserError, match="learnt from other data: its differences have changed"):
            finetune(config)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("batch_size", 0, "batch_size is 0"),
        ("steps", 0, "steps is 0"),
        ("log_every", 0, "log_every is 0"),
        ("batch_size", 15, "odd"),
    ],
)
def test_numbers_that_cannot_be_are_refused(config, setting, value, message):
    setattr(config.train, setting, value)
    with pytest.raises(UserError, match=message):
        finetune(config)
    assert not Path("runs").exists()


def test_weights_that_are_no_numbers_are_never_saved(config, monkeypatch):
    """A finite loss can still have an infinite gradient; the state on the disk must stay good."""
    real = torch.optim.Adam.step
    steps = []

    def step(self, *args, **kwargs):
        steps.append(0)
        real(self, *args, **kwargs)
        if len(steps) == 7:
            self.param_groups[0]["params"][0].data[0, 0] = float("inf")

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    with pytest.raises(UserError, match="became nan"):
        finetune(config)
    state = load_file("runs/a/state.safetensors")
    assert all(torch.isfinite(value).all() for value in state.values())
    assert not Path("runs/a/model.safetensors").exists()


def test_averaging_with_the_start_is_halfway_between(config):
    end = weights(finetune(config))
    config.name, config.train.blend = "b", 0.5
    half, start = weights(finetune(config)), Clip.create("example").model.state_dict()
    name = "transformer.resblocks.0.mlp.c_fc.weight"
    assert torch.allclose(half[name], (start[name] + end[name]) / 2, atol=1e-7)


def test_a_loss_that_is_no_number_stops_with_step_and_ids_and_keeps_the_last_good_state(config, monkeypatch):
    original = pairwise.Method.forward
    calls = []

    def broken(self, batch):
        calls.append(batch)
        loss, logs = original(self, batch)
        return (loss * float("nan") if len(calls) == 8 else loss), logs

    monkeypatch.setattr(pairwise.Method, "forward", broken)
    with pytest.raises(
        UserError, match=r"became nan at step 8, on 16 items beginning with train-\d+\|train-\d+.*state"
    ) as error:
        finetune(config)
    assert calls[7].ids[0] in str(error.value)
    monkeypatch.undo()
    state = load_file("runs/a/state.safetensors") if Path("runs/a/state.safetensors").exists() else None
    assert state is None or all(torch.isfinite(v).all() for v in state.values())


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("exponential", [0.5, 1, 1, 0.9, 0.9, 0.9, 0.81, 0.81, 0.81, 0.729]),
        ("cosine", [0.5] + [0.5 * (1 + np.cos(np.pi * (s - 2) / 8)) if s >= 2 else 1 for s in range(1, 10)]),
    ],
)
def test_schedules(schedule, expected):
    train = TrainConfig(schedule=schedule, lr=1.0, decay=0.9, warmup_steps=2)
    assert [learning_rate(train, s, 3, 10) for s in range(10)] == pytest.approx(expected)


# -- pairwise --------------------------------------------------------------------------------------------


def make(config) -> pairwise.Method:
    return methods.find("pairwise").Method(Clip.create("example"), load_dataset(config.data), config)


def test_mirror_pairs_put_both_orders_in_the_batch_with_first_and_second_exchanged(config):
    method = make(config)
    batch = next(method.loader(0))
    half = len(batch.first) // 2
    assert torch.equal(batch.first[:half], batch.second[half:])
    assert torch.equal(batch.second[:half], batch.first[half:])
    decode = method.clip.tokenizer.decode
    texts = [decode([t for t in batch.tokens[row].tolist() if 0 < t < 49406]) for row in batch.text]
    for forward, backward in zip(texts[:half], texts[half:]):
        assert swap_roles(forward) == backward


def test_every_pair_comes_once_an_epoch_and_epochs_differ(config):
    method = make(config)
    first, second = ([key for batch in method.loader(epoch) for key in batch.ids[:8]] for epoch in (0, 1))
    assert len(first) == len(set(first)) == method.steps_per_epoch * 8
    assert first != second
    assert first == [key for batch in method.loader(0) for key in batch.ids[:8]]


@pytest.mark.parametrize("method", ["pairwise", "contrastive"])
def test_an_epoch_can_be_joined_later_without_making_what_came_before(config, method, monkeypatch):
    if method == "contrastive":
        config.train.batch_size, config.train.log_every = 40, 1  # what is only for the log is NaN elsewhere
    config.method = method
    found = methods.find(method).Method(Clip.create("example"), load_dataset(config.data), config)
    for epoch in (0, 1):
        whole = list(found.loader(epoch))
        assert len(whole) == found.steps_per_epoch > 4
        for skip in (0, 1, 4, found.steps_per_epoch):
            later = list(found.loader(epoch, skip))
            assert [batch.ids for batch in later] == [batch.ids for batch in whole[skip:]]
            for one, other in zip(later, whole[skip:]):
                assert all(torch.equal(a, b) for a, b in zip(one[1:], other[1:]))
    made, original = [], base._take
    monkeypatch.setattr(base, "_take", lambda z, rows: made.append(0) or original(z, rows))
    assert len(list(islice(found.loader(0, 4), 1))) == len(made) == 1


def test_pairs_that_cannot_teach_are_dropped_and_counted(config, tmp_path, monkeypatch):
    ids = open_dataset("example", split="train").ids
    with Path("d.jsonl").open("a") as file:
        file.write(to_line(Difference(ids[3], ids[3], "The first image equals the second.")))
        file.write(to_line(Difference(ids[3], ids[4], "Something is different.")))
    notes = make(config).notes
    assert "1 pairs of equal images dropped" in notes
    assert any(note.startswith("1 sentences dropped that do not name both images") for note in notes)


def test_the_step_is_the_loss_of_the_papers_equation(config):
    config.pairwise.anchor = 0.0
    method = make(config)
    batch = next(method.loader(0))
    with torch.no_grad():
        found = method(batch)[0].item()
        text = method.clip.model.encode_text(torch.nn.functional.pad(batch.tokens, (0, 77 - batch.tokens.shape[1])))
    z = (batch.images / batch.images.norm(dim=-1, keepdim=True)).double().numpy()
    t = text[batch.text].double().numpy()
    d = z[batch.first] - z[batch.second]
    logits = (t / np.linalg.norm(t, axis=1, keepdims=True)) @ (d / np.linalg.norm(d, axis=1, keepdims=True)).T
    log_softmax = [x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (logits, logits.T)]
    assert found == pytest.approx(-np.mean([np.diag(x).mean() for x in log_softmax]), rel=1e-5)


def test_a_file_without_one_usable_difference_says_why(config):
    Path("d.jsonl").write_text(to_line(Difference("train-00001", "train-00002", "Something is different.")))
    with pytest.raises(
        UserError, match="none of the 1 differences in d.jsonl can be used: 1 sentences dropped that do not"
    ):
        make(config)


def test_differences_about_unknown_images_name_the_image_and_a_small_file_says_so(config):
    Path("d.jsonl").write_text(to_line(Difference("train-00001", "cat", "The first is not the second one.")))
    with pytest.raises(UserError, match=r"difference 1 of d\.jsonl is about image 'cat'"):
        make(config)
    Path("d.jsonl").write_text(to_line(Difference("train-00001", "train-00002", "The first is not the second one.")))
    with pytest.raises(UserError, match="1 differences do not fill one batch of 16"):
        make(config)


WORKER = """
import sys
import torch
from test_training import *  # noqa: F403
from pc_clip.datasets import embedded
from accelerate import Accelerator
embedded.EXAMPLE_SIZES = {"train": 300, "val": 60, "test": 80}
config = FinetuneConfig(name=sys.argv[1], out="runs", device="cpu")
config.data.split, config.data.differences = "train", "d.jsonl"
config.train = TrainConfig(batch_size=16, steps=4, lr=1e-3, threads=1)
config.pairwise = PairwiseConfig(anchor=1.0, anchor_captions=40, anchor_batch=4, mirror=True)
finetune(config)
"""


def test_two_processes_train_as_one_with_the_whole_batch_does(config):
    """Same global batch, same loss, same weights up to the order of summation."""
    Path("worker.py").write_text(WORKER)
    here = str(Path(__file__).parent)
    environment = os.environ | {
        "PYTHONPATH": f"{here}:{Path(here).parent}",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
    }
    subprocess.run([sys.executable, "worker.py", "one"], env=environment, check=True, capture_output=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    subprocess.run([*launch, "worker.py", "two"], env=environment, check=True, capture_output=True)
    one, two = weights(Path("runs/one")), weights(Path("runs/two"))
    start = Clip.create("example").model.state_dict()
    learnt = lora.trainable(Clip.create("example"), "text_blocks")
    moved, apart = (torch.cat([(one[k] - other[k]).flatten() for k in learnt]).norm() for other in (start, two))
    assert moved > 0.1
    assert apart < 0.02 * moved  # Adam's first steps are signs, so gradients near zero may part
    loss = [
        [json.loads(line)["loss"] for line in Path(f"runs/{n}/metrics.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    ]
    assert loss[0] == pytest.approx(loss[1], rel=1e-4)
