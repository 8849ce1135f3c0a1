"""What writes the sentences: rules over two captions, or a language model.

A writer gets pairs of captions and gives back raw sentences, one a pair; cleaning happens elsewhere. It
never sees an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from jinja2 import TemplateError
from safetensors import SafetensorError

from pc_clip import prompts
from pc_clip.differences import contrast
from pc_clip.errors import UserError, check_choice
from pc_clip.example.captions import OPENINGS, parse
from pc_clip.example.world import COMPARATIVES
from pc_clip.prompts import Prompt


class Job(NamedTuple):
    """One sentence to write: what is known of the first and the second image or class, and a seed of its own.

    second is empty where one class alone is described.
    """

    first: str
    second: str
    seed: int


class Writer(Protocol):
    def write(self, jobs: Sequence[Job]) -> list[str]:
        """Raw sentences, one a job. The same job always gets the same sentence."""

    def describe(self) -> dict[str, Any]:
        """What made the sentences, for the file beside them."""


# -- rules ---------------------------------------------------------------------------------------------

# Rare facts are preferred, so that every kind of difference is written about as often: left to chance,
# most sentences would be about shape and count and hardly any about the background.
_PREFERENCE = {
    "background": 3.0,
    "size": 9.0,
    "position": 3.0,
    "texture": 2.0,
    "colour": 1.0,
    "shape": 1.0,
    "count": 1.0,
}
_ORDER = {"size": ("small", "medium", "large"), "background": ("dark", "grey", "light"), "count": (1, 2, 3)}


class RulesWriter:
    """Compares two captions by rule.

    Captions of the example are parsed, and one attribute that both mention and that differs is put into
    words. Any other two captions are set against each other: "The first image shows a man on a moped,
    while the second shows two cats."
    """

    def write(self, jobs: Sequence[Job]) -> list[str]:
        return [self._write(job) for job in jobs]

    def _write(self, job: Job) -> str:
        if not job.second:
            return job.first  # a description by rule is found where the classes are known (pc_clip/classes.py)
        rng = np.random.default_rng(job.seed)
        a, b = parse(job.first), parse(job.second)
        kinds = [kind for kind in _PREFERENCE if kind in a and kind in b and a[kind] != b[kind]]
        wording = 2 * int(rng.integers(2))  # of the first image first, as language models mostly write
        if not kinds:
            return contrast(_as_phrase(job.first), _as_phrase(job.second), wording)
        weights = np.array([_PREFERENCE[kind] for kind in kinds])
        kind = kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]
        return contrast(*_phrases(kind, a[kind], b[kind]), wording)

    def describe(self) -> dict[str, Any]:
        return {"writer": "rules"}


def _phrases(kind: str, a: str | int, b: str | int) -> tuple[str, str]:
    if kind in _ORDER:
        more, less = COMPARATIVES[kind]
        return (more, less) if _ORDER[kind].index(a) > _ORDER[kind].index(b) else (less, more)
    pattern = {"colour": "{} objects", "texture": "{} objects", "shape": "a {}", "position": "an object {}"}[kind]
    return pattern.format(a), pattern.format(b)


def _as_phrase(caption: str) -> str:
    """A caption as it stands inside a sentence: no full stop, no capital at its start unless it has more of them.

    A name loses its capital too; CLIP's tokenizer lowercases everything anyway.
    """
    caption = " ".join(caption.split()).rstrip(" .!")
    for opening in filter(None, OPENINGS):
        if caption.lower().startswith(opening):
            caption = caption[len(opening) :]
    first, *rest = caption.split(" ")
    return " ".join([first.lower() if first.istitle() else first, *rest])


# -- a causal language model ---------------------------------------------------------------------------


@dataclass
class LanguageModelConfig:
    """A causal language model of the transformers library.

    Args:
        model: Name on the Hugging Face hub, or a folder.
        gguf_file: File inside `model` when the weights are in GGUF format.
        dtype: float32, bfloat16 or float16.
        batch_size: Prompts generated together.
        max_new_tokens: The longest answer.
        temperature: 0 for the most likely answer; above it, answers are drawn, one at a time, by the run's seed.
        device: Where the model runs; empty for the GPU if there is one.
    """

    model: str = "meta-llama/Llama-2-13b-chat-hf"
    gguf_file: str | None = None
    dtype: str = "bfloat16"
    batch_size: int = 16
    max_new_tokens: int = 80
    temperature: float = 0.0
    device: str = ""


class LanguageModelWriter:
    """Asks a causal language model, through its chat template or, where it has none, with worked examples."""

    def __init__(self, config: LanguageModelConfig, prompt: Prompt | None = None) -> None:
        import torch

        from pc_clip import _torchvision  # noqa: F401  (transformers imports torchvision)

        import transformers  # isort: skip

        check_choice("transformers.dtype", config.dtype, ("float32", "bfloat16", "float16"))
        transformers.utils.logging.disable_progress_bar()
        self.config, self.torch = config, torch
        self.asked = prompt or prompts.read(prompts.FOLDER / "pairs.yaml")
        source = {"gguf_file": config.gguf_file} if config.gguf_file else {}
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(config.model, **source)
            model = transformers.AutoModelForCausalLM.from_pretrained(config.model, dtype=config.dtype, **source)
        except (OSError, ValueError, ImportError, AttributeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise UserError(
                f"the language model {config.model!r} could not be loaded ({reason}). Give "
                "--transformers.model a folder that holds it, or a name the hub knows while a network is there "
                "(gated models such as Llama 2 need `huggingface-cli login` first)."
            ) from error
        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(device).eval()
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def write(self, jobs: Sequence[Job]) -> list[str]:
        torch = self.torch
        size = 1 if self.config.temperature > 0 else self.config.batch_size  # a draw must not depend on its neighbours
        prompts = [self.prompt(job) for job in jobs]
        order = sorted(range(len(jobs)), key=lambda n: len(prompts[n]))  # like lengths together: little padding
        answers = [""] * len(jobs)
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            inputs = self.tokenizer(
                [prompts[n] for n in rows],
                return_tensors="pt",
                padding=True,
                add_special_tokens=not self.tokenizer.chat_template,
            ).to(self.model.device)
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(jobs[rows[0]].seed)
                out = self.model.generate(**inputs, **self._generation())
            texts = self.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for n, text in zip(rows, texts):
                answers[n] = text
        return answers

    def prompt(self, job: Job) -> str:
        """The text the model continues."""
        if self.tokenizer.chat_template:
            return self._chat(self.asked.question(job.first, job.second))
        return self.asked.with_examples(job.first, job.second)

    def _chat(self, question: str) -> str:
        chat = [{"role": "system", "content": self.asked.system}, {"role": "user", "content": question}]
        try:
            return self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except TemplateError:  # some templates, Gemma's for one, know no system role
            chat = [{"role": "user", "content": f"{self.asked.system}\n\n{question}"}]
            return self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    def _generation(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "max_new_tokens": self.config.max_new_tokens,
            "pad_token_id": self.tokenizer.pad_token_id,
            "do_sample": self.config.temperature > 0,
        }
        if self.config.temperature > 0:
            options["temperature"] = self.config.temperature
        if not self.tokenizer.chat_template:  # the answer ends with its line; the next would be an invented example
            options.update(stop_strings=["\n"], tokenizer=self.tokenizer)
        return options

    def describe(self) -> dict[str, Any]:
        return {
            "writer": "transformers",
            **vars(self.config),
            "chat_template": bool(self.tokenizer.chat_template),
            "system": self.asked.system,
            "instruction": self.asked.instruction,
            "worked_examples": [] if self.tokenizer.chat_template else list(self.asked.examples),
        }
