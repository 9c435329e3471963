"""The likelihood of a data set, a part at a time: shared over processes, and resumable."""

from __future__ import annotations

import hashlib
import io
import json
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from undiffuse.cli.console import Console
from undiffuse.cli.drawing import PATIENCE, seal_of
from undiffuse.cli.measuring import append_lines, load_changed
from undiffuse.cli.shards import ALIVE, mine, open_folder
from undiffuse.core.errors import DataError, choose
from undiffuse.core.random import Streams
from undiffuse.fields import Denoiser
from undiffuse.inference import VariationalDequantiser, bits_per_dim, dequantise, log_likelihood
from undiffuse.inference.dequantisation import count_levels
from undiffuse.inference.likelihood import DIVERGENCES, Exact, Hutchinson, HutchPP
from undiffuse.recipes.devices import pick_device
from undiffuse.recipes.run import Run
from undiffuse.training import join, load_checkpoint
from undiffuse.training.files import disk_errors, replace_file

Noise = Callable[[Tensor, Streams], tuple[Tensor, Tensor]]
NOISES = ("uniform", "variational", "none")
PART = 256  # rows of a file: what an interruption can cost


def rule_of(name: str, probes: int) -> Exact | Hutchinson | HutchPP:
    """The divergence that the options say."""
    made = choose(name, DIVERGENCES, "--divergence")
    return Exact() if made is Exact else made(probes)  # pyright: ignore[reportCallIssue]


@dataclass(frozen=True)
class Job:
    """Which data, under which model, how."""

    run: Path
    data: str
    n: int | None
    rule: Exact | Hutchinson | HutchPP
    tolerance: float
    noise: str
    seed: int
    batch: int
    ema: str | None = None
    step: int | None = None
    device: str = "auto"

    def run_all(self, screen: Console) -> dict[str, Any] | None:
        """Every row's log-likelihood on disk, and in the first process the record of it.

        Raises:
            DataError: data of another shape than the run's, or streamed. RunError: the run is an energy.
        """
        elsewhere = self.data not in ("train", "held-out") and Path(self.data).exists()
        split = "train" if elsewhere else self.data
        loaded = load_changed(self.run, [f"data.path={json.dumps(self.data)}"] if elsewhere else [], ("data.",))
        place = pick_device(self.device)
        saved = load_checkpoint(loaded.folder, self.step)
        ema = loaded.average(self.ema, saved.step)
        denoiser = loaded.denoiser(ema, saved.step, place)
        dataset = self._dataset(loaded, split)
        count = len(dataset) if self.n is None else min(self.n, len(dataset))
        noise = self.noise if dataset.is_image else "none"
        first, _ = dataset.batch(torch.arange(min(len(dataset), 4096)))
        made = {
            "weights": seal_of(saved),
            "ema": ema,
            "step": saved.step,
            "data": dataset.fingerprint,
            "n": count,
            "divergence": repr(self.rule),
            "tolerance": self.tolerance,
            "dequantisation": noise,
            "levels": None if noise == "none" else loaded.recipe.settings.data.get("dequantise") or count_levels(first),
            "seed": self.seed,
        }
        key = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:8]
        folder = loaded.folder / "likelihood" / f"{split}-{count}-{key}"
        began = time.monotonic()
        rows = np.arange(count, dtype=np.int64)
        with join(place, PATIENCE) as world:
            world.from_main("the folder for the rows", lambda: open_folder(folder, made))
            add = self._noise(noise, made["levels"], loaded, denoiser, screen)
            size = min(PART, -(-count // world.size))
            parts = [rows[start : start + size] for start in range(0, count, size)]
            with screen.progress("likelihood", "samples") as bar, world.phase("likelihood"):
                self._share(list(mine(parts, world.rank, world.size)), dataset, denoiser, add, folder, bar)
            world.any(False, "the last rows of every process")
            if world.rank:
                return None
        nats, nfe = self._merge(folder, parts)
        facts = {"run": str(loaded.folder), "split": split, "data": dataset.name, "fingerprint": dataset.fingerprint}
        record = made | facts | _means(nats, nfe, dataset.shape, made["levels"]) | {"rows": str(folder)}
        record |= {"seconds": round(time.monotonic() - began, 1), "at": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        append_lines(loaded.folder / "likelihood.jsonl", [record])
        return record

    def _dataset(self, loaded: Run, split: str) -> Any:
        dataset = loaded.recipe.data(split)
        facts = loaded.facts
        if not hasattr(dataset, "batch"):
            raise DataError("these data are streamed: a likelihood needs data whose rows can be counted")
        if tuple(dataset.shape) != tuple(facts.shape):
            raise DataError(
                f"{dataset.name} has shape {list(dataset.shape)} and the run was trained on {list(facts.shape)}: "
                "expected the same"
            )
        theirs = (dataset.num_classes, dataset.class_names)
        if facts.num_classes is not None and theirs != (facts.num_classes, facts.class_names):
            raise DataError(
                f"{dataset.name} has {theirs[0]} classes, {theirs[1]}, and the run was trained on {facts.num_classes}, "
                f"{facts.class_names}: expected the same, since its likelihood is that given the class"
            )
        return dataset

    def _share(self, parts: list, dataset: Any, denoiser: Any, add: Noise, folder: Path, bar: Any) -> None:
        total, done = sum(len(part) for _, part in parts), 0
        for index, part in parts:
            file = folder / f"part-{index:05d}.npz"
            if not _holds(file, part):
                values = [self._rows(part[i : i + self.batch], dataset, denoiser, add) for i in _starts(part, self)]
                nats, nfe = (np.concatenate(column) for column in zip(*values))
                buffer = io.BytesIO()
                np.savez(buffer, rows=part, nats=nats, nfe=nfe)
                with disk_errors(str(file), ALIVE):
                    replace_file(file, buffer.getvalue())
            done += len(part)
            bar.to(done, total)

    def _rows(self, rows: np.ndarray, dataset: Any, denoiser: Any, add: Noise) -> tuple[np.ndarray, np.ndarray]:
        """(nats less log q, evaluations) of some rows; each row has streams of its own."""
        x, labels = dataset.batch(torch.from_numpy(rows))
        device = next(denoiser.parameters()).device
        streams = Streams(torch.cat([Streams.of(self.seed, 1, first=int(row)).keys for row in rows]))
        x, cost = add(x.to(device).double(), streams.fold("noise"))
        ran = log_likelihood(
            denoiser,
            x,
            divergence=self.rule,
            rtol=self.tolerance,
            atol=self.tolerance,
            seed=streams.fold("divergence"),
            cond=labels,
            batch=self.batch,
        )
        return (ran.nats - cost).cpu().numpy(), ran.nfe.cpu().numpy()

    def _noise(self, name: str, levels: int, loaded: Run, denoiser: Denoiser, screen: Console) -> Noise:
        """(x, streams) -> (x with its noise, log q of that in nats); "variational" is fitted to the model first."""
        if name == "none":
            return lambda x, streams: (x, x.new_zeros(len(x)))
        if name == "uniform":
            return lambda x, streams: (dequantise(x, streams, levels=levels), x.new_zeros(len(x)))
        train = loaded.recipe.data("train")
        x, _ = train.batch(torch.arange(min(len(train), 2048)))
        channels, device = x.shape[1], next(denoiser.parameters()).device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            net = torch.nn.Sequential(
                torch.nn.Conv2d(channels, 32, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(32, 8 * channels, 1)
            )
        screen.say("fitting the dequantiser to the model")
        made = VariationalDequantiser(tuple(x.shape[1:]), 8, net, levels).to(device)
        made.fit(denoiser, x.to(device), steps=300, seed=self.seed).double().requires_grad_(False)
        return made

    def _merge(self, folder: Path, parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        columns: list[list[np.ndarray]] = [[], []]
        for index in range(len(parts)):
            with np.load(folder / f"part-{index:05d}.npz", allow_pickle=False) as arrays:
                columns[0].append(arrays["nats"])
                columns[1].append(arrays["nfe"])
        return np.concatenate(columns[0]), np.concatenate(columns[1])


def _starts(part: np.ndarray, job: Job) -> range:
    return range(0, len(part), job.batch)


def _holds(file: Path, rows: np.ndarray) -> bool:
    """Whether a part is there, whole."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return np.array_equal(arrays["rows"], rows) and len(arrays["nats"]) == len(arrays["nfe"]) == len(rows)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return False


def _error(values: np.ndarray) -> float | None:
    """Standard error of the mean; of one value none is known."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None


def _means(nats: np.ndarray, nfe: np.ndarray, shape: tuple[int, ...], levels: int | None) -> dict[str, float | None]:
    """Means over the rows and their standard errors."""
    means: dict[str, float | None] = {"nats": float(nats.mean()), "nats_error": _error(nats), "nfe": float(nfe.mean())}
    if levels is not None:
        size = int(np.prod(shape))
        bits = np.asarray([bits_per_dim(float(value), size, levels) for value in nats])
        means |= {"bits_per_dim": float(bits.mean()), "bits_per_dim_error": _error(bits)}
    return means
