"""Files of `torch.save`, read without running anything in them.

PyTorch's own restricted unpickler builds tensors, containers, numbers and texts, and no object of any class but those
named here; whatever else a pickle asks for is refused before it is called.
"""

from __future__ import annotations

import pickle
import re
import types
import warnings
from typing import TYPE_CHECKING, Any, ClassVar

from calibration.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

ZIP, PICKLE = b"PK\x03\x04", b"\x80"
"""How the files of `torch.save` begin: now, and before PyTorch 1.6."""
MAGIC, BEGINNING = 0x1950A86A20F9469CFC6C.to_bytes(10, "little"), 32
"""PyTorch's number among the first bytes of the older of these; a pickle without it is not of `torch.save`."""
GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
REASON = re.compile(r"WeightsUnpickler error:\s*(.+)")
REMEDY = "Save what is meant with torch.save, as tensors"


class PickledObject:
    """Stands in for an object of a class that is not here: its attributes, no methods."""


def load_without_running(path: Path, stand_ins: tuple[str, ...]) -> Any:
    """The object in `path`; objects of the classes `stand_ins` come as `PickledObject`.

    Raises `InputError` for a file that is damaged, that is no file of `torch.save`, or that names any other class or
    function.
    """
    with path.open("rb") as file:
        start = file.read(BEGINNING)
    if not start.startswith(ZIP) and MAGIC not in start:
        raise InputError(f"it is a plain pickle, which is not read; nothing in it was run. {REMEDY}")
    import torch

    try:
        with (
            warnings.catch_warnings(),
            torch.serialization.safe_globals([(PickledObject, name) for name in stand_ins]),
        ):
            warnings.simplefilter("ignore")  # of other pickle protocols, which the error names
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if named := GLOBAL.search(str(error)):
            raise InputError(
                f"its pickle names {named[1]}, which no file of this kind needs; nothing in it was run. {REMEDY}"
            ) from None
        reason = REASON.search(str(error))  # the rest of the message is advice to run what is in the file
        said = "damaged" if reason is None else reason[1].strip()[:200]
        raise InputError(
            f"it holds more than tensors and containers of pickle protocol 2 ({said}); nothing in it was run. {REMEDY}"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged file surfaces as almost any exception
        raise InputError(f"it is not a readable file of torch.save ({_first_line(error)})") from error


def save_by_name(content: PickledObject, class_name: str, path: Path) -> None:
    """Write an object as one of the class `class_name`, which need not be installed, with `torch.save`."""
    import torch

    module, _, name = class_name.rpartition(".")

    class Pickler(pickle._Pickler):
        """Python's own pickler, which asks by this method how a class is written."""

        def save_global(self, obj: Any, name_given: str | None = None) -> None:
            if obj is PickledObject:
                self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())  # type: ignore[attr-defined]
                self.memoize(obj)  # type: ignore[attr-defined]
            else:
                super().save_global(obj, name_given)  # type: ignore[misc]

        dispatch: ClassVar[dict[type, Any]] = {**pickle._Pickler.dispatch, type: save_global}

    writer: Any = types.SimpleNamespace(__name__="pickle", Pickler=Pickler)
    torch.save(content, path, pickle_module=writer)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
