"""WordNet 3.0's data.noun → src/opsin/assets/labels/hypernyms.tsv.gz: what each class of ImageNet is a kind of.

python benchmarks/hypernyms.py WORDNET/dict/data.noun hypernyms.tsv.gz

One line for each class of ImageNet-1k and 21k and each of their hypernyms up to "entity": WordNet id, ids of its
hypernyms (of instances too), and its first lemma where it is a hypernym itself. An id is "n" and the synset's
offset in that file.
"""

import gzip
import sys
from pathlib import Path

from opsin.labels import Labels


def synsets(path: Path) -> dict[str, tuple[str, list[str]]]:
    """WordNet id → (first lemma, hypernyms). The format: wndb(5)."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):  # the licence
            continue
        offset, _, _, count, *rest = line.partition(" | ")[0].split()
        pointers = rest[2 * int(count, 16) + 1 :]
        parents = [
            f"n{pointers[i + 1]}"
            for i in range(0, len(pointers), 4)
            if pointers[i] in ("@", "@i") and pointers[i + 2] == "n"
        ]
        found[f"n{offset}"] = rest[0].replace("_", " "), parents
    return found


def main(source: Path, target: Path) -> None:
    nouns = synsets(source)
    classes = {*(Labels.imagenet_1k().wnids or ()), *(Labels.imagenet_21k().wnids or ())}
    inner: set[str] = set()
    todo = list(classes)
    while todo:
        new = set(nouns[todo.pop()][1]) - inner
        inner |= new
        todo += new
    lines = []
    for wnid in sorted(classes | inner):
        name, parents = nouns[wnid]
        lines.append(f"{wnid}\t{' '.join(parents)}\t{name if wnid in inner else ''}\n")
    target.write_bytes(gzip.compress("".join(lines).encode(), 9, mtime=0))
    print(f"{len(lines):,} synsets, {len(inner):,} of them hypernyms of others; {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
