"""The smallest versions of the recipes that still are those recipes, and data for those that need some."""

import io

import numpy as np

STEP = [
    "training.steps=2",
    "training.batch=8",
    "training.warmup=0",
    "training.checkpoint_every=1",
    "training.log_every=1",
]
UNET = [
    "model.net.width=8",
    "model.net.multipliers=[1, 1]",
    "model.net.blocks=1",
    "model.net.attention=[]",
    "model.net.head_width=8",
    "model.net.embedding_width=16",
    "model.net.noise_features=8",
]
MLP = ["model.net.hidden=16", "model.net.layers=1"]
CHAINS = ["objective.steps=2", "objective.start.size=64"]
CLASSIFIERS = {name: ["model.net.width=4"] for name in ("classifier-digits", "classifier-mnist")}
NET = {"gaussians": MLP, "ebm-ring": MLP, "ebm-mnist": ["model.net.width=4", *CHAINS], **CLASSIFIERS}
SAMPLING = ["sampling.n=4", "sampling.steps=3", "sampling.batch=64"]


def overrides(name: str, data: list[str] | None = None) -> list[str]:
    """What makes a recipe tiny."""
    return [*STEP, *NET.get(name, UNET), *([] if name in CLASSIFIERS else SAMPLING), *(data or [])]


def png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def pixels(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def image_folder(place, n=24, classes=("cat", "dog"), side=16):
    """A folder of class folders of PNG files."""
    for i in range(n):
        folder = place / classes[i % len(classes)]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:03d}.png").write_bytes(png(pixels(i, (side, side, 3))))
    return place


def parquet(place, image_column, shape, n=24, classes=10):
    """A Hugging Face style parquet file of encoded images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    place.mkdir(parents=True, exist_ok=True)
    for split, first in (("train", 0), ("test", n)):
        rows = [{"bytes": png(pixels(first + i, shape)), "path": None} for i in range(n)]
        table = pa.table({image_column: rows, "label": pa.array([i % classes for i in range(n)], pa.int64())})
        pq.write_table(table, place / f"{split}-00000-of-00001.parquet")
    return place
