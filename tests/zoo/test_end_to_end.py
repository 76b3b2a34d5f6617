"""Every family goes the whole way: calibrated, exported, patched, proven; `docs/models.md` holds what was found."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from calibration.lalm import Lalm
from calibration.plan import Site
from graph_passes.residual_stream import find_residual_stream
from sarsteer_export.bundle.bundle import load_bundle
from sarsteer_export.bundle.manifest import ENCODER, MANIFEST, PLAN, STEERED_DECODER
from tests.sarsteer_export.command_line import answered, answered_json, refused, sarsteer
from tests.zoo.catalogue import BEGIN, DOCUMENT, END, row, table
from tests.zoo.end_to_end import TEXTS, Built, build
from tests.zoo.families import FAMILIES, Family

SECONDS = (0.31, 0.4, 0.8, 1.0, 1.23, 1.6, 1.87)
"""Clips that fill their last chunk, block or window to the end, and clips that do not."""
LONG_SECONDS = {"Phi-4-multimodal": (39.9, 40.02, 41.0, 95.3)}
"""Clips around and beyond the window of an encoder whose window is not the tiny checkpoint's to choose."""
EMBEDDINGS_RTOL = 1e-5
"""float32 sums in another order; relative to the largest embedding, measured at most 7e-7."""
DAMAGE_RTOL = 1e-3
"""A divergence is a sum over the vocabulary of float32 differences; between runtimes, measured at most 4e-5."""
KV_SHARED = {"Gemma 4": 4}
"""Caches of families whose last blocks attend to keys and values of earlier ones; the others have two per block."""


@pytest.fixture(scope="session")
def built(family: Family, family_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The family's bundle."""
    return build(family, family_checkpoint, tmp_path_factory.mktemp("built"))


def test_the_steered_decoder_does_what_the_steered_model_does(built: Built) -> None:
    assert built.parity["verdict"] == "passed"
    assert [case["case"] for case in built.parity["cases"]] == ["left padding", "right padding"]
    measured = {item["what"] for case in built.parity["cases"] for item in case["measurements"]}
    assert {"logits max abs, relative", "KV max abs, relative", "block max abs, relative"} <= measured


def test_decoders_that_are_wrong_on_purpose_are_caught(built: Built) -> None:
    assert built.controls == dict.fromkeys(
        [
            "unsteered",
            "wrong sign",
            "wrong positions",
            "wrong layer",
            "last column instead of last attended",
        ],
        True,
    )


def test_every_block_is_steered_where_its_output_is_read(built: Built) -> None:
    blocks = len(built.lalm.parts.blocks)
    assert [(edit.layer, edit.site) for edit in built.plan.edits] == [
        (layer, Site.BLOCK_OUTPUT) for layer in range(blocks)
    ]
    graph = onnx.load(built.bundle / STEERED_DECODER, load_external_data=False)
    stream = find_residual_stream(graph)
    assert (len(stream.blocks), stream.hidden_size) == (blocks, built.lalm.parts.hidden_size)
    assert len(built.manifest.edits) == blocks


def test_caches_are_those_that_the_model_has(built: Built) -> None:
    ports = built.manifest.graphs[STEERED_DECODER.as_posix()]["inputs"]
    caches = [port["name"] for port in ports if port["name"].startswith("past_key_values.")]
    assert len(caches) == KV_SHARED.get(built.family.name, 2 * len(built.lalm.parts.blocks))


def test_the_audio_encoder_embeds_clips_of_any_length(built: Built) -> None:
    if ENCODER not in built.manifest.components:
        assert not built.family.hears
        return
    token = built.lalm.adapter.audio_token_id
    with load_bundle(built.bundle) as bundle:
        for seconds in (*SECONDS, *LONG_SECONDS.get(built.family.name, ())):
            random = np.random.default_rng(int(1000 * seconds))
            clip = (0.1 * random.standard_normal(int(seconds * built.lalm.sampling_rate))).astype(np.float32)
            inputs = built.lalm.adapter.encode(["again."], [clip])
            with torch.inference_mode():
                wanted = built.lalm.adapter.audio_embeddings(inputs).numpy()
            prompts = bundle.prompts([clip], ["again."])
            found = prompts.embeds[0][(inputs["input_ids"][0] == token).numpy()]
            assert found.shape == wanted.shape
            assert np.abs(found - wanted).max() <= EMBEDDINGS_RTOL * np.abs(wanted).max(), seconds


def test_an_answer_is_read_from_the_bundle_alone(built: Built, tmp_path: Path) -> None:
    text = ("run", built.bundle, "--text", "again.", "--max-new-tokens", "2", "--json")
    assert isinstance(json.loads(answered(sarsteer(*text)))["answer"], str)
    if not built.family.hears:
        return
    clip = next((built.bundle.parent / "harmful").glob("*.flac"))
    spoken = sarsteer(*text, "--audio", clip)
    if (reason := built.manifest.missing.get(ENCODER)) is None:
        assert isinstance(json.loads(answered(spoken))["answer"], str)
    else:
        assert reason in refused(spoken, "cannot hear clips", code=3)


def test_bundle_and_checkpoint_are_evaluated_and_agree(built: Built) -> None:
    """Reuses what calibration saw: of random weights no figure means anything, but both have to say the same."""
    data = [part for kind in TEXTS for part in (f"--{kind}", built.bundle.parent / kind / "requests.jsonl")]
    size = ("--limit", "1", "--max-new-tokens", "2", "--random-seeds", "none", "--bootstrap", "100")
    call = (*data, *size, "--allow-overlap", "all", "--json")
    if built.family.hears and ENCODER not in built.manifest.components:
        refused(sarsteer("evaluate", built.bundle, *call), "evaluate its checkpoint with --plan", code=3)
        asked, runtimes = (built.lalm.path, "--plan", built.bundle / PLAN), 1
    else:
        asked, runtimes = (built.bundle, "--model", built.lalm.path), 2
    found = answered_json(sarsteer("evaluate", *asked, *call))
    assert [system["kind"] for system in found["systems"]] == ["undefended", "steered"] * runtimes
    damage = [system["figures"]["kl"]["value"] for system in found["systems"][1::2]]
    assert min(damage) > 0
    assert max(damage) <= min(damage) * (1 + DAMAGE_RTOL)
    assert [(one["total"], one["identical"]) for one in found["agreement"]] == [(2, 2)] * (2 * runtimes - 2)


def test_positions_of_text_and_audio_are_equal_on_every_axis(family_lalm: Lalm) -> None:
    """Why graphs take one axis: the model's own index of positions, where it has one, is ours on each of its axes."""
    if family_lalm.parts.position_axes == 1:
        return
    clips = [np.zeros(int(0.7 * family_lalm.sampling_rate), np.float32) for _ in range(2)]
    inputs = family_lalm.adapter.encode(["again.", "please respond to the audio."], clips)
    ours = inputs.pop("position_ids")
    with torch.inference_mode():
        own = family_lalm.adapter.decoder_inputs(inputs)["position_ids"]
    attended = inputs["attention_mask"].bool()
    assert own.shape == (family_lalm.parts.position_axes, *ours.shape)
    for axis in own:
        assert (axis[attended] == ours[attended]).all()


def test_the_table_in_the_documents_says_what_was_found(built: Built) -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    held = BEGIN + document.partition(BEGIN)[2].partition(END)[0] + END
    lines = held.splitlines()[3 : 3 + len(FAMILIES)]
    assert [line.split(" | ")[0] for line in lines] == [f"| {family.name}" for family in FAMILIES]
    assert row(built) in lines
    assert held == table(lines)
    if built.parity["components"]:
        with pytest.raises(AssertionError, match="no answer was compared"):
            row(dataclasses.replace(built, parity={**built.parity, "notes": []}))


def test_the_manifest_says_who_makes_the_inputs(built: Built) -> None:
    model = json.loads((built.bundle / MANIFEST).read_text(encoding="utf-8"))["model"]
    assert model["frontend"] == (
        "processor" if built.family.hears and built.family.name != "Qwen2-Audio" else "torch-free"
    )
    assert model["missing"] == built.manifest.missing
