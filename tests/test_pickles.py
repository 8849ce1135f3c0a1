"""Pickles of data come back as they were; those that ask for more are refused, and nothing of them has run."""

import codecs
import collections
import contextlib
import copyreg
import functools
import importlib
import io
import operator
import os
import pickle
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from pc_clip.core.errors import UserError
from pc_clip.release import safe_pickle

PROTOCOLS = (2, 4)
TRACE = Path("run.by.pickle")
COMMAND = f"touch {TRACE}"


def load(content: bytes):
    Path("file.pkl").write_bytes(content)
    return safe_pickle.load(Path("file.pkl"))


class Call:
    """Pickles as a call of anything. state: what BUILD is given."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


def same(a, b):
    if isinstance(a, torch.Tensor):
        return type(b) is torch.Tensor and a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return type(b) is np.ndarray and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


grid, line = torch.arange(12).reshape(3, 4), torch.arange(5.0)
DATA = {
    "plain": [None, True, 0, -1, 255, 65536, 10**40, 1.5, float("inf"), "é\n\u2028", "", b"", b"\xff\0"],
    "containers": {"a": [1, (2, (3,))], ("k", 1): {}, "many": list(range(1000)), "x": "x" * 100_000},
    "ordered": collections.OrderedDict(b=1, a=2),
    "arrays": [np.arange(6.0).reshape(2, 3), np.array(["ab", "c"]), np.array([True]), np.array(3), np.empty((0, 2))],
    "layouts": [np.asfortranarray(np.ones((2, 3))), np.arange(6).reshape(2, 3).T[::2]],
    "numbers": [np.float32(1.5), np.int64(-3), np.bool_(True), np.str_("text")],
    "tensors": [torch.arange(3), torch.tensor(2.5), torch.empty(0, 3), torch.ones(2).half(), torch.ones(2).bfloat16()],
    "views": [grid[1:, ::2], grid.t(), grid[2, 3], line, line[1:]],
    "large": torch.arange(200_000),
    "state": torch.nn.Linear(2, 3).state_dict(),
}  # fmt: skip


def test_data_comes_back_as_it_was():
    wrong = [(name, p) for name, data in DATA.items() for p in (0, *PROTOCOLS)
             if not same(data, load(pickle.dumps(data, p)))]  # fmt: skip
    assert not wrong
    of_numpy_1 = pickle.dumps([np.arange(3.0), np.float32(2)], 2).replace(b"numpy._core.", b"numpy.core.")
    assert same([np.arange(3.0), np.float32(2)], load(of_numpy_1))
    assert load(pickle.dumps(np.arange(3, dtype=">f8"), 4)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch_save_are_read_by_its_weights_only_loader(zipped):
    torch.save({"a": torch.arange(4), "b": [1, "x"]}, "file.pt", _use_new_zipfile_serialization=zipped)
    assert same({"a": torch.arange(4), "b": [1, "x"]}, safe_pickle.load(Path("file.pt")))
    torch.save({"a": Call(os.system, COMMAND)}, "file.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"file\.pt asks for posix\.system, which is not data"):
        safe_pickle.load(Path("file.pt"))
    assert not TRACE.exists()


# -- attacks -------------------------------------------------------------------------------------------


def nested(content: bytes) -> Call:
    """A tensor's numbers, which torch itself would unpickle without any check."""
    return Call(torch.storage._load_from_bytes, content)


def legacy(target: bytes, keys=()) -> bytes:
    """A file of torch's old format: three pickles in front, then `target`."""
    front = [safe_pickle.TORCH_MAGIC, 1001, {"protocol_version": 1001, "little_endian": True}]
    return b"".join(pickle.dumps(each, 2) for each in front) + target + pickle.dumps(list(keys), 2)


def array(*state) -> Call:
    return Call(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b", state=state)


def dtype(*state) -> Call:
    return Call(np.dtype, "f8", False, True, state=state)


def tensor(offset, size, stride) -> Call:
    return Call(torch._utils._rebuild_tensor_v2, torch.arange(4.0)._typed_storage(), offset, size, stride, False, {})


SYSTEM = Call(os.system, COMMAND)
BIG_STORAGE = (
    b"\x80\x02(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu"
    + b"J" + struct.pack("<i", 2**30) + b"Nt" + pickle.BINPERSID + b"."
)  # fmt: skip
OBJECTS = {  # pickled with each protocol
    "os.system": SYSTEM, "subprocess.Popen": Call(subprocess.Popen, ["touch", str(TRACE)]),
    "eval": Call(eval, f"open({str(TRACE)!r}, 'w')"), "exec": Call(exec, f"open({str(TRACE)!r}, 'w')"),
    "open": Call(open, str(TRACE), "w"), "getattr": Call(getattr, "text", "upper"), "pathlib": Call(Path, "x"),
    "functools.partial": functools.partial(os.system, COMMAND), "operator.attrgetter": operator.attrgetter("system"),
    "operator.methodcaller": operator.methodcaller("upper"),
    "importlib": Call(importlib.import_module, "antigravity"), "torch.load": Call(torch.load, "other.pt", None, None),
    "pickle.loads": Call(pickle.loads, pickle.dumps(SYSTEM)), "np.load": Call(np.load, "x.npy"),
    "copyreg": Call(copyreg._reconstructor, object, object, None), "codecs.decode": Call(codecs.decode, "wr", "rot13"),
    "nested": nested(pickle.dumps(SYSTEM, 2)), "nested, protocol 4": nested(pickle.dumps(SYSTEM, 4)),
    "nested in torch's format": nested(legacy(pickle.dumps(SYSTEM, 2))),
    "nested in a large one": nested(pickle.dumps(["x" * 100_000, SYSTEM], 2)),
    "nested, of a path": nested("other.pt"), "nested, too long": nested(legacy(BIG_STORAGE)),
    "object array": np.array([SYSTEM, 1], dtype=object), "object array of data": np.array([{}, 1], dtype=object),
    "key of a dict": {SYSTEM: 1}, "inside of data": {"z": torch.ones(2), "captions": [[SYSTEM]]},
    "bytes of a length": Call(bytes, 10**12), "bytearray of a length": Call(bytearray, 10**12),
    "set": {SYSTEM}, "set of data": Call(set, [1]), "complex": Call(complex, 1.0, 2.0),
    "OrderedDict of a string": Call(collections.OrderedDict, "ab"), "zlib": Call(codecs.encode, b"x", "zlib"),
    "idna": Call(codecs.encode, "x", "idna"), "dtype of objects": Call(np.dtype, "O8"),
    "dtype of fields": Call(np.dtype, "i4,O"), "dtype of a list": Call(np.dtype, []), "void": Call(np.dtype, "V8"),
    "array of another class": Call(np._core.multiarray._reconstruct, None, (), None),
    "array too long": array(1, (2**40,), np.dtype("f8"), False, b"x" * 8),
    "array of less than nothing": array(1, (-1,), np.dtype("f8"), False, b""),
    "array of a fraction": array(1, (2.0,), np.dtype("f8"), False, b"x" * 16),
    "array of a list": array(1, (2,), np.dtype("f8"), False, [1, 2]), "array of four": array(1, (2,), "f8", False),
    "array of a name": array(1, (2,), "f8", False, b"x" * 16), "state of a dtype": dtype(3),
    "fields": dtype(3, "|", None, ("a",), {"a": (np.dtype("f8"), 0)}, 8, 1, 27),
    "sub-array": dtype(3, "|", (np.dtype("f8"), (4,)), None, None, 8, 1, 0),
    "bytes as pointers": dtype(3, "O", None, None, None, 8, 8, 63),
    **{f"tensor {case}": tensor(*case) for case in (
        (1, (4,), (1,)), (0, (5,), (1,)), (0, (2, 2), (4, 1)), (-1, (2,), (1,)), (0, (-1,), (1,)), (0, (2,), (-1,)),
        (0, (2**40, 2**40), (0, 0)), (5, (0,), (1,)), (0, (2,), ()), (0.0, (2,), (1,)))},
}  # fmt: skip


def text(value: str) -> bytes:
    return pickle.SHORT_BINUNICODE + bytes([len(value.encode())]) + value.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + pickle.STACK_GLOBAL


DOTTED = [("collections", "OrderedDict.fromkeys"), ("collections", "abc.sys.modules"), ("torch.storage", "os.system"),
          ("collections.OrderedDict", "__init__"), ("torch._utils", "_rebuild_tensor_v2.__globals__"), ("", ""),
          ("numpy", "dtype.type"), ("pc_clip.release.safe_pickle", "_tensor"), ("__main__", "x")]  # fmt: skip
MAKERS = [named(*key) for key in safe_pickle._ALLOWED]
STATE = pickle.EMPTY_DICT + text("__code__") + b"K\x01" + pickle.SETITEM
SLOTS = b"N" + STATE + pickle.TUPLE2  # (None, {...}): the form that calls setattr
HUGE = struct.pack("<Q", 10**15)
STREAMS = [  # written by hand
    *(named(*name) for name in DOTTED), pickle.EMPTY_LIST + text("x") + pickle.STACK_GLOBAL,
    pickle.EXT1 + b"\x07", pickle.EXT2 + b"\x07\0", pickle.EXT4 + b"\x07\0\0\0",
    pickle.EXT1 + b"\x07(" + text(COMMAND) + b"tR", b"Pos.system\n", b"K\x01" + pickle.BINPERSID,
    b"(S'touch run.by.pickle'\nios\nsystem\n", b"(cos\nsystem\nS'x'\no",
    *(maker + b")" + new for maker in MAKERS for new in (pickle.NEWOBJ, pickle.EMPTY_DICT + pickle.NEWOBJ_EX)),
    *(target + state + pickle.BUILD for target in (b"N", b"]", b"}", *MAKERS) for state in (STATE, SLOTS)),
    pickle.dumps(torch.ones(2), 4)[2:-1] + STATE + pickle.BUILD,
    pickle.BINBYTES8 + HUGE + b"N", pickle.BINUNICODE8 + HUGE + b"N", pickle.BYTEARRAY8 + HUGE + b"N",
    pickle.LONG4 + b"\xff\xff\xff\x7fN",
]  # fmt: skip


def test_every_attack_is_refused_and_has_no_effect():
    copyreg.add_extension("os", "system", 7)
    try:
        assert pickle.loads(b"\x80\x02" + pickle.EXT1 + b"\x07.") is os.system  # now it is in pickle's cache
        attacks = {(name, p): pickle.dumps(value, p) for name, value in OBJECTS.items() for p in PROTOCOLS}
        attacks |= {("stream", n): b"\x80\x04" + stream + b"." for n, stream in enumerate(STREAMS)}
        before, opened = dict(safe_pickle._ALLOWED), []
        for name, content in attacks.items():
            with contextlib.suppress(UserError):
                opened.append((name, load(content)))
    finally:
        copyreg.remove_extension("os", "system", 7)
        copyreg.clear_extension_cache()
    assert not opened and not TRACE.exists() and before == safe_pickle._ALLOWED
    with pytest.raises(UserError, match=r"^file\.pkl asks for posix\.system, which is not data; it was not opened"):
        load(pickle.dumps(SYSTEM))


def test_the_attacks_would_work_on_pickle_itself():
    """Otherwise the test above would show nothing."""
    for name in ("os.system", "eval", "nested", "nested in torch's format", "set"):
        with contextlib.suppress(RuntimeError, TypeError):  # after the deed: its value was of no use
            pickle.loads(pickle.dumps(OBJECTS[name]))
        assert TRACE.exists(), name
        TRACE.unlink()


def test_ordered_dict_attributes_are_dropped_and_large_memos_allocate_nothing():
    stream = named("collections", "OrderedDict") + b")R" + STATE + pickle.BUILD
    value = load(b"\x80\x04" + stream + b".")
    assert type(value) is collections.OrderedDict and not vars(value)
    assert load(b"\x80\x04N" + pickle.LONG_BINPUT + b"\xff\xff\xff\x7f.") is None  # C's memo would take 64 GB


# -- damage --------------------------------------------------------------------------------------------


def test_a_file_cut_short_anywhere_is_an_error_of_the_user():
    for protocol in PROTOCOLS:
        content = pickle.dumps({"z": torch.arange(40_000.0), "captions": [{"caption": "é", "row": 1}]}, protocol)
        for keep in [*range(0, 60), len(content) // 2, len(content) - 3, len(content) - 1]:
            with pytest.raises(UserError, match=r"^file\.pkl (is not a whole pickle|asks for)"):
                load(content[:keep])


def test_no_file_and_other_files_are_errors_of_the_user():
    with pytest.raises(UserError, match="no file at none.pkl"):
        safe_pickle.load(Path("none.pkl"))
    out = io.BytesIO()
    np.save(out, np.ones(2))
    for content in (b"", b"<!DOCTYPE html>", b"hello\n", b"PK\x03\x04", b"PK\x03\x04" + b"x" * 100, bytes(100),
                    b"\x80\xff.", out.getvalue()):  # fmt: skip
        with pytest.raises(UserError, match="not a whole pickle"):
            load(content)
