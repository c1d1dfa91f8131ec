"""Promise: a broken image ends in a reason, never in a crash, a hang, a lie about its pixels or a zero vector.

Thousands of PNG, JPEG, DICOM and other files are flipped, cut, spliced and made to lie (`tests.reliability.mutants`),
and go through decoding and scaling in processes with limits on memory and time, beside Pillow itself. Some more go
through `Cache.embed` as a folder of images.
"""

from __future__ import annotations

import io
import json
import os
import queue
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.cache import Cache
from engine.errors import ImageError
from engine.pixels import decode
from tests.conftest import ROOT
from tests.engine.fakes import FakeEncoder, folder_dataset
from tests.reliability.mutants import SHARES, bombs, good_files, mutant

# So long a file may take before its process is ended, and so long of a processor's time: generous, for busy machines.
PATIENCE = 60.0
CPU_SECONDS = 3.0
MOST_GROWTH = 200 << 20
EXHAUSTED = re.compile("MemoryError|(not enough|out of|cannot allocate) memory", re.IGNORECASE)
# Why a file that Pillow reads may be refused here; anything else would be a file lost.
OWN_REASONS = (
    "exceeds the limit",
    "floating-point samples",
    "full range is not known",
    "which no program writes",
    "more than it may have itself",
    "has no palette",
)


def decode_all(files: Sequence[str]) -> list[dict[str, Any]]:
    """Return the outcome of each file; one that ends its process is a "crash", one that takes too long a "hang"."""
    outcomes: list[dict[str, Any]] = []
    while len(outcomes) < len(files):
        outcomes += _decode_some(files[len(outcomes) :])
    return outcomes


def _decode_some(files: Sequence[str]) -> list[dict[str, Any]]:
    """Return outcomes up to the first crash or hang."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    worker = subprocess.Popen(
        [sys.executable, "-m", "tests.reliability.decoding_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert worker.stdin is not None and worker.stdout is not None
    lines: queue.Queue[str] = queue.Queue()
    output = worker.stdout

    def listen() -> None:
        for line in output:
            lines.put(line)
        lines.put("")

    threading.Thread(target=listen, daemon=True).start()
    threading.Thread(target=_tell, args=(worker.stdin, files), daemon=True).start()
    outcomes: list[dict[str, Any]] = []
    try:
        while len(outcomes) < len(files):
            line = lines.get(timeout=PATIENCE)
            if not line:
                outcomes.append({"file": files[len(outcomes)], "outcome": "crash", "reason": f"status {worker.wait()}"})
                break
            outcomes.append(json.loads(line))
    except queue.Empty:
        outcomes.append({"file": files[len(outcomes)], "outcome": "hang", "reason": f"more than {PATIENCE} s"})
    finally:
        worker.kill()
        worker.wait()
    return outcomes


def _tell(stdin: Any, files: Sequence[str]) -> None:
    try:
        stdin.write("\n".join(files) + "\n")
        stdin.close()
    except (BrokenPipeError, ValueError):
        pass  # the worker is gone, which its outcome says


def check(outcomes: Sequence[dict[str, Any]]) -> None:
    """Hold outcomes against the promise."""
    assert not [told for told in outcomes if told["outcome"] not in ("image", "refused")]
    assert not [told for told in outcomes if told["outcome"] == "refused" and not told["reason"]]
    assert not [told for told in outcomes if EXHAUSTED.search(told["reason"])]
    assert not [told for told in outcomes if told["seconds"] > CPU_SECONDS]
    assert not [told for told in outcomes if told["grown"] > MOST_GROWTH]
    assert not [told for told in outcomes if told["pillow"] == "other pixels"]
    assert not [told for told in outcomes if told["outcome"] == "image" and told["pillow"] == "refuses"]
    lost = [told for told in outcomes if told["outcome"] == "refused" and told["pillow"] == "reads"]
    assert not [told for told in lost if not any(reason in told["reason"] for reason in OWN_REASONS)]


def check_mutants(count: int) -> None:
    """Decode that many mutants, and see that they are what this test is about."""
    outcomes = decode_all([f"mutant {number}" for number in range(count)])
    check(outcomes)
    seen = Counter((mutant(number).story.split()[0], told["outcome"]) for number, told in enumerate(outcomes))
    for form in ("PNG", "JPEG", "DICOM"):
        assert seen[form, "refused"] > 0.05 * SHARES[form] * count
        assert seen[form, "image"] > 0.02 * SHARES[form] * count
    same = sum(told["pillow"] == "same" for told in outcomes)
    assert same > count // 20


def test_a_thousand_broken_files_end_in_a_reason_or_in_pillows_pixels():
    check_mutants(1_000)


@pytest.mark.slow
def test_twelve_thousand_broken_files_end_in_a_reason_or_in_pillows_pixels():
    check_mutants(12_000)


def test_small_files_that_ask_for_much_are_refused_in_little_time_and_memory():
    names = list(bombs())
    outcomes = decode_all([f"bomb {name}" for name in names])
    check(outcomes)
    read = [name for name, told in zip(names, outcomes, strict=True) if told["outcome"] == "image"]
    # Only what asks for nothing once it is looked at: pixels and chunks beyond those that the header says, and a tile
    # that is larger than its image.
    assert read == [
        "PNG whose pixels go on",
        "PNG with 100,000 empty chunks",
        "JPEG with 20 MB of application data",
        "PGM of 12 bits",
        "JPEG 2000 of a tile of 2 billion",
        "DICOM of 100,000 private elements",
    ]


def test_unbroken_files_are_no_bombs():
    for files in good_files().values():
        for content in files:
            assert decode(content, max_pixels=4_000_000).mode in ("L", "RGB")


def test_a_folder_of_broken_and_whole_files_is_embedded_but_for_those_that_are_listed(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    reasons, whole = {}, {}
    contents = [mutant(number).content for number in range(50_000, 50_300)]
    contents += [content for files in good_files().values() for content in files]
    for number, content in enumerate(contents):
        (folder / f"{number:04d}.png").write_bytes(content)
        try:
            whole[f"{number:04d}.png"] = decode(content)
        except ImageError as error:
            reasons[f"{number:04d}.png"] = str(error)
    assert len(reasons) > 100 and len(whole) > 80

    dataset, encoder, cache = folder_dataset(folder), FakeEncoder(), Cache(tmp_path / "cache")
    report = cache.embed(dataset, encoder, what=["image"], batch_size=16)
    listed = dict(zip(report.failures["uri"], report.failures["reason"], strict=True))
    assert listed == reasons
    features = cache.features(dataset, encoder)
    embedded = [dataset.samples["uri"].iloc[row] for row in features.rows]
    assert embedded == list(whole)
    for uri, row in zip(embedded, features.values, strict=True):
        pixels, _ = encoder.preprocess(whole[uri])
        expected = encoder.encode_pixels(pixels[None])[0].astype(np.float16)
        np.testing.assert_array_equal(row, expected.astype(row.dtype), err_msg=uri)
        assert row.any() == pixels.any(), f"{uri} became a zero vector"

    again = cache.embed(dataset, encoder, what=["image"], batch_size=16)
    assert again.computed == {"image": 0}
    assert dict(zip(again.failures["uri"], again.failures["reason"], strict=True)) == reasons


def test_mutants_are_the_same_files_every_time():
    assert mutant(7) == mutant(7) and mutant(7).content != mutant(8).content
    assert Image.open(io.BytesIO(good_files()["PNG"][0])).size == (45, 37)
