"""pc_clip beside what one would use instead: clip-benchmark's command, and open_clip_train.

    python bench/peers.py                    # about forty minutes on two cores
    python bench/peers.py --images 200       # a look; --only zeroshot, ... for a part

ViT-B-32 with random weights (their values do not change the time), the same pictures, captions and threads; whole
commands take turns, start included. Results are compared: each image's class in zero-shot, every R@k in retrieval, and
the loss of 50 steps of training from the same weights.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from io import BytesIO
from math import nan
from pathlib import Path
from statistics import median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import pandas as pd
import torch
from PIL import Image
from record import Figure, exit_if_missed, record
from safetensors.torch import save_file
from surroundings import temporary_folder

from pc_clip.core.errors import run_script
from pc_clip.example import world
from pc_clip.example.scenes import draw
from pc_clip.models import torchvision_compat  # noqa: F401  (before open_clip)
from pc_clip.models.clip import model_folder

import open_clip  # isort: skip

ROOT = Path(__file__).parents[1]
PARTS = ("zeroshot", "retrieval", "training", "loss")
CLASSES, BATCH, CAPTIONS = 100, 64, 5
EXAMPLE = f"local-dir:{model_folder('example')}"

# clip-benchmark's own command; in addition it writes which class each image has, and which it gets
CLIP_BENCHMARK = """
import sys
import numpy as np
from pc_clip.release import benchmark
from clip_benchmark.metrics import zeroshot_classification
run = zeroshot_classification.run_classification
def run_and_keep(*arguments, **named):
    logits, classes = run(*arguments, **named)
    np.save("their_classes.npy", np.stack([classes.numpy(), logits.argmax(1).numpy()]))
    return logits, classes
zeroshot_classification.run_classification = run_and_keep
benchmark.main(sys.argv[1:])
"""
# open_clip_train's own command, with a fixed logit scale, as ours has it where the image tower is locked
OPEN_CLIP_TRAIN = """
import sys
from pc_clip.models import torchvision_compat
from open_clip_train import main
create = main.create_model_and_transforms
def create_with_fixed_scale(*arguments, **named):
    model, *transforms = create(*arguments, **named)
    model.logit_scale.requires_grad_(False)
    return model, *transforms
main.create_model_and_transforms = create_with_fixed_scale
main.main(sys.argv[1:])
"""


class Command(NamedTuple):
    seconds: float  # the whole command
    output: str


def figures(threads: int = 1, images: int = 2000, only: Sequence[str] = PARTS) -> list[Figure]:
    """All ratios, theirs : ours. Raises RuntimeError where the two do not give the same results."""
    with temporary_folder():
        here = Path.cwd()
        write_models(here)
        write_scenes(here, images)
        about = f"ViT-B-32, float32, batch {BATCH}, {threads} thread(s)"
        parts = {
            "zeroshot": lambda: zeroshot(threads, f"{images:,} images, {CLASSES} classes, {about}"),
            "retrieval": lambda: retrieval(threads, f"{images // 2:,} images with {CAPTIONS} captions, {about}"),
            "training": lambda: training(threads, images),
            "loss": lambda: [same_loss(threads)],
        }
        return [figure for name in only for figure in parts[name]()]


# -- what both work on -----------------------------------------------------------------------------------------


def write_models(folder: Path) -> None:
    """start/ and retrained/, in open_clip's own layout: one image tower, two text towers."""
    config = {"model_cfg": open_clip.get_model_config("ViT-B-32"), "preprocess_cfg": {}}
    for name, seed in (("start", 0), ("retrained", 1)):
        torch.manual_seed(seed)
        model = open_clip.create_model("ViT-B-32").eval()
        if name == "start":
            spread_out(model)
            image_tower = model.visual.state_dict()
        model.visual.load_state_dict(image_tower)
        (folder / name).mkdir()
        (folder / name / "open_clip_config.json").write_text(json.dumps(config))
        save_file(model.state_dict(), folder / name / "open_clip_model.safetensors")


@torch.no_grad()
def spread_out(model: torch.nn.Module) -> None:
    """Embeddings of random weights lie close together, and all images get one class: their mean is subtracted."""
    size = model.visual.image_size[0]
    pictures = torch.stack([torch.tensor(picture(n, size)).permute(2, 0, 1) / 127.5 - 1 for n in range(32)])
    inputs: list[torch.Tensor] = []
    hook = model.visual.ln_post.register_forward_hook(lambda module, given, out: inputs.append(out))
    model.visual(pictures)
    hook.remove()
    model.visual.ln_post.bias -= inputs[0].flatten(0, -2).mean(0)


def picture(n: int, size: int) -> np.ndarray:
    """The n-th scene of the example.  -> [size, size, 3] uint8"""
    return np.asarray(draw(world.scene("train", n)).resize((size, size)))


def write_scenes(folder: Path, images: int) -> None:
    """WebDatasets of classes and of captions, and a table of pictures with a caption each."""
    (folder / "pictures").mkdir()
    files = [folder / "pictures" / f"{n}.jpg" for n in range(images)]
    for n, file in enumerate(files):
        Image.fromarray(picture(n, 256)).save(file, quality=90)
    names = [f"the {adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]
    write_shard(folder / "classes", files, ".cls", [str(n % CLASSES) for n in range(images)])
    (folder / "classes/classnames.txt").write_text("\n".join(names))
    (folder / "classes/zeroshot_classification_templates.txt").write_text("a photo of {c}.")
    numbered = [f"{world.captions('train', n)[0]}, number {n}" for n in range(images * CAPTIONS)]  # no ties
    captions = ["\n".join(numbered[n : n + CAPTIONS]) for n in range(0, len(numbered), CAPTIONS)]
    write_shard(folder / "captioned", files[: images // 2], ".txt", captions)
    (folder / "captioned/dataset_type.txt").write_text("retrieval")
    table = pd.DataFrame({"filepath": files, "title": [world.captions("train", n)[0] for n in range(images)]})
    table.to_csv(folder / "train.csv", sep="\t", index=False)


ADJECTIVES = ("red", "green", "old", "new", "small", "large", "wooden", "striped", "wet", "broken")
NOUNS = ("car", "dog", "house", "boat", "tree", "chair", "bird", "bottle", "bridge", "lamp")


def write_shard(root: Path, files: Sequence[Path], ending: str, texts: Sequence[str]) -> None:
    (root / "test").mkdir(parents=True)
    (root / "test/nshards.txt").write_text("1")
    with tarfile.open(root / "test/0.tar", "w") as shard:
        for n, (file, text) in enumerate(zip(files, texts)):
            for name, content in ((f"{n:06d}.jpg", file.read_bytes()), (f"{n:06d}{ending}", text.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                shard.addfile(member, BytesIO(content))


# -- evaluation --------------------------------------------------------------------------------------------------


def zeroshot(threads: int, about: str) -> list[Figure]:
    """The first time, and with another text tower on the same image tower."""
    rows = []
    for model, floor in (("start", 1.0), ("retrained", 20.0)):
        theirs = clip_benchmark(model, "classes", threads)
        mine = run_py(model, "classes", "zeroshot", threads)
        classes, guessed = np.load("their_classes.npy")
        confusion = np.zeros((CLASSES, CLASSES), dtype=int)
        np.add.at(confusion, (classes, guessed), 1)
        (details,) = result(model, "zeroshot")["details"].values()
        if not np.array_equal(confusion, details["confusion"]):
            raise RuntimeError(f"{int(abs(confusion - details['confusion']).sum() / 2)} images have another class")
        when = "first time" if model == "start" else "another text tower"
        rows.append(ratio(f"zero-shot, {when}", theirs, mine, floor,
                          f"{about}; {len(np.unique(guessed))} classes are guessed, all alike"))  # fmt: skip
    return rows


def retrieval(threads: int, about: str) -> list[Figure]:
    rows = []
    for model, floor in (("start", 1.0), ("retrained", 10.0)):
        theirs = clip_benchmark(
            model, "captioned", threads, "--task", "zeroshot_retrieval", "--recall_k", "1", "5", "10"
        )
        mine = run_py(model, "captioned", "retrieve", threads)
        known = json.loads(Path(f"{model}-captioned.json").read_text())["metrics"]
        measured = result(model, "retrieve")["metrics"]
        for way, name in (("t2i", "image_retrieval_recall"), ("i2t", "text_retrieval_recall")):
            for k in (1, 5, 10):
                if abs(known[f"{name}@{k}"] - measured[f"{way}_r{k}"]) > 1e-6:
                    raise RuntimeError(f"{way} R@{k}: theirs {known[f'{name}@{k}']}, ours {measured[f'{way}_r{k}']}")
        when = "first time" if model == "start" else "another text tower"
        rows.append(ratio(f"retrieval, {when}", theirs, mine, floor, f"{about}; R@1, 5, 10 both ways are equal"))
    return rows


def clip_benchmark(model: str, data: str, threads: int, *options: str) -> float:
    command = [sys.executable, "-c", CLIP_BENCHMARK, "eval", "--model", f"local-dir:{Path.cwd() / model}"]
    command += ["--pretrained", "", "--dataset", f"wds/{data}", "--dataset_root", str(Path.cwd() / data), "--no_amp"]
    command += ["--num_workers", "1", "--batch_size", str(BATCH), "--output", f"{model}-{data}.json", *options]
    return run(command, threads).seconds


def run_py(model: str, data: str, mode: str, threads: int) -> float:
    """--prompts several: those of the data set, which are clip-benchmark's."""
    command = [sys.executable, str(ROOT / "run.py"), "--dataset", "webdataset", "--root", data, "--split", "test"]
    command += ["--mode", mode, "--prompts", "several", "--model.name", f"local-dir:{Path.cwd() / model}"]
    return run([*command, "--batch_size", str(BATCH), "--label", model, "--out", "results"], threads).seconds


def result(model: str, mode: str) -> dict:
    (path,) = Path("results", model).glob(f"*{mode}*.json")
    return json.loads(path.read_text())


# -- training ----------------------------------------------------------------------------------------------------


def training(threads: int, images: int) -> list[Figure]:
    """The text tower on captions, the image tower locked; pairs a second, without the start."""
    rows, model = [], f"local-dir:{Path.cwd() / 'start'}"
    for precision, name in (("fp32", "no"), ("amp_bf16", "bf16")):
        options = ["--model", model, "--precision", precision, "--lr", "1e-5"]
        log = open_clip_train("train.csv", 5, threads, *options)
        seconds = [float(value) for value in re.findall(r"Batch \(t\): ([\d.]+)", log)]
        theirs = BATCH / median(seconds[1:])  # the first warms up
        whole = finetune(f"train-{name}", model, "train.csv", 12, threads, "--train.precision", name).seconds
        ours = pd.read_json(Path("runs", f"train-{name}", "metrics.jsonl"), lines=True).pairs_per_second
        start = whole - (BATCH / ours).sum()
        rows.append(
            Figure(f"training on captions, {precision}, ours : open_clip_train", ours[1:].median() / theirs, 10.0, "x",
                   f"ViT-B-32, image tower locked, batch {BATCH}, {threads} thread(s); {ours[1:].median():.1f} against "
                   f"{theirs:.1f} pairs/s; before the first step {start:.0f} s, for which "
                   f"{'the images are embedded' if name == 'no' else 'they are in the cache'} ({images} images)")
        )  # fmt: skip
    return rows


def same_loss(threads: int) -> Figure:
    """One batch is all the data, so that its order does not matter; the example's model is fast and trained."""
    Path("small").mkdir()
    for n in range(BATCH):  # at the model's size: the two resize differently
        draw(world.scene("train", n)).save(f"small/{n}.png")
    table = pd.read_csv("train.csv", sep="\t").head(BATCH)
    table["filepath"] = [str(Path.cwd() / f"small/{n}.png") for n in range(BATCH)]
    table["title"] += [f", number {n}" for n in range(BATCH)]  # the two treat captions that are the same differently
    table.to_csv("one_batch.csv", sep="\t", index=False)
    options = ["--model", EXAMPLE, "--precision", "fp32", "--lr", "1e-4", "--lock-image-freeze-bn-stats"]
    log = open_clip_train("one_batch.csv", 50, threads, *options)
    theirs = [float(value) for value in re.findall(r" Loss: ([\d.]+)", log)]
    finetune("same-loss", EXAMPLE, "one_batch.csv", 50, threads, "--train.lr", "1e-4")
    mine = pd.read_json(Path("runs", "same-loss", "metrics.jsonl"), lines=True).loss
    return Figure("loss of step 50, ours - open_clip_train", abs(mine.iloc[-1] - theirs[-1]), nan, "nats",
                  f"example's model, float32, {BATCH} pairs a batch, {theirs[0]:.4f} in step 1, {theirs[-1]:.5f} in "
                  "step 50; its log has five digits", most=1e-4)  # fmt: skip


def open_clip_train(table: str, steps: int, threads: int, *options: str) -> str:
    rows = len(pd.read_csv(table, sep="\t"))
    some = pd.read_csv(table, sep="\t").head(min(rows, BATCH * steps))
    some.to_csv("theirs.csv", sep="\t", index=False)
    epochs = steps // (len(some) // BATCH)
    command = [sys.executable, "-c", OPEN_CLIP_TRAIN, "--train-data", "theirs.csv", "--dataset-type", "csv"]
    command += ["--lock-image", "--batch-size", str(BATCH), "--epochs", str(epochs), "--workers", "1", "--wd", "0"]
    command += ["--beta1", "0.9", "--beta2", "0.999", "--eps", "1e-8", "--lr-scheduler", "const", "--warmup", "0"]
    command += ["--log-every-n-steps", "1", "--save-frequency", "0", "--aug-cfg", "scale=(1.0,1.0)"]
    return run([*command, "--logs", "theirs", "--name", f"{table}-{time.time()}", *options], threads).output


def finetune(name: str, model: str, table: str, steps: int, threads: int, *options: str) -> Command:
    rows = pd.read_csv(table, sep="\t").rename(columns={"filepath": "image", "title": "caption1"})
    rows.to_csv("ours.tsv", sep="\t", index=False)
    command = [sys.executable, str(ROOT / "finetune.py"), "--method", "contrastive", "--name", name, "--out", "runs"]
    command += ["--model.name", model, "--model.train", "text", "--data.dataset", "tsv"]
    command += ["--data.split", "ours.tsv", "--train.batch_size", str(BATCH), "--train.steps", str(steps)]
    command += ["--train.optimizer", "adamw", "--train.lr", "1e-5", "--train.schedule", "constant"]
    command += ["--train.warmup_steps", "0", "--train.clip_norm", "0"]
    return run([*command, "--train.log_every", "1", "--train.threads", str(threads), *options], threads)


def run(command: Sequence[str], threads: int) -> Command:
    """Raises RuntimeError with the end of what it printed where a command fails."""
    surroundings = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=surroundings)
    seconds, output = time.perf_counter() - begin, done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)[:300]} ended with {done.returncode}:\n{output[-2000:]}")
    return Command(seconds, output)


def ratio(name: str, theirs: float, mine: float, floor: float, about: str) -> Figure:
    return Figure(f"{name}, clip-benchmark : ours", theirs / mine, floor, "x",
                  f"{about}; {theirs:.1f} s against {mine:.1f} s")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    exit_if_missed(record(figures(arguments.threads, arguments.images, arguments.only)))


if __name__ == "__main__":
    run_script(main)
