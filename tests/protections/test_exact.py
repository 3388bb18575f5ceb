"""``protect`` with exact methods: what it refuses to publish, and what it says then."""

from __future__ import annotations

from pathlib import Path

import pytest

from unmergeable.cli import main
from zoo import TOYS, write_toy


def protect(folder: Path, toy: str, method: str, *settings: str) -> int:
    for seed, name in enumerate(("base", "expert")):
        write_toy(TOYS[toy], folder / name, seed=seed)
    arguments = ["--base", str(folder / "base"), "--out", str(folder / "out"), "--key", str(folder / "key")]
    chosen = [part for setting in settings for part in ("--set", setting)]
    return main(["protect", str(folder / "expert"), *arguments, "--method", method, "--seed", "7", *chosen])


@pytest.mark.parametrize(
    ("method", "setting", "blamed"),
    [
        ("params", "as_published=true", "params"),
        ("mergelock", "as_published=true", "mergelock"),
        ("params,mergelock", "mergelock.as_published=true", "mergelock"),
    ],
)
def test_a_published_form_that_is_not_exact_is_named(
    method: str, setting: str, blamed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert protect(tmp_path, "llama", method, setting) == 4
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.endswith(
        f"nothing was written. {blamed} as published is not exact under the rotary positions of llama; "
        "leave as_published out."
    )
    assert "condition" not in error
    assert {path.name for path in tmp_path.iterdir()} == {"base", "expert"}


@pytest.mark.parametrize(
    ("toy", "method", "settings"),
    [
        ("gpt2", "params", ["as_published=true"]),  # without rotary positions it is exact
        ("llama", "params", ["as_published=true", "attention=false"]),  # and where attention stays as it is
        ("llama", "params", []),
    ],
)
def test_a_published_form_that_is_exact_is_written(
    toy: str, method: str, settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert protect(tmp_path, toy, method, *settings) == 0, capsys.readouterr().err
    assert (tmp_path / "out").is_dir()


def test_without_a_published_form_the_remedy_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("unmergeable.gauge.equivalence.UNIT_ROUNDOFF", dict.fromkeys(("F32", "BF16", "F16"), 1e-12))
    assert protect(tmp_path, "llama", "mergelock", "quantisation=free") == 4
    assert capsys.readouterr().err.strip().endswith("nothing was written. Try a smaller condition number.")
