"""The peers' samplers, run on the worlds of `solver_truth.py`: diffusers, azula, flow_matching and k-diffusion.

Each starts exactly on the true trajectory at its own first scales, and what it returns is compared with the true end:
its error is that of its steps and of its own stopping rule. "exact": the model is told the scheduler's sigma rather
than its time, which diffusers rounds. The rows are those that were best at some number of calls among about 8,000
pairs of solver and schedule (all four libraries and EDM), the best of each library, and what is usual for networks.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from solver_truth import Setting
from torch import Tensor

# A run of at most so many calls: what it returns, or None where the method needs more.
Run = Callable[[Setting, int], Tensor | None]


@dataclass(frozen=True)
class Peer:
    library: str
    name: str
    run: Run

    def __str__(self) -> str:
        return f"{self.library} {self.name}"


# ---------------------------------------------------------------------- azula


def azula(sampler: str, order: int, schedule: str, low: float, high: float) -> Peer:
    def run(case: Setting, calls: int) -> Tensor:
        samplers = importlib.import_module("azula.sample")
        peers = importlib.import_module("azula.denoise")
        scales = getattr(importlib.import_module("azula.noise"), f"{schedule}Schedule")(low, high)

        class Exact(peers.Denoiser):
            def __init__(self):
                super().__init__()
                self.schedule = scales

            def forward(self, x_t: Tensor, t: Tensor, **extras: object) -> Any:
                return peers.DiracPosterior(case.mean(x_t, *scales(t)))

        walk = getattr(samplers, f"{sampler}Sampler")(
            Exact(), order=order, steps=calls, silent=True, dtype=torch.float64
        )
        return walk(case.start(*scales(walk.timesteps[0])))

    return Peer("azula", f"{sampler}(order {order}) {schedule}({low:g}, {high:g})", run)


# ---------------------------------------------------------------------- diffusers


def diffusers(name: str, scheduler: str, exact: bool = False, **options: Any) -> Peer:
    flow = options.get("use_flow_sigmas", False)
    if flow:
        options["prediction_type"] = "flow_prediction"

    def scales(sigma: float) -> tuple[float, float]:
        return (1 - sigma, sigma) if flow else ((1 + sigma**2) ** -0.5, sigma * (1 + sigma**2) ** -0.5)

    def run(case: Setting, calls: int) -> Tensor:
        made = getattr(importlib.import_module("diffusers"), f"{scheduler}Scheduler")(**options)
        made.set_timesteps(calls)
        table = ((1 - made.alphas_cumprod.double()) / made.alphas_cumprod.double()).sqrt()
        x = case.start(*scales(float(made.sigmas[0])))
        for i, t in enumerate(made.timesteps):
            told = float(made.sigmas[i]) if exact else float(t) / 1000 if flow else float(table[int(t)])
            alpha, sigma = scales(told)
            x_0 = case.mean(x, alpha, sigma)
            eps = (x.double() - alpha * x_0) / sigma
            x = made.step(eps - x_0 if flow else eps, t, x, return_dict=False)[0]
        return x

    return Peer("diffusers", name + (" (exact)" if exact else ""), run)


def diffusers_edm(name: str, **options: Any) -> Peer:
    def run(case: Setting, calls: int) -> Tensor:
        made = importlib.import_module("diffusers").EDMDPMSolverMultistepScheduler(**options)
        made.set_timesteps(calls)
        x, scale = case.start(1, float(made.sigmas[0])), made.config["sigma_data"]
        for i, t in enumerate(made.timesteps):
            sigma = float(made.sigmas[i])
            spread = sigma**2 + scale**2
            x_0 = case.mean(x, 1, sigma)
            answer = (x_0 - scale**2 / spread * x.double()) * (spread**0.5 / (sigma * scale))
            x = made.step(answer, t, x, return_dict=False)[0]
        return x

    return Peer("diffusers", name, run)


# ---------------------------------------------------------------------- flow_matching


def flow_matching(method: str, stages: int) -> Peer:
    def run(case: Setting, calls: int) -> Tensor | None:
        steps = calls // stages
        if steps == 0:
            return None
        solver = importlib.import_module("flow_matching.solver").ODESolver

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            x_0, eps = case.both(x, t, 1 - t)  # their time is 1 at the data
            return x_0 - eps

        grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        return solver(velocity).sample(case.start(0, 1), step_size=None, method=method, time_grid=grid)

    return Peer("flow_matching", f"{method} uniform t", run)


# ---------------------------------------------------------------------- k-diffusion


def k_diffusion_sampling(folder: Path | None) -> Any:
    """The module `k_diffusion.sampling`, installed or of a checkout; there alone, without the package's other needs.

    Raises:
        ImportError: neither is there.
    """
    if folder is None:
        return importlib.import_module("k_diffusion.sampling")
    name = "k_diffusion_alone"
    if f"{name}.sampling" in sys.modules:
        return sys.modules[f"{name}.sampling"]
    file = folder / "k_diffusion" / "sampling.py"
    if not file.exists():
        raise ImportError(f"no {file}")
    try:
        importlib.import_module("torchsde")
    except ImportError:  # only its Brownian tree, for samplers that draw noise
        sys.modules["torchsde"] = types.ModuleType("torchsde")
    package, utils = types.ModuleType(name), types.ModuleType(f"{name}.utils")
    package.__path__ = []
    vars(utils)["append_dims"] = lambda x, ndim: x.reshape(x.shape + (1,) * (ndim - x.ndim))
    sys.modules |= {name: package, f"{name}.utils": utils}
    spec = importlib.util.spec_from_file_location(f"{name}.sampling", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def k_diffusion(folder: Path | None, sampler: str, schedule: str, low: float, stages: int = 1, **options: Any) -> Peer:
    """With n calls: `n / stages` steps of an equal number of calls, but for the last, which is Euler's."""

    def run(case: Setting, calls: int) -> Tensor:
        peer = k_diffusion_sampling(folder)
        steps = (calls + stages - 1) // stages
        sigmas = getattr(peer, f"get_sigmas_{schedule}")(steps, low, 80.0).double()
        x, walk = case.start(1, sigmas[0]), getattr(peer, f"sample_{sampler}")
        return walk(lambda x, s: case.mean(x, 1, s[0]), x, sigmas, disable=True, **options)

    words = "(eta 0)" if "eta" in options else ""
    return Peer("k-diffusion", f"{sampler}{words} {schedule}({low:g}, 80)", run)


# ---------------------------------------------------------------------- the rows

_EXPONENTIAL = {"use_exponential_sigmas": True}
_FLOW = {"use_flow_sigmas": True}


def peers(folder: Path | None = None) -> list[Peer]:
    """`folder`: a checkout of k-diffusion."""
    multistep, unipc = "DPMSolverMultistep", "UniPCMultistep"
    return [
        *(azula("zEAB", 3, "VE", low, 80) for low in (0.002, 0.01, 0.03)),
        azula("zEAB", 2, "VE", 0.03, 80),
        azula("zEAB", 2, "Rectified", 0.01, 0.01),
        azula("zEAB", 2, "Cosine", 0.01, 0.01),
        azula("REAB", 2, "VE", 0.03, 80),
        azula("xEAB", 4, "VE", 0.01, 80),
        azula("vAB", 2, "VE", 0.01, 80),
        azula("vAB", 3, "VE", 0.03, 80),
        azula("vAB", 3, "Rectified", 0.01, 0.01),
        azula("vAB", 3, "Rectified", 0.001, 0.001),
        azula("vAB", 4, "VE", 0.03, 80),
        azula("vAB", 4, "Rectified", 0.01, 0.01),
        azula("vAB", 4, "Rectified", 0.001, 0.001),
        azula("vAB", 4, "Cosine", 0.01, 0.01),
        diffusers("DPMSolver++(2) flow", multistep, exact=True, solver_order=2, **_FLOW),
        diffusers("UniPC(2) flow", unipc, solver_order=2, **_FLOW),
        diffusers("UniPC(3) flow", unipc, solver_order=3, **_FLOW),
        diffusers("UniPC(3) flow", unipc, exact=True, solver_order=3, **_FLOW),
        diffusers("UniPC(2) exponential", unipc, exact=True, solver_order=2, **_EXPONENTIAL),
        diffusers(
            "DPMSolver(2) exponential",
            multistep,
            algorithm_type="dpmsolver",
            final_sigmas_type="sigma_min",
            **_EXPONENTIAL,
        ),
        diffusers("DEIS(3) exponential", "DEISMultistep", solver_order=3, **_EXPONENTIAL),
        diffusers_edm(
            "EDM DPMSolver++(3) exponential(0.03, 80)",
            solver_order=3,
            solver_type="heun",
            sigma_min=0.03,
            sigma_schedule="exponential",
        ),
        flow_matching("midpoint", 2),
        flow_matching("heun3", 3),
        flow_matching("rk4", 4),
        k_diffusion(folder, "dpmpp_3m_sde", "exponential", 0.03, eta=0.0, noise_sampler=lambda *_: 0.0),
        # What is usual for networks.
        *(k_diffusion(folder, "dpmpp_2m", schedule, 0.002) for schedule in ("karras", "exponential")),
        k_diffusion(folder, "heun", "karras", 0.002, stages=2),
        diffusers("DPMSolver++(2) karras", multistep, exact=True, solver_order=2, use_karras_sigmas=True),
        diffusers("UniPC(2) karras", unipc, exact=True, solver_order=2, use_karras_sigmas=True),
    ]
