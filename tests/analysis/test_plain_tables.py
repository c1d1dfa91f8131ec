"""Tables that a run announces stand in its report as they are."""

import json
from pathlib import Path

import pandas as pd
import pytest

from analysis import report, run_record
from analysis.report import plain
from engine.errors import DataError
from tests.analysis.fake_run import write_fake_run


def announce(folder: Path, source: str = "tables/oddities.csv", name: str = "oddities") -> None:
    line = {"kind": "table", "name": name, "title": "Oddities", "section": "odd", "text": "One row an oddity."}
    said = {"kind": "sentence", "section": "odd", "text": "Nothing is <odd> here."}
    with open(folder / "results.jsonl", "a") as file:
        file.write(json.dumps({**line, "source": source, "protocol": "sound"}) + "\n" + json.dumps(said) + "\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_fake_run(tmp_path)
    (folder / "tables").mkdir(exist_ok=True)
    frame = pd.DataFrame({"label": ["a", "b"], "p_holm": [0.25, None], "changes": [True, False], "n": [1200, 3]})
    frame.to_csv(folder / "tables/oddities.csv", index=False)
    return folder


def test_announced_tables__stand_in_the_page_with_their_sentences(folder: Path) -> None:
    announce(folder)
    before = (folder / "tables/oddities.csv").read_bytes()
    page = report.render_report(folder).read_text()
    found = plain.plain_tables(run_record.read_run(folder))
    assert [part["title"] for part in found] == ["Oddities (protocol sound)"]
    assert found[0]["table"].columns == ["label", "p holm", "changes", "n"]
    texts = [[cell.text for cell in row.cells] for row in found[0]["table"].rows]
    assert texts == [["a", "0.250", "yes", "1,200"], ["b", "–", "no", "3"]]
    assert "Nothing is &lt;odd&gt; here." in page and "One row an oddity." in page
    assert page.count("Nothing is &lt;odd&gt; here.") == 1  # beside its table, not also in the summary
    assert (folder / "tables/oddities.csv").read_bytes() == before


def test_announced_tables__that_are_missing_or_outside_are_errors(folder: Path) -> None:
    announce(folder, "tables/none.csv")
    with pytest.raises(DataError, match=r"tables/none.csv.*is not there"):
        plain.plain_tables(run_record.read_run(folder))
    (folder.parent / "outside.csv").write_text("a\n1\n")
    announce(folder, "../outside.csv")
    with pytest.raises(DataError, match="is not there"):
        run_record.read_run(folder).table("../outside.csv")
