"""The PyPI package clip-benchmark measures our models as run.py does, to the last image."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

from pc_clip.data.embeddings import embed_images
from pc_clip.data.registry import open_dataset
from pc_clip.evals import zeroshot
from pc_clip.example import scenes, world
from pc_clip.interface import run
from pc_clip.metrics import retrieval
from pc_clip.models import export, loading, lora
from pc_clip.models.clip import Clip, model_folder
from pc_clip.models.loading import create_model
from pc_clip.release import benchmark as benchmark_command

PER_CLASS = 5
TEMPLATES = ["This is a photo of a {}.", "a {}", "two small {}s on a dark background"]


@pytest.fixture
def keys(tmp_path) -> list[str]:
    """Single shapes as a folder of classes and as a web data set in another order; the keys in that order."""
    rng = np.random.default_rng(0)
    pictures: dict[str, bytes] = {}
    while len(pictures) < PER_CLASS * len(scenes.SHAPES):
        scene = scenes.sample(rng)
        shape = scene.things[0].shape
        if len(scene.things) == 1 and (n := sum(key.startswith(shape) for key in pictures)) < PER_CLASS:
            scenes.draw(scene).save(stream := io.BytesIO(), "PNG")
            pictures[f"{shape}/{n}.png"] = stream.getvalue()
    for key, content in pictures.items():
        path = tmp_path / "images" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    order = [str(key) for key in rng.permutation(list(pictures))]
    write_webdataset(tmp_path / "web", [(pictures[key], key.split("/")[0]) for key in order])
    return order


def write_webdataset(root: Path, images: list[tuple[bytes, str]]) -> None:
    """CLIP_benchmark's layout. images: PNG and class of each."""
    classes = sorted({name for _, name in images})
    write_shards(root, [{"png": png, "cls": str(classes.index(name)).encode()} for png, name in images])
    (root / "classnames.txt").write_text("\n".join(classes))
    templates = "\n".join(template.replace("{}", "{c}") for template in TEMPLATES)
    (root / "zeroshot_classification_templates.txt").write_text(templates)


def write_shards(root: Path, samples: list[dict[str, bytes]]) -> None:
    """Two shards of the split test. samples: ending -> content of each."""
    (root / "test").mkdir(parents=True)
    (root / "test" / "nshards.txt").write_text("2")
    half = len(samples) // 2
    for shard, part in enumerate((samples[:half], samples[half:])):
        with tarfile.open(root / "test" / f"{shard}.tar", "w") as tar:
            for k, sample in enumerate(part):
                for suffix, content in sample.items():
                    member = tarfile.TarInfo(f"s{k:04d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def benchmark(monkeypatch):
    """Runs clip_benchmark's own command line.  -> metrics, scores [N, classes], class weights [D, classes]"""

    classify, seen = zeroshot_classification.run_classification, {}

    def remember(*args, **kwargs):
        seen["scores"], target = classify(*args, **kwargs)
        return seen["scores"], target

    monkeypatch.setattr(zeroshot_classification, "run_classification", remember)

    def evaluate(model: str, pretrained: str) -> tuple[dict, torch.Tensor, torch.Tensor]:
        command = ["eval", "--dataset", "wds/scenes", "--dataset_root", "web", "--model", model,
                   "--pretrained", pretrained, "--task", "zeroshot_classification", "--no_amp", "--num_workers", "0",
                   "--batch_size", "16", "--output", "theirs.json", "--save_clf", "classifier.pt"]  # fmt: skip
        with torch.random.fork_rng():
            benchmark_command.main(command)
        metrics = json.loads(Path("theirs.json").read_text())["metrics"]
        return metrics, seen["scores"], torch.load("classifier.pt", weights_only=True)

    return evaluate


def measure(*flags: str, mode: str = "zeroshot") -> dict:
    """The result of one run.py."""
    run.main([*flags, "--mode", mode, "--device", "cpu", "--out", "ours"])
    (path,) = Path("ours").rglob(f"{mode}*.json")
    result = json.loads(path.read_text())
    shutil.rmtree("ours")
    return result


def assert_agree(theirs: tuple[dict, torch.Tensor, torch.Tensor], path: str, clip: Clip, keys: list[str]) -> int:
    """The same classifier, the same guess for each image, the same accuracy from run.py. Returns how many are right."""
    metrics, scores, weights = theirs
    data = open_dataset("folder", "images")
    (question,) = data.questions
    prompts = zeroshot.class_embeddings(clip, question, TEMPLATES)  # [classes, D]
    assert torch.allclose(prompts, weights.T, atol=1e-6)
    z = torch.nn.functional.normalize(embed_images(clip, data).z, dim=-1)
    guesses = dict(zip(data.ids, (z @ prompts.T).argmax(1).tolist()))
    assert [guesses[key] for key in keys] == scores.argmax(1).tolist()
    ours = measure(
        "--dataset", "folder", "--root", "images", "--templates", json.dumps(TEMPLATES), "--checkpoint", path
    )
    from_web = measure("--dataset", "webdataset", "--root", "web", "--prompts", "several", "--checkpoint", path)
    for actual in (ours, from_web):
        assert actual["n"] == len(keys)
        assert (actual["metrics"]["zeroshot"], actual["metrics"]["top5_class"]) == (metrics["acc1"], metrics["acc5"])
    return round(metrics["acc1"] * len(keys))


def perturbed(clip: Clip, scale: float) -> Clip:
    """The same model with other text weights, as after finetuning."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in lora.trainable(clip, "text_blocks").values():
            parameter.add_(scale * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return clip


@pytest.mark.slow
def test_the_embedded_model(keys, benchmark, example_clip):
    theirs = benchmark(f"local-dir:{model_folder('example')}", "")
    ours = measure("--dataset", "webdataset", "--root", "web", "--prompts", "several", "--model.name", "example")
    assert (ours["metrics"]["zeroshot"], ours["metrics"]["top5_class"]) == (theirs[0]["acc1"], theirs[0]["acc5"])
    loading.save_model(Path("runs/same/model.safetensors"), example_clip)
    assert assert_agree(theirs, "runs/same", example_clip, keys) > len(keys) / 2


@pytest.mark.slow
def test_a_finetuned_checkpoint_through_its_export(keys, benchmark):
    clip = perturbed(create_model("example"), 1.5)
    loading.save_model(Path("runs/mine/model.safetensors"), clip)
    export.main(["runs/mine", "--out", "exported/mine"])
    theirs = benchmark("local-dir:exported/mine", "")
    right = assert_agree(theirs, "runs/mine", clip, keys)
    before, _, _ = benchmark(f"local-dir:{model_folder('example')}", "runs/mine/model.safetensors")
    assert 0 < right < before["acc1"] * len(keys)  # open_clip takes no file beside local-dir:, hence the export


# -- retrieval -----------------------------------------------------------------------------------------------

THEIRS = {"t2i": "image_retrieval_recall", "i2t": "text_retrieval_recall"}  # their name says what is retrieved


@pytest.mark.parametrize("seed", range(3))
def test_recall_of_random_embeddings_is_what_its_code_counts(seed):
    rng = np.random.default_rng(seed)
    each = rng.integers(1, 6, 40)  # captions an image
    unit = torch.nn.functional.normalize
    images = unit(torch.from_numpy(rng.normal(size=(40, 16)).astype(np.float32)), dim=-1)
    texts = torch.from_numpy(rng.normal(size=(int(each.sum()), 16)).astype(np.float32))
    texts = unit(texts + images[np.repeat(np.arange(40), each)], dim=-1)

    class Given:
        """Embeddings are what is encoded."""

        encode_image = encode_text = staticmethod(lambda given: given)

    parts = np.split(np.arange(len(texts)), np.cumsum(each)[:-1])
    batches = [(images[start : start + 7], parts[start : start + 7]) for start in range(0, 40, 7)]
    theirs = zeroshot_retrieval.evaluate(
        Given, batches, lambda rows: texts[np.array(rows)], "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    hits, queries = retrieval.per_image(retrieval.families(images, texts, each), 40)
    for k in (1, 5, 10):
        for name, other in THEIRS.items():
            ours = hits[f"{name}_r{k}"].sum() / queries[f"{name}_r{k}"].sum()
            assert ours == pytest.approx(theirs[f"{other}@{k}"], abs=1e-6)
    assert 0.1 < theirs["image_retrieval_recall@1"] < 0.9


@pytest.fixture
def captioned(tmp_path) -> int:
    """Scenes with one to four captions that no other scene has, as a web data set and as COCO. Returns how many."""
    seen: set[str] = set()
    samples: list[tuple[bytes, list[str]]] = []
    for n in range(200):
        texts = world.captions("val", n)
        if not seen.intersection(texts) and len(samples) < 32:
            scenes.draw(world.scene("val", n)).save(stream := io.BytesIO(), "PNG")
            samples.append((stream.getvalue(), list(dict.fromkeys(texts))[: 1 + n % 4]))
        seen.update(texts)
    write_shards(tmp_path / "web", [{"png": png, "txt": "\n".join(texts).encode()} for png, texts in samples])
    (tmp_path / "web" / "dataset_type.txt").write_text("retrieval")
    (tmp_path / "coco" / "val2014").mkdir(parents=True)
    for n, (png, _) in enumerate(samples):
        (tmp_path / "coco" / "val2014" / f"{n}.png").write_bytes(png)
    images = [{"id": n, "file_name": f"{n}.png"} for n in range(len(samples))]
    sentences = [(n, text) for n, (_, texts) in enumerate(samples) for text in texts]
    annotations = [{"id": k, "image_id": n, "caption": text} for k, (n, text) in enumerate(sentences)]
    content = {"images": images, "annotations": annotations}
    (tmp_path / "coco" / "captions_val2014.json").write_text(json.dumps(content))
    for name in ("coco_test_karpathy.json", "val2014/captions_karpathy.json"):  # a part of val2014, where each looks
        (tmp_path / "coco" / name).write_text(json.dumps(content))
    return len(samples)


@pytest.mark.slow
def test_retrieval_of_a_finetuned_checkpoint_through_its_export(captioned):
    loading.save_model(Path("runs/mine/model.safetensors"), perturbed(create_model("example"), 0.5))
    export.main(["runs/mine", "--out", "exported/mine"])
    coco = "--dataset mscoco_captions --dataset_root coco"
    for theirs, ours in {
        "--dataset wds/web --dataset_root web": "--dataset webdataset --root web",
        f"{coco} --annotation_file coco/captions_val2014.json": "--dataset coco --root coco --split val2014",
        coco: "--dataset coco --root coco/val2014 --split karpathy",
    }.items():
        command = ["eval", *theirs.split(), "--task", "zeroshot_retrieval", "--model", "local-dir:exported/mine",
                   "--pretrained", "", "--recall_k", "1", "5", "10", "--no_amp", "--num_workers", "0",
                   "--batch_size", "8", "--output", "theirs.json"]  # fmt: skip
        with torch.random.fork_rng():
            benchmark_command.main(command)
        metrics = json.loads(Path("theirs.json").read_text())["metrics"]
        result = measure(*ours.split(), "--checkpoint", "runs/mine", mode="retrieve")
        assert result["n"] == captioned == 32 and 0.1 < metrics["text_retrieval_recall@1"] < 1
        for k in (1, 5, 10):
            for name, other in THEIRS.items():
                assert result["metrics"][f"{name}_r{k}"] == pytest.approx(metrics[f"{other}@{k}"], abs=1e-6)
