"""CLIP4IDC (Guo et al. 2022, arXiv 2206.00629): retrieval of change sentences, then change captioning.

retrieve adapts CLIP: a pair of images (models/pair_encoder.py) finds its sentence among others and is found by it.
caption then trains a decoder to write the sentence, on an encoder that goes on learning. The epoch that does best on
validation pairs is kept: by R@1, and by CIDEr.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn

from pc_clip.core import distributed
from pc_clip.core.config.train import FinetuneConfig
from pc_clip.core.errors import UserError, check_at_least, check_choice
from pc_clip.core.random import seed_of, stream
from pc_clip.data.changes import NoSplit
from pc_clip.data.dataset import Dataset, with_changes
from pc_clip.data.images import Reader, plain
from pc_clip.data.pairs import captions, distinct_sentences, embed_pairs, frozen_tokens, pair_rows, read_pairs
from pc_clip.data.registry import READERS, selection_split
from pc_clip.data.training_data import load_dataset
from pc_clip.metrics.captions import validation_cider
from pc_clip.metrics.retrieval import recalls
from pc_clip.models import lora
from pc_clip.models.caption_decoder import Shape
from pc_clip.models.change_model import PREFIX, ChangeClip, change_of, fresh
from pc_clip.models.clip import Clip
from pc_clip.models.parameters import image_tower_learns
from pc_clip.models.vocabulary import END, PAD, Vocabulary
from pc_clip.train import losses, samplers
from pc_clip.train.methods.base import CUT, BaseMethod, Texts

STAGES = ("retrieve", "caption")


class Batch(NamedTuple):
    """B pairs, each with one of its sentences. Of the pixels and what a frozen encoder saw, one is empty."""

    ids: list[str]
    before: Tensor  # [B, 3, H, W]
    after: Tensor  # [B, 3, H, W]
    seen: Tensor  # [B, S, V]
    tokens: Tensor  # int64: [B, L] of CLIP's in stage retrieve, [B, N, L] of the decoder's vocabulary in stage caption
    positives: Tensor  # [B, T] int64: the sentences of this pair of images, padded with -1
    number: Tensor  # [B] int64: which one this is
    seed: int  # of dropout


class Part(NamedTuple):
    """The random draw of a batch. pairs: [B]; drawn: [B, N], which of its sentences each has, -1 for no more."""

    pairs: np.ndarray
    drawn: np.ndarray
    seed: int


class Method(BaseMethod):
    """One step: symmetric InfoNCE between pairs and sentences, or the cross entropy of a sentence's words."""

    def __init__(self, clip: Clip, data: Dataset, config: FinetuneConfig) -> None:
        super().__init__(clip, config)
        self.options = options = config.change
        _check(config, data)
        self.pairs, self.changes = pair_rows(data), data.changes
        sentences = [text for change in data.changes for text in change.sentences]
        self.each = np.array([len(change.sentences) for change in data.changes])
        self.first = self.each.cumsum() - self.each
        self.sentences_of = _rows(distinct_sentences(data.changes)[1])
        if change_of(clip) is None:
            made = fresh(clip, options.intra_layers, config.seed, bool(options.aligned_tokens))
            self.clip = clip = ChangeClip.of(clip, made.to(clip.device))
        for name in ("intra_layers", "aligned_tokens"):
            asked, there = getattr(options, name), getattr(clip.change.encoder, name)
            if asked not in (None, there):
                raise UserError(f"{config.model.start} was trained with change.{name} {there}; leave it out here")
        self.change = clip.change
        if options.stage == "retrieve":
            self.change.decoder = self.change.vocabulary = None  # it was trained on the earlier encoder
            self.texts = Texts(clip, sentences)
            self.sentence = self.texts.rows(sentences)
            self.note(self.texts.truncated, CUT)
        else:
            self._prepare_to_write(sentences)
        self.validation = self._validation(data)
        self.reader = Reader(data, plain(clip.preprocess), config.data.workers)
        if not options.freeze:
            self.reader.start()  # while this is the only thread; batches are asked for by another
        self.sampler = samplers.make(config, len(self.pairs), config.train.batch_size, self, "pairs")
        self.notes += self.sampler.notes
        self.features: np.ndarray | None = None
        if options.freeze:  # now, when nothing is left that could be refused
            with PartialState().main_process_first():  # the others then find it in the cache
                self.features = frozen_tokens(clip, data, workers=config.data.workers)

    def _prepare_to_write(self, sentences: list[str]) -> None:
        """A new decoder, or the one that the model came with, whose sizes and vocabulary stay."""
        options, distinct = self.options, list(dict.fromkeys(sentences))
        row = {text: n for n, text in enumerate(distinct)}
        self.sentence = np.array([row[text] for text in sentences], dtype=np.int64)
        if self.change.decoder is None:
            vocabulary = Vocabulary.of(self.clip.tokenizer, distinct)
            shape = Shape(options.layers, options.heads, options.width, options.max_length)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed_of(self.config.seed, "decoder"))
                self.change.add_decoder(vocabulary, shape, options.dropout)
            self.change.to(self.clip.device)
        else:
            self.change.decoder.set_dropout(options.dropout)
            sizes = ", ".join(f"{name} {value}" for name, value in vars(self.change.decoder.shape).items())
            self.notes.append(f"the decoder of {self.config.model.start} learns on, as it is: {sizes}")
            lacking = sum(map(self.change.vocabulary.lacks, distinct))
            self.note(lacking, "sentences have subwords outside the vocabulary; these are left out")
        length = self.change.decoder.shape.max_length
        self.written = self.change.vocabulary.encode(distinct, length)  # [U, L]
        one_more = self.change.vocabulary.encode(distinct, length + 1)
        cut = int(((one_more != PAD).sum(1) > length).sum())
        self.note(cut, f"sentences longer than {length} subwords, cut")
        self.notes.append(f"{len(self.change.vocabulary.pieces)} subwords in {len(distinct)} sentences")

    def _validation(self, data: Dataset) -> Dataset | None:
        """The pairs that the best epoch is chosen on."""
        options = self.options
        split = options.validation or selection_split(data)
        if split in (None, "none"):
            self.notes.append("no validation pairs: the last epoch is kept")
            return None
        try:
            pairs = load_dataset(replace(self.config.data, split=split, captions=None, mix=[]))
        except NoSplit as error:
            raise UserError(
                f"{error}; --change.validation names other pairs, or none to keep the last epoch"
            ) from error
        if pairs.fingerprint == data.fingerprint or _inside(pairs, data):
            raise UserError(f"change.validation {split} is what is learnt from; name another split, or none")
        if options.validate_on is not None and options.validate_on < len(pairs.changes):
            rng = stream(self.config.seed, "validation pairs")
            pairs = with_changes(pairs, np.sort(rng.permutation(len(pairs.changes))[: options.validate_on]))
        sentences, count = len(distinct_sentences(pairs.changes)[0]), len(pairs.changes)
        if count < 2 or (options.stage == "retrieve" and sentences < 2):
            raise UserError(
                f"{pairs.label} gives {count} pairs with {sentences} different sentences to choose an epoch by, which "
                "takes two of each; raise change.validate_on, or set change.validation to another split or none"
            )
        if options.stage == "caption":
            validation_cider(["a"], [["a"]])  # raises where it cannot be computed, now and not after an epoch
        self.notes += [f"{pairs.label}: {pairs.note}"] if pairs.note else []
        self.chosen_by, self.chosen_on = "r1" if options.stage == "retrieve" else "cider", pairs.fingerprint
        self.notes.append(f"the best epoch is chosen by {self.chosen_by} on {count} pairs of {pairs.label}")
        return pairs

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that this stage trains."""
        new = {f"{PREFIX}{name}": p for name, p in self.change.named_parameters()}
        if self.options.freeze:
            return {name: p for name, p in new.items() if name.startswith(f"{PREFIX}decoder.")}
        own = lora.trainable(self.clip, self.config.model.train)
        if self.options.stage == "caption":
            own = {n: p for n, p in own.items() if n.startswith("visual.") and n != "visual.proj"}
        return own | new

    def rate(self, name: str) -> float:
        return 1.0 if name.startswith(PREFIX) else self.options.clip_lr_scale

    # -- the epoch -------------------------------------------------------------------------------------

    def draw(self, chosen: np.ndarray, rng: np.random.Generator, epoch: int, n: int) -> Part:
        """Which of a pair's sentences it comes with is drawn anew each epoch."""
        order = rng.random((len(chosen), self.each.max()))
        order[np.arange(order.shape[1]) >= self.each[chosen][:, None]] = 2.0  # after all there are
        drawn = order.argsort(axis=1)[:, : self.options.sentences]
        drawn = np.where(drawn < self.each[chosen][:, None], drawn, -1)
        seed = seed_of(self.config.seed, "dropout", epoch, n, PartialState().process_index)
        return Part(chosen[self.share], drawn[self.share], int(seed))

    def image_rows(self, part: Part) -> np.ndarray:
        return self.pairs[part.pairs] if self.features is None else part.pairs

    def read(self, rows: Iterable[np.ndarray], epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Before, after and what a frozen encoder saw, as a batch has them."""
        nothing = torch.empty(0)
        if self.features is not None:
            for chosen in rows:
                yield nothing, nothing, torch.from_numpy(self.features[chosen].astype(np.float32))
            return
        with closing(read_pairs(self.reader, list(rows))) as coming:
            for before, after in coming:
                yield before, after, nothing

    def batch(self, part: Part, images: tuple[Tensor, Tensor, Tensor]) -> Batch:
        number = self.sentence[self.first[part.pairs][:, None] + np.maximum(part.drawn, 0)]  # [B, N]
        if self.options.stage == "retrieve":
            tokens = self.texts.batch(number[:, 0])
        else:
            tokens = self.written[torch.from_numpy(number)]
            tokens[torch.from_numpy(part.drawn < 0)] = PAD
            tokens = tokens[:, :, : int((tokens != PAD).sum(-1).max())]
        ids = [self.changes[pair].before for pair in part.pairs]
        positives, number = torch.from_numpy(self.sentences_of[part.pairs]), torch.from_numpy(number[:, 0])
        return Batch(ids, *images, tokens, positives, number, part.seed)

    # -- the step --------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        seen = batch.seen if self.features is not None else self.change.encoder(batch.before, batch.after)
        return self._find(batch, seen) if self.options.stage == "retrieve" else self._write(batch, seen)

    def _find(self, batch: Batch, seen: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        pair = self.change.encoder.embed(seen).float()  # [B, D]
        text = self.clip.encode_text(batch.tokens).float()  # [B, D]
        scale = self.model.logit_scale.exp()
        positives = batch.positives[:, :0] if self.options.false_negatives else batch.positives
        loss = losses.over_all(losses.info_nce_of_several, pair, text, positives, batch.number, scale)
        return loss, {"temperature": 1 / scale.detach()} | losses.hardness(pair, text)

    def _write(self, batch: Batch, seen: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        target = batch.tokens[:, :, 1:]
        decoder = self.change.decoder.train()
        with torch.random.fork_rng(devices=[seen.device] if seen.device.type == "cuda" else []):
            torch.manual_seed(batch.seed)  # of the step, so that a run that is continued drops what a straight one does
            logits = decoder(batch.tokens[:, :, :-1], seen)  # [B, N, L - 1, words - END]
        decoder.eval()
        word = target != PAD
        total = F.cross_entropy(
            logits[word], target[word] - END, reduction="sum", label_smoothing=self.options.label_smoothing
        )
        right = (logits[word].argmax(-1) + END == target[word]).sum()
        share = distributed.mean_over_all(right.float(), word.sum())
        return distributed.mean_over_all(total, word.sum()), {"words_right": share}

    # -- choosing --------------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """R@1, the mean of both ways, or CIDEr of greedy sentences, on validation pairs."""
        data, workers = self.validation, self.config.data.workers
        if self.options.stage == "retrieve":
            texts, belongs = distinct_sentences(data.changes)
            pairs = embed_pairs(self.clip, data, workers=workers)  # [N, D]
            sentences = self.clip.embed_texts(texts)  # [M, D]
            with torch.autocast(self.clip.device.type, enabled=False):  # cosines in bf16 would tie
                metrics = recalls(pairs, sentences, belongs)
            return {"r1": (metrics["p2s_r1"] + metrics["s2p_r1"]) / 2} | metrics
        written = [caption.text for caption in captions(self.clip, data, workers=workers)]
        metrics = {"cider": validation_cider(written, [list(change.sentences) for change in data.changes])}
        if data.judge:
            metrics["right"] = float(np.mean([all(data.judge(n, text).values()) for n, text in enumerate(written)]))
        return metrics


def _rows(lists: list[list[int]]) -> np.ndarray:
    """Pad lists with -1 to a table.  -> [N, longest] int64"""
    table = np.full((len(lists), max(map(len, lists))), -1)
    for row, values in zip(table, lists):
        row[: len(values)] = values
    return table


def _check(config: FinetuneConfig, data: Dataset) -> None:
    """Check the settings before anything is computed."""
    options = config.change
    check_choice("change.stage", options.stage, STAGES)
    if not data.changes:
        raise UserError(
            f"method change needs pairs of images with sentences, and {config.data.dataset} has none; take "
            "example_changes, clevr_change, spot_the_diff, image_editing_request or changes (your own, as JSONL)"
        )
    retrieve, train = options.stage == "retrieve", config.model.train
    without_use = {
        "data.embeddings": (config.data.embeddings, "both images are read whole, as they are"),
        "data.min_crop": (config.data.min_crop != 1, "both images are read whole, as they are"),
        "train.blend": (config.train.blend != 1, "new weights have no start to be averaged with"),
        "sampler.kind": (config.sampler.kind != "random", "pairs come at random"),
        "change.sentences": (retrieve and options.sentences > 1, "in stage retrieve each pair comes with one"),
        "change.freeze": (retrieve and options.freeze, "stage retrieve is there to train the encoder"),
    }
    for name, (is_set, why) in without_use.items():
        if is_set:
            raise UserError(f"method change does not take {name}: {why}; leave it out")
    if not 0 <= options.clip_lr_scale < float("inf"):
        raise UserError(f"change.clip_lr_scale is {options.clip_lr_scale}; it is a share of train.lr, 0 or more")
    for name in ("dropout", "label_smoothing"):
        if not 0 <= getattr(options, name) < 1:
            raise UserError(f"change.{name} is {getattr(options, name)}; it is a share, from 0 to below 1")
    check_at_least("change.sentences", options.sentences, 1)
    if options.validate_on is not None:
        check_at_least("change.validate_on", options.validate_on, 1)
    if not (retrieve or options.freeze or image_tower_learns(train)):
        raise UserError(
            f"model.train {train} leaves the image tower as it is; stage caption takes both or attention, "
            "or change.freeze true, which is quicker"
        )


def _inside(one: Dataset, other: Dataset) -> bool:
    """Whether all pairs of a split are in another, which may list them in another way (Spot-the-Diff's reformat_)."""
    if one.name != other.name or READERS[one.name].any_split:  # in files of one's own, names are of different folders
        return False
    pairs = ({(change.before, change.after) for change in data.changes} for data in (one, other))
    return next(pairs) <= next(pairs)
