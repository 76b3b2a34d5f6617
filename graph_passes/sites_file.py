"""The sites of a decoder graph as a JSON file that a person can edit, for graphs whose residual stream is not found.

`docs/inspect.md` defines the file. What was not found is null in it, beside the nearest candidates; a file is
read only when nothing that is needed is null.
Dimensions: B batch, S sequence of this forward pass, D width of the stream.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx import TensorProto

from calibration.errors import InputError
from graph_passes.names import STEERED_PREFIX
from graph_passes.residual_stream import Block, ResidualStream
from graph_passes.stream_table import dtype_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FORMAT = "sarsteer-sites"
VERSION = 1
ELEMENT_TYPES = {
    dtype_name(kind): kind
    for kind in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
}
"""The names in the file -> ONNX element types."""
FIELDS = ("hidden_size", "element_type", "attention_mask", "blocks", "final_norm_output", "other_types")
NOTES = ("problem", "candidates")
"""What a file that is to be completed says beside the sites; readers pass over it."""


def sites_content(stream: ResidualStream) -> dict[str, Any]:
    """The sites of a stream as the content of a file; steered inputs go by their own names."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "hidden_size": stream.hidden_size,
        "element_type": dtype_name(stream.elem_type),
        "attention_mask": stream.attention_mask,
        "blocks": [
            {"input": block.input.removeprefix(STEERED_PREFIX), "output": block.output}
            for block in stream.blocks
        ],
        "final_norm_output": stream.final_norm_output,
        "other_types": {
            name.removeprefix(STEERED_PREFIX): dtype_name(kind) for name, kind in stream.other_types
        },
    }


def write_sites(content: Mapping[str, Any], path: str | Path) -> None:
    """Write the content of a sites file, that of a stream or that of a skeleton."""
    Path(path).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_sites(path: str | Path) -> ResidualStream:
    """Read a sites file. Raises `InputError` naming the field that is wrong."""
    source = Path(path)
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"sites file {source}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"sites file {source}: is not JSON ({error}); see `inspect --sites`") from None
    try:
        return _stream(content)
    except InputError as error:
        raise InputError(f"sites file {source}: {error}") from None


def _stream(content: Any) -> ResidualStream:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"format is not {FORMAT!r}; write one with `inspect DECODER --sites FILE`")
    if content.get("version") != VERSION or isinstance(content["version"], bool):
        raise InputError(f"version is {content.get('version')!r}; expected {VERSION}")
    _check_fields("", content, ("format", "version", *FIELDS), optional=NOTES)
    blocks = content["blocks"]
    if not isinstance(blocks, list) or not blocks:
        raise InputError(f"blocks is {_shown(blocks)}; expected a list of at least one {{input, output}}")
    return ResidualStream(
        blocks=tuple(_block(number, block) for number, block in enumerate(blocks)),
        final_norm_output=_name("final_norm_output", content["final_norm_output"], optional=True),
        hidden_size=_count("hidden_size", content["hidden_size"]),
        elem_type=_element_type("element_type", content["element_type"]),
        attention_mask=_name("attention_mask", content["attention_mask"], optional=True),
        other_types=_other_types(content["other_types"]),
    )


def _block(number: int, block: Any) -> Block:
    where = f"blocks.{number}"
    if not isinstance(block, dict):
        raise InputError(f"{where} is {_shown(block)}; expected {{input, output}}")
    _check_fields(f"{where}.", block, ("input", "output"))
    names = [str(_name(f"{where}.{side}", block[side])) for side in ("input", "output")]
    return Block(index=number, input=names[0], output=names[1], adds=())


def _check_fields(
    where: str, found: Mapping[str, Any], expected: Sequence[str], *, optional: Sequence[str] = ()
) -> None:
    for name in expected:
        if name not in found:
            raise InputError(f"{where}{name} is missing; expected the fields {', '.join(expected)}")
    for name in found:
        if name not in expected and name not in optional:
            raise InputError(f"{where}{name} is unknown; expected the fields {', '.join(expected)}")


def _name(where: str, value: Any, *, optional: bool = False) -> str | None:
    if value is None and optional:
        return None
    if not isinstance(value, str) or not value:
        wanted = "the name of a tensor" + (" or null" if optional else "; complete it from the candidates")
        raise InputError(f"{where} is {_shown(value)}; expected {wanted}")
    return value


def _count(where: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{where} is {_shown(value)}; expected an integer of at least 1")
    return value


def _element_type(where: str, value: Any) -> int:
    if not isinstance(value, str) or value not in ELEMENT_TYPES:
        raise InputError(f"{where} is {_shown(value)}; expected one of {', '.join(ELEMENT_TYPES)}")
    return ELEMENT_TYPES[value]


def _other_types(value: Any) -> tuple[tuple[str, int], ...]:
    if not isinstance(value, dict):
        raise InputError(
            f"other_types is {_shown(value)}; expected an object of tensor names and element types"
        )
    return tuple((name, _element_type(f"other_types.{name}", kind)) for name, kind in value.items())


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
