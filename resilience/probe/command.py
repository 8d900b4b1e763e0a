"""``python -m resilience probe``: the command, with the flags and exit codes of grpc_health_probe."""

import asyncio
import contextlib
import ssl
import sys
from collections.abc import Sequence

from resilience.errors import ConfigurationError
from resilience.probe.arguments import ProbeOptions, parse, usage
from resilience.probe.ask_grpc import ask_grpc
from resilience.probe.ask_http import ask_http
from resilience.probe.ended import BAD_ARGUMENTS, NO_ANSWER, Ended, why_not


def main(arguments: Sequence[str]) -> int:
    """Run the command; say in one line of standard error how it went, and return the exit code.

    Never raises. An accident counts as no answer, and help as wrong arguments: 0 says that a server serves, and
    nothing else.

    Args:
        arguments: ``probe``, its flags and its target.
    """
    if arguments[:1] != ["probe"] or {"-h", "-help", "--help"}.intersection(arguments):
        _say(usage())
        return BAD_ARGUMENTS
    try:
        ended = _probe(parse(arguments[1:]))
    except ConfigurationError as error:
        ended = Ended(BAD_ARGUMENTS, f"error: {error}")
    except KeyboardInterrupt:
        ended = Ended(NO_ANSWER, "error: interrupted")
    except Exception as error:
        ended = Ended(NO_ANSWER, f"error: {type(error).__name__}")
    # A server says what it likes, and the line of a log is one line.
    _say("".join(c if c.isprintable() else "?" for c in ended.said))
    return ended.code


def _say(text: str) -> None:
    # What can't be said changes nothing about the exit code, which is the answer.
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()


def _probe(options: ProbeOptions) -> Ended:
    tls = _tls(options) if options.tls else None
    # Not asyncio.run: that waits for its threads, and in one of them a name may still be resolving.
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        return loop.run_until_complete((ask_http if options.http else ask_grpc)(options, tls))


def _tls(options: ProbeOptions) -> ssl.SSLContext:
    try:
        tls = ssl.create_default_context(cafile=options.tls_ca_cert or None)
        if options.tls_client_cert:
            tls.load_cert_chain(options.tls_client_cert, options.tls_client_key, lambda: "")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"a certificate or key can't be used: {why_not(error)}") from None
    if options.tls_no_verify:
        tls.check_hostname = False
        tls.verify_mode = ssl.CERT_NONE
    return tls
