"""Small runs of generate_diffs.py: a table of captions, runs that are interrupted, and what they leave."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from pc_clip.core.config.write import GenerateConfig, WordingConfig
from pc_clip.write import generate
from pc_clip.write.rules import RulesWriter

PLAIN = WordingConfig(["plain"], ["first_image"])  # sentences that are like those of language models
PLAIN_FLAGS = ("--wording.families", "plain", "--wording.schemes", "first_image")


def on_captions(captions: Sequence[Sequence[str]]) -> GenerateConfig:
    """Settings that write about images named by their numbers, with as many captions each, into the folder out."""
    header = "\t".join(["id", "image", *(f"caption{n}" for n in range(1, 1 + len(captions[0])))])
    lines = ["\t".join([f"{n:02d}", f"{n}.jpg", *texts]) for n, texts in enumerate(captions)]
    Path("captions.tsv").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return GenerateConfig(name="some", captions="captions.tsv", out="out", wording=PLAIN)


def interrupt(config: GenerateConfig, after: int, error: type[BaseException] = KeyboardInterrupt) -> Path:
    """Run until the writer has given `after` sentences; leaves the working folder, whose last file is returned."""
    stream = RulesWriter.stream

    def stops(self, jobs):
        yield from itertools.islice(stream(self, jobs), after)
        raise error

    with pytest.MonkeyPatch.context() as patch, pytest.raises(error):
        patch.setattr(RulesWriter, "stream", stops)
        generate.generate(config)
    return max((Path(config.out) / f"{config.name}.parts").glob("[0-9]*.jsonl"))


def whole(config: GenerateConfig) -> bytes:
    """What an uninterrupted run writes."""
    return generate.generate(dataclasses.replace(config, out="whole")).read_bytes()


def meta(path: Path) -> dict:
    return json.loads(path.with_suffix(".meta.json").read_text(encoding="utf-8"))


def names(folder: Path | str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())
