"""What a file of weights does not say: its image transform and its activation (models/tags.py)."""

from __future__ import annotations

import pytest
import tiny_runs
import torch

from pc_clip.core.errors import UserError
from pc_clip.evals import base_of
from pc_clip.models import loading, tags
from pc_clip.models.clip import open_clip
from pc_clip.train.loop import finetune


@pytest.mark.slow
def test_weights_of_a_file_have_the_transform_on_which_all_tags_agree(tmp_path, caplog):
    torch.save(open_clip.create_model("MobileCLIP-S1", load_weights=False).state_dict(), tmp_path / "weights.pt")
    made = loading.create_model("MobileCLIP-S1", str(tmp_path / "weights.pt"))
    loaded = loading.load_model(tmp_path / "weights.pt", "MobileCLIP-S1")
    for clip in (made, loaded):
        cfg = clip.model.visual.preprocess_cfg
        assert tuple(cfg["mean"]) == (0, 0, 0) and tuple(cfg["std"]) == (1, 1, 1) and cfg["interpolation"] == "bilinear"
    assert "does not say" not in caplog.text


def test_no_architecture_of_which_all_tags_agree_gets_another_transform(caplog):
    wrong = []
    for name in {name for name, _ in open_clip.list_pretrained()}:
        caplog.clear()
        transform = tags.transform_of_file(name, None, "weights.pt")
        records = [tags.config_of(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
        agree = all(transform == {key: record[key] for key in tags.TRANSFORM if key in record} for record in records)
        if agree == ("image transform" in caplog.text):
            wrong.append(name)
    assert not wrong


def test_ambiguous_tags_warn_and_a_given_tag_decides(caplog):
    usual = tags.transform_of_file("ViT-L-14", None, "weights.pt")
    assert usual["mean"][0] == pytest.approx(0.481, abs=1e-3)
    assert "image transform: as of most tags of ViT-L-14, but not of laion2b_s32b_b82k" in caplog.text
    assert "activation: GELU, but not for openai" in caplog.text
    caplog.clear()
    assert tags.transform_of_file("ViT-L-14", "laion2b_s32b_b82k", "weights.pt")["mean"] == (0.5, 0.5, 0.5)
    assert not caplog.text


def test_another_activation_than_that_of_the_tag_is_refused():
    with pytest.raises(UserError, match="openai were trained with QuickGELU; name the architecture ViT-B-32-quickgelu"):
        loading.create_model("ViT-B-32", "openai")
    with pytest.raises(UserError, match="openai were trained with QuickGELU"):
        tags.transform_of_file("ViT-B-32", "openai", "weights.pt")
    with pytest.raises(UserError, match=r"'opena' is not a tag of ViT-B-32\. Did you mean 'openai'"):
        tags.transform_of_file("ViT-B-32", "opena", "weights.pt")
    with pytest.raises(UserError, match="model.tag openai is for weights from a file"):
        loading.create_model("ViT-B-32-quickgelu", "openai", "openai")


@pytest.mark.usefixtures("small_runs")
def test_a_run_is_compared_with_its_own_start(tiny, caplog):
    config = tiny_runs.settings("pairwise", tiny, steps=2, lr=1e-2)
    first = finetune(config)
    config.model.start, config.name = str(first), "second"
    second = loading.load_model(finetune(config))
    assert base_of(second).weights_hash() == loading.load_model(first).weights_hash()
    loading.save_model(first / "model.safetensors", loading.create_model(config.model.name))
    assert base_of(second) is None
    assert "runs/a/model.safetensors is not what this run began with: nothing is compared with it" in caplog.text
    (first / "model.safetensors").unlink()
    with caplog.at_level("INFO"):
        assert base_of(second) is None and "which is not at hand: no checkpoint at runs/a" in caplog.text
