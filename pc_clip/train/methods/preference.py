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
from pc_clip.core.errors import UserError, check_choice
from pc_clip.data.dataset import Dataset, Statement
from pc_clip.data.statements import read_statements
from pc_clip.data.views import located, match
from pc_clip.models import lora
from pc_clip.models.clip import Clip
from pc_clip.train import losses, samplers
from pc_clip.train.methods import coca
from pc_clip.train.methods.base import BaseMethod, Images, Texts, embed_rows_of_images, embed_rows_of_texts
from pc_clip.train.methods.coca import CoCa

BLOCK = 65_536  # preferences whose embeddings are held at a time
LOSSES = ("dpo", "ipo", "reward", "contrastive")
_TIE = "the model reads the same tokens in both texts, or sees the same in both images"


class Batch(NamedTuple):
    """B preferences about U images in V texts. Of ranking data, preferred and rejected are one text and two images."""

    ids: list[str]
    tokens: Tensor  # [V, L] int64
    preferred: Tensor  # [B] int64, rows of tokens: a text that occurs twice is encoded once
    rejected: Tensor  # [B] int64
    images: Tensor  # [U, D] embeddings, or [U, 3, H, W] pixels when the image tower learns
    image: Tensor  # [B] int64, rows of images
    instead: Tensor  # [B] int64, where the rejected text is scored: the same image, but for ranking data
    numbers: Tensor  # [B, 3] int64, of the image, the preferred and the rejected text in all the data
    reference: Tensor  # [B] float32, log-odds before training; empty where there are none or each step finds them


class Method(BaseMethod):
    """One step on a batch of preferences; each comes once an epoch. What the start thought of them is found once."""

    def __init__(self, clip: Clip, data: Dataset, config: FinetuneConfig) -> None:
        super().__init__(clip, config)
        self.options: PreferenceConfig = config.preference
        _check(self.options)
        if self.options.captioning:
            coca.check(clip)
        statements = self._read(data)
        self.texts = Texts(clip, [text for s in statements for text in (s.preferred, s.rejected)])
        self.preferred = self.texts.rows([s.preferred for s in statements])  # [N]
        self.rejected = self.texts.rows([s.rejected for s in statements])
        if self.texts.truncated:
            self.notes.append(f"{self.texts.truncated} texts longer than the context, cut")
        self._leave_out_ties()
        scale = self.options.logit_scale
        self.logit_scale = clip.model.logit_scale.detach().exp().item() if scale is None else scale
        self._find_reference()
        self.sampler = samplers.make(config, len(self.image), config.train.batch_size, self, "statements")
        self.notes += self.sampler.notes

    def _read(self, data: Dataset) -> list[Statement]:
        """The statements whose images are there; sets the images and the rows that they are about."""
        paths, embeddings = self.config.data.statements, self.config.data.embeddings
        found = read_statements(paths, self.config.seed) if paths else list(data.statements)
        if not found:
            raise UserError(
                f"method preference needs statements, and {data.label} has none of its own; "
                "name files of them with --data.statements"
            )
        if self.options.loss == "contrastive" and any(s.instead for s in found):  # before images are embedded
            raise UserError(
                "preference.loss contrastive needs texts that are rejected, and these are images that are; "
                f"take one of {', '.join(LOSSES[:3])}"
            )
        if embeddings and self.options.captioning:
            raise UserError(
                "preference.captioning reads the images themselves, for which data.embeddings cannot stand in; "
                "leave one of the two out"
            )
        if embeddings:
            self.images = Images(self.clip, data, self.config)
            there = match(found, self.images.ids)
        else:
            there = located(found, data)
            self.images = Images(self.clip, there.data, self.config, pixels=self.options.captioning > 0)
        if there.absent:
            where = embeddings or data.label
            self.notes.append(f"{there.absent} of {len(found)} statements are left out: {where} lacks their image")
        self.image, self.instead = there.rows, there.others  # [N]
        true = sum(s.true for s in there.statements)
        if true < len(there.statements):
            self.notes.append(
                f"{len(there.statements) - true} statements are false: what contradicts them is preferred"
            )
        return there.statements

    def _leave_out_ties(self) -> None:
        """Drop and count preferences whose two sides are one to the model: neither can win, whatever is learnt."""
        tie, tokens = self.image == self.instead, self.texts.tokens
        texts, images = np.flatnonzero(tie), np.flatnonzero(~tie)
        tie[texts] = (tokens[self.preferred[texts]] == tokens[self.rejected[texts]]).all(axis=1)
        tie[images] = self.images.equal(np.stack([self.image[images], self.instead[images]], axis=1))
        if not tie.any():
            return
        if tie.all():
            raise UserError(f"nothing can be learnt from any of the {len(tie)} statements: {_TIE}; write others")
        self.notes.append(f"{tie.sum()} of {len(tie)} statements are left out: {_TIE}")
        for name in ("image", "instead", "preferred", "rejected"):
            setattr(self, name, getattr(self, name)[~tie])

    def _find_reference(self) -> None:
        """What the start thinks of all preferences; where each epoch has crops of its own, a copy that can be asked."""
        self.reference, self.frozen = torch.empty(0), None
        if self.options.loss not in ("dpo", "ipo") or self.options.reference_free:
            return
        if self.training:  # from scratch
            raise UserError(
                f"preference.loss {self.options.loss} starts from what a model knows, and model.pretrained scratch "
                "knows nothing; take preference.loss contrastive or reward"
            )
        if self.images.learns and self.config.data.min_crop < 1:
            self.frozen = FrozenCopy(self.clip, self.logit_scale, self.options.captioning)
            return
        text, image = (self.preferred, self.rejected), (self.image, self.instead)
        self.reference = log_odds_of_all(self.texts, self.images, text, image, self.logit_scale, self.config)
        if self.options.captioning:
            precision = self.config.train.precision
            rows = np.concatenate(image), np.concatenate(text)
            found = coca.log_likelihoods_of_all(self.clip, self.images, self.texts, *rows, precision)
            preferred, rejected = found.chunk(2)
            self.reference += self.options.captioning * (preferred - rejected)

    def trainable(self) -> dict[str, nn.Parameter]:
        idle = ("logit_",) if self.options.captioning else ("logit_", "text_decoder.")  # CoCa's decoder
        return {n: p for n, p in lora.trainable(self.clip, self.config.model.train).items() if not n.startswith(idle)}

    # -- for the sampler -------------------------------------------------------------------------------

    def embeddings(self, similarity: str, now: bool) -> Tensor:
        """What makes preferences similar: the preferred text, or the image.  -> [N, D] float32, unit length"""
        rows = self.preferred if similarity == "text" else self.image
        used, places = np.unique(rows, return_inverse=True)
        found = (
            embed_rows_of_texts(self.texts, used)
            if similarity == "text"
            else embed_rows_of_images(self.images, used, now, self.config)
        )
        return found[torch.from_numpy(places)]

    def learns(self, similarity: str) -> bool:
        return similarity == "text" or self.images.learns

    def alike(self, similarity: str) -> np.ndarray:
        return self.preferred if similarity == "text" else self.image

    # -- the epoch -------------------------------------------------------------------------------------

    def draw(self, chosen: np.ndarray, rng: np.random.Generator, epoch: int, n: int) -> np.ndarray:
        return chosen[self.share]

    def image_rows(self, chosen: np.ndarray) -> np.ndarray:
        return np.unique([self.image[chosen], self.instead[chosen]])

    def batch(self, chosen: np.ndarray, images: Tensor) -> Batch:
        said, text = np.unique([self.preferred[chosen], self.rejected[chosen]], return_inverse=True)
        _, image = np.unique([self.image[chosen], self.instead[chosen]], return_inverse=True)
        text, image = (torch.from_numpy(rows.reshape(2, -1)) for rows in (text, image))
        numbers = self.image, self.preferred, self.rejected
        return Batch(
            ids=[self.images.ids[row] for row in self.image[chosen]],
            tokens=self.texts.batch(said),
            preferred=text[0],
            rejected=text[1],
            images=images,
            image=image[0],
            instead=image[1],
            numbers=torch.from_numpy(np.stack([rows[chosen] for rows in numbers], axis=1)),
            reference=self.reference[torch.from_numpy(chosen)] if len(self.reference) else self.reference,
        )

    # -- the step --------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if self.options.captioning:
            text, image, likelier = encode_captioning(self.model, batch)
        else:
            text = self.clip.encode_text(batch.tokens).float()  # [V, D]
            image = self.images.encode(batch.images).float()  # [U, D]
            likelier = 0.0
        preferred, rejected = cosines(text, image, batch)  # [B], [B]
        policy = losses.log_odds(preferred, rejected, self.logit_scale) + self.options.captioning * likelier
        logs = {"accuracy": (policy > 0).float().mean(), "margin": policy.detach().mean()}
        if self.options.loss == "reward":
            alpha = self.logit_scale if self.options.alpha is None else self.options.alpha
            return losses.bradley_terry(preferred, rejected, alpha), logs
        if self.options.loss == "contrastive":
            texts = text[batch.preferred], text[batch.rejected]
            found = *texts, image[batch.image], batch.numbers
            return losses.info_nce_with_negatives_of_all(*found, self.logit_scale), logs
        reference = self.frozen.log_odds(batch) if self.frozen else batch.reference if len(batch.reference) else None
        if reference is not None:
            logs["moved"] = (policy - reference).detach().mean()
        if self.options.loss == "ipo":
            return losses.ipo(policy, reference, self.options.beta), logs
        return losses.dpo(policy, reference, self.options.beta, self.options.label_smoothing), logs


def cosines(text: Tensor, image: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of each preference's image with its preferred text, and of what is rejected. [V, D], [U, D] -> [B], [B]"""
    text, image = nn.functional.normalize(text, dim=-1), nn.functional.normalize(image, dim=-1)
    return (
        (text[batch.preferred] * image[batch.image]).sum(-1),
        (text[batch.rejected] * image[batch.instead]).sum(-1),
    )


def encode_captioning(model: CoCa, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of a batch's texts and images, and how much likelier captions are where preferred.

    Each text and each image goes through its tower once.  -> [V, D], [U, D], [B], all float32
    """
    text, vectors = coca.encode_text(model, batch.tokens)
    image, image_tokens = coca.encode_image(model, batch.images)
    preferred, rejected = (
        coca.log_likelihood(model, image_tokens[there], batch.tokens[said], vectors[said])
        for there, said in ((batch.image, batch.preferred), (batch.instead, batch.rejected))
    )
    return text.float(), image.float(), preferred - rejected


# -- what the model thought before it was trained -----------------------------------------------------------


def log_odds_of_all(
    texts: Texts, images: Images, text: tuple[np.ndarray, np.ndarray], image: tuple[np.ndarray, np.ndarray],
    logit_scale: float, config: FinetuneConfig,
) -> Tensor:  # fmt: skip
    """Log-odds of N preferences by the model as it was before training, from embeddings that are made once.

    They are made as a step makes them, in bf16 if it does: what is rounded off is then the same in both, and cancels.
    text, image: [N] rows each, of what is preferred and of what is rejected.  -> [N] float32, on the CPU
    """
    precision = config.train.precision
    z_text = texts.embeddings(precision)  # [U, D]
    used, places = np.unique(image, return_inverse=True)
    z_image = embed_rows_of_images(images, used, precision == "bf16", config)  # those of the cache are exact
    places = places.reshape(2, -1)
    found = torch.empty(len(text[0]))
    for start in range(0, len(found), BLOCK):
        some = slice(start, start + BLOCK)
        cosine = [(z_text[text[k][some]] * z_image[places[k][some]]).sum(-1) for k in (0, 1)]
        found[some] = losses.log_odds(*cosine, logit_scale)
    return found


class FrozenCopy:
    """The start model, for batches of pixels that differ from epoch to epoch: random crops."""

    def __init__(self, clip: Clip, logit_scale: float, captioning: float = 0.0) -> None:
        self.model = copy.deepcopy(clip.model).eval().requires_grad_(False)
        self.logit_scale, self.captioning = logit_scale, captioning
        # Texts go the same way through it: two ways round differently in bf16. None: the way through its own weights.
        self.clip = dataclasses.replace(clip, model=self.model, _fast=None)

    @torch.no_grad()
    def log_odds(self, batch: Batch) -> Tensor:
        """[B] float32, of the batch's own pixels."""
        if self.captioning:
            text, image, likelier = encode_captioning(self.model, batch)
        else:
            text = self.clip.encode_text(batch.tokens).float()
            image = self.clip.encode_image(batch.images).float()
            likelier = 0.0
        return losses.log_odds(*cosines(text, image, batch), self.logit_scale) + self.captioning * likelier


# -- settings ----------------------------------------------------------------------------------------------


def _check(options: PreferenceConfig) -> None:
    check_choice("preference.loss", options.loss, LOSSES)
    for name in ("beta", "alpha", "logit_scale"):
        value = getattr(options, name)
        if value is not None and not (0 < value < float("inf")):
            raise UserError(f"preference.{name} is {value}; it must be above 0")
    if not 0 <= options.captioning < float("inf"):
        raise UserError(f"preference.captioning is {options.captioning}; it is a weight, 0 or more")
    if not 0 <= options.label_smoothing < 0.5:
        raise UserError(
            f"preference.label_smoothing is {options.label_smoothing}; it is a share of labels, from 0 to below 0.5"
        )
    means_nothing = {
        "label_smoothing": options.label_smoothing and options.loss != "dpo",
        "reference_free": options.reference_free and options.loss not in ("dpo", "ipo"),
        "captioning": options.captioning and options.loss not in ("dpo", "ipo"),
        "alpha": options.alpha is not None and options.loss != "reward",
    }
    if named := [f"preference.{name}" for name, set_ in means_nothing.items() if set_]:
        raise UserError(f"{' and '.join(named)} means nothing for preference.loss {options.loss}; leave it out")
