"""PC-CLIP in batches of similar pairs, and from pairs whose images are alike."""

from pathlib import Path

import numpy as np
import pytest
import tiny_runs
import torch

from pc_clip.core.config.train import FinetuneConfig, PairwiseConfig, SamplerConfig
from pc_clip.core.errors import UserError
from pc_clip.data import differences
from pc_clip.data.embeddings import embed_images
from pc_clip.data.training_data import load_dataset
from pc_clip.models.clip import Clip
from pc_clip.train.loop import finetune
from pc_clip.train.methods import pairwise

pytestmark = pytest.mark.usefixtures("small_runs")


@pytest.fixture
def config(tiny) -> FinetuneConfig:
    return tiny_runs.settings("pairwise", tiny, batch_size=12)


def make(config: FinetuneConfig, clip: Clip) -> pairwise.Method:
    return pairwise.Method(clip, load_dataset(config.data), config)


def told(config: FinetuneConfig) -> dict[str, str]:
    """What is said of each pair, by the name that it has in a batch."""
    return {f"{d.first}|{d.second}": d.text for d in differences.read(config.data.differences)}


def test_pairs_are_similar_by_sentence_or_image_difference(config, example_clip):
    method, data = make(config, example_clip), load_dataset(config.data)
    z = torch.nn.functional.normalize(embed_images(example_clip, data).z, dim=-1)
    text, image = method.embeddings("text", True), method.embeddings("image", True)
    sentences = told(config)
    for row in (0, 11, len(method.pairs) - 1):
        i, j = method.pairs[row]
        assert torch.allclose(
            text[row], example_clip.embed_texts([sentences[f"{data.ids[i]}|{data.ids[j]}"]])[0], atol=1e-5
        )
        assert torch.allclose(image[row], torch.nn.functional.normalize(z[i] - z[j], dim=-1), atol=1e-5)


@pytest.mark.parametrize("mirror", [False, True])
def test_a_batch_of_clusters_says_similar_things(config, example_clip, mirror):
    """Its sentences begin in one of three ways; a cluster of four mostly in one."""
    config.pairwise.mirror, config.train.batch_size = mirror, 24 if mirror else 12
    sentences, mixed = told(config), {}
    for name, config.sampler in (
        ("clusters", SamplerConfig(kind="clusters", cluster_size=4)),
        ("random", SamplerConfig()),
    ):
        batches = [
            [sentences[key].split(",")[0] for key in batch.ids[:12]] for batch in make(config, example_clip).loader(0)
        ]
        assert all(len(batch) == 12 for batch in batches)
        mixed[name] = np.mean([len(set(batch[n : n + 4])) for batch in batches for n in (0, 4, 8)])
    assert mixed["clusters"] < 1.4 < 1.9 < mixed["random"]


def test_hardness_and_sentences_that_come_twice_are_in_the_log(config):
    texts = ["The first image shows a star."] * 30 + ["The first image shows two rings."] * 30
    rows = [rows._replace(text=text) for rows, text in zip(differences.read("d.jsonl"), texts, strict=True)]
    Path("d.jsonl").write_text("".join(map(differences.to_line, rows)))
    config.train.steps, config.train.log_every = 1, 1
    (row,) = tiny_runs.rows(finetune(config))
    assert 0.3 < row["identical_negatives"] < 0.7
    assert -1 < row["mean_negative"] < row["hardest_negative"] < 1
    config.name, config.sampler = "b", SamplerConfig(kind="clusters", cluster_size=4)
    with pytest.raises(UserError, match="only 2 examples differ by text"):
        finetune(config)


def test_the_pairs_whose_images_are_most_alike_are_kept(config, example_clip):
    data = load_dataset(config.data)
    z = torch.nn.functional.normalize(embed_images(example_clip, data).z, dim=-1)
    everything = make(config, example_clip).pairs
    config.pairwise = PairwiseConfig(keep=0.25, keep_by="similar")
    method = make(config, example_clip)
    alike = np.array([float(z[i] @ z[j]) for i, j in everything])
    hardest = everything[np.sort(np.argsort(-alike)[: len(everything) // 4])]
    assert (method.pairs == hardest).all()
    assert any("15 pairs kept, similar" in note for note in method.notes)
    assert len(method.text_rows) == len(method.pairs) == 15


def test_or_as_many_by_chance_which_the_seed_decides(config, example_clip):
    config.pairwise, kept = PairwiseConfig(keep=0.25), []
    for config.seed in (0, 0, 1):
        kept.append(make(config, example_clip).pairs.tolist())
    assert kept[0] == kept[1] != kept[2] and len(kept[0]) == 15
