"""The text of recipes: YAML that is either what it seems or refused, and overrides."""

import pytest

from undiffuse.core.errors import RecipeError
from undiffuse.recipes.text import MAX_BYTES, apply_overrides, dump_tree, flatten, merged, parse_yaml, read_tree


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),  # YAML 1.1 reads a string
        ("3", 3),
        ("-0.5", -0.5),
        ("no", "no"),  # YAML 1.1 reads false
        ("true", True),
        ("null", None),
        ("", None),
        ("'1e-3'", "1e-3"),
        ("[1, 2.5, heun]", [1, 2.5, "heun"]),
        ("{name: vp, beta_min: 0.1}", {"name": "vp", "beta_min": 0.1}),
        ("2024-01-01", "2024-01-01"),  # not a date object
        ("1_000", "1_000"),  # not a number in disguise
    ],
)
def test_scalars_are_read_as_yaml_1_2(text, value):
    found = parse_yaml(text, "here")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "tree",
    [
        {"a": 1e-8, "b": 1e22, "c": 5.0, "d": 5, "e": "5", "f": "true", "g": True, "h": None, "i": "null", "j": ""},
        {"a": {"b": {"c": [[1, 2], [3, 4.5]]}}, "text": "two\nlines: with # signs", "long": "word " * 80},
        {"empty": {}, "none": [], "date": "2024-01-01", "tilde": "~", "odd": "'\"{}[]&*!|>%@`"},
    ],
)
def test_dump_then_parse_is_the_identity(tree):
    back = parse_yaml(dump_tree(tree), "dumped")
    assert back == tree
    assert {k: type(v) for k, v in flatten(back).items()} == {k: type(v) for k, v in flatten(tree).items()}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' is given twice"),
        ("s:\n  x: 1\n  x: 2", "line 3: the key 'x' is given twice"),
        ("a: &n [1]\nb: *n", "alias"),
        ("a: !!python/object/apply:os.system ['true']", "line 1, column 4"),
        ("1: x", "the key '1' is not a name"),
        ("a: [1, 2", "line 1"),
        ("[" * 3000, "recipe"),
    ],
)
def test_what_is_refused_names_the_place(text, says):
    with pytest.raises(RecipeError) as error:
        parse_yaml(text, "my.yaml")
    assert says in str(error.value)
    assert "my.yaml" in str(error.value)


def test_a_python_tag_is_not_executed(tmp_path):
    witness = tmp_path / "witness"
    with pytest.raises(RecipeError):
        parse_yaml(f"a: !!python/object/apply:os.mkdir ['{witness}']", "evil.yaml")
    assert not witness.exists()


def test_files_that_are_no_recipe(tmp_path):
    big, binary, listed = tmp_path / "big.yaml", tmp_path / "binary.yaml", tmp_path / "list.yaml"
    big.write_text("# " + "x" * MAX_BYTES)
    binary.write_bytes(b"\xff\xfe\x00a")
    listed.write_text("- 1\n- 2\n")
    for file, says in (
        (big, "at most"),
        (binary, "cannot read"),
        (listed, "sections"),
        (tmp_path / "no", "no recipe file"),
    ):
        with pytest.raises(RecipeError, match=says):
            read_tree(file)


def test_overrides_set_deep_values_and_leave_the_original_alone():
    tree = {"a": {"b": 1, "list": [1, 2]}, "net": "unet"}
    changed = apply_overrides(tree, ["a.b=2", "a.c.d=[x, 1e-2]", "net.width=64", "a.list=[]", "e="])
    assert changed == {
        "a": {"b": 2, "list": [], "c": {"d": ["x", 0.01]}},
        "net": {"name": "unet", "width": 64},
        "e": None,
    }
    assert tree == {"a": {"b": 1, "list": [1, 2]}, "net": "unet"}


def test_an_override_may_hold_an_equals_sign():
    assert apply_overrides({}, ["data.path=/x/a=b"]) == {"data": {"path": "/x/a=b"}}


def test_a_mapping_of_overrides_is_taken_as_it_is():
    assert apply_overrides({"a": {"b": 1}}, {"a.b": "2"}) == {"a": {"b": "2"}}


@pytest.mark.parametrize("text", ["steps", "=3", "a..b=1", ".a=1", "a.=1"])
def test_what_is_no_override(text):
    with pytest.raises(RecipeError, match="key=value"):
        apply_overrides({}, [text])


def test_an_override_through_a_number_and_a_bare_string():
    with pytest.raises(RecipeError, match=r"'a.b' is the value 1"):
        apply_overrides({"a": {"b": 1}}, ["a.b.c=2"])
    with pytest.raises(RecipeError, match="list of"):
        apply_overrides({}, "a=1")


@pytest.mark.parametrize(
    ("base", "changes", "expected"),
    [
        ({"a": 1, "b": 2}, {"b": 3, "c": 4}, {"a": 1, "b": 3, "c": 4}),
        ({"a": {"x": 1, "y": {"z": 2}}}, {"a": {"y": {"w": 3}}}, {"a": {"x": 1, "y": {"z": 2, "w": 3}}}),
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
        ({"a": {"x": 1}}, {"a": None}, {"a": None}),
        # A choice: the same name keeps its arguments, another one drops them.
        (
            {"p": {"name": "vp", "beta_min": 0.1}},
            {"p": {"beta_max": 9}},
            {"p": {"name": "vp", "beta_min": 0.1, "beta_max": 9}},
        ),
        ({"p": {"name": "vp", "beta_min": 0.1}}, {"p": {"name": "vp"}}, {"p": {"name": "vp", "beta_min": 0.1}}),
        ({"p": {"name": "vp", "beta_min": 0.1}}, {"p": {"name": "ve"}}, {"p": {"name": "ve"}}),
        ({"p": {"name": "vp", "beta_min": 0.1}}, {"p": "ve"}, {"p": "ve"}),
        ({"p": "vp"}, {"p": {"beta_max": 9}}, {"p": {"name": "vp", "beta_max": 9}}),
        ({"p": "vp"}, {"p": {"name": "ve", "sigma_min": 1}}, {"p": {"name": "ve", "sigma_min": 1}}),
        ({"o": {"time": "uniform"}}, {"o": {"name": "noise-contrastive"}}, {"o": {"name": "noise-contrastive"}}),
        # So with a kind, where both say one.
        (
            {"m": {"kind": "energy", "net": "a", "p": 1}},
            {"m": {"kind": "b", "net": "c"}},
            {"m": {"kind": "b", "net": "c"}},
        ),
        (
            {"m": {"kind": "energy", "p": 1}},
            {"m": {"kind": "energy", "q": 2}},
            {"m": {"kind": "energy", "p": 1, "q": 2}},
        ),
        ({"m": {"kind": "energy", "p": 1}}, {"m": {"q": 2}}, {"m": {"kind": "energy", "p": 1, "q": 2}}),
        ({"m": {"p": 1}}, {"m": {"kind": "denoiser", "q": 2}}, {"m": {"p": 1, "kind": "denoiser", "q": 2}}),
    ],
)
def test_what_a_recipe_extends_is_merged(base, changes, expected):
    before = dump_tree(base), dump_tree(changes)
    assert merged(base, changes) == expected
    assert (dump_tree(base), dump_tree(changes)) == before
