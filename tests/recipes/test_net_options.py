"""Options that networks got after there were runs: a recipe of then is the same recipe now."""

import undiffuse as ud
from undiffuse.nets.resampling import Halve

# What run folders of version 0.1.0 have under model.net, before filters and progressive images.
OF_THEN = {
    "name", "width", "multipliers", "blocks", "attention", "middle_attention", "head_width", "num_classes", "cond_dim",
    "embedding", "noise_scale", "noise_features", "embedding_width", "modulation", "resample", "skip_rescale",
    "dropout", "out_channels",
}  # fmt: skip


def test_a_recipe_of_then_is_written_as_it_was():
    assert set(ud.load_recipe("digits").settings.model.net) == OF_THEN
    said = ud.load_recipe("digits", ["model.net.resample_filter=[1, 1]", "model.net.heads=null"])
    assert said == ud.load_recipe("digits")


def test_what_is_not_as_usual_is_written_and_built(tmp_path):
    changed = ud.load_recipe("digits", ["model.net.resample_filter=[1, 3, 3, 1]"])
    assert set(changed.settings.model.net) == OF_THEN | {"resample_filter"}
    (tmp_path / "recipe.yaml").write_text(changed.to_yaml())
    again = ud.load_recipe(tmp_path / "recipe.yaml")
    assert again == changed
    filters = [m.taps for m in again.model().modules() if isinstance(m, Halve)]
    assert filters == [(0.125, 0.375, 0.375, 0.125)]
