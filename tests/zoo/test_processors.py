"""Processors of omni models where torchvision is missing, and clips that padding would otherwise change."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from calibration.families.clip_by_clip import run_clip_by_clip
from calibration.lalm import Lalm, load_lalm
from calibration.processor import LeftOut, audio_only, load_processor
from tests.zoo import flamingo, gemma4, phi4_multimodal
from tests.zoo.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def music_flamingo(tmp_path_factory: pytest.TempPathFactory) -> Lalm:
    return load_lalm(flamingo.save_music_flamingo(tmp_path_factory.mktemp("music_flamingo")))


@pytest.mark.parametrize(
    ("zoo", "visual"),
    [(gemma4, ("image_processor", "video_processor")), (phi4_multimodal, ("image_processor",))],
    ids=["gemma-4", "phi-4"],
)
def test_what_sees_is_left_out_where_it_cannot_be_loaded(
    zoo, visual: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.save_checkpoint(tmp_path / "checkpoint")

    def fail(*_args: object, **_kwargs: object) -> None:
        raise ImportError("requires the Torchvision library but it was not found in your environment")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", fail)
    processor = load_processor(tmp_path / "checkpoint")
    assert all(isinstance(getattr(processor, name), LeftOut) for name in visual)
    assert processor.tokenizer.convert_tokens_to_ids(processor.audio_token) == processor.audio_token_id
    processor.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/processor_config.json").read_text(encoding="utf-8"))
    assert saved["processor_class"] == type(processor).__name__ == type(processor).__mro__[1].__name__
    assert not set(visual) & set(saved)
    assert load_processor(tmp_path / "saved").audio_token == processor.audio_token


def test_a_processor_that_only_hears_fails_as_it_fails(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text(
        '{"processor_class": "Qwen2AudioProcessor"}', encoding="utf-8"
    )
    with pytest.raises(OSError, match=r"does not appear to have a file named|Can't load"):
        load_processor(tmp_path)


def test_parts_that_hear_are_checked_all_the_same() -> None:
    tokenizer = build_tokenizer(audio_token="<|audio|>", image_token="<|image|>")
    with pytest.raises(TypeError, match="LeftOut"):
        audio_only(transformers.Phi4MultimodalProcessor)(LeftOut(), LeftOut(), tokenizer)


@pytest.mark.parametrize("tail", [0, 1, 320, 321])
def test_a_clip_that_ends_just_behind_a_window_is_heard_alike_alone_and_beside_another(
    music_flamingo: Lalm, tail: int
) -> None:
    adapter = music_flamingo.adapter
    window = flamingo.WINDOW_SECONDS * adapter.sampling_rate
    random = np.random.default_rng(0)
    clips = [0.1 * random.standard_normal(size).astype(np.float32) for size in (window + tail, 2 * window)]
    with torch.inference_mode():
        alone = [adapter.audio_embeddings(adapter.encode(["one"], [clip])) for clip in clips]
        together = adapter.audio_embeddings(adapter.encode(["one", "two"], clips))
    assert [len(found) for found in alone] == [25 + (tail > 320), 50]
    # float32 sums in another order
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


class Encoder(torch.nn.Module):
    """Every output frame is the sum of all frames it is given: it hears padding."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))
        self.calls: list[tuple[int, ...]] = []

    def forward(self, features_AFM: torch.Tensor) -> torch.Tensor:
        self.calls.append(tuple(features_AFM.shape))
        return self.weight * features_AFM.sum(dim=1, keepdim=True).expand_as(features_AFM)


def test_an_encoder_without_a_mask_is_given_each_clip_without_its_padding() -> None:
    encoder = Encoder()
    run_clip_by_clip(encoder)
    run_clip_by_clip(encoder)  # once is enough
    features = torch.ones(2, 4, 3)
    features[1, 2:] = torch.nan
    output = encoder(features)
    assert encoder.calls == [(1, 4, 3), (1, 2, 3)]
    np.testing.assert_array_equal(output[0].detach(), np.full((4, 3), 8.0))
    np.testing.assert_array_equal(output[1].detach(), [[4.0] * 3] * 2 + [[0.0] * 3] * 2)


def test_clips_of_one_length_are_encoded_at_once() -> None:
    encoder = Encoder()
    run_clip_by_clip(encoder)
    encoder(torch.ones(3, 4, 2))
    assert encoder.calls == [(3, 4, 2)]


def test_a_copy_of_the_model_runs_its_own_weights() -> None:
    encoder = Encoder()
    run_clip_by_clip(encoder)
    copied = copy.deepcopy(encoder)
    copied.weight.data.fill_(-1.0)
    features = torch.ones(2, 2, 1)
    features[1, 1:] = torch.nan
    np.testing.assert_array_equal(copied(features).detach()[:, 0, 0], [-2.0, -1.0])


def test_padding_of_features_is_marked_for_the_encoder_and_read_by_nothing(tmp_path: Path) -> None:
    lalm = load_lalm(phi4_multimodal.save_checkpoint(tmp_path))
    random = np.random.default_rng(0)
    clips = [0.1 * random.standard_normal(size).astype(np.float32) for size in (16_000, 8_000)]
    inputs = lalm.adapter.encode(["one", "two"], clips)
    assert torch.isnan(inputs["audio_input_features"][1]).any()
    with torch.inference_mode():
        assert torch.isfinite(lalm.model(**inputs).logits).all()


@pytest.mark.parametrize("samples", [1, 320, 321, 1_000])
def test_a_clip_whose_last_window_is_too_short_to_be_heard_ends_before_it(
    samples: int, tmp_path: Path
) -> None:
    lalm = load_lalm(flamingo.save_music_flamingo(tmp_path))
    clip = (0.1 * np.random.default_rng(0).standard_normal(32_000 + samples)).astype(np.float32)
    count = lalm.adapter.audio_token_count(clip)
    assert (count > 50) == (samples > 320)
    inputs = lalm.adapter.encode(["one", "two"], [clip, clip[:20_000]])
    with torch.inference_mode():
        embedded = lalm.adapter.audio_embeddings(inputs)
        assert len(embedded) == count + lalm.adapter.audio_token_count(clip[:20_000])
        if samples <= 320:
            whole = lalm.adapter.audio_embeddings(lalm.adapter.encode(["one"], [clip[:32_000]]))
            # float32 sums of a batch in another order
            assert (embedded[:count] - whole).abs().max() <= 1e-5 * whole.abs().max()
