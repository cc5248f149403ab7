"""Before the page is there: its port, its package, its reports."""

from __future__ import annotations

import importlib.util
import os
import re

import pytest

from concept_unlearn.cli.ui import ui
from concept_unlearn.errors import InvalidConfig, MissingExtra
from concept_unlearn.ui import Shelf, address_of, listen


def test_a_port_in_use_is_told_with_one_that_is_free():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert address_of(taken) == f"http://127.0.0.1:{port}/"
        with pytest.raises(InvalidConfig, match=f"port {port} .* in use") as told:
            listen("127.0.0.1", port)
    listen("127.0.0.1", int(re.search(r"--port (\d+)", str(told.value))[1])).close()


@pytest.mark.parametrize(("host", "port"), [("not a host", 8080), ("203.0.113.7", 0), ("127.0.0.1", 99999)])
def test_an_address_that_cannot_be_had_is_told(host, port):
    with pytest.raises(InvalidConfig, match=re.escape(f"--host {host} --port {port}")):
        listen(host, port)


def test_an_address_that_cannot_be_had_is_told_before_a_model_is_loaded():
    pytest.importorskip("nicegui", reason="no nicegui: pip install 'concept-unlearn[ui]'")
    with listen("127.0.0.1", 0) as taken, pytest.raises(InvalidConfig, match="in use"):
        ui(patch=["nowhere"], model="nowhere", port=taken.getsockname()[1])


def test_without_the_extra_the_pip_line_is_told(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "nicegui" else found(name, *a))
    with pytest.raises(MissingExtra, match=re.escape("pip install 'concept-unlearn[ui]'")):
        ui(patch=["nowhere"])


def test_a_shelf_lists_pages_newest_first_and_serves_no_other_file(tmp_path):
    for i, (folder, page) in enumerate([("a", "report.html"), ("a/deep", "inspection.html"), ("b", "rows.jsonl")]):
        (tmp_path / "runs" / folder).mkdir(parents=True, exist_ok=True)
        path = tmp_path / "runs" / folder / page
        path.write_text(page)
        os.utime(path, (i, i))
    (tmp_path / "report.html").write_text("beside the shelf")
    shelf = Shelf(tmp_path / "runs")
    assert [(p.name, p.kind, p.address) for p in shelf.pages()] == [
        ("a/deep", "inspection", "a/deep/inspection.html"), ("a", "report", "a/report.html"),
    ]  # fmt: skip
    assert shelf.path("a/report.html").read_text() == "report.html"
    assert [shelf.path(p) for p in ("b/rows.jsonl", "../report.html", "a/../a/report.html", "", "/")] == [None] * 5
    assert Shelf(tmp_path / "nowhere").pages() == []
