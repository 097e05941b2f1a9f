"""image → a map of what the answer rests on."""

import difflib

import numpy as np

from opsin.explain import attention, perturb
from opsin.explain.place import Explanation, cell_place, in_original, token_place
from opsin.labels import Labels, _synonyms
from opsin.models.perceiver_io import ImagePerceiver
from opsin.models.vit import ViT
from opsin.pipeline import Classifier
from opsin.preprocess import ImageSource

METHODS = ("relevance", "rollout", "attention", "occlusion")


def explain(
    classifier: Classifier,
    image: ImageSource,
    *,
    target: int | str | None = None,
    method: str = "relevance",
    layer: int | None = None,
    head: int | None = None,
) -> Explanation:
    """Which parts of an image a classifier's answer rests on.

    Args:
        image: as `Classifier` takes one.
        target: the class to explain: its index, its name or one of its synonyms, or its WordNet id; the best one
            without it. Rollout and attention are the same for every class.
        method:

            "relevance"  attention weighted with the gradient of the class (Chefer et al. 2021, §3)
            "rollout"    attention multiplied through the layers (Abnar & Zuidema 2020, §3)
            "attention"  of one layer, as it is: `heads` says what of it is shown
            "occlusion"  what is lost when a cell of the image is grey (Zeiler & Fergus 2014, §4.2): for any model

        layer, head: for "attention", counted from 0; the last layer and the mean of its heads without them.
    Raises:
        ImageError: the image cannot be read.
        NoHead: the checkpoint has no classifier.
        ValueError: an unknown method or target; a layer or head that does not exist, or is given to a method other than
            "attention"; a model whose attention is not known to it, for a method other than "occlusion".
    """
    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, 1)
        hint = f'Did you mean "{near[0]}"? ' if near else ""
        raise ValueError(f'method is "{method}". {hint}Known: {", ".join(METHODS)}.')
    if method != "attention" and (layer is not None or head is not None):
        what = "layer" if layer is not None else "head"
        raise ValueError(f'{what} is for method "attention"; "{method}" takes all of them together.')
    if method != "occlusion":
        _check_attention(classifier, f'method "{method}"')
    index = None if target is None else find_class(classifier._require_labels(), target)
    pixels, size = perturb.resized(classifier, image)
    scores = perturb.probabilities(classifier, classifier.forward([pixels]))[0]
    index = int(scores.argmax()) if index is None else index
    model, image_size = classifier.model, classifier.image_size
    if method == "occlusion":
        values, place = perturb.occlusion(classifier, pixels, index), cell_place(model, image_size)
    else:
        place = token_place(model, image_size)
        batch = classifier.preprocess.normalise_batch([pixels]).to(classifier.device)
        if method == "relevance":
            values = attention.relevance(model, batch, index)
        elif method == "rollout":
            values = attention.rollout(model, batch)
        else:
            values, layer = _one(attention.heads(model, batch), layer, head)
    labels = classifier._require_labels()
    return Explanation(
        map=np.ascontiguousarray(values, np.float32),
        method=method,
        layer=layer,
        head=head,
        target=index,
        label=labels.name(index, classifier.lang),
        score=float(scores[index]),
        **in_original(place, classifier.preprocess, size),
    )


def heads(classifier: Classifier, image: ImageSource) -> np.ndarray:
    """What each head of each layer attends to for the answer: (layers, heads, h, w) float32, on the model's tokens.

    Layers of a ViT are its own, from 0; of a Perceiver, layer 0 is the input's cross-attention, whose missing heads are
    NaN, and the self-attentions follow. `attention.heads` says what is composed with what.

    Raises:
        ImageError: the image cannot be read.
        ValueError: the model is neither a ViT nor an image Perceiver.
    """
    _check_attention(classifier, "heads")
    pixels, _ = perturb.resized(classifier, image)
    return attention.heads(classifier.model, classifier.preprocess.normalise_batch([pixels]).to(classifier.device))


def find_class(labels: Labels, target: int | str) -> int:
    """The index of a class, given as that, as its name in English or Chinese, a synonym, its WordNet id, or digits.

    Raises:
        ValueError: there is none, and the nearest are named; or several have that name.
    """
    if isinstance(target, int) or (target.isdecimal() and target not in labels.names):
        if not 0 <= int(target) < len(labels):
            raise ValueError(f"no class {target}: this model has {len(labels)}, 0 to {len(labels) - 1}.")
        return int(target)
    wanted = target.strip()
    for names in (labels.names, labels.wnids or (), labels.names_zh or ()):
        if found := [index for index, name in enumerate(names) if name == wanted]:
            break
    else:
        words = [_synonyms(name) for name in labels.names]
        found = [index for index, each in enumerate(words) if not _synonyms(wanted).isdisjoint(each)]
    if len(found) == 1:
        return found[0]
    if found:
        several = ", ".join(f'{index} "{labels.names[index]}"' for index in found)
        raise ValueError(f'"{target}" is {len(found)} classes: {several}. Give the index of one.')
    every: dict[str, str] = {}
    for name in labels.names:
        for word in (name.lower(), *_synonyms(name)):
            every.setdefault(word, name)
    kinds = [word for word in every if word.split()[-1:] == [wanted.lower()]]  # "cat" of "tabby cat"
    near = dict.fromkeys(every[word] for word in (kinds or difflib.get_close_matches(wanted.lower(), every, 3))[:6])
    hint = "Did you mean " + " or ".join(f'"{name}"' for name in near) + "?" if near else "Give its index."
    raise ValueError(f'no class "{target}" among the {len(labels)} of this model. {hint}')


def _check_attention(classifier: Classifier, what: str) -> None:
    if not isinstance(classifier.model, ViT | ImagePerceiver):
        raise ValueError(
            f"{what} looks at the attention of a ViT or a Perceiver; {classifier.source.name} is a "
            f'{type(classifier.model).__name__}. method="occlusion" works for any model.'
        )


def _one(maps: np.ndarray, layer: int | None, head: int | None) -> tuple[np.ndarray, int]:
    """One layer's map of `heads`: of one head, or the mean; and which layer it is."""
    layer = len(maps) - 1 if layer is None else layer
    if not 0 <= layer < len(maps):
        raise ValueError(f"no layer {layer}: this model has {len(maps)}, 0 to {len(maps) - 1}.")
    there = maps[layer][~np.isnan(maps[layer]).all(axis=(1, 2))]
    if head is None:
        return there.mean(axis=0), layer
    if not 0 <= head < len(there):
        raise ValueError(f"no head {head}: layer {layer} of this model has {len(there)}, 0 to {len(there) - 1}.")
    return there[head], layer
