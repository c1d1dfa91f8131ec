"""The sources of a study's labels, held against one another.

Comes in: a data set that carries labels from several sources. Goes out: two tables and sentences in the section
"label sources", where there are two sources or more.

- ``tables/label-agreement.csv``: one row a pair of sources and label: n, both, only_source, only_other, neither,
  agreement, kappa with low and high.
- ``tables/label-sources.csv``: one row a label: how many samples each source calls positive, and which one the study
  uses.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis import agreement
from engine.sources.label_sources import label_sources
from engine.sources.txrv import WITHOUT_COUNTERPART
from jobs import runs
from jobs.run_tables import write_table
from jobs.study_records import sentence_rows
from jobs.study_settings import Material

SECTION = "label sources"


def write_label_sources(material: Material, run: runs.Run, replicates: int, seed: int) -> int:
    """Compare the sources; return how many there are."""
    sources = label_sources(material.dataset)
    names = material.dataset.label_names
    used = [name for name, source in sources.items() if np.array_equal(source.values, material.y)]
    if sources:
        counts = pd.DataFrame({name: source.values.sum(axis=0) for name, source in sources.items()})
        counts.insert(0, "label", list(names))
        counts = counts.assign(used=", ".join(used[:1]) or "another")
        text = f"Positive samples by each source of labels; the study uses {', '.join(used[:1]) or 'another'}."
        if "torchxrayvision" in sources:
            text += f" torchxrayvision's mapping has no counterpart of {', '.join(WITHOUT_COUNTERPART)}."
        write_table(run, "label-sources", counts, title="Sources of labels", text=text, section=SECTION)
    if len(sources) < 2:
        return len(sources)
    table = agreement.label_agreement(
        sources, material.dataset.groups, label_names=names, replicates=replicates, seed=seed
    )
    write_table(
        run,
        "label-agreement",
        table,
        title="Agreement of the sources",
        text="All samples that both sources know: counts, share of agreement, and Cohen's kappa with its interval by "
        "patient.",
        section=SECTION,
    )
    run.record_all(sentence_rows(SECTION, agreement.agreement_sentences(table)))
    return len(sources)
