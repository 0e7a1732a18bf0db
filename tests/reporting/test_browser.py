"""The report in a real browser, offline: everything is in the DOM, nothing complains, and something is on the screen."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lowmem.reporting.figures import slug
from lowmem.reporting.page import write_configs
from lowmem.reporting.results import peak_rows
from tests.reporting.results import MACHINE, all_results

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
imread = pytest.importorskip("matplotlib.image").imread
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no browser; apt-get install chromium, or make test as root"),
]


def browse(page: Path, *arguments: str, profile: Path) -> subprocess.CompletedProcess:
    """Open a page in a fresh profile, without a network, console messages on standard error."""
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", "--v=0",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", *arguments, page.as_uri(),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result


def console(stderr: str) -> list[str]:
    """What the page itself said; the browser has its own troubles, with the system bus for one."""
    return [line for line in stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_configs(folder, all_results(), MACHINE)
    return folder / "profile.html"


def test_table_and_bars_are_in_the_document_and_nothing_complains(report, tmp_path):
    result = browse(report, "--dump-dom", profile=tmp_path / "profile")
    dom = result.stdout
    assert console(result.stderr) == []
    rows = peak_rows(all_results())
    table = re.search(r'<table id="peaks-table">.*?</table>', dom, re.DOTALL).group()
    assert table.count("<tr>") == 1 + len(rows)
    for row in rows:
        for kind, parts in (("predicted", row.predicted_parts), ("measured", row.measured_parts)):
            for part in parts:
                assert f'id="peaks-bar-{slug(row.name)}-{row.place[:3]}-{kind}-{slug(part)}"' in dom
    for name in ("whole", "unpredicted", "failed", "gpu-i"):
        assert f'id="timeline-{name}-timeline-{name}"' in dom
    assert set(re.findall(r"[a-z]+://[^\s\"'<>)]+", dom)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_a_page_that_complains_is_noticed(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<script>console.error('wrong'); nothing.here</script>")
    assert len(console(browse(page, "--dump-dom", profile=tmp_path / "profile").stderr)) == 2


@pytest.mark.parametrize("width, dark", [(1000, False), (400, False), (1000, True)])
def test_something_is_on_the_screen(report, tmp_path, width, dark):
    target = tmp_path / "screen.png"
    scheme = ("--blink-settings=preferredColorScheme=0",) if dark else ()
    result = browse(report, f"--window-size={width},1000", f"--screenshot={target}", *scheme, profile=tmp_path / "profile")
    assert console(result.stderr) == []
    pixels = (imread(target)[:, :, :3] * 255).round().astype(int)
    assert pixels.shape[0] == 1000
    assert pixels.shape[1] >= width
    colours = set(map(tuple, pixels.reshape(-1, 3).tolist()))
    assert (0x00, 0x72, 0xB2) in colours  # the weights
    assert (0xD5, 0x5E, 0x00) in colours  # the activations
    assert ((0x0D, 0x11, 0x17) if dark else (255, 255, 255)) in colours
    assert len({row.tobytes() for row in pixels}) > 300  # of 1,000: a blank page has one
