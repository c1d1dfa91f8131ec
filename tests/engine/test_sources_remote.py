"""Data anywhere that fsspec opens: memory, archives and a web server of this machine."""

import importlib
import io
import pickle
import socket
import subprocess
import sys
import tarfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from engine import remote_files
from engine.errors import DataError, ImageError, UsageError
from engine.remote_files import join, last_part, local_path, parent
from engine.sources import open_dataset
from engine.sources.files import FileReader
from engine.sources.remote import RemoteReader
from tests.conftest import ROOT
from tests.engine.web_server import web_server


def png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (4, 3), value).save(stream, "PNG")
    return stream.getvalue()


FILES = {
    "Edema/1.png": png(1),
    "Edema/2.png": png(2),
    "No Finding/odd name #1 100%.png": png(3),
    "No Finding/odd name #1 100%.txt": b" Clear.\n",
    ".hidden/x.png": png(4),
    "notes.md": b"-",
}
IDS = ["Edema/1.png", "Edema/2.png", "No Finding/odd name #1 100%.png"]


@pytest.fixture(scope="module")
def web():
    with web_server() as served:
        yield served


@pytest.fixture(params=["memory", "zip", "web"])
def root(request, tmp_path, web):
    """The same files in each place, as the URL of their folder."""
    if request.param == "memory":
        system = fsspec.filesystem("memory")
        system.store.clear()
        for name, content in FILES.items():
            system.pipe_file(f"/data/{name}", content)
        return "memory://data"
    if request.param == "zip":
        with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in FILES.items():
                archive.writestr(f"data/{name}", content)
        return f"zip://data::file://{tmp_path}/x.zip"
    web.files = {f"/data/{name}": content for name, content in FILES.items()}
    web.pages = {
        "/data/": '<a href="../">up</a><a href="/">top</a><a href="?C=N">by name</a><a href="Edema/">E</a>'
        '<a href="No%20Finding/">N</a><a href="notes.md">n</a><a href=".hidden/">h</a>',
        "/data/Edema/": '<a href="/data/">Parent Directory</a><a href="1.png">1</a><a href="2.png">2</a>',
        "/data/No Finding/": "".join(
            f'<a href="odd%20name%20%231%20100%25{suffix}">x</a>' for suffix in (".png", ".txt")
        ),
        "/data/.hidden/": '<a href="x.png">x</a>',
        "/": '<a href="/data/">data</a><a href="/secret/">s</a>',
    }
    web.status, web.etags, web.lengths = {}, True, True
    return f"{web.url}/data"


def test_folder__is_the_same_anywhere(root):
    dataset = open_dataset(f"folder:{root}")
    assert dataset.ids.tolist() == IDS
    assert dataset.label_names == ("Edema", "No Finding") and dataset.labels.tolist() == [[1, 0], [1, 0], [0, 1]]
    assert dataset.samples["text"].tolist() == ["", "", "Clear."]
    assert dataset.notes == ("1 files are no images and were left out: 1 .md",)
    carried = pickle.loads(pickle.dumps(dataset.reader))
    with ThreadPoolExecutor(8) as pool:
        for name, content in zip(IDS * 20, pool.map(carried.read, IDS * 20), strict=True):
            assert content == FILES[name]


def test_reader__says_why_not(root):
    reader = open_dataset(f"folder:{root}").reader
    for uri, reason in (
        ("", "this sample has no image"),
        ("b.png", "^b.png: no such file$"),
        ("../secret.png", "leads out of the root"),
        ("Edema/../../secret.png", "leads out of the root"),
        ("Edema/%2e%2e/%2E%2E/secret.png", "leads out of the root"),
        ("..\\secret.png", "leads out of the root"),
        ("/etc/hostname", "leads out of the root"),
        ("file:///etc/hostname", "leads out of the root"),
        ("x::file:///etc/hostname", "leads out of the root"),
    ):
        with pytest.raises(ImageError, match=reason):
            reader.read(uri)
        with pytest.raises(ImageError, match=reason):
            reader.fingerprint(uri)
    small = RemoteReader(reader.root, max_bytes=10)
    with pytest.raises(ImageError, match=r"Edema/1.png: the file has \d+ bytes, more than max_bytes=10"):
        small.read("Edema/1.png")


def test_fingerprints__are_those_of_each_file_alone_and_change_with_it(root, tmp_path, web):
    reader = open_dataset(f"folder:{root}").reader
    names = [*IDS, "b.png", "", "../x.png"]
    found, failures = reader.fingerprints(names)
    assert sorted(failures) == [3, 5] and not found[3:].any()
    assert found[:3].tolist() == [list(reader.fingerprint(name)) for name in IDS]
    assert found[:3].any(axis=1).all() and len(np.unique(found[:3], axis=0)) == 3
    if root.startswith("memory"):
        fsspec.filesystem("memory").pipe_file("/data/Edema/1.png", FILES["Edema/1.png"][:-1] + b"x")
    elif root.startswith("zip"):
        with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in FILES.items():
                archive.writestr(f"data/{name}", content[:-1] + b"x" if name == "Edema/1.png" else content)
    else:
        web.files["/data/Edema/1.png"] = FILES["Edema/1.png"][:-1] + b"x"
    again, _ = open_dataset(f"folder:{root}").reader.fingerprints(IDS)
    assert (again[0] != found[0]).any()
    if not root.startswith("zip"):
        assert (again[1:] == found[1:3]).all()


def test_table__anywhere_with_its_images_beside_it_or_elsewhere(root, tmp_path, web):
    rows = pd.DataFrame({"image": IDS, "patient_id": ["a", "a", "b"]})
    (tmp_path / "here.csv").write_text(rows.to_csv(index=False))
    dataset = open_dataset(f"table:{tmp_path}/here.csv", root=root)
    assert dataset.groups.tolist() == ["a", "a", "b"]
    assert [dataset.reader.read(uri) for uri in IDS] == [FILES[name] for name in IDS]
    assert open_dataset(f"table:{tmp_path}/here.csv?root={root.replace('&', '%26')}").name == dataset.name
    boxes = "image,label,x,y,width,height\n1,Edema,0,0,2,2\n"
    stored = {"t.csv": rows.to_csv(index=False).encode(), "t.parquet": rows.to_parquet(), "b.csv": boxes.encode()}
    if root.startswith("memory"):
        for name, content in stored.items():
            fsspec.filesystem("memory").pipe_file(f"/data/{name}", content)
    elif root.startswith("zip"):
        with zipfile.ZipFile(tmp_path / "x.zip", "a") as archive:
            for name, content in stored.items():
                archive.writestr(f"data/{name}", content)
    else:
        web.files |= {f"/data/{name}": content for name, content in stored.items()}
    for name in ("t.csv", "t.parquet"):
        dataset = open_dataset(f"table:{join(root, name)}", boxes="b.csv")
        assert dataset.reader.root == root
        assert dataset.reader.read(IDS[2]) == FILES[IDS[2]]
        assert dataset.annotations.sample_ids("Edema") == ["Edema/1.png"]


def test_table__names_what_is_absent(root, tmp_path):
    with pytest.raises(UsageError, match=r"no table .*absent.csv.*: no such file"):
        open_dataset(f"table:{join(root, 'absent.csv')}")
    (tmp_path / "t.csv").write_text("image\nx.png\n")
    with pytest.raises(DataError, match=r"none of 1 images that 't.csv' names is below"):
        open_dataset(f"table:{tmp_path}/t.csv", root=root)


def test_folder__without_images(web, tmp_path, caplog):
    web.pages = {"/empty/": '<a href="a.csv">a</a><a href="deep/">d</a>', "/empty/deep/": "<html></html>"}
    with caplog.at_level("WARNING"), pytest.raises(DataError, match=r"no image below .*it holds 1 .csv files"):
        open_dataset(f"folder:{web.url}/empty")
    assert "/empty/deep/ is listed by the page above it" in caplog.text
    with pytest.raises(UsageError, match=r"cannot list .*no such file"):
        open_dataset(f"folder:{web.url}/absent")
    with pytest.raises(UsageError, match=r"no such file .*absent.zip"):
        open_dataset(f"folder:zip://::file://{tmp_path}/absent.zip")
    (tmp_path / "no.zip").write_bytes(b"PK but no archive")
    with pytest.raises(UsageError, match=r"cannot open .*zip file"):
        open_dataset(f"folder:zip://::file://{tmp_path}/no.zip")


def test_schemas__name_the_package_that_is_missing():
    for scheme in ("s3://bucket/images", "gs://bucket/images"):
        try:
            fsspec.filesystem(scheme.partition(":")[0])
        except ImportError:
            with pytest.raises(UsageError, match=r"cannot open .*nstall.*(s3fs|gcsfs)"):
                open_dataset(f"folder:{scheme}")
    with pytest.raises(UsageError, match="nosuch"):
        open_dataset("folder:nosuch://bucket/images")
    with pytest.raises(UsageError, match="needs a local folder"):
        open_dataset("iu-xray:memory://x")


def test_file_urls_take_the_local_reader(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    dataset = open_dataset(f"folder:file://{tmp_path}")
    assert isinstance(dataset.reader, FileReader) and dataset.reader.root == str(tmp_path)
    (tmp_path / "t.csv").write_text("image\na.png\n")
    assert isinstance(open_dataset(f"table:file://{tmp_path}/t.csv").reader, FileReader)


def test_archives__do_not_lead_out_of_themselves(tmp_path):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        for name in ("../evil.png", "/abs.png", "good.png", "empty.png"):
            archive.writestr(name, b"" if name == "empty.png" else png(1))
    dataset = open_dataset(f"folder:zip://::file://{tmp_path}/evil.zip")
    outcomes = {}
    for uri in dataset.samples["uri"]:
        try:
            outcomes[uri] = dataset.reader.read(uri)
        except ImageError as error:
            outcomes[uri] = str(error)
    assert outcomes["good.png"] == png(1)
    assert "leads out of the root" in outcomes["../evil.png"]
    assert outcomes["empty.png"] == "empty.png: the file is empty (0 bytes)"


@pytest.fixture
def hasty(monkeypatch):
    """Threads take turns so often that what can happen between two steps does happen."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def write_archive(path, files: dict[str, bytes]) -> str:
    """Write a .zip or .tar; return the URL of its inside."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(path, "w") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return f"{path.suffix[1:]}://::file://{path}"


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_archives__many_threads_at_once_each_get_their_own_files(tmp_path, hasty, kind):
    rng = np.random.default_rng(0)
    files = {f"a/{number:03d}.png": rng.bytes(20_000) for number in range(150)}
    dataset = open_dataset(f"folder:{write_archive(tmp_path / f'x.{kind}', files)}")
    names = [str(uri) for uri in dataset.samples["uri"]] * 6
    with ThreadPoolExecutor(8) as pool:
        wrong = [name for name, read in zip(names, pool.map(dataset.reader.read, names), strict=True)
                 if read != files[name]]  # fmt: skip
    assert sorted(set(names)) == sorted(files) and not wrong


def test_archives__a_thread_never_sees_half_a_table_of_contents(tmp_path, monkeypatch):
    url = write_archive(tmp_path / "x.zip", {"1.png": b"x", "2.png": b"yy"})
    halfway, asked = threading.Event(), threading.Event()
    members_of = zipfile.ZipFile.infolist

    def slowly(archive):
        first, second = members_of(archive)
        yield first
        halfway.set()
        asked.wait(0.5)
        yield second

    monkeypatch.setattr(zipfile.ZipFile, "infolist", slowly)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(remote_files.info, url, "2.png")
        halfway.wait(10)
        assert remote_files.info(url, "2.png").size == 2
        asked.set()
        assert other.result().size == 2


@pytest.mark.parametrize("protocol", ["libarchive", "ftp", "sftp"])
def test_one_connection__is_asked_by_one_thread_at_a_time(monkeypatch, protocol):
    asking, overlapped = [], []

    class OneConnection(fsspec.AbstractFileSystem):
        def cat_file(self, path, start=None, end=None, **options):
            overlapped.append(bool(asking))
            asking.append(path)
            threading.Event().wait(0.001)
            asking.remove(path)
            return path.encode()

        def info(self, path, **options):
            return {"name": path, "size": len(self.cat_file(path)), "type": "file"}

    OneConnection.protocol = protocol
    monkeypatch.setitem(importlib.import_module("fsspec.registry")._registry, protocol, OneConnection)
    reader = RemoteReader(f"{protocol}://host")
    remote_files.forget_filesystems()
    remote_files.filesystem(reader.root)
    names = [f"{number:02d}.png" for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        for name, read in zip(names, pool.map(reader.read, names), strict=True):
            assert read.endswith(name.encode())
    assert len(overlapped) >= 80 and not any(overlapped)


def test_web__size_is_checked_where_the_server_does_not_tell_it(web):
    web.files, web.lengths, web.etags, web.status = {"/big.png": bytes(3_000_000)}, False, False, {}
    reader = RemoteReader(web.url, max_bytes=1000)
    with pytest.raises(ImageError, match="more than max_bytes=1000"):
        reader.read("big.png")
    assert RemoteReader(web.url).read("big.png") == bytes(3_000_000)
    assert reader.fingerprint("big.png") is None
    found, failures = reader.fingerprints(["big.png"])
    assert not found.any() and not failures
    web.lengths = True


def test_web__a_busy_server_is_asked_again_and_an_angry_one_is_a_failure(web, monkeypatch):
    monkeypatch.setattr(remote_files, "PATIENCE", (0.01, 0.01))
    web.files, web.etags, web.lengths = {"/a.png": png(1)}, True, True
    reader = RemoteReader(web.url)
    web.status = {"/a.png": [200, 503]}
    assert reader.read("a.png") == png(1)
    web.status = {"/a.png": [403] * 9}
    with pytest.raises(ImageError, match=r"a\.png: the server answered 403"):
        reader.read("a.png")


def test_web__a_server_that_is_not_there_ends_the_job(monkeypatch):
    monkeypatch.setattr(remote_files, "PATIENCE", (0.01, 0.01))
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        reader = RemoteReader(f"http://127.0.0.1:{held.getsockname()[1]}")
        for look in (reader.read, reader.fingerprint, lambda uri: reader.fingerprints([uri])):
            with pytest.raises(DataError, match=r"cannot be reached: .*begin again") as caught:
                look("a.png")
            assert not isinstance(caught.value, ImageError)


def test_no_network_library_is_loaded_for_local_data(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "t.csv").write_text("image\na.png\n")
    question = (
        "import sys\nfrom engine.sources import open_dataset\n"
        f"for schema in ('folder:{tmp_path}', 'table:{tmp_path}/t.csv'):\n"
        "    dataset = open_dataset(schema); dataset.reader.read('a.png')\n"
        "print([name for name in ('fsspec', 'aiohttp', 'requests', 'urllib3') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert ran.stdout.strip() == "[]", ran.stderr


def test_parts_of_urls():
    assert join("http://h/a b", "c d#.png") == "http://h/a b/c%20d%23.png"
    assert join("memory://", "x.csv") == "memory://x.csv"
    assert join("zip://in/::file:///x.zip", "t.csv") == "zip://in/t.csv::file:///x.zip"
    assert parent("http://h/a/t.csv?sig=1") == "http://h/a" and parent("zip://t.csv::file:///x") == "zip://::file:///x"
    assert last_part("http://h/t.csv?a=b/c") == "t.csv" and last_part("zip://a/t.csv::file:///x.zip") == "t.csv"
    assert last_part("/data/odd?name.csv") == "odd?name.csv"
    assert local_path("file:///x/y") == "/x/y" and local_path("zip://a::file:///x") == "zip://a::file:///x"


@pytest.mark.parametrize(
    ("when", "seconds"),
    [
        (1.5, 1.5),
        ((2020, 1, 2, 3, 4, 6), None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 1445412480),
        ("2015-10-21T07:28:00+00:00", 1445412480),
        ("soon", 0),
        ((2020, 13, 2, 3, 4, 6), 0),
    ],
)
def test_times_in_any_form(when, seconds):
    found = remote_files._nanoseconds(when)
    assert found > 0 if seconds is None else found == int(seconds * 1e9)
