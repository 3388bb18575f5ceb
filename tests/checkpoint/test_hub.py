"""Checkpoints on the hub: what is asked for, and what is said when it cannot be had."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from unmergeable.checkpoint import hub
from unmergeable.errors import BadInput, UsageError


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Calls of a hub that has everything."""
    calls = []

    def snapshot_download(name, *, revision, allow_patterns):
        calls.append((name, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_name_and_its_revision_are_asked_for(asked, tmp_path):
    assert hub.download("hub:owner/model-7B@v1.0") == tmp_path
    assert hub.download("hub:owner/model") == tmp_path
    assert [call[:2] for call in asked] == [("owner/model-7B", "v1.0"), ("owner/model", None)]


def test_neither_pickles_nor_code_are_downloaded(asked):
    hub.download("hub:owner/model")
    (_, _, patterns) = asked[0]
    names = ["model.safetensors", "config.json", "pytorch_model.bin", "modeling_model.py", "weights.pt", "model.pkl"]
    kept = [name for name in names if any(Path(name).match(pattern) for pattern in patterns)]
    assert kept == ["model.safetensors", "config.json"]


@pytest.mark.parametrize("name", ["hub:", "hub:alone", "hub:a/b/c", "hub:../..//x", "hub:owner/na me"])
def test_what_is_no_name_is_refused_before_anything_is_asked(asked, name):
    with pytest.raises(BadInput, match="no name of a repository"):
        hub.download(name)
    assert asked == []


def test_a_hub_that_cannot_be_reached_is_told_in_one_line(monkeypatch):
    def fails(name, **rest):
        raise LocalEntryNotFoundError("no connection\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(BadInput, match=r"hub:owner/model cannot be downloaded \(no connection\)") as caught:
        hub.download("hub:owner/model")
    assert "\n" not in str(caught.value)


def test_without_the_library_the_way_to_install_it_is_told(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(hub.importlib, "import_module", missing)
    with pytest.raises(UsageError, match="pip install"):
        hub.download("hub:owner/model")


def test_paths_are_no_names():
    assert hub.is_on_hub("hub:owner/model")
    assert not hub.is_on_hub("./hub/owner")


@pytest.mark.parametrize("kind", [str, Path])
def test_a_local_checkpoint_is_its_folder(kind, asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("some/folder").mkdir(parents=True)
    assert hub.folder_of(kind("some/folder")) == Path("some/folder")
    assert hub.folder_of(kind("some/other")) == Path("some/other"), "the control: no name, since its owner is a folder"
    assert not asked


@pytest.mark.parametrize(
    "text",
    [
        "org/expert",
        "https://huggingface.co/org/expert",
        "https://huggingface.co/org/expert/tree/main",
        "hf.co/org/expert",
    ],
)
@pytest.mark.parametrize("kind", [str, Path])
def test_a_name_on_the_hub_is_told_from_a_wrong_path(kind, text, asked, tmp_path, monkeypatch):
    """What the line says to write is read as that repository."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=r"is no folder here; .* write hub:org/expert") as caught:
        hub.folder_of(kind(text))
    hub.folder_of(str(caught.value).removesuffix(".").rpartition(" ")[2])
    assert asked[0][:2] == ("org/expert", None)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_checkpoint_on_the_hub_is_downloaded(kind, asked, tmp_path):
    assert hub.folder_of(kind("hub:me/mine@main")) == tmp_path
    assert asked[0][:2] == ("me/mine", "main")
