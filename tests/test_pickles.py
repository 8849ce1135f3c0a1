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
import posix
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from pc_clip.core.errors import UserError
from pc_clip.release import safe_pickle

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # of torch, about nested hostile ones
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
TRACE = Path("run.by.pickle")
COMMAND = f"touch {TRACE}"


def load(content: bytes):
    Path("file.pkl").write_bytes(content)
    return safe_pickle.load(Path("file.pkl"))


class Call:
    """Pickles as a call of anything."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

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


# -- data ----------------------------------------------------------------------------------------------

grid = torch.arange(12).reshape(3, 4)
shared = torch.arange(5.0)
DATA = {
    "plain": [None, True, False, 0, -1, 255, 65536, 10**40, 1.5, float("inf"), 2 - 3j, "é\n\u2028", "", b"", b"\xff\0"],
    "containers": {"a": [1, (2, (3,))], ("k", 1): {}, "set": {1, 2}, "frozen": frozenset("ab"), "b": bytearray(b"x")},
    "many": [list(range(1000)), {n: str(n) for n in range(1000)}, "x" * 100_000, b"y" * 100_000],
    "ordered": collections.OrderedDict(b=1, a=2),
    "arrays": [np.arange(6.0).reshape(2, 3), np.array(["ab", "c"]), np.array([True]), np.array(3), np.empty((0, 2))],
    "layouts": [np.asfortranarray(np.ones((2, 3))), np.arange(6).reshape(2, 3).T[::2], np.arange(2.0).astype("f2")],
    "numbers": [np.float32(1.5), np.int64(-3), np.bool_(True), np.str_("text")],
    "tensors": [torch.arange(3), torch.tensor(2.5), torch.empty(0, 3), torch.ones(2).half(), torch.ones(2).bfloat16()],
    "views": [grid[1:, ::2], grid.t(), grid[2, 3]],
    "shared": [shared, shared[1:]],
    "large": torch.arange(200_000),
    "of torch": [torch.Size([2, 3]), torch.float32, torch.device("cpu")],
    "state": torch.nn.Linear(2, 3).state_dict(),
}  # fmt: skip


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", DATA)
def test_data_comes_back_as_it_was(name, protocol):
    assert same(DATA[name], load(pickle.dumps(DATA[name], protocol)))


def test_tensors_that_shared_memory_still_do_and_parameters_are_tensors():
    both, again = load(pickle.dumps([shared, shared[1:]]))[:2], load(pickle.dumps([shared] * 2))
    assert torch.equal(both[0][1:], both[1])
    assert again[0] is again[1]
    found = load(pickle.dumps(torch.nn.Parameter(torch.ones(2))))
    assert type(found) is torch.Tensor
    assert not found.requires_grad


@pytest.mark.parametrize("core", ["core", "_core"])
def test_numpys_names_before_and_since_version_2_are_known(core):
    content = pickle.dumps([np.arange(3.0), np.float32(2)], 2).replace(b"numpy._core.", f"numpy.{core}.".encode())
    assert same([np.arange(3.0), np.float32(2)], load(content))


def test_big_endian_arrays_keep_their_values():
    assert load(pickle.dumps(np.arange(3, dtype=">i4"), 4)).tolist() == [0, 1, 2]
    assert load(pickle.dumps(np.arange(3, dtype=">f8"), 5)).tolist() == [0, 1, 2]


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


def legacy(target) -> bytes:
    """A file of torch's old format: three pickles in front, then `target`."""
    front = [safe_pickle.TORCH_MAGIC, 1001, {"protocol_version": 1001, "little_endian": True}]
    return b"".join(pickle.dumps(each, 2) for each in [*front, target, []])


WRITE = f"open({str(TRACE)!r}, 'w')"
ATTACKS = {
    "os.system": (Call(os.system, COMMAND), "posix.system"),
    "posix.system": (Call(posix.system, COMMAND), "posix.system"),
    "subprocess.Popen": (Call(subprocess.Popen, ["touch", str(TRACE)]), "(subprocess|commands).Popen"),
    "eval": (Call(eval, WRITE), "builtins.eval"),
    "exec": (Call(exec, WRITE), "builtins.exec"),
    "open": (Call(open, str(TRACE), "w"), "io.open"),
    "getattr": (Call(getattr, "text", "upper"), "builtins.getattr"),
    "a class of ours": (Call(Path, "x"), r"pathlib.\w+"),
    "functools.partial": (functools.partial(os.system, COMMAND), "functools.partial"),
    "operator.attrgetter": (operator.attrgetter("system"), "operator.attrgetter"),
    "operator.methodcaller": (operator.methodcaller("upper"), "operator.methodcaller"),
    "importlib.import_module": (Call(importlib.import_module, "antigravity"), "importlib.import_module"),
    "torch.load": (Call(torch.load, "other.pt", None, None), "torch.serialization.load"),
    "pickle.loads": (Call(pickle.loads, pickle.dumps(Call(os.system, COMMAND))), r"\w*ickle.loads"),
    "copyreg": (Call(copyreg._reconstructor, object, object, None), "copy_?reg._reconstructor"),
    "codecs.decode": (Call(codecs.decode, "wrs", "rot13"), "_codecs.decode"),
    "np.load": (Call(np.load, "x.npy"), r"numpy.\w+"),
    "nested load": (nested(pickle.dumps(Call(os.system, COMMAND), 2)), "posix.system"),
    "nested load, protocol 4": (nested(pickle.dumps(Call(os.system, COMMAND), 4)), "more than weights"),
    "nested load of torch's format": (nested(legacy(Call(os.system, COMMAND))), "posix.system"),
    "nested load in a large one": (nested(pickle.dumps(["x" * 100_000, Call(os.system, COMMAND)], 2)), "posix.system"),
    "object array": (np.array([Call(os.system, COMMAND), 1], dtype=object), "an array of 'O8'|posix.system"),
    "object array of data": (np.array([{}, 1], dtype=object), "an array of 'O8'"),
    "key of a dict": ({Call(os.system, COMMAND): 1}, "posix.system"),
    "set": ({Call(os.system, COMMAND)}, "posix.system"),
    "inside of data": ({"clip_embedding": torch.ones(2), "captions": [[Call(os.system, COMMAND)]]}, "posix.system"),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_by_name_and_has_no_effect(name, protocol):
    content, asked = ATTACKS[name]
    asked = asked if "'" in asked else rf"({asked.replace('builtins', '(builtins|__builtin__)')})"
    with pytest.raises(UserError, match=rf"^file\.pkl (asks for|holds) .*{asked}.*it was not opened"):
        load(pickle.dumps(content, protocol))
    assert not TRACE.exists()


def test_the_attacks_would_work_on_pickle_itself():
    """Otherwise the tests above would show nothing."""
    for name in ("os.system", "eval", "nested load", "nested load of torch's format", "set"):
        with contextlib.suppress(RuntimeError, TypeError):  # after the deed: what it gave back was of no use
            pickle.loads(pickle.dumps(ATTACKS[name][0]))
        assert TRACE.exists()
        TRACE.unlink()


def text(value: str) -> bytes:
    return pickle.SHORT_BINUNICODE + bytes([len(value.encode())]) + value.encode()


def name_of(module: str, name: str) -> bytes:
    return text(module) + text(name) + pickle.STACK_GLOBAL


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + pickle.MARK + b"".join(arguments) + pickle.TUPLE + pickle.REDUCE


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("collections", "OrderedDict.fromkeys"),
        ("collections", "abc.sys.modules"),
        ("collections.OrderedDict", "__init__"),
        ("torch.storage", "os.system"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("numpy", "dtype.type"),
        ("builtins", "set.__class__"),
        ("pc_clip.release.safe_pickle", "_tensor"),
        ("__main__", "anything"),
        ("", ""),
    ],
)
def test_a_dotted_name_reaches_nothing(module, name):
    """Protocol 4 looks a dotted name up attribute by attribute."""
    with pytest.raises(UserError, match=r"asks for .*which is not data"):
        load(b"\x80\x04" + name_of(module, name) + b".")


def test_a_name_that_is_no_string_is_refused():
    with pytest.raises(UserError, match="not a whole pickle"):
        load(b"\x80\x04" + pickle.EMPTY_LIST + text("x") + pickle.STACK_GLOBAL + b".")


@pytest.mark.parametrize("code", [pickle.EXT1 + b"\x07", pickle.EXT2 + b"\x07\0", pickle.EXT4 + b"\x07\0\0\0"])
def test_extension_codes_are_refused_even_those_used_before(code):
    """pickle keeps what a code stood for once, and then gives it out without asking for its name again."""
    copyreg.add_extension("os", "system", 7)
    try:
        assert pickle.loads(b"\x80\x02" + code + b".") is os.system
        with pytest.raises(UserError, match="extension code"):
            load(call(b"\x80\x02" + code, text(COMMAND)) + b".")
    finally:
        copyreg.remove_extension("os", "system", 7)
        copyreg.clear_extension_cache()
    assert not TRACE.exists()


@pytest.mark.parametrize("content", [b"Pos.system\n.", b"\x80\x02" + b"K\x01" + pickle.BINPERSID + b"."])
def test_persistent_ids_are_refused(content):
    with pytest.raises(UserError, match="persistent id"):
        load(content)


@pytest.mark.parametrize("protocol0", [b"(S'touch run.by.pickle'\nios\nsystem\n.", b"(cos\nsystem\nS'x'\no."])
def test_the_old_instructions_for_instances_ask_by_name_too(protocol0):
    with pytest.raises(UserError, match=r"asks for os\.system"):
        load(protocol0)
    assert not TRACE.exists()


@pytest.mark.parametrize("new", [pickle.NEWOBJ, pickle.EMPTY_DICT + pickle.NEWOBJ_EX])
def test_what_stands_for_a_class_cannot_be_instantiated_by_hand(new):
    for module, name in safe_pickle._KNOWN:
        with pytest.raises(UserError):
            load(b"\x80\x04" + name_of(module, name) + b")" + new + b".")


def test_no_attribute_can_be_set_on_anything():
    state = pickle.EMPTY_DICT + text("__code__") + b"K\x01" + pickle.SETITEM
    slots = b"N" + state + pickle.TUPLE2  # (None, {...}): the form that calls setattr
    tensor = pickle.dumps(torch.ones(2), 4)[:-1]
    makers = [name_of(module, name) for module, name in safe_pickle._KNOWN]
    for target in [b"N", b"]", b"}", tensor[2:], *makers]:
        for how in (state, slots):
            with pytest.raises(UserError, match="sets attributes of"):
                load(b"\x80\x04" + target + how + pickle.BUILD + b".")
    for how in (state, slots):
        found = load(b"\x80\x04" + call(name_of("collections", "OrderedDict")) + how + pickle.BUILD + b".")
        assert type(found) is collections.OrderedDict
        assert not vars(found)


def test_a_pickle_changes_nothing_that_the_next_one_uses():
    before = dict(safe_pickle._KNOWN), dict(pickle._Unpickler.dispatch)
    for name, (content, _) in ATTACKS.items():
        with pytest.raises(UserError):
            load(pickle.dumps(content))
        assert same(DATA["tensors"], load(pickle.dumps(DATA["tensors"]))), name
    assert before == (safe_pickle._KNOWN, pickle._Unpickler.dispatch)


def integer(value: int) -> bytes:
    return pickle.LONG1 + bytes([9]) + value.to_bytes(9, "little", signed=True)


HOSTILE_CALLS = {
    "bytes of a length": call(name_of("builtins", "bytes"), integer(10**12)),
    "bytearray of a length": call(name_of("builtins", "bytearray"), integer(10**12)),
    "set of a string": call(name_of("builtins", "set"), text("abc")),
    "codec that decompresses": call(name_of("_codecs", "encode"), b"C\x01x", text("zlib")),
    "codec by another name": call(name_of("_codecs", "encode"), text("x"), text("idna")),
    "complex of a string": call(name_of("builtins", "complex"), text("1"), text("2")),
    "dtype of objects": call(name_of("numpy", "dtype"), text("O8")),
    "dtype of fields": call(name_of("numpy", "dtype"), text("i4,O")),
    "dtype of a list": call(name_of("numpy", "dtype"), b"]"),
    "void dtype": call(name_of("numpy", "dtype"), text("V8")),
    "array of another class": call(name_of("numpy.core.multiarray", "_reconstruct"), b"N", b")", b"N"),
    "nested, of a string": call(name_of("torch.storage", "_load_from_bytes"), text("other.pt")),
    "size of negatives": call(name_of("torch", "Size"), integer(-1) + pickle.TUPLE1),
    "device of a number": call(name_of("torch", "device"), integer(5)),
    "OrderedDict of a string": call(name_of("collections", "OrderedDict"), text("ab")),
    "hooks of a tensor": call(
        name_of("torch._utils", "_rebuild_tensor_v2"), b"N", b"K\0", b")", b")", pickle.NEWFALSE, b"}K\x01K\x01s"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_CALLS)
def test_a_known_name_with_arguments_that_do_not_belong_to_it_is_refused(name):
    with pytest.raises(UserError, match="holds .*it was not opened"):
        load(b"\x80\x04" + HOSTILE_CALLS[name] + b".")


def scraped(value, reduced):
    out = io.BytesIO()

    class Pickler(pickle.Pickler):
        def reducer_override(self, item):
            return reduced if item is value else NotImplemented

    Pickler(out, 4).dump(value)
    return out.getvalue()


def test_an_array_cannot_pass_its_bytes_off_as_pointers_or_as_more_than_they_are():
    """numpy takes from a dtype's state the flags by which it decides whether bytes are pointers."""
    empty = (np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"))
    array, plain = np.zeros(2), np.dtype("f8")
    for state in [
        (1, (2**40,), plain, False, b"x" * 8),
        (1, (-1,), plain, False, b""),
        (1, (2.0,), plain, False, b"x" * 16),
        (1, (2,), plain, False, [1, 2]),
        (1, (2,), "f8", False, b"x" * 16),
        (1, (2,), plain, False),
        "state",
    ]:
        with pytest.raises(UserError, match=r"holds an (odd )?array"):
            load(scraped(array, (*empty, state)))
    dtype = np.dtype([("a", "f8")])
    for state in [
        (3, "|", None, ("a",), {"a": (plain, 0)}, 8, 1, 27),
        (3, "|", (plain, (4,)), None, None, 8, 1, 0),
        (3, "O", None, None, None, 8, 8, 63),
        (3,),
        None,
    ]:
        content = scraped(dtype, (np.dtype, ("f8", False, True), state))
        if state is None:
            assert load(content).real == plain  # no BUILD at all
            continue
        with pytest.raises(UserError, match="odd type"):
            load(content)


def test_a_tensor_cannot_reach_beyond_its_numbers():
    value = torch.arange(4.0)
    storage = value._typed_storage()
    rebuild, rest = torch._utils._rebuild_tensor_v2, (False, collections.OrderedDict())
    good = scraped(value, (rebuild, (storage, 1, (3,), (1,), *rest)))
    assert load(good).tolist() == [1, 2, 3]
    for offset, size, stride in [
        (1, (4,), (1,)),
        (0, (5,), (1,)),
        (0, (2, 2), (4, 1)),
        (-1, (2,), (1,)),
        (0, (-1,), (1,)),
        (0, (2,), (-1,)),
        (0, (2**40, 2**40), (0, 0)),  # few numbers that claim to be many
        (5, (0,), (1,)),
        (0, (2,), ()),
        (0.0, (2,), (1,)),
    ]:
        with pytest.raises(UserError, match="holds (a tensor that reaches beyond|an odd tensor)"):
            load(scraped(value, (rebuild, (storage, offset, size, stride, *rest))))


def test_a_few_bytes_cannot_claim_much_memory():
    huge = struct.pack("<Q", 10**15)
    assert load(b"\x80\x04" + pickle.FRAME + huge + b"N.") is None  # a frame only announces
    for content in [
        b"\x80\x04" + pickle.BINBYTES8 + huge + b"N.",
        b"\x80\x04" + pickle.BINUNICODE8 + huge + b"N.",
        b"\x80\x04" + name_of("torch.storage", "_load_from_bytes") + pickle.BINBYTES8 + huge + b"N.",
        b"\x80\x04" + pickle.LONG4 + b"\xff\xff\xff\x7f" + b"N.",
    ]:
        with pytest.raises(UserError, match=r"not a whole pickle \(it ends \d+ bytes too early\)"):
            load(content)
    with pytest.raises(UserError, match="not a whole pickle"):
        load(b"\x80\x05" + pickle.BYTEARRAY8 + huge + b"N.")
    assert load(b"\x80\x04N" + pickle.LONG_BINPUT + b"\xff\xff\xff\x7f.") is None  # C's memo would take 64 GB


def test_a_large_tensor_inside_of_a_frame_is_found_where_it_is():
    """The standard pickler puts large bytes between frames; others need not."""
    value = [torch.arange(50_000), "after"]
    body = pickle.dumps(value, 3)[2:]
    assert same(value, load(b"\x80\x04" + pickle.FRAME + struct.pack("<Q", len(body)) + body))


def test_a_storage_that_says_it_is_longer_than_its_file_is_refused():
    content = legacy("x")[:-3]  # without the target and the list of keys
    front = b"".join(pickle.dumps(e, 2) for e in [safe_pickle.TORCH_MAGIC, 1001, {"little_endian": True}])
    target = (
        b"\x80\x02(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu"
        + b"J" + struct.pack("<i", 2**30) + b"Nt" + pickle.BINPERSID + b"."
    )  # fmt: skip
    assert content
    with pytest.raises(UserError, match="longer than its numbers|not a whole pickle"):
        load(pickle.dumps(nested(front + target + pickle.dumps([], 2))))


# -- damage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_file_cut_short_anywhere_is_said_to_be(protocol):
    content = pickle.dumps({"z": torch.arange(40_000.0), "captions": [{"caption": "é", "row": 1}]}, protocol)
    for keep in [*range(0, 60), len(content) // 2, len(content) - 3, len(content) - 1]:
        with pytest.raises(UserError, match=r"^file\.pkl is not a whole pickle"):
            load(content[:keep])


def test_no_file_an_empty_one_and_text_are_errors_of_the_user():
    with pytest.raises(UserError, match="no file at none.pkl"):
        safe_pickle.load(Path("none.pkl"))
    for content in [
        b"",
        b"<!DOCTYPE html>",
        b"hello\n",
        b"PK\x03\x04",
        b"PK\x03\x04" + b"x" * 100,
        bytes(100),
        b"\x80\xff.",
    ]:
        with pytest.raises(UserError, match="not a whole pickle"):
            load(content)


def test_random_damage_ends_in_data_or_in_an_error_of_the_user():
    rng = np.random.default_rng(0)
    content = pickle.dumps([torch.arange(3.0), np.arange(3), {"a": {1, 2}}, "text"], 4)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for at in rng.integers(len(content), size=3):
            damaged[at] = rng.integers(256)
        try:
            load(bytes(damaged))
        except UserError:
            refused += 1
    assert refused > 100
