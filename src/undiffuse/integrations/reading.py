"""Files of other projects: opened without running anything, and recognised by what they hold."""

from __future__ import annotations

import json
import pickle
import pickletools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from undiffuse.core.errors import ArgumentError, CheckpointError
from undiffuse.integrations.diffusers import diffusers
from undiffuse.integrations.edm import EXPORT, edm
from undiffuse.integrations.guided_diffusion import guided_diffusion, read_flags
from undiffuse.integrations.imported import Imported
from undiffuse.integrations.rules import mapping
from undiffuse.integrations.score_sde import CONFIGS, score_sde

_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# What opening a damaged file can raise.
_DAMAGES = (RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError, AttributeError, AssertionError)


def import_weights(place: str | Path, *, config: str | None = None, flags: str | None = None) -> Imported:
    """The network in a file or folder of another project.

    Args:
        place: a checkpoint of score_sde_pytorch, a model of guided-diffusion or improved-diffusion, an exported network
            of EDM (`undiffuse.integrations.edm.EXPORT` writes it), or a folder of diffusers with a `UNet2DModel`.
        config: of score_sde: the name of its configuration, such as "ve/cifar10_ncsnpp_continuous".
        flags: of guided-diffusion: its MODEL_FLAGS, as on its command line.

    Raises:
        ArgumentError: nothing there that is known, or `config` or `flags` are missing or wrong.
        CheckpointError: a file that is damaged, that carries code, or of another architecture.
    """
    place = Path(place).expanduser()
    if place.is_dir():
        return _folder(place)
    content = read_file(place)
    names = [str(name) for name in content] if isinstance(content, Mapping) else []
    if {"class", "arguments", "weights"} <= set(names):
        return edm(content)
    if "model" in names or any("all_modules." in name for name in names):
        if config is None:
            raise ArgumentError(
                f"{place} is of score_sde_pytorch, whose files do not say which network they are for: give its "
                f"configuration, one of {', '.join(CONFIGS)}"
            )
        return score_sde(content, config)
    if any(name.startswith("input_blocks.") for name in names):
        if flags is None:
            raise ArgumentError(
                f"{place} is of guided-diffusion, whose files do not say which network they are for: give the "
                "MODEL_FLAGS of its command line, such as '--image_size 64 --class_cond True ...'"
            )
        return guided_diffusion(content, read_flags(flags))
    raise ArgumentError(
        f"{place} holds {', '.join(names[:3]) or type(content).__name__}, ...: neither score_sde_pytorch, "
        "guided-diffusion nor an exported network of EDM; of diffusers give the folder"
    )


def read_file(file: Path) -> Any:
    """Tensors and plain values of a safetensors file or of one that `torch.save` wrote; code is refused.

    Raises:
        ArgumentError: no such file. CheckpointError: damaged, or a pickle that names code.
    """
    if not file.is_file():
        raise ArgumentError(f"there is no file {file}: expected a checkpoint (.pt, .pth, .safetensors)")
    instead = _instead(file)
    if instead is not None:
        raise CheckpointError(f"{file} cannot be read: {instead}")
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except SafetensorError as error:
            raise CheckpointError(f"{file} cannot be read as safetensors{_if_text(file) or f': {error}'}") from error
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (*_DAMAGES, pickle.UnpicklingError) as error:
        if isinstance(error, pickle.UnpicklingError) and _names_code(file, str(error)):
            raise CheckpointError(f"{file} is {_refused(error)}") from error
        what = f"{file} cannot be read (truncated, altered, or no checkpoint)"
        raise CheckpointError(f"{what}{_if_text(file) or f': {_first_line(error)}'}") from error


def _names_code(file: Path, said: str) -> bool:
    """Whether a pickle was refused for what it names, rather than because it is damaged. Nothing of it is run."""
    codes, names = _codes(file), {"GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"}
    with open(file, "rb") as stream:
        head = stream.read(2)
    if head != b"PK" and head[:1] != b"\x80":  # any text may begin like an old pickle: it counts when it ends as one
        return bool(names & codes) and "STOP" in codes
    return bool(names & codes) or "Unsupported global" in said or "Unsupported class" in said


def _codes(file: Path) -> set[str]:
    """The kinds of instructions of a pickle, up to its end or its first fault."""
    found = set()
    with open(file, "rb") as stream:
        try:
            for code, _, _ in pickletools.genops(stream):
                found.add(code.name)
        except Exception:  # anything can be wrong in a file that is no pickle
            pass
    return found


def _instead(file: Path) -> str | None:
    """What a file that cannot be a checkpoint is, and what to do, where its first bytes say so."""
    with open(file, "rb") as stream:
        head = stream.read(512).lstrip()
    if not head:
        return "it is empty. Get it again"
    if head.startswith(b"version https://git-lfs"):
        return (
            "it is a pointer of git-lfs, a few lines in the place of the checkpoint. Run 'git lfs pull' in the folder "
            "it was cloned to, then this again"
        )
    return "it is a web page. Download the file itself" if head.startswith(b"<") else None


def _if_text(file: Path) -> str:
    """What else a damaged file may be: a text. Then a reader's own words, which are of pickles, say nothing."""
    with open(file, "rb") as stream:
        head = stream.read(512)
    return ", it is text" if all(byte in b"\t\n\r" or 32 <= byte < 127 or byte > 127 for byte in head) else ""


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _refused(error: Exception) -> str:
    """Why a pickle is not opened, and what to do."""
    reason = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), "")
    return (
        f"a pickle that names code{f' ({reason})' if reason else ''}: refused, since opening it would run that code. "
        "Where you trust the file, write its tensors alone with its own project's code, and import those:\n"
        f"  torch.save(net.state_dict(), 'weights.pt')\nFor a network of EDM, python export.py NETWORK.pkl weights.pt "
        f"with this export.py, in EDM's repository:\n{EXPORT}"
    )


def _folder(folder: Path) -> Imported:
    """A pipeline of diffusers (`unet/`, `scheduler/`), or its model's folder alone."""
    model = folder / "unet" if (folder / "unet" / "config.json").is_file() else folder
    weights = next((model / name for name in _WEIGHTS if (model / name).is_file()), None)
    if not (model / "config.json").is_file() or weights is None:
        raise ArgumentError(f"{folder} is no folder of diffusers: expected config.json beside {' or '.join(_WEIGHTS)}")
    places = [model / "scheduler_config.json", model.parent / "scheduler" / "scheduler_config.json"]
    scheduler = next((_json(file) for file in places if file.is_file()), None)
    config = _json(model / "config.json")
    kind = config.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise ArgumentError(f"{model / 'config.json'} is of a {kind}: only UNet2DModel can be imported")
    return diffusers(read_file(weights), config, scheduler)


def _json(file: Path) -> dict[str, Any]:
    try:
        return dict(mapping(json.loads(file.read_text(encoding="utf-8")), str(file)))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON, or too deep: {error}") from error
