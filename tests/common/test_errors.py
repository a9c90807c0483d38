"""Errors for people are one line and name the nearest match."""

import socket

from diffalign.common.errors import Interrupted, UserError, brief, nearest, unknown


def test_user_error_is_one_line() -> None:
    assert str(UserError("first\n  second\tthird")) == "first second third"


def test_unknown_names_the_nearest_match_and_everything_known() -> None:
    error = unknown("objective", "dpoo", ["sft", "dpo"])
    assert str(error) == "unknown objective 'dpoo': did you mean 'dpo'? known: dpo, sft"
    assert str(unknown("scorer", "zzz", ["clip"])) == "unknown scorer 'zzz': known: clip"
    assert str(unknown("scorer", "clip", [])) == "unknown scorer 'clip': known: none"


def test_nearest_is_none_when_nothing_is_close() -> None:
    assert nearest("bta", ["beta", "gamma"]) == "beta"
    assert nearest("xyz", ["beta", "gamma"]) is None


def test_nearest_is_close_to_what_was_typed() -> None:
    """Of the keys of evaluate the nearest to cache is batch_size, by 8 of 15 letters."""
    assert nearest("cache", ["batch_size", "mode", "data"]) is None
    assert nearest("rollout", ["out"]) is None
    assert nearest("split", ["limit"]) is None
    assert nearest("dpx", ["dpo", "mapo"]) == "dpo"
    assert nearest("colour", ["color", "count"]) == "color"


def test_interrupted_passes_through_except_exception() -> None:
    assert issubclass(Interrupted, KeyboardInterrupt) and not issubclass(Interrupted, Exception)
    assert Interrupted(15).signal_number == 15


def test_a_long_error_becomes_one_bearable_line() -> None:
    assert brief(ValueError("one\n  two\n")) == "one two"
    assert brief(KeyError()) == "KeyError"
    assert brief(ValueError("x" * 301)) == "x" * 297 + "..."


def test_a_library_that_calls_a_file_missing_without_a_network_is_set_right() -> None:
    try:
        try:
            raise socket.gaierror(-2, "Name or service not known")
        except OSError as cause:
            raise OSError("it has no file named model_index.json") from cause
    except OSError as error:
        said = brief(error)
    assert said == (
        "it has no file named model_index.json (the network was not reached: [Errno -2] Name or service not "
        "known)"
    )
