"""The judge by a text-classification model on this machine, such as one trained to tell refusals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calibration.checkpoint import fingerprint, processor_digest, read_config
from calibration.errors import InputError
from sarsteer_export.judges.judge import Behaviour, Exchange, Judge, identity_of
from sarsteer_export.judges.prompts import filled

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

BATCH_SIZE = 16


@dataclass(frozen=True)
class ClassifierJudge(Judge):
    """Judges by the most probable label of a model: a refusal when it is `refusal_label`, else an answer.

    `classify`: transformers' pipeline of the model. `template`: what it reads, see `judges.prompts`; longer texts
    than the model knows positions for are cut at their end.
    """

    classify: Any
    refusal_label: str
    template: str
    answer_pattern: str | None = None

    def _judge(self, exchanges: Sequence[Exchange]) -> list[Behaviour]:
        texts = [filled(self.template, exchange) for exchange in exchanges]
        found = self.classify(texts, batch_size=BATCH_SIZE, truncation=True)
        return [
            Behaviour.REFUSAL if best["label"] == self.refusal_label else Behaviour.ANSWER for best in found
        ]


def check_labels(folder: Path, refusal_label: str) -> None:
    """Raise `InputError` when a classifier's configuration does not tell `refusal_label` from other labels."""
    config = read_config(folder)
    names = config.get("id2label")
    labels = list(names.values()) if isinstance(names, dict) else ["LABEL_0", "LABEL_1"]
    if refusal_label not in labels:
        raise InputError(
            f"judge model {folder}: has no label {refusal_label!r}; its labels are {', '.join(map(repr, labels))}; "
            "name the one of refusals with --judge-refusal-label"
        )
    if len(set(labels)) < 2:
        raise InputError(
            f"judge model {folder}: knows one label alone; expected one of refusals among others"
        )


def load_classifier(
    folder: Path, refusal_label: str, template: str, *, device: str = "cpu", pattern: str | None = None
) -> ClassifierJudge:
    """Load a classifier from a directory. Raises `InputError` when that cannot be done or lacks the label."""
    check_labels(folder, refusal_label)
    import transformers

    tokenizers: Any = transformers.AutoTokenizer
    models: Any = transformers.AutoModelForSequenceClassification
    try:
        tokenizer = tokenizers.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model, loading = models.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # a damaged file surfaces as almost any exception of the libraries below
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"judge model {folder}: cannot be loaded as a text-classification model "
            f"({type(error).__name__}: {reason})"
        ) from error
    if incomplete := sorted(str(key) for key in loading["missing_keys"]):
        raise InputError(
            f"judge model {folder}: weights missing: {', '.join(incomplete[:3])}; its head would be random; expected a "
            "model that was trained to classify"
        )
    model.eval()
    classify = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, device=device)
    return ClassifierJudge(classify, refusal_label, template, pattern)


def classifier_identity(
    folder: Path, refusal_label: str, template_sha256: str, pattern: str | None
) -> dict[str, Any]:
    """What the report says of a judge by a classifier."""
    return identity_of(
        "classifier",
        pattern,
        model=folder.name,
        model_sha256=fingerprint(folder),
        tokenizer_sha256=processor_digest(folder),
        refusal_label=refusal_label,
        template_sha256=template_sha256,
    )
