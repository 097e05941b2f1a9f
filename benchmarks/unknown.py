"""Images of none of the classes: how well the embedded models tell them, by three detectors and the best softmax score.

python benchmarks/unknown.py TINY_IMAGENET CALTECH                     # fp32, then what bf16 and int8 move
python benchmarks/unknown.py TINY_IMAGENET CALTECH --write ASSETS      # also ASSETS/{vit,perceiver}-tiny/unknown.*

TINY_IMAGENET is the folder of the shards, CALTECH caltech-12.zip or its folder. Means and neighbours come from 50
training images of each class. Known are the 5,000 held-out images, unknown Caltech's photos of nine classes; every
other one of both chooses the detector, the rest give the figures. Three classes are left out: butterfly (many are
monarchs, which is a class), chair (some are rocking chairs) and ewer (some pass for a water jug or a teapot). Dalmatian
(beside six other breeds), ibis (beside storks and geese) and watch (beside the stopwatch) stay in, the hard ones.
The photos are larger than the 64-pixel images of the known, so that their pixels alone tell something: the task is
easier than it would be with unknown images of the same source.
"""

import argparse
from pathlib import Path

import numpy as np

import opsin
from opsin import engine, evaluate, unknown
from opsin.data import open_samples
from opsin.data.samples import Samples
from opsin.device import has_int8
from opsin.unknown import Answers, Quality

LEFT_OUT = ("butterfly", "chair", "ewer")
RATES = (0.01, 0.05, 0.1, 0.2)


def ask(classifier: opsin.Classifier, samples: Samples, rows: np.ndarray) -> Answers:
    found = evaluate.predict(classifier, samples, rows, features=True, batch_size=64)
    return Answers(found.logits[found.ok], found.features[found.ok])


def best_softmax(answers: Answers) -> np.ndarray:
    z = answers.logits.astype(np.float64)
    return 1 / np.exp(z - z.max(1, keepdims=True)).sum(1)


def row(name: str, quality: Quality) -> str:
    return f"| {name} | {quality.auroc:.3f} | {quality.fpr95:.1%} |"


def main(tiny: str, caltech: str, target: Path | None) -> None:
    for name in ("vit-tiny", "perceiver-tiny"):
        classifier = opsin.load(f"opsin/{name}", dtype="fp32")
        samples, photos = open_samples(tiny), open_samples(caltech)
        assert classifier.labels is not None and samples.held_out is not None
        evaluate.align(samples, classifier.labels)
        held_out, trained = np.flatnonzero(samples.held_out), np.flatnonzero(~samples.held_out)
        place = unknown.places(samples.targets[trained])
        bank = trained[(place % 9 == 0) & (place < 9 * unknown.BANK_PER_CLASS)]  # evenly among 475 of each class
        away = [photos.labels.names.index(each) for each in LEFT_OUT]
        rows = np.flatnonzero(~np.isin(photos.targets, away))

        known, others = ask(classifier, samples, held_out), ask(classifier, photos, rows)
        detector, table = unknown.fit(
            ask(classifier, samples, bank).features,
            samples.targets[bank],
            known,
            others,
            head=unknown.fingerprint(classifier.model),
        )
        print(f"opsin/{name}: {detector.num_known:,} known images, {detector.num_others} others")
        print("| | AUROC | FPR95 |\n|---|---:|---:|")
        print(row("best softmax", unknown.quality(best_softmax(known)[1::2], best_softmax(others)[1::2])))
        for method, quality in table.items():
            print(row(method, quality))
        for rate in RATES:
            print(f"{rate:.0%} of others taken for known: {detector.false_reject(rate):.1%} of known taken for others")
        if target is not None:
            path = unknown.write(target / name, detector)
            print(f"{path}: {path.stat().st_size:,} bytes")

        for dtype in ("bf16", "int8"):
            ranges = None
            if dtype == "int8":
                if not has_int8():
                    continue
                pixels = [classifier.preprocess(samples.source(int(i)))[None] for i in bank[::150]]
                ranges = engine.calibrate(classifier.model, pixels)
            classifier.use(dtype, ranges=ranges)
            lower = [ask(classifier, samples, held_out[1::2]), ask(classifier, photos, rows[1::2])]
            ranks = [detector.ranks(detector.scores(*answers)) for answers in lower]
            for rate in RATES:
                passed, accepted = (float(detector.accepts(each, rate).mean()) for each in ranks)
                print(f"{dtype} at {rate:.0%}: {accepted:.1%} taken for known, {1 - passed:.1%} for others")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tiny_imagenet")
    parser.add_argument("caltech")
    parser.add_argument("--write", type=Path, metavar="ASSETS", help="folder of the embedded models")
    arguments = parser.parse_args()
    main(arguments.tiny_imagenet, arguments.caltech, arguments.write)
