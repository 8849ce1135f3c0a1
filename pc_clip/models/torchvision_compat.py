"""Import torchvision, also with a CPU-only torch.

The torchvision wheel on PyPI is linked against CUDA. Beside a CPU-only build of torch its compiled
library does not load, and its Python part then fails to import because it registers meta kernels for two
operators that only that library would have defined. We use transforms and data sets, never those
operators, so declaring their schemas is enough. Every module that needs torchvision, open_clip or timm
imports this one first.
"""

import torch

_MISSING = {
    "torchvision::nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "torchvision::qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

try:
    import torchvision
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    for name, schema in _MISSING.items():
        torch.library.define(name, schema)
    import torchvision

__all__ = ["torchvision"]
