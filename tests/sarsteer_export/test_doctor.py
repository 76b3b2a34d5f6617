"""What `doctor` concludes: from this machine as it is, and from machines made up."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from engines.backends import BACKENDS
from engines.cuda_driver import NO_DRIVER, NO_GPU, CudaDriver, Gpu, cuda_driver
from sarsteer_export.cli.doctor import command
from sarsteer_export.diagnosis import Answer, Diagnosis
from sarsteer_export.doctor import ONNX_RUNTIMES, REQUIRED, Machine, diagnose, examine
from sarsteer_export.trials import CPU_BUILD, NOT_INSTALLED, Trial, attempt
from tests.sarsteer_export.command_line import answered, answered_json

PROVIDERS = tuple(str(row.provider) for row in BACKENDS.values() if row.provider)
ADA = Gpu("NVIDIA RTX 4090", "8.9", 24 << 30)
HOPPER = Gpu("NVIDIA H100", "9.0", 80 << 30)
TURING = Gpu("NVIDIA RTX 2080 Ti", "7.5", 11 << 30)
BLACKWELL = Gpu("NVIDIA GB10", "12.1", 119 << 30)
YES, NO, UNKNOWN = Answer.YES, Answer.NO, Answer.UNKNOWN

needs_no_driver = pytest.mark.skipif(cuda_driver().problem is None, reason="there is a driver and a GPU here")


def machine(*gpus: Gpu) -> Machine:
    """A machine with these GPUs on which everything is installed and works."""
    onnxruntime = Trial("1.31.1", details=PROVIDERS)
    return Machine(
        versions=dict.fromkeys((*REQUIRED, "onnxruntime-gpu", "tensorrt", "tensorrt-rtx"), "1.0"),
        driver=CudaDriver("13.0", gpus or (ADA,), None, "580.95.05"),
        trials={
            "torch": Trial("2.13.0", details=("13.0",)),
            "onnxruntime-cpu": onnxruntime,
            "onnxruntime-cuda": onnxruntime,
            "onnxruntime-tensorrt": onnxruntime,
            "tensorrt": Trial("11.0"),
            "tensorrt-rtx": Trial("1.7.1", details=("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")),
        },
    )


def tried(base: Machine, **trials: Trial) -> Machine:
    """The machine with other outcomes of some trials; `_` stands for the `-` of a name."""
    changed = {name.replace("_", "-"): trial for name, trial in trials.items()}
    return replace(base, trials={**base.trials, **changed})


def driven(base: Machine, problem: str, cuda_version: str | None = None) -> Machine:
    return replace(base, driver=CudaDriver(cuda_version, (), problem))


def answers(found: Diagnosis) -> dict[str, tuple[Answer, Answer, Answer]]:
    return {row.name: (row.builds.answer, row.runs.answer, row.refit.answer) for row in found.engines}


def obstacles(found: Diagnosis, engine: str, step: str) -> dict[str, str]:
    (row,) = (row for row in found.engines if row.name == engine)
    return {obstacle.reason: obstacle.remedy for obstacle in getattr(row, step).obstacles}


def only_obstacle(found: Diagnosis, engine: str, step: str = "runs") -> tuple[str, str]:
    (pair,) = obstacles(found, engine, step).items()
    return pair


def test_a_machine_with_everything_does_everything() -> None:
    found = diagnose(machine())
    assert answers(found) == dict.fromkeys(BACKENDS, (YES, YES, YES))
    assert found.problems == ()
    assert "what to do" not in found.table()
    assert "driver 580.95.05, CUDA up to 13.0" in found.table()
    assert "GPU 0  NVIDIA RTX 4090  compute capability 8.9  24.0 GiB" in found.table()


def test_whatever_is_not_a_yes_has_a_reason_and_a_remedy_of_one_line() -> None:
    broken = Trial(load_problem=NOT_INSTALLED)
    worlds = [
        driven(machine(), NO_DRIVER),
        machine(HOPPER),
        machine(TURING),
        tried(machine(), torch=broken, tensorrt=broken, tensorrt_rtx=broken, onnxruntime_cuda=broken),
        driven(tried(machine(), torch=broken, onnxruntime_cpu=broken, onnxruntime_tensorrt=broken), NO_GPU),
    ]
    for world in worlds:
        found = diagnose(world)
        seen = 0
        for row in found.engines:
            for ability in (row.builds, row.runs, row.refit):
                assert (ability.answer is YES) == (ability.obstacles == ())
                for obstacle in ability.obstacles:
                    seen += 1
                    assert obstacle.reason
                    assert obstacle.remedy
                    assert "\n" not in obstacle.reason + obstacle.remedy
                    assert obstacle.reason in found.table()
                    assert f"remedy: {obstacle.remedy}" in found.table()
        assert seen


def test_without_a_driver_only_the_cpu_runs_and_only_enterprise_tensorrt_does_not_build() -> None:
    found = diagnose(driven(machine(), NO_DRIVER))
    assert answers(found) == {
        "onnxruntime-cpu": (YES, YES, YES),
        "onnxruntime-cuda": (YES, NO, YES),
        "onnxruntime-tensorrt": (YES, NO, YES),
        "tensorrt": (NO, NO, NO),
        "tensorrt-rtx": (YES, NO, NO),
    }
    assert only_obstacle(found, "tensorrt-rtx", "refit")[0] == NO_DRIVER
    assert found.table().count(NO_DRIVER) == 2  # among the GPUs, and once for all that it stops
    assert "tensorrt (build, run, refit), tensorrt-rtx (run, refit)" in found.table()


@pytest.mark.parametrize(
    ("library", "told"),
    [
        ("libcublasLt.so.13: cannot open shared object file: No such file or directory", True),
        ("libcuda.so.1: cannot open shared object file: No such file or directory", False),
        ("CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version", False),
    ],
)
def test_a_missing_library_is_told_beside_a_missing_driver(library: str, told: bool) -> None:
    """Both have to be mended; what fails for want of a driver is no trouble of its own."""
    trial = Trial("1.31.1", run_problem=library, details=PROVIDERS)
    found = diagnose(driven(tried(machine(), onnxruntime_cuda=trial), NO_DRIVER))
    listed = obstacles(found, "onnxruntime-cuda", "runs")
    assert NO_DRIVER in listed
    remedy = listed.get(f"CUDAExecutionProvider does not run: {library}")
    assert (remedy == 'pip install "onnxruntime-gpu[cuda,cudnn]"') if told else remedy is None


@pytest.mark.parametrize(
    ("problem", "remedy"),
    [
        (NO_DRIVER, "use a machine with an NVIDIA GPU"),
        (NO_GPU, "CUDA_VISIBLE_DEVICES"),
        ("the NVIDIA driver cannot be used (cuInit returned error 803)", "make nvidia-smi work"),
    ],
)
def test_each_trouble_with_the_driver_has_its_own_remedy(problem: str, remedy: str) -> None:
    reason, told = only_obstacle(diagnose(driven(machine(), problem, "13.0")), "onnxruntime-cuda")
    assert reason == problem
    assert remedy in told


def test_a_cpu_build_of_torch_beside_a_gpu_stops_tensorrt_from_running_and_nothing_else() -> None:
    torch = Trial("2.13.0+cpu", run_problem="Torch not compiled with CUDA enabled", details=(CPU_BUILD,))
    found = diagnose(tried(machine(), torch=torch))
    assert answers(found) == {
        "onnxruntime-cpu": (YES, YES, YES),
        "onnxruntime-cuda": (YES, YES, YES),
        "onnxruntime-tensorrt": (YES, YES, YES),
        "tensorrt": (YES, NO, YES),
        "tensorrt-rtx": (YES, NO, YES),
    }
    reason, remedy = only_obstacle(found, "tensorrt-rtx")
    assert "CPU build" in reason
    assert "CUDA build of torch" in remedy
    assert ("torch", "CPU build") in {(row.name, row.note) for row in found.packages}


def test_a_torch_that_fails_on_the_gpu_is_quoted() -> None:
    torch = Trial("2.13.0", run_problem="no kernel image is available", details=("13.0",))
    found = diagnose(tried(machine(), torch=torch))
    assert "no kernel image is available" in only_obstacle(found, "tensorrt")[0]
    assert ("torch", "CUDA 13.0 build") in {(row.name, row.note) for row in found.packages}


def test_a_torch_that_is_missing_or_broken_is_said_once() -> None:
    versions = {name: "1.0" for name in (*REQUIRED, "onnxruntime-gpu") if name != "torch"}
    gone = replace(tried(machine(), torch=Trial(load_problem=NOT_INSTALLED)), versions=versions)
    found = diagnose(gone)
    assert only_obstacle(found, "tensorrt") == ("torch is not installed", "pip install torch")
    assert found.table().count("torch is not installed") == 1
    assert ("torch", None, NOT_INSTALLED) in {(row.name, row.version, row.note) for row in found.packages}
    broken = diagnose(tried(machine(), torch=Trial(load_problem="libtorch.so is cut short")))
    assert "libtorch.so is cut short" in only_obstacle(broken, "tensorrt-rtx")[0]
    assert [problem.remedy for problem in broken.problems] == ["pip install --force-reinstall torch"]


def test_a_hopper_gpu_is_not_listed_for_rtx_engines_and_not_called_impossible() -> None:
    found = diagnose(machine(HOPPER))
    assert answers(found)["tensorrt-rtx"] == (YES, UNKNOWN, UNKNOWN)
    assert answers(found)["tensorrt"] == (YES, YES, YES)
    reason, remedy = only_obstacle(found, "tensorrt-rtx")
    assert "9.0" in reason
    assert "not listed as supported" in reason
    assert "--engine tensorrt " in remedy


def test_an_engine_that_was_seen_failing_on_an_unlisted_gpu_does_not_run() -> None:
    fails = replace(machine().trials["tensorrt-rtx"], run_problem="unsupported SM")
    found = diagnose(tried(machine(HOPPER), tensorrt_rtx=fails))
    assert answers(found)["tensorrt-rtx"] == (YES, NO, NO)
    assert any("unsupported SM" in reason for reason in obstacles(found, "tensorrt-rtx", "runs"))


def test_a_turing_gpu_needs_an_engine_built_for_it() -> None:
    fails = replace(machine().trials["tensorrt-rtx"], run_problem="built for another device")
    found = diagnose(tried(machine(TURING), tensorrt_rtx=fails))
    assert answers(found)["tensorrt-rtx"] == (YES, NO, NO)
    assert "--compute-capability 7.5" in only_obstacle(found, "tensorrt-rtx")[1]


def test_a_later_gpu_than_those_listed_runs_rtx_engines() -> None:
    assert answers(diagnose(machine(BLACKWELL)))["tensorrt-rtx"] == (YES, YES, YES)


def test_another_gpu_that_would_do_is_pointed_at() -> None:
    assert "CUDA_VISIBLE_DEVICES=1" in only_obstacle(diagnose(machine(HOPPER, ADA)), "tensorrt-rtx")[1]
    assert answers(diagnose(machine(ADA, HOPPER)))["tensorrt-rtx"] == (YES, YES, YES)


def test_an_engine_that_cannot_be_built_stops_everything_with_tensorrt_s_own_words() -> None:
    fails = Trial(
        "11.0", build_problem="CUDA initialization failure", run_problem="CUDA initialization failure"
    )
    found = diagnose(tried(machine(), tensorrt=fails))
    assert answers(found)["tensorrt"] == (NO, NO, NO)
    for step in ("builds", "runs", "refit"):
        assert "CUDA initialization failure" in only_obstacle(found, "tensorrt", step)[0]


def test_an_engine_that_cannot_be_opened_is_still_built() -> None:
    fails = Trial("11.0", run_problem="cudaError 35")
    found = diagnose(tried(machine(), tensorrt=fails))
    assert answers(found)["tensorrt"] == (YES, NO, NO)
    assert "cannot open an engine of one layer: cudaError 35" in only_obstacle(found, "tensorrt")[0]


def test_a_runtime_that_is_not_installed_is_told_apart_from_one_that_is_broken() -> None:
    gone = diagnose(tried(machine(), tensorrt=Trial(load_problem=NOT_INSTALLED)))
    assert only_obstacle(gone, "tensorrt", "builds") == (
        "tensorrt is not installed",
        "pip install tensorrt",
    )
    broken = diagnose(tried(machine(), tensorrt=Trial(load_problem="libnvinfer.so.11: cannot open")))
    reason, remedy = only_obstacle(broken, "tensorrt", "builds")
    assert "libnvinfer.so.11: cannot open" in reason
    assert "--force-reinstall" in remedy
    assert "cannot be imported: libnvinfer.so.11" in broken.table()


def test_a_runtime_installed_under_another_package_name_shows_its_version() -> None:
    versions = dict.fromkeys((*REQUIRED, "onnxruntime-gpu"), "1.0")
    rows = {row.name: row.version for row in diagnose(replace(machine(), versions=versions)).packages}
    assert rows["tensorrt"] == "11.0"


def test_a_provider_that_does_not_open_is_quoted() -> None:
    fails = Trial("1.31.1", run_problem="libcublasLt.so.13: cannot open", details=PROVIDERS)
    found = diagnose(tried(machine(), onnxruntime_cuda=fails, onnxruntime_tensorrt=fails))
    assert answers(found)["onnxruntime-cuda"] == (YES, NO, YES)
    reason, remedy = only_obstacle(found, "onnxruntime-cuda")
    assert "libcublasLt.so.13" in reason
    assert "onnxruntime-gpu[cuda,cudnn]" in remedy
    assert "TensorRT libraries" in only_obstacle(found, "onnxruntime-tensorrt")[1]
    assert "compiled in, does not run: libcublasLt.so.13" in found.table()


def test_a_cpu_only_onnx_runtime_lacks_the_provider() -> None:
    plain = Trial("1.31.1", run_problem="not compiled in", details=("CPUExecutionProvider",))
    found = diagnose(tried(machine(), onnxruntime_cuda=plain))
    reason, remedy = only_obstacle(found, "onnxruntime-cuda")
    assert "has no CUDAExecutionProvider" in reason
    assert "pip uninstall" in remedy
    assert "no: not compiled in" in found.table()


def test_both_packages_of_onnx_runtime_are_a_problem() -> None:
    both = replace(machine(), versions={**machine().versions, "onnxruntime": "1.30"})
    (problem,) = diagnose(both).problems
    assert "both installed" in problem.reason
    assert problem.remedy.startswith("pip uninstall -y onnxruntime onnxruntime-gpu && pip install")
    assert {row.name for row in diagnose(both).packages} >= set(ONNX_RUNTIMES)
    assert problem.reason in diagnose(both).table()


def test_a_missing_package_is_a_problem() -> None:
    versions = {name: "1.0" for name in (*REQUIRED, "onnxruntime-gpu") if name != "onnxscript"}
    (problem,) = diagnose(replace(machine(), versions=versions)).problems
    assert (problem.reason, problem.remedy) == ("onnxscript is not installed", "pip install onnxscript")


def test_the_columns_of_the_engines_are_aligned() -> None:
    lines = diagnose(machine(HOPPER)).table().splitlines()
    header = lines.index("engines") + 1
    column = lines[header].index("runs")
    cells = {line.split()[0]: line[column:].split()[0] for line in lines[header + 1 :][: len(BACKENDS)]}
    assert cells == {**dict.fromkeys(BACKENDS, "yes"), "tensorrt-rtx": "unknown"}


@pytest.fixture(scope="module")
def here() -> Diagnosis:
    """This machine, examined once: it takes seconds."""
    return examine()


@needs_no_driver
def test_this_machine_without_a_gpu(here: Diagnosis) -> None:
    told = answers(here)
    assert told["onnxruntime-cpu"] == (YES, YES, YES)
    assert all(runs is NO for name, (_, runs, _) in told.items() if name != "onnxruntime-cpu")
    assert {row.name: row.problem for row in here.providers}["CPUExecutionProvider"] is None
    assert "torch" in {row.name for row in here.packages if row.version}


@needs_no_driver
def test_rtx_builds_here_and_does_not_run() -> None:
    pytest.importorskip("tensorrt_rtx")
    trial = attempt("tensorrt-rtx")
    assert (trial.load_problem, trial.build_problem) == (None, None)
    assert "CUDA" in str(trial.run_problem)
    assert {"7.5", "8.9", "12.0"} <= set(trial.details)
    assert "9.0" not in trial.details


def test_the_command_prints_a_table_or_json_and_ends_with_0(
    here: Diagnosis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sarsteer_export.doctor.examine", lambda: here)
    text = answered(CliRunner().invoke(command, []))
    found = answered_json(CliRunner().invoke(command, ["--json"]))
    for title in ("packages", "driver and GPUs", "ONNX Runtime providers", "engines"):
        assert f"\n{title}\n" in text
    assert set(found) == {"platform", "packages", "driver", "providers", "engines", "problems"}
    assert [row["name"] for row in found["engines"]] == list(BACKENDS)
    assert found["engines"][0]["runs"] == {"answer": "yes", "obstacles": []}


def test_a_made_up_machine_is_strict_json_too() -> None:
    content = json.loads(json.dumps(diagnose(machine(HOPPER)).to_json(), allow_nan=False))
    assert content["driver"]["gpus"][0] == {
        "name": "NVIDIA H100",
        "compute_capability": "9.0",
        "memory_bytes": 80 << 30,
    }
    assert content["engines"][4]["runs"]["answer"] == "unknown"


Shadow = Callable[[str, str], None]


@pytest.fixture
def shadow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shadow:
    """Put a module of this source before the installed one, in processes started from here."""

    def shadow(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)

    return shadow


def test_a_library_that_ends_the_process_is_survived(shadow: Shadow) -> None:
    shadow("torch", "import os, sys; print('double free', file=sys.stderr, flush=True); os._exit(134)")
    assert attempt("torch") == Trial(load_problem="ended with exit code 134: double free")


def test_a_library_that_writes_to_stdout_does_not_spoil_the_answer(shadow: Shadow) -> None:
    shadow("torch", "import os; os.write(1, b'hello from C\\n'); raise OSError('libtorch.so is cut short')")
    assert attempt("torch") == Trial(load_problem="libtorch.so is cut short")


def test_a_library_that_hangs_is_given_up(shadow: Shadow) -> None:
    shadow("torch", "import time; time.sleep(60)")
    assert attempt("torch", timeout_s=1.0) == Trial(load_problem="gave no answer within 1 s")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("raise ModuleNotFoundError(\"No module named 'tensorrt'\", name='tensorrt')", NOT_INSTALLED),
        (
            "raise ModuleNotFoundError(\"No module named 'tensorrt_bindings'\", name='tensorrt_bindings')",
            "No module named 'tensorrt_bindings'",
        ),
        ("raise RuntimeError('fetch the libraries first')", "fetch the libraries first"),
        ("raise OSError('libnvinfer.so.11: no such file')", "libnvinfer.so.11: no such file"),
    ],
)
def test_a_stub_of_tensorrt_is_told_apart_from_none(shadow: Shadow, source: str, told: str) -> None:
    shadow("tensorrt", source)
    assert attempt("tensorrt").load_problem == told


def test_a_module_in_the_current_folder_is_not_imported(tmp_path: Path, monkeypatch: Any) -> None:
    if sys.version_info < (3, 11):
        pytest.skip("PYTHONSAFEPATH is known to Python 3.11 and later")
    (tmp_path / "tensorrt.py").write_text("raise OSError('planted')")
    monkeypatch.chdir(tmp_path)
    assert attempt("tensorrt").load_problem != "planted"
