"""How good are the sentences of a file? `python -m pc_clip audit llm_diffs/NAME.jsonl --captions CAPTIONS`.

Prints a table and some sentences to read, and writes NAME.audit.md, .json and .png beside the file. Nothing is
judged by a model: every figure is a count of words, and its definition stands in the function that makes it.
"""

from __future__ import annotations

import argparse
import hashlib
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
from pc_clip.core.files import write_json, write_text
from pc_clip.core.random import stream
from pc_clip.data.captions import read_captions
from pc_clip.data.differences import read
from pc_clip.data.registry import open_dataset
from pc_clip.data.wordings import swap_roles
from pc_clip.models.clip import open_clip
from pc_clip.write import prompts
from pc_clip.write.cleaning import MIN_CHARACTERS, Given, check, copies
from pc_clip.write.words import content_words, said_of, said_words

CONTEXT = 77  # tokens that CLIP's text tower reads, the start and the end among them
UNLIKE = 0.2  # two sentences that share fewer of their words than this are about different things
BLOCK = 1000  # words in a row whose variety is measured, so that files of different sizes can be compared

TABLE = {  # figure: what it is called, how it is written
    "sentences": ("sentences", "{:,.0f}"),
    "images": ("images", "{:,.0f}"),
    "characters_mean": ("characters, mean", "{:.1f}"),
    "tokens_mean": ("CLIP tokens, mean", "{:.1f}"),
    "tokens_max": ("CLIP tokens, most", "{:,.0f}"),
    "over_77": ("longer than 77 tokens", "{:.1%}"),
    "repeated": ("occur before, word for word", "{:.1%}"),
    "repeated_nearly": ("occur before, but for capitals and punctuation", "{:.1%}"),
    "names_both": ("name both images", "{:.1%}"),
    "same_of_both": ("say the same of both images", "{:.1%}"),
    "copies_example": ("copy a worked example of the prompt", "{:.1%}"),
    "rejected_now": ("would be rejected by the rules of today", "{:.1%}"),
    "novel_words": ("content words that no caption of the two images has", "{:.1%}"),
    "wrong_image_words": ("words of the captions that are said of the wrong image", "{:.1%}"),
    "distinct_words": ("distinct words", "{:,.0f}"),
    "type_token_ratio": ("distinct words / words", "{:.4f}"),
    "type_token_ratio_1000": ("the same, of 1,000 words in a row", "{:.4f}"),
    "both_orders": ("pairs written about in both orders", "{:,.0f}"),
    "agreement": ("what both orders say of an image: words in common", "{:.4f}"),
    "unlike": ("pairs with fewer than 0.2 in common", "{:.1%}"),
    "crossed": ("pairs that contradict: more in common when exchanged", "{:.1%}"),
}
WHY_NOT = {  # why a figure may be absent, unless it is not applicable
    "copies_example": "no examples in the prompt",
    "novel_words": "needs --captions",
    "wrong_image_words": "needs --captions",
}


class Audit(NamedTuple):
    """figures: by the names of TABLE, None where not applicable. counts: sentences by reason, of the writer's file
    when `counted` is "meta", else by the rules of today. each: a row a sentence, with characters, tokens and novel, the
    share of its content words that no caption has; nan without captions. captions: the first of each image.
    """

    path: Path
    figures: dict[str, float | None]
    counts: dict[str, int]
    counted: str
    each: pd.DataFrame
    captions: dict[str, tuple[str, ...]]


def audit(path: Path, captions: Path | None = None) -> Audit:
    """Read a file of differences and count.

    captions: a COCO JSON or SimCLIP TSV; the file the writer's settings name when it is there. Raises UserError for
    a file that is absent, empty or cut, and for captions of other images.
    """
    each = pd.DataFrame(read(path), columns=["first", "second", "text"])
    meta = _meta(path)
    told, given = _captions(captions, meta, each), _prompt(meta)
    tokenizer = open_clip.SimpleTokenizer()
    each["characters"] = each.text.str.len()
    each["tokens"] = [len(tokenizer.encode(text)) + 2 for text in each.text]  # with start and end, before any cut
    plain = each.text.map(lambda text: " ".join(re.findall(r"\w+", text.lower())))
    figures: dict[str, float | None] = {
        "sentences": len(each),
        "images": len({*each["first"], *each["second"]}),
        "characters_mean": float(each.characters.mean()),
        "tokens_mean": float(each.tokens.mean()),
        "tokens_max": int(each.tokens.max()),
        "over_77": float((each.tokens > CONTEXT).mean()),
        "repeated": float(each.text.duplicated().mean()),
        "repeated_nearly": float(plain.duplicated().mean()),
        **_rules(each, told, given),
        **_grounding(each, told),
        **_variety(plain),
        **_symmetry(each),
    }
    today = each.reason.value_counts().to_dict()
    return Audit(
        Path(path), figures, meta.get("counts") or today, "meta" if meta.get("counts") else "rules", each, told
    )


# -- what is read --------------------------------------------------------------------------------------


def _meta(path: Path) -> dict[str, Any]:
    """NAME.meta.json, or nothing where a file came without one."""
    beside = Path(path).with_suffix(".meta.json")
    if not beside.is_file():
        return {}
    try:
        found = json.loads(beside.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{beside} is not JSON ({error}); it may have been cut short: mend or delete it") from error
    counts = found.get("counts", {}) if isinstance(found, dict) else None
    if not isinstance(counts, dict) or not all(isinstance(n, int) for n in counts.values()):
        raise UserError(f"{beside} does not say how many sentences were kept and rejected; mend or delete it")
    return found


def _captions(path: Path | None, meta: dict[str, Any], each: pd.DataFrame) -> dict[str, tuple[str, ...]]:
    """Captions by image id; none where no file is given and that of the writer is not there as it was."""
    settings = meta.get("settings") or {}
    if path is None and settings.get("captions") and Path(settings["captions"]).is_file():
        own = Path(settings["captions"])
        if hashlib.sha256(own.read_bytes()).hexdigest() == settings.get("captions_sha256"):
            path = own
    if path is None and settings and "classes" not in settings and not settings.get("captions"):
        data = open_dataset("example", split=settings.get("split") or "train")
        return dict(zip(data.ids, data.captions))
    if path is None:
        return {}
    told = {key: texts for key, (_, texts) in read_captions(path).items()}
    if not (each["first"].isin(list(told)) & each["second"].isin(list(told))).any():
        raise UserError(
            f"{path} has captions of other images ({', '.join(list(told)[:3])}, ...): it knows both images of none of "
            f"the {len(each)} pairs, the first being {each['first'][0]} and {each['second'][0]}. Give --captions the "
            "file that the sentences were written from."
        )
    return told


def _prompt(meta: dict[str, Any]) -> Given:
    """What the writer was asked, and shown: as its file says or, of a model that does not, as it is asked here."""
    settings, writer = meta.get("settings") or {}, meta.get("writer") or {}
    shortest = settings.get("min_characters", MIN_CHARACTERS)
    if writer.get("writer", writer.get("name")) == "rules":
        return Given(shortest)
    task = settings.get("task", "pairs")
    default = prompts.FOLDER / f"{task}.yaml"
    asked = prompts.read(default if default.is_file() else prompts.FOLDER / "pairs.yaml")
    worked = writer.get("worked_examples", asked.examples)
    return Given(
        shortest,
        examples=tuple(text for example in worked for text in example.values()),
        instructions=(writer.get("system", asked.system), writer.get("instruction", asked.instruction)),
    )


# -- what is counted -----------------------------------------------------------------------------------


def _rules(each: pd.DataFrame, told: dict[str, tuple[str, ...]], given: Given) -> dict[str, float | None]:
    """What the rules of cleaning.py say of the sentences as they are; each["reason"] by sentence."""
    captions = [(*told.get(row.first, ()), *told.get(row.second, ())) for row in each.itertuples()]
    pairs = list(zip(each.text, captions))
    each["reason"] = [check(text, given._replace(captions=known)).reason for text, known in pairs]
    said = [said_of(text) for text in each.text]
    copied = [copies(text, given.examples, known) for text, known in pairs] if given.examples else None
    return {
        "names_both": float(np.mean([swap_roles(text) is not None for text in each.text])),
        "same_of_both": float(np.mean([bool(first) and first == second for first, second in said])),
        "copies_example": float(np.mean(copied)) if copied else None,
        "rejected_now": float((~each.reason.isin(["kept", "trimmed"])).mean()),
    }


def _grounding(each: pd.DataFrame, told: dict[str, tuple[str, ...]]) -> dict[str, float | None]:
    """Whether the words come from the captions, of sentences whose images both have some; all captions count.

    novel_words: of all content words, the share that occurs in no caption of either image; each["novel"] by sentence.
    wrong_image_words: of the words said of an image that its captions or the other's have, the share that only the
    other's have. Words are compared without their endings.
    """
    words = {key: frozenset(word for text in texts for word in content_words(text)) for key, texts in told.items()}
    shares, novel, total, wrong, known = [], 0, 0, 0, 0
    for row in each.itertuples():
        if row.first not in words or row.second not in words:
            shares.append(np.nan)
            continue
        of_images, said = (words[row.first], words[row.second]), content_words(row.text)
        new = sum(word not in of_images[0] and word not in of_images[1] for word in said)
        shares.append(new / max(1, len(said)))
        novel, total = novel + new, total + len(said)
        for of_image, own, other in zip(said_of(row.text), of_images, of_images[::-1]):
            known += sum(word in own or word in other for word in of_image)
            wrong += sum(word in other and word not in own for word in of_image)
    each["novel"] = shares
    return {"novel_words": novel / total if total else None, "wrong_image_words": wrong / known if known else None}


def _variety(plain: Sequence[str]) -> dict[str, float]:
    """plain: texts as lower-case words alone."""
    words = " ".join(plain).split()
    blocks = [words[start : start + BLOCK] for start in range(0, max(1, len(words) - BLOCK + 1), BLOCK)]
    return {
        "distinct_words": len(set(words)),
        "type_token_ratio": len(set(words)) / max(1, len(words)),
        "type_token_ratio_1000": float(np.mean([len(set(block)) / max(1, len(block)) for block in blocks])),
    }


def _symmetry(each: pd.DataFrame) -> dict[str, float | None]:
    """Do d(i, j) and d(j, i) say the same? Of pairs that were written about in both orders.

    agreement: the words the two say of the same image, in common / in all (Jaccard), mean over the two images. The
    second sentence is brought into the order of the first with swap_roles; pairs where one of the two does not name
    both images are left out. crossed: pairs where what one says of i has more in common with what the other says of j.
    """
    text = {(row.first, row.second): row.text for row in each.itertuples()}
    pairs = [(text[i, j], text[j, i]) for i, j in text if i < j and (j, i) in text]
    straight, crossed = [], []
    for one, other in pairs:
        turned = swap_roles(other)
        if turned is None or swap_roles(one) is None:
            continue
        a, b = said_words(one), said_words(turned)
        if any(a) or any(b):
            straight.append(_in_common(a, b))
            crossed.append(_in_common(a, b[::-1]))
    together, exchanged = np.array(straight), np.array(crossed)
    known = len(together) > 0
    return {
        "both_orders": len(pairs),
        "agreement": float(together.mean()) if known else None,
        "unlike": float((together < UNLIKE).mean()) if known else None,
        "crossed": float((exchanged > together).mean()) if known else None,
    }


def _in_common(a: Sequence[set[str]], b: Sequence[set[str]]) -> float:
    return float(np.mean([len(x & y) / len(x | y) for x, y in zip(a, b) if x or y]))


# -- what is shown -------------------------------------------------------------------------------------


def table(found: Audit) -> pd.DataFrame:
    """A row a figure, then a row a reason: (what, how much)."""
    rows = []
    for name, (words, form) in TABLE.items():
        value = found.figures[name]
        rows.append((words, WHY_NOT.get(name, "not applicable") if value is None else form.format(value)))
    source, total = "the writer's" if found.counted == "meta" else "these", sum(found.counts.values())
    for reason in sorted(found.counts, key=lambda r: (r != "kept", r != "trimmed", -found.counts[r])):
        n = found.counts[reason]
        rows.append((f"of {source} sentences: {reason}", f"{n:,} ({n / total:.1%})"))
    return pd.DataFrame(rows, columns=["what", "how much"])


def sample(found: Audit, n: int, seed: int) -> list[dict[str, Any]]:
    """Some sentences to read, drawn by seed, with a caption of each image."""
    each = found.each
    rows = sorted(stream(seed, "sample").choice(len(each), min(n, len(each)), replace=False).tolist())
    drawn = each.loc[rows, ["first", "second", "text"]].assign(line=[row + 1 for row in rows]).to_dict("records")
    told = found.captions
    return [row | {"captions": [told[k][0] for k in (row["first"], row["second"]) if k in told]} for row in drawn]


def draw(found: Audit, path: Path) -> None:
    """Three histograms: lengths in characters and in tokens, and the share of words that no caption has."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{found.path.name}: {len(found.each):,} sentences")
    labels = {"characters": "characters", "tokens": "CLIP tokens", "novel": "share of words that no caption has"}
    for axes, (name, label) in zip(figure.subplots(1, 3), labels.items()):
        axes.hist(found.each[name].dropna(), 40, color="#4c78a8")
        axes.set(xlabel=label, ylabel="sentences")
        if name == "tokens":
            axes.axvline(CONTEXT, color="#b3261e", linestyle="--")  # what is beyond is cut
    figure.savefig(path, dpi=120)


def write(found: Audit, out: Path, drawn: list[dict[str, Any]]) -> list[Path]:
    """NAME.audit.md, .json and .png. drawn: the sample."""
    out.mkdir(parents=True, exist_ok=True)
    md, data, picture = (out / f"{found.path.stem}.audit.{ending}" for ending in ("md", "json", "png"))
    draw(found, picture)
    lines = [f"# Audit of {found.path.name}", "", table(found).to_markdown(index=False), "", f"![]({picture.name})", ""]
    lines += [f"    {row['line']}  {' '.join(row['text'].split())}" for row in drawn]  # indented: shown as it is
    write_text(md, "\n".join(lines) + "\n")
    content = {"file": found.path.name, "sha256": hashlib.sha256(found.path.read_bytes()).hexdigest()}
    content |= {"figures": found.figures, "counts": found.counts, "counted": found.counted, "sample": drawn}
    write_json(data, content | environment.describe())
    return [md, data, picture]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pc_clip audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="sentences, as generate_diffs.py writes them")
    parser.add_argument(
        "--captions", type=Path, metavar="COCO_JSON_OR_TSV",
        help="what the images show; the file the sentences were written from, if it is still where it was",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the audit is written; beside FILE")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (%(default)s)")
    parser.add_argument("--sample", type=int, default=20, help="sentences to read (%(default)s)")
    arguments = parser.parse_args(argv)
    check_at_least("--sample", arguments.sample, 0)
    found = audit(arguments.file, arguments.captions)
    drawn = sample(found, arguments.sample, arguments.seed)
    print(table(found).to_string(index=False, header=False))
    print("".join(f"\n{row['line']:>7}  {row['text']}" for row in drawn) + "\n")
    print("\n".join(map(str, write(found, arguments.out or arguments.file.parent, drawn))))
