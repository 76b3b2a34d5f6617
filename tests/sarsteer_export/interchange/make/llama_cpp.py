"""Steer the tiny decoder with llama.cpp itself, by its own loader of control vectors, and store what it computes.

After `packages.py`, in the same environment, from the repository root:

    pip install --no-deps xllamacpp==2026.10.11549     # a build of llama.cpp that exports its functions
    python tests/sarsteer_export/interchange/make/llama_cpp.py

Writes `files/llama_cpp.safetensors`: the logits (1, S, V) of the unsteered decoder, under `files/repeng.gguf` at
STRENGTH, and under `files/written.gguf`, which `sarsteer-export convert` wrote (see `written.py`). Says whether
llama.cpp refuses `files/repeng_block_0.gguf`. Each position is the last of a prompt of its own, which makes llama.cpp
give its logits.
"""

from __future__ import annotations

import ctypes
import tempfile
from pathlib import Path

import gguf
import numpy as np
import xllamacpp
from safetensors.numpy import load_file, save_file

FILES = Path(__file__).resolve().parents[1] / "files"
CHECKPOINT = Path(__file__).resolve().parents[3] / "foreign" / "checkpoints" / "llama"
LAYERS, WIDTH, HEADS, KEY_HEADS, FEED_FORWARD, VOCABULARY = 3, 32, 4, 2, 48, 80
STRENGTH = 0.75
LOADER = "_Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE"
"""`common_control_vector_load(const std::vector<common_control_vector_load_info> &)`"""
LIBRARY = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
LOAD = LIBRARY[LOADER]
LOAD.restype = None
QUIET = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


class Opaque(ctypes.Structure):
    """A struct of parameters whose fields are not touched: at least as long as any of llama.cpp's."""

    _fields_ = (("bytes", ctypes.c_uint64 * 128),)


class Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")),
    )


class Vector(ctypes.Structure):
    """`std::vector`."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("begin", "end", "capacity"))


class LoadInfo(ctypes.Structure):
    """`common_control_vector_load_info`; this build's `std::string` is a pointer to its text (the old ABI)."""

    _fields_ = (("strength", ctypes.c_float), ("text", ctypes.c_char_p))


class ControlVectorData(ctypes.Structure):
    """`common_control_vector_data`; a class with a destructor, so C++ returns it through a hidden first argument."""

    _fields_ = (("n_embd", ctypes.c_int32), ("data", Vector))


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a rotary projection in llama.cpp's order: pairs side by side, not half a head apart."""
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_model(path: Path) -> None:
    """The tiny Llama as a GGUF file without a vocabulary."""
    weights = load_file(CHECKPOINT / "model.safetensors")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, weight in weights.items():
        if ".q_proj." in name or ".k_proj." in name:
            weight = interleaved(weight, HEADS if ".q_proj." in name else KEY_HEADS)
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(weight)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load_control_vector(path: Path, strength: float) -> np.ndarray | None:
    """What llama.cpp's loader makes of a file: (L − 1, D) from block 1 on, or None when it refuses the file."""
    info = LoadInfo(strength, str(path).encode())
    begin = ctypes.addressof(info)
    infos = Vector(begin, begin + ctypes.sizeof(info), begin + ctypes.sizeof(info))
    loaded = ControlVectorData()
    LOAD(ctypes.byref(loaded), ctypes.byref(infos))
    if loaded.n_embd <= 0:
        return None
    count = (loaded.data.end - loaded.data.begin) // 4
    values = np.ctypeslib.as_array((ctypes.c_float * count).from_address(loaded.data.begin))
    return values.reshape(-1, loaded.n_embd).copy()


def logits(model: int, prompt: list[int], control: np.ndarray | None) -> np.ndarray:
    """Logits (1, S, V), each row from a context that has seen the prompt up to there."""
    rows = []
    for stop in range(1, len(prompt) + 1):
        context = LIBRARY.llama_init_from_model(
            ctypes.c_void_p(model), LIBRARY.llama_context_default_params()
        )
        if control is not None:
            data = control.ctypes.data_as(ctypes.c_void_p)
            size = ctypes.c_size_t(control.size)
            failed = LIBRARY.llama_set_adapter_cvec(ctypes.c_void_p(context), data, size, WIDTH, 1, LAYERS)
            assert not failed
        tokens = (ctypes.c_int32 * stop)(*prompt[:stop])
        assert not LIBRARY.llama_decode(ctypes.c_void_p(context), LIBRARY.llama_batch_get_one(tokens, stop))
        found = LIBRARY.llama_get_logits_ith(ctypes.c_void_p(context), -1)
        rows.append(np.ctypeslib.as_array(found, (VOCABULARY,)).copy())
        LIBRARY.llama_free(ctypes.c_void_p(context))
    return np.stack(rows)[None]


def main() -> None:
    LIBRARY.llama_model_default_params.restype = Opaque
    LIBRARY.llama_context_default_params.restype = Opaque
    LIBRARY.llama_model_load_from_file.argtypes = [ctypes.c_char_p, Opaque]
    LIBRARY.llama_model_load_from_file.restype = ctypes.c_void_p
    LIBRARY.llama_init_from_model.argtypes = [ctypes.c_void_p, Opaque]
    LIBRARY.llama_init_from_model.restype = ctypes.c_void_p
    LIBRARY.llama_batch_get_one.restype = Batch
    LIBRARY.llama_decode.argtypes = [ctypes.c_void_p, Batch]
    LIBRARY.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
    LIBRARY.llama_log_set(QUIET, None)
    LIBRARY.llama_backend_init()
    prompt = load_file(FILES / "expected.safetensors")["prompt"][0].tolist()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "model.gguf")
        model = LIBRARY.llama_model_load_from_file(
            str(Path(folder) / "model.gguf").encode(), LIBRARY.llama_model_default_params()
        )
    assert model
    print("refuses direction.0:", load_control_vector(FILES / "repeng_block_0.gguf", 1.0) is None)
    results = {"unsteered": logits(model, prompt, None)}
    for name, strength in (("repeng", STRENGTH), ("written", 1.0)):
        if (FILES / f"{name}.gguf").exists():
            control = load_control_vector(FILES / f"{name}.gguf", strength)
            assert control is not None
            results[name] = logits(model, prompt, control)
    save_file(results, FILES / "llama_cpp.safetensors")
    eager = load_file(FILES / "expected.safetensors")
    for name in ("unsteered", "repeng"):
        print(name, "largest difference from transformers:", np.abs(results[name] - eager[name]).max())


if __name__ == "__main__":
    main()
