"""The loop: resuming is exact, NaN stops with names, and a run's folder is not another's."""

import copy
import json
import shutil
import signal
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny_runs import rows, same, weights

from pc_clip.core.cli import dump
from pc_clip.core.config.train import FinetuneConfig, PairwiseConfig, SamplerConfig
from pc_clip.core.errors import UserError
from pc_clip.data.differences import Difference, to_line
from pc_clip.data.training_data import load_dataset
from pc_clip.data.wordings import swap_roles
from pc_clip.models import fast_text, lora
from pc_clip.models.clip import SCRATCH
from pc_clip.models.loading import create_model
from pc_clip.train import methods, optim, run_folder
from pc_clip.train.loop import finetune
from pc_clip.train.methods import base, pairwise

pytestmark = pytest.mark.usefixtures("small_runs")


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> tuple[FinetuneConfig, Path]:
    """A run of twelve steps by PC-CLIP's loss, with anchor and mirror pairs: its settings, and the folder around it."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny_runs.make_small(patch)
        AcceleratorState._reset_state(reset_partial_state=True)
        config = tiny_runs.settings("pairwise", tiny, batch_size=16, steps=12, save_every=5, log_every=2)
        config.model.train = "text_blocks"
        config.pairwise = PairwiseConfig(anchor=1.0, anchor_captions=40, anchor_batch=4, mirror=True)
        finetune(config)
    return config, folder


@pytest.fixture
def config(finished, tmp_path) -> FinetuneConfig:
    """The settings of the finished run, which lies in runs/a here."""
    config, folder = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return copy.deepcopy(config)


def make(config: FinetuneConfig) -> base.BaseMethod:
    return methods.find(config.method).Method(create_model(config.model.name), load_dataset(config.data), config)


# -- the folder ----------------------------------------------------------------------------------------


def test_the_folder_holds_what_is_needed_to_repeat_it(config):
    run = Path("runs/a")
    assert yaml.safe_load((run / "config.yaml").read_text()) == yaml.safe_load(dump(config))
    about = json.loads((run / "environment.json").read_text())
    assert about["versions"]["torch"]
    assert about["start"] == create_model(config.model.name).weights_hash()
    assert set(about["data"]) == {"differences", "images", "captions"}
    assert any(note.startswith("text tower: the fast way") for note in about["notes"])
    assert str(Path.cwd()) not in (run / "environment.json").read_text() + (run / "config.yaml").read_text()
    assert [row["step"] for row in rows(run)] == [2, 4, 6, 8, 10, 12]


def test_a_finished_run_is_not_run_again_and_another_is_not_overwritten(config):
    written = Path("runs/a/model.safetensors").stat().st_mtime_ns
    run = finetune(config)
    assert (run / "model.safetensors").stat().st_mtime_ns == written
    config.train.lr = 2e-3
    with pytest.raises(UserError, match=r"other settings \(train\.lr: 0\.001 there, 0\.002 now\)"):
        finetune(config)
    config.overwrite = True
    finetune(config)
    assert (run / "model.safetensors").stat().st_mtime_ns > written


def test_a_run_whose_sentences_changed_is_neither_finished_nor_resumed(config):
    lines = Path("d.jsonl").read_text().splitlines(keepends=True)
    Path("d.jsonl").write_text("".join(reversed(lines)))
    for config.resume in (False, True):
        with pytest.raises(UserError, match="learnt from other data: its differences have changed"):
            finetune(config)


REFUSED = [
    ("train", "precision", "fp16", "precision fp16 would keep the weights in half precision"),
    ("train", "schedule", "linear", "schedule is 'linear'"),
    ("train", "tracker", "unknown", "tracker 'unknown' is not installed"),
    ("train", "optimizer", "sgd", "optimizer is 'sgd'"),
    ("train", "steps", 0, "steps is 0"),
    ("train", "warmup_share", 1.0, "train.warmup_share is 1"),
    ("train", "batch_size", 15, "odd"),
    ("train", "batch_size", 4000, "do not fill one batch of 4000"),
    ("pairwise", "loss", "nonsense", "pairwise.loss is 'nonsense'"),
    ("pairwise", "anchor_batch", 0, "anchor_batch is 0"),
    ("pairwise", "keep", 1.5, "pairwise.keep is 1.5; it is a share of the pairs, above 0 and at most 1"),
    ("pairwise", "keep_by", "alike", "pairwise.keep_by is 'alike'"),
    ("model", "train", "text_block", "model.train is 'text_block'"),
    ("model", "lora_rank", -1, "model.lora_rank is -1; it must be at least 0"),
    ("model", "lora_alpha", 4.0, "model.lora_alpha 4 means nothing without model.lora_rank"),
    ("data", "differences", "absent.jsonl", "absent.jsonl"),
]


def test_a_wrong_setting_does_not_overwrite_a_run(config):
    run, bad = Path("runs/a"), []
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    config.overwrite = True
    for part, setting, value, message in REFUSED:
        wrong = copy.deepcopy(config)
        setattr(getattr(wrong, part), setting, value)
        try:
            finetune(wrong)
            said = "nothing"
        except UserError as error:
            said = str(error)
        if message not in said or before != {path.name: path.read_bytes() for path in run.iterdir()}:
            bad.append(f"{part}.{setting} {value}: {said}")
    assert not bad, "\n".join(bad)


# -- what a run ends with ------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_run_and_another_seed_does_not(config):
    config.name = "b"
    assert same(weights("runs/a"), weights(finetune(config)))
    config.name, config.seed = "c", 1
    assert not same(weights("runs/a"), weights(finetune(config)))


@pytest.mark.parametrize("which", ["text_blocks", "all_text_but_embeddings", "text", "both"])
def test_only_what_was_named_changes(config, which):
    config.name, config.model.train, config.train.steps = "b", which, 2
    clip = create_model(config.model.name)
    expected = {n for n in lora.trainable(clip, which) if not n.startswith("logit_")}
    changed = tiny_runs.changed(weights(finetune(config)), clip.model.state_dict())
    learnt_from = {n for n in expected if not n.startswith("visual.")}  # images come from the cache
    assert changed <= expected and len(changed) > 0.8 * len(learnt_from)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["mse", "bf16", "compensated", "recompute", "plain"])
def test_every_ablation_learns(config, option, monkeypatch):
    config.name, config.train.steps, config.train.lr = "b", 30, 3e-3
    if option == "mse":
        config.pairwise.loss = "mse"
    elif option == "bf16":
        config.train.precision = "bf16"
    elif option == "plain":
        config.pairwise = PairwiseConfig()
    else:
        setattr(config.train, option, True)
    recomputed, original = [], fast_text.checkpoint
    monkeypatch.setattr(fast_text, "checkpoint", lambda *args, **how: recomputed.append(0) or original(*args, **how))
    loss = [row["loss"] for row in rows(finetune(config))]
    assert bool(recomputed) == config.train.recompute
    assert np.mean(loss[-3:]) < np.mean(loss[:3])


def test_averaging_with_the_start_is_halfway_between(config):
    config.name, config.train.blend = "b", 0.5
    half, end, start = weights(finetune(config)), weights("runs/a"), tiny_runs.start(config)
    name = "transformer.resblocks.0.mlp.c_fc.weight"
    assert not torch.equal(start[name], end[name])
    assert torch.allclose(half[name], (start[name] + end[name]) / 2, atol=1e-7)


# -- continued -----------------------------------------------------------------------------------------


def test_a_run_that_is_interrupted_and_continued_ends_the_same_bit_for_bit(config, monkeypatch):
    """Between two saves, by Ctrl-C, which ends the step and saves it, and between two saves again."""
    config.name = "b"
    tiny_runs.interrupt(config, 6)
    with pytest.raises(UserError, match="was interrupted. Continue it with --resume true"):
        finetune(config)
    config.resume, steps, original = True, [], pairwise.Method.forward

    def forward(self, batch):
        steps.append(0)
        if len(steps) == 3:  # it went on from step 5
            signal.raise_signal(signal.SIGINT)
        return original(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pairwise.Method, "forward", forward)
        finetune(config)
    assert len(steps) == 3
    tiny_runs.interrupt(config, 11)
    assert same(weights("runs/a"), weights(finetune(config)))
    assert [row["step"] for row in rows("runs/b")] == [2, 4, 6, 8, 10, 12]


def compensated(tiny: str, tiny_resnet: str) -> FinetuneConfig:
    return tiny_runs.settings("pairwise", tiny, compensated=True, lr=1e-8)  # most of each step is owed


def adapters(tiny: str, tiny_resnet: str) -> FinetuneConfig:
    config = tiny_runs.settings("pairwise", tiny, lr=1e-2)
    config.model.lora_rank = 2
    return config


def clusters(tiny: str, tiny_resnet: str) -> FinetuneConfig:
    config = tiny_runs.settings("contrastive", tiny, batch_size=24)
    config.sampler = SamplerConfig(kind="clusters", cluster_size=4)
    return config


def clusters_of_the_start(tiny: str, tiny_resnet: str) -> FinetuneConfig:
    config = clusters(tiny, tiny_resnet)
    config.sampler.online = False
    return config


def from_scratch(tiny: str, tiny_resnet: str) -> FinetuneConfig:
    config = clusters(tiny_resnet, tiny_resnet)
    config.model.pretrained, config.model.train, config.sampler.similarity = SCRATCH, "both", "image"
    return config


def crops(tiny: str, tiny_resnet: str) -> FinetuneConfig:
    config = tiny_runs.settings("preference", tiny)
    config.model.train, config.data.min_crop = "both", 0.5
    return config


def bf16(tiny: str, tiny_resnet: str) -> FinetuneConfig:
    config = tiny_runs.settings("preference", tiny, precision="bf16", optimizer="adamw")
    config.model.train = "both"
    return config


def change(tiny: str, tiny_resnet: str) -> FinetuneConfig:
    config = tiny_runs.settings("change", tiny)
    config.change.dropout, config.change.validation = 0.3, "val"
    return config


LONG = (compensated, adapters, clusters_of_the_start, from_scratch, bf16, crops, change)
CONTINUED = [clusters, *(pytest.param(each, marks=pytest.mark.slow) for each in LONG)]


@pytest.mark.parametrize("make_config", CONTINUED)
def test_a_run_continued_within_an_epoch_and_between_two_ends_the_same(
    make_config: Callable[..., FinetuneConfig], tiny, tiny_resnet
):
    config = make_config(tiny, tiny_resnet)
    config.train.steps, config.train.max_steps_per_epoch, config.train.save_every = 6, 3, 1
    tiny_runs.assert_resume_is_exact(config, 3, 5)
    state = load_file("runs/resumed/state.safetensors")
    if config.train.compensated:
        carries = [value for name, value in state.items() if name.endswith(".carry")]
        assert len(carries) == sum(name.startswith("weight.") for name in state)
        assert all(value.any() for value in carries)
    if config.method == "change":
        assert rows("runs/straight", "validation") == rows("runs/resumed", "validation") != []


@pytest.mark.parametrize("quick, kept", [(True, "bf16"), (False, "no")])
def test_a_run_keeps_the_precision_that_was_settled(config, monkeypatch, quick, kept):
    """So that it is continued as it began, and known again, on a machine of another kind."""
    monkeypatch.setattr(optim, "multiplies_bf16", lambda device: quick)
    config.name, config.train.precision, config.train.steps = "b", "auto", 6
    tiny_runs.interrupt(config, 3)
    monkeypatch.setattr(optim, "multiplies_bf16", lambda device: not quick)
    config.resume = True
    run = finetune(config)
    config.resume = False
    assert finetune(config) == run  # finished already
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["precision"] == kept
    config.overwrite = True
    assert run_folder.precision(run, config) is None  # settled anew


# -- no numbers ----------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_with_step_and_ids_and_keeps_the_last_good_state(config, monkeypatch):
    original, batches = pairwise.Method.forward, []

    def broken(self, batch):
        batches.append(batch)
        loss, logs = original(self, batch)
        return (loss * float("nan") if len(batches) == 8 else loss), logs

    config.name = "b"
    monkeypatch.setattr(pairwise.Method, "forward", broken)
    with pytest.raises(UserError, match=r"became nan at step 8, on 16 items beginning with train-\d+.*state") as error:
        finetune(config)
    assert batches[7].ids[0] in str(error.value)
    assert all(torch.isfinite(value).all() for value in load_file("runs/b/state.safetensors").values())


def test_weights_that_are_no_numbers_are_never_saved(config, monkeypatch):
    """A finite loss can still have an infinite gradient; the state on the disk must stay good."""
    real, steps = torch.optim.Adam.step, []

    def step(self, *args, **kwargs):
        steps.append(0)
        real(self, *args, **kwargs)
        if len(steps) == 7:
            self.param_groups[0]["params"][0].data[0, 0] = float("inf")

    config.name = "b"
    monkeypatch.setattr(torch.optim.Adam, "step", step)
    with pytest.raises(UserError, match="became nan"):
        finetune(config)
    assert all(torch.isfinite(value).all() for value in load_file("runs/b/state.safetensors").values())
    assert not Path("runs/b/model.safetensors").exists()


# -- pairwise --------------------------------------------------------------------------------------------


def test_mirror_pairs_put_both_orders_in_the_batch_with_first_and_second_exchanged(config):
    method = make(config)
    batch = next(method.loader(0))
    half = len(batch.first) // 2
    assert torch.equal(batch.first[:half], batch.second[half:])
    assert torch.equal(batch.second[:half], batch.first[half:])
    decode = method.clip.tokenizer.decode
    texts = [decode([t for t in batch.tokens[row].tolist() if 0 < t < 49406]) for row in batch.text]
    assert [swap_roles(text) for text in texts[:half]] == texts[half:]


def test_every_pair_comes_once_an_epoch_and_epochs_differ(config):
    method = make(config)
    first, second, again = ([key for batch in method.loader(n) for key in batch.ids[:8]] for n in (0, 1, 0))
    assert len(first) == len(set(first)) == method.steps_per_epoch * 8
    assert first == again != second


@pytest.mark.parametrize("method", ["pairwise", "contrastive"])
def test_an_epoch_can_be_joined_later_without_making_what_came_before(config, method, monkeypatch):
    if method == "contrastive":
        config = tiny_runs.settings("contrastive", config.model.name)
    found = make(config)
    whole = list(found.loader(1))
    assert len(whole) == found.steps_per_epoch > 4
    for skip in (0, 4, found.steps_per_epoch):
        later = list(found.loader(1, skip))
        assert [batch.ids for batch in later] == [batch.ids for batch in whole[skip:]]
        for one, other in zip(later, whole[skip:]):
            assert all(torch.equal(a, b) for a, b in zip(one[1:], other[1:]))
    made, original = [], base._take
    monkeypatch.setattr(base, "_take", lambda z, rows: made.append(0) or original(z, rows))
    assert len(list(islice(found.loader(0, 4), 1))) == len(made) == 1


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


def test_pairs_that_cannot_teach_are_dropped_and_counted(config):
    with Path("d.jsonl").open("a") as file:
        file.write(to_line(Difference("train-00003", "train-00003", "The first image equals the second.")))
        file.write(to_line(Difference("train-00003", "train-00004", "Something is different.")))
    notes = make(config).notes
    assert "1 pairs of equal images dropped" in notes
    assert any(note.startswith("1 sentences dropped that do not name both images") for note in notes)


def test_a_file_of_which_no_batch_can_be_made_says_why(config):
    for second, text, message in (
        (
            "train-00002",
            "Something is different.",
            "none of the 1 differences in d.jsonl can be used: 1 sentences",
        ),
        ("cat", "The first is not the second one.", r"difference 1 of d\.jsonl is about image 'cat'"),
        ("train-00002", "The first is not the second one.", "1 differences do not fill one batch of 16"),
    ):
        Path("d.jsonl").write_text(to_line(Difference("train-00001", second, text)))
        with pytest.raises(UserError, match=message):
            make(config)
