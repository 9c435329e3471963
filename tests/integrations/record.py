"""Runs the originals and writes `references.npz`: python tests/integrations/record.py FOLDER

FOLDER holds checkouts of score_sde_pytorch (cb1f359; its CUDA kernel replaced by `upfirdn2d_native`), guided-diffusion
(22e0df8) and edm (008a4e5); ml_collections and diffusers (0.42.1) are importable. Each original is given the planted
weights, image and labels of tests/integrations/planted.py. Not needed to run the tests.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from integrations import planted

STEPS = torch.tensor([3, 997])
TIMES = torch.tensor([0.02, 0.7])
SIGMAS = torch.tensor([0.3, 20.0])


def plant(net: torch.nn.Module) -> dict[str, list[int]]:
    """Give the network its weights; returns their names and shapes."""
    with torch.no_grad():
        kept = {n: t for n, t in net.state_dict().items() if not n.endswith(("resample_filter", "sigmas"))}
        for name, tensor in kept.items():
            tensor.copy_(planted.weight(name, tuple(tensor.shape)))
    net.eval()
    return {name: list(tensor.shape) for name, tensor in kept.items()}


def score_sde(config: str, changes: dict):
    models = importlib.import_module("models.utils")
    importlib.import_module("models.ncsnpp"), importlib.import_module("models.ddpm")
    options = importlib.import_module(f"configs.{config.replace('/', '.')}").get_config()
    options.model.update(changes)
    options.data.image_size = planted.SIZE
    net = models.get_model(options.model.name)(options)
    names = plant(net)
    if not options.training.continuous:
        return names, net(planted.image(), STEPS)
    return names, net(planted.image(), SIGMAS if config.startswith("ve") else 999 * TIMES)


def guided(flags: dict):
    sys.modules["mpi4py"] = types.SimpleNamespace(MPI=None)
    unet = importlib.import_module("guided_diffusion.unet")
    net = unet.UNetModel(
        flags["image_size"],
        3,
        flags["num_channels"],
        6,
        flags["num_res_blocks"],
        [planted.SIZE // int(flags["attention_resolutions"])],
        channel_mult=[int(m) for m in flags["channel_mult"].split(",")],
        num_classes=6,
        num_heads=flags.get("num_heads", 4),
        num_head_channels=flags.get("num_head_channels", -1),
        use_scale_shift_norm=flags.get("use_scale_shift_norm", True),
        resblock_updown=flags.get("resblock_updown", False),
        use_new_attention_order=flags.get("use_new_attention_order", False),
    )
    return plant(net), net(planted.image(), STEPS, planted.LABELS)


def edm(outside: str, arguments: dict):
    net = getattr(importlib.import_module("training.networks"), outside)(**arguments)
    labels = torch.eye(6)[planted.LABELS] if arguments.get("label_dim") else None
    return plant(net), net(planted.image(), SIGMAS, labels)


def diffusers(arguments: dict):
    net = importlib.import_module("diffusers").UNet2DModel(**arguments)
    labels = planted.LABELS if "num_class_embeds" in arguments else None
    return plant(net), net(planted.image(), STEPS, labels).sample


@torch.no_grad()
def main(folder: Path) -> None:
    sys.path[:0] = [str(folder / name) for name in ("score_sde_pytorch", "guided-diffusion", "edm")]
    found = {name: score_sde(*case) for name, case in planted.SCORE_SDE.items()}
    found |= {name: guided(case) for name, case in planted.GUIDED.items()}
    found |= {name: edm(*case) for name, case in planted.EDM.items()}
    found |= {name: diffusers(case) for name, case in planted.DIFFUSERS.items()}
    arrays = {}
    for name, (names, answer) in found.items():
        arrays[f"{name}/names"] = np.frombuffer(json.dumps(names).encode(), np.uint8)
        arrays[f"{name}/answer"] = answer.float().numpy()
        print(f"{name}: {len(names)} tensors, answer of rms {answer.square().mean().sqrt():.3f}")
    np.savez_compressed(planted.STORED, **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
