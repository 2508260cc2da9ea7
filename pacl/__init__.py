"Partitioned and adaptive contrastive learning: teach a visual model the emotion of image-text posts."
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING: from pacl.app.package import enhance, export, features, load

__version__ = "0.2.0"
__all__ = ["enhance", "export", "features", "load"]


def __getattr__(name: str) -> Any:
    "What is in __all__ (PEP 562): torch is imported when one of them is asked for, not by `import pacl`."
    if name not in __all__: raise AttributeError(f'module "pacl" has no attribute "{name}"')
    from importlib import import_module
    return getattr(import_module('pacl.app.package'), name)
