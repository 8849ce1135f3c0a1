"""Checkpoints: what was saved comes back, and what is no checkpoint is refused without running it."""

import argparse
import os
import pickle
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from pc_clip.core.errors import UserError
from pc_clip.models import loading
from pc_clip.models.clip import model_folder
from pc_clip.models.loading import create_model


def test_a_saved_model_comes_back_with_its_name_and_weights(example_clip, tmp_path):
    loading.save_model(tmp_path / "run" / "model.safetensors", example_clip)
    for path in (tmp_path / "run", tmp_path / "run" / "model.safetensors"):
        clip = loading.load_model(path)
        assert (clip.name, clip.weights_hash()) == ("example", example_clip.weights_hash())


@pytest.mark.slow
def test_open_clip_loads_our_checkpoint_and_transform(tmp_path):
    """Some pretrained tags have a transform of their own; a finetuned model must keep it."""
    transform, path = {"mean": (0.5,) * 3, "std": (0.5,) * 3}, tmp_path / "model.safetensors"
    clip = loading.complete(
        open_clip.create_model("RN50", load_weights=False, force_preprocess_cfg=transform), "RN50", None
    )
    loading.save_model(path, clip)
    loaded = open_clip.create_model("RN50", pretrained=str(path))
    assert all(torch.equal(a, b) for a, b in zip(clip.model.state_dict().values(), loaded.state_dict().values()))
    again = loading.load_model(path)
    assert repr(again.preprocess) == repr(clip.preprocess)
    assert again.image_tower_hash() == clip.image_tower_hash()


@pytest.mark.slow
def test_another_architecture_is_named_with_the_first_weight_that_differs(example_clip, tmp_path):
    state = dict(example_clip.model.state_dict())
    state["text_projection"] = torch.zeros(64, 64)
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt does not fit example: .*size mismatch for text_projection: .*64"):
        loading.load_model(tmp_path / "other.pt", name="example")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "fc.pt")
    with pytest.raises(UserError, match="Missing key.*--model.name"):
        loading.load_model(tmp_path / "fc.pt", name="example")


def test_a_file_cut_short_is_said_to_be(example_clip, tmp_path):
    torch.save(example_clip.model.state_dict(), tmp_path / "model.pt")
    loading.save_model(tmp_path / "model.safetensors", example_clip)
    for path in tmp_path.glob("model.*"):
        content = path.read_bytes()
        for length in (len(content) // 2, 40, 0):
            path.write_bytes(content[:length])
            with pytest.raises(UserError, match="not a whole"):
                loading.load_model(path, name="example")


class _Attack:
    def __reduce__(self):
        return os.system, ("touch attacked",)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    torch.save({"weights": _Attack()}, tmp_path / "new.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(_Attack()))
    for name in ("new.pt", "old.pt"):
        with pytest.raises(UserError, match="more than weights|not a whole"):
            loading.load_model(tmp_path / name, name="example")
    assert not Path("attacked").exists()


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model folder without weights: the config of the shipped one."""
    made = tmp_path / "mine"
    made.mkdir()
    shutil.copy(model_folder("example") / "open_clip_config.json", made)
    return made


def test_weights_come_from_the_named_file_or_fail(folder, example_clip, tmp_path):
    state, name = example_clip.model.state_dict(), f"local-dir:{folder}"
    with pytest.raises(UserError, match="holds no weights under a name that is known"):
        create_model(name)
    torch.save({"state_dict": state}, folder / "epoch_10.pt")
    with pytest.raises(UserError, match=r"it has epoch_10\.pt: name one with --model\.pretrained"):
        create_model(name)
    for pretrained in (str(folder / "epoch_10.pt"), None):
        if pretrained is None:
            save_file(state, folder / "open_clip_model.safetensors")
        clip = create_model(name, pretrained)
        assert all(torch.equal(value, state[key]) for key, value in clip.model.state_dict().items())
    with pytest.raises(UserError, match="'laion2b' is not a file; .* takes the weights in its folder"):
        create_model(name, "laion2b")
    del state["text_projection"]
    torch.save(state, tmp_path / "cut.pt")
    with pytest.raises(UserError, match="Missing key.*text_projection"):
        create_model(name, str(tmp_path / "cut.pt"))


@pytest.mark.slow
def test_every_door_takes_the_same_files(tiny, tmp_path):
    """What wrappers put before names, a logit_scale of one dimension, and both kinds of file."""
    state, name, bad = dict(create_model(tiny).model.state_dict()), tiny, []
    for prefix in ("", "module.", "_orig_mod.module.", "model.", "clip."):
        wrapped = {f"{prefix}{key}": value for key, value in state.items()}
        wrapped[f"{prefix}logit_scale"] = state["logit_scale"].reshape(1)
        torch.save({"state_dict": wrapped, "epoch": 3} if prefix else wrapped, tmp_path / "a.pt")
        save_file(wrapped, tmp_path / "a.safetensors")
        for file in (tmp_path / "a.pt", tmp_path / "a.safetensors"):
            for clip in (create_model(name, str(file)), loading.load_model(file, name)):
                same = all(torch.equal(value, state[key]) for key, value in clip.model.state_dict().items())
                bad += [] if same else [(prefix, file.name)]
    assert not bad


def test_a_file_that_holds_no_weights_is_told_by_what_it_holds(tmp_path):
    path = tmp_path / "weights.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    for content, message in (
        (path.read_bytes(), r"is a TorchScript archive.*torch\.jit\.load"),
        (b"<html>404</html>", r"not written by torch\.save: it begins with b'<html>404"),
        (b"version https://git-lfs.github.com/spec/v1", "a pointer of Git LFS, fetch the file itself"),
        (b"\x80\x02(X\x01", "not a whole checkpoint"),
        (pickle.dumps({"a": argparse.Namespace()}, protocol=2), r"\(Unsupported global: GLOBAL argparse\.Namespace"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message) as error:
            loading.load_model(path)
        assert "weights_only" not in str(error.value)  # torch's advice would run the file
