"""What users install: one wheel, three packages, and a core that brings nothing along."""

import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("fastapi", "google.protobuf", "grpc", "pydantic", "redis", "starlette", "structlog")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT, check=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_holds_three_typed_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {
        "grpc_interceptors",
        "http_middleware",
        "resilience",
    }
    assert {"grpc_interceptors/py.typed", "http_middleware/py.typed", "resilience/py.typed"} <= set(wheel.namelist())


def test_the_wheel_requires_nothing_without_an_extra(wheel: zipfile.ZipFile) -> None:
    name = next(name for name in wheel.namelist() if name.endswith("METADATA"))
    metadata = message_from_bytes(wheel.read(name))
    assert metadata["Name"] == "grpc-http-resilience"
    assert metadata["Requires-Python"] == ">=3.11"
    extras = {"all", "encryption", "grpc", "http", "redis", "settings", "structlog", "uvicorn"}
    assert set(metadata.get_all("Provides-Extra", [])) == extras
    assert all("extra ==" in requirement for requirement in metadata.get_all("Requires-Dist", []))


def test_the_core_imports_none_of_what_the_doors_need() -> None:
    code = f"import resilience, sys; assert not [name for name in {HEAVY} if name in sys.modules]"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
