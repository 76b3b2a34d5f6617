"""Nothing in a pickle is run: what is no tensor or container is refused, and nothing has happened."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from calibration.errors import InputError
from sarsteer_export.interchange.reading import read_source
from sarsteer_export.interchange.steering_vectors import CLASS
from sarsteer_export.interchange.torch_files import PickledObject, load_without_running, save_by_name

VECTOR = torch.arange(4.0)


class Attack:
    """Runs a shell command when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["itself", "an activation", "an attribute"])
def test_a_malicious_file_is_refused_and_nothing_runs(place: str, legacy: bool, tmp_path: Path) -> None:
    marker, path = tmp_path / "run", tmp_path / "vector.pt"
    attack = Attack(marker)
    content: object = {
        "itself": attack,
        "an activation": {"layer_activations": {0: VECTOR, 1: attack}, "layer_type": "decoder_block"},
        "an attribute": {"harm_hiddens": {0: [attack]}, "harm_refusal_hiddens": {}, "safe_hiddens": {}},
    }[place]
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match=r"its pickle names (posix|os|nt)\.system, .*nothing in it was run"):
        read_source(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # it would have worked
    assert marker.exists()


def test_a_stand_in_runs_no_method_of_the_class_that_it_stands_for(tmp_path: Path) -> None:
    content = PickledObject()
    vars(content).update(layer_activations={0: VECTOR}, layer_type="decoder_block", extra=[1, "two"])
    save_by_name(content, CLASS, tmp_path / "vector.pt")
    with zipfile.ZipFile(tmp_path / "vector.pt") as archive:
        assert b"csteering_vectors.steering_vector\nSteeringVector\n" in archive.read("vector/data.pkl")
    loaded = load_without_running(tmp_path / "vector.pt", (CLASS,))
    assert type(loaded) is PickledObject
    assert loaded.extra == [1, "two"]
    with pytest.raises(InputError, match="its pickle names steering_vectors"):
        load_without_running(tmp_path / "vector.pt", ())


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("content", [{0: VECTOR}, {"harm_hiddens": {0: [1.0]}}])
def test_a_plain_pickle_is_one_plain_message(content: object, protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "vector.pt"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(InputError) as refusal:  # a warning would be an error
        read_source(path)
    assert str(refusal.value) == (
        f"{path}: it is a plain pickle, which is not read; nothing in it was run. Save what is meant with torch.save, "
        "as tensors"
    )


@pytest.mark.parametrize("legacy", [False, True])
def test_a_protocol_that_is_not_that_of_torch_is_named_without_advice_to_run_it(
    legacy: bool, tmp_path: Path
) -> None:
    path = tmp_path / "vector.pt"
    torch.save({0: VECTOR}, path, pickle_protocol=4, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        InputError, match=r"containers of pickle protocol 2 \(Unsupported operand 149\); nothing"
    ):
        read_source(path)


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vector.pt"
    torch.save({0: VECTOR}, path)
    whole = path.read_bytes()
    for size in range(4, len(whole) - 1, 97):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"vector\.pt: "):
            read_source(path)
