"""Push: what goes to the hub, what stays, and what is refused; the hub is a small server on this machine."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest

from fake_hub import TOKEN, FakeHub, Repo, fake_hub
from unmergeable import ops
from unmergeable.checkpoint.manifest import check_files
from unmergeable.cli import main
from unmergeable.errors import BadInput, KeyFileError, NotEquivalent, UnmergeableError, UsageError
from unmergeable.ops.publishing import PushResult
from zoo import TOYS, write_toy

# Of huggingface_hub's own sending of files with some versions of its HTTP client.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "me/model"
PICTURE = b"\x89PNG\r\n\x1a\n" + b"0" * 20
CARD = "---\nlicense: mit\n---\n# Mine\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    for seed, name in enumerate(("base", "expert")):
        write_toy(TOYS["llama"], folder / name, seed=seed)
    (folder / "expert" / "README.md").write_text(CARD)
    (folder / "expert" / "LICENSE").write_text("Do what you like.\n")
    ops.protect(folder / "expert", base=folder / "base", out=folder / "release")
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def release(work: Path) -> Path:
    return work / "release"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with fake_hub() as found:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", found.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        found.repos[REPO] = Repo()
        yield found


def names(result: PushResult) -> set[str]:
    return set(result.files)


def reasons(result: PushResult) -> dict[str, str]:
    return {item.name: item.reason for item in result.left_out}


def test_a_release_goes_up_whole_as_a_pull_request(release: Path, hub: FakeHub) -> None:
    result = ops.push(release, REPO)
    (commit,) = hub.repos[REPO].commits
    assert commit["pr"]
    assert commit["files"] == {path.name: path.read_bytes() for path in release.iterdir()}
    assert hub.repos[REPO].files == {}, "a pull request changes no branch"
    assert result.pull_request == f"{hub.url}/{REPO}/discussions/1"
    assert commit["summary"].startswith("Release protected by gauge")
    assert result.to_json()["pull_request"] in result.lines()[-1]


def test_what_was_pushed_is_intact_there_and_can_be_restored(work: Path, hub: FakeHub) -> None:
    ops.push(work / "release", REPO, create_pr=False)
    copy = work / "copy"
    copy.mkdir()
    for name, content in hub.repos[REPO].files.items():
        (copy / name).write_bytes(content)
    assert ops.verify_manifest(copy).is_intact
    ops.restore(copy, key=work / "release.key", out=work / "restored")


def test_what_verify_downloads_is_the_whole_of_a_release(
    release: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Files by the patterns that are asked for; what the hub has besides stays there."""
    (release / "NOTICE").write_text("Built with X")
    ops.push(release, REPO, create_pr=False)
    there = {**hub.repos[REPO].files, ".gitattributes": b"", "pytorch_model.bin": b""}

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        for path, content in there.items():
            if any(fnmatch(path, pattern) for pattern in allow_patterns):
                (tmp_path / "snapshot").mkdir(exist_ok=True)
                (tmp_path / "snapshot" / path).write_bytes(content)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert main(["verify", f"hub:{REPO}", "--manifest", "--quiet"]) == 0
    assert not (tmp_path / "snapshot" / "pytorch_model.bin").exists()


def test_into_a_branch_with_a_message(release: Path, hub: FakeHub) -> None:
    result = ops.push(release, REPO, create_pr=False, revision="dev", message="Second try")
    (commit,) = hub.repos[REPO].commits
    assert (commit["pr"], commit["revision"], commit["summary"]) == (False, "dev", "Second try")
    assert result.pull_request is None
    assert result.url in result.lines()[-1]


def test_a_dry_run_lists_all_and_asks_nobody(release: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    (release / "pytorch_model.bin").write_bytes(b"unprotected")
    result = ops.push(release, REPO, dry_run=True)
    assert hub.requests == []
    assert result.files == {path.name: path.stat().st_size for path in release.iterdir() if path.suffix != ".bin"}
    assert "may hold an unprotected copy" in reasons(result)["pytorch_model.bin"]
    text = "\n".join(result.lines())
    for path in release.iterdir():
        assert path.name in text


# What lies in a release besides, and whether it goes up.
STRAY: dict[str, Callable[[Path], object]] = {
    "pytorch_model.bin": lambda path: path.write_bytes(b"x"),
    "second.safetensors": lambda path: path.write_bytes(b"x"),
    "backup.key": lambda path: path.write_text("not even a key"),
    "modeling_mine.py": lambda path: path.write_text("import os"),
    ".env": lambda path: path.write_text("HF_TOKEN=hf_x"),
    "notes.txt": lambda path: path.write_text("x"),
    "fake.png": lambda path: path.write_bytes(b"weights"),
    ".unmergeable-release.key.1.tmp": lambda path: path.write_text("x"),
    "checkpoint-500": lambda path: path.mkdir(),
    ".git": lambda path: path.mkdir(),
    "NOTICE": lambda path: path.symlink_to("/etc/hostname"),
}
READ_BY_PEOPLE = {"NOTICE.txt": b"Built with X", "LICENSE-BASE": b"terms", "loss.png": PICTURE}


@pytest.mark.parametrize("name", STRAY)
def test_what_protect_did_not_write_stays(name: str, release: Path, hub: FakeHub) -> None:
    clean = names(ops.push(release, REPO, dry_run=True))
    STRAY[name](release / name)
    result = ops.push(release, REPO)
    (commit,) = hub.repos[REPO].commits
    assert set(commit["files"]) == names(result) == clean
    assert set(reasons(result)) == {name}


@pytest.mark.parametrize("name", READ_BY_PEOPLE)
def test_what_people_read_goes_up_and_alters_nothing(name: str, release: Path, hub: FakeHub) -> None:
    """The control of the test above."""
    (release / name).write_bytes(READ_BY_PEOPLE[name])
    (release / "README.md").write_text(CARD + "More.\n")
    ops.push(release, REPO)
    (commit,) = hub.repos[REPO].commits
    assert commit["files"][name] == READ_BY_PEOPLE[name]
    assert commit["files"]["README.md"].endswith(b"More.\n")
    assert check_files(release) == ()


@pytest.mark.parametrize("name", ["NOTICE", "README.md", "license.txt"])
def test_a_key_is_known_by_its_content(name: str, work: Path, hub: FakeHub) -> None:
    (work / "release" / name).write_bytes(b"Here it is:\n" + (work / "release.key").read_bytes())
    with pytest.raises(KeyFileError, match=f"{name} holds a key"):
        ops.push(work / "release", REPO)
    assert hub.requests == []


def test_the_key_itself_is_refused(work: Path, hub: FakeHub) -> None:
    with pytest.raises(KeyFileError, match="is never uploaded"):
        ops.push(work / "release.key", REPO)
    (work / "release.key").rename(work / "innocent.json")
    with pytest.raises(KeyFileError, match="is never uploaded"):
        ops.push(work / "innocent.json", REPO)
    assert hub.requests == []


def test_the_parent_of_a_release_is_refused_with_the_release_in_it(work: Path, hub: FakeHub) -> None:
    with pytest.raises(BadInput, match=rf"unmergeable push {work / 'release'} REPO"):
        ops.push(work, REPO)
    assert ops.push(work / "release", REPO).pull_request, "what the message says works"


@pytest.mark.parametrize("name", ["expert", "nothing"])
def test_what_is_no_release_is_refused(name: str, work: Path, hub: FakeHub) -> None:
    with pytest.raises(BadInput):
        ops.push(work / name, REPO)
    assert hub.requests == []


def test_restored_weights_are_no_release(work: Path, hub: FakeHub) -> None:
    ops.restore(work / "release", key=work / "release.key", out=work / "restored")
    with pytest.raises(BadInput, match="'restored' and not 'protected'"):
        ops.push(work / "restored", REPO)
    shutil.copy(work / "release" / "unmergeable.json", work / "restored")
    with pytest.raises(NotEquivalent, match=r"model\.safetensors is altered"):
        ops.push(work / "restored", REPO)
    assert hub.requests == []


@pytest.mark.parametrize("place", ["release.steps/1", "release.partial", "release.training"])
def test_work_on_its_way_is_no_release(place: str, work: Path, hub: FakeHub) -> None:
    shutil.copytree(work / "release", work / place)
    with pytest.raises(BadInput, match="on its way"):
        ops.push(work / place, REPO)
    assert hub.requests == []


def test_weights_that_changed_are_refused_as_verify_refuses_them(release: Path, hub: FakeHub) -> None:
    path = release / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(NotEquivalent, match="unmergeable verify") as caught:
        ops.push(release, REPO)
    assert caught.value.exit_code == 4
    path.unlink()
    with pytest.raises(NotEquivalent, match="is missing"):
        ops.push(release, REPO)
    assert hub.requests == []


def test_weights_that_are_a_link_outside_are_refused(work: Path, hub: FakeHub) -> None:
    path = work / "release" / "model.safetensors"
    path.rename(work / "elsewhere.safetensors")
    path.symlink_to(work / "elsewhere.safetensors")
    with pytest.raises(BadInput, match="leaves the folder"):
        ops.push(work / "release", REPO)
    assert hub.requests == []


def test_a_manifest_that_was_changed_after_signing_is_refused(release: Path, hub: FakeHub) -> None:
    path = release / "unmergeable.json"
    document = json.loads(path.read_text())
    document["note"] = "Stops everybody."
    path.write_text(json.dumps(document))
    with pytest.raises(NotEquivalent, match="signature"):
        ops.push(release, REPO)
    assert hub.requests == []


def test_a_card_without_the_section_is_told_with_a_command_that_writes_it(release: Path) -> None:
    for change in (lambda: None, (release / "README.md").unlink):
        change()
        (note,) = [note for note in ops.push(release, REPO, dry_run=True).notes if "card" in note]
        command = note.partition("by: unmergeable ")[2].split()
        assert main(command) == 0
        assert not [note for note in ops.push(release, REPO, dry_run=True).notes if "card" in note]


@pytest.mark.parametrize("text", ["model", "a/b/c", "me/mo del", "https://huggingface.co/me/model", ""])
def test_what_is_no_name_is_refused(text: str, release: Path) -> None:
    with pytest.raises(UsageError, match="OWNER/NAME"):
        ops.push(release, text)


def test_a_repository_is_made_only_where_that_is_asked_for(release: Path, hub: FakeHub) -> None:
    with pytest.raises(BadInput, match=r"--create") as caught:
        ops.push(release, "me/new")
    assert "me/new" not in hub.repos
    assert caught.value.exit_code == 3
    ops.push(release, "me/new", create=True)
    ops.push(release, "me/secret", private=True)
    assert (hub.repos["me/new"].is_private, hub.repos["me/secret"].is_private) == (False, True)


def test_private_is_not_said_of_a_public_repository(release: Path, hub: FakeHub) -> None:
    with pytest.raises(BadInput, match="is there and public"):
        ops.push(release, REPO, private=True)
    hub.repos[REPO].is_private = True
    ops.push(release, REPO, private=True)


def test_weights_that_stay_there_are_told(release: Path, hub: FakeHub) -> None:
    hub.repos[REPO].files = {"pytorch_model.bin": b"old", "README.md": b"old"}
    notes = " ".join(ops.push(release, REPO).notes)
    assert "pytorch_model.bin, which stay there" in notes
    assert "history" not in notes
    hub.repos[REPO].files = {"model.safetensors": b"old"}
    assert "history" in " ".join(ops.push(release, REPO).notes)
    hub.repos[REPO].files = {"model.safetensors": (release / "model.safetensors").read_bytes()}
    assert "history" not in " ".join(ops.push(release, REPO).notes)


def test_what_was_sent_is_not_sent_again(release: Path, hub: FakeHub) -> None:
    hub.failures["/commit/main"] = 500
    with pytest.raises(UnmergeableError, match="run the same command again") as caught:
        ops.push(release, REPO)
    assert caught.value.exit_code == 1
    assert len(hub.sent) == 1
    assert hub.repos[REPO].commits == []
    hub.failures.clear()
    ops.push(release, REPO)
    assert len(hub.sent) == 1
    assert len(hub.repos[REPO].commits) == 1


@pytest.mark.parametrize(("status", "said"), [(401, "hf auth login"), (403, "may not write"), (413, "refuses")])
def test_refusals_are_one_line_without_the_token(status: int, said: str, release: Path, hub: FakeHub) -> None:
    hub.failures["/commit/main"] = status
    with pytest.raises(BadInput, match=said) as caught:
        ops.push(release, REPO)
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_the_hub_says_the_token_and_we_do_not(release: Path, hub: FakeHub) -> None:
    """The control of the test above: the answer holds the token, and the message the rest of the answer."""
    hub.failures["/commit/main"] = 403
    with pytest.raises(BadInput, match=r"refused, said the hub to Bearer …"):
        ops.push(release, REPO)


def test_a_branch_that_is_not_there(release: Path, hub: FakeHub) -> None:
    with pytest.raises(BadInput, match="no such branch"):
        ops.push(release, REPO, create_pr=False, revision="nowhere")


def test_without_a_login(release: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(BadInput, match="hf auth login"):
        ops.push(release, REPO)
    assert hub.requests == []
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_wrong")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(BadInput, match="does not know your login"):
        ops.push(release, REPO)


def test_without_the_library_the_way_to_install_it_is_told(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert ops.push(release, REPO, dry_run=True).is_dry_run, "which needs no hub"
    with pytest.raises(UsageError, match=r"pip install 'unmergeable\[hf\]'"):
        ops.push(release, REPO)


def test_a_hub_that_is_gone_is_told_in_one_line(release: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_hub() as gone:
        pass
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", gone.url)
    with pytest.raises(UnmergeableError, match="cannot be reached") as caught:
        ops.push(release, REPO)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


def test_a_public_seed_is_told(work: Path) -> None:
    ops.protect(work / "expert", base=work / "base", out=work / "seeded", seed=1)
    assert "public seed" in " ".join(ops.push(work / "seeded", REPO, dry_run=True).notes)
    assert "public seed" not in " ".join(ops.push(work / "release", REPO, dry_run=True).notes)


def test_modules_around_a_network_go_up_with_their_folders(work: Path, hub: FakeHub) -> None:
    expert = work / "expert"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (expert / "modules.json").write_text(json.dumps(modules))
    (expert / "1_Pooling").mkdir()
    (expert / "1_Pooling" / "config.json").write_text("{}")
    ops.protect(expert, base=work / "base", out=work / "pooled")
    (work / "pooled" / "1_Pooling" / "extra.bin").write_bytes(struct.pack("d", 1.0))
    result = ops.push(work / "pooled", REPO)
    (commit,) = hub.repos[REPO].commits
    assert commit["files"]["1_Pooling/config.json"] == b"{}"
    assert set(reasons(result)) == {"1_Pooling/extra.bin"}


def test_the_command_finds_the_hub_where_the_environment_says(release: Path, hub: FakeHub, tmp_path: Path) -> None:
    """The whole of it in a process of its own, which prints its log: the token is in nothing that it writes."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_VERBOSITY": "debug",
        "HF_HOME": str(tmp_path / "home"),
    }
    command = [sys.executable, "-m", "unmergeable", "push", str(release), REPO, "--json", "--debug"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pull_request"].startswith(hub.url)
    hub.failures["/commit/main"] = 403
    failed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert failed.returncode == 3
    for text in (done.stdout, done.stderr, failed.stdout, failed.stderr):
        assert TOKEN not in text
