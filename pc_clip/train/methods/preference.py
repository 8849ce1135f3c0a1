"""CLIP-PO: of two texts about an image, the one that holds is preferred.

Preference tuning (DPO, IPO) for an image-text model: the log-odds of the preferred text, by softmax over the two, are
pushed above those of the model as it was before. Beside it stand a reward model's loss, which needs no reference,
and CLIP's own loss with the rejected texts as hard negatives: plain finetuning on the same data.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pc_clip.core.config.train import FinetuneConfig, PreferenceConfig
from pc_clip.core.errors import UserError, check_at_least, check_choice
from pc_clip.data.dataset import Dataset, Statement
from pc_clip.data.statements import read_statements
from pc_clip.data.views import located, match
from pc_clip.models.clip import Clip
from pc_clip.train import losses, samplers
from pc_clip.train.methods import coca
from pc_clip.train.methods.base import CUT, BaseMethod, Images, Texts, embed_rows_of_images, embed_rows_of_texts

BLOCK = 16_384  # preferences whose embeddings are held at a time
LOSSES = ("dpo", "ipo", "reward", "contrastive")
_TIE = "the model reads the same tokens in both texts, or sees the same in both images"


class Batch(NamedTuple):
    """B preferences about U images in V texts. Of ranking data both texts are one, and the images are two."""

    ids: list[str]
    tokens: Tensor  # [V, L] int64
    text: Tensor  # [B, 2] int64, rows of tokens: of the preferred and of the rejected text
    images: Tensor  # [U, D] embeddings, or [U, 3, H, W] pixels when the image tower learns
    image: Tensor  # [B, 2] int64, rows of images: of which the text is preferred, and of which it is rejected
    numbers: Tensor  # [B, 3] int64, of the image, the preferred and the rejected text in all the data
    reference: Tensor  # [B] float32, log-odds before training; empty where there are none or each step finds them


class Scores(NamedTuple):
    """A model's scores of a batch."""

    text: Tensor  # [V, D] float32
    image: Tensor  # [U, D] float32
    cosine: tuple[Tensor, Tensor]  # [B] each, of what is preferred and of what is rejected
    log_odds: Tensor  # [B], of what is preferred


class Method(BaseMethod):
    """One step on a batch of preferences; each comes once an epoch. Reference scores are computed once."""

    def __init__(self, clip: Clip, data: Dataset, config: FinetuneConfig) -> None:
        super().__init__(clip, config)
        self.options: PreferenceConfig = config.preference
        _check(self.options, config.train.batch_size)
        if self.options.captioning:
            coca.check(clip)
            self.idle = ("logit_",)  # CoCa's decoder learns
        texts = [text for s in self._read(data) for text in (s.preferred, s.rejected)]
        self.texts = Texts(clip, texts)
        self.text = self.texts.rows(texts).reshape(-1, 2)  # [N, 2]
        self.note(self.texts.truncated, CUT)
        self._leave_out_ties()
        scale = self.options.logit_scale
        self.logit_scale = clip.model.logit_scale.detach().exp().item() if scale is None else scale
        self._find_reference()
        self.groups = self._group()
        groups_per_batch = config.train.batch_size // self.options.per_image
        self.sampler = samplers.make(config, len(self.groups), groups_per_batch, self, "groups of statements")
        self.notes += self.sampler.notes

    def _read(self, data: Dataset) -> list[Statement]:
        """The statements whose images are there; sets the images and the rows that they are about."""
        paths, embeddings = self.config.data.statements, self.config.data.embeddings
        statements = read_statements(paths, self.config.seed) if paths else list(data.statements)
        if not statements:
            raise UserError(f"method preference needs statements, and {data.label} has none; name --data.statements")
        if self.options.loss == "contrastive" and any(
            s.rejected_image for s in statements
        ):  # before images are embedded
            raise UserError(
                "preference.loss contrastive needs texts that are rejected, and these are images that are; "
                f"take one of {', '.join(LOSSES[:3])}"
            )
        there = None if embeddings else located(statements, data)
        self.images = Images(self.clip, there.data if there else data, self.config, self.options.captioning > 0)
        there = there or match(statements, self.images.ids)
        where = embeddings or data.label
        self.note(there.absent, f"of {len(statements)} statements are left out: {where} lacks their image")
        false = sum(not s.true for s in there.statements)
        self.note(false, "statements are false: what contradicts them is preferred")
        self.image = np.stack([there.rows, there.others], axis=1)  # [N, 2]
        return there.statements

    def _leave_out_ties(self) -> None:
        """Drop and count preferences whose two sides are one to the model: neither can win, whatever is learnt."""
        one_image = self.image[:, 0] == self.image[:, 1]
        first, second = self.texts.tokens[self.text[one_image]].swapaxes(0, 1)
        tie = np.empty(len(one_image), dtype=bool)
        tie[one_image] = (first == second).all(axis=1)
        tie[~one_image] = self.images.equal(self.image[~one_image])
        if tie.all():
            raise UserError(f"nothing can be learnt from any of the {len(tie)} statements: {_TIE}; write others")
        self.note(tie.sum(), f"of {len(tie)} statements are left out: {_TIE}")
        self.text, self.image = self.text[~tie], self.image[~tie]

    def _find_reference(self) -> None:
        """Log-odds of all preferences by the model as it was before training, from embeddings that are made once.

        They are made as a step makes them, in bf16 if it does: what is rounded off is then the same in both, and
        cancels. Where each epoch has crops of its own, or captions count, a copy of the model finds them in each step.
        """
        self.reference = torch.empty(0)  # [N] float32
        self.frozen: Clip | None = None
        if self.options.loss not in ("dpo", "ipo") or self.options.reference_free:
            return
        if self.training:  # from scratch
            raise UserError(
                f"preference.loss {self.options.loss} starts from what a model knows, and model.pretrained scratch "
                "knows nothing; take preference.loss contrastive or reward"
            )
        if self.options.captioning or (self.images.learns and self.config.data.min_crop < 1):
            model = copy.deepcopy(self.clip.model).eval().requires_grad_(False)
            # Texts go the same way through it: two ways round differently. None: the way through its own weights.
            self.frozen = dataclasses.replace(self.clip, model=model, _fast=None)
            return
        precision = self.config.train.precision
        z_text = embed_rows_of_texts(self.texts, np.arange(len(self.texts.distinct)), precision)  # [texts, D]
        used, places = np.unique(self.image, return_inverse=True)
        z_image = embed_rows_of_images(self.images, used, precision == "bf16", self.config)  # those cached are exact
        self.reference = torch.empty(len(self.image))
        for start in range(0, len(self.image), BLOCK):
            some = slice(start, start + BLOCK)
            cosine = (z_text[self.text[some]] * z_image[places.reshape(-1, 2)[some]]).sum(-1)
            self.reference[some] = losses.log_odds(*cosine.T, self.logit_scale)

    def _group(self) -> np.ndarray:
        """Statements that come together, `per_image` of one image; its last group is filled up with its first ones.

        -> [groups, per_image] rows of statements
        """
        size, by_image = self.options.per_image, np.argsort(self.image[:, 0], kind="stable")
        if size == 1:
            return np.arange(len(self.image))[:, None]
        each = np.split(by_image, np.flatnonzero(np.diff(self.image[by_image, 0])) + 1)
        return np.concatenate([np.resize(rows, (-(-len(rows) // size), size)) for rows in each])

    # -- for the sampler -------------------------------------------------------------------------------

    def embeddings(self, similarity: str, now: bool) -> Tensor:
        """Embeddings for similarity: of the preferred text, or the image.  -> [N, D] float32, unit length"""
        lead = self.groups[:, 0]
        if similarity == "text":
            return embed_rows_of_texts(self.texts, self.text[lead, 0])
        used, places = np.unique(self.image[lead, 0], return_inverse=True)
        return embed_rows_of_images(self.images, used, now, self.config)[torch.from_numpy(places)]

    def alike(self, similarity: str) -> np.ndarray:
        return (self.text if similarity == "text" else self.image)[self.groups[:, 0], 0]

    # -- the epoch -------------------------------------------------------------------------------------

    def draw(self, chosen: np.ndarray, rng: np.random.Generator, epoch: int, n: int) -> np.ndarray:
        return self.groups[chosen].reshape(-1)[self.share]

    def image_rows(self, chosen: np.ndarray) -> np.ndarray:
        return np.unique(self.image[chosen])

    def batch(self, chosen: np.ndarray, images: Tensor) -> Batch:
        used, text = np.unique(self.text[chosen], return_inverse=True)  # a text that occurs twice is encoded once
        image = np.unique(self.image[chosen], return_inverse=True)[1]
        return Batch(
            ids=[self.images.ids[row] for row in self.image[chosen, 0]],
            tokens=self.texts.batch(used),
            text=torch.from_numpy(text.reshape(-1, 2)),
            images=images,
            image=torch.from_numpy(image.reshape(-1, 2)),
            numbers=torch.from_numpy(np.column_stack([self.image[chosen, 0], self.text[chosen]])),
            reference=self.reference[torch.from_numpy(chosen)] if len(self.reference) else self.reference,
        )

    # -- the step --------------------------------------------------------------------------------------

    def score(self, clip: Clip, batch: Batch) -> Scores:
        """Score a batch with this model or the reference. Each text and image is encoded once."""
        if self.options.captioning:
            text, vectors = coca.encode_text(clip.model, batch.tokens)
            image, seen = coca.encode_image(clip.model, batch.images)
        else:
            text = clip.encode_text(batch.tokens)
            image = batch.images if self.images.z is not None else clip.encode_image(batch.images)
        text, image = text.float(), image.float()
        z_text, z_image = nn.functional.normalize(text, dim=-1), nn.functional.normalize(image, dim=-1)
        cosine = tuple((z_text[a] * z_image[b]).sum(-1) for a, b in zip(batch.text.T, batch.image.T))
        log_odds = losses.log_odds(*cosine, self.logit_scale)
        if self.options.captioning:  # by how much the decoder finds the caption likelier where it is preferred
            text_rows, image_rows = batch.text.flatten(), batch.image.flatten()
            likelihood = coca.log_likelihood(
                clip.model, seen[image_rows], batch.tokens[text_rows], vectors[text_rows]
            ).view(-1, 2)
            log_odds = log_odds + self.options.captioning * (likelihood[:, 0] - likelihood[:, 1])
        return Scores(text, image, cosine, log_odds)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        options, scores = self.options, self.score(self.clip, batch)
        policy = scores.log_odds
        logs = {"accuracy": (policy > 0).float().mean(), "margin": policy.detach().mean()}
        if options.loss == "reward":
            alpha = self.logit_scale if options.alpha is None else options.alpha
            return losses.bradley_terry(*scores.cosine, alpha), logs
        if options.loss == "contrastive":
            preferred, rejected = scores.text[batch.text.T]
            embeddings = preferred, rejected, scores.image[batch.image[:, 0]]
            loss = losses.over_all(losses.info_nce_with_negatives, *embeddings, batch.numbers, self.logit_scale)
            return loss, logs
        reference = batch.reference if len(batch.reference) else None
        if self.frozen:
            with torch.no_grad():
                reference = self.score(self.frozen, batch).log_odds
        if reference is not None:
            logs["moved"] = (policy - reference).detach().mean()
        if options.loss == "ipo":
            return losses.ipo(policy, reference, options.beta), logs
        return losses.dpo(policy, reference, options.beta, options.label_smoothing), logs


def _check(options: PreferenceConfig, batch_size: int) -> None:
    check_choice("preference.loss", options.loss, LOSSES)
    for name in ("beta", "alpha", "logit_scale"):
        value = getattr(options, name)
        if value is not None and not (0 < value < float("inf")):
            raise UserError(f"preference.{name} is {value}; it must be above 0")
    if not 0 <= options.captioning < float("inf"):
        raise UserError(f"preference.captioning is {options.captioning}; it is a weight, 0 or more")
    if not 0 <= options.label_smoothing < 0.5:
        raise UserError(f"preference.label_smoothing is {options.label_smoothing}; it is a share, from 0 to below 0.5")
    check_at_least("preference.per_image", options.per_image, 1)
    if batch_size % options.per_image:
        raise UserError(
            f"preference.per_image {options.per_image} does not divide train.batch_size {batch_size}; whole groups of "
            "an image's statements make a batch"
        )
    used_by = {"label_smoothing": ("dpo",), "reference_free": ("dpo", "ipo"), "captioning": ("dpo", "ipo")}
    used_by |= {"alpha": ("reward",)}
    for name, kinds in used_by.items():
        if getattr(options, name) and options.loss not in kinds:
            raise UserError(f"preference.{name} means nothing for preference.loss {options.loss}; leave it out")
