"""Data sets by schema string: where samples come from, one file a kind.

A schema such as ``iu-xray:/data/openi?view=all`` and keyword options come in; an `engine.dataset.Dataset` goes out.
"""

from engine.sources.schema import open_dataset

__all__ = ["open_dataset"]
