"""Energy networks: derivatives of both modes, the slope under spectral norm, conditions, state, what they learn."""

import copy

import pytest
import torch
from safetensors.torch import load, save

from undiffuse.core.autodiff import quadratic_form
from undiffuse.core.errors import ArgumentError
from undiffuse.fields.energy import NetworkEnergy
from undiffuse.nets.energy import EnergyConv, EnergyMLP

MAKERS = {
    "mlp": lambda **more: EnergyMLP([2, 3], 16, 2, **more),
    "conv": lambda **more: EnergyConv([3, 8, 12], 4, (1, 2), **more),
}


def made(name, dtype=torch.float64, **more):
    torch.manual_seed(0)
    return MAKERS[name](**more).to(dtype)


def points(net, n, seed=1, dtype=torch.float64):
    return torch.randn(n, *net.shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def fit(net, steps, draw, energy):
    """Least squares; then 64 fresh x and their energies."""
    adam = torch.optim.Adam(net.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for step in range(steps):
        x = draw(torch.Generator().manual_seed(step))
        loss = (net(x, torch.zeros(len(x))) - energy(x)).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
    x = draw(torch.Generator().manual_seed(10**6))
    return x, energy(x)


def layers_of(net):
    return [m for m in net.modules() if hasattr(m, "parametrizations")]


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_first_and_second_derivatives_are_those_of_differences(name, normed):
    energy = NetworkEnergy(made(name, spectral_norm=normed)).eval()
    x, v = points(energy.net, 5), points(energy.net, 5, seed=2)
    h = 1e-5
    slope = (energy(x + h * v) - energy(x - h * v)) / (2 * h)
    torch.testing.assert_close(-(energy.score(x) * v).flatten(1).sum(1), slope, rtol=1e-6, atol=1e-9)
    bend = ((energy.score(x + h * v) - energy.score(x - h * v)) / (2 * h) * v).flatten(1).sum(1)
    forms = [quadratic_form(energy.score, x, v, mode)[1] for mode in ("forward", "reverse")]
    assert bend.abs().min() > 1e-5
    torch.testing.assert_close(forms[0], bend, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(forms[0], forms[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MAKERS)
def test_a_new_layer_hands_on_the_variance(name):
    """Wide layers: the energy of standard normals varies by 1 to 3, whatever the depth; torch's own start: 0.1."""
    spreads = []
    for depth in (1, 3):
        torch.manual_seed(0)
        net = EnergyMLP(64, 512, depth) if name == "mlp" else EnergyConv([1, 16, 16], 64, (1,) * depth)
        x = points(net, 256, dtype=torch.float32)
        spreads.append(float(net(x, torch.zeros(256)).detach().std()))
    assert all(0.5 < spread < 8 for spread in spreads), spreads


@pytest.mark.parametrize("name", MAKERS)
def test_spectral_norm_makes_every_largest_singular_value_one(name):
    net = made(name, spectral_norm=True)
    x = points(net, 2)
    with torch.no_grad():
        for layer in layers_of(net):
            layer.parametrizations.weight.original.mul_(3)
        for _ in range(300):
            net(x, torch.zeros(2))
    net.eval()
    found = [float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) for layer in layers_of(net)]
    assert len(found) == {"mlp": 4, "conv": 6}[name]
    assert found == pytest.approx([1.0] * len(found), abs=3e-3)


def test_spectral_norm_bounds_the_slope():
    """`|grad E| <= 1.1^(layers + 1)`, at random weights and at weights that push against the bound."""
    net = made("mlp", spectral_norm=True, num_classes=2)
    energy = NetworkEnergy(net)
    adam = torch.optim.Adam(net.parameters(), 0.05)
    for step in range(150):
        loss = -energy.score(points(net, 64, seed=step)).flatten(1).norm(dim=1).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    with torch.no_grad():
        for _ in range(100):
            net(points(net, 2), torch.zeros(2, dtype=torch.float64))
        steepest = float(energy.eval().score(3 * points(net, 5000)).flatten(1).norm(dim=1).max())
    assert 0.9 < steepest < 1.1**3 * 1.01


@pytest.mark.parametrize("name", MAKERS)
def test_spectral_norm_survives_a_checkpoint_and_stands_still_in_evaluation(name):
    net = made(name, torch.float32, spectral_norm=True, num_classes=3)
    x, c = points(net, 4, dtype=torch.float32), torch.zeros(4)
    for _ in range(5):
        net(x, c)
    fresh = MAKERS[name](spectral_norm=True, num_classes=3)
    fresh.load_state_dict(load(save(net.state_dict())))
    twin = copy.deepcopy(net)
    # in training mode each call moves the estimate: alike in all copies
    first, second = net(x, c), net(x, c)
    for other in (fresh, twin):
        assert torch.equal(other(x, c), first)
        assert torch.equal(other(x, c), second)
    assert not torch.equal(first, second)
    net.eval()
    kept = {key: value.clone() for key, value in net.state_dict().items()}
    assert torch.equal(net(x, c), net(x, c))
    assert all(torch.equal(value, kept[key]) for key, value in net.state_dict().items())
    assert torch.equal(copy.deepcopy(net)(x, c), net(x, c))


@pytest.mark.parametrize("name", MAKERS)
def test_a_copy_shares_nothing(name):
    net = made(name)
    x, c = points(net, 3), torch.zeros(3, dtype=torch.float64)
    twin, before = copy.deepcopy(net), net(x, c)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1)
    assert torch.equal(net(x, c), before)
    assert not torch.equal(twin(x, c), before)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_labels_change_the_energy_and_minus_one_is_none(name, normed):
    net = made(name, num_classes=3, spectral_norm=normed).eval()
    x = points(net, 1).expand(4, *net.shape)
    c = torch.zeros(4, dtype=torch.float64)
    labelled = net(x, c, torch.tensor([-1, 0, 1, 2]))
    assert torch.pdist(labelled[:, None]).min() > 1e-6
    plain = net(x, c)
    torch.testing.assert_close(labelled[:1], plain[:1], rtol=1e-12, atol=1e-12)
    # the shift of the energy depends on x too: a label is more than a constant
    other = points(net, 1, seed=9).expand(4, *net.shape)
    moved = net(other, c, torch.tensor([-1, 0, 1, 2]))
    assert ((labelled[1:] - labelled[0]) - (moved[1:] - moved[0])).abs().min() > 1e-6


def test_the_perceptron_learns_an_energy_per_label_and_noise_level():
    """`E(x) = |x - m_y|^2 / (2 (1 + c))`, m = (0, 0) without label: error under 2 % of its variance.

    A net blind to c is left with 9 %, to the label with more.
    """
    torch.manual_seed(0)
    net = EnergyMLP(2, 64, 2, num_classes=2)
    means = torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.0, 0.0]])

    class Told(torch.nn.Module):  # x, c and the label travel in one tensor
        def forward(self, row, _):
            return net(row[:, :2], row[:, 2], row[:, 3].long())

        def parameters(self):
            return net.parameters()

    def draw(g, n=256):
        label = torch.randint(-1, 2, (n, 1), generator=g)
        return torch.cat([torch.randn(n, 2, generator=g), torch.rand(n, 1, generator=g), label], 1)

    def energy(row):
        return (row[:, :2] - means[row[:, 3].long()]).square().sum(1) / (2 * (1 + row[:, 2]))

    row, target = fit(Told(), 300, draw, energy)
    assert float((Told()(row, None) - target).detach().square().mean() / target.var()) < 0.02


def test_the_convolutional_energy_learns_where_things_are():
    """Left half minus right half, of variance 1: error under 0.2. A net blind to places is left with 1."""
    torch.manual_seed(0)
    net = EnergyConv([2, 8, 8], 8, (1, 2))
    x, target = fit(
        net,
        200,
        lambda g: torch.randn(64, 2, 8, 8, generator=g),
        lambda x: 32**0.5 * (x[..., :4].mean((1, 2, 3)) - x[..., 4:].mean((1, 2, 3))),
    )
    assert float((net(x, torch.zeros(len(x))) - target).detach().square().mean() / target.var()) < 0.2


def test_sizes_28_and_8_and_what_does_not_divide():
    for shape, multipliers in (([1, 28, 28], (1, 2)), ([1, 8, 8], (1, 1, 1)), ([5, 28, 8], (2, 1))):
        net = EnergyConv(shape, 4, multipliers)
        x = points(net, 3, dtype=torch.float32)
        together, alone = net(x, torch.zeros(3)), torch.cat([net(row[None], torch.zeros(1)) for row in x])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        ArgumentError, match=r"28x28 with 3 levels.* divisible by 8; pad them to 32x32, or use 2 levels"
    ):
        EnergyConv([1, 28, 28], 4, (1, 2, 2))
    with pytest.raises(ArgumentError, match=r"7x8 with 1 levels.* divisible by 2; pad them to 8x8$"):
        EnergyConv([1, 7, 8], 4, (1,))


def test_wrong_arguments_are_refused():
    with pytest.raises(ArgumentError, match=r"built for \(B, 2\)"):
        EnergyMLP(2)(torch.zeros(4, 3), torch.zeros(4))
    with pytest.raises(ArgumentError, match=r"built for \(B, 1, 8, 8\)"):
        EnergyConv([1, 8, 8])(torch.zeros(4, 3, 8, 8), torch.zeros(4))
    with pytest.raises(ArgumentError, match="hidden=0"):
        EnergyMLP(2, 0)
    with pytest.raises(ArgumentError, match=r"takes \[channels, height, width\]"):
        EnergyConv([8, 8])
    with pytest.raises(ArgumentError, match=r"multipliers=\[\]"):
        EnergyConv([1, 8, 8], 8, ())
    with pytest.raises(ArgumentError, match=r"this network knows 0 \.\.\. 2"):
        EnergyMLP(2, num_classes=3)(torch.zeros(2, 2), torch.zeros(2), torch.tensor([0, 3]))
    with pytest.raises(ArgumentError, match="built without a condition"):
        EnergyMLP(2)(torch.zeros(2, 2), torch.zeros(2), torch.tensor([0, 1]))
