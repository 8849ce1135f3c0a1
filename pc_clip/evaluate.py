"""Which evaluations of which model, and where their results are kept: one JSON a (model, evaluation, data set)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image

from pc_clip import attributes, environment, evals, prompts
from pc_clip import checkpoint as checkpoints
from pc_clip.clip import Clip
from pc_clip.config import EvaluateConfig
from pc_clip.datasets import Dataset, download, open_dataset
from pc_clip.differences import UNSEEN, WORDINGS
from pc_clip.errors import UserError
from pc_clip.evals import Result, Subject
from pc_clip.evals.comparative import FOLDER as COMPARISONS
from pc_clip.files import write_json, write_text

log = logging.getLogger(__name__)

# Settings that say where and how, not what: a result does not depend on them.
_ASIDE = {
    "out", "label", "again", "batch_size", "workers", "device", "threads", "mode", "checkpoint", "model", "root",
    "download",
}  # fmt: skip


def evaluate(config: EvaluateConfig) -> list[dict[str, Any]]:
    """Run what was asked for, except what has been evaluated already; returns all results.

    Raises UserError for an unknown mode, one the data set cannot answer, and whatever model or data lack.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    wanted = [mode.strip() for mode in config.mode.split(",") if mode.strip()]
    for mode in wanted:
        evals.find(mode)
    data, checkpoint = _data(config), config.checkpoint
    clip = _model(config)
    subject = Subject(clip, (lambda: evals.base_of(clip)) if checkpoint else (lambda: clip), data, config)
    modes = wanted or [mode for mode in evals.names() if _can_be_measured(mode, subject)]
    if not modes:
        raise UserError(
            f"nothing can be measured on {data.label} with these settings; modes: {', '.join(evals.names())}"
        )
    folder = evals.results_folder(config, checkpoints.describe_checkpoint(checkpoint) if checkpoint else _label(clip))
    weights = clip.weights_hash()
    if data.note:
        log.info("%s", data.note)
    if wanted:
        return [_one(subject, mode, folder, weights) for mode in modes]
    return _all_that_can_be_measured(subject, modes, folder, weights)


def _all_that_can_be_measured(subject: Subject, modes: list[str], folder: Path, weights: str) -> list[dict[str, Any]]:
    """What cannot be measured after all and was not asked for by name is left out, and said."""
    found, failure = [], None
    for mode in modes:
        try:
            found.append(_one(subject, mode, folder, weights))
        except UserError as error:
            log.warning("%s is left out: %s", mode, error)
            failure = error
    if not found:
        raise failure
    return found


def _can_be_measured(mode: str, subject: Subject) -> bool:
    """Whether data, settings and weights allow a mode that was not asked for by name."""
    module = evals.find(mode)
    if not module.applies(subject.data, subject.config):
        return False
    if why := getattr(module, "lacks", lambda _: None)(subject):
        log.info("%s is left out: %s", mode, why)
    return not why


def example_checkpoints() -> list[str | None]:
    """What `run.py` evaluates when told nothing: the embedded model, and the example's run if it is finished."""
    run = Path("runs/example")
    if (run / checkpoints.MODEL_FILE).is_file():
        return [None, str(run)]
    log.info("no finetuned example yet (python finetune.py makes one); evaluating the embedded model alone")
    return [None]


def _data(config: EvaluateConfig) -> Dataset:
    if config.images is None:
        if config.download:
            download(config.dataset, config.root)
        return open_dataset(config.dataset, config.root, config.split, missing=config.missing)
    if not config.attribute:
        raise UserError("--images ranks a folder of images by --attribute; say which, for example 'a larger animal'")
    return open_dataset("folder", config.images)


def _model(config: EvaluateConfig) -> Clip:
    if config.checkpoint is None:
        return Clip.create(*config.model.source(config.dataset if config.images is None else ""), device=config.device)
    return checkpoints.load_model(
        config.checkpoint, config.model.name or None, config.model.pretrained, device=config.device
    )


def _one(subject: Subject, mode: str, folder: Path, weights: str) -> dict[str, Any]:
    config, data = subject.config, subject.data
    if not evals.find(mode).applies(data, config):
        raise UserError(f"mode {mode} cannot be measured on {data.label}: it needs {evals.find(mode).NEEDS}")
    key = _key(subject, mode, weights)
    path = folder / f"{mode}-{data.label.replace('/', '-')}{_suffix(config)}.json"
    known = _read(path)
    base_is_new = known and known.get("base_known") is False and subject.base is not None
    if known and known["key"] == key and not base_is_new and not config.again:
        log.info("%s %s: already in %s", folder.name, mode, path)
        return known
    log.info("%s %s on %s ...", folder.name, mode, data.label)
    found = evals.find(mode).evaluate(subject)
    result = {
        "model": folder.name, "evaluation": mode, "dataset": data.label, "about": _suffix(config).strip("-"),
        "metrics": found.metrics, "n": found.n,
        "intervals": found.intervals, "curves": [curve._asdict() for curve in found.curves],
        "pictures": [
            {"file": f"{path.stem}-{name}", "alt": picture.alt} for name, picture in found.pictures.items()
        ],
        "details": found.details, "key": key, "weights": weights, "checkpoint_of": subject.clip.describe(),
        "base_known": subject.base is not None if "base" in vars(subject) else None,
        "seed": config.seed, **environment.describe(),
    }  # fmt: skip
    _write(path, result, found)
    return result


def _key(subject: Subject, mode: str, weights: str) -> str:
    """What a result depends on: settings, images and what is known of them, model and transform, texts on the disk."""
    config, data = subject.config, subject.data
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in _ASIDE}
    for name in ("differences", "descriptions", "sugar_crepe"):  # by content, so that an edited file is evaluated again
        if settings[name]:
            path = Path(settings[name])
            files = sorted(path.glob("*.json")) if path.is_dir() else [path] if path.is_file() else []
            settings[name] = [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]
    known = (
        data.captions,
        [(q.name, q.classes, q.templates, q.several, q.target.tolist(), repr(q.graded)) for q in data.questions],
    )
    graded = [(a.name, a.more, a.less, a.high, a.low, a.gap, a.value.tolist()) for a in data.attributes]
    compared = (
        (COMPARISONS / f"{data.name}.yaml").read_bytes() if (COMPARISONS / f"{data.name}.yaml").is_file() else b""
    )
    tasks = [(attributes.FOLDER / f"{task}.yaml").read_bytes() for task in attributes.tasks_of(data.name)]
    other = getattr(evals.find(mode), "also_reads", lambda _: None)(data)
    chosen_on = open_dataset(data.name, config.root, other, missing=config.missing).fingerprint if other else None
    asked = (prompts.FOLDER / "compare.yaml").read_bytes() if config.pairs == "auto" else b""
    model = weights, subject.clip.describe(), subject.clip.image_tower_hash()
    texts = tasks, WORDINGS, UNSEEN, compared, asked
    content = repr((settings, mode, data.fingerprint, chosen_on, model, known, graded, texts))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _suffix(config: EvaluateConfig) -> str:
    """Results about different questions to one data set do not overwrite one another."""
    files = [Path(value).stem for value in (config.differences, config.descriptions) if value]
    named = [*files, *filter(None, (config.attribute, config.against)), *config.tasks]
    named += ["auto"] * (config.pairs == "auto") + ["several"] * (config.prompts == "several")
    named += ["prompts " + _digest(config.templates)] if config.templates else []
    cut = [value if len(value) <= 40 else f"{value[:40]} {_digest(value)}" for value in named]
    return "".join(f"-{''.join(c if c.isalnum() else '_' for c in value)}" for value in cut)


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:6]


def _label(clip: Clip) -> str:
    """The name of an unfinetuned model among results: two that differ in weights or folder get different ones."""
    name = "-".join(Path(clip.name.removeprefix("local-dir:")).parts[-2:])
    tag = clip.pretrained and Path(clip.pretrained).stem
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in f"{name}-{tag or 'pretrained'}")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if {"key", "metrics"} <= found.keys() else None
    except (OSError, json.JSONDecodeError, AttributeError):
        return None


def _write(path: Path, result: dict[str, Any], found: Result) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, picture in found.pictures.items():
        _save_picture(path.with_name(f"{path.stem}-{name}"), picture.image)
    if "order" in found.details:
        table = pd.DataFrame(found.details["order"])
        table.insert(0, "rank", range(1, len(table) + 1))
        write_text(path.with_suffix(".csv"), table.to_csv(index=False, float_format="%.6f"))
    write_json(path, result)


def _save_picture(path: Path, picture: Image.Image) -> None:
    picture.save(path)
    log.info("  picture: %s", path)
