"""Reading files below a root: what is refused, and with which reason."""

import os
import pickle
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from engine.errors import ImageError, UsageError
from engine.sources.files import FileReader, count_suffixes, existing_folder, walk_files


@pytest.fixture
def reader(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.png").write_bytes(b"content")
    (tmp_path / "secret.png").write_bytes(b"outside")
    return FileReader(str(root))


def test_read_and_fingerprint(reader):
    status = os.stat(os.path.join(reader.root, "a.png"))
    carried = pickle.loads(pickle.dumps(reader))
    assert carried.read("a.png") == b"content"
    assert tuple(carried.fingerprint("a.png")) == (7, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    assert carried.read(os.path.join(reader.root, "a.png")) == b"content"


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("", "this sample has no image"),
        ("b.png", "b.png: no such file"),
        ("../secret.png", "leads out of the root"),
        ("x/../../secret.png", "leads out of the root"),
        ("/etc/hostname", "leads out of the root"),
        (".", "leads out of the root"),
        ("a.png\0", "null"),
        ("n" * 300, "too long"),
    ],
)
def test_read__says_why_not(reader, uri, reason):
    with pytest.raises(ImageError, match=reason):
        reader.read(uri)
    with pytest.raises(ImageError, match=reason):
        reader.fingerprint(uri)


def test_read__refuses_a_sibling_whose_name_begins_like_the_root(reader, tmp_path):
    (tmp_path / "root-2").mkdir()
    (tmp_path / "root-2" / "b.png").write_bytes(b"x")
    with pytest.raises(ImageError, match="leads out of the root"):
        reader.read("../root-2/b.png")


def test_read__refuses_what_is_no_file_with_content(reader):
    root = reader.root
    os.mkdir(os.path.join(root, "folder.png"))
    open(os.path.join(root, "empty.png"), "wb").close()
    os.mkfifo(os.path.join(root, "pipe.png"))
    for uri, reason in (
        ("folder.png", "is not a file"),
        ("empty.png", r"the file is empty \(0 bytes\)"),
        ("pipe.png", "is not a file"),
    ):
        with pytest.raises(ImageError, match=f"{uri}: {reason}"):
            reader.read(uri)


def test_read__refuses_large_files_before_reading(reader):
    with pytest.raises(ImageError, match="has 7 bytes, more than max_bytes=6"):
        FileReader(reader.root, max_bytes=6).read("a.png")


def test_read__follows_links_out_of_the_root_only_when_it_may(reader):
    os.symlink("../secret.png", os.path.join(reader.root, "link.png"))
    assert reader.read("link.png") == b"outside"
    with pytest.raises(ImageError, match="symbolic link leads out of the root"):
        FileReader(reader.root, follow_links=False).read("link.png")


HARD_NAMES = ("a.png", "", "b.png", "../secret.png", "x/../../secret.png", "x/../a.png", "/etc/group", ".", "./", "..")


@pytest.mark.parametrize("follow_links", [True, False])
@pytest.mark.parametrize("kind", [list, lambda names: np.array(names, object), pd.Series])
def test_fingerprints__are_those_of_each_file_alone(reader, kind, follow_links):
    os.symlink("../secret.png", os.path.join(reader.root, "link.png"))
    names = [*HARD_NAMES, "./a.png", "a.png\0", "n" * 300, os.path.join(reader.root, "a.png"), "link.png", "a..b"]
    os.utime(os.path.join(reader.root, "a.png"), ns=(-5, -5))
    reader = FileReader(reader.root, follow_links=follow_links)
    found, failures = reader.fingerprints(kind(names))
    assert found.shape == (len(names), 4) and found.dtype == np.uint64
    for position, name in enumerate(names):
        try:
            alone = [value % 2**64 for value in reader.fingerprint(name)]
            assert found[position].tolist() == alone and position not in failures
        except ImageError as error:
            assert failures.get(position) == (str(error) if name else None) and not found[position].any()
    assert (len(names) - 2 in failures) != follow_links


def test_fingerprints__of_inodes_with_the_highest_bit(reader, monkeypatch):
    status = SimpleNamespace(st_size=7, st_mtime_ns=1, st_ctime_ns=2, st_ino=2**64 - 2)
    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", lambda path: status)
        found, failures = reader.fingerprints(["a.png"])
    assert found[0, 3] == 2**64 - 2 and not failures
    assert reader.fingerprints([])[0].shape == (0, 4)


def test_walk_files__sorted_without_hidden_ones_and_loops(tmp_path):
    for name in ("b/c.png", "a.png", ".hidden/x.png", "__MACOSX/a.png", "b/.DS_Store"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.symlink("..", tmp_path / "b" / "up")
    assert walk_files(str(tmp_path)) == ["a.png", "b/c.png"]


@pytest.mark.parametrize("backwards", [False, True])
def test_walk_files__does_not_depend_on_the_order_of_the_file_system(tmp_path, monkeypatch, backwards):
    for name in ("tree/m/own.png", "outside/x.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    for link, target in (("a", "m"), ("z", "m"), ("p", "../outside"), ("q", "../outside")):
        os.symlink(target, tmp_path / "tree" / link)
    listed = os.scandir

    def in_order(folder):
        return nullcontext(sorted(listed(folder), key=lambda entry: entry.name, reverse=backwards))

    monkeypatch.setattr(os, "scandir", in_order)
    assert walk_files(str(tmp_path / "tree")) == ["m/own.png", "p/x.png"]


def test_walk_files__a_link_to_itself_is_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "a.png").touch()
    os.symlink("loop.png", tmp_path / "loop.png")
    assert walk_files(str(tmp_path)) == ["a.png", "loop.png"]
    with pytest.raises(ImageError, match=r"loop\.png: Too many levels of symbolic links"):
        FileReader(str(tmp_path)).read("loop.png")


def test_count_suffixes():
    assert count_suffixes(["a.TXT", "b.txt", "c", "d.csv", "e.csv", "f.csv"]) == "3 .csv, 2 .txt, 1 without suffix"
    assert count_suffixes([f"a.{letter}" for letter in "abcdefgh"]).endswith("2 others")


def test_existing_folder__names_what_is_there(tmp_path):
    (tmp_path / "chest").mkdir()
    (tmp_path / "file.txt").touch()
    with pytest.raises(UsageError, match=r"no such folder .*nearest: chest"):
        existing_folder(tmp_path / "chets", "folder:chets")
    with pytest.raises(UsageError, match="is a file"):
        existing_folder(tmp_path / "file.txt", "folder:file.txt")
