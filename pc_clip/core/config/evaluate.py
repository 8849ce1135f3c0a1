"""Settings of run.py: what all evaluations share, and a group for each that has settings of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from pc_clip.core.config.settings import LoaderConfig, PretrainedConfig, runtime
from pc_clip.core.config.write import LanguageModelConfig, ServerConfig

ALPHAS = tuple(n / 10 for n in range(11))


@dataclass
class DifferenceConfig:
    """Does a difference sentence point along the difference of two images?

    Args:
        sentences: A JSONL file of sentences about this data set's images or classes, in place of its attributes.
        n_pairs: Pairs of images drawn for each attribute, each time.
        draws: How often pairs are drawn anew; the mean is reported.
    """

    sentences: str | None = None
    n_pairs: int = 2000
    draws: int = 5


@dataclass
class WordingsConfig:
    """The same differences in many wordings, among them some that no training sentence has.

    Args:
        n_pairs: Pairs of images.
        families: The families of wordings that are held out; empty for those of data/wordings.yaml.
        schemes: The schemes of names for the two images that are held out; empty for those.
        trained_schemes: The schemes in which families are asked about; empty for all that are not held out.
    """

    n_pairs: int = 300
    families: list[str] = field(default_factory=list)
    schemes: list[str] = field(default_factory=list)
    trained_schemes: list[str] = field(default_factory=list)


@dataclass
class RankConfig:
    """Images in the order of a sentence.

    Args:
        attribute: The sentence or phrase that the images of --images are ordered by.
        against: Its opposite, if there is one.
    """

    attribute: str | None = None
    against: str | None = None


@dataclass
class ComparativeConfig:
    """What is known of how two classes differ, put into their prompts.

    Args:
        alphas: The weights of the ordinary prompt that are tried.
        pairs: Which classes are compared: file for the comparisons that come with the data set, auto for those most
            confused on validation images, described by the writer.
        n_comparisons: How many confused pairs of classes auto compares.
        calibrate: How comparisons are brought to the scale of prompts, one or more of none, norm, offset, centred and
            shuffled (evals/comparative.py says what they are).
        writer: What writes comparisons when pairs is auto: rules, transformers or server.
    """

    alphas: list[float] = field(default_factory=lambda: list(ALPHAS))
    pairs: str = "file"
    n_comparisons: int = 10
    calibrate: list[str] = field(default_factory=lambda: ["none", "norm", "offset", "centred", "shuffled"])
    writer: str = "rules"
    transformers: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    server: ServerConfig = field(default_factory=ServerConfig)


@dataclass
class ExtendedConfig:
    """Classes by their descriptions.

    Args:
        descriptions: A file of class descriptions (generate_diffs.py --task describe).
    """

    descriptions: str | None = None


@dataclass
class AverageConfig:
    """Weights averaged with the start (WiSE-FT).

    Args:
        alphas: The shares of the finetuned weights that are tried.
    """

    alphas: list[float] = field(default_factory=lambda: list(ALPHAS))


@dataclass
class ProbeConfig:
    """Logistic regression on few labelled images.

    Args:
        shots: Labelled images a class.
        draws: How often these are drawn anew; the mean is reported.
    """

    shots: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    draws: int = 5


@dataclass
class GeometryConfig:
    """How differences lie in the embedding space.

    Args:
        n_pairs: Pairs of images drawn for each attribute.
    """

    n_pairs: int = 2000


@dataclass
class BatchesConfig:
    """Retrieval within batches, as SimCLIP reports it.

    Args:
        size: Images searched among.
    """

    size: int = 64


@dataclass
class CaptionConfig:
    """Sentences on what changed between two images.

    Args:
        beams: Sentences kept open while one is looked for; 1 takes the likeliest word each time.
        length_penalty: Beams are compared by log-likelihood / length ** length_penalty.
        spice: Score sentences by SPICE too, which needs Java 8 and a download (docs/change.md).
    """

    beams: int = 1
    length_penalty: float = 1.0
    spice: bool = False


EVALUATIONS: dict[str, str] = {  # --mode NAME, in a line each
    "zeroshot": "zero-shot classification by prompts",
    "difference": "difference sentences against pairs of images",
    "wordings": "differences in any wording, trained or not",
    "rank": "images in the order of an attribute, or of a sentence of yours",
    "comparative": "prompts that know how classes differ",
    "extended": "prompts that describe classes",
    "average": "weights averaged with the start",
    "probe": "few-shot logistic regression",
    "geometry": "alignment, analogies, the gap between images and texts, maps",
    "retrieve": "retrieval, R@k both ways",
    "batches": "retrieval within batches (by name alone)",
    "relations": "true and false statements (VSR)",
    "compositional": "a caption against a hard negative (SugarCrepe, ARO)",
    "caption": "sentences on what changed",
    "change_retrieval": "retrieval of such sentences",
}


@dataclass
class EvaluateConfig(LoaderConfig):
    """Evaluate a model.

    Args:
        dataset: A name that `python -m pc_clip datasets` lists.
        root: The folder it is in, unless it is where that list says.
        split: Which part of it, or the path of a table for tsv; empty for the test split.
        download: Fetch the data set if it is not there.
        mode: Evaluations, separated by commas; empty for all that the data set allows.
        checkpoint: A run's folder, a .safetensors or .pt file; empty for the model as it was pretrained.
        images: A folder of images in place of a data set, for --mode rank.
        tasks: Attributes to ask about, by name; empty for all that fit the data set.
        statements: Files of what is true and false of images, or folders of such files, for --mode relations and
            compositional (VSR, SugarCrepe, ARO, your own); empty for the data set's own.
        prompts: paper for "This is a photo of a {}.", several for the mean over the data set's own list of prompts.
        templates: Prompts with {} for the class, in place of either.
        seed: Of every random choice.
        label: The name of the results' folder; empty for the checkpoint's.
        out: Where results are kept.
        again: Evaluate again what has been evaluated.
        threads: CPU threads; 0 leaves the choice to torch.
    """

    # Settings by their earlier names.
    MOVED: ClassVar[dict[str, str]] = {
        "differences": "difference.sentences",
        "n_pairs": "difference.n_pairs (or geometry.n_pairs)",
        "draws": "difference.draws (or probe.draws)",
        "attribute": "rank.attribute",
        "against": "rank.against",
        "retrieval_batch": "batches.size",
        "beams": "caption.beams",
        "length_penalty": "caption.length_penalty",
        "spice": "caption.spice",
        "alphas": "comparative.alphas (or average.alphas)",
        "pairs": "comparative.pairs",
        "n_comparisons": "comparative.n_comparisons",
        "calibrate": "comparative.calibrate",
        "writer": "comparative.writer",
        "descriptions": "extended.descriptions",
        "shots": "probe.shots",
    }

    dataset: str = "example"
    root: str | None = runtime(None)
    split: str | None = None
    download: bool = runtime(False)
    mode: str = runtime("")
    checkpoint: str | None = runtime(None)
    images: str | None = None
    tasks: list[str] = field(default_factory=list)
    statements: list[str] = field(default_factory=list)
    prompts: str = "paper"
    templates: list[str] = field(default_factory=list)
    seed: int = 0
    label: str | None = runtime(None)
    out: str = runtime("results")
    again: bool = runtime(False)
    threads: int = runtime(0)
    model: PretrainedConfig = field(default_factory=PretrainedConfig, metadata={"identity": False})
    difference: DifferenceConfig = field(default_factory=DifferenceConfig, metadata={"identity": False})
    wordings: WordingsConfig = field(default_factory=WordingsConfig, metadata={"identity": False})
    rank: RankConfig = field(default_factory=RankConfig, metadata={"identity": False})
    comparative: ComparativeConfig = field(default_factory=ComparativeConfig, metadata={"identity": False})
    extended: ExtendedConfig = field(default_factory=ExtendedConfig, metadata={"identity": False})
    average: AverageConfig = field(default_factory=AverageConfig, metadata={"identity": False})
    probe: ProbeConfig = field(default_factory=ProbeConfig, metadata={"identity": False})
    geometry: GeometryConfig = field(default_factory=GeometryConfig, metadata={"identity": False})
    batches: BatchesConfig = field(default_factory=BatchesConfig, metadata={"identity": False})
    caption: CaptionConfig = field(default_factory=CaptionConfig, metadata={"identity": False})
