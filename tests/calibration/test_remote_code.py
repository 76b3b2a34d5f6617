"""Code that comes with a checkpoint: refused and not run until the user says so; then its digest is recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from calibration.errors import InputError
from calibration.lalm import load_lalm
from calibration.model_options import ModelOptions, check_driven_alike, driven_by
from calibration.remote_code import code_digest
from tests import tiny_lalm
from tests.zoo import kimi_audio

FORBIDDEN = "raise SystemExit('this ran')\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kimi_audio.save_checkpoint(tmp_path_factory.mktemp("own_code"))


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is there once the checkpoint's code ran."""
    monkeypatch.setenv(kimi_audio.RAN, str(tmp_path / "ran"))
    return tmp_path / "ran"


def test_code_of_a_checkpoint_is_not_run_unless_trusted(folder: Path, marker: Path) -> None:
    with pytest.raises(InputError) as refusal:
        load_lalm(folder)
    assert not marker.exists()
    for word in (
        "configuration_moonshot_kimia.py",
        "modeling_moonshot_kimia.py",
        "--trust-remote-code",
        "not run",
    ):
        assert word in str(refusal.value)


def test_trusted_code_is_run_and_is_part_of_what_the_model_is(
    folder: Path, marker: Path, tmp_path: Path
) -> None:
    copied = kimi_audio.save_checkpoint(tmp_path / "copied")
    with (copied / "modeling_moonshot_kimia.py").open("a") as file:
        file.write("# another line\n")
    assert not marker.exists()
    with pytest.raises(InputError, match="chat template"):  # it loads; only an adapter knows its prompts
        load_lalm(copied, trust_remote_code=True)
    assert marker.exists()
    assert code_digest(copied) != code_digest(folder)
    assert ModelOptions(trust_remote_code=True).identity(copied) != ModelOptions(
        trust_remote_code=True
    ).identity(folder)


def test_a_model_that_transformers_knows_is_loaded_without_the_code_beside_it(tmp_path: Path) -> None:
    tiny_lalm.save_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoConfig": "configuration_x.X", "AutoModel": "modeling_x.X"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("configuration_x.py", "modeling_x.py"):
        (tmp_path / name).write_text(FORBIDDEN, encoding="utf-8")
    lalm = load_lalm(tmp_path)
    assert type(lalm.model).__name__ == "Qwen2AudioForConditionalGeneration"
    assert driven_by(lalm) is None


def test_code_that_names_no_model_is_refused_before_it_is_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["X"], "auto_map": {"AutoTokenizer": "x.X"}}), encoding="utf-8"
    )
    (tmp_path / "x.py").write_text(FORBIDDEN, encoding="utf-8")
    with pytest.raises(InputError, match=r"auto_map in config\.json names AutoTokenizer; expected one of"):
        load_lalm(tmp_path, trust_remote_code=True)


def test_a_bundle_is_verified_with_a_model_driven_as_when_it_was_made(tmp_path: Path) -> None:
    lalm = load_lalm(tiny_lalm.save_checkpoint(tmp_path))
    check_driven_alike(None, lalm)
    recorded = {"adapter": "KimiAudio", "adapter_sha256": "a" * 64, "parts": {"decoder": "model.layers"}}
    with pytest.raises(InputError) as refusal:
        check_driven_alike(recorded, lalm)
    for word in (
        "adapter KimiAudio (aaaaaaaaaaaa)",
        "names decoder=model.layers",
        "what its classes say",
        "--adapter",
    ):
        assert word in str(refusal.value)
