"""Settings that several scripts share, and what makes two settings the same work (`identity`)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


def runtime(default: Any) -> Any:
    """A setting that says how work is done and not what comes out: it may change between a run and its continuation."""
    return field(default=default, metadata={"identity": False})


def is_group(f: dataclasses.Field) -> bool:
    """Whether a setting is a group of settings."""
    return dataclasses.is_dataclass(f.default_factory)


def as_dict(value: Any, whole: bool = True) -> Any:
    """Settings as nested dicts. whole: with those that are declared `runtime`."""
    if isinstance(value, list | tuple):
        return [as_dict(each, whole) for each in value]
    if not dataclasses.is_dataclass(value):
        return value
    left_out = {f.name for f in dataclasses.fields(value) if not (whole or f.metadata.get("identity", True))}
    return {name: as_dict(each, whole) for name, each in vars(value).items() if name not in left_out}


def identity(config: Any) -> dict[str, Any]:
    """All that the outcome depends on, as a nested dict: every setting and group but those declared `runtime`."""
    return as_dict(config, whole=False)


@dataclass
class PretrainedConfig:
    """A model as it was published.

    Args:
        name: open_clip's name of the architecture, example, example_vit or local-dir:FOLDER; empty for the embedded
            one on the example, and PC-CLIP's (ViT-L-14, datacomp_xl_s13b_b90k) on anything else.
        pretrained: One of open_clip's tags for it, a file of weights, or scratch for weights drawn by the seed.
    """

    name: str = ""
    pretrained: str | None = None

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
class ModelConfig(PretrainedConfig):
    """The model a run starts from, and what of it learns.

    Args:
        start: A checkpoint to start from instead of published weights: a run's folder, a .safetensors or .pt file.
        train: What learns: text_blocks, text, all_text_but_embeddings or both; attention for the query, key and value
            projections of both towers (A-CLIP), text_attention for those of the text tower.
        lora_rank: Train LoRA adapters of this rank on the weights that `train` names; 0 for none. Needs peft.
        lora_alpha: What adapters add is multiplied by lora_alpha / lora_rank; null for 1.
        fast_text: Encode texts without padding where the text tower allows it; the same but for rounding.
    """

    start: str = ""
    train: str = "text_blocks"
    lora_rank: int = 0
    lora_alpha: float | None = None
    fast_text: bool = True


@dataclass
class LoaderConfig:
    """How images are read and embedded.

    Args:
        missing: What to do with annotated images that are absent, error or skip.
        batch_size: Images embedded together.
        workers: Processes that read images.
        device: cpu or cuda; empty for the GPU if there is one.
    """

    missing: str = "error"
    batch_size: int = runtime(128)
    workers: int = runtime(0)
    device: str = runtime("")


@dataclass
class MixConfig:
    """Images of another data set that are mixed into those that are learnt from.

    Args:
        dataset: A name that `python -m pc_clip datasets` lists.
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
        dataset: A name that `python -m pc_clip datasets` lists.
        root: The folder it is in, unless it is where that list says.
        split: Which part of it, or the path of a file for tsv and changes; empty for train.
        missing: What a picture means that is named and absent, error or skip.
        differences: The JSONL file of difference sentences, for methods that learn from them.
        statements: Files of what is true and false of images, for method preference; empty for the data set's own.
        captions: A file of captions in place of the data set's own; images without one are left out.
        embeddings: A file of image embeddings, or the index.json of many, in place of the images (docs/scale.md).
        broken: What a picture means that does not decode, error or skip; for skip all are decoded once before the run.
        mix: Images of other data sets to learn from as well, a list such as '[{"dataset": "mnist", "n": 500}]'.
        min_crop: Where the image tower learns, the least share of an image's area that its random crop has.
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
    workers: int = runtime(0)


@dataclass
class EmbedConfig:
    """Embed a data set's images beforehand; docs/scale.md is about large ones.

    Args:
        batch_size: Images encoded together.
        shard_size: Images a file, where there are more than that; a WebDataset has a file a tar.
        precision: "no" for float32, or bf16 for mixed precision.
        dtype: What is kept, float32 or float16.
        broken: What an image means that does not decode, error or skip.
        cache: The folder of the files; empty for the one where training and evaluations look for them.
        device: cpu or cuda; empty for the GPU if there is one.
    """

    batch_size: int = runtime(128)
    shard_size: int = 65_536
    precision: str = "no"
    dtype: str = "float32"
    broken: str = "error"
    cache: str = runtime("")
    device: str = runtime("")
    model: PretrainedConfig = field(default_factory=PretrainedConfig)
    data: DataConfig = field(default_factory=DataConfig)
