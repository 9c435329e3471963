"""`undiffuse import`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from undiffuse.cli import options
from undiffuse.cli.console import Console


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A checkpoint, or a folder of diffusers.")],
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values of the recipe, such as data.path=FOLDER.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Configuration of score_sde, such as ve/cifar10_ncsnpp_continuous.")
    ] = None,
    flags: Annotated[str | None, typer.Option(help="MODEL_FLAGS of guided-diffusion, in quotes.")] = None,
    run: Annotated[
        Path | None, typer.Option("--run", metavar="DIR", help="Run folder. Default: runs/NAME-DATE-TIME.")
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Turn weights of another project into a run folder, for every solver and metric of this one.

    Reads score_sde_pytorch, guided-diffusion and improved-diffusion, diffusers' UNet2DModel, and EDM's networks once
    they are exported (their pickles carry code, which is never run: the message says how). Images are in [-1, 1].

    \b
    Examples:
      undiffuse import checkpoint_24.pth --config ve/cifar10_ncsnpp_continuous --run runs/ncsnpp
      undiffuse import ddpm-cifar10-32/ data.source=parquet data.path=cifar10/
      undiffuse import 64x64_diffusion.pt --flags "--image_size 64 --class_cond True --num_channels 192 ..."

    Exit codes: 0 done, 2 a wrong argument, 4 a file that is damaged, carries code, or is of another architecture.
    """
    from undiffuse.integrations.reading import import_weights
    from undiffuse.recipes.adopt import adopt

    screen = Console(json, quiet)
    found = import_weights(file, config=config, flags=flags)
    stem = re.sub(r"[^a-z0-9._-]+", "-", file.resolve().stem.lower()).strip("-._")[:64]
    model = {"net": {"name": "unet", **found.net}, "prediction": found.prediction, "sigma_data": found.sigma_data}
    name = stem or "imported"
    done = adopt(name, model, found.path, found.weights, folder=run, origin=file.name, changes=changes or ())
    parameters = sum(tensor.numel() for tensor in found.weights.values())
    screen.say(
        f"{file.name}: {found.net['shape']}, {parameters:,} numbers; path {found.path['name']}, prediction "
        f"{found.prediction}: {done.folder}"
    )
    for note in found.notes:
        screen.say(f"  {note}")
    screen.result({"run": str(done.folder), "parameters": parameters, "notes": list(found.notes)})
    screen.say(f"next:\n  undiffuse sample {done.folder}")
