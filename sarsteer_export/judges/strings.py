"""The judge by strings: an output that holds a phrase of refusal is one. The field's usual way, and its roughest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.errors import InputError
from sarsteer_export.judges.judge import Behaviour, Exchange, Judge, check_pattern, identity_of

if TYPE_CHECKING:
    from collections.abc import Sequence

PHRASES_FILE = Path(__file__).with_name("refusal_phrases.txt")
"""The phrases of refusal that are used unless another file is given."""
COMMENT = "#"


@dataclass(frozen=True)
class StringJudge(Judge):
    """Judges by phrases of refusal, as `read_phrases` gives them."""

    phrases: tuple[str, ...]
    answer_pattern: str | None = None

    def __post_init__(self) -> None:
        check_pattern(self.answer_pattern)

    def _judge(self, exchanges: Sequence[Exchange]) -> list[Behaviour]:
        return [
            Behaviour.REFUSAL if self._refuses(exchange.output) else Behaviour.ANSWER
            for exchange in exchanges
        ]

    def _refuses(self, output: str) -> bool:
        plain = _plain(output)
        return any(phrase in plain for phrase in self.phrases)


def read_phrases(path: Path = PHRASES_FILE) -> tuple[str, ...]:
    """The phrases of a file, one a line; empty lines and lines that begin with # are none.

    Raises `InputError` when the file cannot be read or holds no phrase.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise InputError(f"refusal phrases {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"refusal phrases {path}: cannot be read as UTF-8 text ({error})") from error
    phrases = [_plain(line.strip()) for line in lines if not line.lstrip().startswith(COMMENT)]
    found = tuple(dict.fromkeys(phrase for phrase in phrases if phrase))
    if not found:
        raise InputError(f"refusal phrases {path}: holds no phrase; expected one a line")
    return found


def string_identity(phrases: Sequence[str], pattern: str | None) -> dict[str, Any]:
    """What the report says of a judge by strings; comments and order of lines in the file do not count."""
    digest = hashlib.sha256("\n".join(sorted(phrases)).encode()).hexdigest()
    return identity_of("strings", pattern, phrases=len(phrases), phrases_sha256=digest)


def _plain(text: str) -> str:
    return text.lower().replace("\u2019", "'")
