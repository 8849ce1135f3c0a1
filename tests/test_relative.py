"""Mode relative: images found by a reference and a relative caption."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_evals import FakeClip

from pc_clip.core.config.evaluate import EvaluateConfig, RelativeConfig
from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Dataset
from pc_clip.data.groups import Relative, read_groups
from pc_clip.evals import EvalContext, relative

N = 12


def context_of(tmp_path, rows, **options) -> EvalContext:
    """Images on a circle, 30 degrees apart; a caption turns by as many."""
    path = tmp_path / "cap.rc2.val.json"
    path.write_text(json.dumps(rows))
    angles = torch.arange(N) * 2 * torch.pi / N
    z = torch.stack([angles.cos(), angles.sin(), torch.full((N,), 0.1)], dim=1)
    turns = {f"turn {n}": (z[(n + 1) % N] - z[n]).tolist() for n in range(N)}
    clip = FakeClip(turns, z.tolist())
    data = Dataset("made", "test", [f"im{n}" for n in range(N)], None, "f")
    config = EvaluateConfig(statements=[str(path)], relative=RelativeConfig(**options))
    context = EvalContext(clip, lambda: clip, data, config)
    vars(context)["z"] = F.normalize(z, dim=-1)
    return context


def cirr(n):
    return {"reference": f"im{n}", "target_hard": f"im{(n + 1) % N}", "caption": f"turn {n}", "img_set": {"id": 1}}


def test_the_sum_finds_what_neither_image_nor_caption_finds(tmp_path):
    result = relative.evaluate(context_of(tmp_path, [cirr(n) for n in range(N)], alphas=[0.5, 1.0]))
    assert result.metrics["r1"] == 1.0
    assert result.metrics["reference_r1"] <= 0.5  # either neighbour is as near
    assert result.metrics["caption_r1"] < 1.0
    assert set(result.details["alpha"].values()) <= {0.5, 1.0} and result.details["candidates"] == N - 1
    assert "r10" in result.metrics and "r50" not in result.metrics


def test_a_subset_is_ranked_among_its_own_images_where_all_are_there(tmp_path):
    rows = []
    for n in range(N):
        members = [f"im{(n + k) % N}" for k in (0, 1, 3, 5, 7, 9)]  # no other neighbour of the reference
        rows.append(cirr(n) | {"img_set": {"members": members if n else [*members[:5], "gone"]}})
    result = relative.evaluate(context_of(tmp_path, rows, alphas=[1.0]))
    assert result.details["subset_queries"] == N - 1 and result.metrics["subset_r1"] == 1.0
    assert result.metrics["caption_subset_r3"] <= 1.0
    assert "subset_r1" not in relative.evaluate(context_of(tmp_path, [cirr(n) for n in range(N)])).metrics
    with pytest.raises(UserError, match="members must hold the reference and the target"):
        relative.evaluate(context_of(tmp_path, [cirr(0) | {"img_set": {"members": ["im5"]}}]))


def test_ranks_leave_the_reference_out_and_count_ties_by_half():
    z = torch.eye(4)
    queries = torch.tensor([[1.0, 0.5, 0.5, 0.0], [0.0, 0.0, 1.0, 0.2]])
    ranks = relative._ranks(z, queries, np.array([0, 2]), np.array([1, 3]))
    assert ranks.tolist() == [1.5, 1.0]


def test_rows_of_fashion_iq_are_joined_and_wrong_rows_refused(tmp_path):
    rows = [{"candidate": "a", "target": "b", "captions": ["is red", "has sleeves"]}]
    path = tmp_path / "cap.dress.val.json"
    path.write_text(json.dumps(rows))
    assert read_groups([path]) == [Relative("a", "b", "is red and has sleeves", "cap.dress.val")]
    path.write_text(json.dumps([rows[0] | {"captions": "is red"}]))
    with pytest.raises(UserError, match="captions must be a list of texts, found 'is red'"):
        read_groups([path])
    with pytest.raises(UserError, match="of none of the 1 rows are the images in made/test"):
        relative.evaluate(context_of(tmp_path, [cirr(0) | {"reference": "gone"}]))
    with pytest.raises(UserError, match="there is only one"):
        relative.evaluate(context_of(tmp_path, [cirr(0)]))
