"""The figures of the ViT paper's appendix, as numbers: attention distance, position similarity, patch filters."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from opsin.device import exact_fp32
from opsin.explain.perturb import resized
from opsin.explain.place import token_place
from opsin.models.front_ends import Conv1x1
from opsin.models.layers import Trace
from opsin.models.perceiver_io import ImagePerceiver
from opsin.models.vit import ViT
from opsin.pipeline import Classifier
from opsin.preprocess import ImageSource

MAX_PLACES = 64  # along each side, of positions compared with one another


def attention_distance(classifier: Classifier, images: Sequence[ImageSource]) -> np.ndarray:
    """How far each head looks: (layers, heads) float32, pixels of the model's input.

    The distance from a patch's centre to the centres of all patches, weighted with its attention to them, mean over
    patches and images. Class token and registers have no place: what goes to them is left out, and the rest of each row
    taken as the whole.

    Raises:
        ImageError: an image cannot be read.
        ValueError: no images, or the model is no ViT: a Perceiver's latents have no place.
    Source: Dosovitskiy et al. 2021, Appendix D.7 and fig. 7 (right), there over 128 images.
    """
    model = classifier.model
    if not isinstance(model, ViT):
        raise ValueError(
            f"attention_distance is for a ViT, whose queries lie in the image; {classifier.source.name} is a "
            f"{type(model).__name__}."
        )
    if not images:
        raise ValueError("no images: the list is empty. Give at least one.")
    rows, columns = token_place(model, classifier.image_size).grid
    y, x = torch.meshgrid(torch.arange(float(rows)), torch.arange(float(columns)), indexing="ij")
    places = torch.stack([y, x], dim=-1).flatten(0, 1).to(classifier.device) * model.config.stride
    distances = torch.cdist(places, places)  # N N
    total = torch.zeros(model.config.num_layers, model.config.num_heads, dtype=torch.float64)
    for image in images:  # one at a time: the weights of all layers may be gigabytes
        pixels = classifier.preprocess.normalise_batch([resized(classifier, image)[0]]).to(classifier.device)
        with torch.inference_mode(), exact_fp32(classifier.device):
            model.encode(model.embed(pixels), trace := Trace())
            for layer, use in zip(total, trace.attended, strict=True):
                weights = use.weights()[0, :, model.config.num_prefix :, model.config.num_prefix :]  # heads N N
                mean = (weights * distances).sum(dim=2) / weights.sum(dim=2).clamp(min=1e-12)
                layer += mean.mean(dim=1).double().cpu()
    return (total / len(images)).float().numpy()


def position_similarity(model: nn.Module) -> np.ndarray:
    """Cosine similarity of each place's position embedding to those of all places: (h, w, h, w) float32.

    A ViT's learned table without class and distillation token; a Perceiver's Fourier features, or its learned ones as
    the network sees them, projected. Of a grid with more than 64 rows or columns every second, third, … is taken.

    Raises:
        ValueError: the model is neither a ViT nor an image Perceiver.
    Source: Dosovitskiy et al. 2021, §4.5 and fig. 7 (centre).
    """
    with torch.inference_mode():
        if isinstance(model, ViT):
            rows = model.pos_embed[0, model.config.num_positioned :]
        elif isinstance(model, ImagePerceiver):
            rows = model.front_end.positions()
            if isinstance(model.front_end, Conv1x1):
                rows = model.front_end.pos_proj(rows)
        else:
            raise ValueError(f"position_similarity is for a ViT or an image Perceiver, not for {_name(model)}.")
        rows = rows.unflatten(0, token_place(model, model.config.image_size).grid)  # h w D
        every = -(-max(rows.shape[:2]) // MAX_PLACES)
        rows = torch.nn.functional.normalize(rows[::every, ::every].float(), dim=-1)
        return torch.einsum("hwd,ijd->hwij", rows, rows).cpu().numpy()


def filters(model: nn.Module, count: int = 28) -> np.ndarray:
    """The main components of a ViT's patch embedding, the strongest first: (count, p, p, 3) float32, 0 to 1.

    Principal components of the kernel's D filters around their mean. Each is scaled so that 0.5 is zero and its largest
    weight 0 or 1; its sign, which the decomposition leaves open, makes that largest weight positive.

    Raises:
        ValueError: the model is no ViT, its kernel reads no colours, or `count` is out of range.
    Source: Dosovitskiy et al. 2021, §4.5 and fig. 7 (left).
    """
    if not isinstance(model, ViT):
        raise ValueError(f"filters are those of a ViT's patch embedding; this is {_name(model)}.")
    if model.stem is not None or model.config.num_channels != 3:
        given = "the feature map of a stem" if model.stem is not None else f"{model.config.num_channels} channels"
        raise ValueError(f"the patch embedding of this ViT reads {given}, not red, green and blue: nothing to show.")
    kernel = model.patch_embed.weight.detach().double().cpu()  # D 3 p p
    matrix = kernel.flatten(1) - kernel.flatten(1).mean(dim=0)
    most = min(matrix.shape)
    if not 1 <= count <= most:
        raise ValueError(f"count is {count}; this model's patch embedding has 1 to {most} components.")
    components = torch.linalg.svd(matrix, full_matrices=False).Vh[:count]
    peaks = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
    shown = 0.5 + 0.5 * (components / peaks).unflatten(1, kernel.shape[1:])
    return shown.permute(0, 2, 3, 1).float().numpy()


def _name(model: nn.Module) -> str:
    return f"a {type(model).__name__}"
