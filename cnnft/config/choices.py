"""Closed choices of the command line and of Python, with the names that users type."""

from typing import Literal

Mode = Literal["finetune", "feature-extractor", "bn-only", "auto"]
BatchNorm = Literal["auto", "train", "frozen"]
Head = Literal["linear", "mlp"]
HeadSolver = Literal["auto", "lbfgs", "sgd"]
FeatureDepth = Literal["auto", "last", "stages"]
HeadInit = Literal["default", "xavier", "kaiming", "zeros"]
Fit = Literal["crop", "squash", "pad"]
Augment = Literal["none", "basic", "standard", "strong", "trivial", "randaugment", "lecture"]
Schedule = Literal[
    "cosine", "cosine-restarts", "one-cycle", "step", "multistep", "exponential", "inverse",
    "inverse-sqrt", "plateau", "constant",
]  # fmt: skip
Sampling = Literal["shuffled", "balanced"]
ClassWeights = Literal["none", "balanced"]
Precision = Literal["float32", "bfloat16", "float16"]
Cache = Literal["auto", "ram", "disk", "off"]
Decoder = Literal["pillow", "draft"]
Layout = Literal["auto", "flat", "split", "class-split"]
Split = Literal["val", "test", "all"]
ExportFormat = Literal["head", "safetensors", "onnx"]
