import shutil

import pytest

from loragen.core.run.directory import LoraManifest, read_manifest, write_manifest


@pytest.fixture
def runs(collection, tmp_path):
    """`runs(name, of, **changes)`: a copy of a run in one folder, its manifest changed."""

    def put(name, of="colors", **changes):
        directory = tmp_path / "folder" / name
        shutil.copytree(collection.runs[of], directory)
        manifest = read_manifest(directory, LoraManifest)
        write_manifest(directory, manifest.model_copy(update=changes))
        return directory

    put.folder = tmp_path / "folder"
    return put
