"""Shapes as people type them: trtexec's grammar, `inputs_embeds:1x1x64,attention_mask:1x1`."""

from __future__ import annotations

import re

from calibration.errors import InputError

LARGEST_DIMENSION = 2**31 - 1
"""What TensorRT takes; a larger number is refused by it, or silently another one."""
_SHAPE = re.compile(
    r"(?:'(?P<quoted>[^']+)'|(?P<plain>[^']+)):(?P<dims>[0-9]{1,10}(?:x[0-9]{1,10})*|scalar|)"
)


def parse_shapes(text: str, option: str) -> dict[str, tuple[int, ...]]:
    """Read shapes by input name from trtexec's grammar, such as `inputs_embeds:1x1x64,attention_mask:1x1`.

    The last colon parts name and shape, a name may stand in single quotes, 0 is a length, `name:scalar` and
    `name:` are shapes without dimensions. Raises `InputError`, which names the option and the piece, for a
    piece of another form and for an input named twice.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for piece in text.split(","):
        match = _SHAPE.fullmatch(piece.strip())
        dims = match["dims"] if match else ""
        shape = tuple(int(dim) for dim in dims.split("x")) if dims not in ("", "scalar") else ()
        if match is None or any(dim > LARGEST_DIMENSION for dim in shape):
            raise InputError(
                f"{option}: {piece!r} is not a shape; expected INPUT:AxBxC, such as attention_mask:1x16, with "
                f"numbers from 0 to {LARGEST_DIMENSION}, and commas between inputs"
            )
        name = match["quoted"] or match["plain"]
        if name in shapes:
            raise InputError(
                f"{option}: {name!r} is named twice in {text!r}; repeat the option for another profile"
            )
        shapes[name] = shape
    return shapes


def shape_text(shape: tuple[int, ...]) -> str:
    """A shape in that grammar, without its name."""
    return "x".join(map(str, shape)) or "scalar"
