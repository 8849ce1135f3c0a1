"""Tokens and differences from the cache equal those made anew, and nothing damaged or foreign is ever read."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from pc_clip.core import cache
from pc_clip.core.config.train import ContrastiveConfig, FinetuneConfig, PairwiseConfig, TrainConfig
from pc_clip.core.errors import UserError
from pc_clip.data import differences, tokens
from pc_clip.data.dataset import Dataset
from pc_clip.data.differences import Difference, to_line
from pc_clip.data.embeddings import Embeddings, save_embeddings
from pc_clip.data.wordings import contrast
from pc_clip.train.methods import contrastive, pairwise
from pc_clip.train.methods.base import Texts, _equal_rows

TEXTS = ["a dog", "two cats on a sofa", "a dog", "", "¿qué? 12 — ok", "word " * 90]


@pytest.fixture(scope="module")
def tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer()


def no_tokenizing(monkeypatch):
    """From here on only a few texts, by which a tokenizer is known, are tokenised."""
    original = SimpleTokenizer.__call__

    def call(self, texts, *rest):
        return original(self, texts, *rest) if texts is tokens._PROBES else pytest.fail("a text was tokenised again")

    monkeypatch.setattr(SimpleTokenizer, "__call__", call)


def only_file(folder="data/cache/arrays") -> Path:
    (path,) = Path(folder).glob("*.safetensors")
    return path


# -- the table -----------------------------------------------------------------------------------------


@settings(max_examples=12)
@given(st.lists(st.text(), min_size=1, max_size=20))
def test_cached_tokens_equal_fresh_ones(tmp_path_factory, tokenizer, texts):
    folder = tmp_path_factory.mktemp("cache")
    expected = tokenizer(texts)
    for _ in range(2):
        table = tokens.tokenize(tokenizer, texts, folder)
        assert table.dtype == np.uint16 and torch.equal(torch.from_numpy(table.astype(np.int64)), expected)


def test_worker_processes_make_the_same_table(tokenizer, monkeypatch):
    texts = [f"picture {n} of {n % 7}" for n in range(100)]
    monkeypatch.setattr(tokens, "AT_A_TIME", 9)
    alone = tokens.make(tokenizer, texts)
    monkeypatch.setattr(tokens, "MANY", 10)
    monkeypatch.setattr(tokens, "_cores", lambda: 2)
    assert np.array_equal(tokens.make(tokenizer, texts), alone)
    assert np.array_equal(alone, tokenizer(texts).numpy())


def hugging_face(vocabulary: dict[str, int], folder: Path, **options) -> HFTokenizer:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return HFTokenizer(str(folder), **options)


WORDS = {"[UNK]": 0, "[PAD]": 1, "a": 2, "dog": 3}


def test_tokenizers_left_to_chance_are_asked_each_time():
    for each in (SimpleTokenizer(reduction_mask="random"), lambda texts: None):
        assert tokens.identity(each) is None
    tokens.tokenize(SimpleTokenizer(reduction_mask="random"), ["a b c"])
    assert not cache.CACHE.exists()


def test_another_tokenizer_never_shares_a_file_and_the_same_one_always_does(tmp_path):
    different = [
        SimpleTokenizer(),
        SimpleTokenizer(context_length=32),
        SimpleTokenizer(clean="canonicalize"),
        SimpleTokenizer(additional_special_tokens=["<dog>"]),
        hugging_face(WORDS, tmp_path / "a", context_length=8),
        hugging_face(WORDS, tmp_path / "a", context_length=9),
        hugging_face(WORDS, tmp_path / "a", context_length=8, clean="canonicalize"),
        hugging_face(WORDS | {"dog": 4, "cat": 3}, tmp_path / "b", context_length=8),
    ]
    for each in different:
        assert np.array_equal(tokens.tokenize(each, TEXTS), each(TEXTS).numpy())
    assert len(list(cache.CACHE.iterdir())) == len(different)
    same = [SimpleTokenizer(), hugging_face(WORDS, tmp_path / "a", context_length=8)]
    for each, before in zip(same, (different[0], different[4])):
        each(["something before"])  # what was tokenised earlier is no matter
        assert tokens.identity(each) == tokens.identity(before)


# -- damage --------------------------------------------------------------------------------------------


def test_a_damaged_file_is_made_again_with_a_warning(tokenizer, caplog):
    good = tokens.tokenize(tokenizer, TEXTS).copy()
    whole = only_file().read_bytes()
    for content in (b"", whole[:-1], whole + b"\0", whole[:-200] + bytes(200), b"something else"):
        only_file().write_bytes(content)
        assert np.array_equal(tokens.tokenize(tokenizer, TEXTS), good)
        assert "making it again" in caplog.text
        caplog.clear()
        assert np.array_equal(tokens.tokenize(tokenizer, TEXTS), good) and not caplog.records


def test_no_flipped_byte_anywhere_leads_to_wrong_arrays():
    """Every fourth byte of a small file: what is given is right, and nearly always made again."""
    good = {"a": np.arange(3, dtype=np.uint16), "b": np.array([[1], [2]], dtype=np.int32)}
    calls = []

    def make():
        calls.append(1)
        return good

    cache.cached("some", {"texts": "x"}, make)
    whole = only_file().read_bytes()
    places = range(0, len(whole), 4)
    for place in places:
        only_file().write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        actual = cache.cached("some", {"texts": "x"}, make)
        assert actual.keys() == good.keys(), place
        assert all(np.array_equal(actual[n], good[n]) and actual[n].dtype == good[n].dtype for n in good), place
    assert len(calls) > 0.8 * len(places)


def test_a_file_of_another_key_in_its_place_is_not_read(tokenizer, caplog):
    good = tokens.tokenize(tokenizer, ["a dog"]).copy()
    path = only_file()
    tokens.tokenize(tokenizer, ["a cat"], Path("elsewhere"))
    shutil.copy(only_file("elsewhere"), path)
    assert np.array_equal(tokens.tokenize(tokenizer, ["a dog"]), good)
    assert "made from something else" in caplog.text


def test_where_nothing_can_be_written_tokens_are_made_all_the_same(tokenizer, caplog):
    Path("data").write_text("a file where a folder is wanted")
    assert np.array_equal(tokens.tokenize(tokenizer, TEXTS), tokenizer(TEXTS).numpy())
    assert "cannot be written" in caplog.text


# -- differences ---------------------------------------------------------------------------------------

IDS = [f"im{n}" for n in range(9)]
Z = torch.from_numpy(np.random.default_rng(0).standard_normal((9, 6), dtype=np.float32))
Z[7] = 3 * Z[2]  # one picture twice: in unit embeddings they are equal


def write_differences(path="d.jsonl") -> list[Difference]:
    """60 differences: most have a mirror, some are about equal pictures, one is longer than the context."""
    rng, actual = np.random.default_rng(1), []
    for n in range(56):
        i, j = rng.choice([0, 1, 2, 3, 4, 5, 6, 8], 2, replace=False)
        actual.append(Difference(IDS[i], IDS[j], contrast(f"{n % 11} stars", f"{n % 5} rings", n)))
    actual += [
        Difference("im2", "im7", "The first image shows a cat, while the second shows a dog."),
        Difference("im4", "im4", "The first image shows a cat, while the second shows two."),
        Difference("im1", "im3", "Something is different."),
        Difference("im1", "im3", "The first image shows " + "very " * 90 + "much, while the second shows little."),
    ]
    Path(path).write_text("".join(map(to_line, actual)), encoding="utf-8")
    return actual


@pytest.fixture
def make(example_clip):
    """Makes the method on IDS and Z, with settings."""
    save_embeddings(Path("z.safetensors"), Embeddings(Z, IDS), {"image_tower": example_clip.image_tower_hash()})

    def make(clip=example_clip, **settings) -> pairwise.Method:
        config = FinetuneConfig(device="cpu", train=TrainConfig(batch_size=16))
        config.data.differences, config.data.embeddings = "d.jsonl", "z.safetensors"
        config.pairwise = PairwiseConfig(**settings)
        sentences = [(f"caption {n}", "a caption that all have") for n in range(9)]
        return pairwise.Method(clip, Dataset("some", "", IDS, None, "f", captions=sentences), config)

    return make


def same_batches(one: pairwise.Method, two: pairwise.Method) -> bool:
    pairs = zip(one.loader(3), two.loader(3), strict=True)
    return all(all(map(same, a, b)) for a, b in pairs)


def same(a, b) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("mirror", [False, True])
def test_a_second_start_reads_no_sentence_and_is_the_same(make, monkeypatch, mirror):
    write_differences()
    first = make(mirror=mirror)
    for name in ("json_lines", "swap_roles"):
        monkeypatch.setattr(differences, name, lambda *_: pytest.fail("a sentence was read again"))
    no_tokenizing(monkeypatch)
    monkeypatch.setattr(Texts, "rows", lambda *_: pytest.fail("texts were looked up"))
    second = make(mirror=mirror)
    assert second.notes == first.notes
    assert same_batches(first, second)


def test_what_is_dropped_is_counted_alike_with_and_without_the_cache(make, monkeypatch):
    write_differences()
    dropped = ["2 pairs of equal images dropped"]
    expected = {
        False: [*dropped, "1 texts reach the context length; what comes after it is not read"],
        True: [*dropped, "1 sentences dropped that do not name both images, so have no mirror",
               "2 texts reach the context length; what comes after it is not read"],
    }  # fmt: skip
    for mirror, notes in expected.items():
        assert make(mirror=mirror).notes == make(mirror=mirror).notes == notes
    monkeypatch.setattr(tokens, "identity", lambda tokenizer: None)
    monkeypatch.setattr(cache, "cached", lambda *_: pytest.fail("the cache was used"))
    for mirror, notes in expected.items():
        assert make(mirror=mirror).notes == notes


def test_an_unknown_image_is_named_alike_with_and_without_the_cache(example_clip):
    captions = write_differences()
    n = next(n for n, d in enumerate(captions, 1) if "im5" in d[:2])
    ids = [key for key in IDS if key != "im5"]
    for known in (ids, IDS, ids):  # not compiled yet; compiled; from the cache
        if known is IDS:
            differences.compiled("d.jsonl", known, example_clip.tokenizer, mirror=False)
            continue
        with pytest.raises(UserError, match=rf"difference {n} of d\.jsonl is about image 'im5'.*8 images: im0, im1"):
            differences.compiled("d.jsonl", known, example_clip.tokenizer, mirror=False)


# -- equal embeddings ----------------------------------------------------------------------------------


def equal_slowly(z: torch.Tensor, pairs: np.ndarray) -> list[bool]:
    unit = torch.nn.functional.normalize(z, dim=-1)
    return (~((unit[pairs[:, 0]] - unit[pairs[:, 1]]).norm(dim=-1) > 1e-6)).tolist()


@given(st.integers(0, 10**6), st.sampled_from([1, 3, 4, 40]), st.sampled_from([3, 50]))
def test_equal_embeddings_are_found_as_the_slow_way_finds_them(seed, width, block):
    rng = np.random.default_rng(seed)
    z = torch.from_numpy(rng.standard_normal((30, width), dtype=np.float32))
    z[10:14] = 2.5 * z[0]
    z[14] = z[0] + 1e-3 * z[1]  # near, but another
    z[15:17], z[17, 0], z[18, -1] = 0, float("nan"), float("inf")
    z[20:25, : width // 2] = z[19, : width // 2]  # the same beginning
    pairs = rng.integers(30, size=(200, 2))
    assert _equal_rows(z, pairs, block).tolist() == equal_slowly(z, pairs)


# -- captions ------------------------------------------------------------------------------------------


def learn_captions(clip, data: Dataset) -> contrastive.Method:
    """The method on the embeddings of all of IDS, whatever the data set has."""
    save_embeddings(Path("z.safetensors"), Embeddings(Z, IDS), {"image_tower": clip.image_tower_hash()})
    config = FinetuneConfig(device="cpu", train=TrainConfig(batch_size=3))
    config.data.embeddings, config.contrastive = "z.safetensors", ContrastiveConfig()
    return contrastive.Method(clip, data, config)


def test_images_without_a_caption_are_left_out_and_counted(example_clip):
    captions = {"im7": "seven", "im2": "two", "im5": "five", "elsewhere": "far", "im0": "zero"}
    method = learn_captions(
        example_clip, Dataset("some", "", list(captions), None, "f", captions=[(text,) for text in captions.values()])
    )
    assert method.notes == [
        "5 images of z.safetensors have no caption and are left out",
        "1 images of some are not there and are left out",
    ]
    seen, decode = set(), example_clip.tokenizer.decode
    for epoch in range(10):
        for batch in method.loader(epoch):
            for key, row, image in zip(batch.ids, batch.tokens, batch.images):
                assert decode([t for t in row.tolist() if 0 < t < 49406]).strip() == captions[key]
                assert torch.equal(image, Z[IDS.index(key)])
                seen.add(key)
    assert seen == captions.keys() - {"elsewhere"} and method.steps_per_epoch == 1
