"""`patch --copy`, and into another folder: real copies of the weights, whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import subprocess
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.external_data_helper import uses_external_data

from calibration.errors import InputError
from calibration.plan import Add, SteeringPlan
from engines.onnxruntime_runner import OnnxRuntimeRunner
from graph_passes.onnx_file import external_files, read_graph, write_graph
from sarsteer_export import PatchSettings, patch
from tests.decoders import HAND_LAYERS, HAND_WIDTH, Variant, hand_decoder
from tests.sarsteer_export.command_line import (
    answered,
    interrupt,
    listing,
    one_error,
    refused,
    run_python,
    sarsteer,
    start,
)

Usage = namedtuple("Usage", "total used free")
PLENTY = Usage(1 << 40, 0, 1 << 40)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder with its weights in `weights.bin`, and a plan for it. Read-only for tests; see `decoder`."""
    folder = tmp_path_factory.mktemp("made")
    _, proto = hand_decoder(Variant(), folder / "whole.onnx")
    (folder / "whole.onnx").unlink(missing_ok=True)
    onnx.save(
        proto, folder / "decoder.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    vector = np.random.default_rng(0).standard_normal(HAND_WIDTH).astype(np.float32)
    edits = tuple(Add(layer, vector, strength=0.5) for layer in range(HAND_LAYERS))
    SteeringPlan(HAND_WIDTH, HAND_LAYERS, edits).save(folder / "plan.safetensors")
    return folder


@pytest.fixture
def decoder(made: Path, tmp_path: Path) -> Path:
    """The decoder, in a folder of this test's own."""
    folder = tmp_path / "onnx"
    folder.mkdir()
    for name in ("decoder.onnx", "weights.bin"):
        shutil.copy(made / name, folder / name)
    return folder / "decoder.onnx"


@pytest.fixture
def two_files(decoder: Path) -> Path:
    """The same decoder, every other weight in a second file, in a folder of its own."""
    graph = read_graph(decoder)
    for tensor in [tensor for tensor in graph.graph.initializer if uses_external_data(tensor)][::2]:
        next(entry for entry in tensor.external_data if entry.key == "location").value = "more/other.bin"
    (decoder.parent / "more").mkdir()
    shutil.copy(decoder.with_name("weights.bin"), decoder.parent / "more" / "other.bin")
    write_graph(graph, decoder)
    return decoder


def given(decoder: Path, made: Path, output: Path, *options: str) -> tuple[str | Path, ...]:
    return ("patch", decoder, "--plan", made / "plan.safetensors", "-o", output, *options)


def locations(graph: Path) -> list[str]:
    return [file.location for file in external_files(read_graph(graph))]


def test_a_copy_beside_the_decoder_has_a_name_of_its_own(decoder: Path, made: Path) -> None:
    before = listing(decoder.parent)
    shared, copied = decoder.with_name("shared.onnx"), decoder.with_name("copied.onnx")
    answered(sarsteer(*given(decoder, made, shared)))
    answered(sarsteer(*given(decoder, made, copied, "--copy")))
    after = listing(decoder.parent)
    assert after == before | {
        name: after[name] for name in ("shared.onnx", "copied.onnx", "copied.onnx.data")
    }
    assert after["copied.onnx.data"] == before["weights.bin"]
    assert locations(shared) == ["weights.bin"]
    assert locations(copied) == ["copied.onnx.data"]
    assert onnx.load(copied) == onnx.load(shared), "the two differ in more than where their weights lie"
    decoder.with_name("weights.bin").unlink()
    with OnnxRuntimeRunner(copied):
        pass


def test_several_files_are_numbered(two_files: Path, made: Path) -> None:
    copied = two_files.with_name("copied.onnx")
    before = listing(two_files.parent)
    answered(sarsteer(*given(two_files, made, copied, "--copy")))
    assert locations(copied) == ["copied.onnx.data.0", "copied.onnx.data.1"]
    after = listing(two_files.parent)
    assert after["copied.onnx.data.0"] == before["more/other.bin"]
    assert set(after) - set(before) == {"copied.onnx", *locations(copied)}
    shutil.rmtree(two_files.parent / "more")
    two_files.with_name("weights.bin").unlink()
    with OnnxRuntimeRunner(copied):
        pass


@pytest.mark.parametrize("options", [(), ("--copy",)])
def test_in_another_folder_copies_keep_their_names(
    two_files: Path, made: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    output = tmp_path / "new" / "steered.onnx"
    answered(sarsteer(*given(two_files, made, output, *options)))
    assert locations(output) == ["more/other.bin", "weights.bin"]
    assert list(listing(tmp_path / "new")) == ["more", "more/other.bin", "steered.onnx", "weights.bin"]
    with OnnxRuntimeRunner(output):
        pass


@pytest.mark.parametrize("beside", [True, False])
def test_copies_are_regular_files_of_the_usual_mode_never_links(
    decoder: Path, made: Path, tmp_path: Path, beside: bool
) -> None:
    data = decoder.with_name("weights.bin")
    data.chmod(0o600)
    output = (decoder.parent if beside else tmp_path / "new") / "steered.onnx"
    answered(sarsteer(*given(decoder, made, output, "--copy")))
    (tmp_path / "usual").touch()
    copy = output.parent / locations(output)[0]
    for file in (output, copy):
        found = file.lstat()
        assert stat.S_ISREG(found.st_mode)
        assert found.st_nlink == 1
        assert found.st_mode == (tmp_path / "usual").stat().st_mode
    assert data.stat().st_nlink == 1
    assert copy.stat().st_ino != data.stat().st_ino


def test_progress_of_a_copy_is_on_stderr(decoder: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_clone(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "ioctl", no_clone)
    result = sarsteer(*given(decoder, made, decoder.with_name("s.onnx"), "--copy", "--json"))
    assert result.stderr == "copy weights (MiB): 1/1\n"
    assert sarsteer(*given(decoder, made, decoder.with_name("t.onnx"))).stderr == ""


def test_a_copy_replaces_files_only_when_told_to(decoder: Path, made: Path) -> None:
    output, data = decoder.with_name("s.onnx"), decoder.with_name("s.onnx.data")
    data.write_text("precious", encoding="utf-8")
    before = listing(decoder.parent)
    refused(sarsteer(*given(decoder, made, output, "--copy")), str(data), "exists", "--overwrite")
    assert listing(decoder.parent) == before
    answered(sarsteer(*given(decoder, made, output, "--copy", "--overwrite")))
    assert data.read_bytes() == decoder.with_name("weights.bin").read_bytes()


def test_a_folder_in_the_place_of_a_copy_is_never_replaced(decoder: Path, made: Path) -> None:
    output = decoder.with_name("s.onnx")
    (decoder.parent / "s.onnx.data").mkdir()
    before = listing(decoder.parent)
    refused(sarsteer(*given(decoder, made, output, "--copy", "--overwrite")), "s.onnx.data: is a directory")
    assert listing(decoder.parent) == before


def test_the_output_is_never_the_data_of_the_decoder(two_files: Path, made: Path, tmp_path: Path) -> None:
    """Not even from a folder where the data has another name."""
    before = listing(two_files.parent)
    for output in (two_files.parent / "more" / "other.bin", tmp_path / "weights.bin"):
        words = ("is the name of the decoder's external data", "name another output")
        refused(sarsteer(*given(two_files, made, output, "--overwrite")), *words)
    assert listing(two_files.parent) == before


def test_a_copy_never_takes_the_place_of_the_decoder_s_own_files(decoder: Path, made: Path) -> None:
    data = decoder.with_name("weights.bin").rename(decoder.with_name("s.onnx.data"))
    graph = read_graph_without_data(decoder)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = data.name
    write_graph(graph, decoder)
    before = listing(decoder.parent)
    output = decoder.with_name("s.onnx")
    refused(
        sarsteer(*given(decoder, made, output, "--copy", "--overwrite")),
        "belongs to the decoder",
        "another name",
    )
    assert listing(decoder.parent) == before


def read_graph_without_data(path: Path) -> onnx.ModelProto:
    return onnx.load(path, load_external_data=False)


def test_a_copy_does_not_follow_a_link_out_of_the_output_s_folder(
    two_files: Path, made: Path, tmp_path: Path
) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "new" / "more").symlink_to(tmp_path / "outside")
    refused(
        sarsteer(*given(two_files, made, tmp_path / "new" / "s.onnx", "--overwrite")),
        "lies behind a link that leaves the output's folder",
    )
    assert listing(tmp_path / "outside") == {}


def test_over_the_decoder_itself_only_when_told_to(decoder: Path, made: Path) -> None:
    before = listing(decoder.parent)
    refused(sarsteer(*given(decoder, made, decoder)), "exists", "--overwrite")
    assert listing(decoder.parent) == before
    answered(sarsteer(*given(decoder, made, decoder, "--overwrite")))
    assert locations(decoder) == ["weights.bin"]
    assert listing(decoder.parent)["weights.bin"] == before["weights.bin"]


def test_the_python_api_copies_too(decoder: Path, made: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    output = decoder.with_name("s.onnx")
    result = patch(
        decoder,
        made / "plan.safetensors",
        output,
        PatchSettings(copy=True),
        progress=lambda *report: reports.append(report),
    )
    assert locations(output) == ["s.onnx.data"]
    assert result.model == read_graph(output)
    assert all(report[0] == "copy weights (MiB)" for report in reports)


# --- where it must not end half done -------------------------------------------------------------------------


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts small filesystems in memory; skips where that may not be done."""
    places: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"mounted{len(places)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if (
            shutil.which("mount") is None
            or subprocess.run(command, capture_output=True, check=False).returncode
        ):
            pytest.skip("filesystems cannot be mounted here (needs root on Linux)")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_too_small_for_a_copy_is_seen_before_anything_is_written(
    decoder: Path, made: Path, mounted: Callable[..., Path]
) -> None:
    place = mounted("size=16k")
    size = decoder.with_name("weights.bin").stat().st_size
    assert size > 16384
    words = ("no space left for a copy of the external data", f"{place}", "free")
    refused(sarsteer(*given(decoder, made, place / "new" / "s.onnx")), *words)
    assert listing(place) == {}


def test_a_disk_that_fills_up_during_a_copy(
    decoder: Path, made: Path, mounted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = mounted("size=16k")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: PLENTY)  # as if another process took the room
    words = (str(place / "new" / "s.onnx"), "no space left on the device", "nothing was written")
    refused(sarsteer(*given(decoder, made, place / "new" / "s.onnx")), *words)
    assert listing(place) == {}


def test_a_disk_that_fills_up_during_a_copy_beside_the_decoder(
    decoder: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, copy: Path) -> bool:
        copy.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(copy))

    monkeypatch.setattr("graph_passes.external_copy.clone", full)
    before = listing(decoder.parent)
    output = decoder.with_name("s.onnx")
    refused(
        sarsteer(*given(decoder, made, output, "--copy")),
        "no space left on the device",
        "nothing was written",
    )
    assert listing(decoder.parent) == before


def test_a_folder_mounted_read_only(decoder: Path, made: Path, mounted: Callable[..., Path]) -> None:
    place = mounted("ro")
    for output in (place / "s.onnx", place / "new" / "s.onnx"):
        words = ("cannot be written (Read-only file system)", "nothing was written")
        refused(sarsteer(*given(decoder, made, output)), str(output), *words)


SLOW_COPY = """
import sys, time
from graph_passes import external_copy
stream = external_copy._stream
external_copy.clone = lambda source, copy: False
def slow(*arguments):
    stream(*arguments)
    print("ready", flush=True)
    time.sleep(60)
external_copy._stream = slow
from sarsteer_export.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("beside", [True, False])
def test_ctrl_c_during_a_copy_leaves_nothing(decoder: Path, made: Path, tmp_path: Path, beside: bool) -> None:
    output = (decoder.parent if beside else tmp_path / "new" / "folder") / "s.onnx"
    before = listing(tmp_path)
    process = start(SLOW_COPY, *given(decoder, made, output, "--copy"))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert list(tmp_path.rglob(".s.onnx.*")), "the copy is not in a staging folder"
    done = interrupt(process)
    assert done.returncode == 130, done.stderr
    one_error(done.stderr, "interrupted", "nothing was written")
    assert listing(tmp_path) == before


SLOW_MOVE = """
import sys
from pathlib import Path
replace = Path.replace
def interrupted(path, to):
    moved = replace(path, to)
    if Path(to).name == sys.argv[1]:
        Path.replace = replace  # once: what is put back is not interrupted
        raise KeyboardInterrupt
    return moved
Path.replace = interrupted
from sarsteer_export.cli import main
main(sys.argv[2:])
"""


@pytest.mark.parametrize("after", ["weights.bin", "other.bin"])
def test_ctrl_c_between_two_moves_puts_everything_back(
    two_files: Path, made: Path, tmp_path: Path, after: str
) -> None:
    place = tmp_path / "new"
    place.mkdir()
    for name in ("weights.bin", "s.onnx"):
        (place / name).write_text(f"old {name}", encoding="utf-8")
    before = listing(tmp_path)
    done = run_python(SLOW_MOVE, after, *given(two_files, made, place / "s.onnx", "--overwrite"))
    assert done.returncode == 130, done.stderr
    one_error(done.stderr, "interrupted", "nothing was written")
    assert listing(tmp_path) == before


def test_a_link_swapped_in_for_the_data_is_seen(decoder: Path, made: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    shutil.move(decoder.with_name("weights.bin"), secret)
    decoder.with_name("weights.bin").symlink_to(secret)
    with pytest.raises(InputError, match="leaves the graph's folder"):
        patch(decoder, made / "plan.safetensors", tmp_path / "new" / "s.onnx")
    assert not os.path.lexists(tmp_path / "new")
