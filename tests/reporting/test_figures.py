"""Figures and page as text: what is in them, that it is escaped, the same twice, and asks nothing of the network."""

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from lowmem.reporting import figures
from lowmem.reporting.figures import peaks_svg, speed_svg, thinned, timeline_svg
from lowmem.reporting.page import write_command, write_configs
from lowmem.reporting.results import peak_rows
from lowmem.system.errors import ConfigError, StorageError
from tests.reporting.results import COUNTED, MACHINE, MIB, PARTS, all_results, result

pytest.importorskip("matplotlib")
SVG = "{http://www.w3.org/2000/svg}"
NAMESPACES = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def external_urls(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+://[^\s\"'<>)]+", text)) - NAMESPACES


def bar_width(root: ElementTree.Element, gid: str) -> float:
    (group,) = [group for group in root.iter(f"{SVG}g") if group.get("id", "").endswith(gid)]
    path = group.find(f"{SVG}path").get("d")
    numbers = [float(number) for number in re.findall(r"[ML] ([\d.]+)", path)]
    return max(numbers) - min(numbers)


def words(svg: str) -> str:
    return " ".join(text.text or "" for text in ElementTree.fromstring(svg).iter(f"{SVG}text"))


def test_bars_are_as_long_as_their_components():
    root = ElementTree.fromstring(peaks_svg(peak_rows([result("whole")])))
    per_mib = bar_width(root, "bar-whole-RAM-predicted-base") / 210
    for part, size in PARTS.items():
        assert bar_width(root, f"bar-whole-RAM-predicted-{part}") == pytest.approx(size / MIB * per_mib, rel=1e-3)
    for part, size in {**COUNTED, "everything-else": (923 - 210 - 396) * MIB}.items():
        assert bar_width(root, f"bar-whole-RAM-measured-{part}") == pytest.approx(size / MIB * per_mib, rel=1e-3)


def test_the_figure_of_peaks_says_what_it_shows():
    text = words(peaks_svg(peak_rows(all_results())))
    for phrase in ("whole, RAM", "892 MiB", "923 MiB", "budget 1.00 GiB", "budget 64.00 GiB", "no prediction", "failed (exit code 3)",
                   "optimizer states", "everything else", "peak memory (GiB)"):  # fmt: skip
        assert phrase in text


def test_the_timeline_names_phases_levels_and_units():
    svg = timeline_svg(result("whole"), budget_bytes=900 * MIB, predicted_bytes=8 * 1024 * MIB)
    for phrase in ("load", "steady steps", "budget 900 MiB", "predicted peak 8.00 GiB (above)", "host memory (MiB)", "end of a step"):
        assert phrase in words(svg)
    assert "peak between samples" in words(svg)
    even = [{"t_s": at, "host_bytes": MIB, "host_peak_bytes": MIB} for at in range(3)]
    assert "peak between samples" not in words(timeline_svg({"name": "x", "timeline": even}))


def test_thinning_keeps_the_peaks():
    samples = [{"t_s": at, "host_bytes": at % 7, "host_peak_bytes": 1000 if at == 4321 else at % 7} for at in range(9999)]
    short = thinned(samples)
    assert len(short) == 2000
    assert max(sample["host_peak_bytes"] for sample in short) == 1000
    assert thinned(samples[:9]) == samples[:9]


def test_figures_are_deterministic_take_the_page_s_colour_and_end_up_escaped():
    for make in (lambda: peaks_svg(peak_rows(all_results())), lambda: speed_svg(all_results()), lambda: timeline_svg(result("a <b>&"))):
        svg = make()
        assert svg == make()
        ElementTree.fromstring(svg)
        assert figures.INK not in svg
        assert "currentColor" in svg
        assert not external_urls(svg)
        assert "<metadata" not in svg
    assert "prefers-color-scheme:dark" in figures.svg_file(svg)
    ElementTree.fromstring(figures.svg_file(svg).encode())


def test_the_report_is_whole_self_contained_and_escaped(tmp_path: Path):
    write_configs(tmp_path, all_results(), MACHINE)
    assert {path.name for path in tmp_path.iterdir()} == {
        "profile.html", "profile.md", "peaks.svg", "speed.svg", *(f"{name}{end}" for name in ("whole", "unpredicted", "failed", "gpu-i")
                                                                 for end in (".json", "-timeline.svg")),
    }  # fmt: skip
    page = (tmp_path / "profile.html").read_text()
    assert not external_urls(page)
    assert "<script" not in page
    assert "<i>" not in page
    assert "<b>" not in page
    assert "memory ran out; &lt;b&gt;use&lt;/b&gt; | less" in page
    assert "a processor &amp; more" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) | set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    stored = json.loads((tmp_path / "whole.json").read_text())
    assert stored == {**result("whole"), "machine": MACHINE}


def test_the_report_on_a_command(tmp_path: Path):
    found = {"name": "sleep", "command": "sleep 1 <&>", "exit_code": 4, "duration_s": 6.0, "samples": 60, "host_peak_bytes": 5 * MIB}
    write_command(tmp_path, {**found, "timeline": result("x")["timeline"]}, MACHINE)
    page = (tmp_path / "profile.html").read_text()
    assert "sleep 1 &lt;&amp;&gt;" in page
    assert "5 MiB" in page
    assert {path.name for path in tmp_path.iterdir()} == {"profile.html", "command.json", "command-timeline.svg"}


def test_a_folder_that_cannot_be_written_and_a_missing_library_are_said(tmp_path: Path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file: .*; choose another --out"):
        write_command(tmp_path / "file", {**result("x"), "command": "x", "samples": 1, "host_peak_bytes": 1}, MACHINE)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"need matplotlib.*pip install 'lowmem\[report\]'"):
        figures.require_matplotlib()
