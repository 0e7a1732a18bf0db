import pytest

from lowmem.memory.cgroup import cgroup_limit_bytes


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


def test_no_linux_no_limit(tmp_path):
    assert cgroup_limit_bytes(tmp_path, tmp_path / "absent") is None
