"""The manifest of a bundle: what is in it, made by what, from what, and whether it was proven.

This module and its neighbours run in production: they import neither torch nor a checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.errors import InputError
from engines.backends import BACKENDS, find_backend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engines.backends import Backend

FORMAT = "sarsteer-bundle"
VERSION = 1
MANIFEST = "manifest.json"
ONNX_FOLDER = Path("onnx")
STEERED_DECODER = ONNX_FOLDER / "decoder_model_merged.onnx"
UNSTEERED_DECODER = ONNX_FOLDER / "decoder_model_merged_unsteered.onnx"
AUDIO_ENCODER = ONNX_FOLDER / "audio_encoder.onnx"
EMBED_TOKENS = ONNX_FOLDER / "embed_tokens.onnx"
DECODER, ENCODER, EMBEDDING = "decoder", "audio_encoder", "embed_tokens"
COMPONENTS = {DECODER: STEERED_DECODER, ENCODER: AUDIO_ENCODER, EMBEDDING: EMBED_TOKENS}
"""The graphs that answer a request, each of which becomes an engine; a text-only model has no encoder."""
FRONTEND = "frontend"
TORCH_FREE, BY_PROCESSOR = "torch-free", "processor"
"""Who turns a request into what graphs read: the code of this package, or the model's own processor."""
PLAN = Path("steering/plan.safetensors")
PARITY_REPORT = Path("reports/parity.json")
PARITY_PAGE = Path("reports/parity.html")
BEHAVIOUR_REPORT = Path("reports/behaviour.json")
ENGINES_FOLDER = Path("engines")
CHAT_TEMPLATE = Path("chat_template.jinja")
PROCESSOR = Path("processor_config.json")
TOKENIZER = Path("tokenizer.json")
TOKENIZER_CONFIG = Path("tokenizer_config.json")


@dataclass(frozen=True)
class EngineEntry:
    """An engine of a bundle, or an execution provider that it was proven on.

    `components`: the files of decoder, audio encoder and token embedding, relative to the bundle. `verdict`: of its
    parity, None before it was judged; `reason`: why it was not executed, when it was not.
    """

    backend: str
    version: str
    precision: str
    components: dict[str, str]
    verdict: str | None = None
    reason: str | None = None

    @property
    def row(self) -> Backend:
        """The row of its backend."""
        return find_backend(self.backend)

    @property
    def label(self) -> str:
        """Backend, version and precision."""
        return f"{self.backend}-{self.version}-{self.precision}"

    @property
    def report(self) -> Path:
        """Its parity report, relative to the bundle."""
        return PARITY_REPORT.with_stem(f"parity-{self.label}")

    @property
    def behaviour(self) -> Path:
        """Where its behaviour is reported when it was measured, relative to the bundle."""
        return BEHAVIOUR_REPORT.with_stem(f"behaviour-{self.label}")


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` holds.

    `model`: class, fingerprint, dtype, who makes its inputs (`frontend`, and the `adapter` that drives a processor),
    and what could not be exported (`missing`), with reasons. `tokens`: audio token (None where nothing is heard),
    end-of-answer and padding ids. `graphs`: inputs
    and outputs of every ONNX file. `edits`: per edit of the plan its anchor, nodes and constants. `engines`:
    what was built of the graphs or proven on them. `stages`: content keys by which a second build reuses work.
    `files`: size and sha256 of everything else.
    """

    versions: dict[str, str]
    model: dict[str, Any]
    tokens: dict[str, Any]
    graphs: dict[str, Any]
    plan_sha256: str
    edits: list[dict[str, Any]]
    parity: dict[str, Any]
    stages: dict[str, str]
    files: dict[str, dict[str, Any]]
    engines: tuple[EngineEntry, ...] = ()

    def engine(self, backend: str) -> EngineEntry:
        """The bundle's engine of a backend. Raises `InputError` when it has none."""
        found = next((entry for entry in self.engines if entry.backend == backend), None)
        if found is None:
            have = ", ".join(entry.backend for entry in self.engines) or "none"
            raise InputError(
                f"the bundle holds no engine for {backend} (it has: {have}); build it with --engine {backend}"
            )
        return found

    @property
    def components(self) -> dict[str, Path]:
        """The graphs that answer a request, as far as the bundle has them."""
        return {name: file for name, file in COMPONENTS.items() if file.as_posix() in self.graphs}

    @property
    def frontend(self) -> str:
        """Who makes the model's inputs."""
        return str(self.model.get(FRONTEND, TORCH_FREE))

    @property
    def missing(self) -> dict[str, str]:
        """What of the model could not be put into the bundle, with the reason."""
        return dict(self.model.get("missing", {}))

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into a bundle folder."""
        content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        (folder / MANIFEST).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check the manifest of a bundle folder.

        Raises `InputError` when it is missing, malformed, of another version, or names a file that is
        missing or of another size.
        """
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(
                f"{folder}: not a bundle; {MANIFEST} cannot be read ({error.strerror})"
            ) from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not JSON ({error})") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise InputError(f"{path}: not the manifest of a bundle; expected format {FORMAT!r}")
        if content.get("version") != VERSION:
            raise InputError(
                f"{path}: version {content.get('version')!r}; this release reads version {VERSION}"
            )
        names = [field.name for field in dataclasses.fields(cls)]
        if missing := [name for name in names if name not in content]:
            raise InputError(f"{path}: lacks {', '.join(missing)}")
        try:
            engines = tuple(EngineEntry(**entry) for entry in content["engines"])
        except TypeError as error:
            raise InputError(f"{path}: engines is malformed") from error
        manifest = cls(**{name: content[name] for name in names} | {"engines": engines})
        if (wrong := manifest._malformed()) is not None:
            raise InputError(f"{path}: {wrong} is malformed")
        manifest._check_files(folder)
        return manifest

    def check_hashes(self, folder: Path) -> None:
        """Raise `InputError` naming a file whose content is not what the manifest says."""
        if (name := self.altered(folder, list(self.files))) is not None:
            raise InputError(f"{folder / name}: its sha256 is not the manifest's; the bundle was altered")

    def altered(self, folder: Path, names: Sequence[str]) -> str | None:
        """The first of the named files whose content is not what the manifest says."""
        return next(
            (
                name
                for name in names
                if name not in self.files or file_sha256(folder / name) != self.files[name]["sha256"]
            ),
            None,
        )

    def _malformed(self) -> str | None:
        """The first part that is not of the kind that readers rely on."""
        for field in dataclasses.fields(self):
            kind = {"plan_sha256": str, "edits": list, "engines": tuple}.get(field.name, dict)
            if not isinstance(getattr(self, field.name), kind):
                return field.name
        ends = self.tokens.get("end")
        checks = {
            "model": all(isinstance(self.model.get(name), str) for name in ("class", "fingerprint", "dtype"))
            and self.frontend in (TORCH_FREE, BY_PROCESSOR)
            and isinstance(self.model.get("missing", {}), dict),
            "tokens": isinstance(self.tokens.get("audio", ""), int | None)
            and isinstance(ends, list)
            and all(isinstance(token, int) for token in ends),
            "parity": "verdict" in self.parity,
            "engines": all(
                entry.backend in BACKENDS
                and isinstance(entry.components, dict)
                and set(entry.components) == set(self.components)
                and all(isinstance(file, str) for file in entry.components.values())
                and all(file in self.files for file in entry.components.values() if self.files)
                for entry in self.engines
            ),
            "files": all(
                isinstance(entry, dict)
                and isinstance(entry.get("bytes"), int)
                and isinstance(entry.get("sha256"), str)
                for entry in self.files.values()
            ),
        }
        return next((name for name, good in checks.items() if not good), None)

    def _check_files(self, folder: Path) -> None:
        for name, entry in self.files.items():
            file = folder / name
            if not file.is_file():
                raise InputError(f"{folder}: the bundle is incomplete; {name} is missing")
            if file.stat().st_size != entry["bytes"]:
                raise InputError(
                    f"{file}: has {file.stat().st_size} bytes; the manifest says {entry['bytes']}"
                )


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file in a bundle folder but the manifest, by relative path."""
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while chunk := opened.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
