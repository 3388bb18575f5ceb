"""Are the files of a release what its manifest says, and who signed that?"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmergeable.checkpoint.hub import download, is_on_hub
from unmergeable.checkpoint.listing import CARD_NAME, MANIFEST_NAME
from unmergeable.checkpoint.manifest import Alteration, check_files, read_manifest
from unmergeable.errors import CheckpointError, UsageError
from unmergeable.gauge.signature import is_signed
from unmergeable.ops.opened import AnyPath

_PUBLIC_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ManifestResult:
    """What a manifest proves.

    Attributes:
        folder: the release.
        alterations: files that are not what the manifest says.
        signer: the public key that signed it; None where nobody did, or the signature is not one of this manifest.
        problem: why the signature proves nothing, in a clause; None where it does, or where there is none and none was
            asked for.
        is_from_public_seed: whether anybody can make the key that signed.
    """

    folder: Path
    alterations: tuple[Alteration, ...]
    signer: str | None
    problem: str | None
    is_from_public_seed: bool

    @property
    def is_intact(self) -> bool:
        return not self.alterations and self.problem is None

    def to_json(self) -> dict[str, Any]:
        return {
            "intact": self.is_intact,
            "altered": [{"name": item.name, "problem": item.problem} for item in self.alterations],
            "signed_by": self.signer,
            "reason": self.problem,
            "key_from_public_seed": self.is_from_public_seed,
        }

    def lines(self) -> list[str]:
        """The verdict for a terminal."""
        lines = [f"Altered: {item.name!r} ({item.problem})" for item in self.alterations]
        if not self.alterations:
            lines += [f"Every file of {self.folder} is as its {MANIFEST_NAME} says."]
        if (self.folder / CARD_NAME).exists():
            lines += [f"  {CARD_NAME} is its owner's to edit, and was not compared."]
        if self.problem is not None:
            return [*lines, f"Signature: {self.problem}."]
        if self.signer is None:
            return [*lines, "Signature: none; whoever changed a file may have changed the manifest too."]
        lines += [f"Signed by: {self.signer}"]
        if self.is_from_public_seed:
            lines += ["  The key was drawn from a public seed: anybody can sign so."]
        return lines


def verify_manifest(release: AnyPath, *, public_key: str | None = None) -> ManifestResult:
    """Hash every file of a release and check the signature of its manifest.

    Args:
        release: folder that ``protect`` wrote, or ``hub:OWNER/NAME``.
        public_key: whose signature it must be, 64 hex digits that come from the owner by another way than the release
            (``key show`` prints them). Without, any signature counts, and proves only that nothing changed since.

    Raises:
        UsageError: ``public_key`` is not one.
        CheckpointError: there is no manifest, or it cannot be read.
    """
    if public_key is not None and not _PUBLIC_KEY.fullmatch(public_key):
        raise UsageError("a public key is 64 hexadecimal digits, in lower case; `unmergeable key show` prints them.")
    text = os.fspath(release)
    folder = download(text, whole=True) if is_on_hub(text) else Path(text)
    manifest = read_manifest(folder)
    if manifest is None:
        raise CheckpointError(f"{folder} has no {MANIFEST_NAME}: nothing to compare its files with.")
    alterations = check_files(folder)
    signer, problem = None, None
    if manifest.signature is None:
        problem = None if public_key is None else "none, and one was asked for"
    elif not is_signed(manifest.signed_bytes, manifest.signature):
        problem = "not one of this manifest, which was changed after it was signed"
    else:
        signer = str(manifest.signature["public_key"])
        problem = None if public_key in (None, signer) else f"by {signer}, and not by the key asked for"
    is_public = manifest.details.get("key_from_public_seed") is True
    return ManifestResult(folder, alterations, signer, problem, is_public)
