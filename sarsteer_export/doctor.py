"""`doctor`: what this machine can build and run, and what to do about what it cannot."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engines.backends import BACKENDS, CPU_BACKEND, Runtime
from engines.cuda_driver import NO_DRIVER, NO_GPU, CudaDriver, Gpu, cuda_driver
from sarsteer_export.diagnosis import (
    Ability,
    Answer,
    Diagnosis,
    EngineRow,
    Obstacle,
    PackageRow,
    ProviderRow,
)
from sarsteer_export.trials import CPU_BUILD, NOT_INSTALLED, TORCH, Trial, attempt
from sarsteer_export.versions import installed_versions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engines.backends import Backend

ONNX_RUNTIMES = ("onnxruntime-gpu", "onnxruntime")
"""Two packages that install the same module; either will do, but not both."""
REQUIRED = (
    "sarsteer-export",
    TORCH,
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "ml-dtypes",
    "onnx",
    "onnx-graphsurgeon",
    "onnxscript",
    "soundfile",
    "soxr",
)
OPTIONAL = ("tensorrt", "tensorrt-rtx")
REINSTALL_ONNX_RUNTIME = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
CUDA_LIBRARIES = 'pip install "onnxruntime-gpu[cuda,cudnn]"'
PROVIDER_LIBRARIES = {
    "onnxruntime-cuda": CUDA_LIBRARIES,
    "onnxruntime-tensorrt": (
        f"{CUDA_LIBRARIES}; put the TensorRT libraries it is linked with on the loader's path (LD_LIBRARY_PATH)"
    ),
}
"""What brings the libraries that a provider is linked with, by backend."""


@dataclass(frozen=True)
class Machine:
    """What was found: versions of installed packages, the driver, and what came of the trials, by name."""

    versions: Mapping[str, str]
    driver: CudaDriver
    trials: Mapping[str, Trial]


def examine() -> Diagnosis:
    """Look at this machine: a few seconds, for torch and the runtimes are tried, each in its own process."""
    versions = installed_versions(*REQUIRED, *ONNX_RUNTIMES, *OPTIONAL)
    trials = {name: attempt(name) for name in (TORCH, *BACKENDS)}
    return diagnose(Machine(versions, cuda_driver(), trials))


def diagnose(machine: Machine) -> Diagnosis:
    """What follows from what was found. Changes and asks nothing."""
    return Diagnosis(
        platform=f"Python {platform.python_version()} on {platform.system()} {platform.machine()}",
        packages=_packages(machine),
        driver=machine.driver,
        providers=_providers(machine),
        engines=tuple(_engine(backend, machine) for backend in BACKENDS.values()),
        problems=_problems(machine),
    )


def _packages(machine: Machine) -> tuple[PackageRow, ...]:
    torch = machine.trials[TORCH]
    notes = {name: _load_note(machine.trials[name]) for name in OPTIONAL}
    notes[TORCH] = _load_note(torch) or ", ".join(_torch_build(detail) for detail in torch.details)
    shown_runtimes = [name for name in ONNX_RUNTIMES if name in machine.versions] or [ONNX_RUNTIMES[0]]
    notes |= dict.fromkeys(shown_runtimes, _load_note(machine.trials[CPU_BACKEND.name]))
    rows = []
    for name in (*REQUIRED, *shown_runtimes, *OPTIONAL):
        trial = machine.trials.get(name, Trial())
        version = machine.versions.get(name, trial.version)
        rows.append(PackageRow(name, version, notes.get(name, "") if version else NOT_INSTALLED))
    return tuple(rows)


def _load_note(trial: Trial) -> str:
    return f"cannot be imported: {trial.load_problem}" if trial.load_problem else ""


def _torch_build(detail: str) -> str:
    return detail if detail == CPU_BUILD else f"CUDA {detail} build"


def _providers(machine: Machine) -> tuple[ProviderRow, ...]:
    tried = {str(row.provider): machine.trials[row.name] for row in BACKENDS.values() if row.provider}
    return tuple(
        ProviderRow(provider, provider in trial.details, trial.load_problem or trial.run_problem)
        for provider, trial in tried.items()
    )


def _engine(backend: Backend, machine: Machine) -> EngineRow:
    library = _library_obstacles(backend, machine.trials[backend.name])
    gpu = _driver_obstacles(machine.driver)
    if backend.runtime is Runtime.ONNX_RUNTIME:  # nothing is built, and the ONNX file is what is refitted
        runs = library or _provider_obstacles(backend, machine.trials[backend.name], gpu)
        return EngineRow(backend.name, _ability(library), _ability(runs), _ability(()))
    builds = library + (() if backend.builds_without_gpu else gpu)
    builds = builds or _trial_obstacle(backend, "build", machine.trials[backend.name].build_problem)
    return EngineRow(
        name=backend.name,
        builds=_ability(builds),
        runs=_opens(backend, machine, library + gpu + _torch_obstacles(machine)),
        refit=_opens(backend, machine, tuple(dict.fromkeys(builds + gpu))),
    )


def _ability(obstacles: tuple[Obstacle, ...]) -> Ability:
    return Ability(Answer.NO if obstacles else Answer.YES, obstacles)


def _opens(backend: Backend, machine: Machine, obstacles: tuple[Obstacle, ...]) -> Ability:
    """Whether an engine can be opened on the first GPU, which engines run on, when `obstacles` are all else."""
    trial = machine.trials[backend.name]
    fits, unfit = _capability(backend, machine.driver.gpus, trial.details)
    if not obstacles and fits is not Answer.NO:
        obstacles = _trial_obstacle(backend, "open", trial.build_problem or trial.run_problem)
    return Ability(Answer.NO if obstacles else fits, obstacles + unfit)


def _library_obstacles(backend: Backend, trial: Trial) -> tuple[Obstacle, ...]:
    if trial.load_problem is None:
        return ()
    if trial.load_problem == NOT_INSTALLED:
        return (Obstacle(f"{backend.package} is not installed", f"pip install {backend.package}"),)
    return (
        Obstacle(
            f"{backend.module} cannot be imported: {trial.load_problem}",
            f"pip install --force-reinstall {backend.package}",
        ),
    )


def _driver_obstacles(driver: CudaDriver) -> tuple[Obstacle, ...]:
    if driver.problem is None:
        return ()
    remedies = {
        NO_DRIVER: "use a machine with an NVIDIA GPU and its driver; a container has to be given both",
        NO_GPU: "check that nvidia-smi lists the GPU and that CUDA_VISIBLE_DEVICES does not hide it",
    }
    otherwise = "make nvidia-smi work first: reinstall the driver, reboot, or give the container the GPU"
    return (Obstacle(driver.problem, remedies.get(driver.problem, otherwise)),)


def _torch_obstacles(machine: Machine) -> tuple[Obstacle, ...]:
    """Engines are fed from torch's CUDA tensors."""
    torch = machine.trials[TORCH]
    if torch.load_problem:
        return _torch_load_obstacles(torch)
    if CPU_BUILD in torch.details:
        return (
            Obstacle(
                "torch is a CPU build; engines are fed from its CUDA tensors",
                "install a CUDA build of torch (https://pytorch.org/get-started/locally/)",
            ),
        )
    if torch.run_problem and machine.driver.problem is None:
        return (
            Obstacle(
                f"torch cannot compute on the GPU: {torch.run_problem}",
                "install a build of torch for this driver and GPU, or a newer driver",
            ),
        )
    return ()


def _torch_load_obstacles(torch: Trial) -> tuple[Obstacle, ...]:
    if torch.load_problem is None:
        return ()
    if torch.load_problem == NOT_INSTALLED:
        return (Obstacle("torch is not installed", "pip install torch"),)
    return (Obstacle(f"torch {_load_note(torch)}", "pip install --force-reinstall torch"),)


def _provider_obstacles(backend: Backend, trial: Trial, gpu: tuple[Obstacle, ...]) -> tuple[Obstacle, ...]:
    needed = () if backend.runs_without_gpu else gpu
    if backend.provider not in trial.details:
        missing = Obstacle(
            f"the ONNX Runtime installed here has no {backend.provider}", REINSTALL_ONNX_RUNTIME
        )
        return (missing, *needed)
    if trial.run_problem is None or (needed and not _is_missing_library(trial.run_problem)):
        return needed  # without a GPU, whatever else goes wrong may go wrong for want of it
    remedy = REINSTALL_ONNX_RUNTIME if backend.runs_without_gpu else PROVIDER_LIBRARIES[backend.name]
    return (*needed, Obstacle(f"{backend.provider} does not run: {trial.run_problem}", remedy))


def _is_missing_library(problem: str) -> bool:
    """Whether the loader found no library; that of the driver itself is the driver's trouble."""
    return "cannot open shared object file" in problem and not problem.startswith("libcuda.so")


def _trial_obstacle(backend: Backend, verb: str, problem: str | None) -> tuple[Obstacle, ...]:
    if problem is None:
        return ()
    return (
        Obstacle(
            f"{backend.name} cannot {verb} an engine of one layer: {problem}",
            f"install a release of {backend.package} that serves this driver and GPU, or a newer driver",
        ),
    )


def _capability(
    backend: Backend, gpus: tuple[Gpu, ...], known: tuple[str, ...]
) -> tuple[Answer, tuple[Obstacle, ...]]:
    """Whether the first GPU, which engines run on, is one that engines are built for by default.

    TensorRT-RTX promises that these run on the compute capabilities listed and on later ones; see "CPU-Only AOT
    and TensorRT-RTX Engines" in its documentation.
    """
    if not gpus or _serves(backend, gpus[0]):
        return Answer.YES, ()
    gpu, targets = gpus[0], ", ".join(backend.targets)
    reason = (
        f"{gpu.name} has compute capability {gpu.compute_capability}; by default, engines of {backend.name} "
        f"are built for {targets} and later ones"
    )
    number = next((number for number, other in enumerate(gpus) if _serves(backend, other)), None)
    elsewhere = "" if number is None else f"; or run on {gpus[number].name}: CUDA_VISIBLE_DEVICES={number}"
    if gpu.compute_capability in known:
        remedy = f"build with --compute-capability {gpu.compute_capability}{elsewhere}"
        return Answer.NO, (Obstacle(reason, remedy),)
    return Answer.UNKNOWN, (
        Obstacle(
            f"{reason}; {gpu.compute_capability} is not listed as supported",
            f"use --engine tensorrt on this GPU{elsewhere}",
        ),
    )


def _serves(backend: Backend, gpu: Gpu) -> bool:
    if not backend.targets:
        return True
    latest = max(_number(target) for target in backend.targets)
    return gpu.compute_capability in backend.targets or _number(gpu.compute_capability) > latest


def _number(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))


def _problems(machine: Machine) -> tuple[Obstacle, ...]:
    problems = [
        Obstacle(f"{name} is not installed", f"pip install {name}")
        for name in REQUIRED
        if name not in machine.versions and name != TORCH
    ]
    problems += _torch_load_obstacles(machine.trials[TORCH])
    if all(name in machine.versions for name in ONNX_RUNTIMES):
        problems.append(
            Obstacle(
                "onnxruntime and onnxruntime-gpu are both installed, and each overwrites files of the other",
                REINSTALL_ONNX_RUNTIME,
            )
        )
    return tuple(problems)
