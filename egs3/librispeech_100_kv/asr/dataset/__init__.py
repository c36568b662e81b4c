"""The corpora of this recipe, as ESPnet3 loads them."""

from .builder import DatasetBuilder
from .dataset import Dataset

__all__ = ["Dataset", "DatasetBuilder"]
