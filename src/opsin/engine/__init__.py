"""pixels → logits, fast. Inference only; `clf.model` stays the exact reference.

packed.py     a twin of the model with its layers laid out for this CPU: fp32, bf16, int8
calibrate.py  images → the ranges that int8 needs
cuda.py       bf16, fp16, fp8, compiled and replayed as CUDA graphs
openvino.py   the same networks through OpenVINO (extra `openvino`)
"""

from opsin.engine.calibrate import calibrate, noisiest, without
from opsin.engine.packed import Precision, Range, Ranges, can_pack, pack

__all__ = ["Precision", "Range", "Ranges", "calibrate", "can_pack", "noisiest", "pack", "without"]
