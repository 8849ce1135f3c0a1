"""Settings of generate_diffs.py: the tasks and a group for each writer."""

from __future__ import annotations

from typing import Any

from pc_clip.core.config.settings import LoaderConfig, PretrainedConfig, group, runtime, setting, settings


def of_tasks(default: Any, tasks: str, doc: str) -> Any:
    """A setting that only some tasks use (and the writer change, which counts as one); elsewhere it is an error."""
    return setting(default, doc, tasks=tuple(tasks.split()))


@settings
class LanguageModelConfig:
    """A causal language model of the transformers library."""

    model: str = setting("meta-llama/Llama-2-13b-chat-hf", "Name on the Hugging Face hub, or a folder.")
    gguf_file: str | None = setting(None, "File inside `model` when the weights are in GGUF format.")
    dtype: str = setting("bfloat16", "float32, bfloat16 or float16.")
    quantize: str = setting("", "4bit or 8bit by bitsandbytes, on a GPU; empty for neither.")
    batch_size: int = runtime(32, "Prompts generated together.")
    max_new_tokens: int = setting(80, "The longest answer.")
    temperature: float = setting(0.0, "0 for the most likely answer; above it, answers are drawn by seed.")
    top_p: float = setting(1.0, "Draw among the most likely tokens that make up this share.")
    share_prefix: bool = runtime(True, "Compute what all prompts begin with once.")
    device: str = runtime("", "Where the model runs; empty for the GPU if there is one.")


@settings
class ServerConfig:
    """A language model behind one or several OpenAI-compatible servers."""

    url: list[str] = runtime(
        ["http://localhost:8000/v1"], "Where the servers are, with their paths, separated by commas."
    )
    model: str = setting("", "The model's name there; empty for the only one that is served.")
    chat: bool = setting(True, "Ask through the chat template; false for a base model, by worked examples.")
    system_role: bool = setting(True, "Send the system prompt as a message of its own, not before the question.")
    concurrency: int = runtime(32, "Requests under way at once, for each URL.")
    timeout: float = runtime(60.0, "Seconds a request may take.")
    retries: int = runtime(8, "How often a failed request is tried again, with waits of 0.5 s to 8 s.")
    api_key_env: str = runtime("OPENAI_API_KEY", "The environment variable that holds the key of every URL.")
    max_tokens: int = setting(100, "The longest answer.")
    temperature: float = setting(0.0, "0 for the most likely answer; above it, answers are drawn by seed.")
    top_p: float = setting(1.0, "Draw from the likeliest tokens that make up this share.")
    stop: list[str] = setting([], "Strings that end an answer; without chat, the end of the line unless given.")
    extra: str = setting("", 'Further fields of a request: {"chat_template_kwargs": {"enable_thinking": false}}.')
    rename: list[str] = setting([], "Fields of a request under other names: max_tokens=max_completion_tokens.")


@settings
class ChangeWriterConfig(LoaderConfig):
    """A captioner of changes, trained by finetune.py --method change with stage caption."""

    checkpoint: str = setting("", "Its run's folder, or a .safetensors file.")
    references: bool = setting(False, "Write the data set's own change sentences; needs no captioner.")
    beams: int = setting(1, "Sentences kept open while one is looked for; 1 takes the likeliest word each time.")
    length_penalty: float = setting(1.0, "Beams are compared by log-likelihood / length ** length_penalty.")


@settings
class WordingConfig:
    """In which wordings the writer rules puts a difference; data/wordings.yaml has them all."""

    families: list[str] = setting([], "Families of templates; empty for all that are not held out for evaluations.")
    schemes: list[str] = setting([], "Schemes of names for the two images; empty for all that are not held out.")
    order: str = setting("both", "Which image is mentioned first: both, each as often, or first, as templates stand.")
    without: list[str] = setting([], "Families and schemes that are left out in addition.")
    graded: float = setting(0.0, "The share of sentences that compare: larger, more people (data/graded_nouns.yaml).")
    openers: float = setting(0.0, 'The share of sentences with an opener, as in "Overall, the first image ...".')


@settings
class RankDataConfig(LoaderConfig):
    """Which images are put in order by how well they fit a caption, for --task rank."""

    n_queries: int | None = setting(None, "How many captions, each of another image; empty for one of each image.")
    margin: float = setting(0.05, "Candidates have a cosine within this of the best one's.")
    most: int = setting(9, "No more candidates than these, the caption's own image among them.")
    pairs_each: int | None = setting(None, "How many pairs of a caption's candidates are drawn; empty for all.")
    pictures: bool = setting(True, "Show the writer server the pictures; false sends it their captions.")
    order_prompt: str | None = setting(None, "A YAML that asks for an order, like write/prompts/rank_order.yaml.")


@settings
class GenerateConfig:
    """Write sentences on how one image, or class, differs from another: from captions, names or pictures."""

    name: str = setting("", "The sentences go to {out}/{name}.jsonl; empty for example, or dataset and task.")
    task: str = setting(
        "pairs",
        "pairs (of images, from their captions), compare (how one class differs from another), describe (what "
        "images of a class look like), rewrite (captions in other words), reword (difference sentences in other words) "
        "or rank (which images fit a caption better).",
    )
    differences: str = of_tasks("", "reword", "The file of difference sentences that are put in other words.")
    captions: str | None = of_tasks(
        None, "pairs rewrite rank", "A COCO JSON or a SimCLIP TSV; empty for the data set's own."
    )
    dataset: str = of_tasks(
        "example", "pairs rewrite compare describe rank change",
        "Whose images or classes are written about; with --captions those of its split that the file has captions of.",
    )  # fmt: skip
    root: str | None = of_tasks(
        None, "pairs rewrite compare describe rank change", "The folder it is in, unless it is the usual one."
    )
    question: str | None = of_tasks(None, "compare describe", "Which of its classifications, where it has several.")
    split: str | None = setting(None, "Which split of the data set; the first, train, unless named.")
    n_images: int | None = of_tasks(None, "pairs rewrite change", "How many images are drawn; empty for all.")
    n_pairs: int | None = of_tasks(
        None, "pairs compare change", "How many pairs of them, or of classes; empty for all."
    )
    n_each: int = of_tasks(1, "describe", "Descriptions a class.")
    both_orders: bool = of_tasks(False, "pairs compare change", "Write about each pair in both orders.")
    caption: str = of_tasks("random", "pairs rank", "Which of an image's captions is used: random or longest.")
    writer: str = setting("rules", "rules, transformers, server, or change, a captioner that looks at the pictures.")
    min_characters: int | None = of_tasks(
        None, "pairs rewrite reword compare describe rank", "The shortest sentence; empty for 60, and 20 for classes."
    )
    prompt: str | None = of_tasks(
        None, "pairs rewrite reword compare describe rank", "A YAML like those in write/prompts/; empty for the task's."
    )
    seed: int = setting(0, "Of every random choice.")
    out: str = runtime("llm_diffs", "Where the sentences are kept.")
    overwrite: bool = runtime(False, "Write again what is there already.")
    allow_missing: bool = runtime(False, "Finish without the sentences that no server could write; they are counted.")
    rank: RankDataConfig = group(RankDataConfig, tasks=("rank",))
    model: PretrainedConfig = group(PretrainedConfig, tasks=("rank",))
    wording: WordingConfig = group(WordingConfig, tasks=("pairs", "reword", "compare"))
    transformers: LanguageModelConfig = group(LanguageModelConfig, needs="writer=transformers")
    server: ServerConfig = group(ServerConfig, needs="writer=server")
    change: ChangeWriterConfig = group(ChangeWriterConfig, tasks=("change",))
