"""The command line as a user types it, in this process: exit code, stdout, stderr."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from planc.cli import main
from tests.roof.support import Planc, Result, write_request


@pytest.fixture
def planc(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Planc:
    def call(*words: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["planc", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        shown = capsys.readouterr()
        return Result(code, shown.out, shown.err)

    return call


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of REQUEST, compiled once."""
    from planc import api

    folder = tmp_path_factory.mktemp("bundle")
    plan = api.compile(write_request(folder))
    api.write_bundle(plan, folder / "b")
    return folder / "b"
