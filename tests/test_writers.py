"""Writers: what the rules say is true, and a language model's answers do not depend on the batch."""

import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from writing_runs import PLAIN

from pc_clip.core.config.write import LanguageModelConfig, WordingConfig
from pc_clip.core.errors import UserError
from pc_clip.example import world
from pc_clip.example.captions import PLACES, parse
from pc_clip.models import torchvision_compat  # noqa: F401  (before open_clip and transformers)
from pc_clip.write import causal, prompts
from pc_clip.write.causal import LanguageModelWriter
from pc_clip.write.rules import RulesWriter
from pc_clip.write.writers import Job

import transformers  # isort: skip

# -- rules ---------------------------------------------------------------------------------------------

CLAIMS = (
    re.compile(r"The first image shows (?P<a>.+), while the second shows (?P<b>.+)\."),
    re.compile(r"The second image shows (?P<b>.+), while the first shows (?P<a>.+)\."),
    re.compile(r"In the first image one sees (?P<a>.+), in the second image (?P<b>.+)\."),
    re.compile(r"In the second image one sees (?P<b>.+), in the first image (?P<a>.+)\."),
)


def claims(text):
    """Which wording a sentence has, and what it says of the first and of the second image."""
    actual = [(n, m["a"], m["b"]) for n, pattern in enumerate(CLAIMS) if (m := pattern.fullmatch(text))]
    assert len(actual) == 1, text
    return actual[0]


def example_jobs(n, seed=0):
    """Pairs of scenes of the example, and a job for each."""
    rng = np.random.default_rng(seed)
    pairs = [(world.scene("val", i), world.scene("val", j)) for i, j in rng.integers(400, size=(n, 2))]
    rng = np.random.default_rng(seed)
    jobs = [
        Job(world.captions("val", i)[k % 4], world.captions("val", j)[k // 4 % 4], k)
        for k, (i, j) in enumerate(rng.integers(400, size=(n, 2)).tolist())
    ]
    return pairs, jobs


def true_of(phrase, scene):
    """Whether "red objects", "a star" or "an object on the left" describes a scene."""
    looks = {thing.looks for thing in scene.things}
    if phrase.startswith("an object "):
        return phrase == f"an object {PLACES[scene.position]}"
    word = phrase.removeprefix("a ") if phrase.startswith("a ") else phrase.removesuffix(" objects")
    return word != phrase and all(word in look for look in looks)


def test_what_the_rules_say_is_true_of_the_two_scenes():
    pairs, jobs = example_jobs(2000)
    seen = Counter()
    for (first, second), job, text in zip(pairs, jobs, RulesWriter(PLAIN).write(jobs)):
        wording, a, b = claims(text)
        graded = next((name for name, words in world.COMPARATIVES.items() if {a, b} == set(words)), "other")
        sentences, of_second = parse(job.first), parse(job.second)
        if graded != "other":
            difference = world.grade(graded, first) - world.grade(graded, second)
            assert difference != 0 and (difference > 0) == (a == world.COMPARATIVES[graded][0]), (text, job)
        elif any(sentences[kind] != of_second[kind] for kind in sentences.keys() & of_second.keys()):
            assert a != b and true_of(a, first) and true_of(b, second), (text, job)
        else:
            assert job.first.endswith(a) and job.second.endswith(b)
            graded = "captions"
        seen.update([graded, wording])
    assert min(seen[k] for k in ("size", "background", "count", "other", "captions")) > 30, seen
    assert len(seen.keys() & set(range(len(CLAIMS)))) > 1


def test_captions_that_say_nothing_different_are_set_against_each_other():
    job = Job("a picture of a red star", "a small star on a dark background", 0)
    assert claims(RulesWriter(PLAIN).write([job])[0])[1:] == ("a red star", "a small star on a dark background")


def test_any_other_captions_are_set_against_each_other():
    for seed in range(8):
        job = Job("A man with a red helmet  on a small moped. ", "There is {a} TV, and two cats\nnear it .", seed)
        _, a, b = claims(RulesWriter(PLAIN).write([job])[0])
        assert (a, b) == ("a man with a red helmet on a small moped", "{a} TV, and two cats near it")


def test_a_capital_at_the_start_does_not_stay_but_an_acronyms_does():
    words = {"Man riding a motor bike on a road.": "man riding", "People stand.": "people stand", "TVs here.": "TVs"}
    texts = RulesWriter(PLAIN).write([Job(caption, "A cat.", 0) for caption in words])
    assert [word for word, text in zip(words.values(), texts) if word not in text] == []


def test_the_rules_depend_on_the_job_alone_and_on_its_seed():
    _, jobs = example_jobs(60)
    together = RulesWriter(PLAIN).write(jobs)
    assert together == [RulesWriter(PLAIN).write([job])[0] for job in jobs] == RulesWriter(PLAIN).write(jobs)
    assert together != RulesWriter(PLAIN).write([job._replace(seed=job.seed + 1) for job in jobs])


# -- a causal language model ---------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<reply>{% endif %}"
)
PAIRS = prompts.read(prompts.FOLDER / "pairs.yaml")
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
)
JOBS = [Job(f"A dog on a {'very ' * n}old sofa.", f"{n} cats in a kitchen.", n) for n in range(5)]


def save_llama(folder, template=None):
    """A random Llama of two layers that reads and writes bytes."""
    vocabulary = ["<pad>", "</s>", "<s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: n for n, word in enumerate(vocabulary)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}  # none to pad with, as Llama's
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **special)
    fast.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=2, eos_token_id=1, initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("llama")
    return {"chat": save_llama(root / "chat", TEMPLATE), "base": save_llama(root / "base")}


def writer(folder, **options):
    options = {"dtype": "float32", "batch_size": 3, "max_new_tokens": 10, "device": "cpu"} | options
    return LanguageModelWriter(LanguageModelConfig(model=str(folder), **options))


@pytest.mark.parametrize("kind", ["chat", "base"])
def test_greedy_answers_do_not_depend_on_the_batch(folders, kind):
    model = writer(folders[kind])
    together = model.write(JOBS)
    assert together == [model.write([job])[0] for job in JOBS]
    assert together == model.write(JOBS[::-1])[::-1]
    assert len(set(together)) > 1 and all(together)
    assert not any("</s>" in text or job.first in text for job, text in zip(JOBS, together))


def test_drawn_answers_repeat_themselves_whatever_the_batch_and_the_global_generator(folders):
    model = writer(folders["chat"], temperature=1.0)
    state = torch.random.get_rng_state()
    first = model.write(JOBS)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    assert model.write(JOBS) == first and model.write(JOBS[2:]) == first[2:]
    assert first != writer(folders["chat"]).write(JOBS)


def test_a_chat_template_is_used_if_present(folders):
    chat, base = (writer(folders[kind]).prompt(Job(" A dog.\n", "A cat.", 0)) for kind in ("chat", "base"))
    assert chat.startswith(f"<system>{PAIRS.system}\n<user>Picture 1: A dog.\nPicture 2: A cat.\n")
    assert chat.endswith("\n<reply>") and not any(example["answer"] in chat for example in PAIRS.examples)
    asked = [*(example["answer"] for example in PAIRS.examples), "Picture 1: A dog.\nPicture 2: A cat.\n"]
    assert [base.index(text) for text in asked] == sorted(base.index(text) for text in asked)
    assert base.endswith("\nAnswer:")


def test_a_chat_template_without_a_system_role_gets_it_in_the_question(folders, tmp_path):
    shutil.copytree(folders["chat"], tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text(NO_SYSTEM)
    prompt = writer(tmp_path / "m").prompt(Job("A dog.", "A cat.", 0))
    assert "<user>" in prompt and "A dog." in prompt


def test_a_base_model_stops_at_the_end_of_the_line(folders):
    model = writer(folders["base"], max_new_tokens=100, batch_size=5, temperature=1.0)
    with torch.no_grad():
        model.model.lm_head.weight[model.tokenizer("\n").input_ids] *= 3  # or it would hardly ever end a line
    answers = model.write(JOBS)
    assert not any("\n" in text for text in answers)
    model._ends_line = None
    on_and_on = model.write(JOBS)
    assert answers == [text.split("\n")[0] for text in on_and_on] != on_and_on


@pytest.mark.parametrize("kind", ["chat", "base"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_p": 0.9}])
def test_sharing_the_beginning_changes_no_answer(folders, kind, options):
    """The keys and values of what all prompts begin with are computed once; padding stands behind them."""
    shared = writer(folders[kind], **options)
    assert shared.write(JOBS) == writer(folders[kind], share_prefix=False, **options).write(JOBS)
    assert shared._prefix is not None


def test_the_common_beginning_leaves_something_to_ask():
    assert causal._common_beginning([[1, 2, 3], [1, 2, 4, 5]]) == 2
    assert causal._common_beginning([[1, 2], [1, 2, 3]]) == 1
    assert causal._common_beginning([[1, 2, 3]]) == 2
    assert causal._common_beginning([[1], [2, 3]]) == 0


def test_noise_by_row_draws_from_the_softmax():
    scores = torch.log(torch.tensor([[0.6, 0.3, 0.1]])).expand(4000, 3)
    drawn = causal._Draw(range(4000))(None, scores).argmax(-1)
    shares = torch.bincount(drawn, minlength=3) / 4000
    assert torch.allclose(shares, torch.tensor([0.6, 0.3, 0.1]), atol=0.03)


def test_what_wrote_the_sentences_is_described(folders):
    about = writer(folders["chat"]).describe()
    assert about["chat_template"] is True and about["temperature"] == 0.0 and about["system"] == PAIRS.system
    assert RulesWriter(WordingConfig(["terse"])).describe()["families"] == ["terse"]


def test_a_model_that_cannot_be_loaded_is_an_error_with_its_name(folders, tmp_path):
    shutil.copytree(folders["base"], tmp_path / "weightless", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(folders["base"], tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for name in ("absent", "weightless", "cut"):
        with pytest.raises(UserError, match=rf"{name}.*could not be loaded.*--transformers\.model"):
            writer(tmp_path / name)
    for option, value in (("dtype", "float61"), ("quantize", "3bit")):
        with pytest.raises(UserError, match=value):
            writer(folders["base"], **{option: value})
