"Partitioned and adaptive contrastive learning: teach a visual model the emotion of image-text posts."
__version__ = "0.1.0"


def __getattr__(name):
    "`pacl.load` and `pacl.enhance` (PEP 562): torch is imported when one of them is asked for, not by `import pacl`."
    from importlib import import_module
    home = {'load': 'pacl.encoders', 'enhance': 'pacl.train'}.get(name)
    if home is None: raise AttributeError(f'module "pacl" has no attribute "{name}"')
    return getattr(import_module(home), name)
