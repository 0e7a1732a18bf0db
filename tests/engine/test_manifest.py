"""Manifests of checkpoints: what they say is true, or is damage."""

import json

import pytest

from lowmem.engine.manifest import damage, file_hashes


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "step-00000001"
    path.mkdir()
    (path / "state.json").write_text('{"step": 1}')
    (path / "model.safetensors").write_bytes(b"weights")
    (path / "manifest.json").write_text(json.dumps({"step": 1, "files": file_hashes(path)}))
    assert damage(path) == ""
    return path


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
