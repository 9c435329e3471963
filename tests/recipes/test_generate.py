"""How seeds become samples."""

import torch

from undiffuse import NetworkDenoiser
from undiffuse.nets import MLP
from undiffuse.paths import Karras
from undiffuse.recipes.generate import Sampler
from undiffuse.recipes.schema import FactsSection, SamplingSection


def test_precision_lowers_the_networks_products_and_not_the_solver():
    torch.manual_seed(0)
    net = MLP([3], hidden=32)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    seen = []
    net.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].dtype))
    linears = [module for module in net.modules() if isinstance(module, torch.nn.Linear)]
    linears[-1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    facts = FactsSection(shape=[3], image=False, data="none", fingerprint="none")
    model = NetworkDenoiser(net, Karras(), "edm").requires_grad_(False)
    samples = {}
    for precision, product in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        section = SamplingSection(precision=precision, steps=4)
        samples[precision] = Sampler.of(model, facts, section)(range(16))
        assert set(seen) == {torch.float32, product}
        seen.clear()
    assert samples["bf16"].dtype == torch.float32
    difference = (samples["bf16"] - samples["fp32"]).abs().max() / samples["fp32"].std()
    assert 1e-5 < difference < 0.1
