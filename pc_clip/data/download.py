"""Fetch one file over HTTP: whole, checked, and in its place, or not there at all.

The bytes go to PATH.partial; what the server said about them (address, ETag, date, length) to
PATH.partial.json. A second call continues there if the server still has the same file and allows it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import requests
import urllib3
from tqdm import tqdm

import pc_clip
from pc_clip.core.errors import UserError
from pc_clip.core.files import write_json

BLOCK = 1 << 20  # bytes read at a time
TIMEOUT = (20, 60)  # seconds until a connection stands; seconds between two pieces of an answer
LENGTHS = {"md5": 32, "sha256": 64}


class _Wanted(NamedTuple):
    """What is fetched, whereto, and how it is known to be right."""

    url: str
    path: Path
    digest: str | None
    size: int | None

    @property
    def partial(self) -> Path:
        return self.path.with_name(f"{self.path.name}.partial")

    @property
    def notes(self) -> Path:
        return self.path.with_name(f"{self.path.name}.partial.json")

    def failed(self, what: str, *, then: str = "Try again") -> UserError:
        check = f" (its {self.digest.partition(':')[0]} is {self.digest.partition(':')[2]})" if self.digest else ""
        return UserError(
            f"{self.url} was not fetched: {what}. {then}, or fetch it by hand and put it at {self.path}{check}."
        )


def fetch(url: str, path: Path, *, digest: str | None = None, size: int | None = None) -> Path:
    """Fetch `url` to `path`, which is returned. A right file that is there already is not fetched again.

    digest: "md5:<hex>" or "sha256:<hex>" of the file. size: its bytes. Without either a file that is there is
    taken for right, since only whole files are ever put there.
    Raises UserError for every failure, with the address, the reason and what to do. An interrupted transfer is
    kept and continued by the next call; bytes that turn out wrong are not.
    """
    wanted = _Wanted(url, Path(path), digest, size)
    if digest is not None and not _is_digest(digest):
        raise ValueError(f"digest {digest!r} is neither md5:<32 digits> nor sha256:<64 digits>")
    if urlsplit(url).scheme.lower() not in ("http", "https"):
        raise wanted.failed("it is no http or https address", then="Give another address")
    if wanted.path.is_dir():
        raise wanted.failed(f"{path} is a folder", then="Name a file")
    if wanted.path.is_file() and _wrong(wanted.path, wanted) is None:
        return wanted.path
    try:
        wanted.path.parent.mkdir(parents=True, exist_ok=True)
        _transfer(wanted)
        if wrong := _wrong(wanted.partial, wanted):
            page = is_web_page(wanted.partial)
            _forget(wanted)
            raise wanted.failed(f"{wrong}{'; the server sent a web page in its place' if page else ''}")
        os.replace(wanted.partial, wanted.path)
        wanted.notes.unlink(missing_ok=True)
    except (requests.RequestException, urllib3.exceptions.HTTPError, UnicodeError) as error:
        raise wanted.failed(_explain(error, wanted)) from error
    except OSError as error:  # a full disk, a folder that cannot be written
        raise wanted.failed(
            f"{error.strerror or error} ({error.filename or wanted.partial})",
            then="Mend that and give the same command again",
        ) from error
    return wanted.path


# -- the transfer --------------------------------------------------------------------------------------


def _transfer(wanted: _Wanted) -> None:
    """Bring the partial file to its full length."""
    with requests.Session() as session:
        session.headers["User-Agent"] = f"pc_clip/{pc_clip.__version__}"
        session.headers["Accept-Encoding"] = "identity"  # the bytes as they lie there: offsets and lengths hold
        response = _ask(session, wanted, _range_to_ask_for(wanted))
        if response.status_code == requests.codes.requested_range_not_satisfiable or (
            response.status_code == requests.codes.partial_content and not _continues(response, wanted)
        ):
            response.close()
            _forget(wanted)
            response = _ask(session, wanted, {})
        with response:
            _check_answer(response, wanted)
            _receive(response, wanted)


def _ask(session: requests.Session, wanted: _Wanted, headers: dict[str, str]) -> requests.Response:
    # requests follows redirects to http and https alone, and checks certificates.
    return session.get(wanted.url, headers=headers, stream=True, timeout=TIMEOUT)


def _range_to_ask_for(wanted: _Wanted) -> dict[str, str]:
    """Headers that ask for the rest of what is there; none when it cannot be told that it is the same file."""
    notes = _read_notes(wanted)
    have = wanted.partial.stat().st_size if wanted.partial.is_file() else 0
    if not have or notes.get("url") != wanted.url:
        return {}
    etag, date = notes.get("etag"), notes.get("date")
    if etag and not etag.startswith("W/"):
        return {"Range": f"bytes={have}-", "If-Range": etag}
    if date:
        return {"Range": f"bytes={have}-", "If-Range": date}
    return {"Range": f"bytes={have}-"} if wanted.digest else {}  # then the digest will tell


def _continues(response: requests.Response, wanted: _Wanted) -> bool:
    """Whether a 206 is the rest of exactly the file whose beginning is here."""
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", "").strip())
    if not found:
        return False
    start, end, total = map(int, found.groups())
    notes = _read_notes(wanted)
    same = all(now is None or now == notes.get(key) for key, now in _validators(response).items())
    return start == wanted.partial.stat().st_size and end == total - 1 and notes.get("length") in (None, total) and same


def _check_answer(response: requests.Response, wanted: _Wanted) -> None:
    if response.status_code not in (requests.codes.ok, requests.codes.partial_content):
        raise wanted.failed(f"the server answered {response.status_code} {response.reason}".rstrip())
    secure = urlsplit(wanted.url).scheme == "https"
    if secure and urlsplit(response.url).scheme != "https" and not wanted.digest:
        raise wanted.failed(f"it redirects to {response.url}, which anyone on the way could change")
    page = response.headers.get("Content-Type", "").startswith("text/html")
    if page and not wanted.digest and wanted.path.suffix not in (".html", ".htm"):
        raise wanted.failed("the server answered with a web page in place of the file")


def _receive(response: requests.Response, wanted: _Wanted) -> None:
    """Write the body, after what is there for a 206, anew for a 200."""
    continues = response.status_code == requests.codes.partial_content
    have = wanted.partial.stat().st_size if continues else 0
    length = response.headers.get("Content-Length")
    total = have + int(length) if length and length.isdigit() else None
    if wanted.size is not None and total is not None and total != wanted.size:
        raise wanted.failed(f"it has {total} bytes there, and {wanted.size} were expected")
    if not continues:
        _forget(wanted)
        write_json(wanted.notes, {"url": wanted.url, "length": total, **_validators(response)})
    with (
        wanted.partial.open("ab") as file,
        tqdm(
            total=total, initial=have, desc=wanted.path.name, unit="B", unit_scale=True, unit_divisor=1024, disable=None
        ) as bar,
    ):
        for piece in response.raw.stream(BLOCK, decode_content=False):
            file.write(piece)
            bar.update(len(piece))
            if wanted.size is not None and file.tell() > wanted.size:
                break  # it cannot be right any more
        file.flush()
        os.fsync(file.fileno())


def _validators(response: requests.Response) -> dict[str, str | None]:
    return {"etag": response.headers.get("ETag"), "date": response.headers.get("Last-Modified")}


def _read_notes(wanted: _Wanted) -> dict[str, Any]:
    try:
        found = json.loads(wanted.notes.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _forget(wanted: _Wanted) -> None:
    wanted.partial.unlink(missing_ok=True)
    wanted.notes.unlink(missing_ok=True)


# -- checking ------------------------------------------------------------------------------------------


def file_digest(path: Path, kind: str) -> str:
    """md5 or sha256 of a file, in hexadecimal."""
    digest = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def is_web_page(path: Path) -> bool:
    """Whether a file is HTML: what servers send in place of a file they will not give."""
    with path.open("rb") as file:
        return file.read(512).lstrip().lower().startswith((b"<!doctype html", b"<html"))


def _is_digest(digest: str) -> bool:
    kind, _, value = digest.partition(":")
    return kind in LENGTHS and re.fullmatch(rf"[0-9a-fA-F]{{{LENGTHS[kind]}}}", value) is not None


def _wrong(path: Path, wanted: _Wanted) -> str | None:
    """What is wrong with a finished file; None when it is as it should be."""
    found = path.stat().st_size
    if wanted.size is not None and found != wanted.size:
        return f"{found} bytes came, and {wanted.size} were expected"
    if wanted.digest is not None:
        kind, _, value = wanted.digest.partition(":")
        if (has := file_digest(path, kind)) != value.lower():
            return f"what came has the {kind} {has}, and {value} was expected"
    return None


def _explain(error: Exception, wanted: _Wanted) -> str:
    """In plain words what the network did."""
    have = wanted.partial.stat().st_size if wanted.partial.is_file() else 0
    if isinstance(error, requests.exceptions.SSLError):
        what = "its certificate does not hold"
    elif isinstance(error, requests.exceptions.InvalidSchema):
        what = "it redirects to something that is no http or https address"
    elif isinstance(error, requests.exceptions.TooManyRedirects):
        what = "it redirects without end"
    elif isinstance(error, urllib3.exceptions.HTTPError | requests.exceptions.ChunkedEncodingError):
        what = f"the connection broke; {have} bytes are kept, and the same command continues there if the server can"
    elif isinstance(error, requests.exceptions.Timeout):
        what = "the server does not answer"
    elif isinstance(error, requests.exceptions.ConnectionError):
        what = f"no connection ({_innermost(error)})"
    else:
        what = _innermost(error)
    return what


def _innermost(error: BaseException) -> str:
    while inner := error.__cause__ or error.__context__:
        error = inner
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
