"""Training speed of the U-Net beside its peers': forward, backward and Adam step, in one run.

    python benchmarks/training.py            # 2 threads, [64, 3, 32, 32], some 10 minutes
    python benchmarks/training.py --quick    # 2 rounds instead of 7; --only and --modes narrow it further

FLOPs are counted by torch at the dispatcher: convolutions and matrix products, twice the multiply-adds. "peak" is the
best square matrix product of the same type in the same run. The machine's own speed drifts, so every round measures
the peaks and then one step of each network in each mode, in turn, and medians over rounds are printed. All networks
run in one process with the same allocator setting (`undiffuse.nets.keep_freed_memory`; --default-allocator without).
torch's counter leaves out attention on a CPU, for all networks alike. On a CPU ours keeps channels last in any mode.
Peers that are not installed are left out, with a line that says so (pip install azula diffusers).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from undiffuse.nets import UNet, keep_freed_memory

Call = Callable[[nn.Module, Tensor, Tensor], Tensor]

# name -> (type of the matrix products, channels_last)
MODES = {
    "fp32": (torch.float32, False),
    "fp32 channels_last": (torch.float32, True),
    "bf16": (torch.bfloat16, False),
    "bf16 channels_last": (torch.bfloat16, True),
}


def ours() -> tuple[nn.Module, Call]:
    net = UNet([3, 32, 32], width=64, multipliers=[1, 1, 1], blocks=2)
    return net, lambda net, x, t: net(x, t)


def ours_two_levels() -> tuple[nn.Module, Call]:
    net = UNet([3, 32, 32], width=64, multipliers=[1, 2], blocks=1)
    return net, lambda net, x, t: net(x, t)


def azula() -> tuple[nn.Module, Call]:
    from azula.nn.unet import UNet as Peer

    net = Peer(3, 3, hid_channels=(64, 64, 64), hid_blocks=(4, 4, 4), mod_features=128)
    features = nn.Linear(1, 128)  # the peer leaves the noise embedding to its user
    net.add_module("features", features)
    return net, lambda net, x, t: net(x, net.get_submodule("features")(t[:, None]))


def diffusers() -> tuple[nn.Module, Call]:
    from diffusers.models.unets.unet_2d import UNet2DModel

    net = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=4,
        block_out_channels=(64, 64, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=16,
    )
    return net, lambda net, x, t: net(x, t).sample


NETWORKS = {
    "undiffuse UNet 64-64-64": ours,
    "undiffuse UNet 64-128": ours_two_levels,
    "azula UNet": azula,
    "diffusers UNet2DModel": diffusers,
}


@dataclass
class Case:
    """One network in one mode, with the seconds of its steps."""

    name: str
    mode: str
    net: nn.Module
    call: Call
    flop: float
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self):
        self.dtype, last = MODES[self.mode]
        self.format = torch.channels_last if last else torch.contiguous_format
        self.net.to(memory_format=self.format)  # pyright: ignore[reportCallIssue]
        self.adam = torch.optim.Adam(self.net.parameters(), lr=1e-4, fused=True)

    def step(self, x: Tensor, t: Tensor, target: Tensor) -> float:
        """Seconds of one training step."""
        x, target = (v.contiguous(memory_format=self.format) for v in (x, target))
        narrow = torch.autocast("cpu", self.dtype) if self.dtype != torch.float32 else contextlib.nullcontext()
        start = time.perf_counter()
        with narrow:
            loss = F.mse_loss(self.call(self.net, x, t).float(), target)
        loss.backward()
        self.adam.step()
        self.adam.zero_grad()
        return time.perf_counter() - start


def matmul_peak(dtype: torch.dtype, sizes=(1024, 2048, 3072), repeats: int = 3) -> float:
    """FLOP/s of the best square matrix product of a type."""
    best = 0.0
    for n in sizes:
        a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
        for _ in range(repeats):
            start = time.perf_counter()
            torch.mm(a, b)
            best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def count_flop(net: nn.Module, call: Call, x: Tensor, t: Tensor) -> float:
    """FLOPs of forward and backward, per image."""
    counter = FlopCounterMode(display=False)
    with counter:
        call(net, x[:2], t[:2]).sum().backward()
    net.zero_grad()
    return counter.get_total_flops() / 2


def build(names: list[str], modes: list[str], x: Tensor, t: Tensor) -> list[Case]:
    cases = []
    for name in names:
        for mode in modes:
            torch.manual_seed(0)
            try:
                net, call = NETWORKS[name]()
            except ImportError as error:
                print(f"{name}: left out, {error}")
                break
            cases.append(Case(name, mode, net, call, count_flop(net, call, x, t)))
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 rounds, for a look")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--default-allocator", action="store_true", help="leave the C library's allocator as it is")
    parser.add_argument("--only", nargs="*", default=[], help="networks whose name contains one of these words")
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=list(MODES))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kept = not options.default_allocator and keep_freed_memory()
    rounds = 2 if options.quick else options.rounds

    torch.manual_seed(0)
    x, target, t = (
        torch.randn(options.batch, 3, 32, 32),
        torch.randn(options.batch, 3, 32, 32),
        torch.rand(options.batch),
    )
    names = [n for n in NETWORKS if not options.only or any(word in n for word in options.only)]
    cases = build(names, options.modes, x, t)
    for case in cases:
        case.step(x, t, target)
    peaks: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(rounds):
        for dtype, found in peaks.items():
            found.append(matmul_peak(dtype))
        for case in cases:
            case.seconds.append(case.step(x, t, target))
    print(f"allocator keeps freed memory: {'yes' if kept else 'no'}")
    report(cases, {dtype: statistics.median(found) for dtype, found in peaks.items()}, options, rounds)


def report(cases: list[Case], peak: dict[torch.dtype, float], options, rounds: int) -> None:
    versions = [f"torch {torch.__version__}"]
    for package in ("azula", "diffusers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    print(
        f"{', '.join(versions)}; {options.threads} threads; batch {options.batch} of 3x32x32; {rounds} rounds, medians"
    )
    print(f"matmul peak: fp32 {peak[torch.float32] / 1e9:.0f} GFLOP/s, bf16 {peak[torch.bfloat16] / 1e9:.0f} GFLOP/s\n")
    print("| network | params | train GFLOP/img | mode | img/s | GFLOP/s | share of peak |")
    print("|---|--:|--:|---|--:|--:|--:|")
    share = {}
    for case in cases:
        rate = options.batch / statistics.median(case.seconds)
        size = sum(p.numel() for p in case.net.parameters())
        share[case.name, case.mode] = rate * case.flop / peak[case.dtype]
        print(
            f"| {case.name} | {size / 1e6:.2f}M | {case.flop / 1e9:.2f} | {case.mode} | {rate:.1f} "
            f"| {rate * case.flop / 1e9:.0f} | {share[case.name, case.mode]:.1%} |"
        )
    print("\nShare of peak, ours / the peer's, each in its better layout:")
    for kind in ("fp32", "bf16"):
        best: dict[str, float] = {}
        for (name, mode), value in share.items():
            if mode.startswith(kind):
                best[name] = max(value, best.get(name, 0.0))
        for name in [n for n in best if n.startswith("undiffuse")]:
            for peer in [n for n in best if not n.startswith("undiffuse")]:
                print(
                    f"  {kind}: {name} {best[name]:.1%}, {peer} {best[peer]:.1%}, ratio {best[name] / best[peer]:.2f}"
                )


if __name__ == "__main__":
    main()
