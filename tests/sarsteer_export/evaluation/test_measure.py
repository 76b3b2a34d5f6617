"""What respondents say and how far steering moves them: eager beside a plain loop, the engine beside eager."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

import sarsteer_export.evaluation.measure as measure_module
from calibration.errors import InputError
from calibration.lalm import Lalm, encode_requests
from calibration.plan import SteeringPlan
from calibration.requests import SpokenRequest, read_requests
from calibration.states import load_clips
from calibration.steered import steered
from sarsteer_export import Bundle
from sarsteer_export.controls import random_control
from sarsteer_export.evaluation.eager import EagerRespondent, EagerSpeaker, eager_answers
from sarsteer_export.evaluation.engine import EngineRespondent
from sarsteer_export.evaluation.figures import figures, per_prompt
from sarsteer_export.evaluation.intervals import Bootstrap
from sarsteer_export.evaluation.measure import Measured, MeasureSettings, divergence, measure, undefended
from sarsteer_export.evaluation.respondent import Respondent, log_softmax
from sarsteer_export.judges.judge import Behaviour
from sarsteer_export.judges.settings import JudgeSettings

SETTINGS = MeasureSettings(max_new_tokens=4, batch_size=3)
JUDGE = JudgeSettings().open()
KL_RTOL = 1e-3
"""Of a divergence of about 1 from two float32 runs of one model: logits differ by 1e-5 of their size."""


@pytest.fixture(scope="module")
def requests(harmful_requests: Path, benign_requests: Path) -> dict[str, tuple[SpokenRequest, ...]]:
    return {"harmful": read_requests(harmful_requests)[:4], "benign": read_requests(benign_requests)[:4]}


def steered_and_damage(
    respondent: Respondent, plan: SteeringPlan, requests: dict
) -> tuple[Measured, Measured]:
    reference = undefended(respondent, requests, JUDGE, SETTINGS)
    return reference.measured, measure(respondent, plan, requests, JUDGE, SETTINGS, reference=reference)


@pytest.fixture(scope="module")
def on_eager(lalm: Lalm, plan: SteeringPlan, requests: dict) -> tuple[Measured, Measured]:
    return steered_and_damage(EagerRespondent(lalm), plan, requests)


def plain_damage(lalm: Lalm, plan: SteeringPlan, request: SpokenRequest, tokens: list[int]) -> float:
    """KL summed over the given tokens by a plain loop: one request, one pass a token, the cache kept."""

    def distributions(active: SteeringPlan | None) -> list[torch.Tensor]:
        inputs = encode_requests(lalm, [request.text], load_clips(lalm, [request]))
        inputs.pop("position_ids")
        found, model = [], lalm.model
        with torch.inference_mode():
            output = model(**inputs, use_cache=True)
            prefill = inputs["input_ids"].shape[1]
            for step, token in enumerate(tokens):
                found.append(output.logits[0, -1].double().log_softmax(-1))
                mask = torch.ones(1, prefill + step + 1, dtype=torch.long)
                output = model(
                    input_ids=torch.tensor([[token]]),
                    attention_mask=mask,
                    past_key_values=output.past_key_values,
                    use_cache=True,
                )
        return found

    base = distributions(None)
    with steered(lalm.parts, plan):
        ours = distributions(plan)
    return float(sum((p.exp() * (p - q)).sum() for p, q in zip(base, ours, strict=True)))


def test_damage_is_that_of_a_plain_cached_loop(
    lalm: Lalm, plan: SteeringPlan, requests: dict, on_eager: tuple[Measured, Measured]
) -> None:
    damage = on_eager[1].damage
    assert damage is not None
    with EagerRespondent(lalm).speaker(None) as speaker:
        replies = speaker.replies(requests["benign"], max_new_tokens=4)
    assert damage.tokens.tolist() == [len(reply.tokens) for reply in replies]
    wanted = [
        plain_damage(lalm, plan, request, list(reply.tokens))
        for request, reply in zip(requests["benign"], replies, strict=True)
    ]
    assert min(wanted) > 0.01  # the plan does something
    np.testing.assert_allclose(damage.sums, wanted, rtol=KL_RTOL)


def test_damage_ends_where_each_answer_ends(
    lalm: Lalm, plan: SteeringPlan, requests: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch whose answers are of different lengths: what is forced behind the end of one does not count."""
    respondent = EagerRespondent(lalm)
    with respondent.speaker(None) as speaker:
        first, *_ = speaker.replies(requests["benign"], max_new_tokens=4)
    monkeypatch.setattr(lalm.model.generation_config, "eos_token_id", [first.tokens[0]])
    one_batch = MeasureSettings(max_new_tokens=4, batch_size=4)
    reference = undefended(respondent, requests, JUDGE, one_batch)
    (continuation,) = reference.continuations
    assert len({len(tokens) for tokens in continuation.tokens}) > 1
    damage = measure(respondent, plan, requests, JUDGE, one_batch, reference=reference).damage
    assert damage is not None
    wanted = [
        plain_damage(lalm, plan, request, list(tokens))
        for request, tokens in zip(requests["benign"], continuation.tokens, strict=True)
    ]
    np.testing.assert_allclose(damage.sums, wanted, rtol=KL_RTOL)


def test_the_engine_measures_what_eager_does(
    bundle: Bundle, plan: SteeringPlan, requests: dict, on_eager: tuple[Measured, Measured]
) -> None:
    on_engine = steered_and_damage(EngineRespondent(bundle), plan, requests)
    assert [one.outputs for one in on_engine] == [one.outputs for one in on_eager]
    assert on_engine[1].damage is not None
    assert on_eager[1].damage is not None
    np.testing.assert_array_equal(on_engine[1].damage.tokens, on_eager[1].damage.tokens)
    np.testing.assert_allclose(on_engine[1].damage.sums, on_eager[1].damage.sums, rtol=KL_RTOL)


def test_the_engine_takes_a_plan_that_the_bundle_does_not_hold(
    bundle: Bundle, lalm: Lalm, plan: SteeringPlan, requests: dict
) -> None:
    other = random_control(plan, seed=1)
    engine, eager = EngineRespondent(bundle), EagerRespondent(lalm)
    assert engine.serves(other)
    said = [measure(one, other, requests, JUDGE, SETTINGS).outputs for one in (engine, eager)]
    own = measure(engine, plan, requests, JUDGE, SETTINGS).outputs
    assert said[0] == said[1] != own


def test_without_steering_there_is_no_damage(lalm: Lalm, plan: SteeringPlan, requests: dict) -> None:
    respondent = EagerRespondent(lalm)
    reference = undefended(respondent, requests, JUDGE, SETTINGS)
    damage = measure(respondent, None, requests, JUDGE, SETTINGS, reference=reference).damage
    assert damage is not None
    assert damage.sums.tolist() == [0.0] * 4


def test_log_probabilities_that_were_not_kept_are_computed_again(
    lalm: Lalm,
    plan: SteeringPlan,
    requests: dict,
    on_eager: tuple[Measured, Measured],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure_module, "KEPT_BYTES", 0)
    _, again = steered_and_damage(EagerRespondent(lalm), plan, requests)
    assert again.damage is not None
    assert on_eager[1].damage is not None
    np.testing.assert_array_equal(again.damage.sums, on_eager[1].damage.sums)


def test_answers_do_not_depend_on_the_generation_settings_of_the_checkpoint(
    lalm: Lalm, requests: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = eager_answers(lalm, requests["benign"], None, max_new_tokens=8)
    monkeypatch.setattr(lalm.model.generation_config, "repetition_penalty", 5.0)
    monkeypatch.setattr(lalm.model.generation_config, "do_sample", True)
    assert eager_answers(lalm, requests["benign"], None, max_new_tokens=8) == plain


def test_a_reply_ends_with_the_token_that_ended_it(
    lalm: Lalm, requests: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    respondent = EagerRespondent(lalm)
    with respondent.speaker(None) as speaker:
        whole = speaker.replies(requests["benign"][:2], max_new_tokens=4)
        assert [len(reply.tokens) for reply in whole] == [4, 4]
        monkeypatch.setattr(lalm.model.generation_config, "eos_token_id", [whole[0].tokens[1]])
        cut = speaker.replies(requests["benign"][:2], max_new_tokens=4)
    assert cut[0].tokens == whole[0].tokens[: 1 + whole[0].tokens.index(whole[0].tokens[1])]


def test_the_judge_hears_what_was_said(lalm: Lalm, requests: dict) -> None:
    heard = []

    class Listener(type(JUDGE)):  # type: ignore[misc]
        def judge(self, exchanges):  # type: ignore[no-untyped-def]
            heard.extend(exchanges)
            return [Behaviour.ANSWER] * len(exchanges)

    request = SpokenRequest(requests["benign"][0].audio, "please respond to the audio.", "what time is it")
    found = measure(EagerRespondent(lalm), None, {"benign": [request]}, Listener(("x",)), SETTINGS)
    assert [(one.request, one.output) for one in heard] == [
        ("what time is it", found.outputs["benign"][0].text)
    ]


def test_divergence_is_that_of_the_definition() -> None:
    base, ours = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.25, 0.5]])
    wanted = 0.5 * np.log(2) + 0.25 * np.log(0.5)
    found = divergence(log_softmax(np.log(base)), log_softmax(np.log(ours)))
    assert found[0] == pytest.approx(wanted, abs=1e-6)  # float32 logarithms
    with np.errstate(divide="ignore"):
        sure, split = np.log(np.array([[1.0, 0.0]])), np.log(np.array([[0.0, 1.0]]))
    assert divergence(sure.astype(np.float32), sure.astype(np.float32))[0] == 0.0
    assert divergence(sure.astype(np.float32), split.astype(np.float32))[0] == np.inf


def test_figures_of_several_controls_are_means_prompt_by_prompt(on_eager: tuple[Measured, Measured]) -> None:
    plain, steered_ = on_eager
    both = per_prompt([plain, plain, steered_, steered_])
    ones = [per_prompt([one]).shares for one in on_eager]
    for name, values in both.shares.items():
        np.testing.assert_array_equal(values, (ones[0][name] + ones[1][name]) / 2)
    found = figures(both, Bootstrap())
    assert found["attack_success"].prompts == 4
    assert "kl" not in found  # the undefended one has no damage
    assert "kl" in figures(steered_, Bootstrap())


@pytest.mark.parametrize("settings", [{"max_new_tokens": 0}, {"batch_size": 0}])
def test_settings_that_ask_nothing_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(InputError, match="expected at least 1"):
        MeasureSettings(**settings)


def test_eager_and_its_log_probabilities_know_no_setting_of_the_checkpoint_but_its_tokens(
    lalm: Lalm, requests: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    speaker = EagerSpeaker(lalm, None)
    asked = requests["benign"]
    plain = speaker.replies(asked, max_new_tokens=8)
    tokens = [[5, 5, 5, 5, 5]] * len(asked)
    scores = speaker.log_probabilities(asked, tokens)
    config = copy.deepcopy(lalm.model.generation_config)
    config.update(
        no_repeat_ngram_size=2,
        suppress_tokens=[plain[0].tokens[0]],
        bad_words_ids=[[plain[0].tokens[1]]],
        min_new_tokens=7,
    )
    monkeypatch.setattr(lalm.model, "generation_config", config)
    assert speaker.replies(asked, max_new_tokens=8) == plain
    np.testing.assert_array_equal(speaker.log_probabilities(asked, tokens), scores)
    assert lalm.model.generation_config is config
