"""Weight averaging on a model so small that the embeddings at every alpha are known by arithmetic."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from pc_clip.core.config.evaluate import AverageConfig, DifferenceConfig, EvaluateConfig
from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Dataset, Question
from pc_clip.data.embeddings import CACHE
from pc_clip.data.registry import open_dataset
from pc_clip.evals import EvalContext, average, evaluate
from pc_clip.models import lora
from pc_clip.models.loading import create_model

TEXTS = ("a", "b")


class TinyModel(nn.Module):
    """One row a text, and an image tower that turns the first pixel's red and green into an embedding."""

    def __init__(self, rows, tower=((1.0, 0.0), (0.0, 1.0))) -> None:
        super().__init__()
        self.text = nn.Parameter(torch.tensor(rows, dtype=torch.float32))
        self.visual = nn.Linear(2, 2, bias=False)
        self.visual.weight.data = torch.tensor(tower)


@dataclass
class TinyClip:
    model: TinyModel
    device = torch.device("cpu")

    def embed_texts(self, texts):
        return F.normalize(self.model.text.detach()[[TEXTS.index(text) for text in texts]], dim=-1)

    def remembering(self):
        return self

    def preprocess(self, image):
        return torch.tensor(image.getpixel((0, 0))[:2], dtype=torch.float32) / 255

    def encode_image(self, pixels):
        return self.model.visual(pixels)

    def image_tower_hash(self):
        return "tower" + str(self.model.visual.weight.tolist()).replace(" ", "")

    def weights_hash(self):
        return self.image_tower_hash() + str(self.model.text.tolist())

    def describe(self):
        return "tiny"


START = [[1.0, 0.0], [0.0, 1.0]]


def subject(start, end, monkeypatch, z, target, validation_target=None, alphas=(0.5,), **settings) -> EvalContext:
    """A two-class question about images whose embeddings are z; validation differs in what is true of them."""

    def data(split, answers):
        question = Question("q", TEXTS, np.arange(len(z)), np.array(answers), ("{}",))
        pixels = [(*(round(255 * v) for v in row), 0) for row in z]
        return Dataset(
            "made", split, [str(n) for n in range(len(z))], lambda n: Image.new("RGB", (4, 4), pixels[n]),
            split, questions=(question,),
        )  # fmt: skip

    config = EvaluateConfig(**settings, average=AverageConfig(alphas=list(alphas)))
    context = EvalContext(end, lambda: start, data("test", target), config)
    held_out = EvalContext(end, lambda: start, data("val", validation_target or target), config)
    monkeypatch.setattr(EvalContext, "validation", lambda self: held_out)
    return context


def test_the_best_average_is_selected_on_validation(monkeypatch):
    """a = (1, 0) throughout, b goes from (1, 1) to (-1, 1): (1, 0.6) is right at the end, (0.3, 1) at the start."""
    start, end = TinyClip(TinyModel([[1, 0], [1, 1]])), TinyClip(TinyModel([[1, 0], [-1, 1]]))
    result = average.evaluate(subject(start, end, monkeypatch, [[1, 0.6], [0.9, 1.0]], [0, 1]))
    assert result.metrics == {"average_zeroshot": 1.0, "start_zeroshot": 0.5, "end_zeroshot": 0.5}
    (curve,) = result.curves
    assert curve.marked == result.details["alpha"] == 0.5
    assert curve.series["zeroshot, test"] == [(0.0, 0.5), (0.5, 1.0), (1.0, 0.5)]
    made = subject(start, end, monkeypatch, [[1, 0.6], [0.9, 1.0]], [0, 1], validation_target=[1, 1])
    result = average.evaluate(made)
    assert result.details["alpha"] == 0.0  # the only one that calls both b
    assert result.metrics["average_zeroshot"] == 0.5
    assert max(row["test"]["zeroshot"] for row in result.details["table"]) == 1.0


def test_changed_image_towers_are_reencoded_and_only_the_ends_cached(monkeypatch):
    """The tower goes from the identity to one that swaps the two numbers, and halfway all images are alike."""
    start = TinyClip(TinyModel(START))
    end = TinyClip(TinyModel(START, tower=[[0.0, 1.0], [1.0, 0.0]]))
    result = average.evaluate(subject(start, end, monkeypatch, [[1, 0.2], [0.2, 1]], [0, 1], alphas=[0.25, 0.75]))
    table = {row["alpha"]: row["test"]["zeroshot"] for row in result.details["table"]}
    assert table == {0.0: 1.0, 0.25: 1.0, 0.75: 0.0, 1.0: 0.0}
    assert len(list(CACHE.iterdir())) == 4  # two ends, two splits


def test_what_cannot_be_averaged_is_said(monkeypatch):
    other = TinyClip(TinyModel([[1, 0], [1, 1]]))
    for start, alphas, message in (
        (None, [0.5], "needs the weights from before finetuning"),
        (TinyClip(TinyModel(START)), [0.5], "needs a finetuned model"),
        (other, [1.5], "with 0 to 1"),
    ):
        made = subject(start, TinyClip(TinyModel(START)), monkeypatch, [[1, 0]], [0], alphas=alphas)
        with pytest.raises(UserError, match=message):
            average.evaluate(made)


@pytest.mark.slow
def test_averaging_ends_are_the_two_models(small_example):
    base, clip = create_model("example"), create_model("example")
    with torch.no_grad():
        for parameter in lora.trainable(clip, "text_blocks").values():
            parameter.mul_(0.5)
    config = EvaluateConfig(
        checkpoint="x", average=AverageConfig(alphas=[0.5]), difference=DifferenceConfig(n_pairs=40, draws=1)
    )
    data = open_dataset("example", split="test")
    context = EvalContext(clip, lambda: base, data, config)
    result, key = average.evaluate(context), evaluate._key(context, "average")
    assert key != evaluate._key(dataclasses.replace(context, config=EvaluateConfig(checkpoint="x")), "average")
    remembering = EvalContext(clip.remembering(), lambda: base, data, config)
    remembering.clip.embed_texts(["This is a photo of a star."])
    assert average.evaluate(remembering).details == result.details  # each alpha has a memory of its own
    assert {f"{p}_{m}" for p in ("average", "start", "end") for m in average.METRICS} == result.metrics.keys()
    assert result.metrics["start_zeroshot"] > result.metrics["end_zeroshot"]
    assert [row["alpha"] for row in result.details["table"]] == [0.0, 0.5, 1.0]
    assert len(result.curves[0].series) == 6
    assert result.n == 80
