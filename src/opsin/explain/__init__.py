"""Why a model answered as it did: maps in image coordinates, whether they hold, and the figures of the ViT paper.

maps.py       an image → an Explanation, by any method
attention.py  tokens → answer: attention, rollout, relevance
perturb.py    parts of the image hidden: occlusion; deletion and insertion, which test every map
place.py      grid of tokens ↔ pixels ↔ original
figures.py    attention distance, position similarity, patch filters
text.py       the bytes that a gap was filled from
pictures.py   all of these as pictures
report.py     and as one HTML page
"""

from opsin.explain.figures import attention_distance, filters, position_similarity
from opsin.explain.maps import METHODS, explain, find_class, heads
from opsin.explain.perturb import Faithfulness, faithfulness
from opsin.explain.place import Explanation
from opsin.explain.text import TextExplanation, explain_text

__all__ = [
    "METHODS",
    "Explanation",
    "Faithfulness",
    "TextExplanation",
    "attention_distance",
    "explain",
    "explain_text",
    "faithfulness",
    "filters",
    "find_class",
    "heads",
    "position_similarity",
]
