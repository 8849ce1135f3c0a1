"""Sentences by a causal language model of the transformers library, many at a time.

What makes it fast: prompts of like length are generated together; what all prompts begin with (the system message,
the worked examples) is computed once and its keys and values are copied; an answer ends at its line, not
at the longest answer's length; weights in bf16, on the CPU too, where a GGUF file's weights are unpacked.
Sampling draws for each row from a generator of its own, so that a sentence does not depend on its neighbours.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import PartialState
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import Tensor

from pc_clip.core.config.write import LanguageModelConfig
from pc_clip.core.errors import UserError, check_at_least, check_choice
from pc_clip.write import prompts
from pc_clip.write.prompts import Prompt
from pc_clip.write.writers import Job, Writer

WORTH_CACHING = 16  # tokens; a shorter common beginning is computed each time
BATCHES_SORTED = 16  # so many batches of prompts are sorted by length together


class LanguageModelWriter(Writer):
    """Asks a causal language model, through its chat template or, where it has none, with worked examples."""

    def __init__(self, config: LanguageModelConfig, prompt: Prompt | None = None) -> None:
        check_at_least("transformers.batch_size", config.batch_size, 1)
        self.config = config
        self.asked = prompt or prompts.read(prompts.FOLDER / "pairs.yaml")
        self.tokenizer, self.model = _load(config)
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self._ends_line = None if self.tokenizer.chat_template else _tokens_with_newline(self.tokenizer)
        self._prefix: tuple[list[int], Any] | None = None

    def stream(self, jobs: Sequence[Job]) -> Iterator[tuple[int, str]]:
        size = self.config.batch_size
        for start in range(0, len(jobs), size * BATCHES_SORTED):
            window = range(start, min(start + size * BATCHES_SORTED, len(jobs)))
            tokens = {n: self._tokens(jobs[n]) for n in window}
            order = sorted(window, key=lambda n: len(tokens[n]))  # like lengths together: little padding
            shared = _common_beginning(list(tokens.values())) if self.config.share_prefix else 0
            for first in range(0, len(order), size):
                rows = order[first : first + size]
                texts = self._generate([tokens[n] for n in rows], [jobs[n].seed for n in rows], shared)
                yield from zip(rows, texts)

    @torch.no_grad()
    def _generate(self, tokens: list[list[int]], seeds: list[int], shared: int) -> list[str]:
        """The answers to some prompts, the first `shared` tokens of which are the same in all."""
        inputs = self._inputs(tokens, shared)
        out = self.model.generate(**inputs, **self._options(seeds))  # [B, L]
        answers = self.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        # Without a chat template an answer is one line; after it the model would invent a next example.
        return answers if self._ends_line is None else [answer.split("\n")[0] for answer in answers]

    def _inputs(self, tokens: list[list[int]], shared: int) -> dict[str, Any]:
        """Padding on the left; with a shared beginning, between it and the rest, where masked columns do no harm."""
        shared = shared if shared >= WORTH_CACHING else 0
        longest, pad = max(map(len, tokens)), self.tokenizer.pad_token_id
        ids = [t[:shared] + [pad] * (longest - len(t)) + t[shared:] for t in tokens]
        mask = [[1] * shared + [0] * (longest - len(t)) + [1] * (len(t) - shared) for t in tokens]
        device = self.model.device
        inputs = {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}
        if shared:
            cache = copy.deepcopy(self._cache_of(tokens[0][:shared]))  # generate() goes on writing into it
            cache.batch_repeat_interleave(len(tokens))
            inputs["past_key_values"] = cache
        return inputs

    def _cache_of(self, beginning: list[int]) -> Any:
        """Keys and values of a beginning, computed when it is a new one."""
        if self._prefix is None or self._prefix[0] != beginning:
            from transformers import DynamicCache

            cache = DynamicCache(config=self.model.config)
            self.model(torch.tensor([beginning], device=self.model.device), past_key_values=cache, use_cache=True)
            self._prefix = beginning, cache
        return self._prefix[1]

    def _options(self, seeds: list[int]) -> dict[str, Any]:
        from transformers import LogitsProcessorList, StoppingCriteriaList, TemperatureLogitsWarper, TopPLogitsWarper

        options: dict[str, Any] = {
            "max_new_tokens": self.config.max_new_tokens,
            "pad_token_id": self.tokenizer.pad_token_id,
            "do_sample": False,
            "temperature": None, "top_p": None, "top_k": None,  # of the model's own settings: ours stand below
        }  # fmt: skip
        if self.config.temperature > 0:
            draw = [TemperatureLogitsWarper(self.config.temperature)]
            if self.config.top_p < 1:
                draw.append(TopPLogitsWarper(self.config.top_p))
            options["logits_processor"] = LogitsProcessorList([*draw, _Draw(seeds)])
        if self._ends_line is not None:
            ends = self._ends_line.to(self.model.device)
            options["stopping_criteria"] = StoppingCriteriaList([lambda ids, scores, **_: ends[ids[:, -1]]])
        return options

    def _tokens(self, job: Job) -> list[int]:
        return self.tokenizer(self.prompt(job), add_special_tokens=not self.tokenizer.chat_template)["input_ids"]

    def prompt(self, job: Job) -> str:
        """The text the model continues."""
        if not self.tokenizer.chat_template:
            return self.asked.with_examples(job.first, job.second)
        system, question = self.asked.system, self.asked.question(job.first, job.second)
        chat = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        try:
            return self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except TemplateError:  # some templates, Gemma's for one, know no system role
            chat = [{"role": "user", "content": f"{system}\n\n{question}"}]
            return self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    def describe(self) -> dict[str, Any]:
        return {
            "writer": "transformers",
            **vars(self.config),
            "chat_template": bool(self.tokenizer.chat_template),
            "system": self.asked.system,
            "instruction": self.asked.instruction,
            "worked_examples": [] if self.tokenizer.chat_template else list(self.asked.examples),
        }


class _Draw:
    """Draws a token a row by the Gumbel-max trick: argmax(score + noise) is a draw from softmax(score).

    Each row's noise comes from its own seed, so that greedy search over the noisy scores gives every row
    the same answer whatever stands beside it.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # [B, L], [B, vocabulary]
        noise = torch.stack([-torch.empty(scores.shape[1]).exponential_(generator=g).log() for g in self.generators])
        return scores + noise.to(scores)


def _common_beginning(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with, at most all but one of the shortest: something must be left to ask."""
    first, last = min(prompts), max(prompts)  # what the extremes share, all share
    same = next((n for n, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
    return min(same, min(map(len, prompts)) - 1)


def _tokens_with_newline(tokenizer: Any) -> Tensor:
    """Which tokens end a line.  -> [vocabulary] bool"""
    texts = tokenizer.batch_decode([[n] for n in range(len(tokenizer))])
    return torch.tensor(["\n" in text for text in texts])


def _load(config: LanguageModelConfig) -> tuple[Any, Any]:
    """Tokenizer and model. Raises UserError when they cannot be had."""
    from pc_clip.models import torchvision_compat  # noqa: F401  (transformers imports torchvision)

    import transformers  # isort: skip

    check_choice("transformers.quantize", config.quantize, ("", "4bit", "8bit"))
    transformers.utils.logging.disable_progress_bar()
    source = {"gguf_file": config.gguf_file} if config.gguf_file else {}
    device, options = _device(config), dict(source)
    try:
        if config.quantize:
            options["device_map"] = {"": device}
            options["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=config.quantize == "4bit", load_in_8bit=config.quantize == "8bit",
                bnb_4bit_compute_dtype=getattr(torch, config.dtype),
            )  # fmt: skip
        elif config.gguf_file and hasattr(transformers, "GgufConfig"):  # its packed kernels are made for float32 alone
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.model, **source)
        model = transformers.AutoModelForCausalLM.from_pretrained(config.model, dtype=config.dtype, **options)
    except (OSError, ValueError, ImportError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"the language model {config.model!r} could not be loaded ({reason}). Give "
            "--transformers.model a folder that holds it, or a name the hub knows while a network is there "
            "(gated models such as Llama 2 need `huggingface-cli login` first)."
        ) from error
    return tokenizer, (model if config.quantize else model.to(device)).eval()


def _device(config: LanguageModelConfig) -> str:
    """The GPU of this process, where there are several processes."""
    if config.device or not torch.cuda.is_available():
        return config.device or "cpu"
    return f"cuda:{PartialState().local_process_index}"
