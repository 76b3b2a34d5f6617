"""Phi-4-multimodal's audio encoder, part by part, makes what the model itself makes of a clip."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

from calibration.lalm import Lalm, load_lalm
from sarsteer_export.exporting.audio_encoder import encoder_sample, flat_encoder
from sarsteer_export.exporting.phi4_encoder import WINDOW, Phi4AudioEncoder, streaming_mask
from tests.zoo import phi4_multimodal

SECONDS = (0.05, 0.31, 1.87, 39.9, 40.02, 41.0, 80.0, 95.3)
"""One position; part of a window; one less, as many, and more than fill it; two whole windows; part of a third."""
RTOL = 1e-6
"""The same float32 operations on other strides, relative to the largest embedding; measured 0."""
CHUNKS = [(-1, 18), (4, 1), (3, 0)]
"""No chunks, as published; chunks that hear one before them; and that hear none."""


@pytest.fixture(scope="module")
def phi4(tmp_path_factory: pytest.TempPathFactory) -> Lalm:
    return load_lalm(phi4_multimodal.save_checkpoint(tmp_path_factory.mktemp("phi4")))


def clip(seconds: float) -> np.ndarray:
    random = np.random.default_rng(int(1000 * seconds))
    return (0.1 * random.standard_normal(int(seconds * 16_000))).astype(np.float32)


def chunked(lalm: Lalm, chunk: int, left: int) -> Lalm:
    """The same model with chunks of so many positions."""
    model = copy.deepcopy(lalm.model)
    config = model.get_decoder().embed_tokens_extend.audio_embed.encoder.config
    config.chunk_size, config.left_chunk = chunk, left
    return dataclasses.replace(lalm, model=model)


@pytest.mark.parametrize(("chunk", "left"), CHUNKS)
def test_a_clip_of_any_length_becomes_what_the_model_makes_of_it(phi4: Lalm, chunk: int, left: int) -> None:
    lalm = chunked(phi4, chunk, left)
    encoder = flat_encoder(lalm.model).eval()
    assert isinstance(encoder, Phi4AudioEncoder)
    lengths = set()
    for seconds in SECONDS:
        inputs = lalm.adapter.encode(["again."], [clip(seconds)])
        with torch.inference_mode():
            wanted = lalm.adapter.audio_embeddings(inputs)
            found = encoder(inputs["audio_input_features"])
        assert found.shape == wanted.shape
        assert (found - wanted).abs().max() <= RTOL * wanted.abs().max(), seconds
        lengths.add(len(found))
    assert {WINDOW - 1, WINDOW, 2 * WINDOW} < lengths


def test_a_clip_of_a_batch_is_heard_without_its_padding(phi4: Lalm) -> None:
    clips = [clip(1.87), clip(0.31), clip(1.0)]
    inputs = phi4.adapter.encode(["again."] * len(clips), clips)
    with torch.inference_mode():
        wanted = phi4.adapter.audio_embeddings(inputs)
        encoder = flat_encoder(phi4.model).eval()
        alone = [encoder(phi4.adapter.encode(["again."], [part])["audio_input_features"]) for part in clips]
    assert (torch.cat(alone) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(("chunk", "left"), CHUNKS)
@pytest.mark.parametrize("width", [1, 4, 11])
def test_the_mask_is_that_which_the_model_makes(phi4: Lalm, chunk: int, left: int, width: int) -> None:
    encoder = chunked(phi4, chunk, left).model.get_decoder().embed_tokens_extend.audio_embed.encoder
    wanted = encoder._streaming_mask(width, 1, chunk, left)[0]
    assert torch.equal(streaming_mask(encoder.config, width, device=torch.device("cpu")), wanted)


def test_it_is_traced_with_several_windows(phi4: Lalm) -> None:
    encoder = flat_encoder(phi4.model)
    assert isinstance(encoder, Phi4AudioEncoder)
    (features,) = encoder_sample(phi4, encoder.names).inputs.values()
    positions = len(encoder(encoder.of_several_windows(features)))
    assert WINDOW < positions < 2 * WINDOW
