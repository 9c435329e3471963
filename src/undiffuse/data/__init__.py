"""Wing: data sets, and batches of them as a pure function of (seed, step)."""

from undiffuse.data.dataset import ArrayDataset, Dataset, Labels
from undiffuse.data.load import SOURCES, load
from undiffuse.data.loader import Loader
from undiffuse.data.plane import MODE_STD, ring_means
from undiffuse.data.stream import StreamingDataset

__all__ = [
    "MODE_STD",
    "SOURCES",
    "ArrayDataset",
    "Dataset",
    "Labels",
    "Loader",
    "StreamingDataset",
    "load",
    "ring_means",
]
