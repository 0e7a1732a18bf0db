import pytest

from lowmem.reporting.page import table
from lowmem.reporting.results import REST, peak_rows, without_folders
from tests.reporting.results import COUNTED, GPU_PARTS, MIB, PARTS, all_results, peaks, result


def test_parts_add_up_to_the_peak_they_belong_to():
    rows = peak_rows(all_results())
    assert [(row.name, row.place) for row in rows] == [
        ("whole", "RAM"), ("unpredicted", "RAM"), ("failed", "RAM"), ("gpu <i>&", "RAM"), ("gpu <i>&", "GPU memory"),
    ]  # fmt: skip
    for row in rows:
        assert sum(row.predicted_parts.values()) in (0, row.predicted_bytes)
        assert sum(row.measured_parts.values()) in (0, row.measured_bytes)
    whole, _, _, ram, gpu = rows
    assert list(whole.predicted_parts) == list(PARTS)
    assert whole.measured_parts == {"base": 210 * MIB, **COUNTED, REST: (923 - 210 - 99 - 99 - 198) * MIB}
    assert (ram.predicted_parts, ram.budget_bytes) == ({}, 64 * 1024 * MIB)
    assert (gpu.predicted_parts, gpu.budget_bytes) == (GPU_PARTS, 2500 * MIB)
    assert gpu.measured_parts == {"weights": 430 * MIB, REST: 1770 * MIB}


def test_without_a_prediction_there_is_no_base_and_no_difference():
    (row,) = peak_rows([result("x", predicted=None)])
    assert row.difference_percent is None
    assert row.measured_parts == {**COUNTED, REST: (923 - 396) * MIB}


def test_parts_larger_than_the_peak_are_cut_and_smaller_ones_filled_up():
    (row,) = peak_rows([result("x", predicted=peaks(100, components={"weights": 60, "base": 20}), measured=peaks(80, components=COUNTED))])
    assert row.predicted_parts == {"base": 20, "weights": 60, REST: 20}
    assert row.measured_parts == {"weights": 80}
    assert row.difference_percent == pytest.approx(25)


def test_the_markdown_table_is_aligned_escaped_and_says_why_a_run_failed():
    text = table(peak_rows(all_results()))
    lines = text.splitlines()
    assert len({len(line) for line in lines[:7]}) == 1
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == ["whole", "RAM", "1.00 GiB", "892 MiB", "923 MiB", "-3.4 %", "800"]
    assert "no prediction" in lines[3]
    assert "failed, exit code 3" in lines[4]
    assert lines[-1] == "- failed failed, exit code 3: memory ran out; &lt;b>use&lt;/b> \\| less"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("python /home/someone/train.py --data=/data/private/text.txt", "python .../train.py --data=.../text.txt"),
        ("[{path: /tmp/x/y.txt}]", "[{path: .../y.txt}]"),
        ("configs/cpu/demo.yaml at 3/4", "configs/cpu/demo.yaml at 3/4"),
        ("/usr/bin/python", ".../python"),
        ("in /srv/cache/.here/ now", "in ... now"),
    ],
)
def test_folders_that_tell_whose_machine_it_was_are_left_out(text, expected):
    assert without_folders(text).replace(".../ ", "... ") == expected
