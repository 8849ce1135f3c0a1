"""Settings: YAML and flags, strict, with the nearest name where one is wrong; every config of the project."""

from pathlib import Path

import pytest
import yaml

from pc_clip.core.cli import configure, dump, peek
from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.config.settings import identity
from pc_clip.core.config.train import METHODS, FinetuneConfig, PairwiseConfig
from pc_clip.core.config.write import GenerateConfig
from pc_clip.core.environment import resolve_device
from pc_clip.core.errors import UserError
from pc_clip.train import methods

CONFIGS = Path(__file__).parents[1] / "configs"


def finetune(*argv, **kwargs) -> FinetuneConfig:
    return configure(FinetuneConfig, "finetune.py", "", argv, options={"pairwise": PairwiseConfig}, **kwargs)


def evaluate(*argv) -> EvaluateConfig:
    return configure(EvaluateConfig, "run.py", "", argv)


def test_flags_override_the_file_and_types_are_kept(tmp_path):
    (tmp_path / "c.yaml").write_text("train:\n  lr: 1.0e-8\n  steps: 5\npairwise:\n  mirror: true\n")
    found = finetune(
        "--config", "c.yaml", "--train.lr", "1e-3", "--model.pretrained", "openai", "--train.steps", "null"
    )
    assert (found.train.lr, found.train.steps, found.model.pretrained) == (1e-3, None, "openai")
    assert found.pairwise == PairwiseConfig(mirror=True)


def test_the_default_file_is_read_only_when_none_is_named(tmp_path):
    (tmp_path / "default.yaml").write_text("seed: 7\nname: d\n")
    (tmp_path / "other.yaml").write_text("name: o\n")
    assert finetune(default=tmp_path / "default.yaml").seed == 7
    found = finetune("--config", "other.yaml", default=tmp_path / "default.yaml")
    assert (found.seed, found.name) == (0, "o")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train.lrr", "1"], r"no setting train\.lrr.*'train\.lr'"),
        (["--trian.lr=1"], r"no setting trian\.lr\..*'train\.lr'"),
        (["--pairwise.miror", "true"], r"no setting pairwise\.miror.*'pairwise\.mirror'"),
        (["--train.lr", "fast"], r'"train\.lr".*float.*fast'),
        (["--resume", "perhaps"], r'"resume".*perhaps'),
        (["--config", "absent.yaml"], r"no config at absent\.yaml; in configs.*example\.yaml"),
        (["zeroshot"], "no setting zeroshot"),
        (["--seed", "-1"], "seed is -1; it must be at least 0"),
        (["--data.mix", "mnist"], r'^data\.mix takes a list: .\[\{"dataset": "mnist", "n": 500\}\]. \(found mnist\)$'),
        (["--data.mix", '[{"dataset": "mnist"}]'], r"^data\.mix takes a list: .*required: n\)$"),
        (["--data.mix", '[{"dataset": "mnist", "n": "five"}]'], r"^data\.mix takes a list: .*Expected a int.*five\)$"),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_it_and_the_nearest(argv, message):
    with pytest.raises(UserError, match=message) as error:
        finetune(*argv)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  learning_rate: 1\n", r"no setting train\.learning_rate"),
        ("tain:\n  lr: 1\n", r"no setting tain\. Did you mean .*train\.lr"),
        ("train: [", "is not YAML"),
        ("train: 3\n", "train is a group of settings, not 3"),
        ("train:\n  epochs: many\n", r"epochs"),
        ("data:\n  mix:\n  - {dataset: mnist, m: 5}\n", r"^data\.mix takes a list: .*'m' is not accepted"),
    ],
)
def test_a_wrong_key_in_a_file_is_named(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        finetune("--config", "c.yaml")
    assert "\n" not in str(error.value)


def test_a_switch_alone_means_true():
    assert finetune("--resume").resume
    found = finetune("--pairwise.mirror", "--overwrite", "--seed", "3")
    assert (found.pairwise.mirror, found.overwrite, found.seed, found.resume) == (True, True, 3, False)
    assert not finetune("--resume", "false").resume


def test_a_device_that_is_not_there_is_said():
    with pytest.raises(UserError, match="device is 'gpu'"):
        finetune("--device", "gpu")
    with pytest.raises(UserError, match="torch finds no GPU"):
        resolve_device("cuda")


def test_a_setting_that_moved_names_its_new_place(tmp_path):
    with pytest.raises(UserError, match="beams is called caption.beams now"):
        evaluate("--beams", "5")
    Path("c.yaml").write_text("shots: [1]\n")
    with pytest.raises(UserError, match="shots is called probe.shots now"):
        evaluate("--config", "c.yaml")


def test_settings_of_training_are_none_of_an_evaluation():
    for flag in ("--model.start", "--model.train", "--model.lora_rank"):
        with pytest.raises(UserError, match=f"no setting {flag[2:]}"):
            evaluate(flag, "1")


def test_flags_cannot_be_abbreviated():
    with pytest.raises(UserError, match="no setting train.step. Did you mean 'train.steps'"):
        finetune("--train.step", "3")


def test_identity_leaves_out_how_work_is_done():
    a, b = finetune("--train.lr", "0.1"), finetune("--train.lr", "0.1", "--train.threads", "3", "--data.workers", "2")
    assert identity(a) == identity(b)
    assert identity(a) != identity(finetune("--train.lr", "0.1", "--pairwise.anchor", "2"))


def test_dumped_settings_read_back_equal(tmp_path):
    found = finetune("--train.lr", "3e-7", "--pairwise.anchor", "2", "--data.differences", "x.jsonl")
    (tmp_path / "again.yaml").write_text(dump(found))
    assert finetune("--config", "again.yaml") == found


def test_the_method_is_known_before_its_options_are(tmp_path):
    (tmp_path / "c.yaml").write_text("method: contrastive\n")
    assert peek(["--config", "c.yaml"], "method", None, "pairwise") == "contrastive"
    assert peek(["--config", "c.yaml", "--method", "pairwise"], "method", None, "x") == "pairwise"
    assert peek([], "method", tmp_path / "c.yaml", "pairwise") == "contrastive"
    assert peek(["--config", "absent.yaml"], "method", None, "pairwise") == "pairwise"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_parses(path):
    argv = ["--config", str(path)]
    content = yaml.safe_load(path.read_text())
    if "writer" in content:
        found = configure(GenerateConfig, "generate_diffs.py", "", argv)
        assert found.writer in ("rules", "transformers", "server")
    else:
        options = {content["method"]: METHODS[content["method"]]}
        found = configure(FinetuneConfig, "finetune.py", "", argv, options=options)
        assert found.method == content["method"]
    assert found.name == content["name"]


def test_the_papers_config_holds_the_papers_numbers():
    """arXiv 2409.09721 and the authors' code."""
    found = finetune("--config", str(CONFIGS / "pc_clip_coco.yaml"))
    assert (found.model.name, found.model.pretrained) == ("ViT-L-14", "datacomp_xl_s13b_b90k")
    assert found.model.train == "text_blocks"
    train = found.train
    assert (train.optimizer, train.lr, train.schedule, train.decay) == ("adam", 1e-8, "exponential", 0.9)
    assert (train.epochs, train.batch_size, train.steps, found.seed) == (20, 512, None, 0)
    assert found.pairwise == PairwiseConfig(loss="info_nce", temperature=1.0, anchor=0.0, mirror=False)


def test_unknown_methods_and_modes_name_the_known():
    from pc_clip import evals

    with pytest.raises(UserError, match="method is 'pairwize'. Did you mean 'pairwise'"):
        methods.find("pairwize")
    with pytest.raises(
        UserError, match="Known: .*comparative, compositional, difference, .*rank, relations, retrieve, zeroshot"
    ):
        evals.find("everything")
    assert EvaluateConfig().mode == ""


def test_a_negative_seed_is_refused_by_evaluations_too():
    with pytest.raises(UserError, match="seed is -1; it must be at least 0"):
        evaluate("--seed", "-1")


def test_lists_are_written_with_commas_and_a_prompt_keeps_its_own():
    found = evaluate("--tasks", "size,count", "--probe.shots", "1,4", "--comparative.calibrate", "none",
                 "--average.alphas", "[0.5]", "--templates", "a photo of a {}, a bird")  # fmt: skip
    assert (found.tasks, found.probe.shots, found.comparative.calibrate) == (["size", "count"], [1, 4], ["none"])
    assert found.average.alphas == [0.5]
    assert found.templates == ["a photo of a {}, a bird"]
    with pytest.raises(UserError, match="shots"):
        evaluate("--probe.shots", "many")
