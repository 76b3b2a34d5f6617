"""Families of models that hear and write but cannot be driven here, each with the reason. Shown in `docs/models.md`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NotSupported:
    """A family as its users call it, the values of `model_type` in its configurations, and why it is refused."""

    name: str
    model_types: tuple[str, ...]
    reason: str


NOT_SUPPORTED: tuple[NotSupported, ...] = (
    NotSupported(
        "Gemma 3n",
        ("gemma3n", "gemma3n_text"),
        "its blocks pass several streams side by side (AltUp, 4 by default) and mix them in every block; there is no "
        "one residual stream to which a vector could be added",
    ),
    NotSupported(
        "Voxtral Realtime",
        ("voxtral_realtime",),
        "it hears while it writes: audio is added to the embedding of every token, also of those it generates, and "
        "there is no prompt whose last position could be calibrated on",
    ),
    NotSupported(
        "Kyutai Speech-to-Text",
        ("kyutai_speech_to_text",),
        "it hears while it writes: every token, also a generated one, carries the audio of its moment, and there is "
        "no prompt whose last position could be calibrated on",
    ),
)


def why_not_supported(model_type: str | None) -> str | None:
    """The reason why a family is refused, its name in front; None for every other `model_type`."""
    for family in NOT_SUPPORTED:
        if model_type in family.model_types:
            return f"{family.name} is not supported: {family.reason}"
    return None
