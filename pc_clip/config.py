"""The settings of the scripts: their names, defaults and what they mean. pc_clip/configure.py reads them."""

from __future__ import annotations

from dataclasses import dataclass, field

from pc_clip.writers import ChangeWriterConfig, LanguageModelConfig
from pc_clip.writers.server import ServerConfig


@dataclass
class ModelConfig:
    """The model a run starts from.

    Args:
        name: open_clip's name of the architecture, "example" or "example_vit" for the embedded models, or
            local-dir:FOLDER; empty for the embedded ones on the example, and PC-CLIP's (ViT-L-14,
            datacomp_xl_s13b_b90k) on anything else.
        pretrained: One of open_clip's tags for it, a file of weights, or scratch for weights drawn by the run's seed.
        start: A checkpoint to start from in place of these weights: a run's folder, a .safetensors or .pt file. It says
            itself which model it is of; training alone reads this.
        train: Which parameters learn: text_blocks, text, all_text_but_embeddings or both; attention for what makes
            queries, keys and values in both towers (A-CLIP), text_attention for that in the text tower alone.
        lora_rank: Train adapters of this rank on the weights that `train` names, in place of these weights; 0 for none.
            Needs the package peft. When training is done they are added to the weights.
        lora_alpha: What adapters add is multiplied by lora_alpha / lora_rank; null for 1, peft's own default.
        fast_text: Encode texts without padding (pc_clip/fast_text.py) where the text tower allows it; the results are
            the same but for rounding.
    """

    name: str = ""
    pretrained: str | None = None
    start: str = ""
    train: str = "text_blocks"
    lora_rank: int = 0
    lora_alpha: float | None = None
    fast_text: bool = True

    def source(self, dataset: str) -> tuple[str, str | None]:
        """The architecture and the weights a model is made of, when it is used on `dataset`."""
        if self.name:
            return self.name, self.pretrained
        if dataset in ("example", "example_relations"):
            return "example", self.pretrained
        if dataset == "example_changes":
            return "example_vit", self.pretrained
        return "ViT-L-14", self.pretrained or "datacomp_xl_s13b_b90k"


@dataclass
class MixConfig:
    """Images of another data set that are mixed into those that are learnt from, to see what becomes of a rare kind.

    Args:
        dataset: A name that `python -m pc_clip.datasets` lists.
        n: How many of its images, drawn by the run's seed.
        root: The folder it is in, unless it is where that list says.
        split: Which part of it; empty for its train split.
        caption: What is said of an image that has no captions of its own, with {} for its class.
    """

    dataset: str
    n: int
    root: str | None = None
    split: str | None = None
    caption: str = "a photo of a {}"


@dataclass
class DataConfig:
    """The images and what was written about them.

    Args:
        dataset: A name that `python -m pc_clip.datasets` lists.
        root: The folder it is in, unless it is where that list says.
        split: Which part of it, or the path of a file for tsv and changes; empty for train.
        missing: What pictures mean that the files of a data set name and that are absent, error or skip.
        differences: The JSONL file of difference sentences; only methods that learn from them read it.
        statements: Files of what is true and false of images, for method preference; empty for the data set's own.
            pc_clip/statements.py says which formats.
        captions: A file of captions in place of the data set's own, rewritten ones for instance; images without one
            are left out.
        embeddings: A file of image embeddings, or the index.json of many, to use in place of the images. The pictures
            of coco then need not be there, and tar files without captions are listed but not opened.
        broken: What a picture means that is there but does not decode, error or skip; for skip all are decoded once
            before the run, and those left out are counted. Which they are is remembered until a file changes.
        mix: Images of other data sets to learn from as well: a list of {dataset: ..., n: ...}.
        min_crop: Where the image tower learns, each image is a random crop of at least this share of its area; 1 for
            the transform of the evaluations.
        workers: Processes that read images.
    """

    dataset: str = "example"
    root: str | None = None
    split: str | None = None
    missing: str = "error"
    differences: str = ""
    statements: list[str] = field(default_factory=list)
    captions: str | None = None
    embeddings: str | None = None
    broken: str = "error"
    mix: list[MixConfig] = field(default_factory=list)
    min_crop: float = 1.0
    workers: int = 0


@dataclass
class SamplerConfig:
    """Which examples come together in a batch: at random, or in clusters of similar ones (SimCLIP).

    Args:
        kind: random or clusters.
        similarity: What makes examples similar, their text or their image.
        online: Similar by the model as it is at the beginning of each epoch; otherwise as it was before training.
        cluster_size: Examples a cluster (k).
        clusters: Clusters a batch, in place of cluster_size: k is then share * batch_size / clusters.
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
    cluster_size: int | None = None
    clusters: int | None = None
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
    log_every: int = 50
    save_every: int = 500
    tracker: str = ""
    threads: int = 0


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
    out: str = "runs"
    seed: int = 0
    resume: bool = False
    overwrite: bool = False
    device: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass
class RankConfig:
    """Which images are put in order by how well they fit a caption, for --task rank.

    Args:
        n_queries: How many captions, each of another image and none of them twice; empty for one of each image.
        margin: Candidates are the images whose cosine with the caption is within this of the best one's.
        least: Fewer candidates are filled up with crops of them.
        most: No more candidates than these, the caption's own image among them.
        pairs_each: How many pairs of a caption's candidates are drawn; empty for all.
        pictures: Whether the writer server is shown the pictures; false sends it their captions alone, for models that
            see none.
        order_prompt: What a language model is asked for an order, a YAML like configs/prompts/rank_order.yaml; empty
            for that one. --prompt is for the descriptions.
        missing: What pictures mean that the files of a data set name and that are absent, error or skip.
        device: Where images and captions are embedded, cpu or cuda; empty for the GPU if there is one.
        batch_size: Images embedded together.
        workers: Processes that read images.
    """

    n_queries: int | None = None
    margin: float = 0.05
    least: int = 4
    most: int = 9
    pairs_each: int | None = None
    pictures: bool = True
    order_prompt: str | None = None
    missing: str = "error"
    device: str = ""
    batch_size: int = 128
    workers: int = 0


@dataclass
class GenerateConfig:
    """Write sentences on how one image, or class, differs from another: from captions, names or pictures.

    Args:
        name: The sentences go to {out}/{name}.jsonl; empty for example, or for the data set and the task, or the data
            set and the writer change.
        task: pairs (of images, from their captions), compare (how one class differs from another), describe (what
            images of a class look like), rewrite (captions in other words) or rank (which images fit a caption better
            than others, to {out}/{name}.parquet).
        captions: A COCO captions JSON or a SimCLIP TSV; empty for the captions of the embedded example, or of the data
            set whose images are ranked.
        dataset: Whose classes are compared or described, or whose images are ranked, or looked at by the writer change.
        root: The folder it is in, unless it is where `python -m pc_clip.datasets` says.
        question: Which of its classifications, where it has several (the example has).
        split: Which split of the data set; the first, train, unless named.
        n_images: How many images are drawn; empty for all.
        n_pairs: How many pairs of them, or of classes, are drawn; empty for all. The writer change takes pairs before
            and after a change, where the data set has them.
        n_each: Descriptions a class.
        both_orders: Whether each pair is written about in both orders.
        caption: Which of an image's captions is used: random (drawn for each pair, or query) or longest (it says most).
        writer: rules, transformers, server, or change, which is a captioner of changes and looks at the pictures.
        min_characters: Shorter sentences are rejected; empty for 60, and 20 where classes or single captions are
            written about.
        prompt: What a language model is asked, a YAML like those in configs/prompts/; empty for the task's.
        seed: Of every random choice.
        out: Where the sentences are kept.
        overwrite: Write again what is there already.
    """

    name: str = ""
    task: str = "pairs"
    captions: str | None = None
    dataset: str = "example"
    root: str | None = None
    question: str | None = None
    split: str | None = None
    n_images: int | None = None
    n_pairs: int | None = None
    n_each: int = 1
    both_orders: bool = False
    caption: str = "random"
    writer: str = "rules"
    min_characters: int | None = None
    prompt: str | None = None
    seed: int = 0
    out: str = "llm_diffs"
    overwrite: bool = False
    rank: RankConfig = field(default_factory=RankConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    transformers: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    change: ChangeWriterConfig = field(default_factory=ChangeWriterConfig)


@dataclass
class EvaluateConfig:
    """Evaluate a model.

    Args:
        dataset: A name that `python -m pc_clip.datasets` lists.
        root: The folder it is in, unless it is where that list says.
        split: Which part of it, or the path of a table for tsv; empty for the test split.
        missing: What pictures mean that the files of a data set name and that are absent, error or skip.
        download: Fetch the data set if it is not there.
        mode: Evaluations, separated by commas; empty for all that the data set allows.
        checkpoint: A run's folder, a .safetensors or .pt file; empty for the model as it was pretrained.
        differences: A JSONL file of sentences about this data set's images or classes, for --mode difference.
        tasks: Attributes to ask about, by file in configs/attributes/; empty for all that fit the data set.
        n_pairs: Pairs of images drawn for each attribute, each time.
        draws: How often pairs, or the shots of a probe, are drawn anew; the mean is reported.
        images: A folder of images to put in order, for --mode rank.
        attribute: The sentence or phrase they are ordered by.
        against: Its opposite, if there is one.
        statements: Files of what is true and false of images, or folders of such files, for --mode relations and
            compositional (VSR, SugarCrepe, ARO, your own); empty for the data set's own.
        retrieval_batch: Images searched among, for --mode batches.
        beams: Sentences kept open while one is looked for, for --mode caption; 1 takes the likeliest word each time.
        length_penalty: Beams are compared by log-likelihood / length ** length_penalty.
        spice: Score captions by SPICE too, which needs Java 8 and a download (docs/change.md).
        prompts: paper for "This is a photo of a {}.", several for the mean over the data set's own list of prompts.
        templates: Prompts with {} for the class, in place of either.
        alphas: The values tried for comparative prompting and for averaging weights.
        pairs: Which classes --mode comparative compares: file for configs/comparisons/, auto for those most confused
            on validation images, described by the writer.
        n_comparisons: How many confused pairs of classes auto compares.
        calibrate: How comparisons are brought to the scale of prompts, one or more of none, norm,
            offset, centred and shuffled (pc_clip/evals/comparative.py says what they are).
        descriptions: A file of class descriptions (generate_diffs.py --task describe), for --mode extended.
        writer: What writes comparisons when pairs is auto: rules, transformers or server.
        shots: Labelled images a class for --mode probe.
        seed: Of every random choice.
        label: The name of the results' folder; empty for the checkpoint's.
        out: Where results are kept.
        again: Evaluate again what has been evaluated.
        batch_size: Images embedded together.
        workers: Processes that read images.
        device: cpu or cuda; empty for the GPU if there is one.
        threads: CPU threads; 0 leaves the choice to torch.
    """

    dataset: str = "example"
    root: str | None = None
    split: str | None = None
    missing: str = "error"
    download: bool = False
    mode: str = ""
    checkpoint: str | None = None
    differences: str | None = None
    tasks: list[str] = field(default_factory=list)
    n_pairs: int = 2000
    draws: int = 5
    images: str | None = None
    attribute: str | None = None
    against: str | None = None
    statements: list[str] = field(default_factory=list)
    retrieval_batch: int = 64
    beams: int = 1
    length_penalty: float = 1.0
    spice: bool = False
    prompts: str = "paper"
    templates: list[str] = field(default_factory=list)
    alphas: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    pairs: str = "file"
    n_comparisons: int = 10
    calibrate: list[str] = field(default_factory=lambda: ["none", "norm", "offset", "centred", "shuffled"])
    descriptions: str | None = None
    writer: str = "rules"
    shots: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    seed: int = 0
    label: str | None = None
    out: str = "results"
    again: bool = False
    batch_size: int = 128
    workers: int = 0
    device: str = ""
    threads: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    transformers: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    server: ServerConfig = field(default_factory=ServerConfig)


@dataclass
class EmbedConfig:
    """Embed a data set's images beforehand; docs/scale.md is about large ones.

    Args:
        batch_size: Images encoded together.
        shard_size: Images a file, where there are more than that; a WebDataset has a file a tar.
        precision: "no" for float32, or bf16 for mixed precision.
        dtype: What is kept, float32 or float16.
        broken: What an image means that does not decode, error or skip; what the disk or network did not give always
            stops.
        part: Which part of the work this is, as 3/16; empty for all of it. For jobs that know nothing of each other.
        verify: Read every byte of what is there already, and make again what is damaged.
        cache: The folder of the files; empty for the one where training and evaluations look for them.
        device: cpu or cuda; empty for the GPU if there is one.
    """

    batch_size: int = 128
    shard_size: int = 65_536
    precision: str = "no"
    dtype: str = "float32"
    broken: str = "error"
    part: str = ""
    verify: bool = False
    cache: str = ""
    device: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
