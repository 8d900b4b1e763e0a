"""The probe's command line, read as Go reads flags, so that a command made for grpc_health_probe means the same here.

``argparse`` can't: to Go ``-tls host`` is a switch and a word, and ``-service -x`` an option and its value.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urlsplit

from resilience.errors import ConfigurationError

_DURATION = re.compile(r"(?:(?:\d+(?:\.\d*)?|\.\d+)(?:ns|us|µs|μs|ms|s|m|h))+", re.ASCII)
_PART = re.compile(r"([\d.]+)([^\d.]+)", re.ASCII)
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_LONGEST = 2**63 / 1e9  # Seconds; Go counts nanoseconds in 64 bits.
_SWITCH = {
    **dict.fromkeys(("1", "t", "T", "TRUE", "true", "True"), True),
    **dict.fromkeys(("0", "f", "F", "FALSE", "false", "False"), False),
}
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_PORTS = {"http": 80, "https": 443}


def _flag(default: Any, told: str) -> Any:
    return field(default=default, metadata={"help": told})


@dataclass(frozen=True, slots=True)
class ProbeOptions:
    """What to ask, and how. Each field that has a help is the flag of its name; timeouts are seconds over 0."""

    addr: str = _flag("", "host:port to ask over gRPC; a target does instead")
    service: str = _flag("", "the gRPC service to ask about; the whole server by default")
    user_agent: str = _flag("resilience-probe", "the user-agent of the request")
    connect_timeout: float = _flag(1.0, "how long connecting may take, such as 500ms or 1m30s")
    rpc_timeout: float = _flag(1.0, "how long the answer may take")
    rpc_header: tuple[tuple[str, str], ...] = _flag((), "'name: value' to send along; may be repeated")
    gzip: bool = _flag(False, "compress the gRPC request")
    tls: bool = _flag(False, "use TLS, as https:// and grpcs:// do")
    tls_no_verify: bool = _flag(False, "(with TLS) take any certificate of the server")
    tls_ca_cert: str = _flag("", "(with TLS) file of the certificates to trust, in the system's place")
    tls_client_cert: str = _flag("", "(with TLS) file of the client's certificate; needs -tls-client-key")
    tls_client_key: str = _flag("", "(with TLS) file of the client's key; needs -tls-client-cert")
    tls_server_name: str = _flag("", "(with TLS) the name that the server's certificate must have")
    v: bool = _flag(False, "say more")
    http: bool = False
    host: str = ""
    port: int = 0
    path: str = ""


_FLAGS = {each.name.replace("_", "-"): each for each in fields(ProbeOptions) if each.metadata}
_METAVARS = {float: " DURATION", str: " STRING", tuple: " HEADER"}


def usage() -> str:
    """Return the help."""
    lines = [
        f"  -{name}{_METAVARS.get(type(each.default), '')}\n        {each.metadata['help']}"
        for name, each in _FLAGS.items()
    ]
    return "\n".join(
        [
            "usage: python -m resilience probe [FLAGS] http[s]://HOST[:PORT]/PATH | grpc[s]://HOST:PORT[/SERVICE]",
            "Exits with 0: serving, 1: wrong arguments, 2: no connection, 3: no answer or an error, 4: not serving.",
            *lines,
        ]
    )


def parse(arguments: Sequence[str]) -> ProbeOptions:
    """Read a command line.

    Args:
        arguments: what follows ``probe``.

    Raises:
        ConfigurationError: says what is wrong with it.
    """
    values, targets = _read(list(arguments))
    if len(targets) > 1 or (targets and values.get("addr")):
        raise ConfigurationError("one target, please: a URL or -addr")
    if targets:
        values = _with_target(targets[0], values)
    options = ProbeOptions(**values)
    _check(options)
    return options


def _read(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    values: dict[str, Any] = {}
    targets: list[str] = []
    left = iter(arguments)
    for argument in left:
        if argument == "--":
            return values, [*targets, *left]
        if not argument.startswith("-") or argument == "-":
            targets.append(argument)
            continue
        name, given, value = argument.removeprefix("-").removeprefix("-").partition("=")
        if name not in _FLAGS:
            raise ConfigurationError(f"no such flag: -{name}")
        default = _FLAGS[name].default
        if not given:
            value = "true" if default is False else next(left, None)  # type: ignore[assignment]
        if value is None:
            raise ConfigurationError(f"-{name} needs a value")
        key = _FLAGS[name].name
        read = _value(name, value, default)
        values[key] = (*values.get(key, ()), *read) if default == () else read
    return values, targets


def _value(name: str, value: str, default: Any) -> Any:
    if default is False:
        if value not in _SWITCH:
            raise ConfigurationError(f"-{name} is true or false")
        return _SWITCH[value]
    if isinstance(default, float):
        return _seconds(name, value)
    if default == ():
        header, colon, text = value.partition(":")
        if not colon:
            raise ConfigurationError(f"-{name} is 'name: value'")
        return ((header, text.lstrip()),)
    return value


def _seconds(name: str, value: str) -> float:
    total = 0.0
    if _DURATION.fullmatch(value):
        total = math.fsum(float(number) * _UNITS[unit] for number, unit in _PART.findall(value))
    if not 0 < total < _LONGEST:
        raise ConfigurationError(f"-{name} is a time over 0 such as 1s, 500ms or 1m30s")
    return total


def _with_target(target: str, values: dict[str, Any]) -> dict[str, Any]:
    try:
        url = urlsplit(target)
        port = url.port
    except ValueError:
        raise ConfigurationError("the target is no URL") from None
    if url.scheme not in ("http", "https", "grpc", "grpcs") or not url.hostname:
        raise ConfigurationError("the target is http://, https://, grpc:// or grpcs:// and a host")
    if url.username is not None or url.password is not None:
        raise ConfigurationError("no user or password in a target; send a header")
    port = port or _PORTS.get(url.scheme)
    if port is None:
        raise ConfigurationError("a gRPC target needs a port")
    values = {**values, "host": url.hostname, "port": port}
    if url.scheme.endswith("s"):
        values["tls"] = True
    host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
    values["addr"] = f"{host}:{port}"
    if url.scheme.startswith("http"):
        return {**values, "http": True, "path": _path(url)}
    service = unquote(url.path.removeprefix("/"))
    if url.query or (service and values.get("service")):
        raise ConfigurationError("one service, please: in the target or by -service")
    return {**values, "service": service or values.get("service", "")}


def _path(url: SplitResult) -> str:
    # What is a sign of the syntax stays as it is; anything else can't end the request's line.
    path = quote(url.path or "/", safe="/%:@!$&'()*+,;=~")
    return f"{path}?{quote(url.query, safe='/%:@!$&()*+,;=~?')}" if url.query else path


def _check(options: ProbeOptions) -> None:
    if not options.addr:
        raise ConfigurationError("no target: give a URL or -addr")
    _check_tls(options)
    if options.http:
        _check_http(options)


def _check_tls(options: ProbeOptions) -> None:
    if not options.tls:
        for name in ("tls_no_verify", "tls_ca_cert", "tls_client_cert", "tls_server_name"):
            if getattr(options, name):
                raise ConfigurationError(f"-{name.replace('_', '-')} is for TLS, and -tls isn't set")
    if bool(options.tls_client_cert) != bool(options.tls_client_key):
        raise ConfigurationError("-tls-client-cert and -tls-client-key go together")
    if options.tls_no_verify and (options.tls_ca_cert or options.tls_server_name):
        raise ConfigurationError("-tls-no-verify would make -tls-ca-cert and -tls-server-name pointless")


def _check_http(options: ProbeOptions) -> None:
    if options.service or options.gzip:
        raise ConfigurationError("-service and -gzip are for gRPC")
    for name, value in (*options.rpc_header, ("User-Agent", options.user_agent)):
        if not _TOKEN.fullmatch(name) or not (value.isascii() and value.isprintable()):
            raise ConfigurationError("-rpc-header and -user-agent take what a header can hold")
