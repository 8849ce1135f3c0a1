"""Read other people's pickles that hold data: containers, numbers, strings, numpy arrays, torch tensors.

A pickle is a program: it names functions and calls them. Here it can name only the keys of `_ALLOWED`, each of which
stands for a checked function of this file. No attribute is ever set. The reader is the standard library's own, in
Python and not in C, because its BUILD can be replaced and its memo is a dict: ten hostile bytes cannot claim gigabytes.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from torch import Tensor

from pc_clip.core.errors import UserError

TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # the first object in a file of torch.save before its zip format
_DTYPE_CODE = re.compile(r"[<>=|]?(?:[?bhilqpBHILQPefdgFDG]|[biufc]\d{1,2}|[SU]\d{1,6})")
_NDARRAY = object()  # stands for numpy.ndarray, which only _reconstruct is given


class _Refused(Exception):
    """A forbidden request of a pickle, as the end of a sentence that begins with the file's name."""


def load(path: Path) -> Any:
    """The content of a pickle, or of a file of torch.save. Tensors come to the CPU.

    Raises UserError for a file that is absent, cut short or no pickle, and for one that asks for anything but data,
    with the name of what it asks for. Nothing of such a file has been called then.
    """
    if not path.is_file():
        raise UserError(f"no file at {path}")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content[:4] == b"PK\x03\x04":  # torch.save since 2020
                return _load_torch(path, mmap=True)
            value = _Reader(content).load()
        return _load_torch(path) if type(value) is int and value == TORCH_MAGIC else value
    except _Refused as refused:
        raise UserError(
            f"{path} {refused}; it was not opened, because a pickle can run code. "
            "Numbers, strings, containers, arrays and tensors are all that is read here."
        ) from refused
    except Exception as error:  # a damaged stream can end in any error of the reader's
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(
            f"{path} is not a whole pickle of data ({reason}); it may have been cut short, or be something else"
        ) from error


def _load_torch(source: Path | BinaryIO, **options: Any) -> Any:
    try:
        return torch.load(source, map_location="cpu", weights_only=True, **options)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise _Refused(f"asks for {name[1]}, which is not data" if name else "holds more than weights") from error


class _Reader(pickle._Unpickler):
    """The standard reader with a short list of names, and without the instructions that could do harm."""

    dispatch: ClassVar[dict[int, Callable]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """A function of this file, never the named thing itself. Python 2's and numpy 1's names are known too."""
        key = module.replace("__builtin__", "builtins").replace("numpy.core.", "numpy._core."), name
        if key not in _ALLOWED:
            raise _Refused(f"asks for {module}.{name}, which is not data")
        return _ALLOWED[key]

    def get_extension(self, code: int) -> None:  # its cache hands out objects without asking find_class
        raise _Refused("asks for an object by a number that this process may have given out (an extension code)")

    def load_build(self) -> None:
        """BUILD would set attributes, or hand a state to the object's own __setstate__."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _Dtype):  # (version, byte order, sub-array, names, fields, sizes and flags ...)
            plain = type(state) is tuple and len(state) >= 5 and state[2:5] == (None, None, None)
            _check(plain and state[1] in ("<", ">", "=", "|"), "an array of an odd type")
            target.real = target.real.newbyteorder(state[1])
        elif type(target) is np.ndarray:
            _, shape, dtype, fortran, data = state
            _array(data, dtype, shape)
            target.__setstate__((1, shape, dtype.real, bool(fortran), data))
        elif type(target) is not OrderedDict:  # whose attributes, a state dict's version numbers, are not data
            raise _Refused(f"sets attributes of a {type(target).__name__}")

    dispatch[pickle.BUILD[0]] = load_build


def _check(fits: bool, what: str) -> None:
    if not fits:
        raise _Refused(f"holds {what}")


def _typed(make: Callable, *types: type) -> Callable[..., Any]:
    """`make` for arguments of exactly these types: bytes(10**12), a terabyte, is not one of them."""

    def call(*arguments: Any) -> Any:
        _check(tuple(map(type, arguments)) == types, f"odd arguments for {make.__name__.strip('_')}")
        return make(*arguments)

    return call


def _encode(text: str, codec: str) -> bytes:
    """Protocols 0 to 2 write bytes as text in Latin-1. Other codecs decompress, or worse."""
    _check(codec in ("latin1", "latin-1"), "text of another codec")
    return text.encode("latin-1")


class _Dtype:
    """Stands for a numpy dtype: numpy's own takes flags from a pickle that make it read bytes as pointers."""

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        _check(type(code) is str and _DTYPE_CODE.fullmatch(code) is not None, f"an array of {str(code)[:20]!r}")
        self.real = np.dtype(code)


def _array(data: Any, dtype: Any, shape: Any) -> np.ndarray:
    """An array whose bytes are exactly as many as its shape says."""
    whole = type(shape) is tuple and all(type(n) is int and n >= 0 for n in shape)
    _check(isinstance(dtype, _Dtype) and type(data) is bytes and whole, "an odd array")
    _check(len(data) == math.prod(shape) * dtype.real.itemsize, "an array that does not fit its shape")
    return np.frombuffer(data, dtype.real).reshape(shape)


def _storage(data: bytes) -> Tensor:
    """Replaces torch.storage._load_from_bytes, an unchecked torch.load.  -> flat tensor"""
    storage = _load_torch(io.BytesIO(data))
    _check(isinstance(storage, torch.storage.TypedStorage), f"a {type(storage).__name__} where numbers should be")
    flat = torch.empty(0, dtype=storage.dtype).set_(storage)
    _check(flat.nbytes <= len(data), "a tensor longer than its numbers")
    return flat


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """as_strided refuses what reaches beyond the storage; few numbers that claim to be many are refused here."""
    _check(isinstance(storage, Tensor), "an odd tensor")
    _check(max(math.prod(size), offset) <= len(storage), "a tensor that reaches beyond its numbers")
    return storage.as_strided(size, stride, offset)


_ALLOWED: dict[tuple[str, str], Any] = {
    ("builtins", "bytes"): _typed(bytes),
    ("collections", "OrderedDict"): _typed(OrderedDict),
    ("_codecs", "encode"): _typed(_encode, str, str),
    ("numpy", "dtype"): lambda *arguments: _Dtype(*arguments),
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy._core.multiarray", "_reconstruct"): _typed(lambda *_: np.empty(0), object, tuple, bytes),  # for BUILD
    ("numpy._core.multiarray", "scalar"): lambda dtype, data: _array(data, dtype, ())[()],
    ("torch.storage", "_load_from_bytes"): _typed(_storage, bytes),
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
}
