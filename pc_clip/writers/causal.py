"""Sentences by a causal language model of the transformers library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from safetensors import SafetensorError

from pc_clip import prompts
from pc_clip.errors import UserError, check_choice
from pc_clip.prompts import Prompt
from pc_clip.writers.job import Job, Writer


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


class LanguageModelWriter(Writer):
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

    def stream(self, jobs: Sequence[Job]) -> Iterator[tuple[int, str]]:
        torch = self.torch
        size = 1 if self.config.temperature > 0 else self.config.batch_size  # a draw must not depend on its neighbours
        prompts = [self.prompt(job) for job in jobs]
        order = sorted(range(len(jobs)), key=lambda n: len(prompts[n]))  # like lengths together: little padding
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
            yield from zip(rows, texts)

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
