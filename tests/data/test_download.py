# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Fetching a task, from a server on this machine: once, checked, complete, and one line where it cannot be."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from monai.apps import DecathlonDataset

from monai_losses_ext.cli import main
from monai_losses_ext.data.dataset import read_cases
from monai_losses_ext.data.download import download
from monai_losses_ext.data.phantoms import make_phantoms
from monai_losses_ext.errors import UserError

TASK = "Task04_Hippocampus"


@pytest.fixture
def requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Serve an archive like the Decathlon's, with phantoms that do not say so; the requests that came."""
    source = tmp_path / "server"
    index = make_phantoms(TASK, source / TASK, n_cases=2, scale=0.1) / "dataset.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    del content["phantoms"]
    index.write_text(json.dumps(content), encoding="utf-8")
    with tarfile.open(source / f"{TASK}.tar", "w") as archive:
        archive.add(source / TASK, TASK)
    got: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, _: str, *args: object) -> None:
            got.append(str(args[0]).split()[0])

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(source))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setitem(DecathlonDataset.resource, TASK, f"http://127.0.0.1:{server.server_port}/{TASK}.tar")
        checksum = hashlib.md5((source / f"{TASK}.tar").read_bytes(), usedforsecurity=False).hexdigest()
        monkeypatch.setitem(DecathlonDataset.md5, TASK, checksum)
        yield got
        server.shutdown()


def test_fetches_once_and_says_size_and_license(
    tmp_path: Path, requests: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data"
    assert main(["data", "download", "--task", TASK, "--out", str(out)]) == 0
    assert requests == ["HEAD", "GET"]
    printed = capsys.readouterr().out
    assert " GB from http://127.0.0.1" in printed
    assert "license CC BY-SA 4.0 (https://creativecommons.org" in printed
    assert str(out / TASK) in printed
    assert len(read_cases(out / TASK)) == 2
    assert [path.name for path in out.iterdir()] == [TASK]
    assert download(TASK, out) == out / TASK
    assert requests == ["HEAD", "GET"]


def test_phantoms_are_not_taken_for_the_data(tmp_path: Path, requests: list[str]) -> None:
    make_phantoms(TASK, tmp_path / TASK, n_cases=1, scale=0.3)
    with pytest.raises(UserError, match="out: must hold no phantoms where the task's data go"):
        download(TASK, tmp_path)
    assert requests == []


def test_server_that_does_not_tell_the_size(
    tmp_path: Path, requests: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    send = SimpleHTTPRequestHandler.send_header
    monkeypatch.setattr(
        SimpleHTTPRequestHandler,
        "send_header",
        lambda self, name, value: None if name == "Content-Length" else send(self, name, value),
    )
    assert main(["data", "download", "--task", TASK, "--out", str(tmp_path / "data")]) == 0
    assert f"{TASK}: size unknown from http://127.0.0.1" in capsys.readouterr().out
    assert len(read_cases(tmp_path / "data" / TASK)) == 2


def test_interrupted_unpacking_is_made_good_without_fetching_again(tmp_path: Path, requests: list[str]) -> None:
    out = tmp_path / "data"
    (out / TASK).mkdir(parents=True)
    (out / f"{TASK}.tar").write_bytes((tmp_path / "server" / f"{TASK}.tar").read_bytes())
    download(TASK, out)
    assert len(read_cases(out / TASK)) == 2
    assert requests == []


def test_damaged_archive_is_one_line(
    tmp_path: Path, requests: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(DecathlonDataset.md5, TASK, "0" * 32)
    assert main(["data", "download", "--task", TASK, "--out", str(tmp_path / "data")]) == 1
    assert "is damaged" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "data" / TASK).exists()
    assert requests == ["HEAD", "GET"]


def test_no_network_is_one_line_that_offers_phantoms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setitem(DecathlonDataset.resource, TASK, f"http://127.0.0.1:1/{TASK}.tar")  # nobody listens there
    assert main(["data", "download", "--task", TASK, "--out", str(tmp_path / "data")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "cannot be reached" in error
    assert f"data phantoms --task {TASK}" in error
    assert not (tmp_path / "data").exists()
