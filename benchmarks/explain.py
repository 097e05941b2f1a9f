"""Do the maps point at what the answers rest on: deletion and insertion areas of every method beside random orders, on
held-out images, for the two embedded models.

python benchmarks/explain.py DATA [IMAGES] [RANDOM_MAPS]     # DATA as `opsin evaluate` takes it; 200 images, 8 orders

Explained is the best label of each image, right or wrong: a map explains the model, not the picture. All maps of a
model are averaged over the same cells, so that they share the random orders.
"""

import sys
from collections import defaultdict

import numpy as np
import torch

import opsin
from opsin.data import open_samples
from opsin.explain import METHODS, Faithfulness, explain, faithfulness

NAMES = ("opsin/vit-tiny", "opsin/perceiver-tiny")


def table(found: dict[str, list[Faithfulness]], random: list[Faithfulness]) -> str:
    """A line for each method: mean areas, and the share of images on which the map does better than random orders."""
    random_deletion = np.array([score.random_deletion_auc for score in random])
    random_insertion = np.array([score.random_insertion_auc for score in random])
    lines = [f"{'':12}{'deletion':>10}{'better':>9}{'insertion':>11}{'better':>9}"]
    for method, scores in found.items():
        deletion = np.array([score.deletion_auc for score in scores])
        insertion = np.array([score.insertion_auc for score in scores])
        better = 100 * (deletion < random_deletion).mean(), 100 * (insertion > random_insertion).mean()
        lines.append(f"{method:12}{deletion.mean():10.3f}{better[0]:7.0f} %{insertion.mean():11.3f}{better[1]:7.0f} %")
    lines.append(f"{'random':12}{random_deletion.mean():10.3f}{'':9}{random_insertion.mean():11.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    samples = open_samples(sys.argv[1])
    count, random_maps = (int(value) for value in (*sys.argv[2:4], *("200", "8")[len(sys.argv) - 2 :]))
    rows = np.arange(len(samples)) if samples.held_out is None else np.flatnonzero(samples.held_out)
    rows = rows[np.linspace(0, len(rows) - 1, count).astype(int)]
    print(f"opsin {opsin.__version__}, torch {torch.__version__}, {len(rows)} images, {random_maps} random orders")
    for name in NAMES:
        classifier = opsin.load(name)
        found: dict[str, list[Faithfulness]] = defaultdict(list)
        random = []
        for row in rows.tolist():
            image = samples.source(row)
            for method in METHODS:
                explanation = explain(classifier, image, method=method)
                again = random_maps if method == METHODS[0] else 0
                found[method].append(faithfulness(classifier, image, explanation, random_maps=again))
            random.append(found[METHODS[0]][-1])
        print(f"\n{name}, {classifier.dtype}")
        print(table(found, random), flush=True)
