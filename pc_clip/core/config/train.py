"""Settings of finetune.py: the loop, the sampler, and a group for each method."""

from __future__ import annotations

from pc_clip.core.config.settings import DataConfig, ModelConfig, group, runtime, setting, settings


@settings
class SamplerConfig:
    """Which examples come together in a batch: at random, or in clusters of similar ones (SimCLIP)."""

    kind: str = setting("random", "random or clusters.")
    similarity: str = setting("text", "Similarity by text or by image.", needs="kind=clusters")
    online: bool = setting(
        True,
        "Recompute similarities each epoch; otherwise once before training.",
        needs="kind=clusters",
    )
    cluster_size: int = setting(16, "Examples per cluster (k).", needs="kind=clusters")
    share: float = setting(1.0, "Fraction of a batch in clusters (p); the rest is random.", needs="kind=clusters")
    double_at: list[int] = setting(
        [], "Epochs, from 0, at which the fraction doubles, ending at `share`; empty for none.", needs="kind=clusters"
    )
    neighbourhood: int = setting(
        1, "Members are drawn from the neighbourhood * k nearest (s); 1 for the nearest.", needs="kind=clusters"
    )
    cover: bool = setting(
        False, "Use each example at most once an epoch; late clusters are less similar.", needs="kind=clusters"
    )
    index: str = setting("exact", "Neighbour search: exact, or faiss if installed.", needs="kind=clusters")


@settings
class TrainConfig:
    """The loop."""

    batch_size: int = setting(512, "Global batch size.")
    epochs: int = setting(20, "Number of epochs.")
    steps: int | None = setting(None, "Total steps; overrides epochs.")
    max_steps_per_epoch: int | None = setting(None, "Steps per epoch; empty for all data.")
    optimizer: str = setting("adam", "adam or adamw.")
    lr: float = setting(1e-8, "Peak learning rate.")
    betas: list[float] = setting([0.9, 0.999], "Adam's beta1 and beta2.")
    eps: float = setting(1e-8, "Adam's epsilon.")
    weight_decay: float = setting(0.0, "Weight decay.")
    schedule: str = setting("exponential", "constant, exponential (times `decay` each epoch) or cosine.")
    decay: float = setting(0.9, "Factor of the exponential schedule.", needs="schedule=exponential")
    warmup_steps: int = setting(0, "Linear warm-up steps.")
    warmup_share: float = setting(0.0, "Warm-up as a fraction of all steps, instead of warmup_steps.")
    clip_norm: float = setting(0.0, "Gradient clipping norm; 0 for none.")
    precision: str = setting("no", "no for float32, bf16, auto for bf16 where it is native.")
    compensated: bool = setting(False, "Compensated (Kahan) summation of updates, for tiny learning rates.")
    recompute: bool = setting(False, "GradCache: re-encode in chunks in the backward pass, for less memory.")
    blend: float = setting(1.0, "Weight averaging with the start (WiSE-FT): 1 is the trained model, 0 the start.")
    log_every: int = runtime(50, "Log every n steps.")
    save_every: int = runtime(500, "Save the resumable state every n steps.")
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
    captioned_differences: str = setting("", "Additional sentences on images of which only captions exist.")
    captions: str = setting("", "The captions of those images: COCO's JSON or SimCLIP's TSV.")
    keep: float = setting(1.0, "Fraction of the pairs to train on.")
    keep_by: str = setting(
        "random", "Which fraction: random, or similar for the pairs most similar at the start.", needs="keep!=1.0"
    )


@settings
class ContrastiveConfig:
    """Captions against their images."""

    temperature: float | None = setting(None, "Of the InfoNCE loss; null for the model's own.")


@settings
class PreferenceConfig:
    """CLIP-PO: of two texts about an image, the one that holds is preferred."""

    loss: str = setting("dpo", "dpo, ipo, reward (Bradley-Terry), or contrastive with the rejected texts as negatives.")
    beta: float = setting(0.1, "Regularisation towards the reference model (DPO's beta, IPO's tau).")
    label_smoothing: float = setting(0.0, "Label smoothing of dpo: assumed fraction of wrong labels.")
    reference_free: bool = setting(False, "dpo and ipo without a reference model.")
    alpha: float | None = setting(None, "Scale of the cosines in the reward loss; null for logit_scale.")
    logit_scale: float | None = setting(None, "logit_scale of the log-odds, not trained; null for the model's.")
    per_image: int = setting(1, "Statements per image in a batch; the image is encoded once for them.")
    captioning: float = setting(0.0, "Weight of a CoCa decoder's caption log-likelihoods, for dpo and ipo.")


@settings
class ChangeConfig:
    """Sentences on what changed against pairs of images."""

    stage: str = setting("retrieve", "retrieve (adapt CLIP to pairs) or caption (train the decoder).")
    intra_layers: int | None = setting(None, "Blocks that encode each image alone; empty for three quarters.")
    aligned_tokens: bool | None = setting(
        None, "Add the other image's token at the same position; empty for the start's choice."
    )
    clip_lr_scale: float = setting(1e-3, "Learning rate of CLIP's weights as a multiple of train.lr.")
    freeze: bool = setting(False, "Stage caption: freeze the encoder and cache its tokens.")
    layers: int = setting(3, "Of the decoder.")
    heads: int = setting(8, "Of each of its layers.")
    width: int = setting(512, "Of the decoder.")
    max_length: int = setting(32, "Of a sentence in subwords, including the start and end tokens.")
    dropout: float = setting(0.1, "In the decoder.")
    label_smoothing: float = setting(0.0, "Label smoothing of the decoder.")
    sentences: int = setting(1, "Stage caption: sentences of a pair in a step.")
    false_negatives: bool = setting(False, "Stage retrieve: treat sentences shared with another pair as negatives.")
    validation: str = setting("", "Split or file to select the best epoch on; none for the last epoch.")
    validate_on: int | None = setting(None, "Number of validation pairs, drawn with the run's seed; empty for all.")


@settings
class RetainConfig:
    """Weights of the terms that keep what the start knew, added to any method's loss."""

    texts: float = setting(0.0, "Weight of 1 - cos between embeddings of ordinary captions and the start's.")
    images: float = setting(0.0, "The same for ordinary images, where the image tower is trained.")
    similarities: float = setting(0.0, "Weight of the KL divergence from the start's softmax over captions and images.")
    temperature: float = setting(0.05, "Of that softmax.", needs="similarities")
    contrastive: float = setting(0.0, "Weight of CLIP's loss on ordinary captions and their images.")
    ramp: float = setting(0.0, "Fraction of all steps over which the weights rise linearly from 0.", needs="weights")
    batch: int = setting(64, "Ordinary captions per step, over all processes.", needs="weights")
    captions: int = setting(20_000, "Number of ordinary captions in all, drawn with the run's seed.", needs="weights")
    dataset: str = setting(
        "", "Data set of these; empty for the run's own (example for example_relations, example_changes).",
        needs="weights",
    )  # fmt: skip
    root: str | None = setting(None, "Root folder of that data set.", needs="dataset")
    split: str | None = setting(None, "Split; empty for train.", needs="dataset")
    file: str | None = setting(None, "A file of captions instead of the data set's.", needs="dataset")

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
    method: str = setting("pairwise", "Training method; its settings are --NAME.setting.")
    out: str = runtime("runs", "Folder of runs.")
    seed: int = setting(0, "Random seed.")
    resume: bool = runtime(False, "Continue an interrupted run of that name, or start it.")
    overwrite: bool = runtime(False, "Delete an existing run of that name first.")
    device: str = runtime("", "cpu or cuda; empty for the GPU if there is one.")
    model: ModelConfig = group(ModelConfig)
    data: DataConfig = group(DataConfig)
    sampler: SamplerConfig = group(SamplerConfig)
    train: TrainConfig = group(TrainConfig)
    retain: RetainConfig = group(RetainConfig)
