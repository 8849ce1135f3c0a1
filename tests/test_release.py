"""The authors' three files, in exactly their layouts: what is converted says the same, and what is odd is refused."""

import json
import os
import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
from pc_clip.models.clip import Clip
from pc_clip.models.loading import load_model
from pc_clip.release import authors, safe_pickle

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


def test_the_authors_checkpoint_becomes_one_of_ours_that_run_py_takes(small_example, example_clip, capsys):
    torch.save(example_clip.model.state_dict(), "theirs.pt")
    authors.main(["checkpoint", "--from", "theirs.pt", "--model", "example"])
    found = load_model("data/release/pc_clip")
    assert found.name == "example"
    assert found.weights_hash() == example_clip.weights_hash()
    shown = capsys.readouterr().out
    assert "data/release/pc_clip/model.safetensors: example, " in shown
    assert "next: python run.py --dataset cifar100 --checkpoint data/release/pc_clip\n" in shown
    run.main(["--mode", "zeroshot", "--split", "val", "--checkpoint", "data/release/pc_clip"])
    assert len(list(Path("results").rglob("zeroshot*.json"))) == 1


def test_the_papers_model_keeps_the_tag_of_the_weights_it_was_finetuned_from(tiny, monkeypatch):
    monkeypatch.setattr(authors, "MODEL", tiny)  # ViT-L-14 itself has 428 million weights
    model = Clip.create(tiny, load_weights=False).model
    torch.save(model.state_dict(), "theirs.pt")
    authors.main(["checkpoint", "--from", "theirs.pt", "--out", "out/model.safetensors"])
    assert load_model("out/model.safetensors").pretrained == "datacomp_xl_s13b_b90k"
    authors.main(["checkpoint", "--from", "theirs.pt", "--out", "mine", "--pretrained", "own"])
    assert load_model("mine").pretrained == "own"


def test_a_checkpoint_of_another_model_is_refused_and_nothing_written(tiny, example_clip):
    torch.save(example_clip.model.state_dict(), "theirs.pt")
    with pytest.raises(UserError, match=r"theirs\.pt does not fit local-dir:tiny.*with --model\.$"):
        authors.main(["checkpoint", "--from", "theirs.pt", "--model", tiny])
    assert not Path("data").exists()


class Hostile:
    def __reduce__(self):
        return os.system, ("touch run.by.pickle",)


@pytest.mark.parametrize("what", ["checkpoint", "embeddings", "differences"])
def test_a_hostile_file_in_place_of_any_of_the_three_is_refused_and_does_nothing(what, tiny, capsys):
    convert_embeddings(per_image(), tiny)  # differences want them
    for n, content in enumerate([Hostile(), per_image() | {"more": Hostile()}]):
        torch.save(content, "hostile.pt")
        save("hostile.pkl", content)
        for path in ("hostile.pt", "hostile.pkl"):
            with pytest.raises(UserError, match=r"posix\.system|more than weights|not a whole checkpoint"):
                authors.main([what, "--from", path, "--out", f"out{n}"])
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
    for line in (
        f"{EMBEDDINGS}: 3 images, 4 numbers each",
        f"{CAPTIONS}: 4 captions",
        "next: python -m pc_clip release",
    ):
        assert line in shown
    assert "left out" not in shown


def per_caption():
    """A row a caption; rows of one image are equal up to rounding. Row 3 is of no caption."""
    dog, cats, bus = torch.tensor([[1.0, 2, 3, 4], [-1, 0, 0, 1], [0, 5, 0, 0]])
    rows = torch.stack([cats, dog, dog * 1.0001, torch.ones(4), bus, cats - 1e-4])
    captions = [entry("25", "two cats", 0), entry("9", "a dog", 1), entry("9", "a brown dog", 2)]
    captions += [entry("30", "a bus", 4), entry("25", "cats", 5)]
    return {"clip_embedding": rows, "captions": captions, "inds": [0, 10, 11, 12, 13, 14]}


@pytest.mark.parametrize("block", [1, 2, 1000])
def test_one_row_a_caption_keeps_the_first_of_each_image(tiny, monkeypatch, capsys, block):
    monkeypatch.setattr(authors, "BLOCK", block)
    content = per_caption()
    convert_embeddings(content, tiny)
    z, ids, _ = converted()
    assert ids == ["25", "9", "30"]
    assert torch.equal(z, content["clip_embedding"][[0, 1, 4]])
    assert json.loads(INDICES.read_text())["images"] == {"0": "25", "10": "9", "11": "9", "13": "30", "14": "25"}
    assert read_coco_captions(CAPTIONS)["25"][1] == ("two cats", "cats")
    assert "left out: 2 rows that repeat an image, 1 rows without a caption" in capsys.readouterr().out


def test_a_file_cut_out_of_a_larger_one_keeps_the_larger_ones_numbers(tiny):
    """Then clip_embedding is what inds is, and the entries are in the rows' order; so the authors' loop reads it."""
    content = per_image()
    content["captions"] = [entry(9, "a dog", 70), entry(25, "cats", 71), entry(30, "a bus", 72)]
    convert_embeddings(content, tiny)
    assert converted()[1] == ["9", "25", "30"]
    shuffled = {**content, "inds": [2, 0, 1]}
    shuffled["captions"] = [entry(9, "a dog", 2), entry(25, "cats", 0), entry(30, "a bus", 1)]
    convert_embeddings(shuffled, tiny, "--overwrite")
    assert converted()[1] == ["9", "25", "30"]
    assert json.loads(INDICES.read_text())["images"] == {"2": "9", "0": "25", "1": "30"}


def test_numbers_may_be_tensors_and_embeddings_of_half_precision(tiny):
    content = per_image()
    for each in content["captions"]:
        each["clip_embedding"] = torch.tensor(each["clip_embedding"])
    content["captions"][0]["clip_embedding"] = torch.tensor([0])
    content["inds"] = torch.tensor(content["inds"])
    content["clip_embedding"] = content["clip_embedding"].half()
    convert_embeddings(content, tiny)
    z, ids, _ = converted()
    assert z.dtype == torch.float32
    assert torch.equal(z, torch.arange(12.0).reshape(3, 4))
    assert ids == ["9", "25", "30"]
    assert json.loads(INDICES.read_text())["images"] == {"70": "9", "71": "25", "72": "30"}


def broken(**changes):
    return per_image() | changes


rows = torch.arange(12.0).reshape(3, 4)
BAD_EMBEDDINGS = {
    "a list": ([1, 2], "holds a list; a dict with clip_embedding, captions, inds was expected"),
    "differences": ({"indices": [], "llm_diffs": []}, "no clip_embedding and no captions and no inds; it has indices"),
    "no inds": ({"clip_embedding": rows, "captions": []}, "has no inds; it has clip_embedding, captions"),
    "flat": (broken(clip_embedding=rows.flatten()), r"clip_embedding is a Tensor \[12\] of torch.float32"),
    "empty": (broken(clip_embedding=torch.empty(0, 4)), r"clip_embedding is a Tensor \[0, 4\]"),
    "whole numbers": (broken(clip_embedding=rows.long()), "of torch.int64; a tensor"),
    "lists": (broken(clip_embedding=rows.tolist()), "clip_embedding is a list; a tensor"),
    "another width": (broken(clip_embedding=torch.ones(3, 5)), "has 5 numbers an image, and local-dir:tiny gives 4"),
    "not finite": (broken(clip_embedding=rows / torch.tensor([1.0, 1, 1, 0])), "row 0 of clip_embedding is not finite"),
    "no captions": (broken(captions=[]), "captions is a list without entries"),
    "captions of texts": (broken(captions=["a dog"]), r"captions\[0\] lacks image_id, caption or .*: a dog"),
    "no row": (broken(captions=[{"image_id": 9, "caption": "x"}]), r"captions\[0\] lacks .*'caption': 'x'"),
    "row too far": (broken(captions=[entry(9, "x", 0), entry(9, "x", 3)]), r"captions\[1\] is of row 3, but .* 3 rows"),
    "row below": (broken(captions=[entry(9, "x", -1)]), "of row -1"),
    "row of text": (broken(captions=[entry(9, "x", "0")]), "clip_embedding '0', which is no row"),
    "row of two": (broken(captions=[entry(9, "x", torch.tensor([0, 1]))]), "which is no row"),
    "caption of bytes": (broken(captions=[entry(9, b"x", 0)]), "has a bytes for a caption"),
    "image of a name": (broken(captions=[entry("a.jpg", "x", 0)]), r"image_id 'a\.jpg'; COCO's are whole numbers"),
    "row of two images": (broken(captions=[entry(9, "x", 0), entry(8, "x", 0)]), "row 0 is given to two images, 9, 8"),
    "index of two images": (broken(inds=[7, 7, 8]), "the number 7 to two images, 9, 25"),
    "more inds than rows": (broken(inds=[1, 2, 3, 4]), "inds has 4 entries, but clip_embedding only 3 rows"),
    "inds of texts": (broken(inds=["a", "b", "c"]), r"inds\[0\] is 'a'; a whole number"),
    "inds of fractions": (broken(inds=torch.ones(3)), r"inds\[0\] is '1\.0'"),
    "inds a number": (broken(inds=3), "inds is a int; a list"),
    "one image, two embeddings": (
        broken(captions=[entry(9, "x", 0), entry(9, "x", 2)]), "rows 0 and 2 are both of image 9, but they differ"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_EMBEDDINGS)
def test_embeddings_of_another_layout_are_refused_with_the_place_and_nothing_is_written(name, tiny):
    content, message = BAD_EMBEDDINGS[name]
    with pytest.raises(UserError, match=message):
        convert_embeddings(content, tiny)
    assert not Path("data").exists()


def test_embeddings_of_another_width_than_the_papers_model_are_refused():
    save("embeddings.pkl", per_image())
    with pytest.raises(UserError, match="4 numbers an image, and ViT-L-14 gives 768"):
        authors.main(["embeddings", "--from", "embeddings.pkl"])


def memory(of: str) -> int:
    """Bytes this process holds (VmRSS), or held at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(of))


def test_the_conversion_holds_the_embeddings_once(monkeypatch):
    """One copy of the tensor, and less than half of one beside it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the highest memory is counted from now on
    except OSError:
        pytest.skip("the highest memory cannot be measured here")
    n, width = 8192, 4096  # 134 MB
    Path("wide").mkdir()
    Path("wide/open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": width}}))
    z = torch.rand(n, width)
    z[1::2] = z[::2]  # two captions an image: every second row is left out, and the rest move
    captions = [entry(row // 2 + 1, "a dog", row) for row in range(n)]
    with open("embeddings.pkl", "wb") as file:
        pickle.dump({"clip_embedding": z, "captions": captions, "inds": list(range(n))}, file)
    monkeypatch.setattr(authors, "BLOCK", 64)
    used = {}
    for how in (safe_pickle.load, lambda path: pickle.loads(path.read_bytes())):
        monkeypatch.setattr(safe_pickle, "load", how)
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        authors.main(["embeddings", "--from", "embeddings.pkl", "--model", "local-dir:wide", "--overwrite"])
        used[how] = (memory("VmHWM") - before) / z.nbytes
    ours, plain = used.values()
    assert 0.9 < ours < 1.5
    assert plain > 1.9  # pickle itself holds the bytes and the tensor made of them, so this would be seen
    assert torch.equal(converted()[0], z[::2])


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


def test_without_the_filter_every_text_is_kept_as_it_is_but_none_that_is_empty(tiny):
    convert_embeddings(per_image(), tiny)
    texts = ["short", " two\nlines ", " \n", "```code```"]
    convert_differences(torch.tensor([[70, 71]] * 4), texts, "--keep_all")
    assert [found.text for found in differences.read(DIFFERENCES)] == ["short", " two\nlines ", "```code```"]


BAD_DIFFERENCES = {
    "unequal": ({"indices": [(70, 71)], "llm_diffs": []}, "llm_diffs is 0 entries for 1 indices"),
    "a text": ({"indices": [(70, 71)], "llm_diffs": "x"}, "llm_diffs is a str for 1 indices"),
    "no texts": ({"indices": [(70, 71)]}, "has no llm_diffs; it has indices"),
    "three": ({"indices": [(70, 71, 72)], "llm_diffs": ["x"]}, r"indices\[0\] is '\(70, 71, 72\)'; two whole numbers"),
    "names": ({"indices": [(70, 71), ("a", 71)], "llm_diffs": ["x", "x"]}, r"indices\[1\] is "),
    "numbers": ({"indices": [70], "llm_diffs": ["x"]}, r"indices\[0\] is '70'"),
    "no list": ({"indices": 5, "llm_diffs": ["x"]}, "indices is a int"),
    "of other embeddings": (
        {"indices": [(1, 2)], "llm_diffs": [TEXT.format("two")]},
        "none of the 1 differences.*1 unknown_image",
    ),
    "none": ({"indices": [], "llm_diffs": []}, "none of the 0 differences"),
}


@pytest.mark.parametrize("name", BAD_DIFFERENCES)
def test_differences_of_another_layout_are_refused_with_the_place_and_nothing_is_written(name, tiny):
    convert_embeddings(per_image(), tiny)
    content, message = BAD_DIFFERENCES[name]
    save("differences.pkl", content)
    with pytest.raises(UserError, match=message):
        authors.main(["differences", "--from", "differences.pkl"])
    assert not Path("llm_diffs").exists()


def test_differences_need_the_embeddings_first():
    save("differences.pkl", {"indices": [(70, 71)], "llm_diffs": [TEXT.format("two")]})
    argv = ["differences", "--from", "differences.pkl"]
    with pytest.raises(
        UserError, match=r"no data/release/indices\.json.*Run first: python -m pc_clip\.release embeddings$"
    ):
        authors.main(argv)
    INDICES.parent.mkdir(parents=True)
    for content in ("{", "[]", '{"images": {"a": "9"}, "embeddings": "x"}', '{"images": {}}'):
        INDICES.write_text(content)
        with pytest.raises(UserError, match=r"indices\.json is not what .* writes; run that again with --overwrite"):
            authors.main(argv)


# -- files and the network -----------------------------------------------------------------------------


def test_what_is_there_is_replaced_only_on_request(tiny, example_clip):
    for what in ("embeddings", "differences", "checkpoint"):
        save("embeddings.pkl", per_image())
        save("differences.pkl", {"indices": [(70, 71)], "llm_diffs": [TEXT.format("two")]})
        torch.save(example_clip.model.state_dict(), "checkpoint.pkl")
        argv = [what, "--from", f"{what}.pkl"]
        argv += [] if what == "differences" else ["--model", tiny if what == "embeddings" else "example"]
        authors.main(argv)
        made = {path: path.stat().st_mtime_ns for path in Path().rglob("*") if path.parts[0] in ("data", "llm_diffs")}
        with pytest.raises(UserError, match=r"there already; --overwrite replaces"):
            authors.main(argv)
        assert all(path.stat().st_mtime_ns == when for path, when in made.items())
        authors.main([*argv, "--overwrite"])


@pytest.mark.parametrize("what", ["embeddings", "differences"])
def test_a_file_cut_short_and_a_file_that_is_none_are_errors_of_the_user(what, tiny):
    convert_embeddings(per_image(), tiny)
    path = save("whole.pkl", per_image() | {"indices": [(70, 71)], "llm_diffs": [TEXT.format("two")]})
    content = Path(path).read_bytes()
    for n, bad in enumerate([content[: len(content) // 2], content[:-1], b"", b"hello", bytes(50)]):
        Path("bad.pkl").write_bytes(bad)
        with pytest.raises(UserError, match=r"bad\.pkl is not a whole pickle"):
            authors.main([what, "--from", "bad.pkl", "--out", f"out{n}"])
    with pytest.raises(UserError, match=r"no file at none\.pkl\. Leave --from out to fetch it from https://drive"):
        authors.main([what, "--from", "none.pkl", "--out", "out"])
    Path("page.pkl").write_text("\n<!DOCTYPE html><title>Google Drive - Quota exceeded</title>")
    with pytest.raises(UserError, match=r"page\.pkl is a web page\. Google's daily quota"):
        authors.main([what, "--from", "page.pkl", "--out", "out"])
    assert not list(Path().glob("out*"))


class _Drive(BaseHTTPRequestHandler):
    """Stands for Google Drive: one file an id."""

    def do_GET(self):
        key = self.path.strip("/")
        self.server.asked.append(key)
        status, kind, body = self.server.files.get(key, (404, "text/plain", b"none"))
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def drive(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Drive)
    server.files, server.asked = {}, []
    monkeypatch.setattr(authors, "DRIVE", f"http://127.0.0.1:{server.server_port}/{{id}}")
    threading.Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.01}).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_three_files_are_fetched_by_id_and_once(drive, tiny, example_clip):
    torch.save(example_clip.model.state_dict(), "theirs.pt")
    content = {
        "checkpoint": Path("theirs.pt").read_bytes(),
        "embeddings": pickle.dumps(per_image()),
        "differences": pickle.dumps({"indices": [(70, 72)], "llm_diffs": [TEXT.format("two")]}),
    }
    drive.files = {authors.IDS[what]: (200, "application/octet-stream", body) for what, body in content.items()}
    for _ in range(2):
        authors.main(["checkpoint", "--model", "example", "--overwrite"])
        authors.main(["embeddings", "--model", tiny, "--overwrite"])
        authors.main(["differences", "--overwrite"])
    assert drive.asked == [
        "1OZGQ8f6N4WuSQFn4-e7kzcEZdpKPbEfp", "1dRap0Ses7SajnGoj8hczvJ_o2Ze6JztX", "1yYzHizjCy9ewfagL4uG-iZHQXsWLz48p",
    ]  # fmt: skip
    assert load_model("data/release/pc_clip").weights_hash() == example_clip.weights_hash()
    assert converted()[1] == ["9", "25", "30"]
    assert differences.read(DIFFERENCES) == [differences.Difference("9", "30", TEXT.format("two"))]


def test_a_page_about_the_quota_is_not_taken_for_the_file(drive, tiny):
    page = b"<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head></html>"
    drive.files = {authors.IDS["embeddings"]: (200, "text/html; charset=utf-8", page)}
    for _ in range(2):  # and the next call asks again
        with pytest.raises(UserError, match=r"quota.*may be used up.*in a browser, save the file, and give .* --from"):
            authors.main(["embeddings", "--model", tiny])
    assert len(drive.asked) == 2
    assert not [path for path in Path("data").rglob("*") if path.is_file()]


def test_what_gdown_cannot_fetch_is_said_in_one_line_with_the_address(drive, tiny, monkeypatch):
    with pytest.raises(UserError, match=rf"{authors.IDS['embeddings']} could not be fetched \(404.*--from"):
        authors.main(["embeddings", "--model", tiny])

    def refuse(*_, **__):
        raise gdown.exceptions.FileURLRetrievalError("Cannot retrieve the public link.\n\n\tHave had many accesses.")

    monkeypatch.setattr(gdown, "download", refuse)
    with pytest.raises(UserError, match=r"public link\. Have had many accesses.\)\. Google's daily quota.*--from\.$"):
        authors.main(["embeddings", "--model", tiny])


def test_the_command_explains_itself(capsys):
    for argv in (["--help"], ["checkpoint", "--help"], ["embeddings", "--help"], ["differences", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            authors.main(argv)
        assert stopped.value.code == 0
        assert "pc_clip.release.authors" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        authors.main([])
    assert stopped.value.code == 2


# -- and then train on it ------------------------------------------------------------------------------


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
    config = [
        "--config",
        str(configs_folder() / "example.yaml"),
        *where,
        "--data.differences",
        "llm_diffs/coco_release.jsonl",
    ]
    run = finetune.main([*config, *released, "--pairwise.anchor", "1"])
    assert (run / "model.safetensors").is_file()
    assert "taken on trust" in caplog.text
    assert json.loads((run / "environment.json").read_text())["data"]["embeddings"]
    with pytest.raises(UserError, match="pictures in .* are not in"):
        finetune.main([*config, "--name", "other"])
