"""Settings: YAML and flags, strict, with the nearest name where one is wrong; every config of the project."""

from pathlib import Path

import pytest
import yaml

from pc_clip import evals
from pc_clip.core.cli import configure, dump, given
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


def test_flags_override_the_file_and_types_are_kept():
    Path("c.yaml").write_text("train:\n  lr: 1.0e-8\n  steps: 5\npairwise:\n  mirror: true\n")
    config = finetune("--train.lr", "1e-3", "--model.pretrained", "openai", "--config", "c.yaml", "--train.steps=null")
    assert (config.train.lr, config.train.steps, config.model.pretrained) == (1e-3, None, "openai")
    assert config.pairwise == PairwiseConfig(mirror=True)
    assert finetune("--name", "5").name == "5"


def test_the_default_file_is_read_only_when_none_is_named():
    Path("default.yaml").write_text("seed: 7\nname: d\n")
    Path("other.yaml").write_text("name: o\nmethod: contrastive\n")
    assert finetune(default=Path("default.yaml")).seed == 7
    config = finetune("--config", "other.yaml", default=Path("default.yaml"))
    assert (config.seed, config.name) == (0, "o")
    assert given(["--config", "other.yaml"])["method"] == "contrastive"
    assert given(["--config", "other.yaml", "--method", "pairwise"])["method"] == "pairwise"


MIX = '[{"dataset": "mnist"%s}]'
WRONG = [  # a command line, or the content of a file; what the message says
    ("--train.lrr 1", r"no setting train\.lrr.*'train\.lr'"),
    ("--trian.lr=1", r"no setting trian\.lr\..*'train\.lr'"),
    ("--pairwise.miror true", r"no setting pairwise\.miror.*'pairwise\.mirror'"),
    ("--train.step 3", r"no setting train\.step\. Did you mean 'train\.steps'"),  # and no abbreviation
    ("zeroshot", "no setting zeroshot"),
    ("--train.lr fast", r'"train\.lr".*float.*fast'),
    ("--train.lr", r'"train\.lr".*float.*True'),
    ("--resume perhaps", r'"resume".*perhaps'),
    ("--config absent.yaml", r"no config at absent\.yaml; in configs.*example\.yaml"),
    ("--seed -1", "seed is -1; it must be at least 0"),
    ("--device gpu", "device is 'gpu'"),
    ("--data.mix mnist", r'"data\.mix".*list.*mnist'),
    ("--data.mix " + (MIX % "").replace(" ", ""), r'"data\.mix".*required: n'),
    ("--data.mix " + (MIX % ',"n":"x"').replace(" ", ""), r'"data\.mix".*"n": Expected a int'),
    ("train:\n  learning_rate: 1\n", r"no setting train\.learning_rate"),
    ("tain:\n  lr: 1\n", r"no setting tain\.lr\. Did you mean .*train\.lr"),
    ("train: [", "is not YAML"),
    ("train: 3\n", "no setting train"),
    ("train:\n  epochs: many\n", r'"train\.epochs".*many'),
    ("data:\n  mix:\n  - {dataset: mnist, m: 5}\n", r'"data\.mix".*\'m\' is not accepted'),
    ("- 1\n", "holds no settings"),
]


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_a_wrong_setting_is_one_line_that_names_it_and_the_nearest(words, message):
    if "\n" in words or "[" in words[:9]:
        Path("c.yaml").write_text(words)
        words = "--config c.yaml"
    with pytest.raises(UserError, match=message) as error:
        finetune(*words.split(" "))
    assert "\n" not in str(error.value)


def test_evaluation_refuses_training_settings_and_checks_its_own():
    for flag, message in (
        ("--model.start", r"no setting model\.start"),
        ("--model.lora_rank", r"no setting model\.lora_rank"),
        ("--beams", r"no setting beams\. Did you mean .*'caption\.beams'"),
        ("--probe.shots", r'"probe\.shots"'),
        ("--seed", "seed is -1; it must be at least 0"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(flag, "-1" if flag == "--seed" else "many")


def test_a_switch_alone_means_true():
    assert finetune("--resume").resume
    config = finetune("--pairwise.mirror", "--overwrite", "--seed", "3")
    assert (config.pairwise.mirror, config.overwrite, config.seed, config.resume) == (True, True, 3, False)
    assert not finetune("--resume", "false").resume


def test_lists_are_written_with_commas_and_a_prompt_keeps_its_own():
    config = evaluate("--tasks", "size,count", "--probe.shots", "1,4", "--comparative.calibrate", "none",
                 "--average.alphas", "[0.5]", "--templates", "a photo of a {}, a bird")  # fmt: skip
    assert (config.tasks, config.probe.shots, config.comparative.calibrate) == (["size", "count"], [1, 4], ["none"])
    assert config.average.alphas == [0.5]
    assert config.templates == ["a photo of a {}, a bird"]


def test_identity_leaves_out_how_work_is_done():
    a, b = finetune("--train.lr", "0.1"), finetune("--train.lr", "0.1", "--train.threads", "3", "--data.workers", "2")
    assert identity(a) == identity(b)
    assert identity(a) != identity(finetune("--train.lr", "0.1", "--retain.texts", "2"))


def test_dumped_settings_read_back_equal():
    config = finetune("--train.lr", "3e-7", "--retain.texts", "2", "--data.differences", "x.jsonl")
    Path("again.yaml").write_text(dump(config))
    assert finetune("--config", "again.yaml") == config


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_parses(path):
    argv = ["--config", str(path)]
    content = yaml.safe_load(path.read_text())
    if "writer" in content:
        config = configure(GenerateConfig, "generate_diffs.py", "", argv)
        assert config.writer in ("rules", "transformers", "server")
    else:
        options = {content["method"]: METHODS[content["method"]]}
        config = configure(FinetuneConfig, "finetune.py", "", argv, options=options)
        assert config.method == content["method"]
    assert config.name == content["name"]


def test_the_papers_config_holds_the_papers_numbers():
    """arXiv 2409.09721 and the authors' code."""
    config = finetune("--config", str(CONFIGS / "pc_clip_coco.yaml"))
    assert (config.model.name, config.model.pretrained) == ("ViT-L-14", "datacomp_xl_s13b_b90k")
    assert config.model.train == "text_blocks"
    train = config.train
    assert (train.optimizer, train.lr, train.schedule, train.decay) == ("adam", 1e-8, "exponential", 0.9)
    assert (train.epochs, train.batch_size, train.steps, config.seed) == (20, 512, None, 0)
    assert config.pairwise == PairwiseConfig(loss="info_nce", temperature=1.0, mirror=False)
    assert not config.retain.weights


def test_unknown_methods_modes_and_devices_are_named():
    with pytest.raises(UserError, match="method is 'pairwize'. Did you mean 'pairwise'"):
        methods.find("pairwize")
    with pytest.raises(UserError, match="Known: .*comparative, .*difference, .*retrieve, .*wordings, zeroshot"):
        evals.find("everything")
    with pytest.raises(UserError, match="torch finds no GPU"):
        resolve_device("cuda")
