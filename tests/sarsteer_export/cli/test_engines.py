"""`build-engine`, and engines in `build`, `run`, `verify` and `inspect`, on a machine without a GPU."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from engines.backends import BACKENDS
from engines.sidecar import EngineRecord
from sarsteer_export.bundle.manifest import COMPONENTS, FORMAT, MANIFEST, PLAN, STEERED_DECODER, Manifest
from tests.sarsteer_export.command_line import (
    answered,
    answered_json,
    interrupt,
    listing,
    one_error,
    refused,
    run_python,
    sarsteer,
    start,
)
from tests.sarsteer_export.conftest import Inputs

RTX_LABEL = f"tensorrt-rtx-{BACKENDS['tensorrt-rtx'].version()}-sm80_86_89_120-float32"
SMALL = ("--max-batch", "2", "--max-prompt", "8", "--max-total", "16")
RTX = ("--engine", "tensorrt-rtx")
COMMAND = "import sys; from sarsteer_export.cli import main; main(sys.argv[1:])"
FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
from sarsteer_export.cli import main
main(sys.argv[1:])
"""


@pytest.fixture
def steered(bundle_path: Path) -> Path:
    return bundle_path / STEERED_DECODER


@pytest.fixture(scope="module")
def engine_bundle(
    bundle_path: Path, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    """The bundle built again with two engines, and what `--json` printed. Read-only for tests."""
    path = Path(shutil.copytree(bundle_path, tmp_path_factory.mktemp("engines") / "bundle"))
    arguments = (*inputs.build, *RTX, "--engine", "onnxruntime-cuda", "--max-batch", "2")
    return path, answered_json(sarsteer(*arguments, "-o", path, "--overwrite", "--json"))


# --- build-engine --------------------------------------------------------------------------------------------


def test_build_engine_writes_an_engine_and_its_sidecar(steered: Path, tmp_path: Path) -> None:
    before = listing(steered.parent)
    answer = answered_json(sarsteer("build-engine", steered, *RTX, *SMALL, "-o", tmp_path / "e", "--json"))
    folder = tmp_path / "e" / RTX_LABEL
    assert set(listing(tmp_path / "e")) == {
        RTX_LABEL,
        f"{RTX_LABEL}/decoder_model_merged.engine",
        f"{RTX_LABEL}/decoder_model_merged.json",
    }
    record = EngineRecord.read(folder / "decoder_model_merged.json")
    (entry,) = answer["engines"]
    assert entry["path"] == str(folder / "decoder_model_merged.engine")
    assert entry["engine"] == record.engine
    assert record.graph["file"] == steered.name
    assert len(record.steering) == 2 * 3
    assert listing(steered.parent) == before


def test_build_engine_says_what_it_made(steered: Path, tmp_path: Path) -> None:
    text = answered(sarsteer("build-engine", steered, *RTX, *SMALL, "-o", tmp_path / "e"))
    for words in (RTX_LABEL, "profiles: prefill, decode", "6 constants found in the network", "refittable: "):
        assert words in text


def test_shapes_as_trtexec_takes_them(steered: Path, tmp_path: Path) -> None:
    shapes = (
        *("--profile", "prompt", "--min-shapes", "inputs_embeds:1x1x64,past_key_values.0.key:1x2x0x16"),
        *("--opt-shapes", "inputs_embeds:1x4x64,past_key_values.0.key:1x2x0x16"),
        *("--max-shapes", "inputs_embeds:2x8x64,past_key_values.0.key:2x2x8x16"),
        *("--profile", "answer", "--min-shapes", "inputs_embeds:1x1x64,past_key_values.0.key:1x2x0x16"),
        *("--opt-shapes", "inputs_embeds:1x1x64,past_key_values.0.key:1x2x4x16"),
        *("--max-shapes", "inputs_embeds:2x1x64,past_key_values.0.key:2x2x15x16"),
    )
    answer = answered_json(sarsteer("build-engine", steered, *RTX, *shapes, "-o", tmp_path / "e", "--json"))
    prompt, decode = answer["engines"][0]["profiles"]
    assert (prompt["name"], decode["name"]) == ("prompt", "answer")
    assert prompt["shapes"]["inputs_embeds"] == {"min": [1, 1, 64], "opt": [1, 4, 64], "max": [2, 8, 64]}
    assert decode["shapes"]["past_key_values.2.value"] == {
        "min": [1, 2, 0, 16],
        "opt": [1, 2, 4, 16],
        "max": [2, 2, 15, 16],
    }
    assert decode["shapes"]["attention_mask"] == {"min": [1, 1], "opt": [1, 5], "max": [2, 16]}


def test_an_engine_that_exists_is_kept(steered: Path, tmp_path: Path) -> None:
    build = ("build-engine", steered, *RTX, *SMALL, "-o", tmp_path / "e")
    answered(sarsteer(*build))
    (tmp_path / "e" / RTX_LABEL / "mine.txt").write_text("mine")
    before = listing(tmp_path)
    refused(sarsteer(*build), "exists", "--overwrite")
    assert listing(tmp_path) == before
    answered(sarsteer(*build, "--overwrite"))
    assert set(listing(tmp_path)) == set(before)
    assert (tmp_path / "e" / RTX_LABEL / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("folder", ["engines", ".", "a/b/c/d"])
@pytest.mark.parametrize("there", [True, False])
def test_nothing_is_written_into_a_bundle(steered: Path, tmp_path: Path, folder: str, there: bool) -> None:
    """Neither over its engines nor beside them: a bundle is what its manifest lists."""
    bundle = tmp_path / "bundle"
    output = bundle / folder
    (output / RTX_LABEL).mkdir(parents=True)
    (bundle / MANIFEST).write_text(json.dumps({"format": FORMAT}), encoding="utf-8")
    if there:
        (output / RTX_LABEL / "decoder_model_merged.engine").write_text("proven", encoding="utf-8")
    before = listing(tmp_path)
    for more in ((), ("--overwrite",)):
        result = sarsteer("build-engine", steered, *RTX, *SMALL, "-o", output, *more)
        why = "would no longer hold" if there else "holds nothing but what its manifest lists"
        refused(result, f"the bundle {bundle}", why, "outside the bundle with -o")
        assert listing(tmp_path) == before


def test_a_config_may_name_several_engines(steered: Path, tmp_path: Path) -> None:
    config = tmp_path / "engines.toml"
    config.write_text('engine = ["tensorrt-rtx", "onnxruntime-cuda"]\nmax-batch = 2\n')
    refused(
        sarsteer("build-engine", steered, "--config", config, "-o", tmp_path / "e"),
        "onnxruntime-cuda runs the ONNX file itself",
    )
    config.write_text('engine = "tensorrt-rtx"\nmax-batch = 2\nmax-prompt = 8\nmax-total = 16\n')
    answer = answered_json(
        sarsteer("build-engine", steered, "--config", config, "-o", tmp_path / "e", "--json")
    )
    assert answer["engines"][0]["profiles"][0]["shapes"]["inputs_embeds"]["max"] == [2, 8, 64]


@pytest.mark.parametrize(
    ("options", "words", "code"),
    [
        ((), ("no engine is asked for", "--engine"), 2),
        (("--engine", "tensorrt"), ("tensorrt", "pip install tensorrt"), 3),
        ((*RTX, *RTX), ("--engine tensorrt-rtx is given twice",), 2),
        ((*RTX, *["--compute-capability", "8.9"] * 2), ("--compute-capability 8.9 is given twice",), 2),
        ((*RTX, "--max-batch", "0"), ("--max-batch",), 2),
        ((*RTX, "--max-prompt", "9", "--max-total", "8"), ("--max-prompt", "--max-total"), 2),
        ((*RTX, "--compute-capability", "9.0"), ("9.0", "8.9"), 3),
        ((*RTX, "--min-shapes", "inputs_embeds:1x1"), ("inputs_embeds",), 2),
        ((*RTX, "--min-shapes", "inputs_embeds=1x1x64"), ("--min-shapes", "inputs_embeds=1x1x64"), 2),
        ((*RTX, "--min-shapes", "nonsense:1x1x64"), ("nonsense",), 2),
        ((*RTX, "--min-shapes", "inputs_embeds:1x1x65"), ("65", "64"), 2),
        (
            (*RTX, "--min-shapes", "inputs_embeds:2x1x64,position_ids:1x1"),
            ("inputs_embeds", "position_ids"),
            2,
        ),
        (
            (*RTX, "--min-shapes", "inputs_embeds:2x4x64", "--max-shapes", "inputs_embeds:1x8x64"),
            ("2", "1"),
            2,
        ),
        ((*RTX, "--profile", "a"), ("--profile",), 2),
        ((*RTX, "--max-total", "99999999999"), ("--max-total is 99999999999", "2147483647"), 2),
        ((*RTX, "--max-batch", "3000000000"), ("--max-batch is 3000000000",), 2),
        (
            (*RTX, "--max-shapes", "inputs_embeds:1x2147483647x64,past_key_values.0.key:1x2x2147483647x16"),
            ("attention_mask", "at most 2147483647"),
            2,
        ),
    ],
)
def test_options_that_make_no_sense(
    steered: Path, tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...], code: int
) -> None:
    refused(sarsteer("build-engine", steered, *options, "-o", tmp_path / "e"), *words, code=code)
    assert listing(tmp_path) == {}


def missing(graph: Path) -> None:
    graph.unlink()


def truncated(graph: Path) -> None:
    graph.write_bytes(graph.read_bytes()[:5000])


def without_data(graph: Path) -> None:
    graph.with_name(f"{STEERED_DECODER.name}_data").unlink()


def short_data(graph: Path) -> None:
    data = graph.with_name(f"{STEERED_DECODER.name}_data")
    data.write_bytes(data.read_bytes()[:100])


def unknown_operator(graph: Path) -> None:
    model = onnx.load(graph, load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "Softmax")
    node.name, node.op_type, node.domain = "attention.7", "FlashSoftmax", "my.ops"
    model.opset_import.append(helper.make_opsetid("my.ops", 1))
    graph.write_bytes(model.SerializeToString())


def steering_cut_off(graph: Path) -> None:
    """The steered sum of block 1 is read by nobody: its producer's tensor is, as if it were not there."""
    model = onnx.load(graph, load_external_data=False)
    add = next(node for node in model.graph.node if node.name == "sarsteer.1.block_output.add.0.add")
    for node in model.graph.node:
        if node.name != add.name:
            for place, name in enumerate(node.input):
                if name == add.output[0]:
                    node.input[place] = add.input[0]
    graph.write_bytes(model.SerializeToString())


def _changed(graph: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(graph, load_external_data=False)
    change(model)
    graph.write_bytes(model.SerializeToString())


def one_edit_removed(graph: Path) -> None:
    """As `steering_cut_off`, and what is left of the edit is swept away."""
    steering_cut_off(graph)

    def sweep(model: onnx.ModelProto) -> None:
        for kind in (model.graph.node, model.graph.initializer):
            kept = [item for item in kind if not item.name.startswith("sarsteer.1.")]
            del kind[:]
            kind.extend(kept)

    _changed(graph, sweep)


def constants_renamed(graph: Path) -> None:
    """As simplifiers do."""

    def rename(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.name.endswith(".vector"):
                old, tensor.name = tensor.name, f"const_{tensor.name[9]}"
                for node in model.graph.node:
                    node.input[:] = [tensor.name if name == old else name for name in node.input]

    _changed(graph, rename)


def a_vector_of_zeros(graph: Path) -> None:
    def zero(model: onnx.ModelProto) -> None:
        tensor = next(each for each in model.graph.initializer if each.name.endswith(".vector"))
        tensor.raw_data = bytes(len(tensor.raw_data))

    _changed(graph, zero)


@pytest.mark.parametrize(
    ("damage", "words", "code"),
    [
        (one_edit_removed, ("steering constants are not those that were patched in", "patch the"), 2),
        (constants_renamed, ("steering constants are not those that were patched in",), 2),
        (a_vector_of_zeros, ("steering constants are not those that were patched in",), 2),
        (missing, ("no such file",), 2),
        (truncated, ("not a readable ONNX model",), 2),
        (without_data, ("external data", "is missing beside it"), 2),
        (short_data, ("external data", "has 100 bytes"), 2),
        (unknown_operator, ("FlashSoftmax", "attention.7", "ONNX's own operators"), 3),
        (steering_cut_off, ("sarsteer.1.block_output.add.0.vector", "did not reach"), 5),
    ],
)
def test_a_graph_that_cannot_be_built(
    decoder_copy: Path,
    bundle_path: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    words: tuple[str, ...],
    code: int,
) -> None:
    graph = Path(shutil.copy(bundle_path / STEERED_DECODER, decoder_copy.parent / "steered.onnx"))
    damage(graph)
    output = tmp_path / "out" / "e"
    refused(sarsteer("build-engine", graph, *RTX, *SMALL, "-o", output), *words, code=code)
    assert not (tmp_path / "out").exists()


def test_a_build_that_tensorrt_fails_carries_its_log(steered: Path, tmp_path: Path) -> None:
    result = sarsteer(
        "build-engine", steered, *RTX, *SMALL, "--compute-capability", "7.5", "-o", tmp_path / "e"
    )
    assert result.exit_code == 5
    assert "cannot build an engine of" in result.stderr
    assert "FP32 GEMM is not supported" in result.stderr
    assert "Traceback" not in result.stderr
    assert listing(tmp_path) == {}


def test_no_room_is_seen_before_the_build(
    steered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("sarsteer_export.engine_build.shutil.disk_usage", lambda _place: usage)
    refused(
        sarsteer("build-engine", steered, *RTX, *SMALL, "-o", tmp_path / "e"), "the engine needs at least"
    )
    assert listing(tmp_path) == {}


def test_a_disk_that_fills_up_while_the_engine_is_written(steered: Path, tmp_path: Path) -> None:
    done = run_python(FULL_DISK, "build-engine", steered, *RTX, *SMALL, "-o", tmp_path / "new" / "e")
    assert done.returncode == 2, done.stderr
    one_error(done.stderr, "nothing was written")
    assert listing(tmp_path) == {}


def test_an_interrupted_build_leaves_nothing(steered: Path, tmp_path: Path) -> None:
    process = start(COMMAND, "build-engine", steered, *RTX, "-o", tmp_path / "new" / "e")
    while not list(tmp_path.glob("new/e/*/.decoder*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    done = interrupt(process)
    assert done.returncode == 130, done.stderr
    one_error(done.stderr, "interrupted", "nothing was written")
    assert listing(tmp_path) == {}


# --- engines in a bundle -------------------------------------------------------------------------------------


def test_a_bundle_holds_an_engine_of_every_graph(engine_bundle: tuple[Path, Any], inputs: Inputs) -> None:
    path, answer = engine_bundle
    rtx, cuda = answer["engines"]
    folder = path / "engines" / RTX_LABEL
    assert rtx["components"] == {
        "decoder": f"engines/{RTX_LABEL}/decoder.engine",
        "audio_encoder": f"engines/{RTX_LABEL}/audio_encoder.engine",
        "embed_tokens": f"engines/{RTX_LABEL}/embed_tokens.engine",
    }
    assert cuda["components"]["decoder"] == STEERED_DECODER.as_posix()
    manifest = Manifest.read(path)
    manifest.check_hashes(path)
    for component, graph in COMPONENTS.items():
        record = EngineRecord.read(folder / f"{component}.json")
        assert manifest.files[f"engines/{RTX_LABEL}/{component}.engine"]["sha256"] == record.engine["sha256"]
        assert manifest.files[graph.as_posix()]["sha256"] == record.graph["sha256"]
    decoder = EngineRecord.read(folder / "decoder.json")
    assert decoder.plan_sha256 == manifest.plan_sha256
    wanted = {name for edit in manifest.edits for name in edit["constants"]}
    assert {constant.name for constant in decoder.steering} == wanted
    config = json.loads((inputs.model / "config.json").read_text(encoding="utf-8"))
    longest = config["text_config"]["max_position_embeddings"]
    assert decoder.profiles[0].shapes["attention_mask"].max == (2, min(longest, 2048))


def test_an_engine_that_was_not_run_is_never_called_passed(engine_bundle: tuple[Path, Any]) -> None:
    path, answer = engine_bundle
    assert answer["parity"]["verdict"] == "passed"
    for entry in answer["engines"]:
        assert entry["verdict"] == "built, not executed"
        assert "runs on an NVIDIA GPU" in entry["reason"]
        report = json.loads(
            (
                path / "reports" / f"parity-{entry['backend']}-{entry['version']}-{entry['precision']}.json"
            ).read_text()
        )
        assert (report["verdict"], report["cases"]) == ("built, not executed", [])
        assert report["backend"] == entry["backend"]
    page = (
        path / "reports" / f"parity-tensorrt-rtx-{BACKENDS['tensorrt-rtx'].version()}-float32.html"
    ).read_text()
    assert "Built, not executed" in page
    assert "runs on an NVIDIA GPU" in page


def test_the_same_build_again_does_nothing(engine_bundle: tuple[Path, Any], inputs: Inputs) -> None:
    path, _ = engine_bundle
    before = listing(path)
    build = (*inputs.build, *RTX, "--engine", "onnxruntime-cuda", "--max-batch", "2")
    text = answered(sarsteer(*build, "-o", path))
    assert "built, not executed" in text
    assert listing(path) == before


def test_engines_of_other_profiles_are_built_anew(
    engine_bundle: tuple[Path, Any], inputs: Inputs, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(engine_bundle[0], tmp_path / "bundle"))
    build = (*inputs.build, *RTX, "--engine", "onnxruntime-cuda", "--overwrite", "-o", path, "--json")
    answer = answered_json(sarsteer(*build, "--max-batch", "3"))
    assert answer["reused"] == ["calibrate", "export"]
    other_judge = answered_json(sarsteer(*build, "--max-batch", "3", "--answer-pattern", "x"))
    both = ["engine tensorrt-rtx", "engine onnxruntime-cuda"]
    assert other_judge["reused"] == ["calibrate", "export", *both]
    assert [entry["verdict"] for entry in other_judge["engines"]] == ["built, not executed"] * 2


def test_an_engine_that_is_added_leaves_the_others_as_they_are(
    engine_bundle: tuple[Path, Any], inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copytree(engine_bundle[0], tmp_path / "bundle"))
    before = listing(path / "engines")
    monkeypatch.setattr(
        "sarsteer_export.bundle_engines.build_engine", None
    )  # none is built: the one is there
    build = (*inputs.build, *RTX, "--max-batch", "2", "--overwrite", "-o", path, "--json")
    third = ("--engine", "onnxruntime-tensorrt")
    answer = answered_json(sarsteer(*build, *third))
    assert answer["reused"] == ["calibrate", "export", "engine tensorrt-rtx"]
    assert [entry["backend"] for entry in answer["engines"]] == ["tensorrt-rtx", "onnxruntime-tensorrt"]
    assert listing(path / "engines") == before


def test_a_dry_run_names_the_engines(engine_bundle: tuple[Path, Any], inputs: Inputs, tmp_path: Path) -> None:
    plain = answered_json(sarsteer(*inputs.build, "-o", tmp_path / "b", "--dry-run", "--json"))
    more = answered_json(sarsteer(*inputs.build, *RTX, "-o", tmp_path / "b", "--dry-run", "--json"))
    assert [step for step, _ in more["steps"]] == ["calibrate", "export", "engine tensorrt-rtx", "verify"]
    assert more["disk_bytes"] > plain["disk_bytes"]
    written = sum(file.stat().st_size for file in engine_bundle[0].rglob("*") if file.is_file())
    assert written < more["disk_bytes"] < 2 * written, "an estimate is enough, and no more than twice as much"


@pytest.mark.parametrize(
    ("options", "words", "code"),
    [
        (("--engine", "tensorrt"), ("pip install tensorrt",), 3),
        ((*RTX, "--max-prompt", "999999"), ("--max-prompt", "--max-total"), 2),
        ((*RTX, "--max-shapes", "inputs_embeds:2x8"), ("inputs_embeds",), 2),
        ((*RTX, "--max-shapes", "inputs_embeds:2x8x65"), ("65", "64"), 2),
        ((*RTX, "--max-shapes", "inputs_embeds:1x8x64"), ("parity runs 2 prompts", "admits 1"), 2),
        (("--max-shapes", "inputs_embeds:2x8x64"), ("--engine",), 2),
        (("--max-batch", "8"), ("an engine's; name one with --engine",), 2),
        (("--max-total", "2048"), ("an engine's; name one with --engine",), 2),
        ((*RTX, "--max-batch", "1"), ("parity runs 2 prompts at once", "--max-batch"), 2),
        ((*RTX, "--compute-capability", "1.0"), ("1.0",), 3),
        ((*RTX, "--max-total", "99999999999", "--dry-run"), ("--max-total is 99999999999",), 2),
        (
            (
                *(*RTX, "--dry-run", "--max-shapes"),
                "inputs_embeds:2x2147483647x64,past_key_values.0.key:2x2x2147483647x16",
            ),
            ("attention_mask", "at most 2147483647"),
            2,
        ),
    ],
)
def test_engines_that_cannot_be_built_are_refused_before_any_work(
    inputs: Inputs, tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...], code: int
) -> None:
    message = refused(sarsteer(*inputs.quick_build, *options, "-o", tmp_path / "b"), *words, code=code)
    assert "harmful" not in message
    assert listing(tmp_path) == {}


@pytest.mark.parametrize("engine", ["tensorrt-rtx", "onnxruntime-cuda"])
def test_without_a_gpu_run_and_verify_say_so_once(
    engine_bundle: tuple[Path, Any], inputs: Inputs, engine: str
) -> None:
    path, _ = engine_bundle
    run = refused(sarsteer("run", path, "--text", "hello", "--engine", engine), "NVIDIA", "doctor", code=3)
    verify = ("verify", path, "--model", inputs.model, "--requests", inputs.harmful, "--engine", engine)
    assert refused(sarsteer(*verify), "NVIDIA", "doctor", code=3) == run


def test_an_engine_that_the_bundle_has_not(bundle_path: Path) -> None:
    refused(
        sarsteer("run", bundle_path, "--text", "hello", *RTX),
        "holds no engine for tensorrt-rtx",
        "build it with --engine tensorrt-rtx",
    )


# --- inspect -------------------------------------------------------------------------------------------------


def test_inspect_shows_an_engine(engine_bundle: tuple[Path, Any]) -> None:
    path, _ = engine_bundle
    engine = path / "engines" / RTX_LABEL / "decoder.engine"
    text = answered(sarsteer("inspect", engine))
    for words in (
        "tensorrt-rtx",
        "inputs_embeds: float32 [batch, sequence, 64]",
        "profile prefill",
        "profile decode",
        "not opened: tensorrt-rtx runs on an NVIDIA GPU",
        "sarsteer.2.block_output.add.0.vector  float32 [64] -> ELEMENTWISE SUM",
    ):
        assert words in text
    content = answered_json(sarsteer("inspect", engine, "--json"))
    assert content["kind"] == "engine"
    peak, start = (content["build"][name] / 1e6 for name in ("peak_rss_bytes", "start_rss_bytes"))
    assert f"peak memory {peak:.0f} MB ({start:.0f} MB before it)" in text
    assert content["plan_sha256"] == Manifest.read(path).plan_sha256
    assert "tensorrt-rtx" in answered(sarsteer("inspect", path))


def test_inspect_refuses_an_engine_that_is_not_its_sidecars(
    engine_bundle: tuple[Path, Any], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(engine_bundle[0] / "engines" / RTX_LABEL, tmp_path / "e"))
    with (folder / "decoder.engine").open("r+b") as engine:
        engine.write(b"altered")
    refused(sarsteer("inspect", folder / "decoder.engine"), "its sha256 is not the sidecar's")
    (folder / "audio_encoder.json").write_text("{}")
    refused(sarsteer("inspect", folder / "audio_encoder.engine"), "not the sidecar of an engine")
    (folder / "audio_encoder.json").unlink()
    refused(sarsteer("inspect", folder / "audio_encoder.engine"), "sidecar cannot be read")


def test_refitting_an_engine_that_is_not_refittable(engine_bundle: tuple[Path, Any], tmp_path: Path) -> None:
    path, _ = engine_bundle
    engine = path / "engines" / RTX_LABEL / "decoder.engine"
    before = listing(path)
    refused(
        sarsteer("refit", engine, "--plan", path / PLAN, "-o", tmp_path / "x" / "new.engine"),
        "not refittable",
        "build it again",
        code=3,
    )
    assert listing(path) == before
    assert listing(tmp_path) == {}
