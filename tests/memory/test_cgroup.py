import pytest

from lowmem.memory.procfs import cgroup_bytes, cgroup_limit_bytes, cgroup_room_bytes


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "3000\n"}, 3000),
        ("0::/a/b\n", {"a/b/memory.max": "2000\n", "a/memory.max": "3000\n"}, 2000),
        ("0::/not/visible/here\n", {"memory.max": "1000\n"}, 1000),
        ("0::/a\n", {"a/memory.max": "max\n"}, None),
        ("5:cpu,memory:/x\n1:name=systemd:/y\n", {"memory/x/memory.limit_in_bytes": "4096\n"}, 4096),
        ("5:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        ("", {}, None),
    ],
)
def test_the_lowest_limit_on_the_way_up_counts(membership, files, expected, tmp_path):
    for name, text in files.items():
        write(tmp_path / "fs" / name, text)
    write(tmp_path / "membership", membership)
    assert cgroup_limit_bytes(tmp_path / "fs", tmp_path / "membership") == expected


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/a/b\n", {"a/b/memory.peak": "2000\n", "a/memory.peak": "3000\n"}, 2000),
        ("4:memory:/x\n0::/a\n", {"a/memory.peak": "2000\n"}, 2000),
        ("0::/not/visible/here\n", {"memory.peak": "1000\n"}, 1000),  # a container that sees its own group as the root
        ("0::/a/b\n", {"a/b/cgroup.procs": "1\n", "a/memory.peak": "3000\n"}, None),  # the group above holds other processes
        ("4:memory:/x\n", {"memory/x/memory.peak": "2000\n"}, None),
    ],
)
def test_a_groups_own_peak_and_never_that_of_a_group_above(membership, files, expected, tmp_path):
    for name, text in files.items():
        write(tmp_path / "fs" / name, text)
    write(tmp_path / "membership", membership)
    assert cgroup_bytes("memory.peak", root=tmp_path / "fs", membership=tmp_path / "membership") == expected


def test_no_linux_no_limit(tmp_path):
    assert cgroup_limit_bytes(tmp_path, tmp_path / "absent") is None


STATS_2 = "anon 500\nfile 9000\nshmem 20\nslab_unreclaimable 30\n"
STATS_1 = "cache 9000\nrss 1\ntotal_rss 500\ntotal_shmem 50\n"


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "3000\n", "a/memory.stat": STATS_2}, 3000 - 550 + 100),
        ("0::/a/b\n", {"a/b/memory.max": "2600\n", "a/memory.max": "3000\n", "a/memory.stat": STATS_2}, 2550),
        ("0::/a\n", {"a/memory.max": "2600\n"}, 2600),
        ("0::/a\n", {"a/memory.max": "max\n", "a/memory.stat": STATS_2}, None),
        ("5:cpu,memory:/x\n", {"memory/x/memory.limit_in_bytes": "4096\n", "memory/x/memory.stat": STATS_1}, 4096 - 550 + 100),
        ("5:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        ("0::/a\n", {"a/memory.max": "300\n", "a/memory.stat": STATS_2}, 0),
    ],
)
def test_others_leave_the_limit_less_what_the_kernel_cannot_take_back(membership, files, expected, tmp_path):
    for name, text in files.items():
        write(tmp_path / "fs" / name, text)
    write(tmp_path / "membership", membership)
    assert cgroup_room_bytes(100, tmp_path / "fs", tmp_path / "membership") == expected
