"""Settings that several scripts share, and what makes two settings the same work (`identity`)."""

from __future__ import annotations

import dataclasses
from dataclasses import MISSING, dataclass, field
from typing import Any


def setting(default: Any, doc: str, **metadata: Any) -> Any:
    """A setting of a group: its default, and what --help says of it.

    needs: what another setting of the same group has to be for this one to have an effect: "kind=clusters",
    "keep!=1.0", or a name alone for anything but 0, false and nothing (core/cli).
    """
    metadata["doc"] = doc
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def runtime(default: Any, doc: str) -> Any:
    """A setting that says how work is done and not what comes out: it may change between a run and its continuation."""
    return setting(default, doc, identity=False)


def group(kind: type, **metadata: Any) -> Any:
    """A group of settings within another."""
    return field(default_factory=kind, metadata=metadata)


def settings(kind: type) -> type:
    """A dataclass of settings. Its docstring then lists them, where --help reads them."""
    kind = dataclass(kind)
    docs = [f"    {f.name}: {f.metadata['doc']}" for f in dataclasses.fields(kind) if "doc" in f.metadata]
    kind.__doc__ = "\n".join([str(kind.__doc__), "", "Args:", *docs])
    return kind


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


@settings
class PretrainedConfig:
    """A model as it was published."""

    name: str = setting(
        "",
        "open_clip's name of the architecture, example, example_vit or local-dir:FOLDER; empty for the "
        "embedded one on the example, and PC-CLIP's ViT-L-14 on anything else.",
    )
    pretrained: str | None = setting(None, "One of open_clip's tags, a file of weights, or scratch for random ones.")
    tag: str | None = setting(None, "The open_clip tag whose image transform and activation a weights file needs.")

    def source(self, dataset: str) -> tuple[str, str | None, str | None]:
        """The architecture, the weights and their tag that a model is made of, when it is used on `dataset`."""
        if self.name:
            return self.name, self.pretrained, self.tag
        if dataset in ("example", "example_relations"):
            return "example", self.pretrained, self.tag
        if dataset == "example_changes":
            return "example_vit", self.pretrained, self.tag
        return "ViT-L-14", self.pretrained or "datacomp_xl_s13b_b90k", self.tag


@settings
class ModelConfig(PretrainedConfig):
    """The model a run starts from, and what of it learns."""

    start: str = setting("", "Checkpoint to initialise from: a run's folder, a .safetensors or .pt file.")
    train: str = setting(
        "text_blocks",
        "What learns: text_blocks, text, all_text_but_embeddings or both; attention for the query, key and "
        "value projections of both towers (A-CLIP), text_attention for those of the text tower.",
    )
    lora_rank: int = setting(0, "Rank of LoRA adapters on the weights `train` selects; 0 for none. Needs peft.")
    lora_alpha: float | None = setting(None, "LoRA scale = lora_alpha / lora_rank; null for 1.")
    fast_text: bool = setting(True, "Use the padding-free text encoder where the tower allows it.")


@settings
class LoaderConfig:
    """How images are read and embedded."""

    missing: str = setting("error", "What to do with annotated images that are missing: error or skip.")
    upright: bool | None = setting(None, "Apply EXIF orientation; empty for your own data (folder, tsv, changes) only.")
    batch_size: int = runtime(128, "Batch size for image embeddings.")
    workers: int = runtime(0, "Data-loading processes.")
    device: str = runtime("", "cpu or cuda; empty for the GPU if there is one.")


@settings
class MixConfig:
    """Images of another data set that are mixed into those that are learnt from."""

    dataset: str = setting(MISSING, "A name that `python -m pc_clip datasets` lists.")
    n: int = setting(MISSING, "Number of images, drawn with the run's seed.")
    root: str | None = setting(None, "Root folder; empty for the one in that list.")
    split: str | None = setting(None, "Split; empty for train.")
    caption: str = setting("a photo of a {}", "Caption of an image without one; {} is its class.")


@settings
class DataConfig:
    """The images and what was written about them."""

    dataset: str = setting("example", "A name that `python -m pc_clip datasets` lists.")
    root: str | None = setting(None, "Root folder; empty for the one in that list.")
    split: str | None = setting(None, "Split, or the path of a file for tsv and changes; empty for train.")
    missing: str = setting("error", "What to do with annotated images that are missing: error or skip.")
    upright: bool | None = setting(None, "Apply EXIF orientation; empty for your own data (folder, tsv, changes) only.")
    differences: str = setting("", "The JSONL file of difference sentences, for methods that learn from them.")
    statements: list[str] = setting([], "Files of true and false statements, instead of the data set's own.")
    captions: str | None = setting(
        None, "A file of captions instead of the data set's; images without captions are dropped."
    )
    embeddings: str | None = setting(None, "A file of image embeddings, or index.json of shards, instead of images.")
    broken: str = setting(
        "error", "What to do with images that do not decode: error or skip (skip decodes all once first)."
    )
    mix: list[MixConfig] = setting([], 'Other data sets to learn from as well: \'[{"dataset": "mnist", "n": 500}]\'.')
    min_crop: float = setting(1.0, "Smallest area fraction of random crops, where the image tower is trained.")
    workers: int = runtime(0, "Data-loading processes.")


@settings
class EmbedConfig:
    """Embed a data set's images beforehand; docs/scale.md is about large ones."""

    batch_size: int = runtime(128, "Batch size.")
    shard_size: int = setting(65_536, "Images per shard; a WebDataset has one shard a tar.")
    precision: str = setting("no", '"no" for float32, or bf16 for mixed precision.')
    dtype: str = setting("float32", "Stored type, float32 or float16.")
    broken: str = setting("error", "What to do with images that do not decode: error or skip.")
    cache: str = runtime("", "Folder of the shards; empty for the shared cache.")
    device: str = runtime("", "cpu or cuda; empty for the GPU if there is one.")
    model: PretrainedConfig = group(PretrainedConfig)
    data: DataConfig = group(DataConfig)
