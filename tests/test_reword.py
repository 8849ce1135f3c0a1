"""Difference sentences in other words, by rule and by a language model: each fact stays with its image."""

import dataclasses
from pathlib import Path

import pytest
from writing_runs import meta

from pc_clip.core.config.write import GenerateConfig, WordingConfig
from pc_clip.core.errors import UserError
from pc_clip.data.differences import Difference, read, to_line
from pc_clip.data.wordings import role_mentions
from pc_clip.write import generate, work
from pc_clip.write.words import content_words_by_image
from pc_clip.write.writers import Writer

THINGS = ["a dog on a sofa", "two cats", "a red bus in the rain", "a kite over the sea", "a plate of pizza", "an owl"]
CONFIG = GenerateConfig(task="reword", name="other", differences="d.jsonl", out="out")


@pytest.fixture
def sentences() -> list[Difference]:
    made = [
        Difference(str(i), str(j), f"The first image shows {a}, while the second shows {b}.")
        for i, a in enumerate(THINGS)
        for j, b in enumerate(THINGS)
        if i < j
    ]
    made.append(Difference("0", "1", "There is a dog."))
    Path("d.jsonl").write_text("".join(map(to_line, made)))
    return made


def test_rewording_by_rule_keeps_the_facts(sentences):
    path = generate.generate(dataclasses.replace(CONFIG, wording=WordingConfig(schemes=["letters"])))
    written = read(path)
    assert meta(path)["counts"] == {"kept": 15, "no_roles": 1}
    assert [each[:2] for each in written] == [each[:2] for each in sentences[:-1]]
    for before, after in zip(sentences, written):
        assert content_words_by_image(after.text) == content_words_by_image(before.text), after.text
        assert not any("first" in after.text[start:end] for start, end, _ in role_mentions(after.text))
    assert len({each.text for each in written}) == 15


def test_rewording_by_a_model_must_keep_facts_with_their_images(sentences, monkeypatch):
    class Model(Writer):
        def stream(self, jobs):
            for n, job in enumerate(jobs):
                a, b = (
                    job.first.removeprefix("The first image shows ")
                    .removesuffix(".")
                    .split(", while the second shows ")
                )
                answers = [
                    f"Unlike the second image, which shows {b}, the first image shows {a} here.",
                    f"Unlike the second image, which shows {a}, the first image shows {b} here.",
                    f"One of the two pictures shows {a}, and the other one shows {b} instead.",
                ]
                yield n, answers[n % 3]

        def describe(self):
            return {"writer": "transformers", "model": "small"}

    Path("d.jsonl").write_text("".join(map(to_line, sentences[:-1])))
    monkeypatch.setattr(work, "make_writer", lambda config: Model())
    path = generate.generate(dataclasses.replace(CONFIG, writer="transformers"))
    assert meta(path)["counts"] == {"kept": 5, "roles_exchanged": 5, "no_roles": 5}


def test_without_sentences_there_is_nothing_to_reword():
    with pytest.raises(UserError, match="--differences FILE"):
        generate.generate(GenerateConfig(task="reword"))
    with pytest.raises(UserError, match="--differences has no effect"):
        generate.generate(GenerateConfig(differences="d.jsonl"))
