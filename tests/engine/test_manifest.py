"""Manifests of checkpoints: what they say is true, or is damage."""

import json

import pytest

from lowmem.engine.manifest import damage, file_hashes


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "manifest.json").write_text(json.dumps({"step": 1, "files": file_hashes(tmp_path)}))
    assert damage(tmp_path) == ""
    return tmp_path


@pytest.mark.parametrize("content", ["[]", "3", "null", "{}", '{"files": {"a": 3}}', "{"])
def test_other_json_is_no_manifest(folder, content):
    (folder / "manifest.json").write_text(content)
    assert damage(folder)


@pytest.mark.parametrize("name", ["", "absent", "a\0b", "x" * 300])
def test_a_manifest_names_files_that_are_there(folder, name):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 0, "sha256": ""}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert damage(folder)
