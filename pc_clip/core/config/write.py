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
    batch_size: int = runtime(32, "Batch size.")
    max_new_tokens: int = setting(80, "Maximum new tokens.")
    temperature: float = setting(0.0, "Sampling temperature; 0 is greedy.")
    top_p: float = setting(1.0, "Nucleus sampling: probability mass.")
    share_prefix: bool = runtime(True, "Compute the prompts' shared prefix once.")
    device: str = runtime("", "cpu or cuda; empty for the GPU if there is one.")


@settings
class ServerConfig:
    """A language model behind one or several OpenAI-compatible servers."""

    url: list[str] = runtime(["http://localhost:8000/v1"], "Base URLs of the servers, separated by commas.")
    model: str = setting("", "Model name on the server; empty if it serves one.")
    chat: bool = setting(True, "Chat completions; false for a base model, prompted by worked examples.")
    system_role: bool = setting(True, "Send the system prompt as a message of its own, not before the question.")
    concurrency: int = runtime(32, "Concurrent requests per URL.")
    timeout: float = runtime(60.0, "Time-out of a request in seconds.")
    retries: int = runtime(8, "Retries of a failed request, with waits of 0.5 s to 8 s.")
    api_key_env: str = runtime("OPENAI_API_KEY", "The environment variable that holds the key of every URL.")
    max_tokens: int = setting(100, "Maximum new tokens.")
    temperature: float = setting(0.0, "Sampling temperature; 0 is greedy.")
    top_p: float = setting(1.0, "Nucleus sampling: probability mass.")
    stop: list[str] = setting([], "Stop strings; without chat, the end of the line by default.")
    extra: str = setting("", 'Further fields of a request: {"chat_template_kwargs": {"enable_thinking": false}}.')
    rename: list[str] = setting([], "Renamed request fields: max_tokens=max_completion_tokens.")


@settings
class ChangeWriterConfig(LoaderConfig):
    """A captioner of changes, trained by finetune.py --method change with stage caption."""

    checkpoint: str = setting("", "Checkpoint of the captioner: a run's folder or a .safetensors file.")
    references: bool = setting(False, "Write the data set's own change sentences; needs no captioner.")
    beams: int = setting(1, "Beam size; 1 is greedy decoding.")
    length_penalty: float = setting(1.0, "Beams are ranked by log-likelihood / length ** length_penalty.")


@settings
class WordingConfig:
    """Wordings of the writer rules; data/wordings.yaml lists them."""

    families: list[str] = setting([], "Families of templates; empty for all that are not held out for evaluations.")
    schemes: list[str] = setting([], "Naming schemes of the two images; empty for all not held out.")
    order: str = setting("both", "Order of mention: both (half each) or first.")
    without: list[str] = setting([], "Families and schemes to leave out.")
    graded: float = setting(0.0, "Fraction of comparative sentences: larger, more people (data/graded_nouns.yaml).")
    openers: float = setting(0.0, 'The share of sentences with an opener, as in "Overall, the first image ...".')


@settings
class RankDataConfig(LoaderConfig):
    """Which images are put in order by how well they fit a caption, for --task rank."""

    n_queries: int | None = setting(
        None, "Number of query captions, each of another image; empty for one of each image."
    )
    margin: float = setting(0.05, "Largest cosine distance of a candidate from the best.")
    most: int = setting(9, "Maximum number of candidates, the caption's own image included.")
    pairs_each: int | None = setting(None, "Pairs per caption; empty for all.")
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
    n_images: int | None = of_tasks(None, "pairs rewrite change", "Number of images; empty for all.")
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
    seed: int = setting(0, "Random seed.")
    out: str = runtime("llm_diffs", "Output folder.")
    overwrite: bool = runtime(False, "Overwrite an existing file.")
    allow_missing: bool = runtime(False, "Finish without sentences that no server could write; they are counted.")
    rank: RankDataConfig = group(RankDataConfig, tasks=("rank",))
    model: PretrainedConfig = group(PretrainedConfig, tasks=("rank",))
    wording: WordingConfig = group(WordingConfig, tasks=("pairs", "reword", "compare"))
    transformers: LanguageModelConfig = group(LanguageModelConfig, needs="writer=transformers")
    server: ServerConfig = group(ServerConfig, needs="writer=server")
    change: ChangeWriterConfig = group(ChangeWriterConfig, tasks=("change",))
