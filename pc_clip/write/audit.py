"""How good are the sentences of a file? `python -m pc_clip audit llm_diffs/NAME.jsonl --captions CAPTIONS`.

Prints figures and some sentences to read, and writes NAME.audit.json and .png beside the file. Nothing is
judged by a model: every figure is a count of words, and its definition stands in the function that makes it.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pc_clip.core import environment
from pc_clip.core.errors import UserError, check_at_least
from pc_clip.core.files import write_json
from pc_clip.core.random import stream
from pc_clip.data.captions import read_captions
from pc_clip.data.differences import read
from pc_clip.data.download import file_digest
from pc_clip.data.registry import open_dataset
from pc_clip.data.wordings import role_mentions, swap_roles
from pc_clip.models.clip import open_clip
from pc_clip.write.cleaning import MIN_CHARACTERS, Given, check, copies
from pc_clip.write.words import content_words, content_words_by_image, split_by_image

CONTEXT = 77  # tokens that CLIP's text tower reads, the start and the end among them

Figures = dict[str, float | None]


class Audit(NamedTuple):
    """figures: shares from 0 to 1 unless they are called otherwise; None where not applicable.

    counts: sentences by reason, of the writer's file where there is one, else by the rules of today. each: a row a
    sentence, with characters, tokens and novel, the share of its content words that no caption has; nan without
    captions. captions: by image id.
    """

    path: Path
    figures: Figures
    counts: dict[str, int]
    each: pd.DataFrame
    captions: dict[str, tuple[str, ...]]


def audit(path: Path, captions: Path | None = None) -> Audit:
    """Read a file of differences and count.

    captions: a COCO JSON or SimCLIP TSV; the file the writer's settings name when it is there. Raises UserError for
    a file that is absent, empty or cut, and for captions of other images.

    tokens: of CLIP's, with start and end, before any cut. repeated: share of the sentences that occur before, word for
    word; repeated_nearly: but for capitals and punctuation.
    """
    each = pd.DataFrame(read(path), columns=["first", "second", "text"])
    meta = _meta(path)
    known = _captions(captions, meta, each)
    tokenizer = open_clip.SimpleTokenizer()
    each["characters"] = each.text.str.len()
    each["tokens"] = [len(tokenizer.encode(text)) + 2 for text in each.text]
    plain = each.text.map(lambda text: " ".join(re.findall(r"\w+", text.lower())))
    figures: Figures = {
        "sentences": len(each),
        "images": len({*each["first"], *each["second"]}),
        "characters_mean": float(each.characters.mean()),
        "tokens_mean": float(each.tokens.mean()),
        "tokens_max": int(each.tokens.max()),
        "over_77_tokens": float((each.tokens > CONTEXT).mean()),
        "distinct_words": len(set(" ".join(plain).split())),
        "repeated": float(each.text.duplicated().mean()),
        "repeated_nearly": float(plain.duplicated().mean()),
        **_rules(each, known, meta),
        **_grounding(each, known),
        **_symmetry(each),
    }
    counts = meta.get("counts") or each.reason.value_counts().to_dict()
    return Audit(Path(path), figures, counts, each, known)


# -- what is read --------------------------------------------------------------------------------------


def _meta(path: Path) -> dict[str, Any]:
    """NAME.meta.json, or nothing where a file came without one."""
    beside = Path(path).with_suffix(".meta.json")
    try:
        meta = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        sum(meta.get("counts", {}).values())
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{beside} is not what a writer leaves ({error}); fix or delete it") from error
    return meta


def _captions(path: Path | None, meta: dict[str, Any], each: pd.DataFrame) -> dict[str, tuple[str, ...]]:
    """Captions by image id; none where no file is given and that of the writer is not there as it was."""
    settings = meta.get("settings") or {}
    own = Path(settings.get("captions") or "")
    if path is None and own.is_file() and file_digest(own, "sha256") == settings.get("captions_sha256"):
        path = own
    if (
        path is None
        and settings.get("dataset") == "example"
        and not (settings.get("captions") or "classes" in settings)
    ):
        data = open_dataset("example", split=settings.get("split") or "train")
        return dict(zip(data.ids, data.captions))
    if path is None:
        return {}
    captions = {key: texts for key, (_, texts) in read_captions(path).items()}
    if not (each["first"].isin(list(captions)) & each["second"].isin(list(captions))).any():
        raise UserError(
            f"{path} has captions of other images ({', '.join(list(captions)[:3])}, ...): it knows both images of none "
            f"of the {len(each)} pairs, the first being {each['first'][0]} and {each['second'][0]}. Give --captions "
            "the file that the sentences were written from."
        )
    return captions


# -- what is counted -----------------------------------------------------------------------------------


def _rules(each: pd.DataFrame, captions: dict[str, tuple[str, ...]], meta: dict[str, Any]) -> Figures:
    """Apply the rules of cleaning.py to the sentences; each["reason"] by sentence.

    names_both: share that names both images. copies_example: a worked example of the prompt, None where none was shown.
    rejected_now: by the rules of today.
    """
    shortest = (meta.get("settings") or {}).get("min_characters", MIN_CHARACTERS)
    given = Given.of(shortest, meta.get("writer") or {})
    shown = [(*captions.get(row.first, ()), *captions.get(row.second, ())) for row in each.itertuples()]
    each["reason"] = [check(text, given._replace(captions=known)).reason for text, known in zip(each.text, shown)]
    by_image = [split_by_image(text) for text in each.text]
    copied = [copies(text, given.examples, known) for text, known in zip(each.text, shown)]
    return {
        "names_both": float(np.mean([_names_both(text) for text in each.text])),
        "same_of_both": float(np.mean([bool(first) and first == second for first, second in by_image])),
        "copies_example": float(np.mean(copied)) if given.examples else None,
        "rejected_now": float((~each.reason.isin(["kept", "trimmed"])).mean()),
    }


def _grounding(each: pd.DataFrame, captions: dict[str, tuple[str, ...]]) -> Figures:
    """Whether the words come from the captions, of sentences whose images both have some; all captions count.

    novel_words: of all content words, the share that occurs in no caption of either image; each["novel"] by sentence.
    wrong_image_words: of the words said of an image that its captions or the other's have, the share that only the
    other's have. Words are compared without their endings.
    """
    words = {key: frozenset(word for text in texts for word in content_words(text)) for key, texts in captions.items()}
    shares, novel, wrong = [], [], []  # novel, wrong: of each word that counts, whether it is
    for row in each.itertuples():
        if row.first not in words or row.second not in words:
            shares.append(np.nan)
            continue
        of_images = words[row.first], words[row.second]
        new = [word not in of_images[0] | of_images[1] for word in content_words(row.text)]
        shares.append(sum(new) / max(1, len(new)))
        novel += new
        for words_of, own, other in zip(split_by_image(row.text), of_images, of_images[::-1]):
            wrong += [word not in own for word in words_of if word in own | other]
    each["novel"] = shares
    return {"novel_words": _mean(novel), "wrong_image_words": _mean(wrong)}


def _symmetry(each: pd.DataFrame) -> Figures:
    """Do d(i, j) and d(j, i) say the same? Of pairs that were written about in both orders.

    both_orders: how many. agreement: the words the two say of the same image, in common / in all (Jaccard), mean over
    the two images. The second sentence is brought into the order of the first with swap_roles; pairs where one of the
    two does not name both images are left out. crossed: share of pairs where what one says of i has more in common with
    what the other says of j.
    """
    text = {(row.first, row.second): row.text for row in each.itertuples()}
    pairs = [(text[i, j], swap_roles(text[j, i])) for i, j in text if i < j and (j, i) in text]
    straight, crossed = [], []
    for one, other in pairs:
        if other is None or not (_names_both(one) and _names_both(other)):
            continue
        a, b = (content_words_by_image(sentence) for sentence in (one, other))
        if any(a) or any(b):
            straight.append(_in_common(a, b))
            crossed.append(_in_common(a, b[::-1]) > straight[-1])
    return {"both_orders": len(pairs), "agreement": _mean(straight), "crossed": _mean(crossed)}


def _names_both(text: str) -> bool:
    return swap_roles(text) is not None and {side for _, _, side in role_mentions(text)} == {0, 1}


def _in_common(a: Sequence[set[str]], b: Sequence[set[str]]) -> float:
    return float(np.mean([len(x & y) / len(x | y) for x, y in zip(a, b) if x or y]))


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


# -- what is shown -------------------------------------------------------------------------------------


def table(audited: Audit) -> pd.DataFrame:
    """A row a figure, then a row a reason: (what, how much)."""
    rows = [(name, "-" if value is None else f"{value:.4g}") for name, value in audited.figures.items()]
    rows += [(f"reason: {name}", str(n)) for name, n in sorted(audited.counts.items(), key=lambda item: -item[1])]
    return pd.DataFrame(rows, columns=["what", "how much"])


def sample(audited: Audit, n: int, seed: int) -> list[dict[str, Any]]:
    """Some sentences to read, drawn by seed, with a caption of each image."""
    each, captions = audited.each, audited.captions
    rows = sorted(stream(seed, "sample").choice(len(each), min(n, len(each)), replace=False).tolist())
    drawn = each.loc[rows, ["first", "second", "text"]].assign(line=[row + 1 for row in rows]).to_dict("records")
    return [
        row | {"captions": [captions[k][0] for k in (row["first"], row["second"]) if k in captions]} for row in drawn
    ]


def write(audited: Audit, out: Path, drawn: list[dict[str, Any]]) -> list[Path]:
    """NAME.audit.json, and NAME.audit.png: histograms of lengths and of the share of words that no caption has.

    drawn: the sample.
    """
    out.mkdir(parents=True, exist_ok=True)
    data, picture = (out / f"{audited.path.stem}.audit.{ending}" for ending in ("json", "png"))
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, 3), ("characters", "tokens", "novel")):
        axes.hist(audited.each[name].dropna(), 40)
        axes.set(xlabel=name, ylabel="sentences")
    figure.savefig(picture, dpi=120)
    content = {"file": audited.path.name, "sha256": file_digest(audited.path, "sha256"), "figures": audited.figures}
    write_json(data, content | {"counts": audited.counts, "sample": drawn} | environment.describe())
    return [data, picture]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pc_clip audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="sentences, as generate_diffs.py writes them")
    parser.add_argument(
        "--captions", type=Path, metavar="FILE", help="a COCO JSON or TSV; the writer's, if still there"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the audit is written; beside FILE")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (%(default)s)")
    parser.add_argument("--sample", type=int, default=20, help="sentences to read (%(default)s)")
    arguments = parser.parse_args(argv)
    check_at_least("--sample", arguments.sample, 0)
    audited = audit(arguments.file, arguments.captions)
    drawn = sample(audited, arguments.sample, arguments.seed)
    print(table(audited).to_string(index=False, header=False))
    print("".join(f"\n{row['line']:>7}  {row['text']}" for row in drawn) + "\n")
    print("\n".join(map(str, write(audited, arguments.out or arguments.file.parent, drawn))))
