"""Chapter 4 in one dimension: the forward SDE, the reverse-time SDE and the PF-ODE move one family of densities.

Above: paths of each over p_t (eq. 4.1.3, 4.1.6 and 4.1.7). Below left: the density solves the Fokker-Planck equation of
all three (Theorem 4.1.1); one whose modes are 1 % too wide solves none. Middle: the law at the end. Right: what is not
the same, the joint law of the two ends. The reverse SDE is the forward process read backwards; the PF-ODE has its
marginals only.
"""

from pathlib import Path

import torch
from drawing import BLUE, GREEN, INK, ORANGE, RED, SHADE, command, plt, save
from torch import Tensor

from undiffuse import VP, ForwardSDE, GaussianMixture, ReverseSDE, Streams, euler_maruyama, fokker_planck_residual
from undiffuse.metrics import energy_test

F64 = torch.float64
LAW = GaussianMixture(
    torch.tensor([[-1.5], [0.6], [1.6]], dtype=F64),
    torch.tensor([0.25, 0.2, 0.3], dtype=F64),
    torch.tensor([0.45, 0.2, 0.35], dtype=F64),
)
PATH = VP()
LIMIT, SHOWN = 3.6, 9  # of x in the pictures; paths in each
SNAPSHOT = 70  # percent of the steps: where the correlation is compared, t = 0.49


def main(out: Path | None = None, n: int = 2000, steps: int = 500) -> dict[str, float]:
    """Largest Fokker-Planck residuals, laws at the end, and correlations of the two ends of a path."""
    field = LAW.denoiser(PATH)
    processes = {"forward": ForwardSDE(PATH), "reverse": ReverseSDE(field), "PF-ODE": ReverseSDE(field, eta=0.0)}
    times = PATH.t_low + (1 - PATH.t_low) * torch.linspace(0, 1, steps + 1, dtype=F64).square()
    states = simulate(processes, times, n)
    residuals = {name: residual(sde, LAW) for name, sde in processes.items()}
    wide = GaussianMixture(LAW.flat_means, 1.01 * LAW.variances.sqrt()[:, 0], LAW.weights)
    wrong = {name: residual(sde, wide) for name, sde in processes.items()}
    data = LAW.sample(n, Streams.of(8, n))
    correlations = {name: correlation(x) for name, x in states.items()}
    value = {f"Fokker-Planck residual, {name}": float(r[1].max()) for name, r in residuals.items()}
    value["residual of modes 1 % too wide, mean"] = sum(float(r[1].mean()) for r in wrong.values()) / 3
    for name in ("reverse", "PF-ODE"):
        test = energy_test(states[name][0], data)
        value[f"{name}: energy distance / 99 % of null"] = test.distance / test.quantile
    end = float(times[SNAPSHOT * steps // 100])
    alpha, sigma = (float(v(torch.tensor(end, dtype=F64))) for v in (PATH.alpha, PATH.sigma))
    spread = float(LAW.covariance)
    value["correlation of the ends, closed form"] = alpha * spread**0.5 / (alpha**2 * spread + sigma**2) ** 0.5
    value |= {f"correlation of the ends, {name}": float(c[SNAPSHOT * steps // 100]) for name, c in correlations.items()}
    if out is not None:
        draw(out, times, states, residuals, wrong, correlations)
    return value


def simulate(processes, times: Tensor, n: int) -> dict[str, Tensor]:
    """States of each process at all times, (steps + 1, n, 1), the time growing with the row."""
    first, last = (LAW.perturbed(PATH, t) for t in (times[0], times[-1]))
    states = {
        "forward": euler_maruyama(processes["forward"], first.sample(n, Streams.of(1, n)), times, Streams.of(2, n))
    }
    for k, name in enumerate(("reverse", "PF-ODE")):
        start = last.sample(n, Streams.of(3 + k, n))
        states[name] = euler_maruyama(processes[name], start, times.flip(0), Streams.of(5 + k, n)).flip(0)
    return states


def correlation(states: Tensor) -> Tensor:
    """Of the state at each time with the state nearest to the data."""
    centred = states[:, :, 0] - states[:, :, 0].mean(1, keepdim=True)
    return (centred * centred[0]).mean(1) / (centred.square().mean(1) * centred[0].square().mean()).sqrt()


def residual(sde, law: GaussianMixture, points: int = 200) -> tuple[Tensor, Tensor]:
    """Times, and the largest relative residual at each over a line of x."""
    t = PATH.t_low + (1 - PATH.t_low) * torch.linspace(0.001, 0.999, 60, dtype=F64)
    x = torch.linspace(-LIMIT, LIMIT, points, dtype=F64)
    grid = torch.cartesian_prod(t, x)
    value = fokker_planck_residual(sde, lambda x, t: law.log_prob_at(x, PATH, t), grid[:, 1:], grid[:, 0].contiguous())
    return t, value.abs().reshape(len(t), points).max(1).values


def draw(out: Path, times: Tensor, states, residuals, wrong, correlations) -> None:
    fig, ((*above,), (left, middle, right)) = plt.subplots(2, 3, figsize=(8, 4.9), layout="constrained")
    t = torch.linspace(PATH.t_low, 1, 240, dtype=F64)
    x = torch.linspace(-LIMIT, LIMIT, 181, dtype=F64)
    grid = torch.cartesian_prod(x, t)
    density = LAW.log_prob_at(grid[:, :1], PATH, grid[:, 1].contiguous()).exp().reshape(len(x), len(t))
    titles = ("Forward SDE: data to noise", "Reverse SDE: noise to data", "PF-ODE: no noise of its own")
    colours = (ORANGE, RED, GREEN)
    for ax, paths, title, colour in zip(above, states.values(), titles, colours):
        ax.imshow(
            density.sqrt(), origin="lower", extent=(0, 1, -LIMIT, LIMIT), aspect="auto", cmap=SHADE, alpha=0.8,
            interpolation="bilinear",
        )  # fmt: skip
        # Paths that end evenly over the data, so that every mode is seen.
        order = paths[0, :, 0].argsort()[torch.linspace(0, paths.shape[1] - 1, SHOWN + 2).long()[1:-1]]
        ax.plot(times, paths[:, order, 0], color=colour, linewidth=0.7, alpha=0.9)
        ax.set(title=title, xlabel="$t$", ylim=(-LIMIT, LIMIT), xlim=(0, 1))
    above[0].set_ylabel("$x$")
    for (name, (at, value)), colour in zip(residuals.items(), colours):
        left.semilogy(at, value, color=colour, label=name)
        left.semilogy(at, wrong[name][1], color=colour, linestyle=":")
    left.set(title="Fokker-Planck residual", xlabel="$t$", ylim=(1e-17, 10), yticks=[1e-16, 1e-12, 1e-8, 1e-4, 1])
    left.legend(loc="center left", bbox_to_anchor=(0, 0.42), title="dotted: modes 1 % too wide", title_fontsize=8)
    bins = torch.linspace(-3, 3, 61, dtype=F64)
    middle.plot(x, LAW.perturbed(PATH, PATH.t_low).log_prob(x[:, None]).exp(), color=INK, linewidth=1, label="data")
    for name, colour in zip(("reverse", "PF-ODE"), colours[1:]):
        middle.hist(states[name][0, :, 0], bins, density=True, histtype="step", color=colour, label=name)
    middle.set(title="At the end", xlabel="$x$", xlim=(-3, 3))
    middle.legend(loc="upper right", handlelength=1.2)
    for (name, value), colour in zip(correlations.items(), (BLUE, RED, GREEN)):
        right.plot(times, value, color=colour, label=name, linestyle="--" if name == "reverse" else "-")
    right.set(title="Correlation of $x_t$ and $x_0$", xlabel="$t$", ylim=(-0.05, 1.05))
    right.legend(loc="center right", bbox_to_anchor=(1, 0.68))
    save(fig, out, "04_sde")


if __name__ == "__main__":
    command(main, __doc__)
