"""What is said of classes: phrases from grades and captions, prompts, and the tasks that write them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_evals import FakeClip

from pc_clip.core.config.evaluate import EvaluateConfig, ExtendedConfig
from pc_clip.core.config.settings import DataConfig
from pc_clip.core.config.write import GenerateConfig
from pc_clip.core.errors import UserError
from pc_clip.data import attributes, class_text, differences
from pc_clip.data.captions import read_captions
from pc_clip.data.dataset import Dataset, Question
from pc_clip.data.registry import open_dataset
from pc_clip.data.training_data import load_dataset
from pc_clip.evals import EvalContext, extended
from pc_clip.write import classes, generate, prompts, work
from pc_clip.write.rules import RulesWriter
from pc_clip.write.writers import Writer


def made(graded=None, captions=None) -> Dataset:
    question = Question("class", ("emu", "owl"), np.arange(4), np.array([0, 0, 1, 1]), graded=graded or {})
    ids = list("abcd")
    return Dataset("made", "", ids, lambda row: Image.new("RGB", (8, 8)), "f", captions, questions=(question,))


BIRDS = {
    "has_wing_color::brown": {"emu": 0.7, "owl": 0.1},
    "has_wing_color::white": {"emu": 0.1, "owl": 0.8},
    "has_size::large_(16_-_32_in)": {"emu": 0.9, "owl": 0.5},
    "has_size::small_(5_-_9_in)": {"emu": 0.0, "owl": 0.3},
}


def test_a_class_is_named_as_its_prompt_names_it():
    data = made()
    assert class_text.phrase(data.questions[0], "emu") == "an emu"
    assert class_text.phrase(data.questions[0], "grizzly bear") == "a grizzly bear"
    example = {q.name: q for q in open_dataset("example", split="val").questions}
    assert class_text.phrase(example["position"], "on the left") == "an object on the left"


def test_birds_are_set_apart_and_described_by_families_of_attributes():
    data = made(BIRDS)
    question = data.questions[0]
    opposed = class_text.contrast_phrases(data, question, "emu", "owl", seed=0)
    assert opposed == ("a bird with brown wing color", "a bird with white wing color")
    assert class_text.contrast_phrases(data, question, "owl", "emu", seed=0) == opposed[::-1]
    described = class_text.class_description(data, question, "emu", 0)
    assert described == "An emu: a bird of large size, a bird with brown wing color."


def test_graded_animals_are_set_apart_in_the_words_of_the_tasks(tmp_path, monkeypatch):
    monkeypatch.setattr(attributes, "FOLDER", tmp_path)
    words = "more: m, less: l, high: a striped animal, low: a plain animal"
    (tmp_path / "made.yaml").write_text(f"dataset: made\nattributes: {{stripes: {{graded: stripes, {words}}}}}")
    data = made({"stripes": {"emu": 0.0, "owl": 1.0}, "fast": {"emu": 1.0, "owl": 0.0}})
    question = data.questions[0]
    assert class_text.contrast_phrases(data, question, "emu", "owl", 0) == ("a plain animal", "a striped animal")
    assert class_text.class_description(data, question, "owl", 0) == "An owl: a striped animal."
    assert class_text.class_description(data, question, "emu", 0) == "An emu"


def test_without_grades_a_caption_of_the_class_describes_it():
    data = made(captions=[("an emu runs", "emu"), ("an emu eats", "emu"), ("owl",), ("owl",)])
    texts = {class_text.class_description(data, data.questions[0], "emu", seed) for seed in range(20)}
    assert texts == {"an emu runs", "an emu eats", "emu"}
    with pytest.raises(UserError, match="the rules know nothing of the classes of made but their names"):
        class_text.class_description(made(), made().questions[0], "emu", 0)


# -- prompts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", generate.TASKS)
def test_every_task_has_a_prompt(task):
    prompt = prompts.read(prompts.FOLDER / f"{task}.yaml")
    asked = prompt.with_examples("a {second} emu", "an owl")
    assert "a {second} emu" in asked and asked.endswith("Answer:")
    assert asked.count("Answer:") == len(prompt.examples) + 1
    assert ("an owl" in asked) == (task in ("pairs", "compare"))


def test_a_broken_prompt_is_refused():
    for content, message in [
        ("[", "is not a prompt"),
        ("system: x", "is not a prompt .*instruction"),
        ("{system: x, instruction: y}", "no {first}"),
    ]:
        Path("p.yaml").write_text(content)
        with pytest.raises(UserError, match=message):
            prompts.read("p.yaml")
    with pytest.raises(UserError, match="no prompt at nowhere.yaml"):
        prompts.read("nowhere.yaml")


# -- writing -------------------------------------------------------------------------------------------


def test_descriptions_of_the_example_name_their_class(small_example):
    path = generate.generate(GenerateConfig(task="describe", question="shape", n_each=2))
    assert path == Path("llm_diffs/example_shape_describe.jsonl")
    rows = class_text.read_descriptions(path)
    shapes = next(q.classes for q in open_dataset("example", split="val").questions if q.name == "shape")
    assert list(rows) == list(shapes)
    assert all(name in text and len(texts) == 2 for name, texts in rows.items() for text in texts)


def test_comparisons_of_the_example_are_sentences_about_its_classes(small_example):
    path = generate.generate(GenerateConfig(task="compare", question="size", both_orders=True))
    rows = differences.read(path)
    assert len(rows) == 6
    sentences = {(d.first, d.second): d.text for d in rows}
    assert "larger objects" in sentences["large", "small"].split("second")[0].split("while")[0]
    assert sentences["large", "small"] != sentences["small", "large"]
    assert json.loads(path.with_suffix(".meta.json").read_text())["settings"]["task"] == "compare"


def test_another_prompt_is_other_settings(small_example):
    config = GenerateConfig(task="compare", question="size")
    generate.generate(config)
    with pytest.raises(UserError, match="written with other settings"):
        generate.generate(GenerateConfig(name="example_size_compare", task="compare", question="count"))


def test_tasks_that_cannot_be_done(small_example):
    for settings, message in [
        ({"task": "summarise"}, "task is 'summarise'.*Known: compare, describe, pairs"),
        ({"task": "describe"}, "asks about colour, .*say which with --question"),
        ({"task": "compare", "question": "seize"}, "asks no question 'seize'. Did you mean 'size'"),
        ({"task": "describe", "question": "size", "n_each": 0}, "n_each is 0"),
    ]:
        with pytest.raises(UserError, match=message):
            generate.generate(GenerateConfig(**settings))


def test_sentences_that_cannot_be_used_are_none():
    class Silent(RulesWriter):
        def write(self, jobs):
            return ["" for _ in jobs]

    data = made()
    assert classes.compare_classes(Silent(), "rules", data, data.questions[0], [("emu", "owl")], 0) == [None]
    texts = classes.compare_classes(RulesWriter(), "rules", data, data.questions[0], [("emu", "owl")], 0)
    assert "an emu" in texts[0] and "an owl" in texts[0]


def test_a_broken_file_of_descriptions_is_refused():
    for content, message in [
        (None, "there is no file d.jsonl"),
        ("", "is empty"),
        ("{}\n", "line 1 must be an object with class, text"),
        ('{"class": "emu", "text"', "line 1 is not JSON"),
    ]:
        if content is not None:
            Path("d.jsonl").write_text(content)
        with pytest.raises(UserError, match=message):
            class_text.read_descriptions("d.jsonl")


# -- zero-shot with descriptions -----------------------------------------------------------------------


def subject(texts, config) -> EvalContext:
    clip = FakeClip(texts, [[1, 0.2], [1, 0.9], [0.1, 1], [0.9, 1]])
    context = EvalContext(clip, lambda: clip, made(), config)
    context.__dict__["z"] = clip.z
    return context


def test_descriptions_are_appended_or_averaged():
    """The prompts are swapped and so always wrong; appended descriptions are right, two averaged ones outvote it."""
    emu, owl = "This is a photo of a emu.", "This is a photo of a owl."
    texts = {emu: [0, 1], owl: [1, 0], "tall": [1, 0], "taller": [1, 0], "round": [0, 1], "rounder": [0, 1]}
    for answers in ("tall", "taller"):
        texts[f"{emu} {answers}"] = [1, 0]
    for answers in ("round", "rounder"):
        texts[f"{owl} {answers}"] = [0, 1]
    rows = [("emu", "tall"), ("emu", "taller"), ("owl", "round"), ("owl", "rounder")]
    Path("d.jsonl").write_text("".join(json.dumps({"class": c, "text": t}) + "\n" for c, t in rows))
    result = extended.evaluate(subject(texts, EvaluateConfig(extended=ExtendedConfig(descriptions="d.jsonl"))))
    assert result.metrics["extended_plain"] == 0.0
    assert result.metrics["extended_append"] == result.metrics["extended_average"] == 1.0
    assert result.metrics["gain_extended_append"] == 1.0 and result.n == 4


def test_a_class_without_a_description_keeps_its_prompt():
    question = made().questions[0]
    answers = {"emu": ["tall", "grey"]}
    texts = extended.class_texts(question, ("a {}",), answers)
    assert texts["extended_append"] == [["a emu. tall", "a emu. grey"], ["a owl"]]
    assert texts["extended_average"] == [["a emu", "tall", "grey"], ["a owl"]]


def test_descriptions_of_other_classes_are_refused():
    Path("d.jsonl").write_text(json.dumps({"class": "owll", "text": "round"}) + "\n")
    with pytest.raises(UserError, match="describes 'owll', which is not a class of made. Did you mean 'owl'"):
        extended.evaluate(subject({}, EvaluateConfig(extended=ExtendedConfig(descriptions="d.jsonl"))))


# -- captions in other words ---------------------------------------------------------------------------


class Shouter(Writer):
    """Stands for a language model: says the caption again, louder."""

    def stream(self, jobs):
        yield from ((n, f"{job.first.upper()} {job.second}".strip()) for n, job in enumerate(jobs))

    def describe(self):
        return {"writer": "shouter"}


def test_rewritten_captions_take_the_place_of_the_data_sets_own(coco_folder, monkeypatch):
    monkeypatch.setattr(work, "make_writer", lambda config: Shouter())
    own = str(coco_folder / "annotations" / "captions_val2017.json")
    path = generate.generate(GenerateConfig(name="louder", task="rewrite", writer="server", captions=own, n_images=5))
    rows = read_captions(path)
    assert len(rows) == 5 and all(text == text.upper() for _, texts in rows.values() for text in texts)
    where = {"dataset": "coco", "root": str(coco_folder), "split": "val2017"}
    before = load_dataset(DataConfig(**where))
    after = load_dataset(DataConfig(**where, captions=str(path)))
    spoken = dict(zip(before.ids, before.captions))
    assert set(after.ids) == set(rows)
    for key, texts in zip(after.ids, after.captions):
        assert texts == tuple(text.upper() for text in spoken[key])


def test_rules_do_not_rewrite_and_other_captions_do_not_fit(coco_folder):
    own = str(coco_folder / "annotations" / "captions_val2017.json")
    with pytest.raises(UserError, match="rules cannot rewrite captions"):
        generate.generate(GenerateConfig(name="r", task="rewrite", captions=own))
    Path("other.jsonl").write_text(json.dumps({"image": "elsewhere", "text": "a dog"}) + "\n")
    with pytest.raises(UserError, match="captions of 1 images, none of which is in coco"):
        load_dataset(DataConfig(dataset="coco", root=str(coco_folder), split="val2017", captions="other.jsonl"))
