"""Linear heads on frozen features: each image goes through the model once.

    opsin train photos/                                    # the recipe `linear_probe`
    opsin train photos/ --method fewshot                   # the recipe `few_shot`
    opsin train --recipe linear_probe --data DIR --model google/vit-base-patch16-224-in21k

Cost: one forward pass of each image, by the embedded ViT 0.37 GMAC, by ViT-B/16 17.56; then seconds, or minutes for
many classes. 10,000 images through the embedded ViT: 7.4 teraFLOP; through ViT-B/16: 351 teraFLOP, a second of an H100
at 40 % of its 989 TFLOP/s (dense bf16), an assumption.
Expected: `linear_probe`: what scikit-learn's LogisticRegression scores on the same features. `few_shot`: 64.2 % on
ImageNet of a ViT-B/16 and 5 images a class (Dosovitskiy et al. 2021, Table 8), which is not the model used here.
Measured: `linear_probe`: 36.5 % on Tiny-ImageNet with 20 images a class (scikit-learn 36.6 %), in 2.8 s (30 s); see
docs/results.md.
Measured: `few_shot`: 13.8, 26.5, 30.0 % of 1, 5, 10 images a class there (`benchmarks/probe.py`).

`linear_probe`: logistic regression or ridge and their strength, chosen by cross-validation; see `train/probe.py`.
`few_shot`: big_vision's evaluator (`evaluators/fewshot_lsr.py`): features less their mean, by their standard deviation
+ 1e-5, a constant feature of 100 for the bias, targets −1 and 1, ridge regression in closed form with λ = 2^10.

Where the sources disagree: the paper defines few-shot only as regularised least squares to {−1, 1}^K; the rest is
big_vision's. Both take `pre_logits` for features; what a checkpoint gives here depends on its head (`Embedder`).
"""

from opsin.train.config import TrainConfig


def linear_probe() -> TrainConfig:
    return TrainConfig(method="probe", init="opsin/vit-tiny", holdout=0.1, batch_size=256, lr=1.0)


def few_shot() -> TrainConfig:
    """Of as many images a class as the data have; the paper's are 5 and 10."""
    return TrainConfig(method="fewshot", init="opsin/vit-tiny", holdout=0.1, batch_size=256, lr=1.0)
