"""Settings of run.py: what all evaluations share, and a group for each that has settings of its own."""

from __future__ import annotations

from pc_clip.core.config.settings import LoaderConfig, PretrainedConfig, group, runtime, setting, settings
from pc_clip.core.config.write import LanguageModelConfig, ServerConfig

ALPHAS = tuple(n / 10 for n in range(11))


@settings
class DifferenceConfig:
    """Does a difference sentence point along the difference of two images?"""

    sentences: str | None = setting(None, "A JSONL file of sentences, instead of the data set's attributes.")
    n_pairs: int = setting(2000, "Pairs of images a draw, for each attribute.")
    draws: int = setting(5, "Number of draws; the mean is reported.")


@settings
class WordingsConfig:
    """The same differences in many wordings, among them some that no training sentence has."""

    n_pairs: int = setting(200, "Pairs of images.")
    families: list[str] = setting([], "Held-out families of templates; empty for those of data/wordings.yaml.")
    schemes: list[str] = setting([], "Held-out naming schemes; empty for those of data/wordings.yaml.")
    trained_schemes: list[str] = setting([], "Naming schemes for the families; empty for all that are not held out.")


@settings
class RankConfig:
    """Images in the order of a sentence."""

    attribute: str | None = setting(None, "The sentence or phrase to rank the images of --images by.")
    against: str | None = setting(None, "The opposite of the attribute, if any.")


@settings
class ComparativeConfig:
    """Comparative prompting: differences between classes in their prompts."""

    alphas: list[float] = setting(list(ALPHAS), "Candidate weights alpha of the plain prompt.")
    pairs: str = setting("file", "Which classes are compared: file for the data set's own, auto for the most confused.")
    n_comparisons: int = setting(10, "Number of confused class pairs for auto.")
    calibrate: list[str] = setting(["none", "norm", "offset", "centred", "shuffled"], "Scaling of the comparisons.")
    writer: str = setting("rules", "Writer of comparisons for auto: rules, transformers or server.")
    transformers: LanguageModelConfig = group(LanguageModelConfig, needs="writer=transformers")
    server: ServerConfig = group(ServerConfig, needs="writer=server")


@settings
class ExtendedConfig:
    """Classes by their descriptions."""

    descriptions: str | None = setting(None, "A file of class descriptions (generate_diffs.py --task describe).")


@settings
class AverageConfig:
    """Weights averaged with the start (WiSE-FT)."""

    alphas: list[float] = setting(list(ALPHAS), "Candidate weights alpha of the finetuned model.")


@settings
class ProbeConfig:
    """Logistic regression on few labelled images."""

    shots: list[int] = setting([1, 2, 4, 8, 16], "Labelled images per class.")
    draws: int = setting(5, "Number of draws; the mean is reported.")


@settings
class GeometryConfig:
    """How differences lie in the embedding space."""

    n_pairs: int = setting(2000, "Pairs of images for each attribute.")


@settings
class BatchesConfig:
    """Retrieval within batches, as SimCLIP reports it."""

    size: int = setting(64, "Images per batch.")


@settings
class CaptionConfig:
    """Sentences on what changed between two images."""

    beams: int = setting(1, "Beam size; 1 is greedy decoding.")
    length_penalty: float = setting(1.0, "Beams are ranked by log-likelihood / length ** length_penalty.")
    spice: bool = setting(False, "Also compute SPICE, which needs Java 8 and a download (docs/change.md).")


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
    "compositional": "a caption against a hard negative (SugarCrepe, ARO, VALSE)",
    "paraphrases": "a caption in two wordings against a wrong one (SugarCrepe++)",
    "winoground": "two captions against two images (Winoground)",
    "choice": "one of several captions of an image (What'sUp, NegBench)",
    "imagecode": "a sentence that means one of ten nearly equal images (ImageCoDe)",
    "relative": "images found by another one and what to change in it (CIRR, FashionIQ)",
    "caption": "sentences on what changed",
    "change_retrieval": "retrieval of such sentences",
}


@settings
class RelativeConfig:
    """Images found by a reference and a relative caption."""

    alphas: list[float] = setting([0.25, 0.5, 1.0, 2.0, 4.0], "Candidate weights alpha of the caption, besides 0.")


@settings
class EvaluateConfig(LoaderConfig):
    """Evaluate a model."""

    dataset: str = setting("example", "A name that `python -m pc_clip datasets` lists.")
    root: str | None = runtime(None, "Root folder; empty for the one in that list.")
    split: str | None = setting(None, "Split, or the path of a table for tsv; empty for test.")
    download: bool = runtime(False, "Download the data set if it is missing.")
    mode: str = runtime("", "Evaluations, separated by commas; empty for all that apply.")
    checkpoint: str | None = runtime(
        None, "A run's folder, a .safetensors or .pt file; empty for the pretrained model."
    )
    images: str | None = setting(None, "A folder of images instead of a data set, for --mode rank.")
    tasks: list[str] = setting([], "Attributes to ask about, by name; empty for all that fit the data set.")
    statements: list[str] = setting([], "Files or folders of true and false statements, instead of the data set's own.")
    unconfirmed: bool = setting(False, "Keep VALSE's rows that fewer than two of three annotators confirmed.")
    prompts: str = setting("paper", 'paper for "This is a photo of a {}.", several for the data set\'s own list.')
    templates: list[str] = setting([], "Prompts with {} for the class, in place of either.")
    seed: int = setting(0, "Random seed.")
    label: str | None = runtime(None, "The name of the results' folder; empty for the checkpoint's.")
    out: str = runtime("results", "Folder of results.")
    again: bool = runtime(False, "Recompute existing results.")
    threads: int = runtime(0, "CPU threads; 0 leaves the choice to torch.")
    model: PretrainedConfig = group(PretrainedConfig, identity=False)
    difference: DifferenceConfig = group(DifferenceConfig, identity=False)
    wordings: WordingsConfig = group(WordingsConfig, identity=False)
    rank: RankConfig = group(RankConfig, identity=False)
    comparative: ComparativeConfig = group(ComparativeConfig, identity=False)
    extended: ExtendedConfig = group(ExtendedConfig, identity=False)
    average: AverageConfig = group(AverageConfig, identity=False)
    probe: ProbeConfig = group(ProbeConfig, identity=False)
    geometry: GeometryConfig = group(GeometryConfig, identity=False)
    batches: BatchesConfig = group(BatchesConfig, identity=False)
    relative: RelativeConfig = group(RelativeConfig, identity=False)
    caption: CaptionConfig = group(CaptionConfig, identity=False)
