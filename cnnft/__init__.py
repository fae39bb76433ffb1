"""Turn a pretrained CNN and a folder of images into a classifier you can use.

from cnnft import finetune, load

run = finetune("photos", mode="feature-extractor")
predictions = load(run.path).predict("new.jpg")
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["CnnftError", "Config", "finetune", "load"]

if TYPE_CHECKING:
    from cnnft.config.schema import Config
    from cnnft.errors import CnnftError
    from cnnft.inference.storage import load
    from cnnft.training.finetune import finetune


def __getattr__(name: str) -> Any:
    # Lazy, because `cnnft --help` imports this package and must not wait for torch.
    homes = {
        "finetune": "training.finetune",
        "load": "inference.storage",
        "Config": "config.schema",
        "CnnftError": "errors",
    }
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{homes[name]}"), name)
