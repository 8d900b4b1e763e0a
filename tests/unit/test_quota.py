from math import inf, nan
from typing import Any

import pytest

from resilience.decisions.quota import Algorithm, Quota
from resilience.errors import ConfigurationError


@pytest.mark.parametrize(
    ("text", "limit", "per"),
    [
        ("100/minute", 100, 60.0),
        ("5/10s", 5, 10.0),
        ("5 per 10 seconds", 5, 10.0),
        ("1/s", 1, 1.0),
        ("1/second", 1, 1.0),
        ("2/m", 2, 60.0),
        ("2 per 2 minutes", 2, 120.0),
        ("3/h", 3, 3600.0),
        ("3/hours", 3, 3600.0),
        ("4/d", 4, 86400.0),
        ("4/7days", 4, 7 * 86400.0),
        ("  8 / Minute ", 8, 60.0),
        ("2147483647/day", 2**31 - 1, 86400.0),
    ],
)
def test_a_quota_is_read_from_its_text(text: str, limit: int, per: float) -> None:
    assert Quota.parse(text) == (Quota(limit, per),)


@pytest.mark.parametrize("text", ["10/second and 1000/hour", "10/second;1000/hour", " 10/s ;  1000/h "])
def test_several_quotas_are_read_in_order(text: str) -> None:
    assert Quota.parse(text) == (Quota(10, 1), Quota(1000, 3600))


@pytest.mark.parametrize(
    "text",
    [
        "",
        ";",
        "100",
        "/minute",
        "100/fortnight",
        "-1/s",
        "1.5/s",
        "100/minute/hour",
        "1/s and",
        "5/ss",
        "99999999999/s",
    ],
)
def test_what_is_no_quota_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(ConfigurationError, match="100/minute"):
        Quota.parse(text)


@pytest.mark.parametrize("limit", [0, -1, 2**31, True, 1.0, "5"])
def test_a_limit_out_of_range_is_refused(limit: int) -> None:
    with pytest.raises(ConfigurationError, match="limit"):
        Quota(limit, 60)


@pytest.mark.parametrize("per", [0, 0.0009, -1, 366 * 86400 + 1, inf, -inf, nan])
def test_a_window_out_of_range_is_refused(per: float) -> None:
    with pytest.raises(ConfigurationError, match="window"):
        Quota(1, per)


@pytest.mark.parametrize("text", ["0/minute", "2147483648/minute", "1/0s", "1/367days"])
def test_a_text_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError):
        Quota.parse(text)


@pytest.mark.parametrize("per", [0.001, 366 * 86400])
@pytest.mark.parametrize("limit", [1, 2**31 - 1])
def test_the_ends_of_the_range_belong_to_it(limit: int, per: float) -> None:
    assert (Quota(limit, per).limit, Quota(limit, per).per) == (limit, per)


@pytest.mark.parametrize(
    ("quota", "name"),
    [
        (Quota(1, 1), "1/second"),
        (Quota(100, 60), "100/minute"),
        (Quota(5, 3600.0), "5/hour"),
        (Quota(5, 86400), "5/day"),
        (Quota(5, 10), "5/10s"),
        (Quota(5, 0.5), "5/0.5s"),
    ],
)
def test_a_quota_is_called_as_it_is_written(quota: Quota, name: str) -> None:
    assert quota.name == name


@pytest.mark.parametrize("per", [1, 7, 60, 90, 3600, 86400, 604800])
def test_a_name_reads_back_as_its_quota(per: int) -> None:
    assert Quota.parse(Quota(9, per).name) == (Quota(9, per),)


def test_quotas_are_equal_by_limit_and_window() -> None:
    assert Quota(5, 60) == Quota(5, 60.0)
    assert Quota(5, 60) != Quota(6, 60)
    assert Quota(5, 60) != Quota(5, 61)


def test_a_quota_is_a_strict_sliding_window_unless_it_says_otherwise() -> None:
    assert Quota(5, 60) == Quota(5, 60, algorithm="sliding_window")
    assert Quota(5, 60) != Quota(5, 60, algorithm="sliding_log")
    assert Quota(5, 60).capacity == 5


def test_a_token_bucket_names_its_burst() -> None:
    assert Quota(10, 60, algorithm="token_bucket", burst=1).capacity == 1
    assert Quota(10, 60, algorithm="token_bucket", burst=10).capacity == 10
    for burst in (None, 0, 11):
        with pytest.raises(ConfigurationError, match="burst"):
            Quota(10, 60, algorithm="token_bucket", burst=burst)


@pytest.mark.parametrize("algorithm", ["sliding_window", "sliding_log", "fixed_window"])
def test_a_burst_means_nothing_to_another_algorithm(algorithm: Algorithm) -> None:
    with pytest.raises(ConfigurationError, match="burst"):
        Quota(10, 60, algorithm=algorithm, burst=5)


def test_a_log_is_for_small_limits() -> None:
    assert Quota(256, 60, algorithm="sliding_log").limit == 256
    with pytest.raises(ConfigurationError, match="sliding_window"):
        Quota(257, 60, algorithm="sliding_log")


def test_a_calendar_quota_is_a_fixed_window() -> None:
    day, month = Quota(5, calendar="day"), Quota(5, calendar="month")
    assert (day.algorithm, day.per, day.name) == ("fixed_window", 86400.0, "5/day")
    assert (month.algorithm, month.per, month.name) == ("fixed_window", 31 * 86400.0, "5/month")


def test_a_quota_without_any_window_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="window"):
        Quota(5)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"per": 60, "calendar": "day"}, "stands for the window"),
        ({"calendar": "year"}, "'day' or 'month'"),
        ({"calendar": "day", "algorithm": "token_bucket"}, "stands for the window"),
        ({"per": 60, "algorithm": "leaky"}, "is none of sliding_window"),
        ({"per": 0.001, "algorithm": "token_bucket", "burst": 1}, "100000 a second"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        Quota(200, **options)
