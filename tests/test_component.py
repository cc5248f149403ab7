from __future__ import annotations

import jsonschema
import pytest

from concept_unlearn.component import Component, Frozen, build
from concept_unlearn.edits import Clamp, DenseClamp, Edit, Relative
from concept_unlearn.errors import InvalidConfig, UnknownName
from concept_unlearn.features import Score
from concept_unlearn.gates import Gate
from concept_unlearn.methods import Method, Steer, Suppress
from concept_unlearn.objectives import Objective

FAMILIES: list[type[Component]] = [Edit, Gate, Score, Method, Objective]
REQUIRED = {
    "scale": {"by": -6.0},
    "shift": {"by": -1.0},
    "suppress": {"dictionaries": ("a",)},
    "steer": {"sites": ("resid_post.1",)},
    "ban": {"codebook": "a"},
    "finetune": {"objectives": ("ga",)},
    "crisp": {"dictionaries": ("a",)},
    "distil": {"teacher": {"kind": "ban", "codebook": "a"}},
    "offset": {"small": "a"},
    "split_merge": {"method": {"kind": "negate"}},
    "lower_features": {"dictionary": "a", "features": (1, 2)},
}
MEMBERS = [(family, member) for family in FAMILIES for member in family.members.values()]


def test_a_member_is_known_by_its_name_without_the_family():
    assert set(Gate.members) == {"always", "token", "sequence", "streaming", "probe"}
    assert Score.members["auc"].__name__ == "AUCScore"
    assert "_threshold" not in Gate.members


@pytest.mark.parametrize(("family", "member"), MEMBERS, ids=lambda c: c.__name__)
def test_every_spec_makes_an_equal_component(family, member):
    made = member(**REQUIRED.get(member.kind, {}))
    assert family.parse(made.spec()) == made
    assert family.parse(made) is made


@pytest.mark.parametrize(("family", "member"), MEMBERS, ids=lambda c: c.__name__)
def test_every_component_refuses_unknown_keys_and_names_the_known_ones(family, member):
    with pytest.raises(InvalidConfig, match="has no 'nonsense'; known: "):
        family.parse({"kind": member.kind, **REQUIRED.get(member.kind, {}), "nonsense": 1})


@pytest.mark.parametrize(("family", "member"), MEMBERS, ids=lambda c: c.__name__)
def test_every_component_is_frozen(family, member):
    made = member(**REQUIRED.get(member.kind, {}))
    for name in type(made).model_fields:
        with pytest.raises(ValueError, match="frozen"):
            setattr(made, name, None)


def test_an_unknown_kind_names_the_known_ones_and_guesses():
    with pytest.raises(UnknownName, match=r"no edit named 'clmp'; known: clamp, .*Did you mean 'clamp'\?"):
        Edit.parse("clmp")


@pytest.mark.parametrize("spec", [3, None, [], {"to": 1}])
def test_a_spec_without_a_kind_is_refused(spec):
    with pytest.raises(InvalidConfig, match="'kind'"):
        Edit.parse(spec)


def test_a_value_of_the_wrong_type_names_its_key():
    with pytest.raises(InvalidConfig, match="clamp: to"):
        Edit.parse({"kind": "clamp", "to": "much"})


def test_components_nest_as_plain_data():
    class Holder(Frozen):
        edit: Edit
        others: dict[str, Edit] = {}  # noqa: RUF012

    made = build(Holder, {"edit": "clamp", "others": {"a": {"kind": "dense_clamp", "to": {"of_norm": -0.5}}}})
    assert made.edit == Clamp()
    assert made.others["a"] == DenseClamp(to=Relative(-0.5))
    assert build(Holder, made.model_dump(mode="json")) == made


def test_the_schema_of_a_family_accepts_its_members_and_nothing_else():
    class Holder(Frozen):
        edit: Edit

    schema = Holder.model_json_schema()
    jsonschema.validate({"edit": {"kind": "clamp", "to": -3}}, schema)
    jsonschema.validate({"edit": "zero"}, schema)
    for wrong in ({"kind": "clmp"}, {"kind": "clamp", "too": 1}, "nothing"):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"edit": wrong}, schema)


def test_a_family_whose_members_hold_members_has_a_schema_that_ends():
    class Part(Component, family=True):
        pass

    class Whole(Part):
        inner: Part | None = None

    class Holder(Frozen):
        part: Part

    schema = Holder.model_json_schema()
    jsonschema.validate({"part": {"kind": "whole", "inner": {"kind": "whole", "inner": "whole"}}}, schema)
    for wrong in ({"kind": "hole"}, {"kind": "whole", "inner": {"kind": "hole"}}, {"kind": "whole", "outer": None}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"part": wrong}, schema)


def test_adding_a_member_makes_it_known_everywhere():
    class Halve(Edit):
        def __call__(self, acts, unit):
            return acts / 2

    try:
        assert isinstance(Edit.parse("halve"), Halve)
        assert Suppress.parse({"kind": "suppress", "dictionaries": ["a"], "edit": "halve"}).edit == Halve()
        assert Steer.parse({"kind": "steer", "sites": ["resid_post.1"], "edit": "halve"}).edit == Halve()
    finally:
        del Edit.members["halve"]
