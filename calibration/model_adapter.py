"""How one LALM is driven: its parts, its processor and its inputs, by what transformers' classes say of themselves.

A family whose classes need more than that has a subclass of `ModelAdapter` in `calibration/families/`.
Dimensions: B batch, S sequence, N audio positions of a batch, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import transformers

from calibration.architecture import Checkpoint, model_class
from calibration.decoder_parts import DecoderParts, PartNames, find_decoder, named_module
from calibration.errors import InputError, UnsupportedError
from calibration.placement import input_device
from calibration.processor import load_processor
from calibration.remote_code import own_code
from calibration.token_positions import position_ids

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import nn


@dataclass(frozen=True)
class AudioParts:
    """What makes decoder embeddings of a clip: an encoder, and the projector behind it.

    `projector` is None where the encoder itself ends at the decoder's width. `token_id`: the token of the
    prompt that is replaced by an audio embedding.
    """

    encoder: nn.Module
    projector: nn.Module | None
    token_id: int


class ModelAdapter:
    """A model with its processor, as the rest of the package sees it. Every method may be overridden.

    `model_types`: values of `model_type` in the configuration that this class is for; empty in the default.
    `names`: where the decoder's parts are, for models that do not say it themselves.
    """

    model_types: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: Any, processor: Any, names: PartNames | None = None) -> None:
        self.model = model
        self.processor = processor
        self.names = names

    # ------------------------------------------------------------------------------------------------ loading

    @classmethod
    def load_model(cls, checkpoint: Checkpoint) -> tuple[Any, dict[str, Any]]:
        """The model, on the CPU or spread by a device map, and what `from_pretrained` says of keys that do not fit."""
        config = checkpoint.listening_config
        model, loading = model_class(checkpoint).from_pretrained(
            checkpoint.folder,
            **({} if config is None else {"config": config}),
            **({} if checkpoint.device_map is None else {"device_map": checkpoint.device_map}),
            dtype=checkpoint.dtype,
            local_files_only=True,
            output_loading_info=True,
            use_safetensors=True,
            **({"trust_remote_code": True} if checkpoint.runs_own_code else {}),
        )
        return model, loading

    @classmethod
    def load_processor(cls, checkpoint: Checkpoint) -> Any:
        """The processor of a LALM; the tokenizer of a text-only model."""
        if checkpoint.hears or "AutoProcessor" in own_code(checkpoint.config):
            return load_processor(checkpoint.folder, trust_remote_code=checkpoint.trust_remote_code)
        loader: Any = transformers.AutoTokenizer
        return loader.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=checkpoint.trust_remote_code
        )

    def check_processor(self, checkpoint: Checkpoint) -> None:
        """Raise `InputError` when the processor cannot make the inputs that the model takes."""
        if checkpoint.hears and (not self.hears or self.tokenizer is None):
            raise InputError(
                f"model {checkpoint.folder}: its processor takes no audio; expected that of an audio-language model"
            )
        if self.chat_template is None:
            lacks = "no chat template" if self.hears else "no audio encoder and no chat template"
            raise InputError(
                f"model {checkpoint.folder}: {type(self.model).__name__} has {lacks}; expected a template in its "
                "tokenizer or processor"
            )

    # -------------------------------------------------------------------------------------------------- parts

    @cached_property
    def parts(self) -> DecoderParts:
        """The decoder's parts."""
        return find_decoder(self.model, self.names)

    @cached_property
    def embed_tokens(self) -> nn.Module:
        """The embedding of tokens in front of the decoder."""
        if self.names is not None and self.names.embed_tokens is not None:
            return named_module(self.model, self.names.embed_tokens)
        embedding: nn.Module = self.model.get_input_embeddings()
        return embedding

    @cached_property
    def audio_parts(self) -> AudioParts | None:
        """The audio encoder and its projector, or None for a text-only model.

        The encoder is the module that transformers marks as taking audio alone, or that has the audio
        configuration; the projector stands beside it.
        """
        if self.audio_token_id is None:
            return None
        if self.names is not None and self.names.audio_encoder is not None:
            encoder = named_module(self.model, self.names.audio_encoder)
            projector = self.names.projector and named_module(self.model, self.names.projector)
            return AudioParts(encoder, projector or None, self.audio_token_id)
        for owner in self.model.modules():
            children = list(owner.children())
            encoders = [child for child in children if self._is_audio_encoder(child)]
            if encoders:
                (encoder,) = encoders
                others = [child for child in children if _modality(child) is None and _is_projector(child)]
                return AudioParts(encoder, others[0] if len(others) == 1 else None, self.audio_token_id)
        raise UnsupportedError(f"{type(self.model).__name__}: no audio encoder found in it")

    def _is_audio_encoder(self, module: nn.Module) -> bool:
        if _modality(module) == "audio":
            return True
        kind = type(getattr(self.model.config, "audio_config", None))
        return isinstance(module, transformers.PreTrainedModel) and type(module.config) is kind

    # ---------------------------------------------------------------------------------------------- processor

    @property
    def hears(self) -> bool:
        """Whether the model takes audio: it has an encoder for it, and a processor that extracts features."""
        return self.feature_extractor is not None and self.audio_token_id is not None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; for a text-only model it is the processor itself."""
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def feature_extractor(self) -> Any | None:
        """The part of the processor that takes samples, under whatever name, or None."""
        for name in ("feature_extractor", "audio_processor"):
            if (extractor := getattr(self.processor, name, None)) is not None:
                return extractor
        return None

    @property
    def sampling_rate(self) -> int:
        """Sampling rate in Hz that the audio encoder expects. Raises `InputError` for a text-only model."""
        if self.feature_extractor is None:
            raise InputError(f"{type(self.model).__name__} takes no audio; expected requests without audio")
        return int(self.feature_extractor.sampling_rate)

    @property
    def max_audio_seconds(self) -> float | None:
        """Longest clip the model hears whole, or None when it has no limit."""
        if (limit := getattr(self.processor, "max_audio_len", None)) is not None:
            return float(limit)
        samples = getattr(self.feature_extractor, "n_samples", None)
        return None if samples is None else samples / self.sampling_rate

    @property
    def audio_token_id(self) -> int | None:
        """The id of the token that stands for one audio embedding, or None for a text-only model."""
        config = self.model.config
        if (
            getattr(config, "audio_config", config) is None
        ):  # a model of a family that hears, made without ears
            return None
        for owner in (config, getattr(config, "audio_config", None)):
            for name in ("audio_token_id", "audio_token_index"):
                if (token_id := getattr(owner, name, None)) is not None:
                    return int(token_id)
        return None

    @property
    def audio_token(self) -> str | None:
        """The text of that token."""
        if (token := getattr(self.processor, "audio_token", None)) is not None:
            return str(token)
        return (
            None if self.audio_token_id is None else self.tokenizer.convert_ids_to_tokens(self.audio_token_id)
        )

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The ids of tokens that end an answer."""
        end = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        return (int(end),) if isinstance(end, int) else tuple(end or ())

    @property
    def pad_token_id(self) -> int | None:
        """The id of the token that pads text."""
        token_id = self.tokenizer.pad_token_id
        return None if token_id is None else int(token_id)

    @property
    def chat_template(self) -> str | None:
        """The chat template's source, the processor's own before the tokenizer's."""
        for owner in (self.processor, self.tokenizer):
            if (template := getattr(owner, "chat_template", None)) is not None:
                return str(template)
        return None

    @cached_property
    def _placeholders(self) -> dict[str, str]:
        """Tokens that a text must not hold, and what each stands for."""
        named = {"a clip": self.audio_token} | {
            what: getattr(self.processor, f"{kind}_token", None)
            for kind, what in (("image", "a picture"), ("video", "a video"))
        }
        return {token: what for what, token in named.items() if isinstance(token, str) and token}

    # ------------------------------------------------------------------------------------------------- inputs

    def conversation(self, text: str, *, spoken: bool) -> list[dict[str, Any]]:
        """One user turn as messages; `spoken` puts a clip before the text."""
        if not self.hears:
            return [{"role": "user", "content": text}]
        clip = [{"type": "audio", "audio": ""}] if spoken else []
        return [{"role": "user", "content": [*clip, {"type": "text", "text": text}]}]

    def prompts(self, texts: Sequence[str], *, spoken: bool) -> list[str]:
        """User turns in the chat template, generation prompt included, one audio token for a clip."""
        turns = [self.conversation(text, spoken=spoken) for text in texts]
        return self._rendered(turns if self._takes_parts else [self._plain(turn) for turn in turns])

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template takes a turn as a list of parts; some take it as text that holds the audio token."""
        if not self.hears:
            return True
        try:
            (rendered,) = self._rendered([self.conversation("", spoken=True)])
        except Exception:  # a template written for text fails as it likes
            return False
        return self.audio_token is None or self.audio_token in rendered

    def _plain(self, turn: list[dict[str, Any]]) -> list[dict[str, Any]]:
        def content(message: dict[str, Any]) -> Any:
            if isinstance(message["content"], str):
                return message["content"]
            parts = message["content"]
            return "".join(
                str(self.audio_token) if part["type"] == "audio" else part["text"] for part in parts
            )

        return [message | {"content": content(message)} for message in turn]

    def _rendered(self, turns: list[list[dict[str, Any]]]) -> list[str]:
        template_of = self.processor if getattr(self.processor, "chat_template", None) else self.tokenizer
        rendered: list[str] = template_of.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=False
        )
        return rendered

    def process(
        self, texts: Sequence[str], audios: Sequence[NDArray[np.float32]] | None
    ) -> Mapping[str, Any]:
        """The processor's model inputs of B user turns, padded on the left."""
        prompts = self.prompts(texts, spoken=audios is not None)
        text_settings: dict[str, Any] = {"padding": True, "padding_side": "left"}
        # A template that begins with the token of beginning has said it; the tokenizer must not say it again.
        first = getattr(self.tokenizer, "bos_token", None)
        if first and prompts[0].startswith(first):
            text_settings["add_special_tokens"] = False
        if not self.hears:
            return cast("Mapping[str, Any]", self.tokenizer(prompts, return_tensors="pt", **text_settings))
        audio_settings = {} if audios is None else {"sampling_rate": self.sampling_rate}
        batch: Mapping[str, Any] = self.processor(
            text=prompts,
            audio=None if audios is None else list(audios),
            return_tensors="pt",
            text_kwargs=text_settings,  # how features are padded is the processor's business, not the text's
            audio_kwargs=audio_settings,
        )
        return batch

    def encode(
        self, texts: Sequence[str], audios: Sequence[NDArray[np.float32]] | None
    ) -> dict[str, torch.Tensor]:
        """Model inputs of B user turns, on the model's device and in its dtype, with `position_ids` (B, S).

        Raises `InputError` when a text holds the audio token, or clips are given to a text-only model.
        """
        if audios is not None and not self.hears:
            raise InputError(f"{type(self.model).__name__} takes no audio; expected requests without audio")
        for token, what in self._placeholders.items():
            if any(token in text for text in texts):
                raise InputError(f"a text holds {token}, which stands for {what}; remove it")
        device = input_device(self.model)
        inputs = {
            name: value.to(device, self.model.dtype if value.is_floating_point() else None)
            for name, value in self.process(texts, audios).items()
            if isinstance(value, torch.Tensor)
        }
        return inputs | {"position_ids": position_ids(inputs["attention_mask"])}

    # ------------------------------------------------------------------------------------------------ running

    def decoder_inputs(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """What the model's decoder is called with for some inputs: `inputs_embeds` (B, S, D) and all else.

        Audio is encoded and merged; the decoder itself does not run.
        """
        seen: dict[str, Any] = {}

        def stop(_decoder: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
            seen.update(kwargs)
            raise _DecoderReached

        handle = self.parts.decoder.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.model(**inputs, use_cache=False)
        except _DecoderReached:
            pass
        finally:
            handle.remove()
        return seen

    def audio_embeddings(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The embeddings (N, D) that stand where the audio tokens were, row by row."""
        embeds_BSD = self.decoder_inputs(inputs)["inputs_embeds"]
        found: torch.Tensor = embeds_BSD[inputs["input_ids"] == self.audio_token_id]
        return found

    def audio_token_count(self, clip: NDArray[np.float32]) -> int:
        """How many audio embeddings the model makes of a clip (samples,), by its processor's own count."""
        ids = self.encode([""], [clip])["input_ids"]
        return int((ids == torch.tensor(self.audio_token_id)).sum())

    def generate(self, inputs: Mapping[str, torch.Tensor], **settings: Any) -> torch.Tensor:
        """The tokens that the model writes behind what `encode` made, int64 (B, S); `settings` are `generate`'s."""
        told = {
            name: value for name, value in inputs.items() if name != "position_ids"
        }  # it counts them itself
        tokens_BS: torch.Tensor = self.model.generate(**told, **settings)
        return tokens_BS[:, inputs["input_ids"].shape[1] :]

    def logits(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        """Logits (B, S, V) of what the decoder returns."""
        logits: torch.Tensor = self.parts.lm_head(hidden_BSD)
        return logits


class _DecoderReached(Exception):  # noqa: N818 - ends a pass, is no error
    """The forward pass came to the decoder, which is as far as it was wanted."""


def _modality(module: nn.Module) -> str | None:
    """What a whole transformers model inside another takes, if one thing; None for plain modules."""
    if not isinstance(module, transformers.PreTrainedModel):
        return None
    told = module.input_modalities
    modalities = (told,) if isinstance(told, str) else tuple(told)
    return modalities[0] if len(modalities) == 1 else "several"


def _is_projector(module: nn.Module) -> bool:
    plain = not isinstance(module, torch.nn.Embedding | torch.nn.ModuleList)
    return plain and any(True for _ in module.parameters())
