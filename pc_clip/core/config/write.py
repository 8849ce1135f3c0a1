"""Settings of generate_diffs.py: the tasks and a group for each writer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pc_clip.core.config.settings import LoaderConfig, PretrainedConfig, runtime


def of_tasks(default: Any, *tasks: str) -> Any:
    """A setting that only some tasks use (and the writer change, which counts as one); elsewhere it is an error."""
    return field(default=default, metadata={"tasks": tasks})


@dataclass
class LanguageModelConfig:
    """A causal language model of the transformers library.

    Args:
        model: Name on the Hugging Face hub, or a folder.
        gguf_file: File inside `model` when the weights are in GGUF format.
        dtype: float32, bfloat16 or float16.
        quantize: 4bit or 8bit by bitsandbytes, on a GPU; empty for neither.
        batch_size: Prompts generated together.
        max_new_tokens: The longest answer.
        temperature: 0 for the most likely answer; above it, answers are drawn, each by a seed of its own.
        top_p: Draw among the most likely tokens that make up this share.
        share_prefix: Compute what all prompts begin with once.
        device: Where the model runs; empty for the GPU if there is one.
    """

    model: str = "meta-llama/Llama-2-13b-chat-hf"
    gguf_file: str | None = None
    dtype: str = "bfloat16"
    quantize: str = ""
    batch_size: int = runtime(32)
    max_new_tokens: int = 80
    temperature: float = 0.0
    top_p: float = 1.0
    share_prefix: bool = runtime(True)
    device: str = runtime("")


@dataclass
class ServerConfig:
    """A language model behind one or several OpenAI-compatible servers.

    Args:
        url: Where the servers are, separated by commas, each with its path (http://localhost:8000/v1). All must have
            the model; each gets as many requests as it answers.
        model: The model's name there; empty for the only one that is served.
        chat: Whether the model is asked through its chat template; false for a base model, which gets worked examples
            through the completions endpoint.
        system_role: Whether the system prompt is a message of its own; false puts it before the question, for chat
            templates without that role. A server that says that there is none is understood without this.
        concurrency: Requests under way at once, for each URL.
        timeout: Seconds a request may take.
        retries: How often a request that fails is tried again, with waits of 0.5 s to 8 s, or as the server asks.
        api_key_env: The environment variable that holds the key, which goes to every URL; local servers mostly need
            none.
        max_tokens: The longest answer.
        temperature: 0 for the most likely answer; above it, answers are drawn, by each job's seed where the server
            keeps to seeds.
        top_p: Draw from the likeliest tokens that make up this share.
        stop: Strings that end an answer; empty for none, and for the end of the line where chat is false.
        rename: Fields of a request under other names, for servers that want them so: max_tokens=max_completion_tokens;
            seed= leaves seed out.
    """

    url: list[str] = field(default_factory=lambda: ["http://localhost:8000/v1"], metadata={"identity": False})
    model: str = ""
    chat: bool = True
    system_role: bool = True
    concurrency: int = runtime(32)
    timeout: float = runtime(60.0)
    retries: int = runtime(8)
    api_key_env: str = runtime("OPENAI_API_KEY")
    max_tokens: int = 100
    temperature: float = 0.0
    top_p: float = 1.0
    stop: list[str] = field(default_factory=list)
    rename: list[str] = field(default_factory=list)


@dataclass
class ChangeWriterConfig(LoaderConfig):
    """A captioner of changes, trained by finetune.py --method change with stage caption.

    Args:
        checkpoint: Its run's folder, or a .safetensors file.
        beams: Sentences kept open while one is looked for; 1 takes the likeliest word each time.
        length_penalty: Beams are compared by log-likelihood / length ** length_penalty.
        told: Write what the data set itself says of its changes, one sentence of each drawn by seed; no captioner is
            needed then. What people wrote of CLEVR-Change, say, can be learnt from so.
    """

    checkpoint: str = ""
    told: bool = False
    beams: int = 1
    length_penalty: float = 1.0


@dataclass
class WordingConfig:
    """In which wordings the writer rules puts a difference; data/wordings.yaml has them all.

    Args:
        families: Families of templates; empty for all that are not held out for evaluations.
        schemes: Schemes of names for the two images; empty for all that are not held out.
        order: Which image is mentioned first: both, each as often, or first, as the templates stand.
    """

    families: list[str] = field(default_factory=list)
    schemes: list[str] = field(default_factory=list)
    order: str = "both"


@dataclass
class RankDataConfig(LoaderConfig):
    """Which images are put in order by how well they fit a caption, for --task rank.

    Args:
        n_queries: How many captions, each of another image and none of them twice; empty for one of each image.
        margin: Candidates are the images whose cosine with the caption is within this of the best one's.
        most: No more candidates than these, the caption's own image among them.
        pairs_each: How many pairs of a caption's candidates are drawn; empty for all.
        pictures: Whether the writer server is shown the pictures; false sends it their captions alone, for models that
            see none.
        order_prompt: What a language model is asked for an order, a YAML like write/prompts/rank_order.yaml; empty
            for that one. --prompt is for the descriptions.
    """

    n_queries: int | None = None
    margin: float = 0.05
    most: int = 9
    pairs_each: int | None = None
    pictures: bool = True
    order_prompt: str | None = None


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
        root: The folder it is in, unless it is where `python -m pc_clip datasets` says.
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
        prompt: What a language model is asked, a YAML like those in write/prompts/; empty for the task's.
        seed: Of every random choice.
        out: Where the sentences are kept.
        overwrite: Write again what is there already.
        allow_missing: Finish the file without the sentences that no server could write; they are counted.
    """

    name: str = ""
    task: str = "pairs"
    captions: str | None = of_tasks(None, "pairs", "rewrite", "rank")
    dataset: str = of_tasks("example", "compare", "describe", "rank", "change")
    root: str | None = of_tasks(None, "compare", "describe", "rank", "change")
    question: str | None = of_tasks(None, "compare", "describe")
    split: str | None = None
    n_images: int | None = of_tasks(None, "pairs", "rewrite", "change")
    n_pairs: int | None = of_tasks(None, "pairs", "compare", "change")
    n_each: int = of_tasks(1, "describe")
    both_orders: bool = of_tasks(False, "pairs", "compare", "change")
    caption: str = of_tasks("random", "pairs", "rank")
    writer: str = "rules"
    min_characters: int | None = of_tasks(None, "pairs", "rewrite", "compare", "describe", "rank")
    prompt: str | None = of_tasks(None, "pairs", "rewrite", "compare", "describe", "rank")
    seed: int = 0
    out: str = runtime("llm_diffs")
    overwrite: bool = runtime(False)
    allow_missing: bool = runtime(False)
    rank: RankDataConfig = field(default_factory=RankDataConfig, metadata={"tasks": ("rank",)})
    model: PretrainedConfig = field(default_factory=PretrainedConfig, metadata={"tasks": ("rank",)})
    wording: WordingConfig = field(default_factory=WordingConfig, metadata={"tasks": ("pairs", "compare")})
    transformers: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    change: ChangeWriterConfig = field(default_factory=ChangeWriterConfig, metadata={"tasks": ("change",)})
