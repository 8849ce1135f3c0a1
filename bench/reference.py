"""The published loop, restated plainly: what it costs, not what it does beyond that.

Every ratio in RESULTS.md is against these functions. They keep what makes the authors' code slow and nothing that
makes it wrong. Of PC-CLIP:

- everything in float32; texts padded to 77 tokens; all parameters of the text tower in the autograd graph although
  the optimizer holds the blocks alone; plain Adam.
- `Differences` finds each image with `list.index`, an item at a time, and a DataLoader without workers stacks them;
  of each image it also hands over the tokens of a caption that nobody reads.
- at its start every caption and every sentence is tokenised, one call each.
- `zeroshot` encodes all images again for each checkpoint, and counts the confusion matrix in Python.
- `all_pairs` encodes both images and the sentence of every pair.

Of SimCLIP:

- `similarity_clusters` computes, for each cluster, the cosines of all examples anew, norms included, and sorts them
  all.

Of CLIP-PO:

- `Preferences` reads the picture of every item, transforms it, and tokenises both texts.
- `preference_step` runs policy and frozen reference on every item, both towers of both, though the image towers are
  equal and never learn; texts are padded to 77 tokens.

Of CLIP4IDC:

- `greedy_words` runs the decoder over all words so far for each next one, scores the next word after each of them,
  and always writes as many words as there may be, whatever has ended; the text is cut at its end afterwards. Keys and
  values of the images are found again each time. (The published decoder also has layers of its own over the tokens of
  the images, and runs them again for each word; ours has none.)

What is left out, because it would only flatter us: printing, `empty_cache`, unpickling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class Differences(Dataset):
    """Items of (caption tokens, embedding, caption tokens, embedding, sentence tokens)."""

    def __init__(
        self,
        tokenizer,
        ids: Sequence[int],
        z: Tensor,
        captions: Sequence[str],
        pairs: Sequence[tuple[int, int]],
        sentences: Sequence[str],
    ) -> None:
        self.ids, self.z, self.pairs = list(ids), z, list(pairs)
        self.captions = [tokenizer(text)[0] for text in captions]
        self.sentences = [tokenizer(text)[0] for text in sentences]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        first, second = self.pairs[item]
        i, j = self.ids.index(first), self.ids.index(second)
        return self.captions[i], self.z[i], self.captions[j], self.z[j], self.sentences[item]


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.transformer.parameters(), lr=lr)


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, first: Tensor, second: Tensor, tokens: Tensor
) -> float:
    """One step on embeddings [B, D] and tokens [B, 77]; without an optimizer the gradients are left to be read."""
    model.zero_grad()
    first = first / first.norm(dim=-1, keepdim=True)
    second = second / second.norm(dim=-1, keepdim=True)
    text = model.encode_text(tokens)
    loss = contrastive_loss(text / text.norm(dim=-1, keepdim=True), first - second)
    loss.backward()
    if optimizer is not None:
        optimizer.step()
    return loss.item()


def contrastive_loss(text: Tensor, target: Tensor) -> Tensor:
    """Temperature 1, as published."""
    text = text / text.norm(dim=-1, keepdim=True)
    target = target / target.norm(dim=-1, keepdim=True)
    logits, labels = text @ target.t(), torch.arange(len(text), device=text.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


@torch.no_grad()
def zeroshot(model: nn.Module, tokenizer, images: Dataset, classes: Sequence[str]) -> Tensor:
    """The confusion matrix [C, C] of images (pixels, label) and the paper's prompt."""
    text = model.encode_text(tokenizer([f"This is a photo of a {name}" for name in classes]))
    text = text / text.norm(dim=-1, keepdim=True)
    confusion = torch.zeros(len(classes), len(classes))
    for pixels, labels in DataLoader(images, batch_size=256, num_workers=1):
        z = model.encode_image(pixels)
        z = z / z.norm(dim=-1, keepdim=True)
        predicted = (z @ text.T).softmax(-1).numpy().argmax(1)
        for n in range(len(labels)):
            confusion[labels[n]][predicted[n]] += 1
    return confusion


@torch.no_grad()
def all_pairs(
    model: nn.Module, images: Tensor, sentence_of: dict[tuple[int, int], Tensor]
) -> dict[tuple[int, int], float]:
    """Cosine of each pair's sentence with the difference of its images.

    images: [N, 3, H, W]; sentence_of: tokens [77] a pair (i, j). 32 pairs at a time, as published.
    """
    pairs, results = list(sentence_of), {}
    for start in range(0, len(pairs), 32):
        some = pairs[start : start + 32]
        first = model.encode_image(torch.stack([images[i] for i, _ in some]))
        second = model.encode_image(torch.stack([images[j] for _, j in some]))
        first, second = (z / z.norm(dim=-1, keepdim=True) for z in (first, second))
        text = model.encode_text(torch.stack([sentence_of[pair] for pair in some]))
        text = text / text.norm(dim=-1, keepdim=True)
        difference = first - second
        cosine = (text * difference / difference.norm(dim=-1, keepdim=True)).sum(-1)
        for pair, value in zip(some, cosine.tolist()):
            results[pair] = value
    return results


def similarity_clusters(
    z: np.ndarray, clusters: int, size: int, rng: np.random.Generator, neighbourhood: int = 1
) -> Iterator[np.ndarray]:
    """The clusters of a batch, one after the other, of embeddings [N, D] of any length."""
    taken = np.zeros(len(z), dtype=bool)
    for _ in range(clusters):
        pivot = rng.choice(np.flatnonzero(~taken))
        near = most_similar(z, pivot, taken)[: size * neighbourhood]
        cluster = np.append(rng.choice(near, size - 1, replace=False), pivot)
        taken[cluster] = True
        yield cluster


def most_similar(z: np.ndarray, pivot: int, taken: np.ndarray) -> np.ndarray:
    """All examples, the most similar first; those that are taken, and the pivot, are put to the end."""
    cosine = z @ z[pivot] / (np.linalg.norm(z, axis=1) * np.linalg.norm(z[pivot]))
    cosine[taken] = -1.0
    cosine[pivot] = -1.0
    return np.argsort(cosine)[::-1]


# -- CLIP-PO -------------------------------------------------------------------------------------------


class Preferences(Dataset):
    """Items of (pixels, tokens of the preferred text, tokens of the rejected text)."""

    def __init__(self, load, preprocess, tokenizer, items: Sequence[tuple[int, str, str]]) -> None:
        self.load, self.preprocess, self.tokenizer, self.items = load, preprocess, tokenizer, list(items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor, Tensor]:
        image, preferred, rejected = self.items[item]
        return self.preprocess(self.load(image)), self.tokenizer(preferred)[0], self.tokenizer(rejected)[0]


def preference_step(
    policy: nn.Module,
    frozen: nn.Module,
    optimizer: torch.optim.Optimizer,
    pixels: Tensor,
    preferred: Tensor,
    rejected: Tensor,
    beta: float,
) -> float:
    """One step of DPO on pixels [B, 3, H, W] and tokens [B, 77]; what it prefers by is right, unlike as published."""
    optimizer.zero_grad()
    with torch.no_grad():
        before = _odds(frozen, pixels, preferred, rejected)
    loss = -F.logsigmoid(beta * (_odds(policy, pixels, preferred, rejected) - before)).mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def _odds(model: nn.Module, pixels: Tensor, preferred: Tensor, rejected: Tensor) -> Tensor:
    image = F.normalize(model.encode_image(pixels), dim=-1)
    text = [F.normalize(model.encode_text(tokens), dim=-1) for tokens in (preferred, rejected)]
    similarity = torch.stack([(image * each).sum(-1) for each in text], dim=-1)  # [B, 2]
    log_p = (model.logit_scale.exp() * similarity).log_softmax(-1)
    return log_p[:, 0] - log_p[:, 1]


# -- CLIP4IDC ------------------------------------------------------------------------------------------


@torch.no_grad()
def greedy_words(decoder: Callable[[Tensor], Tensor], pairs: int, start: int, first: int, length: int) -> Tensor:
    """The likeliest word after each prefix, `length` times.  -> [B, length] int64

    decoder: words so far [B, L] -> scores [B, L, V] of the words that follow them, that of word `first` foremost.
    """
    words = torch.full((pairs, 1), start)
    for _ in range(length):
        scores = decoder(words)
        words = torch.cat([words, scores[:, -1].argmax(dim=-1, keepdim=True) + first], dim=1)
    return words[:, 1:]
