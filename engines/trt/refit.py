"""Swap the refittable constants of an engine for others, without building it again."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.errors import EngineError, InputError, UnsupportedError
from engines.sidecar import sidecar_of
from engines.trt.api import DTYPES
from engines.trt.opened import OpenEngine

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from engines.backends import Backend
    from engines.sidecar import EngineRecord


def refit_engine(
    engine: Path,
    output: Path,
    constants: Mapping[str, NDArray[Any]],
    backend: Backend,
    *,
    plan_sha256: str,
    device: str = "cuda",
) -> EngineRecord:
    """Write `engine` with other values of its refittable constants to `output`, a sidecar beside it.

    `constants`: values of every refittable constant by name, in its dtype and shape. Raises `InputError` when they
    are others than the engine has, `UnsupportedError` when the engine was not built to be refitted or this machine
    cannot run it, `EngineError` when TensorRT refuses or counts other weights than we do.
    """
    refittable = _RefitEngine(engine, backend=backend, device=device)
    refittable.check(constants)
    with refittable as opened:
        content = opened.refitted(constants)
    output.write_bytes(content)
    record = dataclasses.replace(
        opened.record,
        engine={
            "file": output.name,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        },
        plan_sha256=plan_sha256,
    )
    record.write(sidecar_of(output))
    return record


class _RefitEngine(OpenEngine):
    _fixed_shapes = False

    def refitted(self, constants: Mapping[str, NDArray[Any]]) -> bytes:
        """The serialized engine with these values."""
        self._require_open()
        trt: Any = self._trt
        with self._working():
            refitter = trt.Refitter(self._engine, self._log)
            counted = set(refitter.get_all_weights())
            if counted != set(constants):
                differs = sorted(counted ^ set(constants))
                raise EngineError(
                    f"{self._path}: TensorRT would refit {len(counted)} weights, the plan has {len(constants)}; they "
                    f"differ in {differs[0]!r}"
                )
            kept = {name: np.ascontiguousarray(values) for name, values in constants.items()}
            for name, values in kept.items():
                self._demand(refitter.set_named_weights(name, _weights(trt, values)), f"refuses {name!r}")
            if missing := refitter.get_missing_weights():
                raise EngineError(f"{self._path}: TensorRT also wants {missing[0]!r} for this refit")
            self._demand(refitter.refit_cuda_engine(), "failed to refit the engine")
            config = self._engine.create_serialization_config()
            config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
            config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
            serialized = self._engine.serialize_with_config(config)
            self._demand(serialized is not None, "cannot serialize the refitted engine")
        return bytes(serialized)

    def check(self, constants: Mapping[str, NDArray[Any]]) -> None:
        """Raise unless the engine was built to be refitted, with these constants, each in its dtype and shape."""
        if self.record.refit.reason is not None:
            raise UnsupportedError(
                f"{self._path} is not refittable: {self.record.refit.reason}; build it again with the new plan"
            )
        known = {constant.name: constant for constant in self.record.steering}
        wanted = set(self.record.refit.constants)
        if odd := sorted(wanted ^ set(constants)):
            raise InputError(f"{self._path}: {odd[0]!r} is a constant of the engine or of the plan alone")
        for name, values in constants.items():
            held = known[name]
            if (held.dtype, held.shape) != (values.dtype.name, values.shape):
                raise InputError(
                    f"{self._path}: {name!r} is {held.dtype} {held.shape} in the engine; the plan gives "
                    f"{values.dtype.name} {values.shape}"
                )


def _weights(trt: Any, values: NDArray[Any]) -> Any:
    """An array as TensorRT takes it, by address: numpy has no bfloat16 that it knows. The array must outlive it."""
    name = next(name for name, dtype in DTYPES.items() if dtype == values.dtype.name)
    return trt.Weights(getattr(trt.DataType, name), values.ctypes.data, values.size)
