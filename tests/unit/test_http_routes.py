import asyncio
from collections.abc import Sequence

import pytest
from fastapi import APIRouter, FastAPI
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Scope
from starlette.websockets import WebSocket

from http_middleware.routes import RouteTable
from resilience import ConfigurationError


async def answer(_request: Request) -> Response:
    return PlainTextResponse("")


async def meet(_websocket: WebSocket) -> None:
    pass


class Item(HTTPEndpoint):
    async def get(self, _request: Request) -> Response:
        return PlainTextResponse("")

    async def delete(self, _request: Request) -> Response:
        return PlainTextResponse("")


def ask(method: str, path: str, root_path: str = "") -> Scope:
    if method == "WEBSOCKET":
        return {"type": "websocket", "path": path, "root_path": root_path, "headers": []}
    return {"type": "http", "method": method, "path": path, "root_path": root_path, "headers": [], "query_string": b""}


def name(routes: Sequence[BaseRoute], method: str, path: str, root_path: str = "") -> str:
    return RouteTable(routes).operation(ask(method, path, root_path))


def shop() -> FastAPI:
    leaf = APIRouter(prefix="/items")
    leaf.add_api_route("/{item}", lambda: None, methods=["GET", "DELETE"])
    leaf.add_api_route("", lambda: None, methods=["POST"])
    leaf.add_api_route("/latest", lambda: None, methods=["PUT"])
    branch = APIRouter()
    branch.include_router(leaf, prefix="/{tenant}")
    inner = FastAPI(openapi_url=None)
    inner.add_api_route("/users/{user}", lambda: None)
    app = FastAPI(openapi_url=None)
    app.add_api_route("/", lambda: None)
    app.include_router(leaf, prefix="/v1")
    app.include_router(branch, prefix="/v2")
    app.mount("/admin", inner)
    return app


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/", "GET /"),
        ("GET", "/v1/items/1", "GET /v1/items/{item}"),
        ("DELETE", "/v1/items/1", "DELETE /v1/items/{item}"),
        ("POST", "/v1/items", "POST /v1/items"),
        ("PUT", "/v1/items/latest", "PUT /v1/items/latest"),
        ("GET", "/v1/items/latest", "GET /v1/items/{item}"),
        ("GET", "/v2/acme/items/1", "GET /v2/{tenant}/items/{item}"),
        ("POST", "/v2/acme/items", "POST /v2/{tenant}/items"),
        ("GET", "/admin/users/7", "GET /admin/users/{user}"),
        ("GET", "/v1/items/é", "GET /v1/items/{item}"),
        ("GET", "/v1/items/{item}", "GET /v1/items/{item}"),
        ("GET", "/v1/items/a\nb", "GET /v1/items/{item}"),
    ],
)
def test_a_request_has_the_name_of_its_route_with_every_prefix(method: str, path: str, expected: str) -> None:
    assert name(shop().routes, method, path) == expected


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/nowhere"),
        ("GET", "/v1/items/1/2"),
        ("GET", "/v1/items/"),
        ("GET", "/v3/items/1"),
        ("GET", "/items/1"),
        ("GET", "/V1/items/1"),
        ("PATCH", "/v1/items/1"),
        ("get", "/v1/items/1"),
        ("GET /v1", "/items/1"),
        ("GET", "/users/7"),
        ("GET", "/admin"),
        ("GET", "/admin/users/7/8"),
        ("WEBSOCKET", "/v1/items/1"),
        ("GET", ""),
    ],
)
def test_what_no_route_answers_is_unmatched(method: str, path: str) -> None:
    assert name(shop().routes, method, path) == "unmatched"


@pytest.mark.parametrize("path", ["/rooms", "/rooms/1"])
def test_a_method_that_pretends_to_be_a_websocket_has_not_its_name(path: str) -> None:
    table = RouteTable([WebSocketRoute("/rooms", meet), WebSocketRoute("/rooms/{room}", meet)])
    scope = ask("GET", path)
    scope["method"] = "WEBSOCKET"

    assert table.operation(scope) == "unmatched"


def test_an_application_without_routes_matches_nothing() -> None:
    assert name([], "GET", "/") == "unmatched"


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["/items/latest", "/items/{item}"], "GET /items/latest"),
        (["/items/{item}", "/items/latest"], "GET /items/{item}"),
        (["/items/{first}", "/items/{second}"], "GET /items/{first}"),
        (["/{rest:path}", "/items/latest"], "GET /{rest}"),
        (["/items/{number:int}", "/items/{text}"], "GET /items/{text}"),
    ],
)
def test_of_two_routes_that_match_the_first_counts(paths: list[str], expected: str) -> None:
    assert name([Route(path, answer) for path in paths], "GET", "/items/latest") == expected


def test_a_route_of_another_method_is_passed_over() -> None:
    routes = [Route("/items/{item}", answer, methods=["POST"]), Route("/items/latest", answer)]

    assert name(routes, "GET", "/items/latest") == "GET /items/latest"


def test_a_convertor_is_left_out_of_the_name_and_respected_in_the_match() -> None:
    routes = [Route("/items/{item:int}", answer)]

    assert name(routes, "GET", "/items/7") == "GET /items/{item}"
    assert name(routes, "GET", "/items/seven") == "unmatched"


def test_head_has_the_name_of_the_get_that_answers_it() -> None:
    assert name([Route("/items/{item}", answer)], "HEAD", "/items/1") == "GET /items/{item}"
    assert name([Route("/items", answer)], "HEAD", "/items") == "GET /items"


def test_a_websocket_route_has_a_name_of_its_own() -> None:
    routes = [Route("/rooms/{room}", answer), WebSocketRoute("/rooms/{room}", meet)]

    assert name(routes, "WEBSOCKET", "/rooms/1") == "WEBSOCKET /rooms/{room}"
    assert name(routes, "GET", "/rooms/1") == "GET /rooms/{room}"


def test_a_mount_with_a_parameter_is_part_of_the_name() -> None:
    routes = [Mount("/{tenant}", routes=[Mount("/v1", routes=[Route("/items/{item}", answer)])])]

    assert name(routes, "GET", "/acme/v1/items/1") == "GET /{tenant}/v1/items/{item}"


def test_a_mounted_applications_root_has_the_mounts_path() -> None:
    assert name([Mount("/admin", routes=[Route("/", answer)])], "GET", "/admin/") == "GET /admin/"


def test_a_mounted_folder_of_files_is_unmatched() -> None:
    assert name([Mount("/static", StaticFiles(check_dir=False))], "GET", "/static/a.css") == "unmatched"


def test_a_mounted_application_without_a_list_of_routes_is_unmatched() -> None:
    assert name([Mount("/raw", PlainTextResponse("raw"))], "GET", "/raw/any") == "unmatched"


def test_the_servers_root_path_is_no_part_of_the_name() -> None:
    assert name(shop().routes, "GET", "/api/v1/items/1", "/api") == "GET /v1/items/{item}"


def test_an_endpoint_class_has_a_name_for_each_method_that_it_answers() -> None:
    routes = [Route("/items/{item}", Item)]

    assert name(routes, "GET", "/items/1") == "GET /items/{item}"
    assert name(routes, "DELETE", "/items/1") == "DELETE /items/{item}"
    assert name(routes, "HEAD", "/items/1") == "GET /items/{item}"
    assert name(routes, "POST", "/items/1") == "unmatched"


def test_every_name_that_is_accepted_is_one_that_requests_are_counted_under() -> None:
    table = RouteTable(
        [
            Route("/items/{item}", answer),
            Route("/items", answer, methods=["GET", "POST"]),
            Route("/probe", answer, methods=["HEAD"]),
            WebSocketRoute("/rooms/{room}", meet),
            *shop().routes,
        ]
    )

    counted = {table.operation(ask(*operation.split(" ", 1))) for operation in table.operations}

    assert table.operations - counted == set()


def test_names_of_routes_are_accepted() -> None:
    RouteTable(shop().routes).verify(["GET /v1/items/{item}", "POST /v2/{tenant}/items", "GET /admin/users/{user}"])


def test_a_name_that_is_no_route_is_refused_with_the_names_that_are() -> None:
    table = RouteTable([Route("/b", answer, methods=["POST"]), WebSocketRoute("/a", meet)])

    with pytest.raises(ConfigurationError) as raised:
        table.verify(["POST /b", "POST /c", "GET /b"])

    assert (
        str(raised.value)
        == "Policies name operations that are no route: GET /b, POST /c. Routes: POST /b, WEBSOCKET /a."
    )


def test_the_name_of_a_grpc_method_is_not_looked_for() -> None:
    RouteTable([]).verify(["/shop.v1.Orders/Create"])


def test_no_names_are_always_accepted() -> None:
    RouteTable([]).verify([])


def test_the_name_is_the_one_of_the_route_that_the_router_picks() -> None:
    declared = [
        ("GET", "/items/{item}"),
        ("GET", "/items/latest"),
        ("POST", "/items/latest"),
        ("POST", "/items/{other}"),
        ("GET", "/{section}/latest"),
        ("GET", "/files/{path:path}"),
        ("DELETE", "/{anything:path}"),
        ("GET", "/items"),
    ]

    def named(label: str) -> Route:
        method, path = label.split(" ", 1)

        async def endpoint(_request: Request) -> Response:
            return PlainTextResponse(label.replace(":path", ""))

        return Route(path, endpoint, methods=[method])

    app = Starlette(routes=[named(f"{method} {path}") for method, path in declared])
    table = RouteTable(app.routes)
    asked = [
        (method, path)
        for method in ("GET", "POST", "DELETE")
        for path in ("/items", "/items/latest", "/items/1", "/a/latest", "/files/a/b", "/files/", "/x", "/items/1/2")
    ]

    async def routed(method: str, path: str) -> str:
        sent: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request"}

        async def send(message: Message) -> None:
            sent.append(message)

        await app(ask(method, path), receive, send)
        found: str = sent[1]["body"].decode()
        return found if sent[0]["status"] == 200 else "unmatched"

    async def compare() -> None:
        for method, path in asked:
            assert table.operation(ask(method, path)) == await routed(method, path), (method, path)

    asyncio.run(compare())
