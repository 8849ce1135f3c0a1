"""Fetching a file: whole and right or not at all, against a server of the test's own."""

import errno
import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pc_clip.core.errors import UserError
from pc_clip.data import download

CONTENT = bytes(range(256)) * 2000  # 512,000 bytes
SHA256 = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
MD5 = f"md5:{hashlib.md5(CONTENT).hexdigest()}"


class _Server(ThreadingHTTPServer):
    """Serves one file. What it can do, and what it breaks, is set by the test."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content, self.etag, self.date = CONTENT, '"one"', None
        self.status, self.kind, self.location = 200, "application/octet-stream", None
        self.ranges, self.cut, self.chunked, self.honest = True, None, False, True
        self.asked, self.conditions = [], []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/data.bin"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append(wanted)
        server.conditions.append(self.headers.get("If-Range"))
        same = self.headers.get("If-Range") in (None, server.etag, server.date) or not server.honest
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and server.ranges and same else None
        if start is not None and start >= len(server.content):
            self.send_response(416)
            self.end_headers()
            return
        body = server.content[start or 0 :]
        self.send_response(server.status if start is None else 206)
        if server.location:
            self.send_header("Location", server.location)
        if start is not None:
            end = len(server.content)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{end}")
        for name, value in (("ETag", server.etag), ("Last-Modified", server.date), ("Content-Type", server.kind)):
            if value:
                self.send_header(name, value)
        if not server.chunked:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if server.cut is None else body[: server.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = _Server()
    threading.Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.01}).start()
    yield server
    server.shutdown()
    server.server_close()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("digest", [SHA256, SHA256.upper().replace("SHA", "sha"), MD5, None])
def test_a_file_comes_whole_and_alone_into_a_new_folder(server, tmp_path, digest):
    path = download.fetch(server.url, tmp_path / "new" / "data.bin", digest=digest, size=len(CONTENT))
    assert path == tmp_path / "new" / "data.bin"
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == ["data.bin"]


def test_a_right_file_is_not_fetched_again_and_a_wrong_one_is_replaced(server, tmp_path):
    path = tmp_path / "data.bin"
    path.write_bytes(CONTENT)
    for options in ({"digest": SHA256}, {"digest": MD5}, {"size": len(CONTENT)}, {}):
        download.fetch(server.url, path, **options)
    assert server.asked == []
    path.write_bytes(CONTENT[:-1] + b"x")
    download.fetch(server.url, path, digest=SHA256)
    assert path.read_bytes() == CONTENT


def test_an_interrupted_transfer_continues_where_it_stopped(server, tmp_path):
    server.cut = 200_000
    with pytest.raises(UserError, match=r"data\.bin was not fetched: the connection broke; 200000 bytes are kept"):
        download.fetch(server.url, tmp_path / "data.bin")
    assert "data.bin" not in names(tmp_path)
    server.cut = None
    assert download.fetch(server.url, tmp_path / "data.bin").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=200000-"]
    assert server.conditions == [None, '"one"']
    assert names(tmp_path) == ["data.bin"]


def test_a_server_without_ranges_sends_it_all_again(server, tmp_path):
    server.cut, server.ranges = 200_000, False
    with pytest.raises(UserError):
        download.fetch(server.url, tmp_path / "data.bin")
    server.cut = None
    assert download.fetch(server.url, tmp_path / "data.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("change", ["etag", "date", "length"])
@pytest.mark.parametrize("honest", [True, False], ids=["server heeds If-Range", "server does not"])
def test_the_beginning_of_one_file_never_gets_the_end_of_another(server, tmp_path, change, honest):
    server.date, server.honest = "Mon, 01 Jan 2024 00:00:00 GMT", honest
    if change == "date":
        server.etag = None
    server.cut = 200_000
    with pytest.raises(UserError):
        download.fetch(server.url, tmp_path / "data.bin")
    server.cut, server.content = None, bytes(reversed(CONTENT))
    if change == "etag":
        server.etag = '"two"'
    elif change == "date":
        server.date = "Tue, 02 Jan 2024 00:00:00 GMT"
    else:
        server.content += b"longer"
    assert download.fetch(server.url, tmp_path / "data.bin").read_bytes() == server.content


def test_without_any_mark_of_the_file_only_a_digest_lets_it_continue(server, tmp_path):
    server.etag, server.cut = None, 200_000
    for digest, asked in ((None, [None, None]), (SHA256, [None, "bytes=200000-"])):
        path = tmp_path / str(digest) / "data.bin"
        server.asked, server.cut = [], 200_000
        with pytest.raises(UserError):
            download.fetch(server.url, path, digest=digest)
        server.cut = None
        assert download.fetch(server.url, path, digest=digest).read_bytes() == CONTENT
        assert server.asked == asked


def test_a_partial_file_of_another_address_or_longer_than_the_file_is_dropped(server, tmp_path):
    server.cut = 200_000
    with pytest.raises(UserError):
        download.fetch(server.url, tmp_path / "data.bin")
    server.cut = None
    assert download.fetch(f"{server.url}?other", tmp_path / "data.bin").read_bytes() == CONTENT
    assert server.asked == [None, None]
    (tmp_path / "data.bin").unlink()
    server.cut = 200_000
    with pytest.raises(UserError):
        download.fetch(server.url, tmp_path / "data.bin")
    server.cut, server.content = None, CONTENT[:1000]
    assert download.fetch(server.url, tmp_path / "data.bin").read_bytes() == CONTENT[:1000]  # after a 416


@pytest.mark.parametrize("chunked", [False, True])
def test_a_wrong_digest_or_length_leaves_nothing_and_says_what_came(server, tmp_path, chunked):
    server.content, server.chunked = CONTENT[:-1] + b"x", chunked
    with pytest.raises(UserError, match=r"the sha256 [0-9a-f]{64}, and [0-9a-f]{64} was expected.*by hand.*put it at"):
        download.fetch(server.url, tmp_path / "data.bin", digest=SHA256)
    with pytest.raises(UserError, match="bytes.*, and 5 were expected"):
        download.fetch(server.url, tmp_path / "data.bin", size=5)
    assert [name for name in names(tmp_path) if not name.endswith(".json")] == []


def test_a_wrong_download_does_not_touch_the_file_that_was_there(server, tmp_path):
    (tmp_path / "data.bin").write_bytes(b"older, and not the right one either")
    server.content = b"x" * 100
    with pytest.raises(UserError, match="sha256"):
        download.fetch(server.url, tmp_path / "data.bin", digest=SHA256)
    assert (tmp_path / "data.bin").read_bytes() == b"older, and not the right one either"


@pytest.mark.parametrize("status", [403, 404, 500])
def test_a_refusal_names_the_address_the_status_and_what_to_do(server, tmp_path, status):
    server.status = status
    with pytest.raises(UserError) as caught:
        download.fetch(server.url, tmp_path / "data.bin", digest=MD5)
    message = str(caught.value)
    assert message.startswith(f"{server.url} was not fetched: the server answered {status}")
    assert f"fetch it by hand and put it at {tmp_path / 'data.bin'} (its md5 is {MD5[4:]})" in message
    assert names(tmp_path) == []


def test_a_web_page_in_place_of_the_file_is_refused(server, tmp_path):
    server.kind, server.content = "text/html; charset=utf-8", b"<!DOCTYPE html><p>Log in first"
    with pytest.raises(UserError, match="answered with a web page"):
        download.fetch(server.url, tmp_path / "data.bin")
    with pytest.raises(UserError, match="sent a web page in its place"):
        download.fetch(server.url, tmp_path / "data.bin", digest=SHA256)
    assert names(tmp_path) == []


def test_no_server_and_an_unknown_host_are_said_in_one_line(server, tmp_path):
    address = server.url
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"was not fetched: no connection \(.*refused.*\)\. Try again, or fetch it by"):
        download.fetch(address, tmp_path / "data.bin")


def test_a_server_that_falls_silent_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.1)
    held = threading.Event()
    monkeypatch.setattr(_Handler, "do_GET", lambda self: held.wait(5))
    with pytest.raises(UserError, match="does not answer"):
        download.fetch(server.url, tmp_path / "data.bin")
    held.set()


@pytest.mark.parametrize("url", ["ftp://host/file", "file:///etc/hostname", "/etc/hostname", "http:///nothing"])
def test_other_kinds_of_address_are_refused(tmp_path, url):
    with pytest.raises(UserError, match="was not fetched"):
        download.fetch(url, tmp_path / "data.bin")


def test_a_redirect_is_followed_but_not_out_of_http(server, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("mine")
    server.status = 302
    for location in (f"file://{secret}", "ftp://127.0.0.1/data.bin"):
        server.location = location
        with pytest.raises(UserError, match="redirects to something that is no http"):
            download.fetch(server.url, tmp_path / "data.bin")
    server.location = server.url
    with pytest.raises(UserError, match="redirects without end"):
        download.fetch(server.url, tmp_path / "data.bin")
    other = _Server()
    threading.Thread(target=other.serve_forever, daemon=True, kwargs={"poll_interval": 0.01}).start()
    server.location = other.url
    assert download.fetch(server.url, tmp_path / "data.bin", digest=SHA256).read_bytes() == CONTENT
    other.shutdown()
    other.server_close()


def test_a_full_disk_and_a_file_where_a_folder_should_be_are_errors_of_the_user(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"was not fetched: (Not a directory|File exists)"):
        download.fetch(server.url, tmp_path / "file" / "data.bin")
    with pytest.raises(UserError, match="is a folder"):
        download.fetch(server.url, tmp_path)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download.os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device .*Mend that"):
        download.fetch(server.url, tmp_path / "data.bin")
    assert "data.bin" not in names(tmp_path)


def test_compressed_content_arrives_as_it_lies_on_the_server(server, tmp_path, monkeypatch):
    """Some servers call a .gz file an encoding; unpacking it on the way would break its digest."""
    plain = _Handler.send_header

    def send(self, name, value):
        plain(self, name, value)
        if name == "Content-Type":
            plain(self, "Content-Encoding", "gzip")

    monkeypatch.setattr(_Handler, "send_header", send)
    assert download.fetch(server.url, tmp_path / "data.tar.gz", digest=SHA256).read_bytes() == CONTENT


def test_a_digest_that_is_none_is_the_callers_mistake(tmp_path):
    for digest in ("sha1:" + "0" * 40, "md5:xyz", "0" * 64):
        with pytest.raises(ValueError, match="neither md5"):
            download.fetch("http://127.0.0.1/x", tmp_path / "x", digest=digest)


def test_a_redirect_from_https_to_http_needs_a_digest(server, tmp_path, monkeypatch):
    import requests

    monkeypatch.setattr(download, "_ask", lambda session, wanted, headers: requests.get(server.url, stream=True))
    secure = server.url.replace("http:", "https:")
    with pytest.raises(UserError, match=r"redirects to http://127.*which anyone on the way could change"):
        download.fetch(secure, tmp_path / "data.bin")
    assert download.fetch(secure, tmp_path / "data.bin", digest=SHA256).read_bytes() == CONTENT
