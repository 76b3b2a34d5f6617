"""The lists of the SARSteer reference repository (linweiii/SARSteer), which are told by their fields.

Facts, from its loader: clips lie in a folder that the list does not name; the text prompt is no part of a list,
except in AIR-Bench, where the question is written and the clip is what it is about.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from calibration.records import DEFAULT_PROMPT, BadRecord, Record, RecordSource

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from calibration.records import ReadSettings

    Reading = Callable[[Path, Mapping[str, object]], Mapping[str, object]]

AUDIO, TEXT, TRANSCRIPT = "audio", "text", "transcript"
"""The names that the fields of a list get."""


def reference_list(
    source: Path, records: Sequence[Record | BadRecord], settings: ReadSettings
) -> RecordSource | None:
    """The records under this project's names, when the first one is of such a list; None when it is not.

    Columns that the user named are taken as they are: then no list is looked for.
    """
    first = next((record for record in records if isinstance(record, Record)), None)
    if first is None or AUDIO in first.fields or settings.audio_column or settings.transcript_column:
        return None
    for fields, reading in READINGS:
        if fields <= first.fields.keys():
            named = [
                record
                if isinstance(record, BadRecord)
                else Record(record.where, reading(source, record.fields))
                for record in records
            ]
            return RecordSource(named, source.parent, AUDIO, TEXT, TRANSCRIPT, prompt=DEFAULT_PROMPT)
    return None


def _figstep(source: Path, fields: Mapping[str, object]) -> Mapping[str, object]:
    """`train_100.json`: `audio_file` in the folder `question` beside the list."""
    return {AUDIO: _beside(source, "question", fields.get("audio_file")), TRANSCRIPT: fields.get("question")}


def _advbench(source: Path, fields: Mapping[str, object]) -> Mapping[str, object]:
    """`advbench_audio.json`: `audio_name` in the folder that is called as the list is."""
    return {AUDIO: _beside(source, source.stem, fields.get("audio_name")), TRANSCRIPT: fields.get("question")}


def _sorry_bench(source: Path, fields: Mapping[str, object]) -> Mapping[str, object]:
    """`base_question.jsonl`: the number of the question is the name of its clip in `base_question_audio`."""
    turns, number = fields.get("turns"), fields.get("question_id")
    return {
        AUDIO: None if number is None else _beside(source, f"{source.stem}_audio", f"{number}.wav"),
        TRANSCRIPT: turns[0] if isinstance(turns, list) and turns else turns,
    }


def _air_bench(_source: Path, fields: Mapping[str, object]) -> Mapping[str, object]:
    """`Chat_meta.json`: `path` in the folder named by task and data set; the question is the text prompt."""
    folder = f"{fields.get('task_name')}_{fields.get('dataset_name')}"
    path = fields.get("path")
    return {
        AUDIO: f"{folder}/{path}" if isinstance(path, str) and path else path,
        TEXT: fields.get("question"),
    }


def _beside(source: Path, folder: str, name: object) -> object:
    """The path of a clip from the list's folder: in `folder`, or beside the list where it is there."""
    if not isinstance(name, str) or not name or "\0" in name:
        return name
    return name if (source.parent / name).is_file() else f"{folder}/{name}"


READINGS: tuple[tuple[frozenset[str], Reading], ...] = (
    (frozenset({"audio_file", "question"}), _figstep),
    (frozenset({"audio_name", "question"}), _advbench),
    (frozenset({"question_id", "turns"}), _sorry_bench),
    (frozenset({"path", "task_name", "dataset_name", "question"}), _air_bench),
)
"""Which fields tell a list, and how it is read."""
