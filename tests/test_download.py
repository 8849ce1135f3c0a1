"""Archives from a server of this machine: fetched once, checked, unpacked, opened."""

import functools
import http.server
import shutil
import threading
from pathlib import Path

import pytest
from test_dataset_layouts import awa2_tree

from pc_clip.core.errors import UserError
from pc_clip.data import download
from pc_clip.data.registry import READERS, main, open_dataset


@pytest.fixture
def address(tmp_path):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/a.zip"
    server.shutdown()
    server.server_close()


def test_a_set_is_downloaded_once_unpacked_and_opened(tmp_path, address, monkeypatch, capsys):
    awa2_tree(tmp_path / "made")
    packed = shutil.make_archive(str(tmp_path / "served" / "a"), "zip", tmp_path / "made")
    right = "md5:" + download.file_digest(Path(packed), "md5")
    for known_hash, root in ((f"md5:{'0' * 32}", "wrong"), (right, "data/awa2")):
        monkeypatch.setitem(download.ARCHIVES, "awa2", [(address, "Animals_with_Attributes2", known_hash)])
        if root == "wrong":
            with pytest.raises(UserError, match=r"a\.zip was not fetched: .*hash.* wget -c -P wrong http"):
                main(["--download", "awa2", "--root", root])
            assert READERS["awa2"].state(Path(root)) == "not found"
    main(["--download", "awa2"])
    assert capsys.readouterr().out.endswith("awa2 is in data/awa2\n") and len(open_dataset("awa2", split="all")) == 12
    monkeypatch.setitem(download.ARCHIVES, "awa2", [("http://nowhere", "Animals_with_Attributes2", None)])
    main(["--download", "awa2"])  # it is there


def test_what_cannot_be_downloaded_is_an_error():
    for flags, message in [
        (["--download", "folder"], r"folder cannot be downloaded\. Put"),
        (["--download", "awa1"], "Did you mean 'awa2'"),
        (["--root", "x"], "--root goes with --download"),
    ]:
        with pytest.raises(UserError, match=message):
            main(flags)
