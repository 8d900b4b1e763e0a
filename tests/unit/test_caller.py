import pytest

from resilience.call import Call
from resilience.caller import address_group, api_key, by_address, by_caller
from resilience.context import RequestContext


class Sent:
    def __init__(self, **values: str) -> None:
        self.sent = {name.replace("_", "-"): value for name, value in values.items()}

    def get(self, name: str) -> str | None:
        return self.sent.get(name)

    def get_all(self, name: str) -> list[str]:
        return [self.sent[name]] if name in self.sent else []


def call(peer: str | None = "10.0.0.1", **sent: str) -> Call:
    return Call("http", "GET /", Sent(**sent), peer=peer)


def nobody(_call: Call) -> str | None:
    return None


def test_an_api_key_is_never_kept_itself() -> None:
    name = by_caller(call(x_api_key="s3cret"), RequestContext(), api_key())
    assert name.startswith("id:")
    assert "s3cret" not in name


def test_one_api_key_is_one_caller_and_another_is_another() -> None:
    identify = api_key("x-partner")
    assert identify(call(x_partner="a")) == identify(call(x_partner="a", peer="10.0.0.2"))
    assert identify(call(x_partner="a")) != identify(call(x_partner="b"))
    assert identify(call(x_partner="\ud800")) != identify(call(x_partner="\ud801"))


@pytest.mark.parametrize("sent", [{}, {"x_api_key": ""}])
def test_a_call_without_a_key_shows_no_identity(sent: dict[str, str]) -> None:
    assert api_key()(call(**sent)) is None


def test_the_user_comes_before_the_identity_and_the_identity_before_the_address() -> None:
    context, sent = RequestContext("r", "c"), call(x_api_key="k")
    assert by_caller(call(), context, api_key()) == "addr:10.0.0.1"
    assert by_caller(sent, context, api_key()).startswith("id:")
    context.set_user("ann", "acme")
    assert by_caller(sent, context, api_key()) == "user:4:acme:ann"


def test_no_two_users_of_two_tenants_have_one_name() -> None:
    users = [("b:c", "a"), ("c", "a:b"), ("c", "a:b:"), (":c", "a:b"), ("a:b:c", None), ("a:b:c", "1:")]
    names = set()
    for user, tenant in users:
        context = RequestContext("r", "c", user_id=user, tenant_id=tenant)
        names.add(by_caller(call(), context, nobody))
    assert len(names) == len(users)


def test_nobodys_user_is_still_a_user_of_the_application() -> None:
    assert by_caller(call(), RequestContext("r", "c", user_id=""), nobody) == "user:0::"


def test_a_call_without_an_address_has_a_name() -> None:
    assert by_address(call(peer=None)) == by_address(call(peer="")) == "addr:"


@pytest.mark.parametrize(
    ("address", "group"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("::FFFF:0a00:0001", "10.0.0.1"),
        ("10.0.0.1%a:b", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("testclient", "testclient"),
        ("x" * 100, "x" * 64),
        ("no:address:" + "x" * 100, ("no:address:" + "x" * 100)[:64]),
    ],
)
def test_an_address_is_counted_with_its_group(address: str, group: str) -> None:
    assert address_group(address) == group


def test_neighbours_of_one_64_are_one_caller_and_of_two_are_two() -> None:
    assert by_address(call(peer="2001:db8::1")) == by_address(call(peer="2001:db8::ffff:1"))
    assert by_address(call(peer="2001:db8::1")) != by_address(call(peer="2001:db8:0:1::1"))
