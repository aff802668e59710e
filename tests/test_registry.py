import pytest

from hf_distill.registry import Registry


@pytest.fixture
def colours():
    registry = Registry("colour")
    registry.register("red", 1)
    registry.register("green", 2)
    registry.register("blue", 3)
    return registry


def test_entries_are_found_by_name_in_registration_order(colours):
    assert colours.get("green") == 2
    assert colours.names() == ("red", "green", "blue")
    assert list(colours) == ["red", "green", "blue"]
    assert len(colours) == 3
    assert "red" in colours
    assert "violet" not in colours


def test_a_taken_name_is_refused_and_its_entry_stays(colours):
    with pytest.raises(ValueError, match="colour 'red' is already registered"):
        colours.register("red", 9)
    assert colours.get("red") == 1


def test_an_unknown_name_lists_the_known_and_suggests_the_nearest(colours):
    with pytest.raises(ValueError, match=r"Unknown colour 'gren'\. Did you mean 'green'\? Known: red, green, blue\."):
        colours.get("gren")


def test_a_name_like_no_other_gets_no_suggestion(colours):
    with pytest.raises(ValueError, match=r"Unknown colour 'xyzzy'\. Known: red, green, blue\."):
        colours.get("xyzzy")


def test_an_empty_registry_says_that_it_knows_none():
    with pytest.raises(ValueError, match=r"Known: none\."):
        Registry("colour").get("red")
