"""Files of steered decoders are refitted in place or elsewhere; weights and bundles are left alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from calibration.errors import InputError
from calibration.plan import Positions, Site, SteeringPlan
from sarsteer_export.bundle.manifest import FORMAT, MANIFEST
from sarsteer_export.patching import patch
from sarsteer_export.refitting import RefitResult, refit
from tests.conftest import one_edit, random_vector
from tests.decoders import HAND_LAYERS, HAND_WIDTH, Variant, hand_decoder, hand_feeds, session
from tests.sarsteer_export.command_line import listing

DATA = "weights.bin"
OLD = SteeringPlan(
    HAND_WIDTH,
    HAND_LAYERS,
    tuple(
        one_edit(op, Site.BLOCK_OUTPUT, Positions.LAST, width=HAND_WIDTH, layers=HAND_LAYERS, layer=layer)
        for layer, op in enumerate(("add", "project", "add"))
    ),
)
NEW = dataclasses.replace(
    OLD,
    edits=(
        dataclasses.replace(OLD.edits[0], vector=random_vector(HAND_WIDTH, seed=31), strength=-1.1),
        dataclasses.replace(OLD.edits[1], strength=0.4),
        dataclasses.replace(OLD.edits[2], vector=random_vector(HAND_WIDTH, seed=32)),
    ),
)
CONSTANTS = (
    "sarsteer.0.block_output.add.0.vector",
    "sarsteer.0.block_output.add.0.nothing",
    "sarsteer.1.block_output.project.0.mean",
    "sarsteer.1.block_output.project.0.basis",
    "sarsteer.1.block_output.project.0.basis_scaled",
    "sarsteer.1.block_output.project.0.nothing",
    "sarsteer.2.block_output.add.0.vector",
    "sarsteer.2.block_output.add.0.nothing",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a decoder, weights beside it, and steered by both plans. Read-only for tests."""
    folder = tmp_path_factory.mktemp("made")
    _, proto = hand_decoder(Variant(), folder / "whole.onnx")
    (folder / "whole.onnx").unlink()
    decoder = folder / "decoder.onnx"
    onnx.save(proto, decoder, save_as_external_data=True, location=DATA, size_threshold=0)
    for name, plan in (("old", OLD), ("new", NEW)):
        patch(decoder, plan, folder / f"{name}.onnx")
    return folder


@pytest.fixture
def steered(made: Path, tmp_path: Path) -> Path:
    """The steered decoder, weights beside it, in a folder of this test's own."""
    folder = tmp_path / "onnx"
    folder.mkdir()
    for source, name in (("old.onnx", "steered.onnx"), (DATA, DATA)):
        (folder / name).write_bytes((made / source).read_bytes())
    return folder / "steered.onnx"


def test_in_place_the_graph_alone_is_replaced(made: Path, steered: Path) -> None:
    before = listing(steered.parent)
    data = (steered.parent / DATA).stat()
    result = refit(steered, NEW)
    assert result == RefitResult(steered, CONSTANTS, NEW.digest())
    assert steered.read_bytes() == (made / "new.onnx").read_bytes()
    after = listing(steered.parent)
    assert after.pop("steered.onnx") != before.pop("steered.onnx")
    assert after == before
    now = (steered.parent / DATA).stat()
    assert (now.st_ino, now.st_mtime_ns) == (data.st_ino, data.st_mtime_ns)


def test_beside_the_graph_the_weights_are_shared(made: Path, steered: Path) -> None:
    before = listing(steered.parent)
    output = steered.with_name("refitted.onnx")
    assert refit(str(steered), NEW, str(output)).output == output
    after = listing(steered.parent)
    assert after.pop("refitted.onnx") == listing(made)["new.onnx"]
    assert after == before


def test_in_another_folder_the_weights_come_along(made: Path, steered: Path, tmp_path: Path) -> None:
    before = listing(steered.parent)
    output = tmp_path / "some" / "where" / "refitted.onnx"
    refit(steered, NEW, output)
    assert listing(output.parent) == {"refitted.onnx": listing(made)["new.onnx"], DATA: before[DATA]}
    copy = output.parent / DATA
    assert copy.is_file()
    assert not copy.is_symlink()
    assert copy.stat().st_ino != (steered.parent / DATA).stat().st_ino
    assert listing(steered.parent) == before


def test_the_refitted_file_runs_as_the_patched_one(made: Path, steered: Path) -> None:
    model, proto = hand_decoder(Variant(), steered.with_name("again.onnx"))
    feeds = hand_feeds(proto, model.sample(seed=3))
    refit(steered, NEW)
    old, new, refitted = (
        session(path).run(None, feeds) for path in (made / "old.onnx", made / "new.onnx", steered)
    )
    assert np.abs(old[0] - new[0]).max() > 0.1
    for got, wanted in zip(refitted, new, strict=True):
        assert got.tobytes() == wanted.tobytes()


def test_the_plan_may_be_a_file(made: Path, steered: Path, tmp_path: Path) -> None:
    NEW.save(tmp_path / "plan.safetensors")
    refit(steered, tmp_path / "plan.safetensors")
    assert steered.read_bytes() == (made / "new.onnx").read_bytes()


def test_an_output_is_replaced_only_when_told_to(made: Path, steered: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / DATA).write_text("precious", encoding="utf-8")
    before = listing(tmp_path)
    for output, words in (
        (steered, "steered.onnx: exists; use --overwrite"),
        (other / "new.onnx", f"{DATA}: exists; the decoder's external data would replace it"),
    ):
        with pytest.raises(InputError, match=words):
            refit(steered, NEW, output)
        assert listing(tmp_path) == before
    refit(steered, NEW, other / "new.onnx", overwrite=True)
    assert (other / DATA).read_bytes() == (steered.parent / DATA).read_bytes()
    refit(steered, NEW, steered, overwrite=True)
    assert steered.read_bytes() == (made / "new.onnx").read_bytes()


@pytest.mark.parametrize("beside", [True, False])
def test_the_graph_is_never_written_over_the_weights(steered: Path, tmp_path: Path, beside: bool) -> None:
    before = listing(tmp_path)
    with pytest.raises(InputError, match="name of the decoder's external data; name another output"):
        refit(steered, NEW, (steered.parent if beside else tmp_path) / DATA, overwrite=True)
    assert listing(tmp_path) == before


def make_bundle(folder: Path, content: str) -> None:
    (folder / MANIFEST).write_text(content, encoding="utf-8")


@pytest.mark.parametrize("levels", [1, 2])
def test_a_file_of_a_bundle_is_not_replaced(steered: Path, tmp_path: Path, made: Path, levels: int) -> None:
    folder = steered.parents[levels - 1]
    make_bundle(folder, json.dumps({"format": FORMAT, "version": 1}))
    before = listing(tmp_path)
    for given in ({}, {"output": steered, "overwrite": True}):
        with pytest.raises(
            InputError, match=r"belongs to the bundle .* name an output outside the bundle with -o"
        ):
            refit(steered, NEW, **given)  # type: ignore[arg-type]
        assert listing(tmp_path) == before
    outside = tmp_path.with_name(f"{tmp_path.name}_outside") / "steered.onnx"
    refit(steered, NEW, outside)
    assert outside.read_bytes() == (made / "new.onnx").read_bytes()
    assert listing(tmp_path) == before


def test_nothing_new_is_written_into_a_bundle(steered: Path) -> None:
    """Its manifest would not list it, and the bundle could not be replaced any more."""
    make_bundle(steered.parent, json.dumps({"format": FORMAT}))
    before = listing(steered.parent)
    for output in (steered.with_name("trial.onnx"), steered.parent / "deep" / "down" / "in" / "trial.onnx"):
        with pytest.raises(InputError, match=r"lies inside the bundle .* outside the bundle with -o"):
            refit(steered, NEW, output)
    assert listing(steered.parent) == before


def test_a_bundle_is_known_through_a_link_to_its_folder(steered: Path, tmp_path: Path) -> None:
    make_bundle(tmp_path, json.dumps({"format": FORMAT}))
    link = tmp_path / "elsewhere" / "deep" / "link"
    link.parent.mkdir(parents=True)
    link.symlink_to(steered.parent, target_is_directory=True)
    with pytest.raises(InputError, match="belongs to the bundle"):
        refit(link / steered.name, NEW)


@pytest.mark.parametrize("content", ["{}", "[]", "not JSON", '{"format": "other"}', "[" * 100_000])
def test_another_manifest_makes_no_bundle(steered: Path, made: Path, content: str) -> None:
    make_bundle(steered.parent, content)
    refit(steered, NEW)
    assert steered.read_bytes() == (made / "new.onnx").read_bytes()


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"decoder\.bin: ends in '\.bin'; expected a steered ONNX file \(\.onnx\)"
    ):
        refit(tmp_path / "decoder.bin", NEW)


def test_bad_files_are_refused_and_nothing_is_written(steered: Path, made: Path, tmp_path: Path) -> None:
    before = listing(tmp_path)
    with pytest.raises(InputError, match=r"missing\.onnx: no such file"):
        refit(steered.with_name("missing.onnx"), NEW)
    with pytest.raises(InputError, match=r"holds no steering to refit; steer it with `patch`"):
        refit(made / "decoder.onnx", NEW, tmp_path / "out" / "steered.onnx")
    with pytest.raises(InputError, match=r"plan .*none\.safetensors: no such file"):
        refit(steered, tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="the plan has an edit"):
        refit(steered, dataclasses.replace(NEW, edits=(*NEW.edits, NEW.edits[0])))
    assert listing(tmp_path) == before
    whole = steered.read_bytes()
    steered.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="truncated"):
        refit(steered, NEW)
    steered.write_bytes(whole)
    (steered.parent / DATA).unlink()
    with pytest.raises(InputError, match=f"external data {DATA} is missing"):
        refit(steered, NEW)
    assert steered.read_bytes() == whole


def test_a_write_that_fails_leaves_the_old_graph(steered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_model: onnx.ModelProto, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sarsteer_export.decoder_file.write_graph", fail)
    before = listing(steered.parent)
    with pytest.raises(InputError, match="no space left on the device; nothing was written"):
        refit(steered, NEW)
    assert listing(steered.parent) == before
