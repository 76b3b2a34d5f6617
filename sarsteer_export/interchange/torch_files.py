"""Files of `torch.save`, read without running anything in them.

PyTorch's own restricted unpickler builds tensors, containers, numbers and texts, and no object of any class but those
named here; whatever else a pickle asks for is refused before it is called.
"""

from __future__ import annotations

import pickle
import re
import types
from typing import TYPE_CHECKING, Any, ClassVar

from calibration.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

ZIP, PICKLE = b"PK\x03\x04", b"\x80"
"""How the files of `torch.save` begin: now, and before PyTorch 1.6."""
GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


class PickledObject:
    """Stands in for an object of a class that is not here: its attributes, no methods."""


def load_without_running(path: Path, stand_ins: tuple[str, ...]) -> Any:
    """The object in `path`; objects of the classes `stand_ins` come as `PickledObject`.

    Raises `InputError` for a file that is damaged or that names any other class or function.
    """
    import torch

    try:
        with torch.serialization.safe_globals([(PickledObject, name) for name in stand_ins]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if named := GLOBAL.search(str(error)):
            raise InputError(
                f"its pickle names {named[1]}, which no file of this kind needs; nothing in it was run. Save what is "
                "meant with torch.save, as tensors"
            ) from None
        raise InputError(f"it holds more than tensors and containers ({_first_line(error)})") from None
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
