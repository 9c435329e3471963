"""Sums of tensors in few passes: against the plain formula, at every border, and nobody's tensor overwritten."""

from __future__ import annotations

import functools
import itertools
import math
from unittest import mock

import pytest
import torch
from torch.autograd import forward_ad

import undiffuse as ud
from solvers.measuring import F64, mixture, numbers
from undiffuse.core import sums
from undiffuse.core.errors import ArgumentError
from undiffuse.solvers import (
    DDIM,
    SOLVERS,
    Bound,
    Multistep,
    combine,
    get_solver,
    integrate,
    make_grid,
    sample,
    weighted_sum,
)
from undiffuse.solvers.polynomials import COORDINATES, flow_weights

LARGE = 16
SIZES = (1, LARGE - 1, LARGE, LARGE + 1, 3 * LARGE + 5)
WEIGHTS = (0.7, -1.3, 0.2, 2.1, -0.4)
# Where rounding changes no number of steps, and there are steps.
STEPWISE = [name for name in SOLVERS if name not in ("stay", "picard", "dopri5", "tsit5", "bosh3", "adaptive-sde")]


@pytest.fixture
def low_border():
    """What is large is so where small tensors are."""
    with mock.patch.object(sums, "_LARGE", LARGE), mock.patch.object(sums, "_WORTH_COMPILING", LARGE):
        yield


def plain(tensors, weights):
    return sum(w * x.to(F64) for w, x in zip(weights, tensors))


@pytest.mark.usefixtures("low_border")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("terms", range(1, 6))
def test_a_sum_is_the_plain_one_at_every_border_and_a_new_tensor(terms, size):
    tensors = [numbers(1, size, seed=seed).float() for seed in range(terms)]
    before = [x.clone() for x in tensors]
    with torch.no_grad():
        total = weighted_sum(tensors, WEIGHTS[:terms])
    assert torch.allclose(total.to(F64), plain(tensors, WEIGHTS), rtol=0, atol=2e-6)
    assert total.dtype == torch.float32
    assert all(map(torch.equal, tensors, before))
    assert all(total.data_ptr() != x.data_ptr() for x in tensors)


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1),
    "channels last": lambda x: x[None].contiguous(memory_format=torch.channels_last)[0],
    "every other": lambda x: x[:, :, ::2],
    "one row for all": lambda x: x[:, :1].expand(-1, 7, -1),
    "float64": lambda x: x.double(),
}


@pytest.mark.usefixtures("low_border")
@pytest.mark.parametrize("where", range(3))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sum_of_unlike_layouts_is_the_plain_one(layout, where):
    given = [numbers(7, 7, 14, seed=seed).float() for seed in range(3)]
    tensors = [x[:, :, ::2].contiguous() if layout == "every other" else x for x in given]
    tensors[where] = LAYOUTS[layout](given[where])
    with torch.no_grad():
        total = weighted_sum(tensors, WEIGHTS[:3])
    assert torch.allclose(total.to(F64), plain(tensors, WEIGHTS), rtol=0, atol=2e-6)


@pytest.mark.usefixtures("low_border")
def test_gradients_pass_through_a_large_sum():
    tensors = [numbers(3, 2 * LARGE, seed=seed).requires_grad_() for seed in range(3)]
    for total, weights in (
        (weighted_sum(tensors, WEIGHTS[:3]), WEIGHTS),
        (combine(*_paired(tensors, 0.3)), (0.3, 0.7)),
    ):
        found = torch.autograd.grad(total.sum(), tensors[: len(weights[:3])], allow_unused=True)
        for gradient, weight in zip(found, weights):
            assert gradient is not None
            assert torch.allclose(gradient, torch.full_like(gradient, weight), atol=1e-15)


def _paired(tensors, a):
    return tensors[0], a, tensors[1], 1 - a


@pytest.mark.usefixtures("low_border")
def test_narrow_types_of_autocast_do_not_reach_a_sum():
    tensors = [numbers(3, 2 * LARGE, seed=seed).float() for seed in range(3)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        total = weighted_sum(tensors, WEIGHTS[:3])
    assert torch.allclose(total.to(F64), plain(tensors, WEIGHTS), rtol=0, atol=2e-6)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("weights", [(0.3, 0.7), (0.3, 0.9), (1.0, -0.4), (0.3, 0.7, -1.1), WEIGHTS, (0.6,)])
def test_what_is_written_over_has_the_sum_and_the_others_stay(weights, fuse, request):
    request.getfixturevalue("fused" if fuse else "low_border")
    for size in SIZES:
        tensors = [numbers(1, size, seed=seed) for seed in range(len(weights))]
        wanted = plain(tensors, weights)
        for k in range(len(weights) + 1):
            given = [x.clone() for x in [*tensors, tensors[0]]]
            spent, others = given[k], [x for j, x in enumerate(given[:-1]) if j != k]
            before = [x.clone() for x in others]
            with torch.no_grad():
                total = weighted_sum(given[:-1], weights, spent)
            assert total is spent or (fuse and k == len(weights))
            assert torch.allclose(total, wanted, rtol=0, atol=1e-13)
            assert all(map(torch.equal, others, before))


@pytest.mark.usefixtures("low_border")
@pytest.mark.parametrize(("a", "b"), [(0.3, 0.7), (0.3, 0.9), (-1.0, 2.0), (1.0, 0.2), (0.0, 0.4)])
def test_two_are_combined(a, b):
    for size in SIZES:
        x, d = numbers(1, size), numbers(1, size, seed=1)
        wanted = a * x + b * d
        with torch.no_grad():
            assert torch.allclose(combine(x, a, d, b), wanted, atol=1e-14)
            assert combine(x, a, d, b, x) is x
        assert torch.allclose(x, wanted, atol=1e-14)
    assert not combine(math.nan * x, 0.0, d, b).isnan().any()


@pytest.mark.parametrize("a", [2.5e-5, 1 - 2.5e-5])
def test_weights_that_sum_to_1_keep_the_digits_of_both(a):
    """By the other weight 1 - a is rounded, to 6e-8 of a term 80 / 2.5e-5 times larger."""
    x, d = (numbers(100, seed=k).float() for k in (0, 1))
    x, d = (80 * x, d) if a < 0.5 else (x, 80 * d)
    error = combine(x, a, d, 1 - a).to(F64) - plain((x, d), (a, 1 - a))
    assert error.square().mean().sqrt() < 1e-7


def test_tensors_of_two_types_are_summed():
    x, d = numbers(1, 5).float(), numbers(1, 5, seed=1)
    assert torch.allclose(weighted_sum((x, d), (0.3, 0.7)).to(F64), plain((x, d), (0.3, 0.7)), atol=1e-6)


@pytest.mark.usefixtures("low_border")
def test_a_spent_tensor_of_another_layout_is_written_too():
    x, d = numbers(1, 3, 4, 5), numbers(1, 3, 4, 5, seed=1)
    spent = torch.empty_like(x, memory_format=torch.channels_last)
    with torch.no_grad():
        assert weighted_sum((x, d), (0.4, 0.3), spent) is spent
    assert torch.allclose(spent, 0.4 * x + 0.3 * d, atol=1e-15)


def test_with_gradients_nothing_is_written_over():
    x, d = numbers(1, 5).requires_grad_(), numbers(1, 5, seed=1)
    before = x.detach().clone()
    combine(x, 0.4, d, 0.9, x).sum().backward()
    assert torch.equal(x.detach(), before)
    assert torch.allclose(x.grad, torch.full_like(before, 0.4))


class Listening(ud.Denoiser):
    """Shrinks x; keeps what it was given and what it said, as it was and as it is. `alias`: says x itself."""

    def __init__(self, path, alias=False):
        super().__init__(path)
        self.alias = alias
        self.kept, self.copies = [], []

    def forward(self, x_t, t, cond=None):
        answer = x_t if self.alias else 0.3 * torch.tanh(x_t)
        self.kept += [x_t, answer]
        self.copies += [x_t.clone(), answer.clone()]
        return answer


@pytest.mark.usefixtures("low_border")
@pytest.mark.parametrize("watched", [False, True], ids=["alone", "watched"])
@pytest.mark.parametrize("alias", [False, True], ids=["own", "alias"])
@pytest.mark.parametrize("name", SOLVERS)
def test_no_tensor_that_others_hold_is_overwritten(name, alias, watched):
    if name == "stay":
        pytest.skip("it makes no step")
    field, x = Listening(ud.Karras(), alias), 80 * numbers(3, 2 * LARGE).float()
    states, before = [], x.clone()
    steps = {"noise": x, "solver": name, "steps": 6, "seed": 0}
    ud.sample(field, **steps, callback=(lambda step: states.append((step.x, step.x.clone()))) if watched else None)
    assert torch.equal(x, before)
    assert all(map(torch.equal, field.kept, field.copies))
    assert all(torch.equal(state, copy) for state, copy in states)


class Places(ud.Denoiser):
    """Shrinks x; knows where each x was that it was given. `keep`: what of an x it keeps."""

    def __init__(self, path, keep=None):
        super().__init__(path)
        self.keep = keep
        self.places, self.kept = [], []

    def forward(self, x_t, t, cond=None):
        self.places.append(x_t.data_ptr())
        if self.keep is not None:
            self.kept.append((self.keep(x_t), x_t.clone()))
        return 0.3 * x_t


class Net(torch.nn.Module):
    """The same as a network, its answers in one buffer."""

    def __init__(self):
        super().__init__()
        self.places, self.buffer = [], None

    def forward(self, x, label, cond=None):
        self.places.append(x.data_ptr())
        self.buffer = torch.tanh(x) if self.buffer is None else torch.tanh(x, out=self.buffer)
        return self.buffer


# How many states of a run, and what it remembers in their place, have a memory of their own.
OWN = {"euler": 1, "ddim": 1, "dpmpp-2m": 1, "unipc-2": 1, "abm-4": 1, "deis-2": 2, "ab3": 3}


@pytest.mark.usefixtures("low_border")
@pytest.mark.parametrize("name", OWN)
def test_states_that_no_one_else_holds_are_written_over(name):
    noise, steps = numbers(3, 2 * LARGE), {"solver": name, "steps": 12}
    exact = Places(ud.VP())
    ud.sample(exact, noise=noise, **steps)
    assert len(set(exact.places[-8:])) == OWN[name]
    assert len(set(exact.places[1:])) <= OWN[name] + 1
    for prediction in ("noise", "velocity") if name != "abm-4" else ():  # which chooses by sample here
        network = Net()
        ud.sample(ud.NetworkDenoiser(network, ud.VP(), prediction), noise=noise, **steps)
        assert len(set(network.places[-8:])) <= (1 if name in ("euler", "ddim") else 4)
    watched, seen = Places(ud.VP()), []
    ud.sample(watched, noise=noise, callback=lambda step: seen.append(step.x), **steps)
    assert len(set(watched.places)) == 12


KEEPING = {"itself": lambda x: x, "a slice": lambda x: x[1:], "an array": lambda x: x.numpy()}


@pytest.mark.usefixtures("low_border")
@pytest.mark.parametrize("keep", KEEPING.values(), ids=KEEPING)
@pytest.mark.parametrize("name", OWN)
def test_states_of_which_a_model_keeps_a_part_are_not(name, keep):
    field, noise = Places(ud.VP(), keep), numbers(3, 2 * LARGE)
    ud.sample(field, noise=noise, solver=name, steps=8)
    for kept, copy in field.kept:
        assert torch.equal(torch.as_tensor(kept), torch.as_tensor(keep(copy)))


def kept_by(step):
    """The step, made to keep all states that it is given, and makes."""
    kept = []

    @functools.wraps(step)
    def keeping(*args):
        moved, state = step(*args)
        kept.extend((x, x.clone()) for x in (args[-5], moved))
        assert all(torch.equal(a, b) for a, b in kept)
        return moved, state

    return keeping


@pytest.mark.usefixtures("low_border")
def test_a_solver_of_one_s_own_may_keep_its_states():
    class Overriding(DDIM):
        def step(self, *args):
            return keeping(self, *args)

    class Wrapping(DDIM):
        step = kept_by(DDIM.step)

    keeping, replaced = kept_by(DDIM.step), DDIM()
    object.__setattr__(replaced, "step", kept_by(replaced.step))
    for solver in (Overriding(), Wrapping(), replaced):
        ud.sample(Places(ud.VP()), noise=numbers(3, 2 * LARGE), solver=solver, steps=6)


@pytest.mark.usefixtures("low_border")
def test_a_corrector_may_keep_its_states():
    class Nudge:
        def __init__(self):
            self.kept = []

        def correct(self, field, x, t, noise):
            moved = 1.01 * x
            self.kept += [(x, x.clone()), (moved, moved.clone())]
            assert all(torch.equal(a, b) for a, b in self.kept)
            return moved

    ud.sample(Places(ud.VP()), noise=numbers(3, 2 * LARGE), solver="ddim", steps=6, corrector=Nudge())


@pytest.mark.usefixtures("low_border")
@pytest.mark.parametrize("name", ["dpmpp-2m", "deis-2", "unipc-2", "ab3"])
def test_a_step_of_one_s_own_leaves_its_state_as_it_was(name):
    solver, times = get_solver(name), make_grid(ud.VP(), 8, "angle")
    for field in (Places(ud.VP()), ud.NetworkDenoiser(Net(), ud.VP(), "noise")):
        bound, x, state = Bound(field, grid=times), numbers(3, 2 * LARGE), None
        with torch.no_grad():
            for t, s in itertools.pairwise(times[:5]):
                x, state = solver.step(bound, x, t, s, state, None)
            twice = [solver.step(bound, x, times[4], times[5], state, None)[0] for _ in range(2)]
        assert torch.equal(*twice)


@pytest.mark.usefixtures("low_border")
def test_the_last_answer_is_that_of_a_state_that_is_still_there():
    times = make_grid(ud.VP(), 6, "angle")[:5]
    for solver in ("ddim", "dpmpp-2m", "heun"):
        bound = Bound(ud.NetworkDenoiser(Net(), ud.VP(), "noise"), grid=times)
        states = []
        with torch.no_grad():
            integrate(bound, numbers(3, 2 * LARGE), times, get_solver(solver), callback=states.append)
            integrate(bound, numbers(3, 2 * LARGE), times, get_solver(solver))
        assert bound.denoised is None or torch.equal(bound.denoised, states[-1].denoised)
        assert solver == "heun" or bound.denoised is None


@pytest.mark.usefixtures("low_border")
@pytest.mark.parametrize("name", OWN)
def test_what_a_run_returns_is_the_caller_s(name):
    solver = get_solver(name)
    times = make_grid(ud.VP(), 6, "angle")
    bound = Bound(Places(ud.VP()), grid=times)
    with torch.no_grad():
        x = integrate(bound, numbers(3, 2 * LARGE), times[:4], solver)
        before = x.clone()
        solver.step(bound, x, times[3], times[4], None, None)
    assert torch.equal(x, before)


@pytest.mark.usefixtures("low_border")
@pytest.mark.parametrize("path", [ud.Linear(), ud.VP(), ud.Karras()], ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("name", STEPWISE)
def test_a_run_that_writes_over_its_states_is_the_one_that_does_not(name, path):
    noise = path.prior_std * numbers(40, 2)
    fields = [mixture().denoiser(path)]
    for prediction, own in itertools.product(("noise", "velocity", "data", "edm"), (ud.VP(), ud.Linear(), ud.Karras())):
        network = ud.NetworkDenoiser(Net(), own, prediction)
        fields += [network, ud.on_path(network, path)] if own == path else [ud.on_path(network, path)]
    for field in fields:
        asked = {"noise": noise, "solver": name, "steps": 7, "seed": 0}
        watched = sample(field, **asked, callback=lambda step: None)
        assert torch.allclose(sample(field, **asked), watched, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("low_border")
@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "edm", "dpmpp-2m", "deis-2", "ab3"])
def test_derivatives_forward_and_batches_pass_through_a_large_run(name):
    path = ud.Karras() if name == "edm" else ud.VP()
    field, x, along = mixture().denoiser(path), path.prior_std * numbers(40, 2), numbers(40, 2, seed=1)
    ran = functools.partial(ud.sample, field, solver=name, steps=6, seed=0)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(ran(noise=forward_ad.make_dual(x, along))).tangent
    step = 1e-5 * along
    assert torch.allclose(found, (ran(noise=x + step) - ran(noise=x - step)) / 2e-5, rtol=1e-6, atol=1e-7)
    times, solver = get_solver(name).default_grid(path, 6), get_solver(name).for_steps(6)
    with torch.no_grad():
        both = torch.func.vmap(lambda x: integrate(field, x, times, solver))(torch.stack([x, x + 0.1]))
    assert torch.allclose(both[0], ran(noise=x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", [ud.Linear(), ud.VP(), ud.Karras()], ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("name", STEPWISE)
def test_passes_change_a_run_by_rounding_only(name, path):
    """Of the sums of a run, all as large ones against none: in float64, where rounding is far below any error."""
    denoiser, x = mixture().denoiser(path), path.prior_std * numbers(40, 2)
    asked = {"noise": x, "solver": name, "steps": 7, "seed": 0}
    with mock.patch.object(sums, "_LARGE", LARGE):
        large = sample(denoiser, **asked)
    assert torch.allclose(large, sample(denoiser, **asked), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("turn", [0.5, 15 / 16, "data"])
@pytest.mark.parametrize("points", [1, 2])
def test_a_corrected_run_is_the_one_with_the_corrected_state_written_out(points, turn):
    """Predict, evaluate, correct on Linear from alpha = 0, with x as corrected a tensor of its own."""
    path, x = ud.Linear(), numbers(6, 2)
    denoiser, grid = mixture().denoiser(path), torch.tensor([1.0, 0.8, 0.55, 0.3, 0.1], dtype=F64)
    solver = Multistep(points, turn, "angle", scale=1.0)
    phi, field, state, now, found = solver.phi, Bound(denoiser), None, x, []
    for t, s in itertools.pairwise(grid):
        now, state = solver.step(field, now, t, s, state, None)
        found.append(now)

    def size(theta):
        return math.cos(theta - phi)

    def carried(y, start, end, nodes, values):
        weights = flow_weights(phi, "exact", tuple(nodes), (start, end), COORDINATES["angle"])
        scale = math.hypot(*_scales(path, end))
        ratio = scale * size(end) / (math.hypot(*_scales(path, start)) * size(start))
        return ratio * y + scale * size(end) * sum(w * v for w, v in zip(weights, values))

    thetas = [math.atan2(t, 1 - t) for t in grid.tolist()]
    # The first step: D at the angle that is asked instead of pi / 2, for x as pure noise.
    asked = max(math.atan(20.0), 0.5 * (thetas[0] + thetas[1]))
    u = path.time_of_angle(torch.tensor(asked, dtype=F64))
    first = denoiser(x * u, u)
    nodes, values = [asked], [math.cos(phi) * x - math.sin(phi) * first]
    corrected, predicted = x, (1 - grid[1]) * first + grid[1] * x
    for k, t in enumerate(grid[1:-1], start=1):
        assert torch.allclose(found[k - 1], predicted, rtol=1e-11, atol=1e-11)
        answer = denoiser(predicted, t)
        noise = (predicted - (1 - t) * answer) / t
        nodes = [thetas[k], *nodes][: points + 1]
        values = [math.cos(phi) * noise - math.sin(phi) * answer, *values][: points + 1]
        corrected = carried(corrected, thetas[k - 1], thetas[k], nodes, values)
        predicted = carried(corrected, thetas[k], thetas[k + 1], nodes[:points], values[:points])
    assert torch.allclose(found[-1], predicted, rtol=1e-11, atol=1e-11)


def _scales(path, theta):
    t = path.time_of_angle(torch.tensor(theta, dtype=F64))
    return float(path.alpha(t)), float(path.sigma(t))


@pytest.fixture
def fused(low_border):
    """Compiled sums; by no compiler, for what it is given is what counts."""
    torch.compiler.reset()  # what other tests compiled counts towards a limit
    sums.fuse_sums(backend="eager")
    yield
    sums.fuse_sums(on=False)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("terms", [1, 2, 3, 6, 7, 12, 13])
def test_a_fused_sum_is_the_plain_one_and_a_new_tensor(terms, size):
    tensors = [numbers(1, size, seed=seed % 5) for seed in range(terms)]
    tensors[-1] = tensors[0]
    weights = [(-1) ** k * (0.3 + k) for k in range(terms)]
    before = [x.clone() for x in tensors]
    with torch.no_grad():
        total = weighted_sum(tensors, weights)
    assert torch.allclose(total, plain(tensors, weights), rtol=0, atol=1e-11)
    assert total.shape == tensors[0].shape
    assert all(map(torch.equal, tensors, before))
    assert all(total.data_ptr() != x.data_ptr() for x in tensors)


@pytest.mark.usefixtures("fused")
def test_large_sums_are_fused_where_no_gradient_is_asked():
    made = mock.Mock(side_effect=sums._sum)
    tensors = [numbers(3, 2 * LARGE, seed=seed) for seed in range(3)]
    with mock.patch.object(sums, "_kernels", sums._Kernels({3: made}, {})), torch.no_grad():
        weighted_sum(tensors, WEIGHTS[:3])
        assert made.call_count == 1
        weighted_sum(tensors[:2], WEIGHTS[:2])
        weighted_sum([x[:, ::2] for x in tensors], WEIGHTS[:3])
        weighted_sum([x[:1, :5] for x in tensors], WEIGHTS[:3])
        with torch.enable_grad():
            weighted_sum(tensors, WEIGHTS[:3])
        assert made.call_count == 1


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("name", ["dpmpp-2m", "deis-3", "unipc-2", "rk4", "heun", "abm-4"])
def test_a_run_with_fused_sums_is_the_same(name):
    exact = mixture().denoiser(ud.VP())
    network = ud.NetworkDenoiser(Says(exact), ud.VP(), "noise")
    noise, fields = numbers(40, 2), (exact, network)
    fused = [sample(field, noise=noise, solver=name, steps=7) for field in fields]
    sums.fuse_sums(on=False)
    for field, x in zip(fields, fused):
        assert torch.allclose(x, sample(field, noise=noise, solver=name, steps=7), rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("fused")
def test_each_number_of_terms_has_code_of_its_own_so_that_torch_goes_on_compiling():
    """Torch stops after 8 variants of one code."""
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for mode, dtype in itertools.product((torch.no_grad, torch.inference_mode), (torch.float32, F64)):
            with mode():
                for terms in range(3, 7):
                    tensors = [numbers(3, 2 * LARGE, seed=seed).to(dtype) for seed in range(terms)]
                    weights = [0.5 + k for k in range(terms)]
                    weighted_sum(tensors, weights)
                    weighted_sum(tensors, weights, tensors[1])


@pytest.mark.usefixtures("fused")
def test_where_nothing_compiles_that_is_said_at_once_and_sums_stay_plain():
    def broken(graph, inputs):
        raise RuntimeError("no compiler found\nat all")

    torch.compiler.reset()
    with pytest.raises(ArgumentError, match=r"(?s)cannot be compiled by.*no compiler found.*do without fuse_sums"):
        sums.fuse_sums(backend=broken)
    assert sums._kernels is None
    with pytest.raises(ArgumentError, match="'nonsense' on this machine"):
        sums.fuse_sums(backend="nonsense")


class Says(torch.nn.Module):
    """A network of the noise, its label the time; its answers lie in one buffer."""

    def __init__(self, exact):
        super().__init__()
        self.exact, self.buffer = exact, None

    def forward(self, x, label, cond=None):
        said = self.exact.noise(x, (label / 1000).clamp(min=1e-3))
        self.buffer = said if self.buffer is None else self.buffer.copy_(said)
        return self.buffer


@pytest.mark.slow
def test_a_sum_is_compiled():
    tensors = [numbers(256, 4096, seed=seed).float() for seed in range(4)]
    try:
        sums.fuse_sums()
        with torch.no_grad():
            total = weighted_sum(tensors, WEIGHTS[:4])
    finally:
        sums.fuse_sums(on=False)
    assert torch.allclose(total.to(F64), plain(tensors, WEIGHTS), rtol=0, atol=2e-6)
