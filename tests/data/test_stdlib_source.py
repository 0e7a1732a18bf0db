"""The standard library as a corpus."""

from lowmem.data.text import StdlibSource
from lowmem.data.text_source import ReadCounters


def test_a_library_is_read_in_order_without_packages_and_other_encodings(tmp_path):
    for name, content in {
        "b.py": b"beta = 1\n",
        "a/z.py": b"alpha = 1\n",
        "site-packages/x.py": b"installed\n",
        "__pycache__/y.py": b"cache\n",
        "koi8.py": b"# -*- coding: koi8-r -*-\n\xd0\xff\n",
        "empty.py": b"",
        "notes.txt": b"no source\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    source = StdlibSource(tmp_path)
    assert [piece.text for piece in source.pieces(ReadCounters())] == ["alpha = 1\n", "beta = 1\n"]


def test_the_running_library_is_tens_of_megabytes_and_repeatable():
    source = StdlibSource()
    assert source.total_bytes > 5_000_000  # the smallest distributions leave out the library's own tests
    assert source.identity() == StdlibSource().identity()
    counters = ReadCounters()
    first = [piece.text for piece, _ in zip(source.pieces(counters), range(20), strict=False)]
    assert first == [piece.text for piece, _ in zip(StdlibSource().pieces(ReadCounters()), range(20), strict=False)]
    assert not any("site-packages" in path for path, _ in source.identity()["files"])
