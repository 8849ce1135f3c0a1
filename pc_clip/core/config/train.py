"""Settings of finetune.py: the loop, the sampler, and a group for each method."""

from __future__ import annotations

from dataclasses import dataclass, field

from pc_clip.core.config.settings import DataConfig, ModelConfig, runtime


@dataclass
class SamplerConfig:
    """Which examples come together in a batch: at random, or in clusters of similar ones (SimCLIP).

    Args:
        kind: random or clusters.
        similarity: What makes examples similar, their text or their image.
        online: Similar by the model as it is at the beginning of each epoch; otherwise as it was before training.
        cluster_size: Examples a cluster (k).
        share: The share of a batch that is in clusters (p); the rest is drawn at random.
        double_at: Epochs (the first is 0) at which the share doubles, so that it ends at exactly `share`; for three
            of them it begins at an eighth of it. Empty for the same share always.
        neighbourhood: The k - 1 partners are drawn from the `neighbourhood` * k nearest (s); 1 for the nearest.
        cover: No example comes twice in an epoch, so that all come but for those that fill no whole batch, and late
            clusters are less alike; otherwise clusters are drawn anew for each batch, and many are not seen in it.
        index: How neighbours are found, exact, or faiss where that is installed.
    """

    kind: str = "random"
    similarity: str = "text"
    online: bool = True
    cluster_size: int = 16
    share: float = 1.0
    double_at: list[int] = field(default_factory=list)
    neighbourhood: int = 1
    cover: bool = False
    index: str = "exact"


@dataclass
class TrainConfig:
    """The loop.

    Args:
        batch_size: Items a step, over all processes.
        epochs: Passes over the data.
        steps: Steps in all; overrides epochs.
        max_steps_per_epoch: An epoch ends after so many steps, even if there is more data; empty for all of it.
        optimizer: adam or adamw.
        lr: Learning rate at its highest.
        betas: Decay rates of the optimizer's two moments.
        eps: Added to the root of the second moment.
        weight_decay: As the optimizer understands it.
        schedule: constant, exponential (lr times `decay` after each epoch) or cosine (to zero).
        decay: Factor of the exponential schedule.
        warmup_steps: Steps of linear warm-up.
        warmup_share: The same as a share of all steps; one of the two.
        clip_norm: Largest gradient norm; 0 for none.
        precision: "no" for float32, bf16 for mixed precision, where the weights stay float32, or auto for bf16 where
            this machine multiplies in it and float32 elsewhere.
        compensated: Add steps to the weights by compensated summation, so that float32 does not lose small ones; for
            learning rates like the paper's 1e-8.
        recompute: Compute texts again in the backward pass, some at a time, instead of keeping all that it needs: less
            memory, more time.
        blend: Averages the weights with the start at the end: 1 is as trained, 0.5 half way, 0 the start.
        log_every: Steps between two lines of the log.
        save_every: Steps between two saves of the state that --resume continues from.
        tracker: One of accelerate's trackers (tensorboard, wandb, ...); empty for none.
        threads: CPU threads; 0 leaves the choice to torch.
    """

    batch_size: int = 512
    epochs: int = 20
    steps: int | None = None
    max_steps_per_epoch: int | None = None
    optimizer: str = "adam"
    lr: float = 1e-8
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: str = "exponential"
    decay: float = 0.9
    warmup_steps: int = 0
    warmup_share: float = 0.0
    clip_norm: float = 0.0
    precision: str = "no"
    compensated: bool = False
    recompute: bool = False
    blend: float = 1.0
    log_every: int = runtime(50)
    save_every: int = runtime(500)
    tracker: str = ""
    threads: int = runtime(0)


@dataclass
class PairwiseConfig:
    """PC-CLIP: sentences against differences of images.

    Args:
        loss: info_nce, or mse for the ablation.
        temperature: Of the InfoNCE loss.
        anchor: Weight of the term that keeps ordinary captions near the start; 0 for none.
        anchor_captions: How many captions it holds in all, drawn from the data set's.
        anchor_batch: How many of them a step.
        mirror: Put each pair into the batch in both orders, the second with "first" and "second" exchanged.
        keep: The share of the pairs that is learnt from.
        keep_by: Which those are: random, or similar for those whose two images are most alike before training.
    """

    loss: str = "info_nce"
    temperature: float = 1.0
    anchor: float = 0.0
    anchor_captions: int = 20000
    anchor_batch: int = 64
    mirror: bool = False
    keep: float = 1.0
    keep_by: str = "random"


@dataclass
class ContrastiveConfig:
    """Captions against their images.

    Args:
        temperature: Of the InfoNCE loss; null for the model's own.
    """

    temperature: float | None = None


@dataclass
class PreferenceConfig:
    """CLIP-PO: of two texts about an image, the one that holds is preferred.

    Args:
        loss: dpo, ipo, reward (Bradley-Terry), or contrastive for CLIP's own with the rejected texts as hard negatives.
        beta: How dear it is to leave the reference: dpo's beta, ipo's tau. Small values move the model far.
        label_smoothing: For dpo, the share of statements believed to be labelled wrongly.
        reference_free: For dpo and ipo, count from even odds in place of the reference's.
        alpha: Factor of the similarities in the reward loss; null for the logit scale.
        logit_scale: Factor of cosines in log-odds; null for the model's own, 1 for bare cosines. It does not learn.
        captioning: For dpo and ipo of a CoCa model, the weight in log-odds of how much likelier its decoder finds the
            preferred caption, given the image; 0 for none. Images are then read in each step, even frozen ones.
    """

    loss: str = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    reference_free: bool = False
    alpha: float | None = None
    logit_scale: float | None = None
    captioning: float = 0.0


@dataclass
class ChangeConfig:
    """Sentences on what changed against pairs of images.

    Args:
        stage: retrieve, which adapts CLIP to pairs, or caption, which learns to write; the latter begins with an
            adapted model where model.start names one.
        intra_layers: Blocks of the image tower that see each image alone; empty for three quarters of them (9 of 12).
        counterparts: Whether each token that enters the other blocks is also given the one at its own place in the
            other image, which the paper's are not; empty for as the model has it that the run begins with, else false.
        clip_rate: The learning rate of CLIP's own weights, as a share of train.lr.
        freeze: In stage caption the encoder stays as it is; what it sees is found once and kept in data/cache.
        layers: Of the decoder.
        heads: Of each of its layers.
        width: Of the decoder.
        max_length: Of a sentence in pieces of words, its beginning and end included.
        dropout: In the decoder.
        label_smoothing: The share of probability that goes to all other words.
        sentences: In stage caption, how many sentences of a pair a step learns from, drawn anew each epoch: what takes
            time is to see the pair, which is done once for all of them.
        false_negatives: Count a sentence as wrong for a pair of which it is said too, if it came with another pair.
        validation: The split that the best epoch is chosen on, or a file of pairs; empty for the data set's val
            (reformat_val of reformat_train), and for none where data.split is a file; none to keep the last epoch.
        validate_on: How many of its pairs, drawn by the run's seed; empty for all.
    """

    stage: str = "retrieve"
    intra_layers: int | None = None
    counterparts: bool | None = None
    clip_rate: float = 1e-3
    freeze: bool = False
    layers: int = 3
    heads: int = 8
    width: int = 512
    max_length: int = 32
    dropout: float = 0.1
    label_smoothing: float = 0.0
    sentences: int = 1
    false_negatives: bool = False
    validation: str = ""
    validate_on: int | None = None


METHODS = {  # --method NAME: its settings are --NAME.setting
    "pairwise": PairwiseConfig,
    "contrastive": ContrastiveConfig,
    "preference": PreferenceConfig,
    "change": ChangeConfig,
}


@dataclass
class FinetuneConfig:
    """Finetune a CLIP model.

    Args:
        name: The run's folder is {out}/{name}.
        method: How it learns; each method has options of its own under its name.
        out: Where runs are kept.
        seed: Of every random choice.
        resume: Continue the run of that name where it stopped; start it if there is none.
        overwrite: Delete a run of that name first.
        device: cpu or cuda; empty for the GPU if there is one.
    """

    name: str = "example"
    method: str = "pairwise"
    out: str = runtime("runs")
    seed: int = 0
    resume: bool = runtime(False)
    overwrite: bool = runtime(False)
    device: str = runtime("")
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
