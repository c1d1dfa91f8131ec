"""Full disk: the error names path and bytes, what was committed stays valid, and with room the same command completes.

On a small file system in memory where the tests may mount one (as root on Linux), filled up with ballast to leave a few
bytes, so that arrays, sample table, run folder and index meet the end of the disk one after the other. Elsewhere, and
besides, by an error at each single write.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine import index
from engine.arrays import durable
from engine.cache import Cache
from engine.errors import CacheError
from engine.upkeep.verify import verify_cache
from tests import models
from tests.engine.fakes import write_images
from tests.reliability import long_job
from tests.reliability.long_job import NAME, SAMPLES, tree_bytes

NO_SPACE = r"no space left while writing (more than the )?[\d,]+ bytes( that fit)? to {place}\S+ \(No space left"
SMALL_CHUNKS = "from engine.arrays import array_format; array_format.CHUNK_BYTES = 4096"


class Disk:
    """A small file system, and a ballast that leaves so many bytes of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    @property
    def free(self) -> int:
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize

    @property
    def block(self) -> int:
        return os.statvfs(self.path).f_frsize

    def leave(self, count: int) -> None:
        """Fill it up but for about so many bytes."""
        self.make_room()
        with self._ballast.open("wb") as file:
            file.write(bytes(max(self.free - count, 0)))

    def make_room(self) -> None:
        self._ballast.unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"may not mount a small file system here ({error})")
    yield Disk(place)
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize("moments", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_embedding_on_a_full_disk_says_so_and_completes_when_there_is_room(tmp_path, server, disk, moments):
    model, images = models.open_clip_vit(tmp_path / "model"), tmp_path / "images"
    write_images(images, range(48))
    arguments = ["embed", f"folder:{images}", "--model", f"local-dir:{model}", "--device", "cpu"]
    arguments += ["--what", "image,pixels", "--batch-size", "4", "--set", "commit_seconds=0.01"]
    before = disk.free
    calm = server.fluoro(tmp_path, *arguments, "--cache", str(disk.path / "calm"), before=SMALL_CHUNKS)
    assert calm.wait() == 0, calm.said
    needed = before - disk.free
    expected = tree_bytes(disk.path / "calm" / "arrays.zarr")
    shutil.move(disk.path / "calm", tmp_path / "calm")
    named = set()
    for leave in np.linspace(0, needed, moments + 1)[:-1]:
        cache = disk.path / "cache"
        disk.leave(int(leave))
        full = server.fluoro(tmp_path, *arguments, "--cache", str(cache), before=SMALL_CHUNKS)
        assert full.wait() == 1, full.said
        said = full.said.splitlines()[-1]
        assert re.search(NO_SPACE.format(place=disk.path), said), full.said
        named.add(re.search(rf"bytes to {cache}/([a-z.]+)", said)[1])
        if cache.exists():
            assert verify_cache(cache).damage == []
        disk.make_room()
        again = server.fluoro(tmp_path, *arguments, "--cache", str(cache), before=SMALL_CHUNKS)
        assert again.wait() == 0, again.said
        assert tree_bytes(cache / "arrays.zarr") == expected
        shutil.rmtree(cache)
    assert named >= {"runs", "arrays.zarr"}


def test_a_sample_table_on_a_full_disk_says_so_and_no_row_is_computed_again(tmp_path, disk):
    cache, dataset = disk.path / "cache", long_job.dataset_in(tmp_path / "images")
    long_job.embed(cache, dataset)
    rows = tree_bytes(cache / "arrays.zarr")
    (cache / "datasets" / "fake.parquet").unlink()
    for leave in (0, disk.block):
        disk.leave(leave)
        with pytest.raises(CacheError, match=NO_SPACE.format(place=cache / "datasets")):
            long_job.embed(cache, dataset)
    disk.make_room()
    assert not any(long_job.embed(cache, dataset).computed.values())
    assert verify_cache(cache).damage == [] and tree_bytes(cache / "arrays.zarr") == rows


def test_an_index_on_a_full_disk_says_so_and_the_one_before_stays(tmp_path, disk):
    """Also where only the last bytes do not fit, which FAISS itself overlooks."""
    path, dataset = disk.path / "cache", long_job.dataset_in(tmp_path / "images")
    long_job.embed(path, dataset.take(np.arange(60)))
    index.build_index(Cache(path), NAME)
    long_job.embed(path, dataset)
    before, size = tree_bytes(path / "indexes"), SAMPLES * 12 * 4
    for leave in range(0, size, disk.block):
        disk.leave(leave)
        with pytest.raises(CacheError, match=NO_SPACE.format(place=path / "indexes")):
            index.build_index(Cache(path), NAME)
        assert tree_bytes(path / "indexes") == before
    disk.make_room()
    index.build_index(Cache(path), NAME)
    assert len(index.load_index(Cache(path), NAME)) == SAMPLES
    assert verify_cache(path).damage == []


@pytest.mark.parametrize("every", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_a_write_that_fails_anywhere_leaves_a_valid_cache_and_the_same_files_in_the_end(tmp_path, monkeypatch, every):
    """A quota needs no small disk: each single write of the arrays' files fails after half of its bytes."""
    long_job.small_chunks(monkeypatch)
    dataset = long_job.dataset_in(tmp_path / "images").take(np.arange(24))
    long_job.embed(tmp_path / "calm", dataset)
    write, left = durable._write_all, [0]

    def fails_in_turn(file, buffer) -> None:
        left[0] -= 1
        if left[0] < 0:
            file.write(buffer[: len(buffer) // 2])
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        write(file, buffer)

    number = failed = 0
    while True:
        cache, left[0] = tmp_path / "cache", number
        monkeypatch.setattr(durable, "_write_all", fails_in_turn)
        try:
            long_job.embed(cache, dataset)
            break
        except CacheError as error:
            said = rf"no space left while writing [\d,]+ bytes to {cache}\S+ \(Disk quota exceeded"
            assert re.search(said, str(error))
        monkeypatch.setattr(durable, "_write_all", write)
        assert verify_cache(cache).damage == []
        long_job.embed(cache, dataset)
        assert tree_bytes(cache / "arrays.zarr") == tree_bytes(tmp_path / "calm" / "arrays.zarr")
        shutil.rmtree(cache)
        number, failed = number + every, failed + 1
    assert number > 100 and failed == -(-number // every)
