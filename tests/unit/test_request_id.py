import pytest

from resilience.decisions.request_id import Trace, accept_id, accept_traceparent, accept_tracestate

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
BAD_CHARACTERS = ["\x00", "\n", "\r", "\t", " ", '"', ",", ";", "\\", "<", "{", "\x7f", "\x85", "\u2028", "é", "\ud800"]


@pytest.mark.parametrize(
    "value",
    ["a", "a" * 128, "8e03978e-40d5-43dd-bc93-6894a57f9324", "1-5759e988-bd862e3fe1be46a994272793", "A.b_c:/+=@-9"],
)
def test_a_valid_id_is_taken_over_unchanged(value: str) -> None:
    assert accept_id(value) == value


@pytest.mark.parametrize("bad", BAD_CHARACTERS)
def test_an_id_with_a_character_out_of_the_list_is_refused_wherever_it_stands(bad: str) -> None:
    assert accept_id(bad + "id") is None
    assert accept_id("i" + bad + "d") is None
    assert accept_id("id" + bad) is None


@pytest.mark.parametrize("value", [None, "", "a" * 129])
def test_an_id_of_no_or_too_great_length_is_refused(value: str | None) -> None:
    assert accept_id(value) is None


@pytest.mark.parametrize(
    "value",
    [
        f"00-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-00",
        f"01-{TRACE}-{SPAN}-01",
        f"01-{TRACE}-{SPAN}-01-what-the-future-brings",
        f"fe-{TRACE}-{SPAN}-ff",
    ],
)
def test_a_valid_traceparent_is_taken_over_with_its_trace_id(value: str) -> None:
    assert accept_traceparent(value) == Trace(value, TRACE)


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        "00",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"01-{TRACE}-{SPAN}-01-",
        f"01-{TRACE}-{SPAN}-01more",
        f"01-{TRACE}-{SPAN}-01-{'x' * 129}",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN[:-1]}-01",
        f"00-{TRACE}-{SPAN}-01\n",
        f" 00-{TRACE}-{SPAN}-01",
        f"01-{TRACE}-{SPAN}-01-\x00",
    ],
)
def test_an_invalid_traceparent_is_refused(value: str | None) -> None:
    assert accept_traceparent(value) is None


@pytest.mark.parametrize("value", ["a=1", "a=1,b=2", " ", "~" * 512])
def test_a_printable_tracestate_is_taken_over(value: str) -> None:
    assert accept_tracestate(value) == value


@pytest.mark.parametrize("value", [None, "", "~" * 513, "a=\n", "a=\x00", "a=\x7f", "a=é"])
def test_an_unprintable_or_long_tracestate_is_refused(value: str | None) -> None:
    assert accept_tracestate(value) is None
