"""transformers' names for opsin's models: a model card runs with only its import line changed.

    from opsin.compat import ViTFeatureExtractor, ViTForImageClassification
    from opsin.compat import PerceiverFeatureExtractor, PerceiverForImageClassificationConvProcessing

What model cards pass goes in, and comes out as in transformers: outputs, `config`. New heads, other dtypes and devices
at loading are not for here. Pixels are those of its PIL processors; images are made upright RGB first, whatever their
EXIF orientation and mode. New code is better off with `opsin.load`.
"""

from opsin.compat.perceiver import (
    PerceiverForImageClassificationConvProcessing,
    PerceiverForImageClassificationFourier,
    PerceiverForImageClassificationLearned,
    PerceiverForMaskedLM,
    PerceiverForMultimodalAutoencoding,
    PerceiverForOpticalFlow,
)
from opsin.compat.processing import (
    PerceiverFeatureExtractor,
    PerceiverImageProcessor,
    PerceiverTokenizer,
    ViTFeatureExtractor,
    ViTImageProcessor,
)
from opsin.compat.vit import ViTForImageClassification, ViTModel

__all__ = [
    "PerceiverFeatureExtractor",
    "PerceiverForImageClassificationConvProcessing",
    "PerceiverForImageClassificationFourier",
    "PerceiverForImageClassificationLearned",
    "PerceiverForMaskedLM",
    "PerceiverForMultimodalAutoencoding",
    "PerceiverForOpticalFlow",
    "PerceiverImageProcessor",
    "PerceiverTokenizer",
    "ViTFeatureExtractor",
    "ViTForImageClassification",
    "ViTImageProcessor",
    "ViTModel",
]
