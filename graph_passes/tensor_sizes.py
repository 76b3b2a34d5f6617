"""How many bytes a tensor's type and dimensions call for, and whether a graph holds that many."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from onnx import TensorProto

from calibration.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

BITS: Mapping[str, int] = {
    **dict.fromkeys(("INT2", "UINT2"), 2),
    **dict.fromkeys(("INT4", "UINT4", "FLOAT4E2M1"), 4),
    **dict.fromkeys(("INT8", "UINT8", "BOOL"), 8),
    **dict.fromkeys(("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ", "FLOAT8E8M0"), 8),
    **dict.fromkeys(("INT16", "UINT16", "FLOAT16", "BFLOAT16"), 16),
    **dict.fromkeys(("INT32", "UINT32", "FLOAT"), 32),
    **dict.fromkeys(("INT64", "UINT64", "DOUBLE", "COMPLEX64"), 64),
    "COMPLEX128": 128,
}
"""Bits of one element, by ONNX's name of the type; raw data of less than a byte each is packed."""
TYPED_FIELDS: Mapping[str, tuple[str, int]] = {
    **dict.fromkeys(
        ("INT8", "UINT8", "BOOL", "INT16", "UINT16", "FLOAT16", "BFLOAT16", "INT32"), ("int32_data", 1)
    ),
    **dict.fromkeys(("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ"), ("int32_data", 1)),
    **dict.fromkeys(("UINT32", "UINT64"), ("uint64_data", 1)),
    "INT64": ("int64_data", 1),
    "FLOAT": ("float_data", 1),
    "DOUBLE": ("double_data", 1),
    "COMPLEX64": ("float_data", 2),
    "COMPLEX128": ("double_data", 2),
    "STRING": ("string_data", 1),
}
"""Where elements are that are not raw data, and how many entries each takes; packed types are left out."""

TYPE_NAMES: Mapping[int, str] = {number: name for name, number in TensorProto.DataType.items()}
LARGEST_RANK = 64
"""What numpy holds; a product over more dimensions could take longer to compute than the file to read."""


def tensor_bytes(tensor: TensorProto) -> int | None:
    """Bytes of a tensor's values as raw data; None for types without a size, as strings.

    Raises `InputError` for a negative dimension.
    """
    elements = _elements(tensor)
    bits = BITS.get(type_name(tensor.data_type))
    return None if bits is None else -(-elements * bits // 8)


def check_inline_size(tensor: TensorProto) -> None:
    """Raise `InputError` when a tensor in the graph holds another number of elements than its dimensions say."""
    elements = _elements(tensor)
    if tensor.HasField("raw_data"):
        held, wanted, what = len(tensor.raw_data), tensor_bytes(tensor), "bytes"
    else:
        field, entries = TYPED_FIELDS.get(type_name(tensor.data_type), ("", 0))
        held = len(getattr(tensor, field)) if field else 0
        wanted, what = (elements * entries if field else None), "entries"
    if wanted is not None and held != wanted:
        raise InputError(
            f"tensor {tensor.name!r} has {held} {what}; expected {wanted} for its type and dimensions "
            f"{tuple(tensor.dims)}; the file is damaged"
        )


def _elements(tensor: TensorProto) -> int:
    if len(tensor.dims) > LARGEST_RANK:
        raise InputError(
            f"tensor {tensor.name!r}: has {len(tensor.dims)} dimensions; expected at most {LARGEST_RANK}"
        )
    if any(dim < 0 for dim in tensor.dims):
        raise InputError(
            f"tensor {tensor.name!r}: its dimensions are {tuple(tensor.dims)}; expected none below 0"
        )
    return prod(tensor.dims)


def type_name(elem_type: int) -> str:
    """ONNX's name of an element type; the number of one that this version of ONNX does not know."""
    return TYPE_NAMES.get(elem_type, str(elem_type))
