"""Which judge judges: settings that name one, checked before anything is asked, and the judge they open."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calibration.errors import InputError
from sarsteer_export.judges.classifier import check_labels, classifier_identity, load_classifier
from sarsteer_export.judges.endpoint import API_KEY_VARIABLE, Endpoint, EndpointJudge, endpoint_identity
from sarsteer_export.judges.judge import Judge, check_pattern
from sarsteer_export.judges.prompts import OUTPUT_ALONE, PROMPT_FILE, read_template
from sarsteer_export.judges.strings import PHRASES_FILE, StringJudge, read_phrases, string_identity

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class JudgeSettings:
    """A judge by strings unless a classifier or an endpoint is named.

    `answer_pattern`: a regular expression that every real answer matches. `refusal_phrases`: a file of phrases
    instead of the shipped one. `model`, `refusal_label`: a classifier's directory and its label of refusals.
    `url`, `model_name`: an OpenAI-compatible endpoint. `prompt`: a file with the text that either of them reads.
    Raises `InputError` for settings that contradict each other or name files that cannot be used.
    """

    answer_pattern: str | None = None
    refusal_phrases: Path | None = None
    model: Path | None = None
    refusal_label: str | None = None
    url: str | None = None
    model_name: str | None = None
    prompt: Path | None = None
    timeout_seconds: float = 60.0
    attempts: int = 5
    concurrency: int = 4

    def __post_init__(self) -> None:
        check_pattern(self.answer_pattern)
        if self.model is not None and self.url is not None:
            raise InputError("--judge-model and --judge-url name two judges; give one")
        if (self.model is None) != (self.refusal_label is None):
            raise InputError("a classifier needs both --judge-model and --judge-refusal-label")
        if (self.url is None) != (self.model_name is None):
            raise InputError("an endpoint needs both --judge-url and --judge-model-name")
        if self.prompt is not None and self.model is None and self.url is None:
            raise InputError("--judge-prompt is read by a model; name one with --judge-model or --judge-url")
        if self.refusal_phrases is not None and (self.model is not None or self.url is not None):
            raise InputError("--refusal-phrases are the string judge's; leave them out, or the judging model")
        if self.model is not None and self.refusal_label is not None:
            check_labels(self.model, self.refusal_label)
        _ = self._endpoint, self._template
        if self.model is None and self.url is None:
            read_phrases(self._phrases_file)

    def open(self, *, device: str = "cpu") -> Judge:
        """The judge; a classifier is loaded on `device`, an endpoint is asked once whether it is there.

        Raises `InputError` for a model that cannot be used, `UnsupportedError` for an endpoint that cannot be reached.
        """
        if self.model is not None and self.refusal_label is not None:
            return load_classifier(
                self.model, self.refusal_label, self._template, device=device, pattern=self.answer_pattern
            )
        if (endpoint := self._endpoint) is not None:
            judge = EndpointJudge(endpoint, self._template, _api_key(), self.answer_pattern)
            judge.probe()
            return judge
        return StringJudge(read_phrases(self._phrases_file), self.answer_pattern)

    def identity(self) -> dict[str, Any]:
        """What the report says of the judge: equal for judges that judge alike, as far as files can tell."""
        template = hashlib.sha256(self._template.encode()).hexdigest()
        if self.model is not None and self.refusal_label is not None:
            return classifier_identity(self.model, self.refusal_label, template, self.answer_pattern)
        if (endpoint := self._endpoint) is not None:
            return endpoint_identity(endpoint, template, self.answer_pattern)
        return string_identity(read_phrases(self._phrases_file), self.answer_pattern)

    @property
    def _phrases_file(self) -> Path:
        return PHRASES_FILE if self.refusal_phrases is None else self.refusal_phrases

    @property
    def _template(self) -> str:
        if self.prompt is not None:
            return read_template(self.prompt)
        return OUTPUT_ALONE if self.url is None else read_template(PROMPT_FILE)

    @property
    def _endpoint(self) -> Endpoint | None:
        if self.url is None or self.model_name is None:
            return None
        return Endpoint(self.url, self.model_name, self.timeout_seconds, self.attempts, self.concurrency)


def _api_key() -> str | None:
    key = os.environ.get(API_KEY_VARIABLE, "").strip()
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise InputError(f"{API_KEY_VARIABLE} holds characters that no key has; set it anew")
    return key or None
