"""How good are the sentences of a file? `python -m pc_clip audit llm_diffs/NAME.jsonl --captions CAPTIONS`.

Prints a table and some sentences to read, and writes NAME.audit.md, .json and .png beside the file. Nothing is
judged by a model: every figure is a count of words, and its definition stands in the function that makes it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from pc_clip.core import environment
from pc_clip.core.errors import UserError, check_at_least
from pc_clip.core.files import write_json, write_text
from pc_clip.core.random import stream
from pc_clip.data.captions import read_captions
from pc_clip.data.differences import Difference, read, swap_roles
from pc_clip.data.registry import open_dataset
from pc_clip.write import prompts
from pc_clip.write.cleaning import MIN_CHARACTERS, Given, check, copies
from pc_clip.write.words import content_words, said_of, said_words

CONTEXT = 77  # tokens that CLIP's text tower reads, the start and the end among them
UNLIKE = 0.2  # two sentences that share fewer of their words than this are about different things
BLOCK = 1000  # words in a row whose variety is measured, so that files of different sizes can be compared

TABLE = (  # name of the figure, what it is called, how it is written
    ("sentences", "sentences", "count"),
    ("images", "images", "count"),
    ("characters_mean", "characters, mean", "number"),
    ("tokens_mean", "CLIP tokens, mean", "number"),
    ("tokens_max", "CLIP tokens, most", "count"),
    ("over_77", "longer than 77 tokens", "share"),
    ("repeated", "occur before, word for word", "share"),
    ("repeated_nearly", "occur before, but for capitals and punctuation", "share"),
    ("names_both", "name both images", "share"),
    ("same_of_both", "say the same of both images", "share"),
    ("copies_example", "copy a worked example of the prompt", "share"),
    ("rejected_now", "would be rejected by the rules of today", "share"),
    ("novel_words", "content words that no caption of the two images has", "share"),
    ("wrong_image_words", "words of the captions that are said of the wrong image", "share"),
    ("distinct_words", "distinct words", "count"),
    ("type_token_ratio", "distinct words / words", "ratio"),
    ("type_token_ratio_1000", "the same, of 1,000 words in a row", "ratio"),
    ("both_orders", "pairs written about in both orders", "count"),
    ("agreement", "what both orders say of an image: words in common", "ratio"),
    ("unlike", "pairs with fewer than 0.2 in common", "share"),
    ("crossed", "pairs that contradict: more in common when exchanged", "share"),
)
WHY_NOT = {  # why a figure may be absent
    "copies_example": "no examples in the prompt",
    "novel_words": "needs --captions",
    "wrong_image_words": "needs --captions",
    "agreement": "not applicable",
    "unlike": "not applicable",
    "crossed": "not applicable",
}


class Audit(NamedTuple):
    """figures: by the names of TABLE, None where not applicable. counts: sentences by reason, of the writer's file
    when `counted` is "meta", else by the rules of today. each: a figure a sentence.
    """

    path: Path
    figures: dict[str, float | None]
    counts: dict[str, int]
    counted: str
    each: dict[str, np.ndarray]
    sample: list[dict[str, Any]]


def audit(path: Path, captions: Path | None = None, seed: int = 0, sample: int = 20) -> Audit:
    """Read a file of differences and count.

    captions: a COCO JSON or SimCLIP TSV; the file the writer's settings name when it is there. Raises UserError for
    a file that is absent, empty or cut, and for captions of other images.
    """
    check_at_least("--sample", sample, 0)
    differences = read(path)
    meta = _meta(path)
    told = _captions(captions, meta, differences)
    given = _prompt(meta)
    texts = [difference.text for difference in differences]
    each = {"characters": np.array([len(text) for text in texts]), "tokens": token_lengths(texts)}
    figures: dict[str, float | None] = {
        "sentences": len(texts),
        "images": len({key for difference in differences for key in difference[:2]}),
        "characters_mean": float(each["characters"].mean()),
        "tokens_mean": float(each["tokens"].mean()),
        "tokens_max": int(each["tokens"].max()),
        "over_77": float((each["tokens"] > CONTEXT).mean()),
        **_duplicates(texts),
    }
    today, by_rule = _rules(differences, told, given)
    figures |= by_rule | _grounding(differences, told, each) | _variety(texts) | _symmetry(differences)
    return Audit(
        Path(path), {name: figures[name] for name, _, _ in TABLE},
        meta.get("counts") or today, "meta" if meta.get("counts") else "rules",
        each, _sample(differences, told, seed, sample),
    )  # fmt: skip


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


def _captions(path: Path | None, meta: dict[str, Any], differences: list[Difference]) -> dict[str, tuple[str, ...]]:
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
    if not any(d.first in told and d.second in told for d in differences):
        raise UserError(
            f"{path} has captions of other images ({', '.join(list(told)[:3])}, ...): it knows both images of none of "
            f"the {len(differences)} pairs, the first being {differences[0].first} and {differences[0].second}. Give "
            "--captions the file that the sentences were written from."
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


def token_lengths(texts: Sequence[str]) -> np.ndarray:
    """How many tokens CLIP's tokenizer makes of each text, its start and end among them, before anything is cut. [N]

    Its pattern never joins what white space parts, so each distinct word is tokenized once. A text with characters
    that the tokenizer first cleans (not ASCII, or HTML's &) goes through it whole.
    """
    tokenizer = _tokenizer()
    known: dict[str, int] = {}

    def length(text: str) -> int:
        if not text.isascii() or "&" in text:
            return len(tokenizer.encode(text))
        total = 0
        for word in text.split():
            if (n := known.get(word)) is None:
                n = known[word] = len(tokenizer.encode(word))
            total += n
        return total

    return np.array([length(text) + 2 for text in texts])


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    from pc_clip.models.clip import open_clip

    return open_clip.SimpleTokenizer()


def _duplicates(texts: list[str]) -> dict[str, float]:
    """The share of sentences that stand further up in the file already, exactly and by their words alone."""
    plain = {" ".join(re.findall(r"\w+", text.lower())) for text in texts}
    return {"repeated": 1 - len(set(texts)) / len(texts), "repeated_nearly": 1 - len(plain) / len(texts)}


def _rules(
    differences: list[Difference], told: dict[str, tuple[str, ...]], given: Given
) -> tuple[dict[str, int], dict[str, float | None]]:
    """What the rules of cleaning.py say of the sentences as they are, and the shares that interest most."""
    reasons: Counter[str] = Counter()
    both = same = copied = 0
    for difference in tqdm(differences, "reading", leave=False, disable=None if len(differences) > 5000 else True):
        captions = (*told.get(difference.first, ()), *told.get(difference.second, ()))
        reasons[check(difference.text, given._replace(captions=captions)).reason] += 1
        first, second = said_of(difference.text)
        both += swap_roles(difference.text) is not None
        same += bool(first) and first == second
        copied += bool(given.examples) and copies(difference.text, given.examples, captions)
    n = len(differences)
    return dict(reasons.most_common()), {
        "names_both": both / n,
        "same_of_both": same / n,
        "copies_example": copied / n if given.examples else None,
        "rejected_now": 1 - (reasons["kept"] + reasons["trimmed"]) / n,
    }


def _grounding(
    differences: list[Difference], told: dict[str, tuple[str, ...]], each: dict[str, np.ndarray]
) -> dict[str, float | None]:
    """Whether the words come from the captions, of sentences whose images both have some.

    novel_words: of all content words, the share that occurs in no caption of either image. wrong_image_words: of the
    words said of an image that its captions or the other's have, the share that only the other's have.
    each["novel"]: the first, a sentence. Words are compared without their endings. All captions of an image count, also
    where the writer was told one of them.
    """
    words = {key: frozenset(word for text in texts for word in content_words(text)) for key, texts in told.items()}
    shares, novel, total, wrong, known = [], 0, 0, 0, 0
    for difference in differences:
        if difference.first not in words or difference.second not in words:
            continue
        of_images = words[difference.first], words[difference.second]
        said = content_words(difference.text)
        new = sum(word not in of_images[0] and word not in of_images[1] for word in said)
        shares.append(new / max(1, len(said)))
        novel, total = novel + new, total + len(said)
        for of_image, own, other in zip(said_of(difference.text), of_images, of_images[::-1]):
            known += sum(word in own or word in other for word in of_image)
            wrong += sum(word in other and word not in own for word in of_image)
    each["novel"] = np.array(shares)
    return {
        "novel_words": novel / total if total else None,
        "wrong_image_words": wrong / known if known else None,
    }


def _variety(texts: list[str]) -> dict[str, float]:
    words = [word for text in texts for word in re.findall(r"\w+", text.lower())]
    blocks = [words[start : start + BLOCK] for start in range(0, max(1, len(words) - BLOCK + 1), BLOCK)]
    return {
        "distinct_words": len(set(words)),
        "type_token_ratio": len(set(words)) / max(1, len(words)),
        "type_token_ratio_1000": float(np.mean([len(set(block)) / max(1, len(block)) for block in blocks])),
    }


def _symmetry(differences: list[Difference]) -> dict[str, float | None]:
    """Do d(i, j) and d(j, i) say the same? Of pairs that were written about in both orders.

    agreement: the words the two say of the same image, in common / in all (Jaccard), mean over the two images. The
    second sentence is brought into the order of the first with swap_roles; pairs where one of the two does not name
    both images are left out. crossed: pairs where what one says of i has more in common with what the other says of j.
    Where the two were written from different captions, true sentences may have little in common; crossed still tells.
    """
    text = {difference[:2]: difference.text for difference in differences}
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
    found = np.array(straight)
    return {
        "both_orders": len(pairs),
        "agreement": float(found.mean()) if len(found) else None,
        "unlike": float((found < UNLIKE).mean()) if len(found) else None,
        "crossed": float((np.array(crossed) > found).mean()) if len(found) else None,
    }


def _in_common(a: Sequence[set[str]], b: Sequence[set[str]]) -> float:
    shares = [len(x & y) / len(x | y) for x, y in zip(a, b) if x or y]
    return sum(shares) / len(shares)


def _sample(
    differences: list[Difference], told: dict[str, tuple[str, ...]], seed: int, number: int
) -> list[dict[str, Any]]:
    rng = stream(seed, "sample")
    rows = sorted(rng.choice(len(differences), min(number, len(differences)), replace=False).tolist())
    found = []
    for row in rows:
        first, second, text = differences[row]
        captions = [told[key][0] for key in (first, second) if key in told]
        found.append({"line": row + 1, "first": first, "second": second, "text": text, "captions": captions})
    return found


# -- what is shown -------------------------------------------------------------------------------------


def rows(found: Audit) -> list[tuple[str, str]]:
    """The table: (what, how much)."""
    table = [(words, _written(found.figures[name], kind, name)) for name, words, kind in TABLE]
    total = sum(found.counts.values())
    source = "the writer's" if found.counted == "meta" else "these"
    return table + [
        (f"of {source} sentences: {reason}", f"{n:,} ({100 * n / total:.1f} %)")
        for reason, n in _in_order(found.counts)
    ]


def _in_order(counts: dict[str, int]) -> list[tuple[str, int]]:
    """Kept and trimmed first, then the others by their number."""
    return sorted(counts.items(), key=lambda item: (item[0] != "kept", item[0] != "trimmed", -item[1]))


def _written(value: float | None, kind: str, name: str) -> str:
    if value is None:
        return WHY_NOT[name]
    return {
        "count": f"{value:,.0f}",
        "number": f"{value:.1f}",
        "share": f"{100 * value:.1f} %",
        "ratio": f"{value:.4f}",
    }[kind]


def markdown(found: Audit, picture: str) -> str:
    table = rows(found)
    widths = [max(len(row[k]) for row in table) for k in range(2)]
    lines = [f"# Audit of {found.path.name}", "", f"| {'':{widths[0]}} | {'':{widths[1]}} |"]
    lines.append(f"|{'-' * (widths[0] + 2)}|{'-' * (widths[1] + 1)}:|")
    lines += [f"| {what:{widths[0]}} | {value:>{widths[1]}} |" for what, value in table]
    lines += ["", f"![lengths, tokens, words that no caption has, and reasons]({picture})"]
    if found.sample:
        lines += ["", "## A sample to read", ""]
    for item in found.sample:
        lines.append(f"- line {item['line']}, {item['first']} and {item['second']}: {_plain(item['text'])}")
        lines += [f"  - {_plain(caption)}" for caption in item["captions"]]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_<>\[\]#|])", r"\\\1", " ".join(text.split()))


def draw(found: Audit, path: Path) -> None:
    """Four panels: lengths in characters and in tokens, words that no caption has, reasons."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{found.path.name}: {found.figures['sentences']:,} sentences", fontsize=14)
    (characters, tokens), (novel, reasons) = figure.subplots(2, 2)
    _histogram(characters, found.each["characters"], "length in characters")
    _histogram(tokens, found.each["tokens"], "length in CLIP tokens")
    tokens.axvline(CONTEXT, color="#b3261e", linestyle="--", linewidth=1.5)
    tokens.set_xlim(0, max(CONTEXT + 8, tokens.get_xlim()[1]))
    over = _written(found.figures["over_77"], "share", "over_77")
    tokens.set_title(f"{over} are longer than {CONTEXT}, the dashed line", fontsize=11)
    if len(found.each["novel"]):
        _histogram(
            novel, 100 * found.each["novel"], "per cent of its words that no caption has", np.linspace(0, 100, 21)
        )
        share = _written(found.figures["novel_words"], "share", "novel_words")
        novel.set_title(f"{share} of all content words are in no caption", fontsize=11)
    else:
        novel.set_axis_off()
        novel.text(0.5, 0.5, "words that no caption has:\nneeds --captions", ha="center", va="center", fontsize=11)
    names, numbers = zip(*_in_order(found.counts))
    bars = reasons.barh([name.replace("_", " ") for name in names], numbers, color="#4c78a8")
    reasons.bar_label(bars, [f"{n:,}" for n in numbers], padding=3, fontsize=10)
    reasons.invert_yaxis()
    reasons.margins(x=0.18)
    reasons.set_title(
        "what became of what was written" if found.counted == "meta" else "by the rules of today", fontsize=11
    )
    reasons.set_xlabel("sentences")
    for axes in (characters, tokens, novel, reasons):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _histogram(axes: Any, values: np.ndarray, label: str, bins: Any = None) -> None:
    if bins is None:  # whole numbers, at most 40 bars
        low, high = int(values.min()), int(values.max())
        step = max(1, -(-(high - low + 1) // 40))
        bins = np.arange(low, high + step + 1, step) - 0.5
    axes.hist(values, bins, color="#4c78a8", edgecolor="white", linewidth=0.5)
    axes.set(xlabel=label, ylabel="sentences")
    axes.yaxis.get_major_locator().set_params(integer=True)


def write(found: Audit, out: Path) -> list[Path]:
    """NAME.audit.md, .json and .png."""
    name = found.path.name.removesuffix(".jsonl")
    paths = [out / f"{name}.audit.{ending}" for ending in ("md", "json", "png")]
    draw(found, paths[2])
    write_text(paths[0], markdown(found, paths[2].name))
    write_json(paths[1], _content(found))
    return paths


def _content(found: Audit) -> dict[str, Any]:
    each = {
        name: dict(zip(("counts", "edges"), (part.tolist() for part in np.histogram(values, 40))))
        for name, values in found.each.items()
        if len(values)
    }
    return {
        "file": found.path.name,
        "sha256": hashlib.sha256(found.path.read_bytes()).hexdigest(),
        "figures": found.figures,
        "counts": found.counts,
        "counted": found.counted,
        "histograms": each,
        "sample": found.sample,
        **environment.describe(),
    }


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
    found = audit(arguments.file, arguments.captions, arguments.seed, arguments.sample)
    table = rows(found)
    width = max(len(what) for what, _ in table)
    print("\n".join(f"{what:{width}}  {value}" for what, value in table))
    print("".join(f"\n{item['line']:>7}  {item['text']}" for item in found.sample) + "\n")
    print("\n".join(map(str, write(found, arguments.out or arguments.file.parent))))
