"""Captions in, difference sentences out: NAME.jsonl, and NAME.meta.json on how it was made.

While it works, NAME.partial.jsonl holds one line a pair that is done, kept or rejected, after a first
line with the settings. Started again, it continues after the last whole line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pc_clip import environment
from pc_clip.config import DataConfig, GenerateConfig
from pc_clip.datasets import open_dataset, read_captions
from pc_clip.differences import Difference, choose_pairs, clean, to_line
from pc_clip.errors import UserError, check_at_least, check_choice
from pc_clip.files import write_json, write_text
from pc_clip.writers import Job, LanguageModelWriter, RulesWriter, Writer

log = logging.getLogger(__name__)

EXAMPLE = GenerateConfig(
    n_images=3000, n_pairs=20000, caption="longest"
)  # configs/diffs_example.yaml, which a test compares


def generate(config: GenerateConfig) -> Path:
    """Write the sentences; returns the finished file. Interrupted and called again, it continues.

    Raises UserError when the file exists with other settings, and for captions that cannot be used.
    """
    check_choice("writer", config.writer, ("rules", "transformers"))
    check_choice("caption", config.caption, ("random", "longest"))
    for name in ("n_images", "n_pairs", "chunk"):
        if (value := getattr(config, name)) is not None:
            check_at_least(name, value, 1)
    out = Path(config.out) / f"{config.name}.jsonl"
    captions = _captions(config)
    if config.caption == "longest":
        captions = {key: (max(texts, key=len),) for key, texts in captions.items()}
    settings = _settings(config)
    if out.is_file() and not config.overwrite:
        if _made_with(out.with_suffix(".meta.json")) == settings:
            log.info("%s is complete; --overwrite true writes it again", out)
            return out
        raise UserError(f"{out} exists and was written with other settings; choose another --name or --overwrite true")
    ids = _draw_images(sorted(captions), config)
    pairs = choose_pairs(ids, config.n_pairs, config.seed, config.both_orders)
    partial = _Partial(out.with_suffix(".partial.jsonl"), settings, drop_others=config.overwrite)
    if partial.done:
        log.info("%d of %d pairs are done; continuing", partial.done, len(pairs))
    writer: Writer = RulesWriter()
    if config.writer == "transformers":
        writer = LanguageModelWriter(config.transformers)

    with (
        partial.path.open("a", encoding="utf-8") as file,
        tqdm(total=len(pairs), initial=partial.done, desc=config.name, disable=None) as bar,
    ):
        for start in range(partial.done, len(pairs), config.chunk):
            chunk = pairs[start : start + config.chunk]
            jobs = [_job(captions, i, j, config.seed, start + n) for n, (i, j) in enumerate(chunk)]
            for (i, j), job, raw in zip(chunk, jobs, writer.write(jobs)):
                text, reason = clean(raw)
                row = {"first": i, "second": j, "text": text, "reason": reason, "captions": [job.first, job.second]}
                file.write(json.dumps(row | ({"raw": raw} if text is None else {}), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(chunk))
    _finish(out, partial, settings, writer, len(pairs))
    return out


def write_missing_example(data: DataConfig) -> None:
    """The example's sentences, where a run on the example needs them and they are not there yet."""
    path = Path(data.differences)
    if data.dataset == "example" and path == Path(EXAMPLE.out) / f"{EXAMPLE.name}.jsonl" and not path.is_file():
        log.info("%s is not there yet; writing it as generate_diffs.py does with no argument", path)
        generate(EXAMPLE)


# -- what goes in --------------------------------------------------------------------------------------


def _captions(config: GenerateConfig) -> dict[str, tuple[str, ...]]:
    if config.captions:
        return {key: captions for key, (_, captions) in read_captions(config.captions).items()}
    data = open_dataset("example", split=config.split)
    return dict(zip(data.ids, data.captions))


def _draw_images(ids: list[str], config: GenerateConfig) -> list[str]:
    if config.n_images is None:
        return ids
    if config.n_images > len(ids):
        raise UserError(f"n_images is {config.n_images}, but only {len(ids)} images have captions")
    rng = np.random.default_rng([config.seed, 1])
    return [ids[n] for n in sorted(rng.choice(len(ids), config.n_images, replace=False))]


def _job(captions: dict[str, tuple[str, ...]], i: str, j: str, seed: int, number: int) -> Job:
    """One caption of each image, drawn for this pair."""
    rng = np.random.default_rng([seed, 2, number])
    first, second = (captions[key][int(rng.integers(len(captions[key])))] for key in (i, j))
    return Job(first, second, int(rng.integers(2**31)))


def _settings(config: GenerateConfig) -> dict[str, Any]:
    """Everything the sentences depend on, and nothing else."""
    found = dataclasses.asdict(config)
    for name in ("out", "overwrite", "chunk"):
        found.pop(name)
    if config.writer == "transformers":
        for name in ("batch_size", "device"):  # how, not what
            found["transformers"].pop(name)
    else:
        found.pop("transformers")
    if config.captions:  # by content, so that an edited file is not taken for the same
        found["captions_sha256"] = hashlib.sha256(Path(config.captions).read_bytes()).hexdigest()
    return found


def _made_with(meta: Path) -> dict[str, Any] | None:
    try:
        return json.loads(meta.read_text(encoding="utf-8")).get("settings")
    except (OSError, json.JSONDecodeError):
        return None


# -- what comes out ------------------------------------------------------------------------------------


class _Partial:
    """The working file. A last line that was torn by an interruption is cut off; its pair is written again."""

    def __init__(self, path: Path, settings: dict[str, Any], drop_others: bool) -> None:
        self.path = path
        head = (json.dumps({"settings": settings}, ensure_ascii=False) + "\n").encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.is_file() else b""
        content = content[: content.rfind(b"\n") + 1]
        if drop_others and not content.startswith(head):
            content = b""
        if content and not content.startswith(head):
            raise UserError(
                f"{path} was begun with other settings; choose another --name, or --overwrite true to drop it"
            )
        if not content:
            path.write_bytes(content := head)
        elif len(content) < path.stat().st_size:
            os.truncate(path, len(content))  # never rewritten: what is done stays on the disk whatever happens now
        self.done = content.count(b"\n") - 1

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").split("\n")[1:-1]]


def _finish(out: Path, partial: _Partial, settings: dict[str, Any], writer: Writer, pairs: int) -> None:
    rows = partial.rows()
    if len(rows) != pairs:
        raise UserError(
            f"{partial.path} has {len(rows)} lines for {pairs} pairs; did two processes write it? Delete it."
        )
    reasons = Counter(row["reason"] for row in rows)
    kept = [Difference(row["first"], row["second"], row["text"]) for row in rows if row["text"] is not None]
    if not kept:
        raise UserError(f"none of the {len(rows)} sentences could be used ({dict(reasons)}); look at {partial.path}")
    meta = {
        "settings": settings,
        "writer": writer.describe(),
        "counts": dict(reasons.most_common()),
        **environment.describe(),
    }
    write_json(out.with_suffix(".meta.json"), meta)
    write_text(out, "".join(map(to_line, kept)))
    partial.path.unlink()
    log.info("%s: %d sentences (%s)", out, len(kept), ", ".join(f"{n} {reason}" for reason, n in reasons.most_common()))
