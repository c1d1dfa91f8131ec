"""jobs/doctor.py: what it finds is tried out, and nothing makes it fail."""

import json

import numpy as np
import pytest

from jobs import cli, doctor


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return doctor.run(doctor.Config(cache=tmp_path_factory.mktemp("cache")))


def test_all_is_looked_at(result):
    assert [item.name for item in result.findings] == [
        "accelerator", "processor", "bf16 and AMX", "memory", "compiler", "torch", "models", "FAISS", "exact search",
        "zarr", "images", "cache", "shipped files",
    ]  # fmt: skip


def test_nothing_is_broken_here(result):
    assert not [item for item in result.findings if item.state == "broken"]


def test_every_finding_says_what_it_means(result):
    for item in result.findings:
        assert item.value and item.meaning
        assert item.state == "good" or item.next_step


def test_numbers_are_there_for_programs(result):
    details = {item.name: item.details for item in result.findings}
    assert details["processor"]["cores"] >= 1
    assert details["memory"]["total"] > details["memory"]["available"] > 0
    assert details["bf16 and AMX"]["gigaflops"]["float32"] > 0
    assert details["cache"]["exists"] and details["cache"]["free"] > 0


def test_a_wrong_search_is_noticed(monkeypatch):
    import faiss

    class Liar:
        def __init__(self, dimensions): ...

        def add(self, vectors): ...

        def search(self, queries, k):
            return np.zeros((len(queries), k)), np.zeros((len(queries), k), dtype=int)

    monkeypatch.setattr(faiss, "IndexFlatIP", Liar)
    assert doctor.look_at_faiss().state == "broken"


def test_a_gpu_without_kernels_is_a_warning(monkeypatch):
    import faiss

    def fail(*arguments):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    monkeypatch.setattr(faiss, "StandardGpuResources", fail, raising=False)
    finding = doctor.look_at_faiss()
    assert finding.state == "slow" and "no kernel image" in finding.meaning


def test_what_breaks_while_looking_is_a_finding(monkeypatch, tmp_path):
    def fail():
        raise ImportError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(doctor, "look_at_faiss", fail)
    found = {item.name: item for item in doctor.run(doctor.Config(cache=tmp_path)).findings}
    assert found["FAISS"].state == "broken" and "libgomp" in found["FAISS"].value


def test_a_cache_that_is_not_there_yet_is_fine_and_little_space_is_told(tmp_path, monkeypatch):
    finding = doctor.look_at_cache(tmp_path / "not" / "yet")
    assert finding.state == "good" and "not there yet" in finding.value
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**6})())
    assert doctor.look_at_cache(tmp_path).state == "slow"


def test_few_threads_are_told(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(doctor.machine, "usable_cores", lambda: 8)
    finding = doctor.look_at_processor()
    assert finding.state == "slow" and finding.next_step == "unset OMP_NUM_THREADS"


def test_as_a_command(capsys, tmp_path):
    assert cli.run(["doctor", "--cache", str(tmp_path), "--quiet"]) == 0
    text = capsys.readouterr().out
    assert "FAISS" in text and "what it means" in text
    assert cli.run(["doctor", "--cache", str(tmp_path), "--json", "--quiet"]) == 0
    assert len(json.loads(capsys.readouterr().out)["findings"]) == 13


@pytest.mark.parametrize(("times", "state"), [(1.2, "good"), (8.0, "slow")])
def test_a_slow_faiss_is_noticed_by_its_search_beside_a_product(monkeypatch, times, state):
    monkeypatch.setattr(doctor, "_faiss_beside_product", lambda faiss: times)
    finding = doctor.look_at_faiss()
    assert finding.state == state and finding.details["times_of_product"] == times
    assert ("OPENBLAS_CORETYPE" in finding.next_step) is (state == "slow")


def test_faiss_is_timed_beside_a_product():
    import faiss

    assert 0.1 < doctor._faiss_beside_product(faiss, rows=2048, queries=64, dim=64) < 1000


def test_exact_search_says_up_to_how_many_rows_it_is_fast_enough():
    finding = doctor.look_at_exact_search()
    assert finding.state == "good" and finding.details["fast_enough_rows"] > 1000
