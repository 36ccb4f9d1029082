"""The names of the package short-transformers, on layercut's engine: scripts written for it run with `layercut.` before them."""

from layercut.short_transformers.short_transformer import ShortTransformer

__all__ = ["ShortTransformer"]
