"""Tests of modules that mostly wait run between others, and none is lost."""

from support.order import spread


def of_modules(names: str) -> list[str]:
    """Two tests a letter: `a1`, `a2`."""
    return [f"{name}{number}" for name in names for number in (1, 2)]


def spread_by_case(names: str) -> list[str]:
    """Modules with capital letters wait."""
    return list(spread(of_modules(names), lambda item: item[0], str.isupper))


def test_three_others_stand_between_modules_that_wait():
    assert spread_by_case("ABabcdefgh") == of_modules("abcAdefBgh")


def test_what_is_left_over_comes_last():
    assert spread_by_case("aABCbc") == of_modules("abcABC")
    assert spread_by_case("AB") == of_modules("AB")
    assert spread_by_case("ab") == of_modules("ab")
