"""The authors' three files, in exactly their layouts: what is converted says the same, and what is odd is refused."""

import itertools
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import gdown
import pytest
import torch

from pc_clip.core.errors import UserError
from pc_clip.core.paths import configs_folder
from pc_clip.data import differences
from pc_clip.data.captions import read_coco_captions
from pc_clip.data.embedding_shards import read_shard
from pc_clip.data.embeddings import embed_images
from pc_clip.data.example_sets import example
from pc_clip.interface import finetune, run
from pc_clip.models.loading import create_model, load_model
from pc_clip.release import authors

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # of torch, about hostile files
EMBEDDINGS, CAPTIONS, INDICES = (
    Path("data/release") / name for name in ("coco_embeddings.safetensors", "captions_release.json", "indices.json")
)
DIFFERENCES = Path("llm_diffs/coco_release.jsonl")
TEXT = "The first image shows a dog on a beach, while the second image shows {} cats on a sofa."


@pytest.fixture
def tiny():
    """A model of four numbers an image, as open_clip's own folder; its name for --model."""
    config = {
        "embed_dim": 4,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
    }
    Path("tiny").mkdir()
    Path("tiny/open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return "local-dir:tiny"


def save(path, content):
    Path(path).write_bytes(pickle.dumps(content))
    return path


def entry(image, caption, row):
    return {"image_id": image, "caption": caption, "clip_embedding": row}


def per_image():
    """Three images, two captions of the first; the differences call them 70, 71 and 72."""
    captions = [entry(9, "a dog", 0), entry(25, "two cats", 1), entry(9, "a brown dog", 0), entry(30, "a bus", 2)]
    return {"clip_embedding": torch.arange(12.0).reshape(3, 4), "captions": captions, "inds": [70, 71, 72]}


def convert_embeddings(content, tiny, *more):
    save("embeddings.pkl", content)
    authors.main(["embeddings", "--from", "embeddings.pkl", "--model", tiny, *more])


def converted():
    shard = read_shard(EMBEDDINGS)
    return shard.z, shard.ids, shard.made_by


# -- the model -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_authors_checkpoint_becomes_one_of_ours_that_run_py_takes(small_example, example_clip, capsys):
    torch.save(example_clip.model.state_dict(), "theirs.pt")
    authors.main(["checkpoint", "--from", "theirs.pt", "--model", "example"])
    clip = load_model("data/release/pc_clip")
    assert clip.name == "example"
    assert clip.weights_hash() == example_clip.weights_hash()
    shown = capsys.readouterr().out
    assert "data/release/pc_clip/model.safetensors: example, " in shown
    assert "next: python run.py --dataset cifar100 --checkpoint data/release/pc_clip\n" in shown
    run.main(["--mode", "zeroshot", "--split", "val", "--checkpoint", "data/release/pc_clip"])
    assert len(list(Path("results").rglob("zeroshot*.json"))) == 1


@pytest.mark.slow
def test_the_released_model_keeps_its_base_tag(tiny, monkeypatch, example_clip):
    monkeypatch.setattr(authors, "MODEL", tiny)  # ViT-L-14 itself has 428 million weights
    torch.save(create_model(tiny, load_weights=False).model.state_dict(), "theirs.pt")
    authors.main(["checkpoint", "--from", "theirs.pt", "--out", "out/model.safetensors"])
    assert load_model("out/model.safetensors").pretrained == "datacomp_xl_s13b_b90k"
    authors.main(["checkpoint", "--from", "theirs.pt", "--out", "mine", "--pretrained", "own"])
    assert load_model("mine").pretrained == "own"
    torch.save(example_clip.model.state_dict(), "other.pt")
    with pytest.raises(UserError, match=r"other\.pt does not fit local-dir:tiny.*with --model\.$"):
        authors.main(["checkpoint", "--from", "other.pt", "--model", tiny])
    assert not Path("data").exists()


class Hostile:
    def __reduce__(self):
        return os.system, ("touch run.by.pickle",)


def test_hostile_release_files_are_refused(tiny):
    convert_embeddings(per_image(), tiny)  # differences want them
    for content in (Hostile(), per_image() | {"more": Hostile()}):
        torch.save(content, "hostile.pt")
        save("hostile.pkl", content)
        for what, path in itertools.product(authors.IDS, ("hostile.pt", "hostile.pkl")):
            with pytest.raises(UserError, match=r"posix\.system|more than weights|not a whole checkpoint"):
                authors.main([what, "--from", path, "--out", "out"])
    assert not Path("run.by.pickle").exists()
    assert not list(Path().glob("out*"))


# -- the embeddings ------------------------------------------------------------------------------------


def test_one_row_an_image(tiny, capsys):
    convert_embeddings(per_image(), tiny, "--pretrained", "tag")
    z, ids, about = converted()
    assert torch.equal(z, torch.arange(12.0).reshape(3, 4))
    assert ids == ["9", "25", "30"]
    assert about["image_tower"] == "claimed:local-dir:tiny/tag"
    assert about["model"] == "local-dir:tiny (tag)"
    assert read_coco_captions(CAPTIONS) == {
        "9": ("000000000009.jpg", ("a dog", "a brown dog")),
        "25": ("000000000025.jpg", ("two cats",)),
        "30": ("000000000030.jpg", ("a bus",)),
    }
    assert json.loads(INDICES.read_text())["images"] == {"70": "9", "71": "25", "72": "30"}
    shown = capsys.readouterr().out
    assert f"{EMBEDDINGS}: 3 images, 4 numbers each" in shown and f"{CAPTIONS}: 4 captions" in shown
    assert "left out: 0 rows that repeat an image, 0 rows" in shown


def per_caption():
    """A row a caption; rows of one image are equal up to rounding. Row 3 is of no caption."""
    dog, cats, bus = torch.tensor([[1.0, 2, 3, 4], [-1, 0, 0, 1], [0, 5, 0, 0]])
    rows = torch.stack([cats, dog, dog * 1.0001, torch.ones(4), bus, cats - 1e-4])
    captions = [entry("25", "two cats", 0), entry("9", "a dog", 1), entry("9", "a brown dog", 2)]
    captions += [entry("30", "a bus", 4), entry("25", "cats", 5)]
    return {"clip_embedding": rows, "captions": captions, "inds": [0, 10, 11, 12, 13, 14]}


def test_one_row_a_caption_keeps_the_first_of_each_image(tiny, capsys):
    content = per_caption()
    convert_embeddings(content, tiny)
    z, ids, _ = converted()
    assert ids == ["25", "9", "30"]
    assert torch.equal(z, content["clip_embedding"][[0, 1, 4]])
    assert json.loads(INDICES.read_text())["images"] == {"0": "25", "10": "9", "11": "9", "13": "30", "14": "25"}
    assert read_coco_captions(CAPTIONS)["25"][1] == ("two cats", "cats")
    assert "left out: 2 rows that repeat an image, 1 rows without a caption" in capsys.readouterr().out


def test_a_subset_file_keeps_the_original_row_numbers(tiny):
    """Then clip_embedding is what inds is, and the entries are in the rows' order; so the authors' loop reads it."""
    content = per_image()
    content["captions"] = [entry(9, "a dog", 70), entry(25, "cats", 71), entry(30, "a bus", 72)]
    convert_embeddings(content, tiny)
    assert converted()[1] == ["9", "25", "30"]
    shuffled = {**content, "inds": [2, 0, 1]}
    shuffled["captions"] = [entry(9, "a dog", 2), entry(25, "cats", 0), entry(30, "a bus", 1)]
    shutil.rmtree("data")
    convert_embeddings(shuffled, tiny)
    assert converted()[1] == ["9", "25", "30"]
    assert json.loads(INDICES.read_text())["images"] == {"2": "9", "0": "25", "1": "30"}


rows, odd = torch.arange(12.0).reshape(3, 4), "is not laid out as the authors' embeddings"
BAD_EMBEDDINGS = [  # the file, or what differs in it from a good one; what the message says
    ([1, 2], odd),
    ({"indices": [], "llm_diffs": []}, "('clip_embedding')"),
    ({"clip_embedding": rows.flatten()}, odd),
    ({"clip_embedding": torch.empty(0, 4)}, "has 0 rows of embeddings"),
    ({"clip_embedding": torch.ones(3, 5)}, "has 5 numbers an image, and local-dir:tiny gives 4"),
    ({"clip_embedding": rows / torch.tensor([1.0, 1, 1, 0])}, "are not finite"),
    ({"captions": []}, "3 inds and 0 captions"),
    ({"captions": ["a dog"]}, odd),
    ({"captions": [entry(9, "x", 0), entry(9, "x", 3)]}, "2 captions, of which one is (9, 3, 'x')"),
    ({"captions": [entry(9, "x", -1)]}, "one is (9, -1, 'x')"),
    ({"captions": [entry(9, "x", 1.0)]}, "'float' object cannot be interpreted as an integer"),
    ({"captions": [entry(9, b"x", 0)]}, "one is (9, 0, b'x')"),
    ({"captions": [entry("a.jpg", "x", 0)]}, "'a.jpg'"),
    ({"captions": [entry(9, "x", 0), entry(8, "x", 0)]}, "row 0 is of two images, 9 and 8"),
    ({"captions": [entry(9, "x", 0), entry(9, "x", 2)]}, "rows 0 and 2 are of image 9, but they differ"),
    ({"inds": [7, 7, 8]}, "inds number 7 is of two images, 9 and 25"),
    ({"inds": [1, 2, 3, 4]}, "3 rows of embeddings, 4 inds"),
    ({"inds": ["a", "b", "c"]}, odd),
]


def test_embeddings_of_another_layout_are_refused_and_nothing_is_written(tiny):
    for changes, message in BAD_EMBEDDINGS:
        whole = not isinstance(changes, dict) or "indices" in changes
        with pytest.raises(UserError, match=re.escape(message)):
            convert_embeddings(changes if whole else per_image() | changes, tiny)
    assert not Path("data").exists()
    with pytest.raises(UserError, match="4 numbers an image, and ViT-L-14 gives 768"):
        authors.main(["embeddings", "--from", save("embeddings.pkl", per_image())])


# -- the differences -----------------------------------------------------------------------------------


def convert_differences(indices, texts, *more):
    save("differences.pkl", {"indices": indices, "llm_diffs": texts})
    authors.main(["differences", "--from", "differences.pkl", *more])


def test_differences_get_their_image_ids_and_pass_the_filter(tiny, capsys):
    convert_embeddings(per_caption(), tiny)
    good, newline = TEXT.format("two"), TEXT.format("three").replace(", while", ",\nwhile")
    pairs = [(10, 0), (0, 13), (11, 10), (99, 0), (13, 0), (0, 10), (0, 10), (14, 11)]
    convert_differences(pairs, [good, newline, good, good, None, "", "I cannot tell the two images apart.", good])
    assert differences.read(DIFFERENCES) == [
        differences.Difference("9", "25", good),
        differences.Difference("25", "30", TEXT.format("three")),
        differences.Difference("25", "9", good),
    ]
    meta = json.loads(DIFFERENCES.with_suffix(".meta.json").read_text())
    counts = {"kept": 3, "same_image": 1, "unknown_image": 1, "not_text": 1, "empty": 1, "refusal": 1}
    assert meta["counts"] == counts
    assert len(meta["sha256"]) == 64
    shown = capsys.readouterr().out
    assert f"{DIFFERENCES}: 3 of 8 differences (3 kept, " in shown
    assert "next: python finetune.py --config configs/pc_clip_coco.yaml" in shown
    assert f"--data.embeddings {EMBEDDINGS} --data.differences {DIFFERENCES}" in shown


layout = "is not laid out as the authors' differences"
BAD_DIFFERENCES = [
    ({"indices": [(70, 71)], "llm_diffs": []}, "has 0 llm_diffs for 1 indices"),
    ({"indices": [(70, 71)]}, "('llm_diffs')"),
    ({"indices": [(70, 71, 72)], "llm_diffs": ["x"]}, layout),
    ({"indices": [(70, 71), ("a", 71)], "llm_diffs": ["x", "x"]}, "'a'"),
    ({"indices": 5, "llm_diffs": ["x"]}, layout),
    ({"indices": [(1, 2)], "llm_diffs": [TEXT.format("two")]}, "none of the 1 differences"),
    ({"indices": [], "llm_diffs": []}, "none of the 0 differences"),
]


def test_differences_of_another_layout_are_refused_and_nothing_is_written(tiny):
    argv = ["differences", "--from", "differences.pkl"]
    save("differences.pkl", BAD_DIFFERENCES[0][0])
    with pytest.raises(UserError, match=r"no data/release/indices\.json.*Run first: python -m pc_clip release emb"):
        authors.main(argv)
    convert_embeddings(per_image(), tiny)
    for content, message in BAD_DIFFERENCES:
        save("differences.pkl", content)
        with pytest.raises(UserError, match=re.escape(message)):
            authors.main(argv)
    INDICES.write_text("[]")
    with pytest.raises(UserError, match=r"indices\.json is not what .* writes; remove it and run that again"):
        authors.main(argv)
    assert not Path("llm_diffs").exists()


# -- files and the network -----------------------------------------------------------------------------


def test_what_is_there_is_not_replaced():
    for what, out in (("checkpoint", "m.safetensors"), ("embeddings", "e.safetensors"), ("differences", "d.jsonl")):
        Path(out).write_text("mine")
        with pytest.raises(UserError, match="already there: .*; remove that"):
            authors.main([what, "--out", out])
        assert Path(out).read_text() == "mine"


def test_a_missing_file_and_a_web_page_are_user_errors(tiny):
    convert_embeddings(per_image(), tiny)
    Path("bad.pkl").write_bytes(b"hello")
    Path("page.pkl").write_text("\n<!DOCTYPE html><title>Google Drive - Quota exceeded</title>")
    for what, (path, message) in itertools.product(("embeddings", "differences"), (
        ("bad.pkl", r"bad\.pkl is not a whole pickle of data"),
        ("none.pkl", r"no file at none\.pkl\. Leave --from out to fetch it from https://drive"),
        ("page.pkl", r"page\.pkl is a web page\. Google's daily quota"),
    )):  # fmt: skip
        with pytest.raises(UserError, match=message):
            authors.main([what, "--from", path, "--out", "out"])
    assert not list(Path().glob("out*"))


@pytest.fixture
def drive(monkeypatch):
    """Stands for Google Drive: id -> content, or the error that gdown raises.  -> those, ids asked for"""
    files, asked = {}, []

    def download(url, path, **_):
        asked.append(url.split("=")[-1])
        if isinstance(files[asked[-1]], Exception):
            raise files[asked[-1]]
        Path(path).write_bytes(files[asked[-1]])

    monkeypatch.setattr(gdown, "download", download)
    return files, asked


@pytest.mark.slow
def test_the_three_files_are_fetched_by_id_and_once(drive, tiny, example_clip):
    files, asked = drive
    torch.save(example_clip.model.state_dict(), "theirs.pt")
    files["1OZGQ8f6N4WuSQFn4-e7kzcEZdpKPbEfp"] = Path("theirs.pt").read_bytes()
    files["1dRap0Ses7SajnGoj8hczvJ_o2Ze6JztX"] = pickle.dumps(per_image())
    files["1yYzHizjCy9ewfagL4uG-iZHQXsWLz48p"] = pickle.dumps({"indices": [(70, 72)], "llm_diffs": [TEXT.format("2")]})
    for out in ("a", "data/release/b"):
        authors.main(["checkpoint", "--model", "example", "--out", out])
    authors.main(["embeddings", "--model", tiny])
    authors.main(["differences"])
    assert asked == list(files)
    assert load_model("a").weights_hash() == example_clip.weights_hash()
    assert differences.read(DIFFERENCES) == [differences.Difference("9", "30", TEXT.format("2"))]


def test_what_cannot_be_fetched_is_an_error_with_the_address(drive, tiny):
    files, asked = drive
    files[authors.IDS["embeddings"]] = b"<!DOCTYPE html><title>Google Drive - Quota exceeded</title>"
    for _ in range(2):  # the page is not taken for the file, and the next call asks again
        with pytest.raises(UserError, match=r"quota.*may be used up.*in a browser, save the file, and give .* --from"):
            authors.main(["embeddings", "--model", tiny])
    assert len(asked) == 2
    files[authors.IDS["embeddings"]] = gdown.exceptions.FileURLRetrievalError(
        "Cannot retrieve.\n\n\tHad many accesses."
    )
    with pytest.raises(UserError, match=r"could not be fetched \(Cannot retrieve\. Had many accesses\.\)\..*--from\.$"):
        authors.main(["embeddings", "--model", tiny])
    assert not [path for path in Path("data").rglob("*") if path.is_file()]


# -- and then train on it ------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_goes_on_from_the_released_files_without_a_picture(example_clip, caplog):
    caplog.set_level("INFO")
    data = example("train", 40)
    z = embed_images(example_clip, data).z
    captions = [{"image_id": str(i), "caption": data.captions[i][0], "clip_embedding": i} for i in range(40)]
    numbers = [7 * i for i in range(40)]
    Path("e.pkl").write_bytes(pickle.dumps({"clip_embedding": z.clone(), "captions": captions, "inds": numbers}))
    pairs = [(7 * i, 7 * j) for i in range(20) for j in range(20, 40)]
    texts = [f"The first image shows {data.captions[a // 7][0]}, while the second shows {data.captions[b // 7][0]}."
             for a, b in pairs]  # fmt: skip
    Path("d.pkl").write_bytes(pickle.dumps({"indices": pairs, "llm_diffs": texts}))
    authors.main(["embeddings", "--from", "e.pkl", "--model", "example"])
    authors.main(["differences", "--from", "d.pkl"])
    where = ["--model.name", "example", "--data.dataset", "coco", "--data.root", "data/release", "--data.split",
             "release", "--train.batch_size", "16", "--train.steps", "3"]  # fmt: skip
    released = ["--data.embeddings", "data/release/coco_embeddings.safetensors"]
    config = ["--config", str(configs_folder() / "example.yaml"), *where]
    config += ["--data.differences", "llm_diffs/coco_release.jsonl"]
    run = finetune.main([*config, *released, "--retain.texts", "1"])
    assert (run / "model.safetensors").is_file()
    assert "taken on trust" in caplog.text
    assert json.loads((run / "environment.json").read_text())["data"]["embeddings"]
    with pytest.raises(UserError, match="pictures named in .* are absent"):
        finetune.main([*config, "--name", "other"])
