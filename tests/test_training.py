"""The loop: resuming is exact, NaN stops with names, and a run's folder is not another's."""

import copy
import json
import shutil
import signal
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
from pc_clip.core.config.train import FinetuneConfig, PairwiseConfig, RetainConfig
from pc_clip.core.errors import UserError
from pc_clip.data.differences import Difference, to_line
from pc_clip.data.training_data import load_dataset
from pc_clip.data.wordings import swap_roles
from pc_clip.models import fast_text, lora
from pc_clip.models.clip import SCRATCH
from pc_clip.models.loading import create_model
from pc_clip.train import methods
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
        config.pairwise = PairwiseConfig(mirror=True)
        config.retain = RetainConfig(texts=1.0, captions=40, batch=4)
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
    assert set(about["data"]) == {"differences", "images", "captions", "retain", "starting weights"}
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


def test_a_run_is_not_continued_from_other_weights(config, monkeypatch):
    config.name, config.resume = "from_others", True
    monkeypatch.setattr(pairwise.Method, "forward", lambda self, batch: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        finetune(config)
    environment = Path("runs/from_others/environment.json")
    about = json.loads(environment.read_text())
    about["data"]["starting weights"] = "others"
    environment.write_text(json.dumps(about))
    with pytest.raises(UserError, match="its starting weights have changed since"):
        finetune(config)


REFUSED = [
    ("train.precision", "fp8", "precision is 'fp8'"),
    ("train.schedule", "linear", "schedule is 'linear'"),
    ("train.tracker", "unknown", "tracker 'unknown' is not installed"),
    ("train.steps", 0, "steps is 0"),
    ("train.warmup_share", 1.0, "train.warmup_share is 1"),
    ("train.batch_size", 15, "odd"),
    ("train.batch_size", 4000, "do not fill one batch of 4000"),
    ("pairwise.loss", "nonsense", "pairwise.loss is 'nonsense'"),
    ("retain.batch", 0, "retain.batch is 0"),
    ("pairwise.keep", 1.5, "pairwise.keep is 1.5; it is a share of the pairs, above 0 and at most 1"),
    ("pairwise.keep_by", "alike", "pairwise.keep_by is 'alike'"),
    ("model.train", "text_block", "model.train is 'text_block'"),
    ("model.lora_rank", -1, "model.lora_rank is -1; it must be at least 0"),
    ("model.lora_alpha", 4.0, "model.lora_alpha 4 means nothing without model.lora_rank"),
    ("data.differences", "absent.jsonl", "absent.jsonl"),
]


def contents(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.iterdir()}


def test_a_wrong_setting_does_not_overwrite_a_run(config):
    before, bad = contents(Path("runs/a")), []
    for setting, value, message in REFUSED:
        pattern = tiny_runs.attempt(tiny_runs.put(config, {"overwrite": True, setting: value}))
        if message not in pattern or before != contents(Path("runs/a")):
            bad.append(f"{setting} {value}: {pattern}")
    assert not bad, "\n".join(bad)


# -- what a run ends with ------------------------------------------------------------------------------


def test_another_seed_gives_another_run(config):
    config.name, config.seed = "c", 1
    assert not same(weights("runs/a"), weights(finetune(config)))


@pytest.mark.parametrize("which", ["all_text_but_embeddings", "both"])
def test_only_what_was_named_changes(config, which):
    config.name, config.model.train, config.train.steps = "b", which, 2
    clip = create_model(config.model.name)
    expected = {n for n in lora.trainable(clip, which) if not n.startswith("logit_")}
    changed = tiny_runs.changed(weights(finetune(config)), clip.model.state_dict())
    assert changed <= expected and len(changed) > 0.8 * len(expected)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["mse", "bf16", "recompute", "plain"])
def test_every_ablation_learns(config, option, monkeypatch):
    config.name, config.train.steps, config.train.lr = "b", 30, 3e-3
    if option in ("mse", "plain"):
        config.pairwise = PairwiseConfig("mse" if option == "mse" else "info_nce")
    config.train.precision = "bf16" if option == "bf16" else "no"
    config.train.recompute = option == "recompute"
    recomputed, original = [], fast_text.checkpoint
    monkeypatch.setattr(fast_text, "checkpoint", lambda *args, **how: recomputed.append(0) or original(*args, **how))
    loss = [row["loss"] for row in rows(finetune(config))]
    assert bool(recomputed) == config.train.recompute
    assert np.mean(loss[-3:]) < np.mean(loss[:3])


# -- continued -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_interrupted_run_resumes_bit_for_bit(config, monkeypatch):
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


CLUSTERS = {"train.batch_size": 24, "sampler.kind": "clusters", "sampler.cluster_size": 4}
BOTH = {"model.train": "both"}
CONTINUED = {  # method and settings
    "clusters": ("contrastive", CLUSTERS),
    "clusters of the start": ("contrastive", CLUSTERS | {"sampler.online": False}),
    "from scratch": ("contrastive", CLUSTERS | BOTH | {"model.pretrained": SCRATCH, "sampler.similarity": "image"}),
    "compensated": ("pairwise", {"train.compensated": True, "train.lr": 1e-8}),  # most of each step is owed
    "adapters": ("pairwise", {"train.lr": 1e-2, "model.lora_rank": 2}),
    "bf16": ("preference", BOTH | {"train.precision": "bf16", "train.optimizer": "adamw"}),
    "crops": ("preference", BOTH | {"data.min_crop": 0.5}),
    "change": ("change", {"change.dropout": 0.3, "change.validation": "val"}),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in CONTINUED if name != "clusters"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clusters", *SLOW])
def test_a_run_continued_within_an_epoch_and_between_two_ends_the_same(name, tiny, tiny_resnet):
    method, settings = CONTINUED[name]
    config = tiny_runs.put(tiny_runs.settings(method, tiny_resnet if name == "from scratch" else tiny), settings)
    config.train.steps, config.train.max_steps_per_epoch, config.train.save_every = 6, 3, 1
    tiny_runs.assert_resume_is_exact(config, 3, 5)
    state = load_file("runs/resumed/state.safetensors")
    if config.train.compensated:
        carries = [value for name, value in state.items() if name.endswith(".carry")]
        assert len(carries) == sum(name.startswith("weight.") for name in state)
        assert all(value.any() for value in carries)
    if config.method == "change":
        assert rows("runs/straight", "validation") == rows("runs/resumed", "validation") != []


# -- no numbers ----------------------------------------------------------------------------------------


def test_a_nan_loss_stops_with_step_and_ids_and_keeps_the_state(config, monkeypatch):
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


def test_mirror_pairs_are_in_the_batch_with_exchanged_names(config):
    method = make(config)
    batch = next(method.loader(0))
    half = len(batch.first) // 2
    assert torch.equal(batch.first[:half], batch.second[half:])
    assert torch.equal(batch.second[:half], batch.first[half:])
    decode = method.clip.tokenizer.decode
    texts = [decode([t for t in batch.tokens[row].tolist() if 0 < t < 49406]) for row in batch.text]
    assert [swap_roles(text) for text in texts[:half]] == texts[half:]


@pytest.mark.parametrize("method", ["pairwise", "contrastive"])
def test_an_epoch_can_be_joined_later_without_making_what_came_before(config, method, monkeypatch):
    if method == "contrastive":
        config = tiny_runs.settings("contrastive", config.model.name)
    actual = make(config)
    whole, other = list(actual.loader(1)), list(actual.loader(0))
    assert len(whole) == actual.steps_per_epoch > 4 and [b.ids for b in whole] != [b.ids for b in other]
    for skip in (0, 4, actual.steps_per_epoch):
        later = list(actual.loader(1, skip))
        assert [batch.ids for batch in later] == [batch.ids for batch in whole[skip:]]
        for one, other in zip(later, whole[skip:]):
            assert all(torch.equal(a, b) for a, b in zip(one[1:], other[1:]))
    made, original = [], base._take
    monkeypatch.setattr(base, "_take", lambda z, rows: made.append(0) or original(z, rows))
    assert len(list(islice(actual.loader(0, 4), 1))) == len(made) == 1


def test_the_step_is_the_loss_of_the_papers_equation(config):
    config.retain.texts = 0.0
    method = make(config)
    batch = next(method.loader(0))
    with torch.no_grad():
        actual = method(batch)[0].item()
        text = method.clip.model.encode_text(torch.nn.functional.pad(batch.tokens, (0, 77 - batch.tokens.shape[1])))
    z = (batch.images / batch.images.norm(dim=-1, keepdim=True)).double().numpy()
    t = text[batch.text].double().numpy()
    d = z[batch.first] - z[batch.second]
    logits = (t / np.linalg.norm(t, axis=1, keepdims=True)) @ (d / np.linalg.norm(d, axis=1, keepdims=True)).T
    log_softmax = [x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (logits, logits.T)]
    assert actual == pytest.approx(-np.mean([np.diag(x).mean() for x in log_softmax]), rel=1e-5)


def test_a_file_of_which_no_batch_can_be_made_says_why(config):
    fine = "The first is not the second one."
    for second, text, message in (
        ("train-00002", "Something is different.", "none of the 1 differences in d.jsonl can be used: 1 sentences"),
        ("cat", fine, r"difference 1 of d\.jsonl is about image 'cat'"),
        ("train-00002", fine, "1 differences do not fill one batch of 16"),
    ):
        Path("d.jsonl").write_text(to_line(Difference("train-00001", second, text)))
        with pytest.raises(UserError, match=message):
            make(config)


def test_what_accelerate_is_asked_for_and_would_have_no_effect_is_refused(tiny, monkeypatch):
    config = tiny_runs.settings("pairwise", tiny, steps=1)
    for name, value, message in [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps 4.*--train.recompute true"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "asked for bf16, and train.precision is no"),
    ]:
        monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=message):
            finetune(config)
        monkeypatch.delenv(name)
