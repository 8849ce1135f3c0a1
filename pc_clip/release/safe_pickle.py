"""Read other people's pickles that hold data: containers, numbers, strings, numpy arrays, torch tensors.

A pickle is a program: it names functions and calls them. Here it can name only what is in `_KNOWN`, and each
of those is a function of this file that checks what it is given. Nothing it names is looked up anywhere
else, no attribute is ever set, and nothing it built earlier in the process (copyreg's extension codes) is
reached. What is refused is named.

The reader is the standard library's own, in Python and not in C, because only that one lets BUILD be replaced
(joblib does the same) and keeps its memo in a dict, so that ten hostile bytes cannot claim gigabytes.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from torch import Tensor

from pc_clip.core.errors import UserError

LARGE = 1 << 16  # bytes above which it is worth asking whether the file is that long
TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # the first object in a file of torch.save before its zip format
_DTYPE_CODE = re.compile(r"[<>=|]?(?:[?bhilqpBHILQPefdgFDG]|[biufc]\d{1,2}|[SU]\d{1,6})")


class _Refused(Exception):
    """What the pickle wants and will not get: the end of a sentence that begins with the file's name."""


def load(path: Path) -> Any:
    """What a pickle (protocol 0 to 5) or a file of torch.save holds. Tensors come to the CPU.

    Storages come as flat tensors, parameters as tensors; attributes of an OrderedDict are left out.
    Raises UserError for a file that is absent, cut short or no pickle, and for one that asks for anything but
    data, with the name of what it asks for. Nothing of such a file has been called then.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file at {path}")
    try:
        with path.open("rb") as file:
            if file.read(4) == b"PK\x03\x04":  # torch.save since 2020
                return _load_torch(path, mmap=True)
            file.seek(0)
            found = _Reader(_File(file)).load()
        return _load_torch(path) if type(found) is int and found == TORCH_MAGIC else found
    except _Refused as refused:
        raise UserError(
            f"{path} {refused}; it was not opened, because a pickle can run code. "
            "Numbers, strings, containers, arrays and tensors are all that is read here."
        ) from refused
    except OSError:
        raise
    except Exception as error:  # a damaged stream can end in any error of the reader's
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(
            f"{path} is not a whole pickle ({reason}); it may have been cut short, or be something else"
        ) from error


def _load_torch(source: Path | BinaryIO, **options: Any) -> Any:
    try:
        return torch.load(source, map_location="cpu", weights_only=True, **options)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise _Refused(f"asks for {found[1]}, which is not data" if found else "holds more than weights") from error


# -- the reader ----------------------------------------------------------------------------------------


class _File:
    """What the reader reads from. A length beyond the file's end is an error before memory is asked for."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.tell, self.seek = file, file.tell, file.seek
        self.size = file.seek(0, io.SEEK_END)
        file.seek(0)

    def read(self, n: int) -> bytes:
        if n > LARGE and n > self.size - self.tell():
            raise EOFError(f"it ends {n - self.size + self.tell()} bytes too early")
        return self.file.read(n)

    def readline(self) -> bytes:
        line = self.file.readline()
        if not line.endswith(b"\n"):
            raise EOFError("it ends within a line")
        return line


class _Reader(pickle._Unpickler):
    """The standard reader with a short list of names, and without the instructions that could do harm."""

    dispatch: ClassVar[dict[int, Callable]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: _File) -> None:
        super().__init__(file)
        self.file = file

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name: never the thing itself. A dotted name is in no list."""
        if (module, name) not in _KNOWN:
            raise _Refused(f"asks for {module}.{name}, which is not data")
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("refers to objects outside of it (a persistent id)")

    def load_extension(self) -> None:
        raise _Refused("asks for an object by a number that this process may have given out (an extension code)")

    def load_build(self) -> None:
        """BUILD would set attributes, or hand a state to the object's own __setstate__."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, _Dtype):
            target.take_order(state)
        elif type(target) is np.ndarray:
            _fill_array(target, state)
        elif type(target) is not OrderedDict:  # whose attributes, a state dict's version numbers, are no data
            raise _Refused(f"sets attributes of a {type(target).__name__}")

    def load_frame(self) -> None:
        """A frame only announces how much comes next. Unread, it keeps the file's position exact."""
        self.read(8)

    def load_binbytes(self) -> None:
        self._append_bytes(*struct.unpack("<I", self.read(4)))

    def load_binbytes8(self) -> None:
        self._append_bytes(*struct.unpack("<Q", self.read(8)))

    def _append_bytes(self, length: int) -> None:
        """Bytes; those of a tensor stay in the file, so that it is in memory once and not twice."""
        if length > LARGE and self.stack and self.stack[-1] is _storage:
            self.append(_Window(self.file, length))
        else:
            self.append(self.read(length))

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.FRAME[0]] = load_frame
    dispatch[pickle.BINBYTES[0]] = load_binbytes
    dispatch[pickle.BINBYTES8[0]] = load_binbytes8
    for opcode in (pickle.EXT1, pickle.EXT2, pickle.EXT4):
        dispatch[opcode[0]] = load_extension


class _Window(io.RawIOBase):
    """A stretch of the file that begins where it stands, as a file of its own. Making one steps over it."""

    def __init__(self, file: _File, length: int) -> None:
        self.source, self.start, self.length, self.at = file, file.tell(), length, 0
        if length > file.size - self.start:
            raise EOFError(f"it ends {length - file.size + self.start} bytes too early")
        file.seek(length, io.SEEK_CUR)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.length)[whence]
        return self.at

    def readinto(self, buffer: memoryview) -> int:
        back = self.source.tell()
        self.source.seek(self.start + self.at)
        count = self.source.file.readinto(memoryview(buffer)[: max(0, self.length - self.at)])
        self.source.seek(back)
        self.at += count
        return count


# -- what stands for the names: python -----------------------------------------------------------------


def _check(fits: bool, what: str) -> None:
    if not fits:
        raise _Refused(f"holds {what}")


def _ordered_dict(*items: Any) -> OrderedDict:
    _check(len(items) <= 1 and all(type(i) in (list, dict) for i in items), "an odd OrderedDict")
    return OrderedDict(*items)


def _collection(kind: type) -> Callable[..., Any]:
    def make(*items: Any) -> Any:
        _check(len(items) <= 1 and all(type(i) is list for i in items), f"an odd {kind.__name__}")
        return kind(*items)

    return make


def _complex(real: Any, imaginary: Any) -> complex:
    _check(type(real) is float and type(imaginary) is float, "an odd complex number")
    return complex(real, imaginary)


def _encode(text: Any, codec: Any) -> bytes:
    """How protocols 0 to 2 write bytes: `_codecs.encode(text, "latin1")`. Other codecs decompress, or worse."""
    _check(type(text) is str and codec in ("latin1", "latin-1"), "an odd encoded string")
    return text.encode("latin-1")


def _bytes(*nothing: Any) -> bytes:
    _check(not nothing, "odd bytes")  # bytes(10**12) would be a terabyte
    return b""


def _bytearray(*content: Any) -> bytearray:
    if len(content) == 2:
        content = (_encode(*content),)
    _check(len(content) <= 1 and all(type(c) is bytes for c in content), "an odd bytearray")
    return bytearray(*content)


# -- numpy ---------------------------------------------------------------------------------------------


class _Dtype:
    """Stands for a numpy dtype: numpy's own takes flags from a pickle that make it read bytes as pointers."""

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        _check(type(code) is str and _DTYPE_CODE.fullmatch(code) is not None, f"an array of {str(code)[:20]!r}")
        self.real = np.dtype(code)

    def take_order(self, state: Any) -> None:
        """numpy's state: (version, byte order, sub-array, names, fields, sizes and flags that follow from the code)."""
        plain = isinstance(state, tuple) and 5 <= len(state) <= 8 and state[2:5] == (None, None, None)
        _check(plain and state[1] in ("<", ">", "=", "|"), "an array of an odd type")
        self.real = self.real.newbyteorder(state[1])


def _dtype(*arguments: Any) -> _Dtype:
    return _Dtype(*arguments)


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)


def _empty_array(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """`_reconstruct(ndarray, (0,), b"b")`; BUILD fills it."""
    _check(kind is _NDARRAY, "an array of another class")
    return np.empty(0)


def _fill_array(array: np.ndarray, state: Any) -> None:
    """numpy's state: (version, shape, dtype, whether in Fortran's order, the bytes)."""
    _check(isinstance(state, tuple) and len(state) == 5 and isinstance(state[2], _Dtype), "an odd array")
    _, shape, dtype, fortran, data = state
    fits = _is_shape(shape) and type(data) is bytes and len(data) == math.prod(shape) * dtype.real.itemsize
    _check(fits, "an array that does not fit its shape")
    array.__setstate__((1, shape, dtype.real, bool(fortran), data))


def _array_of_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """How protocol 5 writes arrays."""
    _check(type(data) in (bytes, bytearray) and isinstance(dtype, _Dtype) and _is_shape(shape), "an odd array")
    _check(order in ("C", "F") and len(data) == math.prod(shape) * dtype.real.itemsize, "an array that does not fit")
    return np.frombuffer(data, dtype.real).reshape(shape, order=order)


def _scalar(dtype: Any, data: Any) -> np.generic:
    fits = isinstance(dtype, _Dtype) and type(data) is bytes and len(data) == dtype.real.itemsize
    _check(fits, "an odd number")
    return np.frombuffer(data, dtype.real)[0]


_NDARRAY = object()  # stands for numpy.ndarray, which is only ever handed to _reconstruct

# -- torch ---------------------------------------------------------------------------------------------


def _storage(data: Any) -> Tensor:
    """In place of torch.storage._load_from_bytes, which is a torch.load without any check. Gives a flat tensor."""
    _check(type(data) in (bytes, _Window), "an odd tensor")
    found = _load_torch(io.BytesIO(data) if type(data) is bytes else io.BufferedReader(data))
    _check(isinstance(found, torch.storage.TypedStorage), f"a {type(found).__name__} where numbers should be")
    flat = torch.empty(0, dtype=found.dtype).set_(found)
    _check(flat.nbytes <= (data.length if type(data) is _Window else len(data)), "a tensor longer than its numbers")
    return flat


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any = False, hooks: Any = None, more: Any = None
) -> Tensor:
    _check(isinstance(storage, Tensor) and storage.ndim == 1 and not hooks and not more, "an odd tensor")
    fits = type(offset) is int and offset >= 0 and _is_shape(tuple(size)) and _is_shape(stride)
    _check(fits and len(size) == len(stride), "an odd tensor")
    count = math.prod(size)
    reach = offset + sum((n - 1) * step for n, step in zip(size, stride)) + 1 if count else offset
    _check(max(count, reach) <= len(storage), "a tensor that reaches beyond its numbers")
    return storage.as_strided(tuple(size), stride, offset)


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> Tensor:
    _check(isinstance(data, Tensor), "an odd parameter")
    return data


def _size(shape: Any) -> torch.Size:
    _check(_is_shape(shape), "an odd torch.Size")
    return torch.Size(shape)


def _device(kind: Any, index: Any = None) -> torch.device:
    _check(type(kind) is str and (index is None or type(index) is int), "an odd torch.device")
    return torch.device(kind) if index is None else torch.device(kind, index)


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("_codecs", "encode"): _encode,
    **{
        (module, name): make
        for module in ("builtins", "__builtin__")  # protocols 0 to 2 write Python 2's names
        for name, make in {
            "set": _collection(set), "frozenset": _collection(frozenset), "complex": _complex,
            "bytes": _bytes, "bytearray": _bytearray,
        }.items()
    },
    ("numpy", "dtype"): _dtype,
    ("numpy", "ndarray"): _NDARRAY,
    **{
        (f"numpy.{core}.{module}", name): make
        for core in ("core", "_core")  # before numpy 2 and since
        for module, name, make in (
            ("multiarray", "_reconstruct", _empty_array),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _array_of_buffer),
        )
    },
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): _size,
    ("torch", "device"): _device,
    **{
        ("torch", name): getattr(torch, name)
        for name in (
            "float16", "bfloat16", "float32", "float64", "complex64", "complex128", "bool",
            "uint8", "int8", "int16", "int32", "int64",
        )
    },
}  # fmt: skip
