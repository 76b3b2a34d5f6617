"""Run a bundle: spoken requests in, answers out, from ONNX files alone.

Dimensions: B requests, S tokens of a step, T past and present, D width, V vocabulary.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.errors import InputError, UnsupportedError
from calibration.plan import SteeringPlan
from calibration.requests import EmbeddedAudio, load_audio
from engines.backends import CPU_BACKEND, Runtime, find_backend
from engines.opening import check_can_run, open_decoder, open_graph
from sarsteer_export.bundle.frontend import Frontend
from sarsteer_export.bundle.manifest import (
    DECODER,
    EMBEDDING,
    ENCODER,
    PLAN,
    TORCH_FREE,
    UNSTEERED_DECODER,
    Manifest,
)
from sarsteer_export.bundle.processor_frontend import ProcessorFrontend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray
    from typing_extensions import Self

    from calibration.requests import AudioSource
    from engines.backends import Backend
    from engines.runner import DecoderRunner

    Clip = str | AudioSource | NDArray[np.float32] | None

EMBEDS = "inputs_embeds"
REPLACEMENT = "\ufffd"
"""What a decoder of bytes prints for a character that is not finished yet."""


@dataclass(frozen=True)
class Prompts:
    """A left-padded batch: by input name what the decoder reads (B, S, …), and the attention mask (B, S)."""

    content: dict[str, NDArray[Any]]
    mask: NDArray[np.int64]

    @property
    def embeds(self) -> NDArray[Any]:
        """The embeddings (B, S, D)."""
        return self.content[EMBEDS]


class Bundle:
    """An open bundle. Close it, or use it in a `with` block, to free its sessions.

    `engine`: the backend that runs its graphs, one that the bundle was built for; by default ONNX Runtime on the CPU.
    Raises `UnsupportedError` when this machine cannot run it.
    """

    def __init__(self, path: str | Path, *, engine: str = CPU_BACKEND.name) -> None:
        self.path = Path(path)
        self.manifest = Manifest.read(self.path)
        self.frontend = self._frontend()
        self._backend = find_backend(engine)
        self._files = self.manifest.components
        if self._backend is not CPU_BACKEND:
            components = self.manifest.engine(engine).components
            self._files = {name: Path(file) for name, file in components.items()}
        check_can_run(self._backend)
        if self._backend is CPU_BACKEND and self.manifest.model["dtype"] == "bfloat16":
            raise UnsupportedError(
                f"{self.path}: ONNX Runtime's CPU provider has no bfloat16 products; run one of the bundle's engines "
                f"({', '.join(entry.backend for entry in self.manifest.engines) or 'it has none'}), or build it in "
                "float32"
            )
        self._sessions = ExitStack()
        self._runners: dict[Path, Any] = {}
        self._latest: object = None

    def _frontend(self) -> Frontend | ProcessorFrontend:
        audio = self.manifest.tokens["audio"]
        if self.manifest.frontend == TORCH_FREE:
            return Frontend(self.path, hears=audio is not None)
        return ProcessorFrontend(self.path, str(self.manifest.model.get("adapter")), audio)

    @property
    def hears(self) -> bool:
        """Whether clips can be asked of it: the model takes audio, and its encoder is in the bundle."""
        return ENCODER in self._files

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free every session; the bundle opens them again when it is used."""
        self._runners.clear()
        self._sessions.close()

    @property
    def plan(self) -> SteeringPlan:
        """The plan that is baked into the steered decoder."""
        return SteeringPlan.load(self.path / PLAN)

    @property
    def has_unsteered(self) -> bool:
        """Whether the unsteered decoder can be run too: the bundle holds it, and engines are steered only."""
        return self._backend.runtime is Runtime.ONNX_RUNTIME and (self.path / UNSTEERED_DECODER).is_file()

    def check_has_unsteered(self) -> None:
        """Raise `InputError` when the unsteered decoder cannot be run."""
        if self._backend.runtime is Runtime.TENSORRT:
            raise InputError(
                f"{self.path}: its {self._backend.name} engine is the steered decoder; the unsteered one runs on "
                f"{CPU_BACKEND.name}"
            )
        if not self.has_unsteered:
            raise InputError(
                f"{self.path}: the bundle holds no unsteered decoder; build it with --keep-unsteered"
            )

    @property
    def backend(self) -> Backend:
        """What runs the bundle's graphs."""
        return self._backend

    def generate(self, audio: Clip, text: str, *, max_new_tokens: int = 128, steering: bool = True) -> str:
        """Answer one request greedily.

        `audio`: a file, samples (n,) float32 at the model's rate, or None for text alone. Raises `InputError`
        for bad audio, or when the unsteered decoder is asked for and the bundle does not hold it.
        """
        return self.generate_batch([audio], [text], max_new_tokens=max_new_tokens, steering=steering)[0]

    def generate_batch(
        self,
        audios: Sequence[Clip],
        texts: Sequence[str],
        *,
        max_new_tokens: int = 128,
        steering: bool = True,
    ) -> list[str]:
        """Answer a batch of requests greedily; a row's answer is the one it gets alone."""
        if len(audios) != len(texts):
            raise InputError(
                f"{len(audios)} clips for {len(texts)} texts; expected one clip (or None) per text"
            )
        if not texts:
            return []
        rows: list[list[int]] = [[] for _ in texts]
        for tokens in self._tokens(audios, texts, max_new_tokens=max_new_tokens, steering=steering):
            for row, token in zip(rows, tokens, strict=True):
                if token is not None:
                    row.append(token)
        return [self.frontend.decode(row) for row in rows]

    def stream(
        self, audio: Clip, text: str, *, max_new_tokens: int = 128, steering: bool = True
    ) -> Iterator[str]:
        """Answer one request piece by piece; the pieces joined are what `generate` returns.

        A bundle answers one request (or batch) at a time: when another is started before this one has ended,
        the next piece of this one raises `RuntimeError`.
        """
        ids: list[int] = []
        shown = ""
        for (token,) in self._tokens([audio], [text], max_new_tokens=max_new_tokens, steering=steering):
            if token is None:
                continue
            ids.append(token)
            decoded = self.frontend.decode(ids)
            if decoded.startswith(shown) and not decoded.endswith(REPLACEMENT):
                yield decoded[len(shown) :]
                shown = decoded
        rest = self.frontend.decode(ids)[len(shown) :]
        if rest:
            yield rest

    def _tokens(
        self, clips: Sequence[Clip], texts: Sequence[str], *, max_new_tokens: int, steering: bool
    ) -> Iterator[list[int | None]]:
        """Greedy tokens step by step, one per row; None for a row that has ended."""
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
        ends = set(self.manifest.tokens["end"])
        done = np.zeros(len(texts), dtype=bool)
        decoder = self.decoder(steering=steering)
        for tokens_B in self.decoded(clips, texts, decoder=decoder, choose=greedy, steps=max_new_tokens):
            done |= np.isin(tokens_B, list(ends))
            if done.all():
                return
            yield [None if ended else int(token) for ended, token in zip(done, tokens_B, strict=True)]

    def decoded(
        self,
        clips: Sequence[Clip],
        texts: Sequence[str],
        *,
        decoder: DecoderRunner,
        choose: Callable[[NDArray[Any]], NDArray[np.int64]],
        steps: int,
    ) -> Iterator[NDArray[np.int64]]:
        """Step by step the tokens (B,) that `choose` makes of the logits (B, V); each is decoded in the next step.

        `decoder`: the bundle's own, see `decoder`, or one of the same interface. A bundle answers one request (or
        batch) at a time: when another is started before this one has ended, the next step of this one raises
        `RuntimeError`.
        """
        prompts = self.prompts(clips, texts)
        content, mask = prompts.content, prompts.mask
        decoder.reset()
        self._latest = ours = object()
        for step in range(steps):
            if self._latest is not ours:
                raise RuntimeError(
                    "another request was started on this bundle before this answer ended; finish one stream "
                    "before the next, or open the bundle twice"
                )
            positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -content[EMBEDS].shape[1] :]
            outputs = decoder.step({**content, "attention_mask": mask, "position_ids": positions})
            tokens_B = choose(outputs["logits"][:, -1])
            yield tokens_B
            if step + 1 < steps:
                content = self._embed(tokens_B[:, None])
                mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)

    def prompts(self, clips: Sequence[Clip], texts: Sequence[str]) -> Prompts:
        """Embed and left-pad a batch of requests."""
        if any(clip is not None for clip in clips):
            self._check_hears()
        samples = [None if clip is None else self._samples(clip) for clip in clips]
        if isinstance(self.frontend, ProcessorFrontend):
            rows = [self._processed(self.frontend, *row) for row in zip(texts, samples, strict=True)]
            return _left_padded(rows)
        names = [
            str(clip) if isinstance(clip, (str, Path, EmbeddedAudio)) else f"clip {row}"
            for row, clip in enumerate(clips)
        ]
        heard = [(name, clip) for name, clip in zip(names, samples, strict=True) if clip is not None]
        spoken = iter(self._encode_audio(heard))
        audio_token = self.manifest.tokens["audio"]
        rows = []
        for clip, text in zip(samples, texts, strict=True):
            ids = self.frontend.ids(text, spoken=clip is not None)
            row = {name: values[0] for name, values in self._embed(np.array([ids], dtype=np.int64)).items()}
            places = [position for position, token in enumerate(ids) if token == audio_token]
            if len(places) != (clip is not None):
                raise InputError("the text itself holds the audio token; remove it")
            for place in places:
                embeds_SD = row[EMBEDS]
                row[EMBEDS] = np.concatenate([embeds_SD[:place], next(spoken), embeds_SD[place + 1 :]])
            rows.append(row)
        return _left_padded(rows)

    def _processed(
        self, frontend: ProcessorFrontend, text: str, clip: NDArray[np.float32] | None
    ) -> dict[str, NDArray[Any]]:
        """What the decoder reads of one request (S, …), its clip encoded and put where its processor made room."""
        inputs = frontend.inputs(text, clip)
        ids = inputs["input_ids"].astype(np.int64)
        row = {name: values[0].copy() for name, values in self._embed(ids).items()}
        if clip is None:
            return row
        runner = self._opened(self._files[ENCODER], self._backend, open_graph)
        feeds = {spec.name: inputs[spec.name].astype(spec.dtype) for spec in runner.inputs}
        features_ND = np.asarray(runner.run(feeds)["audio_features"])
        places = ids[0] == self.manifest.tokens["audio"]
        if places.sum() != len(features_ND) or not len(features_ND):
            raise InputError(
                f"the audio encoder makes {len(features_ND)} embeddings of a clip of {clip.size} samples at "
                f"{frontend.sampling_rate} Hz, and its processor makes room for {places.sum()}; expected as many, and "
                "at least one: give another clip"
            )
        row[EMBEDS][places] = features_ND
        return row

    def _check_hears(self) -> None:
        if self.hears:
            return
        reason = self.manifest.missing.get(ENCODER)
        if reason is None:
            raise InputError(f"{self.path}: its model takes no audio; ask it with a text alone")
        raise UnsupportedError(
            f"{self.path}: cannot hear clips; its audio encoder is not in the bundle: {reason}; ask it with a text "
            "alone, or make the embeddings with the model's own code and feed them to the decoder"
        )

    def _samples(self, clip: str | AudioSource | NDArray[np.float32]) -> NDArray[np.float32]:
        if isinstance(clip, (str, Path, EmbeddedAudio)):
            return load_audio(
                clip, sampling_rate=self.frontend.sampling_rate, max_seconds=self.frontend.max_audio_seconds
            )
        if clip.ndim != 1 or clip.size == 0:
            raise InputError(f"the clip has shape {clip.shape}; expected mono samples (n,)")
        if not np.issubdtype(clip.dtype, np.floating):
            raise InputError(f"the clip is {clip.dtype}; expected floating-point samples from -1 to 1")
        if not np.isfinite(clip).all():
            raise InputError("the clip holds samples that are NaN or infinite")
        return np.asarray(clip, dtype=np.float32)

    def _encode_audio(self, named: Sequence[tuple[str, NDArray[np.float32]]]) -> list[NDArray[np.float32]]:
        """Audio embeddings (n, D) of every clip, given with its name."""
        if not named:
            return []
        clips = [clip for _, clip in named]
        runner = self._opened(self._files[ENCODER], self._backend, open_graph)
        assert isinstance(self.frontend, Frontend)  # noqa: S101 - who else makes padded features
        features, mask = self.frontend.features(clips)
        outputs = runner.run(
            {
                "input_features": features.astype(runner.inputs[0].dtype),
                "feature_attention_mask": mask,
            }
        )
        lengths = outputs["audio_feature_lengths"]
        for (name, clip), length in zip(named, lengths, strict=True):
            if length < 1:
                raise InputError(
                    f"audio {name}: too short, {clip.size} samples at {self.frontend.sampling_rate} Hz; the audio "
                    "encoder makes no embedding of it; give a longer clip"
                )
        return [row[:length] for row, length in zip(outputs["audio_features"], lengths, strict=True)]

    def _embed(self, ids: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """What the decoder reads of tokens (B, S), by input name."""
        runner = self._opened(self._files[EMBEDDING], self._backend, open_graph)
        outputs: dict[str, NDArray[Any]] = runner.run({"input_ids": ids})
        return outputs

    def decoder(self, *, steering: bool) -> DecoderRunner:
        """The steered or the unsteered decoder, opened. Raises `InputError` when the bundle cannot run that one."""
        if steering:
            file = self._files[DECODER]
        else:
            self.check_has_unsteered()
            file = UNSTEERED_DECODER
        decoder: DecoderRunner = self._opened(file, self._backend, open_decoder)
        return decoder

    def _opened(self, file: Path, backend: Backend, opener: Callable[[Path, Backend], Any]) -> Any:
        if file not in self._runners:
            self._runners[file] = self._sessions.enter_context(opener(self.path / file, backend))
        return self._runners[file]


def greedy(logits_BV: NDArray[Any]) -> NDArray[np.int64]:
    """The most probable token (B,) of every row."""
    return np.asarray(logits_BV.argmax(axis=-1), dtype=np.int64)


def _left_padded(rows: Sequence[dict[str, NDArray[Any]]]) -> Prompts:
    """Rows of what the decoder reads (S, …) as one batch."""
    longest = max(len(row[EMBEDS]) for row in rows)
    mask = np.zeros((len(rows), longest), dtype=np.int64)
    content = {
        name: np.zeros((len(rows), longest, *values.shape[1:]), dtype=values.dtype)
        for name, values in rows[0].items()
    }
    for number, row in enumerate(rows):
        mask[number, longest - len(row[EMBEDS]) :] = 1
        for name, values in row.items():
            content[name][number, longest - len(values) :] = values
    return Prompts(content, mask)


def load_bundle(path: str | Path, *, engine: str = CPU_BACKEND.name) -> Bundle:
    """Open a bundle folder; imports no torch unless its TensorRT engine is asked for, or the model's own processor
    makes its inputs (`model.frontend` in the manifest).

    Raises `InputError` when the folder is no bundle, is incomplete or has no such engine, `UnsupportedError`
    when this machine cannot run the engine.
    """
    return Bundle(path, engine=engine)
