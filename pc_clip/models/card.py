"""A model card for an exported folder, with the figures that were measured of these very weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from pc_clip.core.files import write_text
from pc_clip.models.clip import Clip

CARD_FILE, BASE_CARD_FILE = "README.md", "BASE_README.md"
SHOWN = {  # evaluation -> what is shown of it, figures before the baselines that could embarrass them
    "zeroshot": ("zeroshot",),
    "difference": ("difference", "sign", "two_way", "reversed", "difference_r1", "caption_subtraction"),
    "wordings": ("unseen", "unseen_worst", "unseen_names", "unseen_r1", "subtraction", "caption_subtraction_r1"),
    "rank": ("rank", "rank_reversed", "rank_by_subtraction"),
    "retrieve": ("t2i_r1", "i2t_r1"),
    "relations": ("accuracy", "blind", "text_only", "majority"),
    "compositional": ("sugarcrepe", "sugarcrepe_blind_mean", "sugarcrepe_text_only", "valse", "valse_text_only"),
}
TEXT = """
# {name}

{base} finetuned with [pc_clip](https://arxiv.org/abs/2409.09721), so that a sentence on how one image differs from
another points along the difference of the two images' embeddings.

## Use

    # pc_clip
    import pc_clip
    model = pc_clip.load("FOLDER")
    model.rank("photos/", "The first image shows a larger animal, the second a smaller one.")

    # open_clip
    model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
    tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")
{transformers}
## Figures

{figures}

Per cent. What ends in `subtraction`, `blind`, `text_only` or `majority` needs none of this training, or no image:
hold the figures against it. They were measured by `run.py`; each is one JSON with its seed, versions and interval.

## Limits

Sentences of other kinds than it was trained on are understood in part; `unseen` and its worst case say how far. It
is neither safer nor fairer than its base model. The licence of the base model's weights holds for these too.
"""
TRANSFORMERS = """
    # transformers
    model = CLIPModel.from_pretrained("FOLDER")
    processor = CLIPProcessor.from_pretrained("FOLDER", backend="pil")
"""


def write_card(folder: Path, clip: Clip, name: str, base: str, results: Path, in_transformers: bool) -> None:
    """Write the card of a model called `name`, made from `base`. Results of other weights are left out.

    A README that the base model brought stays beside it as BASE_README.md.
    """
    measured = [result for result in _read(results) if result["weights"] == clip.weights_hash()]
    rows = [(result, metric) for result in measured for metric in SHOWN.get(result["evaluation"], ())]
    rows = [(result, metric) for result, metric in rows if metric in result["metrics"]]
    data = ModelCardData(
        library_name="open_clip",
        tags=["clip", "pc_clip"],
        pipeline_tag="zero-shot-image-classification",
        model_name=name,
        eval_results=[_eval_result(*row) for row in rows] or None,
    )
    lines = ["| evaluation | data | figure | |", "|---|---|---|---|"]
    lines += [f"| {r['evaluation']} | {r['dataset']} | {metric} | {_shown(r, metric)} |" for r, metric in rows]
    text = TEXT.format(
        name=name,
        base=base,
        transformers=TRANSFORMERS if in_transformers else "",
        figures="\n".join(lines) if rows else "None were measured of these weights; `run.py --checkpoint` does.",
    )
    card = folder / CARD_FILE
    if card.exists():
        card.rename(folder / BASE_CARD_FILE)
    write_text(card, str(ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")))


def _read(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.rglob("*.json")) if folder.is_dir() else []
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return [content for content in contents if isinstance(content, dict) and {"metrics", "weights"} <= content.keys()]


def _shown(result: dict[str, Any], metric: str) -> str:
    low, high = result["intervals"].get(metric) or (None, None)
    between = f" [{100 * low:.1f}, {100 * high:.1f}]" if low is not None else ""
    return f"{100 * result['metrics'][metric]:.1f}{between}"


def _eval_result(result: dict[str, Any], metric: str) -> EvalResult:
    return EvalResult(
        task_type="zero-shot-image-classification",
        dataset_type=result["dataset"].partition("/")[0],
        dataset_name=result["dataset"],
        metric_type=metric,
        metric_value=round(100 * result["metrics"][metric], 2),
        metric_name=f"{result['evaluation']}: {metric}",
    )
