"""Parts of a decoder by name, for models that do not say where they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from calibration.decoder_parts import PartNames, find_decoder
from calibration.errors import InputError, UnsupportedError
from calibration.lalm import Lalm
from calibration.model_options import ModelOptions, driven_by

NAMES = PartNames(decoder="brain.stack", final_norm="brain.last", lm_head="mouth")


class Odd(nn.Module):
    """A model of nobody's library: two lists of blocks, no accessor, no configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.brain = nn.Module()
        self.brain.words = nn.Embedding(7, 4)
        self.brain.stack = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.brain.last = nn.LayerNorm(4)
        self.brain.speaking_stack = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.mouth = nn.Linear(4, 7)


def test_parts_are_where_they_are_named() -> None:
    model = Odd()
    parts = find_decoder(model, NAMES)
    assert parts.decoder is model.brain
    assert parts.blocks == tuple(model.brain.stack)
    assert parts.final_norm is model.brain.last
    assert parts.lm_head is model.mouth
    assert (parts.hidden_size, parts.position_axes) == (4, 1)


def test_a_model_that_says_nothing_needs_names() -> None:
    with pytest.raises(UnsupportedError, match="Odd is not a transformers model; name its decoder's parts"):
        find_decoder(Odd())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (PartNames("brain.stak", "brain.last", "mouth"), "'brain.stak' is not in it; .* brain.stack, brain.sp"),
        (PartNames("brain.last", "brain.last", "mouth"), "decoder 'brain.last' is a LayerNorm; expected the list"),
        (PartNames("", "brain.last", "mouth"), "decoder '' is not in it"),
        (PartNames("brain.stack", "brain.lats", "mouth"), "Odd has no part 'brain.lats'; nearest are brain.last"),
        (PartNames("brain.stack", "brain.last", "mouht"), "Odd has no part 'mouht'; nearest are mouth"),
    ],
)  # fmt: skip
def test_a_name_that_is_not_there_is_answered_with_the_nearest(names: PartNames, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_decoder(Odd(), names)


def test_names_of_what_is_in_front_of_the_decoder(lalm: Lalm, checkpoint: Path) -> None:
    names = PartNames(
        embed_tokens="model.language_model.embed_tokens",
        audio_encoder="model.audio_tower",
        projector="model.multi_modal_projector",
    )
    named = ModelOptions(parts=names).load(checkpoint)
    assert named.adapter.embed_tokens is named.model.get_input_embeddings()
    assert named.adapter.audio_parts is not None
    assert named.adapter.audio_parts.encoder is named.model.get_submodule("model.audio_tower")
    assert type(named.adapter.audio_parts.projector) is type(lalm.adapter.audio_parts.projector)
    assert driven_by(named) == {
        "parts": {
            "embed_tokens": "model.language_model.embed_tokens",
            "audio_encoder": "model.audio_tower",
            "projector": "model.multi_modal_projector",
        }
    }
    wrong = ModelOptions(parts=PartNames(audio_encoder="model.audio_towel")).load(checkpoint)
    with pytest.raises(InputError, match=r"has no part 'model\.audio_towel'; nearest are model\.audio_tower"):
        _ = wrong.adapter.audio_parts


def test_an_unnamed_decoder_runs_as_the_named_one(lalm: Lalm, checkpoint: Path) -> None:
    names = PartNames(decoder="model.language_model.layers", lm_head="lm_head")
    named = ModelOptions(parts=names).load(checkpoint)
    assert type(named.parts.decoder) is type(lalm.parts.decoder)
    assert len(named.parts.blocks) == len(lalm.parts.blocks)
    torch.testing.assert_close(named.parts.final_norm.weight, lalm.parts.final_norm.weight, rtol=0, atol=0)
