"""Publishing: a release goes to a repository on the hub, and nothing else does.

What may go is what the manifest lists, as it lists it, and beside that what people read: the card, licences, notices
and the card's pictures. Whatever else lies in the folder stays. A folder that is no release, or no longer the one that
was checked, is refused, and so is one with a key in it.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmergeable.checkpoint.disk import read_file
from unmergeable.checkpoint.hub_upload import Commit, Repository, create_repository, repository, repository_name, upload
from unmergeable.checkpoint.listing import (
    CARD_NAME,
    MANIFEST_NAME,
    MAX_JSON_BYTES,
    Kind,
    LeftOut,
    ListedFile,
    Listing,
    is_for_people,
    kind_of_name,
    list_folder,
    reason_to_leave_out,
)
from unmergeable.checkpoint.manifest import Manifest, read_manifest
from unmergeable.errors import BadInput, KeyFileError, NotEquivalent, UsageError
from unmergeable.gauge.key import is_key
from unmergeable.ops.authenticity import verify_manifest
from unmergeable.ops.opened import AnyPath
from unmergeable.ops.recorded import earlier_steps, methods_of
from unmergeable.progress import Progress, silent

LARGEST_PICTURE = 25_000_000
"""Bytes; what calls itself a picture and is larger may be something else."""

_PICTURES = {
    ".png": (b"\x89PNG\r\n\x1a\n",),
    ".jpg": (b"\xff\xd8\xff",),
    ".jpeg": (b"\xff\xd8\xff",),
    ".gif": (b"GIF87a", b"GIF89a"),
    ".webp": (b"RIFF",),
    ".svg": (b"<svg", b"<?xml", b"<!--"),
}
"""How files of these names begin."""

_UNFINISHED = (".partial", ".steps", ".training")
"""What the names of folders end in that hold work on its way."""

_WEIGHTS = (Kind.WEIGHTS, Kind.PICKLED_WEIGHTS, Kind.OTHER_WEIGHTS)


@dataclass(frozen=True)
class PushResult:
    """What was (or, in a dry run, would be) uploaded.

    Attributes:
        out: the release.
        repository: ``OWNER/NAME``.
        files: sizes in bytes, by name.
        left_out: what stays, with the reason.
        notes: sentences that the owner has to read.
        url: of the commit; None in a dry run.
        pull_request: its address, where there is one.
        is_dry_run: nothing was sent, and nothing asked.
    """

    out: Path
    repository: str
    files: Mapping[str, int]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]
    url: str | None
    pull_request: str | None
    is_dry_run: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "repository": self.repository,
            "files": [{"name": name, "size": size} for name, size in self.files.items()],
            "left_out": [{"name": item.name, "reason": item.reason} for item in self.left_out],
            "notes": list(self.notes),
            "url": self.url,
            "pull_request": self.pull_request,
            "dry_run": self.is_dry_run,
        }

    def lines(self) -> list[str]:
        """The same for a terminal."""
        total = sum(self.files.values())
        verb = "Would upload" if self.is_dry_run else "Uploaded"
        lines = [f"{verb}: {self.out} to {self.repository} ({len(self.files)} files, {total:,} bytes)"]
        lines += [f"  {name}  {size:,} bytes" for name, size in self.files.items()]
        lines += [f"Left out: {item.name} ({item.reason})" for item in self.left_out]
        lines += self.notes
        if self.is_dry_run:
            return [*lines, "Dry run: nothing was uploaded, and the hub was not asked."]
        if self.pull_request is not None:
            return [*lines, f"Pull request, to be merged there: {self.pull_request}"]
        return [*lines, f"Commit: {self.url}"]


def push(
    out: AnyPath,
    repo: str,
    *,
    create_pr: bool = True,
    revision: str | None = None,
    create: bool = False,
    private: bool = False,
    message: str | None = None,
    dry_run: bool = False,
    progress: Progress = silent,
) -> PushResult:
    """Upload a release to a repository on the Hugging Face hub. Broken off, the same call goes on.

    Args:
        out: folder that ``protect`` or ``rotate`` wrote.
        repo: ``OWNER/NAME``.
        create_pr: as a pull request; otherwise the branch itself changes at once.
        revision: the branch; None for ``main``.
        create: make the repository, public, where there is none.
        private: make it, private, where there is none. One that is there must be private then.
        message: first line of the commit; None for one that says what was protected how.
        dry_run: check everything here, and ask nothing there.

    Raises:
        UsageError: ``repo`` is no name, or huggingface_hub is not installed.
        BadInput: ``out`` is no release; or nobody is logged in, or the hub refuses.
        NotEquivalent: a file is not what the manifest says, or its signature is not one of it.
        KeyFileError: a key would be uploaded.
        UnmergeableError: the hub cannot be reached, or the upload broke off.
    """
    name = repository_name(repo)
    folder = Path(out)
    if message is not None and not message.strip():
        raise UsageError("the message of the commit is empty: give one, or leave it out.")
    listing, manifest = _release(folder)
    files, left_out = chosen(listing, manifest)
    _require_all(listing, manifest, left_out)
    _require_no_key(folder, files)
    progress("comparing with the manifest", 0, len(files), "files")
    _require_intact(folder)
    progress("comparing with the manifest", len(files), len(files), "files")
    notes = [*_notes_on(folder, manifest, files)]
    commit = None
    if not dry_run:
        there = _prepared(name, create=create, private=private)
        notes += _notes_on_repository(name, there, files, manifest)
        title = f"Release protected by {', '.join(_methods(manifest))} (unmergeable {manifest.tool_version})"
        commit = upload(
            {path: file.path for path, file in files.items()},
            name,
            message=message or title,
            description="" if message is None else title,
            revision=revision,
            as_pull_request=create_pr,
            shows_progress=progress is not silent,
        )
    sizes = {path: file.state[0] for path, file in files.items()}
    return _result(folder, name, sizes, left_out, notes, commit)


def _result(
    folder: Path,
    name: str,
    sizes: Mapping[str, int],
    left_out: tuple[LeftOut, ...],
    notes: list[str],
    commit: Commit | None,
) -> PushResult:
    url, pull_request = (None, None) if commit is None else (commit.url, commit.pull_request)
    return PushResult(folder, name, sizes, left_out, tuple(notes), url, pull_request, commit is None)


def chosen(listing: Listing, manifest: Manifest) -> tuple[dict[str, ListedFile], tuple[LeftOut, ...]]:
    """What of a release is published, by its name there, and what stays in the folder with the reason."""
    recorded = {record.name for record in manifest.outputs} | {MANIFEST_NAME}
    folders = {name.partition("/")[0] for name in recorded if "/" in name}
    listed: dict[str, ListedFile] = {}
    for name, file in listing.files.items():
        if name in folders and file.is_folder:
            inner = list_folder(listing.folder / name).files
            listed |= {f"{name}/{leaf}": found for leaf, found in inner.items()}
        else:
            listed[name] = file
    files: dict[str, ListedFile] = {}
    left_out: list[LeftOut] = []
    for name, file in sorted(listed.items()):
        reason = _reason_to_stay(name, file, is_recorded=name in recorded)
        if reason is None:
            files[name] = file
        else:
            left_out.append(LeftOut(name if name.isprintable() else repr(name)[1:-1], reason))
    return files, tuple(left_out)


def _reason_to_stay(name: str, file: ListedFile, *, is_recorded: bool) -> str | None:
    if name.lower().endswith(".key"):
        return "named as a key"
    if file.is_folder:
        return "folders that protect did not write are not uploaded"
    if file.problem is not None:
        return file.problem
    if is_recorded:
        return None
    if not is_for_people(name):
        return f"protect did not write it; {reason_to_leave_out(file)}"
    begins = _PICTURES.get(Path(name).suffix.lower())
    if begins is None:
        return None
    if file.state[0] > LARGEST_PICTURE:
        return f"larger than {LARGEST_PICTURE:,} bytes, which no picture of a card has to be"
    return None if read_file(file.path).lstrip().startswith(begins) else "named as a picture, which it is not"


def _release(folder: Path) -> tuple[Listing, Manifest]:
    """The folder of a release and its manifest. Raises for everything else, saying what it is."""
    if folder.is_file():
        if folder.stat().st_size <= MAX_JSON_BYTES and is_key(read_file(folder)):
            raise KeyFileError(f"{folder} is a key, which is never uploaded; give the folder of the release.")
        raise BadInput(f"{folder} is a file: give the folder that `protect` wrote.")
    listing = list_folder(folder)
    place = folder.resolve()
    unfinished = next((part for part in (place.name, place.parent.name) if part.endswith(_UNFINISHED)), None)
    if unfinished is not None:
        raise BadInput(f"{folder} lies in {unfinished}, which is work on its way; give the folder that `protect` made.")
    manifest = read_manifest(listing)
    if manifest is None:
        inside = _releases_in(listing)
        remedy = (
            f"push the release in it: unmergeable push {shlex.quote(str(inside[0]))} REPO"
            if inside
            else "give the folder that `protect` wrote"
        )
        raise BadInput(f"{folder} is no release (it has no {MANIFEST_NAME}); {remedy}.")
    kind = manifest.details.get("kind")
    if kind != "protected":
        what = kind if isinstance(kind, str) and kind.isidentifier() else "unknown"
        raise BadInput(
            f"{folder} is no release: its {MANIFEST_NAME} says {what!r} and not 'protected'; give the folder that "
            "`protect` wrote."
        )
    return listing, manifest


def _releases_in(listing: Listing) -> list[Path]:
    inner = [listing.folder / name for name in listing.names(Kind.FOLDER, Kind.WEIGHTS_FOLDER)]
    return [folder for folder in inner if (folder / MANIFEST_NAME).is_file() and not folder.name.endswith(_UNFINISHED)]


def _require_all(listing: Listing, manifest: Manifest, left_out: tuple[LeftOut, ...]) -> None:
    """Raises BadInput where something of the release itself cannot be uploaded."""
    recorded = {record.name for record in manifest.outputs}
    for item in left_out:
        if item.name in recorded:
            raise BadInput(f"{listing.folder}: {item.name} cannot be uploaded: {item.reason}")


def _require_no_key(folder: Path, files: Mapping[str, ListedFile]) -> None:
    """Raises KeyFileError where a key goes by another name, or its text stands in a file: whoever has it has all."""
    for name, file in files.items():
        if kind_of_name(name) is Kind.WEIGHTS or file.state[0] > MAX_JSON_BYTES:
            continue  # whose bytes are those that the manifest lists
        if is_key(read_file(file.path)):
            raise KeyFileError(f"{folder / name} holds a key, which must not be published; move it away.")


def _require_intact(folder: Path) -> None:
    found = verify_manifest(folder)
    # What came to the folder stays there, so that it alters nothing of the release.
    altered = [item for item in found.alterations if item.problem != "added"]
    if altered:
        first = f"{altered[0].name} is {altered[0].problem}"
        others = f", and {len(altered) - 1} more" if len(altered) > 1 else ""
        raise NotEquivalent(
            f"{folder} is not the release that was checked: {first}{others}; put back what `protect` wrote, or protect "
            f"again (all of them: unmergeable verify {shlex.quote(str(folder))} --manifest)."
        )
    if found.problem is not None:
        raise NotEquivalent(
            f"{folder}: the signature is {found.problem}; put back the {MANIFEST_NAME} that `protect` wrote."
        )


def _prepared(name: str, *, create: bool, private: bool) -> Repository:
    there = repository(name)
    if there is None and (create or private):
        create_repository(name, is_private=private)
        return Repository(private, {})
    if there is None:
        raise BadInput(f"{name} is no repository that your login sees; add --create, or --private, to make it.")
    if private and not there.is_private:
        raise BadInput(f"{name} is there and public; make it private on the hub, or leave out --private.")
    return there


def _methods(manifest: Manifest) -> list[str]:
    records = [*earlier_steps(manifest), manifest.details]
    return list(dict.fromkeys(name for record in records for name in methods_of(record)))


def _notes_on(folder: Path, manifest: Manifest, files: Mapping[str, ListedFile]) -> Iterator[str]:
    command = f"unmergeable card {shlex.quote(str(folder))} --write"
    if manifest.details.get("key_from_public_seed") is True:
        yield (
            "Warning: the key was drawn from a public seed (--seed): anybody can make it again, so that this protects "
            "nothing. Protect again without --seed."
        )
    if CARD_NAME not in files:
        yield f"There is no card ({CARD_NAME}); one that says what was done is made by: {command}"
    elif b"<!-- unmergeable:" not in read_file(files[CARD_NAME].path):
        yield f"The card says nothing of the protection, which is added by: {command}"
    if not any(name.upper().startswith(("LICENSE", "LICENCE")) for name in files):
        yield "There is no licence file; look whether the licence of the base asks for a copy of it."


def _notes_on_repository(
    name: str, there: Repository, files: Mapping[str, ListedFile], manifest: Manifest
) -> Iterator[str]:
    weights = {path: digest for path, digest in there.files.items() if kind_of_name(path) in _WEIGHTS}
    stay = sorted(weights.keys() - files.keys())
    if stay:
        more = f" and {len(stay) - 1} more" if len(stay) > 1 else ""
        yield (
            f"Warning: {name} also has {stay[0]}{more}, which stay there; weights that are not protected still merge: "
            "delete them on the hub if they are such."
        )
    ours = {record.name: record.sha256 for record in manifest.outputs}
    if any(path in files and digest != ours.get(path) for path, digest in weights.items()):
        yield (
            f"Warning: {name} had other weights under these names before, which its history keeps; if they were not "
            "protected, anybody can still take them: use a new repository, or squash the history (huggingface_hub: "
            "super_squash_history)."
        )
