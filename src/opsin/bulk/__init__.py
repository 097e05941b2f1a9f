"""Any number of images → a folder of results: exactly one row per input, whatever happens on the way.

    sources ── plan ──▶ blocks ── items ──▶ batches ── Classifier ──▶ records ── parts ──▶ folder
    (data/inputs.py)                        (run.py)                             (parts.py)

A run that was killed goes on where its last whole part ends, and its table is the one that it would have been.
"""

from opsin.bulk.parts import FORMATS, Parts, errors, files
from opsin.bulk.run import Counts, run

__all__ = ["FORMATS", "Counts", "Parts", "errors", "files", "run"]
