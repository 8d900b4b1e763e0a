"""Floor 4: the limits of the services, asked by their gateway: Envoy's rate-limit service over the same core.

Source: envoy/service/ratelimit/v3/rls.proto; answers as github.com/envoyproxy/ratelimit gives them.
"""

import logging
from collections.abc import Mapping, Sequence
from math import ceil, inf
from typing import TypeAlias

import grpc
from google.protobuf.duration_pb2 import Duration

from grpc_interceptors.descriptors import GatewayRules, overridden, unit_of
from grpc_interceptors.rls_pb2 import HeaderValue, RateLimitRequest, RateLimitResponse
from resilience import wire
from resilience.caller import Identify
from resilience.decisions.quota import Usage
from resilience.errors import StoreUnavailableError
from resilience.policies.rate_limit import RateLimitPolicy
from resilience.stores.base import Want

logger = logging.getLogger("resilience")

SERVICE = "envoy.service.ratelimit.v3.RateLimitService"

_Context: TypeAlias = "grpc.aio.ServicerContext[RateLimitRequest, RateLimitResponse]"
_Counts = dict[tuple[str, str], tuple[Want, Usage | None]]
_Status = RateLimitResponse.DescriptorStatus
_OK, _OVER_LIMIT = RateLimitResponse.OK, RateLimitResponse.OVER_LIMIT
_MOST_DESCRIPTORS = _MOST_ENTRIES = 32
_LONGEST_KEY, _LONGEST_VALUE = 256, 4096
_MOST_HITS = 1_000_000_000  # Source: config.route.v3.RateLimit.HitsAddend, its validation rule.
_TRY_AGAIN = 1.0  # Seconds that a caller is asked to wait when the store is gone.


class RateLimitService:
    """``envoy.service.ratelimit.v3.RateLimitService`` for the policies that the services enforce.

    Whoever reaches it can spend anybody's quota, so serve it where nobody but the gateway can.

    Args:
        policies: the policy of each domain. A gateway that asks for another domain is answered OK.
        identify: as the pipeline has it; the default is a digest of ``x-api-key``.
    """

    def __init__(self, policies: Mapping[str, RateLimitPolicy], identify: Identify | None = None) -> None:
        self._domains = {domain: GatewayRules(policy, identify) for domain, policy in policies.items()}

    async def ShouldRateLimit(self, request: RateLimitRequest, context: _Context) -> RateLimitResponse:  # noqa: N802 - the method's name in the .proto
        """Take what the descriptors ask for: all of it or, where one is over its limit, nothing.

        Descriptors that meet in one rule and one caller are counted once. A descriptor that no rule concerns is OK and
        without a limit. INVALID_ARGUMENT answers what can't be understood, INTERNAL a rule whose function failed.
        """
        fault = _fault(request)
        if fault is not None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, fault)
        rules = self._domains.get(request.domain)
        if rules is None:
            return RateLimitResponse(overall_code=_OK, statuses=[_Status(code=_OK) for _ in request.descriptors])
        try:
            asked = await _asked(rules, request)
        except Exception as error:
            # Its kind alone: the text of somebody's exception may quote the caller.
            logger.error("A rule could not be asked for a gateway: %s", type(error).__name__)  # noqa: TRY400
            await context.abort(grpc.StatusCode.INTERNAL, "A limit could not be found out")
        if asked is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "No limit of that unit to override")
        merged = _merged(asked)
        try:
            usages = await rules.take(list(merged.values())) if merged else []
        except StoreUnavailableError:
            # An error would be the gateway's to judge, and its default is to let everybody in.
            return _closed(asked)
        counts = dict(zip(merged, zip(merged.values(), usages, strict=True), strict=True))
        return _response(asked, counts)


def add_rate_limit_service(
    server: grpc.aio.Server, policies: Mapping[str, RateLimitPolicy], identify: Identify | None = None
) -> None:
    """Serve ``policies``, by domain, to a gateway. See ``RateLimitService``."""
    service = RateLimitService(policies, identify)
    handler = grpc.unary_unary_rpc_method_handler(
        service.ShouldRateLimit,
        request_deserializer=RateLimitRequest.FromString,
        response_serializer=RateLimitResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"ShouldRateLimit": handler}),))


def _fault(request: RateLimitRequest) -> str | None:
    """Return what is wrong with a request, in words of ours alone; None where nothing is."""
    if not request.domain:
        return "The domain must not be empty"
    if not 1 <= len(request.descriptors) <= _MOST_DESCRIPTORS:
        return f"There must be 1 to {_MOST_DESCRIPTORS} descriptors"
    for descriptor in request.descriptors:
        if not 1 <= len(descriptor.entries) <= _MOST_ENTRIES:
            return f"A descriptor must have 1 to {_MOST_ENTRIES} entries"
        if any(not 1 <= len(entry.key) <= _LONGEST_KEY for entry in descriptor.entries):
            return f"The key of an entry must have 1 to {_LONGEST_KEY} characters"
        if any(len(entry.value) > _LONGEST_VALUE for entry in descriptor.entries):
            return f"The value of an entry must have at most {_LONGEST_VALUE} characters"
        if descriptor.is_negative_hits:
            return "Hits can't be given back"
        if descriptor.hits_addend.value > _MOST_HITS:
            return f"There must be at most {_MOST_HITS} hits"
    return f"There must be at most {_MOST_HITS} hits" if request.hits_addend > _MOST_HITS else None


async def _asked(rules: GatewayRules, request: RateLimitRequest) -> list[list[Want]] | None:
    """Return what each descriptor wants; None where one overrides a limit that is not there."""
    asked = []
    for descriptor in request.descriptors:
        own = descriptor.HasField("hits_addend")
        wants: list[Want] | None
        wants = await rules.wants(descriptor, descriptor.hits_addend.value if own else request.hits_addend or 1)
        if wants and descriptor.HasField("limit"):
            wants = overridden(wants, descriptor.limit.requests_per_unit, descriptor.limit.unit)
            if wants is None:
                return None
        asked.append(wants)
    return asked


def _merged(asked: Sequence[Sequence[Want]]) -> dict[tuple[str, str], Want]:
    """Return one want for each rule and subject, since all descriptors tell of one request."""
    merged: dict[tuple[str, str], Want] = {}
    for want in (want for wants in asked for want in wants):
        other = merged.get((want.rule, want.subject), want)
        merged[want.rule, want.subject] = want._replace(
            cost=max(want.cost, other.cost), quota=min(want.quota, other.quota, key=lambda quota: quota.limit)
        )
    return merged


def _response(asked: Sequence[Sequence[Want]], counts: _Counts) -> RateLimitResponse:
    statuses = [_status([counts[want.rule, want.subject] for want in wants]) for wants in asked]
    over = any(status.code == _OVER_LIMIT for status in statuses)
    return RateLimitResponse(
        overall_code=_OVER_LIMIT if over else _OK,
        statuses=statuses,
        response_headers_to_add=[HeaderValue(key=key, value=value) for key, value in _headers(counts, over=over)],
    )


def _status(counts: Sequence[tuple[Want, Usage | None]]) -> _Status:
    """Return the answer to one descriptor: of all that it asked for, what is nearest to its end."""
    told = [(want, usage) for want, usage in counts if usage is not None]
    if not told:
        return _Status(code=_OK)
    want, usage = min(told, key=lambda count: count[1].slack)
    reset = Duration()
    reset.FromMicroseconds(ceil(usage.reset_after * 1_000_000))
    return _Status(
        code=_OK if usage.allowed else _OVER_LIMIT,
        current_limit=RateLimitResponse.RateLimit(
            requests_per_unit=want.quota.limit, unit=unit_of(want.quota), name=want.rule
        ),
        limit_remaining=usage.remaining,
        duration_until_reset=reset,
    )


def _headers(counts: _Counts, *, over: bool) -> list[tuple[str, str]]:
    """Return what the gateway's client is told. Nothing after a mere look: the service behind will count, and tell."""
    told = [(want, usage) for want, usage in counts.values() if usage is not None]
    if not told or not (over or any(want.cost for want, _ in told)):
        return []
    headers = list(wire.limit_fields([(want.rule, want.quota, usage) for want, usage in told]))
    wait = max(usage.retry_after for _, usage in told)
    if over and wait < inf:
        headers.append((wire.RETRY_AFTER, str(wire.whole_seconds(wait))))
    return headers


def _closed(asked: Sequence[Sequence[Want]]) -> RateLimitResponse:
    """Refuse, for want of a store: every descriptor that asked for something."""
    wait = HeaderValue(key=wire.RETRY_AFTER, value=str(wire.whole_seconds(_TRY_AGAIN)))
    return RateLimitResponse(
        overall_code=_OVER_LIMIT,
        statuses=[_Status(code=_OVER_LIMIT if wants else _OK) for wants in asked],
        response_headers_to_add=[wait],
    )
