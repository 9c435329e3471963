"""`undiffuse edit`."""

from __future__ import annotations

import hashlib
import json as json_text
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undiffuse.cli import options
from undiffuse.cli.console import Console
from undiffuse.core.errors import ArgumentError, choose

if TYPE_CHECKING:
    from torch import Tensor

    from undiffuse.cli.drawing import Model
    from undiffuse.cli.pictures import Task

# A solver that draws noise, and more steps than sampling needs: each imposes the known part once more.
SOLVER, STEPS = "ddpm", 100
SIDE = 64  # small pictures are enlarged in the overview, by a whole number, to about this many pixels


def edit(
    run: options.RunName,
    task: Annotated[str, typer.Argument(metavar="TASK", help="inpaint, colourise or super-resolve.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures.")],
    mask: Annotated[
        Path | None, typer.Option(help="For inpaint: a picture, white where IMAGE is kept, black or clear where not.")
    ] = None,
    box: Annotated[
        str | None, typer.Option(help="For inpaint: what is filled in, x0,y0,x1,y1 in pixels.", metavar="BOX")
    ] = None,
    n: Annotated[int, typer.Option("--n", help="Results for each picture.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of each picture's first result; the next has the next.")] = 0,
    resample: Annotated[
        int, typer.Option(help="Times that each step which ends in noise is made; more is slower and fits better.")
    ] = 1,
    label: Annotated[
        int | None,
        typer.Option(help="Class of all results, -1 for none. Needed where the model never saw data without one."),
    ] = None,
    classifier: options.Classifier = None,
    classifier_scale: options.ClassifierScale = None,
    solver: Annotated[
        str | None,
        typer.Option(help=f"Solver, one that goes step by step: not picard, not tuned-8. Default: {SOLVER}."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help=f"Solver steps. Default: {STEPS}.")] = None,
    batch_size: options.BatchSize = None,
    ema: options.Ema = None,
    step: options.Step = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results. Default: one in the run folder.", metavar="DIR")
    ] = None,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Fill in, colour or enlarge pictures with a model that was trained on whole ones.

    What is known of a picture is kept: the pixels under the mask bit for bit; the mean of the channels or the means of
    the blocks up to the rounding of a file, after the smallest change that leaves no value beyond black and white.
    Results are DIR/NAME-SEED.png, and overview.png has a row for each picture: what is known, then its results.

    \b
    Examples:
      undiffuse edit mnist inpaint seven.png --box 8,8,20,20 --label 7
      undiffuse edit mnist inpaint seven.png --mask half.png --label 7 --resample 5 --n 8
      undiffuse edit runs/plain inpaint seven.png --box 2,2,6,6 --classifier classifier-digits --label 7
      undiffuse edit cifar10 colourise grey.png --label 3
      undiffuse edit runs/faces super-resolve small.png --out large
    """
    stems = _check(images, mask, n, seed, out)
    from undiffuse.cli.drawing import How, Model
    from undiffuse.cli.guiding import guide_of, say_guide
    from undiffuse.inference.editing import stepwise
    from undiffuse.recipes import build
    from undiffuse.recipes.run import USES, load_run

    found = load_run(run)
    if found.recipe.kind != "denoiser":
        what, use = USES[found.recipe.kind]
        use = use.format(folder=found.folder)
        raise ArgumentError(
            f"{found.folder} trained {what}; edit needs a denoiser, of whole pictures. Of this one: {use}"
        )
    defaults = {"solver": {"name": SOLVER}, "steps": STEPS, "corrector": {"name": "none"}, "denoise": False}
    how = How(solver, steps, None, batch_size, label, ema, step, device, guide=guide_of(classifier, classifier_scale))
    model = Model.load(found, how, defaults)
    stepwise(build.solver(model.sampler.solver))  # before anything is said or written
    _check_label(model, label)
    work = _task(task, images, model.sampler.facts, mask, box)
    settings = model.settings() | {"task": task, "n": n, "seed": seed, "resample": resample, "grid": None}
    folder = out or model.run.folder / "samples" / f"edit-{task}-{_key(settings, work)}"
    screen = Console(json, quiet)
    many = "1 picture" if len(images) == 1 else f"{len(images)} pictures"
    screen.say(f"{task}: {many}, {n} results each; {model.run.folder} (step {model.step}), {folder}")
    say_guide(model.guide, model.note, screen)
    results = _draw(model, work, [seed + i for i in range(n)], resample, screen)
    files = _write(folder, stems, seed, work.given, results)
    screen.say(f"wrote {len(files)} files, first {files[0]}")
    screen.result({"run": str(model.run.folder), "out": str(folder), "files": [str(f) for f in files]} | settings)


def _check(images: Sequence[Path], mask: Path | None, n: int, seed: int, out: Path | None) -> list[str]:
    """The names of the results."""
    if n < 1 or not 0 <= seed < 2**63 - n:
        raise ArgumentError(f"--n {n} --seed {seed}: expected at least 1, and a seed of at least 0")
    if out is not None and out.suffix == ".png":
        raise ArgumentError(f"--out {out}: expected a folder; the files in it are NAME-SEED.png")
    stems = [image.stem for image in images]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise ArgumentError(f"two pictures are called {twice[0]}, and so would their results: edit them one by one")
    if out is not None:
        names = {"overview.png"} | {f"{stem}-{seed + i}.png" for stem in stems for i in range(n)}
        written = {(out / name).resolve() for name in names}
        lost = [file for file in [*images, *([] if mask is None else [mask])] if file.resolve() in written]
        if lost:
            raise ArgumentError(f"--out {out}: a result would be written over {lost[0]}; give another folder")
    return stems


def _check_label(model: Model, label: int | None) -> None:
    """Without a class a model answers only if it was trained so."""
    classes = model.sampler.facts.num_classes
    if label is None and classes is not None and model.run.recipe.train_config().cond_dropout == 0:
        raise ArgumentError(
            f"{model.run.folder} was trained with classes and never without: give --label 0 ... {classes - 1} (or "
            "train with training.cond_dropout=0.1)"
        )


def _task(name: str, images: Sequence[Path], facts: Any, mask: Path | None, box: str | None) -> Task:
    from undiffuse.cli import pictures

    tasks = {
        "inpaint": lambda: pictures.inpainting(images, facts.shape, mask, box),
        "colourise": lambda: pictures.colourisation(images, facts.shape),
        "super-resolve": lambda: pictures.super_resolution(images, facts.shape),
    }
    make = choose(name, tasks, "task")
    if not facts.image:
        raise ArgumentError(f"samples of shape {facts.shape} are no pictures: in Python, ud.inpaint edits any event")
    if name != "inpaint" and (mask is not None or box is not None):
        raise ArgumentError(f"--mask and --box belong to inpaint, not to {name}")
    return make()


def _key(settings: dict[str, Any], work: Task) -> str:
    """A name that these settings and pictures, and no others, lead to."""
    found = hashlib.sha256(json_text.dumps(settings).encode())
    for tensor in (work.known, work.given):
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()[:8]


def _draw(model: Model, work: Task, seeds: Sequence[int], resample: int, screen: Console) -> Tensor:
    """Results (pictures, n, C, H, W), each of its picture and its seed alone."""
    import torch

    from undiffuse.recipes import build
    from undiffuse.training.precision import autocast

    sampler: Any = model.sampler
    count, total = len(work.given), len(work.given) * len(seeds)
    rows = torch.arange(count).repeat_interleave(len(seeds))
    each = torch.tensor(seeds).repeat(count)
    chosen = {"solver": build.solver(sampler.solver), "steps": sampler.steps, "resample": resample}
    parts = []
    with screen.progress("editing", "results") as bar:
        for index in torch.arange(total).split(sampler.batch):
            label = -1 if sampler.label is None else sampler.label
            known_classes = sampler.facts.num_classes is not None
            cond = torch.full((len(index),), label, device=sampler.device) if known_classes else None
            with autocast(sampler.precision, sampler.device):
                x = work(sampler.bounded, rows[index], cond=cond, seed=each[index], **chosen)
            parts.append(x.float().cpu())
            bar.to(int(index[-1]) + 1, total)
    return torch.cat(parts).unflatten(0, (count, len(seeds)))


def _write(folder: Path, stems: Sequence[str], seed: int, given: Tensor, results: Tensor) -> list[Path]:
    """Every result as a PNG file, and the overview; each whole or not there."""
    import torch

    from undiffuse.report.pictures import image_grid, png_bytes
    from undiffuse.training.files import disk_errors, replace_file

    rows = torch.cat([given[:, None], results], 1)
    scale = max(1, SIDE // max(rows.shape[-2:]))
    contents = {"overview.png": image_grid(rows.flatten(0, 1), columns=rows.shape[1], pad=2, scale=scale)}
    for stem, row in zip(stems, results):
        contents |= {f"{stem}-{seed + i}.png": image_grid(x[None]) for i, x in enumerate(row)}
    with disk_errors(str(folder), "What was written before is whole"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, image in contents.items():
            replace_file(folder / name, png_bytes(image))
    return [folder / name for name in contents]
