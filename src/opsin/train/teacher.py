"""A trained classifier that a student learns from: the same pictures, in its own size and range."""

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin import checkpoints
from opsin.errors import TrainError
from opsin.labels import Labels, match
from opsin.train.loader import Normalise


class Teacher:
    """Pixels 0..255 (B, 3, H, W) → logits (B, K) of the student's classes (Touvron et al. 2021, §4).

    Args:
        name: what `opsin.load` takes.
        labels: the student's classes; the teacher must know each of them, by name or WordNet id.
    Raises:
        ModelError: it cannot be loaded.
        TrainError: it has no head, or does not know a class.
    """

    def __init__(self, name: str, labels: Labels, device: torch.device) -> None:
        checkpoint = checkpoints.read(name)
        if checkpoint.labels is None or checkpoint.preprocess is None:
            raise TrainError(
                f"{name} has no classes to teach. Take a fine-tuned checkpoint: `opsin models` lists some."
            )
        indices = match(labels, checkpoint.labels)
        unknown = [labels.name(i) for i, index in enumerate(indices) if index is None]
        if unknown:
            raise TrainError(
                f"{name} cannot teach {len(unknown)} of the {len(labels)} classes, which it does not know: "
                f"{', '.join(unknown[:5])}{', …' if len(unknown) > 5 else ''}."
            )
        self.model = checkpoint.model.to(device).eval()
        self.image_size = checkpoint.preprocess.image_size
        self.normalise = Normalise(checkpoint.preprocess, device)
        self.indices = torch.tensor(indices, device=device)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        if pixels.shape[-2:] != self.image_size:
            pixels = F.interpolate(pixels, self.image_size, mode="bilinear", antialias=True, align_corners=False)
        with torch.autocast(pixels.device.type, dtype=torch.bfloat16, enabled=pixels.device.type == "cuda"):
            logits = self.model(self.normalise(pixels))
        return logits.float()[:, self.indices]
