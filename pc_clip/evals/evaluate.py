"""Run evaluations of a model and keep their results: one JSON a (model, evaluation, data set)."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from pc_clip import evals
from pc_clip.core import environment
from pc_clip.core.config.evaluate import EVALUATIONS, EvaluateConfig
from pc_clip.core.config.settings import identity
from pc_clip.core.environment import resolve_device
from pc_clip.core.errors import UserError, check_at_least
from pc_clip.core.files import write_json, write_text
from pc_clip.core.paths import checkpoint_file
from pc_clip.data import attributes
from pc_clip.data.dataset import Dataset
from pc_clip.data.registry import download, open_dataset
from pc_clip.data.statements import label_of
from pc_clip.data.wordings import FAMILIES, SCHEMES
from pc_clip.evals import COMPARISONS, EvalContext
from pc_clip.models.clip import Clip
from pc_clip.models.loading import create_model, describe_checkpoint, load_model
from pc_clip.write import prompts

log = logging.getLogger(__name__)


def evaluate(config: EvaluateConfig) -> list[dict[str, Any]]:
    """Run what was asked for, except what has been evaluated already; returns all results.

    Raises UserError for an unknown mode, one the data set cannot answer, and whatever model or data lack.
    """
    check_at_least("threads", config.threads, 0)
    if config.threads:
        torch.set_num_threads(config.threads)
    data = _open_data(config)
    return measure(_open_model(config), data, config)


def measure(clip: Clip, data: Dataset, config: EvaluateConfig) -> list[dict[str, Any]]:
    """The same for a model in memory, whose weights have to stay as they are, and an open data set."""
    _check_finite(clip)
    clip = clip.remembering()

    @functools.cache
    def find_base() -> Clip | None:
        base = evals.base_of(clip)
        return base and base.remembering()

    context = EvalContext(clip, find_base if config.checkpoint else (lambda: clip), data, config)
    if data.note:
        log.info("%s", data.note)
    _ = context.statements  # a file that cannot be read is an error at once, whatever is measured
    requested = [mode.strip() for mode in config.mode.split(",") if mode.strip()]
    return [_run(context, mode) for mode in requested] or _run_available(context)


def _check_finite(clip: Clip) -> None:
    weights = clip.model.state_dict() | clip.extra_weights()
    for name, value in weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(
                f"the weights of {clip.describe()} have diverged: {name} holds numbers that are not finite. Train "
                "again with a smaller train.lr."
            )


def _run_available(context: EvalContext) -> list[dict[str, Any]]:
    """All evaluations that data and settings allow; those that the weights do not allow are left out, and said."""
    data, config = context.data, context.config
    results, failure = [], None
    for mode in sorted(EVALUATIONS):
        module = evals.find(mode)
        if getattr(module, "BY_NAME_ALONE", False) or module.applies(data, config) is not None:
            continue
        try:
            results.append(_run(context, mode))
        except UserError as error:
            log.warning("%s is left out: %s", mode, error)
            failure = error
    if not results:
        known = ", ".join(sorted(EVALUATIONS))
        raise failure or UserError(f"nothing can be measured on {data.label} with these settings; modes: {known}")
    return results


def _open_data(config: EvaluateConfig) -> Dataset:
    if config.images is None:
        if config.download:
            download(config.dataset, config.root)
        return open_dataset(config.dataset, config.root, config.split, missing=config.missing, upright=config.upright)
    if not config.rank.attribute:
        raise UserError("--images ranks a folder of images by --rank.attribute; say which, as in 'a larger animal'")
    return open_dataset("folder", config.images, upright=config.upright)


def _open_model(config: EvaluateConfig) -> Clip:
    device = resolve_device(config.device)
    if config.checkpoint is None:
        return create_model(*config.model.source(config.dataset if config.images is None else ""), device=device)
    model = config.model
    return load_model(config.checkpoint, model.name or None, model.pretrained, device=device, tag=model.tag)


def _run(context: EvalContext, mode: str) -> dict[str, Any]:
    """One evaluation's result: read where it is known already, else computed and written."""
    config, data, module = context.config, context.data, evals.find(mode)
    if lacking := module.applies(data, config):
        raise UserError(f"mode {mode} cannot be measured on {data.label}: it needs {lacking}")
    key, about, weights = _key(context, mode), _about(config, mode), context.clip.weights_hash()
    source = str(checkpoint_file(config.checkpoint)) if config.checkpoint else context.clip.describe()
    model = config.label or (describe_checkpoint(config.checkpoint) if config.checkpoint else _label(context.clip))
    path = Path(config.out) / model / f"{mode}-{data.label.replace('/', '-')}{about and f'-{about}'}.json"
    known = _read(path)
    if known and known["weights"] != weights and os.path.abspath(known["checkpoint"]) != os.path.abspath(source):
        other, model, path = path, f"{model}-{weights[:6]}", path.with_name(f"{path.stem}-{weights[:6]}.json")
        log.info("%s is a result of %s, whose weights differ; this one is kept in %s", other, known["checkpoint"], path)
        known = _read(path)
    base_is_new = known and known.get("base_known") is False and context.base is not None
    if known and known["key"] == key and not base_is_new and not config.again:
        log.info("%s %s: already in %s", model, mode, path)
        return known
    log.info("%s %s on %s ...", model, mode, data.label)
    result = module.evaluate(context)
    record = {
        "model": model, "evaluation": mode, "dataset": data.label, "about": about,
        "metrics": result.metrics, "n": result.n,
        "intervals": {name: list(ends) for name, ends in result.intervals.items()},  # as they are read again
        "items": result.items, "curves": [curve._asdict() for curve in result.curves],
        "pictures": [
            {"file": f"{path.stem}-{name}", "alt": picture.alt} for name, picture in result.pictures.items()
        ],
        "details": result.details, "key": key, "images": data.fingerprint, "weights": weights, "checkpoint": source,
        "checkpoint_of": context.clip.describe(),
        "base_known": context.base is not None if "base" in vars(context) else None,
        "seed": config.seed, **environment.describe(),
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, picture in result.pictures.items():
        picture.image.save(path.with_name(f"{path.stem}-{name}"))
        log.info("  picture: %s", path.with_name(f"{path.stem}-{name}"))
    if "order" in result.details:
        table = pd.DataFrame(result.details["order"])
        write_text(path.with_suffix(".csv"), table.to_csv(index=False, float_format="%.6f"))
    write_json(path, record)
    return record


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if {"key", "metrics", "weights", "checkpoint"} <= record.keys() else None
    except (OSError, json.JSONDecodeError, AttributeError):
        return None


# -- names and keys of results -------------------------------------------------------------------------


def _key(context: EvalContext, mode: str) -> str:
    """A hash of all that a result depends on: settings, images and their annotations, model, texts on the disk."""
    config, data, clip, module = context.config, context.data, context.clip, evals.find(mode)
    options = identity(getattr(config, mode)) if hasattr(config, mode) else {}
    if mode == "average":  # which measures differences
        options |= {"difference": identity(config.difference)}
    other = module.also_reads(context) if hasattr(module, "also_reads") else None
    files = [COMPARISONS / f"{data.name}.yaml", prompts.FOLDER / "compare.yaml"]
    files += [attributes.FOLDER / f"{task}.yaml" for task in attributes.tasks_of(data.name)]
    files += [Path(options[name]) for name in ("sentences", "descriptions") if options.get(name)]
    questions = [(q.name, q.classes, q.templates, q.several, q.target.tolist(), repr(q.graded)) for q in data.questions]
    graded = [(a.name, a.more, a.less, a.high, a.low, a.gap, a.value.tolist()) for a in data.attributes]
    content = (
        mode, getattr(module, "VERSION", 1), identity(config), options, context.statements, data.fingerprint,
        other and other.fingerprint, data.captions, questions, graded, clip.weights_hash(), clip.describe(),
        FAMILIES, SCHEMES,
        [path.read_bytes() for path in files if path.is_file()],  # by content: after an edit it is evaluated again
    )  # fmt: skip
    return _digest(content, 16)


def _about(config: EvaluateConfig, mode: str) -> str:
    """The settings that are not as usual, for a result's file name."""
    usual, options = EvaluateConfig(), getattr(config, mode, None)
    words = list(config.tasks)
    words += ["prompts several"] * (config.prompts == "several")
    words += [name for name in ("unconfirmed", "upright") if getattr(config, name)]
    words += ["prompts " + _digest(config.templates)] if config.templates else []
    words += ["+".join(map(_file_and_folder, config.statements))] if config.statements else []
    for name, value in vars(options).items() if options else ():
        default = getattr(getattr(usual, mode), name)
        if value != default and not dataclasses.is_dataclass(value):
            text = Path(value).stem if name in ("sentences", "descriptions") else value
            plain = " ".join(map(str, value)) if isinstance(value, list) else value
            words.append(text if isinstance(default, str | None) else f"{name} {plain}")
    cut = [word if len(word) <= 40 else f"{word[:40]} {_digest(word)}" for word in words]
    return "-".join("".join(c if c.isalnum() else "_" for c in word) for word in cut)


def _file_and_folder(statements: str) -> str:
    """A file of statements with the folder it is in: VSR has several of the name test.jsonl."""
    folder = "" if Path(statements).is_dir() else f"{Path(statements).resolve().parent.name} "
    return folder + label_of([statements])


def _digest(value: Any, length: int = 6) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:length]


def _label(clip: Clip) -> str:
    """The folder of an unfinetuned model's results: two that differ in weights or folder get different ones."""
    name = "-".join(Path(clip.name.removeprefix("local-dir:")).parts[-2:])
    tag = clip.pretrained and Path(clip.pretrained).stem
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in f"{name}-{tag or 'pretrained'}")
