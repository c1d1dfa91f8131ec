"""Tars of samples: what tarfile and webdataset's rules say of them, hostile ones, many, remote, and read by threads."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import re
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from engine.errors import DataError, ImageError, UsageError
from engine.pixels import decode
from engine.sources import open_dataset
from engine.sources.patterns import expand_braces
from engine.sources.tar import key_and_extension
from engine.sources.tar_index import Window, members_of
from engine.sources.tar_reader import TarReader
from tests.engine.web_server import web_server


def jpeg(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 12), (value % 256, 30, 200)).save(stream, "JPEG")
    return stream.getvalue()


def write_tar(path, members, kind=tarfile.PAX_FORMAT, mode="w"):
    """Write members: (name, content) or (TarInfo, content)."""
    with tarfile.open(path, mode, format=kind) as archive:
        for name, content in members:
            entry = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            entry.size = len(content) if entry.isreg() else 0
            archive.addfile(entry, io.BytesIO(content))
    return path


def sample(number: int, **metadata) -> list:
    key = f"{number:04d}"
    told = {"patient_id": f"p{number // 2}", "width": 16, "ok": True, "tags": ["a", "b"], "deep": {"x": 1}, "no": None}
    return [
        (f"{key}.jpg", jpeg(number)),
        (f"{key}.txt", f"text {number}\n".encode()),
        (f"{key}.json", json.dumps({**told, **metadata}).encode()),
        (f"{key}.cls", str(number % 3).encode()),
    ]


def test_samples_are_what_shares_a_name(tmp_path):
    members = [member for number in range(4) for member in sample(number)]
    path = write_tar(tmp_path / "a.tar", [*members, ("0001.npy", b"x"), ("readme", b"x"), ("__meta__.json", b"{}")])
    dataset = open_dataset(f"tar:{path}")
    assert dataset.ids.tolist() == ["0000", "0001", "0002", "0003"]
    assert dataset.samples["text"].tolist() == [f"text {number}" for number in range(4)]
    assert dataset.groups.tolist() == ["p0", "p0", "p1", "p1"]
    assert dataset.label_names == ("0", "1", "2") and dataset.labels.argmax(axis=1).tolist() == [0, 1, 2, 0]
    assert dataset.labels.sum(axis=1).tolist() == [1] * 4
    expected = {"width": "16", "ok": "true", "tags": "a;b", "deep": '{"x": 1}', "no": "", "shard": "a.tar"}
    assert {name: dataset.samples[name].iloc[0] for name in expected} == expected
    assert "object" not in {str(dtype) for dtype in dataset.samples.dtypes}
    assert "3 members are nothing that is read here and were left out" in dataset.notes[0]
    for number, uri in enumerate(dataset.samples["uri"]):
        assert dataset.reader.read(uri) == jpeg(number)
    carried = pickle.loads(pickle.dumps(dataset.reader))
    uris = dataset.samples["uri"].tolist() * 50
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(carried.read, uris)) == [jpeg(number) for number in range(4)] * 50


def test_members_are_read_one_by_one_and_nothing_else(tmp_path, monkeypatch):
    big = [(f"{number}.jpg", jpeg(number) + bytes(500_000)) for number in range(20)]
    path = write_tar(tmp_path / "a.tar", big)
    reads = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: reads.append((at, size)) or real(file, size, at))
    dataset = open_dataset(f"tar:{path}")
    assert sum(size for _, size in reads) < 100_000 and os.path.getsize(path) > 10_000_000
    reads.clear()
    with tarfile.open(path) as archive:
        entry = archive.getmember("7.jpg")
    assert dataset.reader.read(dataset.samples["uri"].iloc[7]) == big[7][1]
    assert reads == [(entry.offset_data, entry.size)]


LONG = "f/" * 90 + "n" * 90


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members__are_those_that_tarfile_finds(tmp_path, kind):
    rng = np.random.default_rng(0)
    names = ["a.jpg", "./b/c.d.png", "e" * 98 + ".x", "f" * 100, "g/" * 60 + "h.jpg", "äöü ☃.jpg", "with:colon@1+2.jpg"]
    names += [] if kind == tarfile.USTAR_FORMAT else [LONG, "☃" * 60]
    members = []
    for name in names:
        entry = tarfile.TarInfo(name)
        entry.mtime = 1.5 if kind == tarfile.PAX_FORMAT else 1
        members.append((entry, rng.bytes(int(rng.integers(0, 2000)))))
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    path = write_tar(tmp_path / "a.tar", [*members, (folder, b"")], kind)
    content = path.read_bytes()
    window = Window(lambda start, end: content[start:end], len(content), 700)
    with tarfile.open(path) as archive:
        expected = [(entry.name, entry.offset_data, entry.size, "") for entry in archive if entry.isreg()]
    assert [tuple(member) for member in members_of(window, "a.tar")] == expected


def test_members__of_tars_that_were_joined(tmp_path):
    one = write_tar(tmp_path / "1.tar", sample(1)).read_bytes()
    two = write_tar(tmp_path / "2.tar", sample(2)).read_bytes()
    (tmp_path / "both.tar").write_bytes(one + two)
    dataset = open_dataset(f"tar:{tmp_path}/both.tar")
    assert dataset.ids.tolist() == ["0001", "0002"]
    assert dataset.reader.read(dataset.samples["uri"].iloc[1]) == jpeg(2)


def test_members__without_an_end_mark(tmp_path):
    content = write_tar(tmp_path / "a.tar", sample(1)).read_bytes().rstrip(b"\0")
    (tmp_path / "b.tar").write_bytes(content + bytes(-len(content) % 512))
    assert len(open_dataset(f"tar:{tmp_path}/b.tar")) == 1


def test_members__above_8_gib_in_gnu_and_pax_form(tmp_path):
    size = 9 * 2**30
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        entry = tarfile.TarInfo("big.jpg")
        entry.size = size
        header = entry.tobuf(kind)
        small = tarfile.TarInfo("a.jpg")
        small.size = 3
        tail = small.tobuf(kind) + b"abc"
        with open(tmp_path / "big.tar", "wb") as file:  # a hole stands for the content
            file.write(header)
            file.seek(size, os.SEEK_CUR)
            file.write(tail + bytes(512 - 3 + 1024))
        dataset = open_dataset(f"tar:{tmp_path}/big.tar")
        uris = dict(zip(dataset.ids, dataset.samples["uri"], strict=True))
        assert dataset.reader.read(uris["a"]) == b"abc"
        with pytest.raises(ImageError, match=f"has {size} bytes, more than max_bytes"):
            dataset.reader.read(uris["big"])


@pytest.mark.parametrize(
    "name", ["a.jpg", "x/a.b.c", "x.y/a.JPG", "a", ".hidden", "x.y/.hidden", "a.", "x.y/z", "a..b", "x/y.left.png"]
)
def test_keys__by_webdatasets_rule(name):
    found = re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", name)  # webdataset.tariterators.base_plus_ext
    expected = (found[1], found[2].lower()) if found and found[2] else ("", "")
    assert key_and_extension(name) == expected


def test_several_tars_by_ranges_lists_globs_and_folders(tmp_path):
    for number in range(12):
        write_tar(tmp_path / f"s-{number:03d}.tar", sample(number))
    expected = [f"{number:04d}" for number in range(12)]
    for pattern in (
        "s-{000..011}.tar",
        "s-*.tar",
        "",
        "s-{000..005}.tar,{tmp}/s-{006..011}.tar",
        "s-00{0..9}.tar,{tmp}/s-01{0,1}.tar",
    ):
        pattern = pattern.replace("{tmp}", str(tmp_path))
        assert open_dataset(f"tar:{tmp_path}/{pattern}").ids.tolist() == expected
    assert expand_braces("{9..11}") == ["9", "10", "11"] and expand_braces("{2..0}x") == ["2x", "1x", "0x"]
    assert expand_braces("{a,b}{1..2}") == ["a1", "a2", "b1", "b2"]
    for pattern, message in (
        ("s-{010..013}.tar", r"2 of 4 files of .* are absent, first .*s-012.tar"),
        ("t-*.tar", "no file matches"),
        ("s-{000}.tar", "is no range; write"),
        ("s-{0..99999999}.tar", "longer than 1,000,000"),
        ("s-{000..001}.tar,{tmp}/s-001.tar", "names .*s-001.tar' more than once"),
    ):
        with pytest.raises(UsageError, match=message):
            open_dataset(f"tar:{tmp_path}/{pattern.replace('{tmp}', str(tmp_path))}")


def test_ids__are_unique_across_tars_of_the_same_keys(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    write_tar(tmp_path / "x" / "a.tar", sample(1))
    write_tar(tmp_path / "y" / "a.tar", [*sample(2), *[("0001.jpg", jpeg(9))]])
    dataset = open_dataset(f"tar:{tmp_path}/{{x,y}}/a.tar")
    assert dataset.ids.tolist() == ["x/a.tar:0001", "y/a.tar:0002", "y/a.tar:0001"]
    assert [dataset.reader.read(uri) for uri in dataset.samples["uri"]] == [jpeg(1), jpeg(2), jpeg(9)]
    assert dataset.samples["text"].tolist() == ["text 1", "text 2", ""]


def test_images__further_ones_and_later_ones_are_told(tmp_path):
    members = [("a.left.png", b"l"), ("a.right.png", b"r"), ("b.left.png", b"1"), ("b.left.png", b"2")]
    path = write_tar(tmp_path / "a.tar", members)
    dataset = open_dataset(f"tar:{path}")
    assert [dataset.reader.read(uri) for uri in dataset.samples["uri"]] == [b"l", b"2"]
    assert dataset.notes[:2] == (
        "1 images are further ones of their sample and were left out; choose one with image=EXTENSION",
        "1 images occur more than once in their tar; the last one is taken",
    )
    dataset = open_dataset(f"tar:{path}?image=right.png")
    assert dataset.ids.tolist() == ["a"] and dataset.reader.read(dataset.samples["uri"].iloc[0]) == b"r"


def test_columns_are_mapped(tmp_path):
    members = [
        member
        for number in range(4)
        for member in sample(
            number, part=["train", "test"][number // 2], findings=["Edema", "Mass;Edema", "", "Mass"][number]
        )
    ]
    path = write_tar(tmp_path / "a.tar", members)
    dataset = open_dataset(
        f"tar:{path}", split="part", labels="findings", text=["txt", "findings"], fields="findings,part"
    )
    assert dataset.samples["split"].tolist() == ["train", "train", "test", "test"]
    assert dataset.label_names == ("Edema", "Mass") and dataset.labels.tolist() == [[1, 0], [1, 1], [0, 0], [0, 1]]
    assert dataset.samples["text"].tolist() == ["text 0 Edema", "text 1 Mass;Edema", "text 2", "text 3 Mass"]
    assert "width" not in dataset.samples
    assert open_dataset(f"tar:{path}?fields=&keep=cls:0").ids.tolist() == ["0000", "0003"]
    assert open_dataset(f"tar:{path}?label_names=no,edema,mass").label_names == ("no", "edema", "mass")
    for options, message in (
        ({"split": "findings"}, r"a.tar, sample '0000', column 'findings': unknown split 'Edema'"),
        ({"label_names": "no,edema"}, r"a.tar, sample '0002': unknown class '2' in its .cls"),
        ({"labels": "finding"}, "nearest: findings"),
        ({"labels": "findings", "label_names": "Mass"}, "sample '0000', column 'findings': unknown label 'Edema'"),
    ):
        with pytest.raises(DataError, match=message):
            open_dataset(f"tar:{path}", **options)


def test_classes__as_words(tmp_path):
    path = write_tar(
        tmp_path / "a.tar", [("1.jpg", b"x"), ("1.cls", b"dog"), ("2.jpg", b"x"), ("2.cls", b"cat\n"), ("3.jpg", b"x")]
    )
    dataset = open_dataset(f"tar:{path}")
    assert dataset.label_names == ("cat", "dog") and dataset.labels.tolist() == [[0, 1], [1, 0], [0, 0]]


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


def test_hostile__what_is_no_plain_file_is_a_failure_with_its_reason(tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("good.jpg", jpeg(1)),
            (special("soft.jpg", tarfile.SYMTYPE, "/etc/passwd"), b""),
            (special("hard.jpg", tarfile.LNKTYPE, "good.jpg"), b""),
            (special("device.jpg", tarfile.CHRTYPE), b""),
            (special("pipe.jpg", tarfile.FIFOTYPE), b""),
            ("../../climbs.jpg", b"x"),
            ("/etc/absolute.jpg", jpeg(2)),
            ("empty.jpg", b""),
        ],
    )
    dataset = open_dataset(f"tar:{path}")
    assert len(dataset) == 8
    outcomes = {}
    for name, uri in zip(dataset.ids, dataset.samples["uri"], strict=True):
        try:
            outcomes[name] = dataset.reader.read(uri)
        except ImageError as error:
            outcomes[name] = str(error)
    assert outcomes["good"] == jpeg(1) and outcomes["/etc/absolute"] == jpeg(2)
    for name, reason in (
        ("soft", "is a symbolic link; only plain files"),
        ("hard", "is a hard link"),
        ("device", "is a device"),
        ("pipe", "is a named pipe"),
        ("../../climbs", "whose name leads out of the tar"),
        ("empty", "is empty"),
    ):
        assert reason in outcomes[name]
    _, failures = dataset.reader.fingerprints(dataset.samples["uri"].tolist())
    assert {dataset.ids[position] for position in failures} == {"soft", "hard", "device", "pipe", "../../climbs"}


def test_hostile__sparse_files_are_failures_and_what_follows_is_read(tmp_path):
    with open(tmp_path / "hole.jpg", "wb") as file:
        file.seek(10_000_000)
        file.write(b"end")
    header = bytearray(special("hole.jpg", b"S").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"%011o\0" % 3
    header[482] = 1
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    after = write_tar(tmp_path / "after.tar", [("a.jpg", b"abc")]).read_bytes()
    (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(512) + b"end" + bytes(509) + after)
    dataset = open_dataset(f"tar:{tmp_path}/a.tar")
    assert dataset.ids.tolist() == ["hole", "a"]
    assert dataset.reader.read(dataset.samples["uri"].iloc[1]) == b"abc"
    with pytest.raises(ImageError, match="is a sparse file"):
        dataset.reader.read(dataset.samples["uri"].iloc[0])


def damaged(content: bytes, case: str) -> bytes:
    header = bytearray(content)

    def signed(start: int = 0) -> bytes:
        header[start + 148 : start + 156] = b"        "
        header[start + 148 : start + 156] = b"%06o\0 " % sum(header[start : start + 512])
        return bytes(header)

    if case == "lying size":
        header[124:136] = b"77777777777\0"
        return signed()
    if case == "negative size":
        header[124:136] = b"\xff" * 12
        return signed()
    if case == "huge size":
        header[124:136] = b"\x80" + b"\xff" * 11
        return signed()
    if case == "no number":
        header[124:136] = b"12x456789ab\0"
        return signed()
    if case == "huge record":
        header[156:157] = b"x"
        header[124:136] = b"%011o\0" % 2_000_000
        return signed() + bytes(3_000_000)
    if case == "broken record":
        header[156:157] = b"x"
        return signed()
    if case == "flipped header":
        header[3] ^= 1
        return bytes(header)
    if case == "junk behind":
        return content + b"junk" * 300
    return {
        "cut in content": content[:700],
        "cut in header": content[:300],
        "cut in a later header": content[: 1536 + 100],
        "empty": b"",
        "no tar": b"\x89PNG" * 1000,
        "gzip": gzip.compress(content),
        "bzip2": bz2.compress(content),
        "xz": lzma.compress(content),
    }[case]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("lying size", r"the member '0001.jpg' claims 8,589,934,591 bytes .* but the tar ends at"),
        ("negative size", "a size that is no number"),
        ("huge size", "claims 309,485,009,821,345,068,724,781,055 bytes"),
        ("no number", "a size that is no number"),
        ("huge record", "a name or record of 2,000,000 bytes"),
        ("broken record", "a pax record at byte 512 cannot be read"),
        ("flipped header", "no tar header at byte 0"),
        ("junk behind", "no tar header at byte .*damaged; copy it again, or leave it out"),
        ("cut in content", "it is cut off or its header lies"),
        ("cut in header", "is no tar: it has 300 bytes"),
        ("cut in a later header", "cut off in the header at byte 1,536"),
        ("empty", "is no tar: it has 0 bytes"),
        ("no tar", "no tar header at byte 0"),
        ("gzip", r"is compressed \(gzip\).*unpack it first \(gunzip -k"),
        ("bzip2", r"is compressed \(bzip2\)"),
        ("xz", r"is compressed \(xz\)"),
    ],
)
def test_hostile__damage_is_an_error_that_names_the_place(tmp_path, case, message):
    content = write_tar(tmp_path / "good.tar", sample(1)).read_bytes()
    (tmp_path / "bad.tar").write_bytes(damaged(content, case))
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(f"tar:{tmp_path}/bad.tar")
    assert "bad.tar" in str(caught.value)


def test_hostile__random_damage_is_an_error_or_leaves_members_inside_the_tar(tmp_path):
    content = np.frombuffer(
        write_tar(tmp_path / "a.tar", [m for n in range(3) for m in sample(n)]).read_bytes(), np.uint8
    )
    rng = np.random.default_rng(2)
    start = time.process_time()
    for _ in range(400):
        hurt = content.copy()
        hurt[rng.integers(0, len(hurt), 4)] = rng.integers(0, 256, 4)
        block = int(rng.integers(0, len(hurt) // 512)) * 512
        if rng.random() < 0.5:  # a header that was written so, with its own checksum
            hurt[block + rng.integers(0, 512)] = rng.integers(0, 256)
            hurt[block + 148 : block + 156] = 32
            hurt[block + 148 : block + 156] = np.frombuffer(b"%06o\0 " % int(hurt[block : block + 512].sum()), np.uint8)
        raw = hurt[: int(rng.integers(0, len(hurt)))].tobytes() if rng.random() < 0.3 else hurt.tobytes()
        window = Window(lambda start, end, raw=raw: raw[start:end], len(raw), 512)
        try:
            for member in members_of(window, "a.tar"):
                assert 0 <= member.offset <= member.offset + member.size <= len(raw) or member.kind
        except DataError as error:
            assert str(error).startswith("a.tar: ")
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (("1.json", b"[1]"), r"'1.json' in .*a.tar' must map fields"),
        (("1.json", b"{"), r"'1.json' in .*is not JSON"),
        (("1.json", b'{"caption": "half a pair: \\ud83d"}'), r"'1.json' in .*surrogates not allowed"),
        (("1.json", b"[" * 100_000), r"is not JSON|must map"),
        (("1.txt", b"\xff\xfe"), r"text file '1.txt' in .*save it as UTF-8"),
        (("1.txt", b"x" * 2_000_000), r"is longer than"),
        (("1.npy", b"x"), r"no image in 1 tars; they hold 1 .npy"),
    ],
)
def test_texts_and_metadata_that_cannot_be_read(tmp_path, member, message):
    path = write_tar(tmp_path / "a.tar", [member])
    with pytest.raises(DataError, match=message):
        open_dataset(f"tar:{path}")


def test_fingerprints__change_with_the_tar_and_places_of_another_tar_are_not_read(tmp_path):
    write_tar(tmp_path / "a.tar", sample(1))
    write_tar(tmp_path / "b.tar", sample(2))
    dataset = open_dataset(f"tar:{tmp_path}/{{a,b}}.tar")
    uris = dataset.samples["uri"].tolist()
    found, failures = dataset.reader.fingerprints([*uris, "", "c.tar:x@1+2", "x"])
    assert sorted(failures) == [3, 4] and not found[2:].any()
    for uri, told, name in zip(uris, found, ("a.tar", "b.tar"), strict=False):
        status = os.stat(tmp_path / name)
        expected = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        assert tuple(told) == expected == tuple(dataset.reader.fingerprint(uri))
    time.sleep(0.01)
    write_tar(tmp_path / "a.tar", sample(5))
    again, _ = dataset.reader.fingerprints(uris)
    assert (again[0] != found[0]).any() and (again[1] == found[1]).all()
    with pytest.raises(ImageError, match=r"a.tar changed since it was opened; open the data set again"):
        dataset.reader.read(uris[0])
    os.remove(tmp_path / "a.tar")
    with pytest.raises(ImageError, match="No such file"):
        dataset.reader.read(uris[0])


def test_reader__refuses_places_outside_its_tars(tmp_path):
    path = write_tar(tmp_path / "a.tar", sample(1))
    reader = open_dataset(f"tar:{path}", max_bytes=100).reader
    for uri, message in (
        ("", "has no image"),
        ("../b.tar:x@0+10", "is no member of these tars"),
        ("a.tar:x@-5+10", "is no member of these tars"),
        ("a.tar:x@0+101", "has 101 bytes, more than max_bytes=100"),
        ("a.tar:x@99999999+10", "gave 0 of 10 bytes"),
    ):
        with pytest.raises(ImageError, match=message):
            reader.read(uri)


def test_remote_tars__by_ranges(tmp_path):
    big = [(f"{number}.jpg", jpeg(number) + bytes(3_000_000)) for number in range(6)]
    with web_server() as web:
        web.files["/s-000.tar"] = write_tar(tmp_path / "a.tar", big).read_bytes()
        web.files["/s-001.tar"] = write_tar(
            tmp_path / "b.tar", [(f"9{name}", content) for name, content in big]
        ).read_bytes()
        dataset = open_dataset(f"tar:{web.url}/s-{{000..001}}.tar")
        assert dataset.ids.tolist() == [*"012345", *(f"9{number}" for number in range(6))]
        assert web.bytes_sent() < 0.6 * sum(map(len, web.files.values()))
        web.asked.clear()
        assert dataset.reader.read(dataset.samples["uri"].iloc[3]) == big[3][1]
        assert [kind for kind, _, _ in web.asked].count("GET") == 1
        assert web.bytes_sent() == len(big[3][1])
        found, failures = dataset.reader.fingerprints(dataset.samples["uri"].tolist())
        assert not failures and len(np.unique(found, axis=0)) == 2
        web.files["/s-000.tar"] = web.files["/s-000.tar"].replace(bytes(1000), b"x" * 1000, 1)
        reopened = open_dataset(f"tar:{web.url}/s-000.tar")
        assert (reopened.reader.fingerprints(reopened.samples["uri"].tolist())[0][0] != found[0]).any()
        with pytest.raises(ImageError, match="changed since it was opened"):
            dataset.reader.read(dataset.samples["uri"].iloc[0])
        with pytest.raises(DataError, match=r"cannot open the tar .*absent.tar': no such file"):
            open_dataset(f"tar:{web.url}/absent.tar")


def test_remote_tars__in_memory_and_by_star(tmp_path):
    import fsspec

    system = fsspec.filesystem("memory")
    system.store.clear()
    for number in range(3):
        system.pipe_file(f"/t/s{number}.tar", write_tar(tmp_path / "a.tar", sample(number)).read_bytes())
    dataset = open_dataset("tar:memory://t/s*.tar")
    assert dataset.ids.tolist() == ["0000", "0001", "0002"]
    assert decode(dataset.reader.read(dataset.samples["uri"].iloc[2])).size == (16, 12)
    assert isinstance(dataset.reader, TarReader)


def test_many_samples_are_opened_quickly_and_hold_no_objects(tmp_path):
    count = 20_000
    path = write_tar(
        tmp_path / "a.tar", [(f"{number:06d}.{kind}", b"x" * 40) for number in range(count) for kind in ("jpg", "txt")]
    )
    start = time.process_time()
    dataset = open_dataset(f"tar:{path}")
    assert len(dataset) == count and time.process_time() - start < 4
    assert "object" not in {str(dtype) for dtype in dataset.samples.dtypes}
    assert len(pickle.dumps(dataset.reader)) < 1000
