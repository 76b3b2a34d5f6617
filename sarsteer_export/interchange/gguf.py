"""GGUF files of small float32 tensors: exact bytes out, nothing taken on trust in. Needs numpy only.

The container as llama.cpp defines it (`docs/gguf.md` of ggml): little-endian; magic, version, counts, metadata,
tensor infos, padding to the alignment, data. Versions 2 and 3 are read, 3 is written.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
F32 = 0
MAX_DIMENSIONS = 4
UINT32, STRING, ARRAY = 4, 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", UINT32: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's number of a type -> struct's letter."""


@dataclass(frozen=True)
class GgufFile:
    """Metadata and float32 tensors of a GGUF file; a tensor's shape is as numpy has it, slowest dimension first."""

    metadata: dict[str, Any]
    tensors: dict[str, NDArray[np.float32]]


def gguf_bytes(metadata: Mapping[str, str | int], tensors: Mapping[str, NDArray[np.float32]]) -> bytes:
    """A GGUF file with string and uint32 metadata and float32 tensors, in the order given."""
    head = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        head.append(_string(key))
        head.append(
            struct.pack("<I", STRING) + _string(value)
            if isinstance(value, str)
            else struct.pack("<II", UINT32, value)
        )
    data = b""
    for name, tensor in tensors.items():
        head.append(_string(name) + struct.pack("<I", tensor.ndim))
        head.append(struct.pack(f"<{tensor.ndim}Q", *reversed(tensor.shape)))
        head.append(struct.pack("<IQ", F32, len(data)))
        data += _padded(np.ascontiguousarray(tensor, dtype="<f4").tobytes())
    return _padded(b"".join(head)) + data


def read_gguf(content: bytes) -> GgufFile:
    """Read a whole GGUF file. Raises `InputError` for what is cut short, of another version, or not float32."""
    reader = _Reader(content)
    if reader.take(4) != MAGIC:
        raise InputError("it does not begin as a GGUF file does")
    version = reader.number("I")
    if version not in (2, VERSION):
        big = (
            " (a big-endian file?)" if int.from_bytes(version.to_bytes(4, "little"), "big") <= VERSION else ""
        )
        raise InputError(f"it is GGUF version {version}{big}; this release reads 2 and 3, little-endian")
    tensor_count, entry_count = reader.number("Q"), reader.number("Q")
    reader.expect(tensor_count, at_least=24, what="tensors")
    reader.expect(entry_count, at_least=13, what="metadata entries")
    metadata: dict[str, Any] = {}
    for _ in range(entry_count):
        key = reader.text()
        if key in metadata:
            raise InputError(f"metadata entry {key!r} stands in it twice")
        metadata[key] = reader.value(reader.number("I"))
    infos = [_info(reader) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise InputError(f"general.alignment is {alignment!r}; expected a power of two")
    start = -(-reader.offset // alignment) * alignment
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, shape, offset in infos:
        if name in tensors:
            raise InputError(f"tensor {name!r} stands in it twice")
        tensors[name] = reader.floats(name, shape, start + offset)
    return GgufFile(metadata, tensors)


def _info(reader: _Reader) -> tuple[str, tuple[int, ...], int]:
    """Name, shape and offset of the next tensor."""
    name, dimensions = reader.text(), reader.number("I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise InputError(f"tensor {name!r} has {dimensions} dimensions; expected 1 to {MAX_DIMENSIONS}")
    shape = tuple(reader.number("Q") for _ in range(dimensions))[::-1]
    kind, offset = reader.number("I"), reader.number("Q")
    if kind != F32:
        raise InputError(f"tensor {name!r} is of GGUF type {kind}; expected {F32}, float32")
    return name, shape, offset


class _Reader:
    """Reads forward through bytes and says where they end too early."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.offset = 0

    def take(self, size: int) -> bytes:
        if size > len(self._content) - self.offset:
            raise InputError(
                f"it ends too early: {size} bytes are due at byte {self.offset}, the file has {len(self._content)}"
            )
        self.offset += size
        return self._content[self.offset - size : self.offset]

    def number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))[0]

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise InputError(f"a name or text before byte {self.offset} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        """A metadata value; of an array only its length, `[n]`: none that is an array means anything here."""
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            element, count = self.number("I"), self.number("Q")
            if element in SCALARS:
                self.take(count * struct.calcsize(f"<{SCALARS[element]}"))
            elif element == STRING:
                self.expect(count, at_least=8, what="texts")
                for _ in range(count):
                    self.take(self.number("Q"))
            else:
                raise InputError(f"an array of GGUF type {element}, at byte {self.offset}, is not read")
            return f"[{count}]"
        if kind not in SCALARS:
            raise InputError(f"metadata of GGUF type {kind}, at byte {self.offset}, is not known")
        return self.number(SCALARS[kind])

    def expect(self, count: int, *, at_least: int, what: str) -> None:
        """Refuse a count that the rest of the file has no room for."""
        if count > (len(self._content) - self.offset) // at_least:
            raise InputError(f"it claims {count} {what}; {len(self._content)} bytes have no room for them")

    def floats(self, name: str, shape: tuple[int, ...], start: int) -> NDArray[np.float32]:
        count = 1
        for size in shape:  # Python's integers, which do not wrap
            count *= size
        if start + 4 * count > len(self._content):
            raise InputError(
                f"tensor {name!r} needs bytes {start} to {start + 4 * count}; the file has {len(self._content)}"
            )
        return np.frombuffer(self._content, "<f4", count, start).astype(np.float32).reshape(shape)


def _string(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded


def _padded(content: bytes) -> bytes:
    return content + b"\0" * (-len(content) % ALIGNMENT)
