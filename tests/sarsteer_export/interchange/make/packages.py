"""Make the files of other tools with those tools, and what they compute on a tiny decoder steered by them.

In an environment of its own (steering-vectors wants transformers 4), from the repository root:

    pip install torch==2.13.0 'transformers==4.57.6' scikit-learn tqdm rich matplotlib einops gguf==0.19.0
    pip install --no-deps steering-vectors==0.12.2 repeng==0.4.0
    pip install --no-deps ./activation-steering   # a checkout of github.com/IBM/activation-steering, commit 52be602
    python tests/sarsteer_export/interchange/make/packages.py

Writes `files/repeng.gguf`, `files/repeng_block_0.gguf`, `files/steering_vectors.pt`, `files/steering_vectors_bf16.pt`,
`files/behavior.svec` and `files/expected.safetensors`: the prompt, and the logits (1, S, V) under each tool at
STRENGTH; under `files/written.*`, which `sarsteer-export convert` wrote (`written.py`), at strength 1.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from activation_steering import MalleableModel
from activation_steering import SteeringVector as BehaviorVector
from repeng import ControlModel, ControlVector
from safetensors.torch import save_file
from steering_vectors import SteeringVector
from transformers import AutoModelForCausalLM

FILES = Path(__file__).resolve().parents[1] / "files"
CHECKPOINT = Path(__file__).resolve().parents[3] / "foreign" / "checkpoints" / "llama"
LAYERS, WIDTH = 3, 32
STRENGTH = 0.75
PROMPT = torch.tensor([[1, 17, 42, 63, 5, 71, 29]])


def vectors(seed: int, layers: range) -> dict[int, np.ndarray]:
    """Random vectors as long as the tiny decoder's stream, the same for everyone who asks for them."""
    rng = np.random.default_rng(seed)
    return {layer: rng.standard_normal(WIDTH).astype(np.float32) for layer in layers}


def decoder() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=PROMPT, use_cache=False).logits.contiguous().clone()


def repeng() -> torch.Tensor:
    control = ControlVector(model_type="llama", directions=vectors(1, range(1, LAYERS)))
    control.export_gguf(FILES / "repeng.gguf")
    whole = ControlVector(model_type="llama", directions=vectors(2, range(LAYERS)))
    whole.export_gguf(FILES / "repeng_block_0.gguf")
    model = ControlModel(decoder(), list(range(1, LAYERS)))
    model.set_control(ControlVector.import_gguf(FILES / "repeng.gguf"), coeff=STRENGTH)
    return logits(model)


def repeng_block_0() -> torch.Tensor:
    model = ControlModel(decoder(), list(range(LAYERS)))
    model.set_control(ControlVector.import_gguf(FILES / "repeng_block_0.gguf"), coeff=STRENGTH)
    return logits(model)


def steering_vectors(positions: dict[str, Any]) -> torch.Tensor:
    activations = {layer: torch.tensor(vector) for layer, vector in vectors(3, range(LAYERS)).items()}
    vector = SteeringVector(layer_activations=activations, layer_type="decoder_block")
    torch.save(vector, FILES / "steering_vectors.pt")
    torch.save(vector.to(torch.bfloat16), FILES / "steering_vectors_bf16.pt")
    model = decoder()
    with vector.apply(model, multiplier=STRENGTH, **positions):
        return logits(model)


def activation_steering() -> torch.Tensor:
    directions = vectors(4, range(LAYERS))
    variances = dict.fromkeys(directions, 0.5)
    vector = BehaviorVector(model_type="llama", directions=directions, explained_variances=variances)
    vector.save(str(FILES / "behavior.svec"))
    model = MalleableModel(decoder(), SimpleNamespace(eos_token="</s>", pad_token=None))
    model.steer(
        behavior_vector=BehaviorVector.load(str(FILES / "behavior.svec")),
        behavior_layer_ids=list(range(LAYERS)),
        behavior_vector_strength=STRENGTH,
    )
    return logits(model.model)


def written() -> dict[str, torch.Tensor]:
    """Each tool steers by a file that it did not write."""
    model = decoder()
    with torch.serialization.safe_globals([SteeringVector]):
        vector = torch.load(FILES / "written.pt")
    assert isinstance(vector, SteeringVector)
    with vector.apply(model):
        steered = logits(model)
    control = ControlModel(decoder(), list(range(1, LAYERS)))
    control.set_control(ControlVector.import_gguf(FILES / "written.gguf"))
    behavior = BehaviorVector.load(str(FILES / "written.svec"))
    model = MalleableModel(decoder(), SimpleNamespace(eos_token="</s>", pad_token=None))
    model.steer(behavior_vector=behavior, behavior_layer_ids=list(behavior.directions))
    return {"written.pt": steered, "written.gguf": logits(control), "written.svec": logits(model.model)}


def main() -> None:
    FILES.mkdir(exist_ok=True)
    expected = {
        "prompt": PROMPT,
        "unsteered": logits(decoder()),
        "repeng": repeng(),
        "repeng_block_0": repeng_block_0(),
        "steering_vectors": steering_vectors({}),
        "steering_vectors_last": steering_vectors({"min_token_index": None, "token_indices": [-1]}),
        "behavior": activation_steering(),
        **written(),
    }
    save_file(expected, FILES / "expected.safetensors")


if __name__ == "__main__":
    main()
