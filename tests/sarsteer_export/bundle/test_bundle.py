"""A bundle answers as the eager model does, alone, in a batch and streamed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from calibration.errors import InputError
from calibration.lalm import Lalm
from calibration.plan import SteeringPlan
from calibration.requests import SpokenRequest, load_audio, read_requests
from engines.onnxruntime_runner import OnnxRuntimeDecoder
from sarsteer_export import Bundle, load_bundle
from sarsteer_export.behaviour import eager_answers
from tests.sarsteer_export.conftest import Inputs

TOKENS = 10


@pytest.fixture(scope="module")
def asked(inputs: Inputs) -> tuple[SpokenRequest, ...]:
    """Requests whose clips and texts differ in length."""
    spoken = (*read_requests(inputs.harmful)[:3], *read_requests(inputs.benign)[:2])
    texts = (
        "?",
        "please respond to the audio.",
        "respond, please, to all of the audio " * 3,
        "Ünïcode ☃",
        "a b",
    )
    return tuple(SpokenRequest(request.audio, text) for request, text in zip(spoken, texts, strict=True))


@pytest.fixture(scope="module")
def eager(lalm: Lalm, plan: SteeringPlan, asked: Sequence[SpokenRequest]) -> dict[bool, list[str]]:
    """The eager model's answers, each request alone, steered (True) and not."""
    return {
        steering: [
            eager_answers(lalm, [request], plan if steering else None, max_new_tokens=TOKENS)[0]
            for request in asked
        ]
        for steering in (True, False)
    }


@pytest.mark.parametrize("steering", [True, False])
def test_answers_are_the_eager_model_s_alone_and_in_a_batch(
    bundle: Bundle, asked: Sequence[SpokenRequest], eager: dict[bool, list[str]], steering: bool
) -> None:
    alone = [
        bundle.generate(request.audio, request.text, max_new_tokens=TOKENS, steering=steering)
        for request in asked
    ]
    together = bundle.generate_batch(
        [request.audio for request in asked],
        [request.text for request in asked],
        max_new_tokens=TOKENS,
        steering=steering,
    )
    assert alone == eager[steering]
    assert together == eager[steering]
    assert len(set(alone)) > 1, "every prompt got the same answer, which tells little"
    assert eager[True] != eager[False]


def test_a_row_that_ends_early_stays_ended(bundle: Bundle, asked: Sequence[SpokenRequest]) -> None:
    request = asked[1]
    full = list(bundle._tokens([request.audio], [request.text], max_new_tokens=6, steering=True))
    (first,) = full[0]
    ends = bundle.manifest.tokens["end"]
    stop = next(token for (token,) in full if token != first)
    bundle.manifest.tokens["end"] = [stop]
    try:
        rows = list(
            bundle._tokens(
                [request.audio, asked[0].audio],
                [request.text, asked[0].text],
                max_new_tokens=6,
                steering=True,
            )
        )
    finally:
        bundle.manifest.tokens["end"] = ends
    column = [row[0] for row in rows]
    at = [token for (token,) in full].index(stop)
    assert column[:at] == [token for (token,) in full][:at]
    assert all(token is None for token in column[at:])


def test_positions_count_attended_tokens_whatever_the_padding(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, np.ndarray]] = []
    step = OnnxRuntimeDecoder.step

    def note(decoder: OnnxRuntimeDecoder, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        seen.append(feeds)
        return step(decoder, feeds)

    monkeypatch.setattr(OnnxRuntimeDecoder, "step", note)
    list(bundle._tokens([None, None], ["hello", "a longer text"], max_new_tokens=2, steering=True))
    prefill, decode = seen[:2]
    lengths = prefill["attention_mask"].sum(axis=1)
    assert len(set(lengths)) == 2
    for row, length in enumerate(lengths):
        attended = prefill["position_ids"][row][prefill["attention_mask"][row] != 0]
        assert attended.tolist() == list(range(length))
    assert decode["position_ids"].tolist() == [[length] for length in lengths]


@pytest.mark.parametrize("number", range(5))
def test_streamed_pieces_join_to_the_answer(
    bundle: Bundle, asked: Sequence[SpokenRequest], eager: dict[bool, list[str]], number: int
) -> None:
    pieces = list(bundle.stream(asked[number].audio, asked[number].text, max_new_tokens=TOKENS))
    assert "".join(pieces) == eager[True][number]
    assert all(pieces), "an empty piece was streamed"


def test_characters_of_several_tokens_are_streamed_whole(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "naïve ☃ ok"
    ids = bundle.frontend.tokenizer.encode(text, add_special_tokens=False).ids
    assert len(ids) > len(text.split())
    monkeypatch.setattr(Bundle, "_tokens", lambda *_, **__: iter([[token] for token in ids]))
    pieces = list(bundle.stream(None, "anything"))
    assert "".join(pieces) == text
    assert len(pieces) > 3
    assert not any("\ufffd" in piece for piece in pieces)


def test_arrays_are_clips_too(
    bundle: Bundle, asked: Sequence[SpokenRequest], eager: dict[bool, list[str]]
) -> None:
    request = asked[2]
    samples = load_audio(request.audio, sampling_rate=bundle.frontend.sampling_rate)
    for clip in (samples, samples.astype(np.float64), str(request.audio)):
        assert bundle.generate(clip, request.text, max_new_tokens=TOKENS) == eager[True][2]


@pytest.mark.parametrize(
    ("clip", "words"),
    [
        (np.zeros((2, 16_000), np.float32), "mono samples"),
        (np.zeros(0, np.float32), "mono samples"),
        (np.zeros(16_000, np.int16), "int16"),
        (np.full(16_000, np.nan, np.float32), "NaN"),
        (np.zeros(40_000, np.float32), "at most 32000"),
        (np.full(100, 0.1, np.float32), "too short"),
    ],
)
def test_arrays_that_are_no_clip_are_refused(bundle: Bundle, clip: np.ndarray, words: str) -> None:
    with pytest.raises(InputError, match=words):
        bundle.generate(clip, "hello", max_new_tokens=1)


def test_spoken_and_written_requests_mix_in_a_batch(bundle: Bundle, asked: Sequence[SpokenRequest]) -> None:
    mixed = bundle.generate_batch([asked[0].audio, None], [asked[0].text, "hello"], max_new_tokens=TOKENS)
    assert mixed == [
        bundle.generate(asked[0].audio, asked[0].text, max_new_tokens=TOKENS),
        bundle.generate(None, "hello", max_new_tokens=TOKENS),
    ]


def test_a_batch_needs_a_clip_or_none_per_text(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="1 clips for 2 texts"):
        bundle.generate_batch([None], ["a", "b"])
    assert bundle.generate_batch([], []) == []


@pytest.mark.parametrize("tokens", [0, -1])
def test_an_answer_has_at_least_one_token(bundle: Bundle, tokens: int) -> None:
    with pytest.raises(InputError, match=f"max_new_tokens is {tokens}"):
        bundle.generate(None, "hello", max_new_tokens=tokens)


def test_an_answer_is_no_longer_than_allowed(bundle: Bundle) -> None:
    for tokens in (1, 3):
        steps = list(bundle._tokens([None], ["hello"], max_new_tokens=tokens, steering=True))
        assert len(steps) <= tokens


def test_a_stream_that_another_request_interrupts_says_so(
    bundle: Bundle, asked: Sequence[SpokenRequest]
) -> None:
    wanted = bundle.generate(asked[0].audio, asked[0].text, max_new_tokens=TOKENS)
    tokens = bundle._tokens([asked[1].audio], [asked[1].text], max_new_tokens=TOKENS, steering=True)
    next(tokens)
    assert bundle.generate(asked[0].audio, asked[0].text, max_new_tokens=TOKENS) == wanted
    with pytest.raises(RuntimeError, match="another request was started"):
        next(tokens)


def test_a_closed_bundle_opens_again_when_it_is_used(bundle_path: Path) -> None:
    with load_bundle(bundle_path) as opened:
        first = opened.generate(None, "hello", max_new_tokens=3)
        runners = list(opened._runners.values())
    assert opened._runners == {}
    for runner in runners:
        with pytest.raises(RuntimeError, match="closed"):
            _ = runner.session
    assert opened.generate(None, "hello", max_new_tokens=3) == first
    opened.close()
    opened.close()


def test_the_plan_comes_with_the_bundle(bundle: Bundle) -> None:
    assert bundle.plan.digest() == bundle.manifest.plan_sha256
    assert bundle.has_unsteered
