"""The text a model is given to judge: a template with the places `{request}` and `{output}`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.errors import InputError

if TYPE_CHECKING:
    from sarsteer_export.judges.judge import Exchange

PROMPT_FILE = Path(__file__).with_name("judge_prompt.txt")
"""The template an endpoint is asked with unless another file is given."""
OUTPUT_ALONE = "{output}"
"""The template a classifier is given unless another file is given."""
UNKNOWN_REQUEST = "(spoken; nobody wrote down what was said)"
PLACE = re.compile(r"\{(request|output)\}")


def read_template(path: Path) -> str:
    """The template in a file. Raises `InputError` when it cannot be read or has no place for the output."""
    try:
        template = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"judge prompt {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"judge prompt {path}: cannot be read as UTF-8 text ({error})") from error
    if OUTPUT_ALONE not in template:
        raise InputError(f"judge prompt {path}: does not hold {OUTPUT_ALONE}, where the output is put")
    return template.rstrip("\n")


def filled(template: str, exchange: Exchange) -> str:
    """The template with request and output in their places; places that these hold themselves stay as they are."""
    request = UNKNOWN_REQUEST if exchange.request is None else exchange.request
    values = {"request": request, "output": exchange.output}
    return PLACE.sub(lambda place: values[place[1]], template)
