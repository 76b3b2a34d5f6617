"""Which clip belongs where: training takes, and the three shipped splits of clips nobody trained on.

| split | voices | topics | used for |
| --- | --- | --- | --- |
| training | training | seen | training only, synthesised on the fly, not shipped |
| train | training | seen | calibration of a steering plan |
| validation | training | seen | the choice of alpha |
| test | held out | seen and held out | everything reported |

No clip of a shipped split is trained on: "train" and "validation" are fresh takes (another speed and pitch),
and no (topic, voice) pair is in both.
"""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from speech import HELD_OUT_VOICES, TRAINING_VOICES, Utterance, synthesise, write_flac
from topics import NEUTRAL_PROMPT, Harm, Topic, TopicSplit

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray


class Split(str, Enum):
    """The shipped splits; see the table at the head of this module."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


CLIPS_PER_KIND = {Split.TRAIN: 60, Split.VALIDATION: 40, Split.TEST: 50}
"""How many harmful clips a shipped split has, and how many benign ones."""

HELD_OUT_SHARE = 0.3
"""Share of the test clips whose topic is held out as well as the voice."""


@dataclass(frozen=True)
class Clip:
    """One spoken request and where it came from."""

    name: str
    topic: Topic
    topic_seen: bool
    utterance: Utterance


@dataclass(frozen=True)
class ClipPlan:
    """Every clip there is to be: what is trained on, and what is shipped."""

    training: tuple[Clip, ...]
    shipped: dict[Split, tuple[Clip, ...]]

    @property
    def all(self) -> tuple[Clip, ...]:
        """Every clip, the training takes first."""
        return self.training + tuple(clip for clips in self.shipped.values() for clip in clips)


def plan_clips(topics: TopicSplit, seed: int) -> ClipPlan:
    """Choose topic, voice, speed and pitch of every clip; nothing is synthesised yet."""
    takes = random.Random(seed)
    training = tuple(
        _take(f"training_{topic.verb}_{topic.thing}_{voice}", topic, True, voice, takes)
        for topic in topics.seen
        for voice in TRAINING_VOICES
    )
    shipped: dict[Split, tuple[Clip, ...]] = dict.fromkeys(Split, ())
    for harm in Harm:
        pool = _shuffled_pairs(topics.of(harm).seen, TRAINING_VOICES, takes)
        for split in (Split.TRAIN, Split.VALIDATION):
            pairs = [next(pool) for _ in range(CLIPS_PER_KIND[split])]
            shipped[split] += tuple(_named(split, harm, pairs, True, takes))
        held_out = round(CLIPS_PER_KIND[Split.TEST] * HELD_OUT_SHARE)
        seen_pool = _shuffled_pairs(topics.of(harm).seen, HELD_OUT_VOICES, takes)
        new_pool = _shuffled_pairs(topics.of(harm).held_out, HELD_OUT_VOICES, takes)
        seen_pairs = [next(seen_pool) for _ in range(CLIPS_PER_KIND[Split.TEST] - held_out)]
        new_pairs = [next(new_pool) for _ in range(held_out)]
        shipped[Split.TEST] += tuple(_named(Split.TEST, harm, seen_pairs, True, takes))
        shipped[Split.TEST] += tuple(_named(Split.TEST, harm, new_pairs, False, takes, start=len(seen_pairs)))
    return ClipPlan(training=training, shipped=shipped)


def synthesise_all(clips: Sequence[Clip], workers: int) -> list[NDArray[np.int16]]:
    """Speak every clip, several at once: a list of (T,) 16-bit samples in the order of `clips`."""
    with ThreadPoolExecutor(workers) as executor:
        return list(executor.map(lambda clip: synthesise(clip.utterance), clips))


def write_split(
    directory: Path, split: Split, clips: Sequence[Clip], samples: Sequence[NDArray[np.int16]]
) -> None:
    """Write `audio/<name>.flac` and `data/<split>_{harmful,benign}.jsonl`, one JSON object a line."""
    (directory / "audio").mkdir(parents=True, exist_ok=True)
    (directory / "data").mkdir(parents=True, exist_ok=True)
    for clip, clip_samples in zip(clips, samples, strict=True):
        write_flac(directory / "audio" / f"{clip.name}.flac", clip_samples)
    for harm in Harm:
        lines = (json.dumps(_record(clip)) for clip in clips if clip.topic.harm is harm)
        (directory / "data" / f"{split.value}_{harm.value}.jsonl").write_text(
            "".join(f"{line}\n" for line in lines)
        )


def _record(clip: Clip) -> dict[str, str]:
    return {
        "audio": f"../audio/{clip.name}.flac",
        "text": NEUTRAL_PROMPT,
        "transcript": clip.topic.question,
        "voice": clip.utterance.voice,
        "topic": "seen" if clip.topic_seen else "held-out",
    }


def _take(name: str, topic: Topic, seen: bool, voice: str, takes: random.Random) -> Clip:
    utterance = Utterance(
        topic.question, voice, speed_wpm=takes.randint(140, 190), pitch=takes.randint(30, 70)
    )
    return Clip(name=name, topic=topic, topic_seen=seen, utterance=utterance)


def _named(
    split: Split,
    harm: Harm,
    pairs: Sequence[tuple[Topic, str]],
    seen: bool,
    takes: random.Random,
    start: int = 0,
) -> Iterator[Clip]:
    for number, (topic, voice) in enumerate(pairs, start):
        yield _take(f"{split.value}_{harm.value}_{number:02d}", topic, seen, voice, takes)


def _shuffled_pairs(
    topics: Sequence[Topic], voices: Sequence[str], takes: random.Random
) -> Iterator[tuple[Topic, str]]:
    """Every (topic, voice) pair once, going round both so that each is used about equally."""
    topic_order = takes.sample(topics, len(topics))
    voice_order = takes.sample(voices, len(voices))
    for lap in range(len(voices)):
        for place, topic in enumerate(topic_order):
            yield topic, voice_order[(place + lap) % len(voices)]
