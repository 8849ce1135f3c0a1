"""Tokens and differences from the cache equal those made anew, and nothing damaged or foreign is ever read."""

import json
import logging
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import open_clip.tokenizer
import pytest
import regex
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from pc_clip.core import cache
from pc_clip.core.config.train import ContrastiveConfig, FinetuneConfig, PairwiseConfig, TrainConfig
from pc_clip.core.errors import UserError
from pc_clip.data import differences, tokens
from pc_clip.data.dataset import Dataset
from pc_clip.data.differences import Difference, contrast, swap_roles, to_line
from pc_clip.data.embeddings import Embeddings, save_embeddings
from pc_clip.models.clip import Clip
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
        return original(self, texts, *rest) if texts is tokens._PROBE else pytest.fail("a text was tokenised again")

    monkeypatch.setattr(SimpleTokenizer, "__call__", call)


def only_file(folder="data/cache/tokens") -> Path:
    (path,) = Path(folder).glob("*.safetensors")
    return path


# -- the table -----------------------------------------------------------------------------------------


@settings(max_examples=12)
@given(st.lists(st.text(), min_size=1, max_size=20))
def test_cached_tokens_equal_fresh_ones(tmp_path_factory, tokenizer, texts):
    folder = tmp_path_factory.mktemp("cache")
    expected = tokenizer(texts)
    for _ in range(2):
        assert torch.equal(torch.from_numpy(tokens.tokenize(tokenizer, texts, folder).astype(np.int64)), expected)


def test_the_second_time_nothing_is_tokenised(tokenizer, monkeypatch):
    first = tokens.tokenize(tokenizer, TEXTS)
    no_tokenizing(monkeypatch)
    again = tokens.tokenize(SimpleTokenizer(), TEXTS)
    assert again.dtype == first.dtype == np.uint16
    assert np.array_equal(first, again)


def test_worker_processes_make_the_same_table(tokenizer, monkeypatch):
    texts = [f"picture {n} of {n % 7}" for n in range(100)]
    monkeypatch.setattr(tokens, "AT_A_TIME", 9)
    alone = tokens.make(tokenizer, texts)
    monkeypatch.setattr(tokens, "MANY", 10)
    monkeypatch.setattr(tokens, "_cores", lambda: 2)
    assert np.array_equal(tokens.make(tokenizer, texts), alone)
    assert np.array_equal(alone, tokenizer(texts).numpy())


def test_a_large_vocabulary_gets_a_wider_table():
    def tokenizer(texts):
        return torch.tensor([[1, 70_000 if text == "rare" else 2] for text in texts])

    assert tokens.make(tokenizer, ["a", "rare"]).tolist() == [[1, 2], [1, 70_000]]
    assert tokens.make(tokenizer, ["a"]).dtype == np.uint16


def other_words(change) -> SimpleTokenizer:
    """CLIP's tokenizer with another pattern of what a word is."""
    found = SimpleTokenizer()
    found.pat = change(found.pat)
    return found


def test_a_tokenizer_that_parts_words_in_another_way_never_shares_a_file(tokenizer):
    """It says the same of the texts by which a tokenizer is known, which have no "'ll"."""
    other = other_words(lambda pat: regex.compile(pat.pattern.replace("|'ll", ""), pat.flags))
    texts = ["they'll come"]
    assert tokenizer(tokens._PROBE).tolist() == other(tokens._PROBE).tolist()
    for each in (tokenizer, other):
        assert np.array_equal(tokens.tokenize(each, texts), each(texts).numpy())
    assert not np.array_equal(tokens.tokenize(tokenizer, texts), tokens.tokenize(other, texts))


def test_flags_of_the_pattern_and_the_library_that_reads_it_are_part_of_a_tokenizer(tokenizer, monkeypatch):
    other = other_words(lambda pat: regex.compile(pat.pattern, pat.flags & ~regex.IGNORECASE))
    assert tokenizer(tokens._PROBE).tolist() == other(tokens._PROBE).tolist()
    assert tokens.identity(other) != tokens.identity(tokenizer) == tokens.identity(SimpleTokenizer())
    before, real = tokens.identity(tokenizer), tokens.version
    monkeypatch.setattr(tokens, "version", lambda name: "1.2.3" if name == "regex" else real(name))
    assert tokens.identity(tokenizer) != before


def hugging_face(vocabulary: dict[str, int], folder: Path, **options) -> HFTokenizer:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return HFTokenizer(str(folder), **options)


WORDS = {"[UNK]": 0, "[PAD]": 1, "a": 2, "dog": 3}


def test_another_tokenizer_never_shares_a_file_and_the_same_one_always_does(tmp_path):
    other_merges = SimpleTokenizer()
    other_merges.bpe_ranks = dict(list(other_merges.bpe_ranks.items())[:20_000])
    different = [
        SimpleTokenizer(),
        SimpleTokenizer(context_length=32),
        SimpleTokenizer(clean="canonicalize"),
        SimpleTokenizer(additional_special_tokens=["<dog>"]),
        other_merges,
        hugging_face(WORDS, tmp_path / "a", context_length=8),
        hugging_face(WORDS, tmp_path / "a", context_length=9),
        hugging_face(WORDS, tmp_path / "a", context_length=8, clean="canonicalize"),
        hugging_face(WORDS | {"dog": 4, "cat": 3}, tmp_path / "b", context_length=8),
    ]
    for each in different:
        assert np.array_equal(tokens.tokenize(each, TEXTS), each(TEXTS).numpy())
    assert len(list(cache.CACHE.iterdir())) == len(different)
    same = [SimpleTokenizer(), hugging_face(WORDS, tmp_path / "a", context_length=8)]
    for each, before in zip(same, (different[0], different[5])):
        each(["something before"])  # what was tokenised earlier is no matter
        assert tokens.identity(each) == tokens.identity(before)


def test_tokenizers_that_are_not_known_or_left_to_chance_are_asked_each_time(tmp_path):
    class Mine(SimpleTokenizer):
        pass

    own_cleaning, own_attribute = SimpleTokenizer(), SimpleTokenizer()
    own_cleaning.clean_fn = lambda text: text
    own_attribute.encode = lambda text: [1]
    for each in (Mine(), SimpleTokenizer(reduction_mask="random"), own_cleaning, own_attribute, lambda texts: None):
        assert tokens.identity(each) is None
    assert np.array_equal(tokens.tokenize(own_attribute, ["a b c"]), own_attribute(["a b c"]).numpy())
    assert not cache.CACHE.exists()


@pytest.mark.parametrize("other", [["a", "bc"], ["abc"], ["ab", "c", ""], ["c", "ab"], ["ab", "C"]])
def test_other_texts_have_another_digest(other):
    assert tokens.digest_of(["ab", "c"]) != tokens.digest_of(other)


def test_a_changed_library_makes_the_tokens_again(tokenizer, monkeypatch):
    before = tokens.identity(tokenizer)
    monkeypatch.setattr(open_clip.tokenizer.SimpleTokenizer, "encode", lambda self, text: [7])
    assert tokens.identity(tokenizer) != before


# -- damage --------------------------------------------------------------------------------------------


def cut(share):
    return lambda content: content[: int(share * len(content))]


def at(place, change):
    def damage(content):
        content = bytearray(content)
        content[place] = change(content[place])
        return bytes(content)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        *[cut(share) for share in (0.0, 0.001, 0.1, 0.5, 0.99)],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: content[:-200] + bytes(200),
        lambda content: bytes(len(content)),
        at(-1, lambda byte: byte ^ 1),
        at(-700, lambda byte: byte ^ 128),
        lambda content: b"something else",
    ],
)
def test_a_damaged_file_is_made_again_with_a_warning(tokenizer, caplog, damage):
    good = tokens.tokenize(tokenizer, TEXTS).copy()
    path = only_file()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert np.array_equal(tokens.tokenize(tokenizer, TEXTS), good)
    assert [r for r in caplog.records if r.levelno == logging.WARNING and "making it again" in r.message]
    caplog.clear()
    assert np.array_equal(tokens.tokenize(tokenizer, TEXTS), good)
    assert not caplog.records


def test_no_flipped_byte_anywhere_leads_to_wrong_arrays():
    """Every byte of a small file: what is given is right, and nearly always made again."""
    good = {"a": np.arange(3, dtype=np.uint16), "b": np.array([[1], [2]], dtype=np.int32)}
    calls = []

    def make():
        calls.append(1)
        return good

    cache.cached("some", {"texts": "x"}, make)
    whole = only_file().read_bytes()
    for place in range(len(whole)):
        only_file().write_bytes(at(place, lambda byte: byte ^ 1)(whole))
        found = cache.cached("some", {"texts": "x"}, make)
        assert found.keys() == good.keys(), place
        assert all(np.array_equal(found[n], good[n]) and found[n].dtype == good[n].dtype for n in good), place
    assert len(calls) > 0.8 * len(whole)


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


def _tokenize_and_save(start, name):
    start.wait()
    np.save(name, tokens.tokenize(SimpleTokenizer(), [f"text {n}" for n in range(300)]))


def test_two_processes_at_once_both_get_it_right(tokenizer):
    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(2)
    processes = [fork.Process(target=_tokenize_and_save, args=(start, f"{n}.npy")) for n in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    expected = tokenizer([f"text {n}" for n in range(300)]).numpy()
    for name in ("0.npy", "1.npy"):
        assert np.array_equal(np.load(name), expected)
    assert np.array_equal(tokens.tokenize(tokenizer, [f"text {n}" for n in range(300)]), expected)
    assert len(list(cache.CACHE.iterdir())) == 1


# -- differences ---------------------------------------------------------------------------------------

IDS = [f"im{n}" for n in range(9)]
Z = torch.from_numpy(np.random.default_rng(0).standard_normal((9, 6), dtype=np.float32))
Z[7] = 3 * Z[2]  # one picture twice: in unit embeddings they are equal


def write_differences(path="d.jsonl") -> list[Difference]:
    """60 differences: most have a mirror, some are about equal pictures, one is longer than the context."""
    rng, found = np.random.default_rng(1), []
    for n in range(56):
        i, j = rng.choice([0, 1, 2, 3, 4, 5, 6, 8], 2, replace=False)
        found.append(Difference(IDS[i], IDS[j], contrast(f"{n % 11} stars", f"{n % 5} rings", n)))
    found += [
        Difference("im2", "im7", "The first image shows a cat, while the second shows a dog."),
        Difference("im4", "im4", "The first image shows a cat, while the second shows two."),
        Difference("im1", "im3", "Something is different."),
        Difference("im1", "im3", "The first image shows " + "very " * 90 + "much, while the second shows little."),
    ]
    Path(path).write_text("".join(map(to_line, found)), encoding="utf-8")
    return found


@pytest.fixture
def make(example_clip):
    """Makes the method on IDS and Z, with settings."""
    save_embeddings(Path("z.safetensors"), Embeddings(Z, IDS), {"image_tower": example_clip.image_tower_hash()})

    def make(clip=example_clip, **settings) -> pairwise.Method:
        config = FinetuneConfig(device="cpu", train=TrainConfig(batch_size=16))
        config.data.differences, config.data.embeddings = "d.jsonl", "z.safetensors"
        config.pairwise = PairwiseConfig(**settings)
        said = [(f"caption {n}", "a caption that all have") for n in range(9)]
        return pairwise.Method(clip, Dataset("some", "", IDS, None, "f", captions=said), config)

    return make


def same_batches(one: pairwise.Method, two: pairwise.Method) -> bool:
    pairs = zip(one.loader(3), two.loader(3), strict=True)
    return all(all(map(same, a, b)) for a, b in pairs)


def same(a, b) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("mirror", [False, True])
def test_a_second_start_reads_no_sentence_and_is_the_same(make, monkeypatch, mirror):
    write_differences()
    first = make(mirror=mirror, anchor=1.0)
    for name in ("_parse", "swap_roles"):
        monkeypatch.setattr(differences, name, lambda *_: pytest.fail("a sentence was read again"))
    no_tokenizing(monkeypatch)
    monkeypatch.setattr(Texts, "rows", lambda *_: pytest.fail("texts were looked up"))
    monkeypatch.setattr(Clip, "embed_texts", lambda *_: pytest.fail("anchors were embedded again"))
    second = make(mirror=mirror, anchor=1.0)
    assert second.notes == first.notes
    assert same_batches(first, second)


@pytest.mark.parametrize("mirror", [False, True])
def test_what_is_dropped_is_counted_alike_with_and_without_the_cache(make, monkeypatch, mirror):
    write_differences()
    expected = ["2 pairs of equal images dropped"]
    if mirror:
        expected += ["1 sentences dropped that do not name both images, so have no mirror"]
    expected += [f"{2 if mirror else 1} texts longer than the context, cut"]
    assert make(mirror=mirror).notes == make(mirror=mirror).notes == expected
    monkeypatch.setattr(tokens, "identity", lambda tokenizer: None)
    monkeypatch.setattr(cache, "cached", lambda *_: pytest.fail("the cache was used"))
    assert make(mirror=mirror).notes == expected


@pytest.mark.parametrize("mirror", [False, True])
def test_batches_are_what_looking_up_each_item_gives(make, example_clip, mirror):
    """Against the obvious way: list.index, an item at a time."""
    write_differences()
    make(mirror=mirror)
    method = make(mirror=mirror)  # from the cache
    found = differences.read("d.jsonl")
    equal = {"im2", "im7"}
    kept = [d for d in found if d.first != d.second and {d.first, d.second} != equal]
    if mirror:
        kept = [d for d in kept if swap_roles(d.text)]
    count = 0
    for chosen, batch in zip(orders(len(kept), method), method.loader(2), strict=True):
        items = [kept[n] for n in chosen]
        if mirror:
            items += [Difference(d.second, d.first, swap_roles(d.text)) for d in items]
        assert batch.ids == [f"{d.first}|{d.second}" for d in items]
        for side, rows in (("first", batch.first), ("second", batch.second)):
            expected = torch.stack([Z[IDS.index(getattr(d, side))] for d in items])
            assert torch.equal(batch.images[rows], expected)
        assert torch.equal(batch.tokens[batch.text], example_clip.tokenize([d.text for d in items]))
        count += 1
    assert count == method.steps_per_epoch > 1


def orders(n: int, method: pairwise.Method) -> list[np.ndarray]:
    order = np.random.default_rng([method.config.seed, 2, 2]).permutation(n)
    size = method.pairs_per_batch
    return [order[k * size : (k + 1) * size] for k in range(n // size)]


def test_another_file_mirror_or_tokenizer_is_compiled_anew(example_clip):
    def compiled(mirror=False, tokenizer=example_clip.tokenizer):
        return differences.compiled("d.jsonl", IDS, tokenizer, mirror=mirror)

    write_differences()
    assert compiled().mirror is None
    assert compiled(mirror=True).mirror is not None
    assert compiled(tokenizer=SimpleTokenizer(context_length=20)).tokens.shape[1] == 20
    Path("d.jsonl").write_text(to_line(Difference("im1", "im2", "The first is another than the second.")))
    assert compiled().pairs.tolist() == [[1, 2]]
    assert len(list(cache.CACHE.iterdir())) == 4


def test_images_are_found_by_name_whatever_their_order(example_clip):
    told = [(d.first, d.second) for d in write_differences()]
    for ids in (IDS, IDS[::-1], ["another", *IDS]):
        pairs = differences.compiled("d.jsonl", ids, example_clip.tokenizer, mirror=False).pairs
        assert [(ids[i], ids[j]) for i, j in pairs] == told
    assert len(list(cache.CACHE.iterdir())) == 1


def test_an_unknown_image_is_named_alike_with_and_without_the_cache(example_clip):
    told = write_differences()
    n = next(n for n, d in enumerate(told, 1) if "im5" in d[:2])
    ids = [key for key in IDS if key != "im5"]
    for known in (ids, IDS, ids):  # not compiled yet; compiled; from the cache
        if known is IDS:
            differences.compiled("d.jsonl", known, example_clip.tokenizer, mirror=False)
            continue
        with pytest.raises(UserError, match=rf"difference {n} of d\.jsonl is about image 'im5'.*8 images: im0, im1"):
            differences.compiled("d.jsonl", known, example_clip.tokenizer, mirror=False)


def test_a_damaged_file_of_differences_is_compiled_again(make, caplog):
    write_differences()
    good = make(mirror=True)
    path = only_file()
    content = path.read_bytes()
    path.write_bytes(content[:-3000] + bytes(3000))
    again = make(mirror=True)
    assert "its checksum is wrong" in caplog.text
    assert again.notes == good.notes
    assert same_batches(good, again)


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


def test_a_store_that_only_gives_rows_is_enough():
    class Store:
        shape = Z.shape

        def __getitem__(self, rows):
            assert isinstance(rows, torch.Tensor)
            return Z[rows]

    pairs = np.array([[0, 1], [2, 7], [7, 2], [4, 5]])
    assert _equal_rows(Store(), pairs).tolist() == [False, True, True, False]


# -- captions ------------------------------------------------------------------------------------------


def learn_captions(clip, data: Dataset) -> contrastive.Method:
    """The method on the embeddings of all of IDS, whatever the data set has."""
    save_embeddings(Path("z.safetensors"), Embeddings(Z, IDS), {"image_tower": clip.image_tower_hash()})
    config = FinetuneConfig(device="cpu", train=TrainConfig(batch_size=3))
    config.data.embeddings, config.contrastive = "z.safetensors", ContrastiveConfig()
    return contrastive.Method(clip, data, config)


def test_images_without_a_caption_are_left_out_and_counted(example_clip):
    told = {"im7": "seven", "im2": "two", "im5": "five", "elsewhere": "far", "im0": "zero"}
    method = learn_captions(
        example_clip, Dataset("some", "", list(told), None, "f", captions=[(text,) for text in told.values()])
    )
    assert method.notes == [
        "5 images of z.safetensors have no caption and are left out",
        "1 images of some are not there and are left out",
    ]
    seen, decode = set(), example_clip.tokenizer.decode
    for epoch in range(10):
        for batch in method.loader(epoch):
            for key, row, image in zip(batch.ids, batch.tokens, batch.images):
                assert decode([t for t in row.tolist() if 0 < t < 49406]).strip() == told[key]
                assert torch.equal(image, Z[IDS.index(key)])
                seen.add(key)
    assert seen == told.keys() - {"elsewhere"} and method.steps_per_epoch == 1


def test_embeddings_of_which_no_image_has_a_caption_are_an_error(example_clip):
    with pytest.raises(
        UserError, match=r"none of the 9 images of z\.safetensors has a caption in some, .* 'elsewhere'"
    ):
        learn_captions(example_clip, Dataset("some", "", ["elsewhere"], None, "f", captions=[("far",)]))


def test_each_image_has_one_of_its_own_captions(example_clip):
    said = [tuple(f"picture {n} told {k}" for k in range(1 + n % 3)) for n in range(9)]
    method = learn_captions(example_clip, Dataset("some", "", IDS, None, "f", captions=said))
    assert method.notes == []
    decode, seen = example_clip.tokenizer.decode, set()
    for epoch in range(30):
        for batch in method.loader(epoch):
            for key, row in zip(batch.ids, batch.tokens):
                text = decode([t for t in row.tolist() if 0 < t < 49406]).strip()
                assert text in said[IDS.index(key)]
                seen.add(text)
    assert seen == {text for each in said for text in each}


def test_anchors_of_other_weights_are_embedded_again(make, example_clip):
    write_differences()
    before = make(anchor=1.0).anchor_start
    other = Clip.create("example")
    with torch.no_grad():
        other.model.text_projection.copy_(other.model.text_projection.flip(1))
    after = make(clip=other, anchor=1.0)
    assert not torch.allclose(before, after.anchor_start, atol=0.1)
    assert torch.equal(after.anchor_start, other.embed_texts(after.anchors.distinct))


def test_a_tower_with_the_same_weights_and_other_heads_gets_no_anchors_of_the_first(make):
    write_differences()
    make(anchor=1.0)
    other = Clip.create("example")
    for block in other.model.transformer.resblocks:
        block.attn.num_heads, block.attn.head_dim = 2 * block.attn.num_heads, block.attn.head_dim // 2
    method = make(clip=other, anchor=1.0)
    assert torch.equal(method.anchor_start, other.embed_texts(method.anchors.distinct))


def test_the_key_says_what_a_file_was_made_from(tokenizer):
    from safetensors import safe_open

    tokens.tokenize(tokenizer, TEXTS)
    with safe_open(only_file(), "pt") as file:
        key = json.loads(file.metadata()["key"])
    assert key["texts"] == tokens.digest_of(TEXTS)
    assert key["tokenizer"] == tokens.identity(tokenizer)
