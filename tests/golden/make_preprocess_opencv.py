"""Writes preprocess_opencv.npz: noise, cropped as in DeepMind's Perceiver IO notebook and resized by OpenCV.

    pip install opencv-python-headless && python tests/golden/make_preprocess_opencv.py

OpenCV computes bicubic otherwise where Intel's library is not there: run it on an x86.
"""

import random
from pathlib import Path

import cv2
import numpy as np

TARGET = (23, 29)  # height, width
SIZES = [(64, 64), (61, 37), (38, 61), (200, 101), (9, 14), (5, 50)]  # height, width


def noise(height: int, width: int) -> np.ndarray:
    values = random.Random(f"{height}x{width}").randbytes(height * width * 3)
    return np.frombuffer(values, np.uint8).reshape(height, width, 3)


def central_square(image: np.ndarray) -> np.ndarray:
    """7/8 of the shorter edge; of an odd margin the larger half goes before."""
    height, width = image.shape[:2]
    side = int(224 / (224 + 32) * min(height, width))
    top, left = (height - side + 1) // 2, (width - side + 1) // 2
    return image[top : top + side, left : left + side]


if __name__ == "__main__":
    assert cv2.ipp.useIPP()
    pictures = {
        f"{height}x{width}": cv2.resize(
            central_square(noise(height, width)), TARGET[::-1], interpolation=cv2.INTER_CUBIC
        )
        for height, width in SIZES
    }
    np.savez_compressed(Path(__file__).with_name("preprocess_opencv.npz"), **pictures)
