"""Settings of finetune.py: the loop, the sampler, and a group for each method."""

from __future__ import annotations

from pc_clip.core.config.settings import DataConfig, ModelConfig, group, runtime, setting, settings


@settings
class SamplerConfig:
    """Which examples come together in a batch: at random, or in clusters of similar ones (SimCLIP)."""

    kind: str = setting("random", "random or clusters.")
    similarity: str = setting("text", "What makes examples similar, their text or their image.", needs="kind=clusters")
    online: bool = setting(
        True,
        "Similar by the model at the beginning of each epoch, or as it was before training.",
        needs="kind=clusters",
    )
    cluster_size: int = setting(16, "Examples a cluster (k).", needs="kind=clusters")
    share: float = setting(
        1.0, "The share of a batch that is in clusters (p); the rest is drawn at random.", needs="kind=clusters"
    )
    double_at: list[int] = setting(
        [], "Epochs, from 0, at which the share doubles, to end at `share`; empty for never.", needs="kind=clusters"
    )
    neighbourhood: int = setting(
        1, "Partners are drawn from the neighbourhood * k nearest (s); 1 for the nearest.", needs="kind=clusters"
    )
    cover: bool = setting(
        False, "No example comes twice in an epoch; late clusters are then less alike.", needs="kind=clusters"
    )
    index: str = setting(
        "exact", "How neighbours are found, exact, or faiss where that is installed.", needs="kind=clusters"
    )


@settings
class TrainConfig:
    """The loop."""

    batch_size: int = setting(512, "Items a step, over all processes.")
    epochs: int = setting(20, "Passes over the data.")
    steps: int | None = setting(None, "Steps in all; overrides epochs.")
    max_steps_per_epoch: int | None = setting(None, "An epoch ends after so many steps; empty for all of its data.")
    optimizer: str = setting("adam", "adam or adamw.")
    lr: float = setting(1e-8, "Learning rate at its highest.")
    betas: list[float] = setting([0.9, 0.999], "Decay rates of the optimizer's two moments.")
    eps: float = setting(1e-8, "Added to the root of the second moment.")
    weight_decay: float = setting(0.0, "As the optimizer understands it.")
    schedule: str = setting("exponential", "constant, exponential (times `decay` after each epoch) or cosine.")
    decay: float = setting(0.9, "Factor of the exponential schedule.", needs="schedule=exponential")
    warmup_steps: int = setting(0, "Steps of linear warm-up.")
    warmup_share: float = setting(0.0, "The same as a share of all steps; one of the two.")
    clip_norm: float = setting(0.0, "Largest gradient norm; 0 for none.")
    precision: str = setting("no", "no for float32, bf16 (fp16 for GPUs without it), auto for bf16 where it is native.")
    compensated: bool = setting(False, "Add steps to weights by compensated summation, for tiny learning rates.")
    recompute: bool = setting(False, "Encode in parts, and again in the backward pass: less memory, more time.")
    blend: float = setting(1.0, "Averages the weights with the start at the end: 1 is as trained, 0 the start.")
    log_every: int = runtime(50, "Steps between two lines of the log.")
    save_every: int = runtime(500, "Steps between two saves of the state that --resume continues from.")
    tracker: str = setting("", "One of accelerate's trackers (tensorboard, wandb, ...); empty for none.")
    threads: int = runtime(0, "CPU threads; 0 leaves the choice to torch.")


@settings
class PairwiseConfig:
    """PC-CLIP: sentences against differences of images."""

    loss: str = setting("info_nce", "info_nce, or mse for the ablation.")
    temperature: float = setting(1.0, "Of the InfoNCE loss.", needs="loss=info_nce")
    mirror: bool = setting(False, 'Put each pair into the batch in both orders, with "first" and "second" exchanged.')
    target: str = setting(
        "images",
        "What a sentence is held against: the difference of the two images, or (captions) of the mean embeddings of "
        "their captions at the start; no picture is read then, and --data.missing keep lets all be absent.",
    )
    captioned_differences: str = setting("", "Further sentences, about images of which only captions are known.")
    captions: str = setting("", "The captions of those images: a COCO JSON or a SimCLIP TSV.")
    keep: float = setting(1.0, "The share of the pairs that is learnt from.")
    keep_by: str = setting(
        "random", "Which those are: random, or similar for pairs of images most alike at the start.", needs="keep!=1.0"
    )


@settings
class ContrastiveConfig:
    """Captions against their images."""

    temperature: float | None = setting(None, "Of the InfoNCE loss; null for the model's own.")


@settings
class PreferenceConfig:
    """CLIP-PO: of two texts about an image, the one that holds is preferred."""

    loss: str = setting("dpo", "dpo, ipo, reward (Bradley-Terry), or contrastive with the rejected texts as negatives.")
    beta: float = setting(0.1, "dpo's beta, ipo's tau: the cost of leaving the reference.")
    label_smoothing: float = setting(0.0, "For dpo, the share of statements believed to be labelled wrongly.")
    reference_free: bool = setting(False, "For dpo and ipo, count from even odds in place of the reference's.")
    alpha: float | None = setting(None, "Factor of the similarities in the reward loss; null for the logit scale.")
    logit_scale: float | None = setting(
        None, "Factor of cosines in log-odds, which does not learn; null for the model's own."
    )
    per_image: int = setting(1, "Statements of one image that come together: it is then encoded once for all of them.")
    captioning: float = setting(0.0, "The weight of a CoCa decoder's likelihoods in log-odds, for dpo and ipo.")


@settings
class ChangeConfig:
    """Sentences on what changed against pairs of images."""

    stage: str = setting("retrieve", "retrieve, which adapts CLIP to pairs, or caption, which learns to write.")
    intra_layers: int | None = setting(None, "Blocks that see each image alone; empty for three quarters of them.")
    aligned_tokens: bool | None = setting(
        None, "Give each token the one at its place in the other image; empty for as at the start."
    )
    clip_lr_scale: float = setting(1e-3, "The learning rate of CLIP's own weights, as a share of train.lr.")
    freeze: bool = setting(False, "In stage caption the encoder stays as it is; what it sees is cached.")
    layers: int = setting(3, "Of the decoder.")
    heads: int = setting(8, "Of each of its layers.")
    width: int = setting(512, "Of the decoder.")
    max_length: int = setting(32, "Of a sentence in pieces of words, its beginning and end included.")
    dropout: float = setting(0.1, "In the decoder.")
    label_smoothing: float = setting(0.0, "The share of probability that goes to all other words.")
    sentences: int = setting(1, "In stage caption, how many sentences of a pair a step learns from.")
    false_negatives: bool = setting(False, "Count a sentence as wrong for a pair of which it is said elsewhere.")
    validation: str = setting("", "The split, or file, that the best epoch is chosen on; none for the last epoch.")
    validate_on: int | None = setting(None, "How many of its pairs, drawn by the run's seed; empty for all.")


@settings
class RetainConfig:
    """Weights of the terms that keep what the start knew, added to any method's loss."""

    texts: float = setting(0.0, "Of 1 - cos between embeddings of ordinary captions and those at the start.")
    images: float = setting(0.0, "The same of ordinary images, where the image tower learns.")
    similarities: float = setting(0.0, "Of the KL divergence from the start's softmax of captions and images.")
    temperature: float = setting(0.05, "Of that softmax.", needs="similarities")
    contrastive: float = setting(0.0, "Of CLIP's own loss on ordinary captions and their images, at the model's scale.")
    ramp: float = setting(0.0, "The share of all steps over which the weights rise to these from 0.", needs="weights")
    batch: int = setting(64, "Ordinary captions a step, over all processes.", needs="weights")
    captions: int = setting(20_000, "How many of them there are in all, drawn by the run's seed.", needs="weights")
    dataset: str = setting(
        "", "Where they are from; empty for the run's own data (example for example_relations, example_changes).",
        needs="weights",
    )  # fmt: skip
    root: str | None = setting(None, "The folder that data set is in.", needs="dataset")
    split: str | None = setting(None, "Which part of it; empty for train.", needs="dataset")
    file: str | None = setting(None, "A file of captions in place of the data set's.", needs="dataset")

    @property
    def weights(self) -> dict[str, float]:
        """The weights that are not 0."""
        named = {name: getattr(self, name) for name in ("texts", "images", "similarities", "contrastive")}
        return {name: weight for name, weight in named.items() if weight}


METHODS = {  # --method NAME: its settings are --NAME.setting
    "pairwise": PairwiseConfig,
    "contrastive": ContrastiveConfig,
    "preference": PreferenceConfig,
    "change": ChangeConfig,
}


@settings
class FinetuneConfig:
    """Finetune a CLIP model."""

    name: str = setting("example", "The run's folder is {out}/{name}.")
    method: str = setting("pairwise", "How it learns; each method has options of its own under its name.")
    out: str = runtime("runs", "Where runs are kept.")
    seed: int = setting(0, "Of every random choice.")
    resume: bool = runtime(False, "Continue the run of that name where it stopped; start it if there is none.")
    overwrite: bool = runtime(False, "Delete a run of that name first.")
    device: str = runtime("", "cpu or cuda; empty for the GPU if there is one.")
    model: ModelConfig = group(ModelConfig)
    data: DataConfig = group(DataConfig)
    sampler: SamplerConfig = group(SamplerConfig)
    train: TrainConfig = group(TrainConfig)
    retain: RetainConfig = group(RetainConfig)
