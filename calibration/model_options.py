"""How a model is loaded and driven where its classes do not say it themselves, and the record of that."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from calibration.adapter_file import adapter_digest, load_adapter
from calibration.decoder_parts import PartNames
from calibration.errors import InputError
from calibration.lalm import Lalm, load_lalm
from calibration.remote_code import code_digest

if TYPE_CHECKING:
    from pathlib import Path

OWN_PACKAGE = "calibration."
REMOTE_MODULES = "transformers_modules."
"""Where transformers puts code that comes with a checkpoint."""


@dataclass(frozen=True)
class ModelOptions:
    """What a user says of a model: `adapter` (`FILE.py:CLASS`), where its parts are, whether its code may run."""

    adapter: str | None = None
    parts: PartNames = field(default_factory=PartNames)
    trust_remote_code: bool = False

    def load(
        self,
        path: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        device_map: str | dict[str, Any] | None = None,
    ) -> Lalm:
        """Load a checkpoint directory as these options say. Raises `InputError` as `load_lalm` does."""
        return load_lalm(
            path,
            device=device,
            dtype=dtype,
            adapter=None if self.adapter is None else load_adapter(self.adapter),
            parts=self.parts if self.parts != PartNames() else None,
            trust_remote_code=self.trust_remote_code,
            device_map=device_map,
        )

    def identity(self, folder: Path) -> dict[str, Any] | None:
        """What results depend on beside the checkpoint's files, known before it is loaded; None by default."""
        if self == ModelOptions():
            return None
        adapter = None if self.adapter is None else adapter_digest(load_adapter(self.adapter))
        code = code_digest(folder) if self.trust_remote_code else None
        return {"adapter": adapter, "parts": asdict(self.parts), "code": code}


def driven_by(lalm: Lalm) -> dict[str, Any] | None:
    """What results depend on beside a checkpoint's files, as JSON; None for a model driven by what it says itself.

    `adapter`, `adapter_sha256`: a user's adapter class and its file. `parts`: names given. `remote_code_sha256`:
    the checkpoint's own code, where that ran.
    """
    record: dict[str, Any] = {}
    if not lalm.adapter_type.__module__.startswith(OWN_PACKAGE):
        record["adapter"] = lalm.adapter_type.__qualname__
        record["adapter_sha256"] = adapter_digest(lalm.adapter_type)
    if lalm.part_names is not None:
        record["parts"] = {name: path for name, path in asdict(lalm.part_names).items() if path is not None}
    if type(lalm.model).__module__.startswith(REMOTE_MODULES):
        record["remote_code_sha256"] = code_digest(lalm.path)
    return record or None


def check_driven_alike(recorded: dict[str, Any] | None, lalm: Lalm) -> None:
    """Raise `InputError` when a model is driven otherwise than it was for what is being looked at."""
    found = driven_by(lalm)
    if found != recorded:
        raise InputError(
            f"it was made from a model driven by {_told(recorded)}; here the model is driven by {_told(found)}; give "
            "the same --adapter, part names and --trust-remote-code"
        )


def _told(record: dict[str, Any] | None) -> str:
    if record is None:
        return "what its classes say"
    told = []
    if "adapter" in record:
        told.append(f"adapter {record['adapter']} ({record['adapter_sha256'][:12]})")
    if "parts" in record:
        told.append("names " + ", ".join(f"{name}={path}" for name, path in record["parts"].items()))
    if "remote_code_sha256" in record:
        told.append(f"its own code ({record['remote_code_sha256'][:12]})")
    return " and ".join(told)
