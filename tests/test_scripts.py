"""The three scripts: with no argument, on small settings, and on bad input; each once as a process of its own."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch
import yaml
from test_writers import TEMPLATE, save_llama

from pc_clip.core.config.write import GenerateConfig
from pc_clip.core.errors import UserError, run_script
from pc_clip.core.paths import configs_folder
from pc_clip.data.differences import Difference, to_line
from pc_clip.evals import probe
from pc_clip.example.scenes import draw
from pc_clip.example.world import scene
from pc_clip.interface import finetune, generate_diffs, run
from pc_clip.write import generate, work
from pc_clip.write.cleaning import Checked

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
def test_each_script_runs_without_arguments_in_any_order(small_example, monkeypatch, capsys, caplog):
    caplog.set_level("INFO")
    small = GenerateConfig(name="example", split="train", n_images=100, n_pairs=200)
    monkeypatch.setattr(generate, "of_example", lambda name: small)
    monkeypatch.setattr(probe, "choose_c", lambda *_: 1.0)  # two thirds of the time; test_probe holds it
    run.main([])
    assert "no finetuned example yet" in caplog.text
    finetune.main(["--train.steps", "3", "--config", str(configs_folder() / "example.yaml")])
    assert "is not there yet; writing it" in caplog.text
    assert Path("runs/example/model.safetensors").is_file()
    assert len(Path("llm_diffs/example.jsonl").read_text().splitlines()) == 200
    run.main([])
    shown = capsys.readouterr().out
    assert "example-pretrained" in shown
    assert "caption_subtraction" in shown
    with pytest.raises(UserError, match="written with other settings"):
        generate_diffs.main(["--n_images", "99", "--n_pairs", "200"])


@pytest.mark.slow
def test_an_evaluation_that_is_done_is_skipped_and_done_again_on_request(small_example, caplog):
    caplog.set_level("INFO")
    argv = ["--mode", "zeroshot", "--split", "val"]
    run.main(argv)
    path = Path("results/example-pretrained/zeroshot-example-val.json")
    first = json.loads(path.read_text())
    assert first["n"] > 0
    assert first["versions"]["torch"]
    run.main(argv)
    assert "already in" in caplog.text
    assert json.loads(path.read_text()) == first
    run.main([*argv, "--again", "true"])
    assert json.loads(path.read_text())["date"] >= first["date"]
    run.main(["--mode", "zeroshot", "--split", "val", "--templates", "a {}"])
    (other,) = set(path.parent.glob("zeroshot-*.json")) - {path}  # other prompts overwrite nothing
    assert json.loads(other.read_text())["key"] != first["key"] == json.loads(path.read_text())["key"]


@pytest.mark.slow
def test_the_pc_clip_authors_kind_of_checkpoint_evaluates_unchanged(small_example, example_clip):
    """A bare state dict, as torch.save writes it; its architecture is given because it is in no list of open_clip's."""
    torch.save(example_clip.model.state_dict(), "ckpt.pt")
    folder = ROOT / "pc_clip" / "example" / "model"
    run.main(["--checkpoint", "ckpt.pt", "--model.name", f"local-dir:{folder}", "--mode", "zeroshot"])
    run.main(["--mode", "zeroshot"])
    actual = [
        json.loads(Path(f"results/{n}/zeroshot-example-test.json").read_text()) for n in ("ckpt", "example-pretrained")
    ]
    assert actual[0]["metrics"] == actual[1]["metrics"]


@pytest.mark.slow
def test_a_folder_of_images_is_ranked_into_a_csv_and_a_sheet():
    Path("mine").mkdir()
    for i in range(10):
        draw(scene("val", i)).save(f"mine/{i}.png")
    attribute = ["--rank.attribute", "a large object", "--rank.against", "a small object"]
    run.main(["--model.name", "example", "--mode", "rank", "--images", "mine", *attribute])
    (table,) = Path("results/example-pretrained").glob("rank-folder-mine-*.csv")
    ranked = pandas.read_csv(table)
    assert list(ranked.columns) == ["rank", "image", "score"] and len(ranked) == 10
    radius = [max(thing.radius for thing in scene("val", int(Path(name).stem)).things) for name in ranked.image]
    assert sum(radius[:3]) > sum(radius[-3:])
    assert list(table.parent.glob("*ranked.png"))


GENERATED = ["diffs_example", "diffs_photo", "diffs_photo_llm", "rank_example", "rank_coco"]  # each of another kind
TRAINED = ["example", "example_simclip", "example_negatives", "example_change_retrieve", "pc_clip_coco", "photo_dpo"]


@pytest.mark.slow
@pytest.mark.parametrize("name", GENERATED)
def test_configs_of_writers_run_with_few_images(name, small_example, monkeypatch, coco_folder):
    path = ROOT / "configs" / f"{name}.yaml"
    content = yaml.safe_load(path.read_text())
    if content.get("task") == "rank":
        here = ["--root", str(coco_folder), "--split", "val2017"]
        coco = [*here, "--model.name", "example", "--model.pretrained", "null"] if "model" in content else []
        few = ["--config", str(path), "--writer", "rules", "--rank.n_queries", "8", "--rank.margin", "1"]
        assert len(pandas.read_parquet(generate_diffs.main([*few, *coco]))) > 8
        return
    captions = str(coco_folder / "annotations" / "captions_val2017.json")
    options = ["--captions", captions] if "captions" in content else []
    if content["writer"] == "transformers":
        save_llama(Path("llama"), TEMPLATE)
        llama = {"model": "llama", "gguf_file": "null", "dtype": "float32"}
        options += [word for key, value in llama.items() for word in (f"--transformers.{key}", value)]
        monkeypatch.setattr(work, "check", lambda raw, _: Checked(raw, "kept"))  # a random model writes nonsense
    path_written = generate_diffs.main(["--config", str(path), *options, "--n_images", "10", "--n_pairs", "12"])
    assert len(path_written.read_text().splitlines()) == 12


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_configs_of_methods_run_with_a_tiny_model(name, small_runs, tiny, coco_folder):
    path = ROOT / "configs" / f"{name}.yaml"
    content = yaml.safe_load(path.read_text())
    size = ["--train.batch_size", "4", "--train.steps", "2", "--data.workers", "0", "--model.name", tiny]
    size += ["--model.pretrained", "null"]
    data = ["--data.dataset", "coco", "--data.root", str(coco_folder), "--data.split", "val2017"]
    if content["method"] == "pairwise":
        text = "The first image shows {}, the second image {}."
        pairs = [Difference(str(i), str(j), text.format(i, j)) for i in range(4) for j in range(4, 8)]
        Path("d.jsonl").write_text("".join(map(to_line, pairs)))
        data += ["--data.differences", "d.jsonl"]
    if content["method"] == "preference":
        rows = [{"image": str(i), "preferred": f"scene {i}", "rejected": "no scene"} for i in range(8)]
        Path("s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data += ["--data.statements", "s.jsonl"]
    if content["method"] == "change":
        data = ["--data.dataset", "example_changes", "--data.split", "train", "--change.validation", "val"]
        data += ["--change.intra_layers", "1"]  # the tiny tower has two
    if "sampler" in content:
        data += ["--sampler.cluster_size", "2"]
    finetune.main(["--config", str(path), *size, *data])
    assert Path(f"runs/{content['name']}/model.safetensors").is_file()


# -- bad input: one line, nothing half-written -----------------------------------------------------------


@pytest.mark.slow
def test_a_users_mistake_is_one_line_and_exit_code_2():
    for name, argv in (
        ("finetune.py", ["--train.lrr", "1"]),
        ("run.py", ["--mode", "zeroshots"]),
        ("generate_diffs.py", ["--writer", "x"]),
    ):
        done = subprocess.run(
            [sys.executable, str(ROOT / name), *argv], env=ENVIRONMENT, capture_output=True, text=True
        )
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not any(Path(name).exists() for name in ("runs", "results", "llm_diffs"))


EXAMPLE = ["--config", str(configs_folder() / "example.yaml"), "--data.differences", "d.jsonl"]
REFUSED = [  # a script, its arguments, and what its message says
    (generate_diffs, ["--captions", "absent.json"], "no captions file at absent.json"),
    (generate_diffs, ["--captions", "empty.json"], "empty.json is not JSON"),
    (generate_diffs, ["--captions", "none.json"], "none.json holds no captions"),
    (finetune, [*EXAMPLE[:3], "absent.jsonl"], "no differences at absent.jsonl"),
    (finetune, EXAMPLE, "d.jsonl line 2 is not JSON"),
    (finetune, ["--config", str(configs_folder() / "pc_clip_coco.yaml")], "coco is not at data/coco|ViT-L-14"),
    (run, ["--dataset", "cifar100"], "cifar-100-python.tar.gz"),
    (run, ["--dataset", "cifar1000"], "unknown data set 'cifar1000'. Did you mean 'cifar100'"),
    (run, ["--mode", "zeroshots"], "mode is 'zeroshots'. Did you mean 'zeroshot'"),
    (run, ["--split", "testing"], "example has no split 'testing'"),
    (run, ["--checkpoint", "absent.pt"], "no checkpoint at absent.pt"),
    (run, ["--images", "."], "--images ranks a folder"),
    (run, ["--mode", "relations"], "cannot be measured on example/test: it needs.*--statements PATH"),
    (run, ["--mode", "compositional"], "cannot be measured on example/test: it needs.*--statements PATH"),
]


@pytest.mark.slow
def test_bad_input_is_one_line_and_leaves_nothing(small_example):
    Path("empty.json").write_text("")
    Path("none.json").write_text('{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}')
    Path("d.jsonl").write_text('{"first": "train-00001", "second": "train-00002", "text": "ok"}\n{"first": \n')
    for script, argv, message in REFUSED:
        with pytest.raises(UserError, match=message) as error:
            script.main(argv)
        assert "\n" not in str(error.value)
    assert not any(Path(name).exists() for name in ("runs", "results", "llm_diffs"))


def test_faults_of_the_disk_and_an_interruption_are_said(capsys):
    for number in (errno.EACCES, errno.ENOSPC, errno.EROFS):

        def fail(number=number):
            raise OSError(number, "x", "runs/a/model.safetensors")

        with pytest.raises(SystemExit, match="2"):
            run_script(fail)
        shown = capsys.readouterr().err
        assert os.strerror(number).lower() in shown and "runs/a/model.safetensors" in shown

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="130"):
        run_script(interrupted)
    assert "continues" in capsys.readouterr().err


def test_a_run_whose_data_set_is_there_but_whose_pictures_are_not(coco_folder):
    (coco_folder / "val2017" / "000000000005.jpg").unlink()
    argv = ["--model.name", "example", "--dataset", "coco", "--root", str(coco_folder), "--split", "val2017"]
    with pytest.raises(UserError, match=r"1 of the 12 pictures.*000000000005\.jpg"):
        run.main(argv)
    run.main([*argv, "--missing", "skip", "--mode", "retrieve"])
    assert json.loads(Path("results/example-pretrained/retrieve-coco-val2017.json").read_text())["n"] == 11
