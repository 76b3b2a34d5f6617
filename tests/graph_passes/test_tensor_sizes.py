"""How large a tensor claims to be, and whether it is."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from calibration.errors import InputError
from graph_passes.tensor_sizes import BITS, TYPED_FIELDS, check_inline_size, tensor_bytes

TYPES = {number: name for name, number in TensorProto.DataType.items() if name in BITS}


def tensor(data_type: int, *dims: int) -> TensorProto:
    return TensorProto(name="w", data_type=data_type, dims=dims)


@pytest.mark.parametrize("data_type", TYPES, ids=TYPES.get)
def test_bytes_are_those_that_onnx_writes(data_type: int) -> None:
    values = np.zeros((3, 3), dtype=helper.tensor_dtype_to_np_dtype(data_type))
    written = numpy_helper.from_array(values, "w")
    assert written.data_type == data_type
    assert tensor_bytes(written) == len(written.raw_data)
    check_inline_size(written)
    written.raw_data += b"x"
    with pytest.raises(InputError, match=rf"tensor 'w' has {len(written.raw_data)} bytes; expected"):
        check_inline_size(written)


@pytest.mark.parametrize("name", TYPED_FIELDS)
def test_typed_fields_are_those_that_onnx_writes(name: str) -> None:
    data_type = TensorProto.DataType.Value(name)
    values = [b"text"] * 6 if name == "STRING" else np.ones(6, helper.tensor_dtype_to_np_dtype(data_type))
    written = helper.make_tensor("w", data_type, [2, 3], values)
    check_inline_size(written)
    field, entries = TYPED_FIELDS[name]
    assert len(getattr(written, field)) == 6 * entries
    written.dims[0] = 1 << 40
    with pytest.raises(
        InputError, match=r"entries; expected \d+ for its type and dimensions \(1099511627776, 3\)"
    ):
        check_inline_size(written)


def test_packed_typed_fields_and_types_unknown_here_are_left_to_whoever_reads_them() -> None:
    four = np.ones(5, dtype=ml_dtypes.int4)
    check_inline_size(helper.make_tensor("w", TensorProto.INT4, [5], four))
    check_inline_size(tensor(999, 5))
    assert tensor_bytes(tensor(999, 5)) is None
    assert tensor_bytes(tensor(TensorProto.STRING, 5)) is None


def test_no_dimensions_are_one_element_and_a_zero_is_none() -> None:
    assert tensor_bytes(tensor(TensorProto.FLOAT)) == 4
    assert tensor_bytes(tensor(TensorProto.FLOAT, 0, 1 << 62)) == 0
    check_inline_size(tensor(TensorProto.FLOAT, 0, 1 << 62))


@pytest.mark.parametrize("dims", [(-1,), (2, -3), (-2, -2)])
def test_a_negative_dimension_is_refused(dims: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"tensor 'w': its dimensions are .*; expected none below 0"):
        tensor_bytes(tensor(TensorProto.FLOAT, *dims))


def test_many_large_dimensions_are_refused_and_not_multiplied() -> None:
    """Their product, of 63 million bits, would take minutes."""
    with pytest.raises(InputError, match="tensor 'w': has 1000000 dimensions; expected at most 64"):
        check_inline_size(tensor(TensorProto.FLOAT, *[(1 << 63) - 1] * 1_000_000))
