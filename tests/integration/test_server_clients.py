"""The server and programs that others wrote: Triton's client, schemathesis, curl; and who may ask."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from image_classifier.published.predictor import load_predictor
from tests.conftest import require_program, require_real_data, run_command, run_program
from tests.serving import CLASSES, PIXELS, Running, draw_images, encode, serving, write_model
from tests.smuggling import proxying

KEY = "a key that is long enough to be one"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that computes in no time."""
    return write_model(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that anybody may ask."""
    with serving(model, tmp_path_factory.mktemp("log") / "log", "--model_name", "cifar") as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[Any]:
    """Triton's client."""
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
        yield client


def build_input(images: np.ndarray[Any, np.dtype[np.uint8]], *, binary: bool) -> Any:
    """Build the tensor that Triton's client sends."""
    tensor = triton.InferInput("images", list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images, binary_data=binary)
    return tensor


def test_tritons_client_learns_what_is_served(client: Any, model: Path) -> None:
    version = load_predictor(model).model.version
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("cifar") and client.is_model_ready("cifar", version)
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    metadata = client.get_model_metadata("cifar")
    assert metadata["versions"] == [version]
    assert metadata["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, 32, 32, 3]}]
    assert metadata["outputs"] == [{"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]}]


@pytest.mark.parametrize("binary_input", [True, False])
@pytest.mark.parametrize("binary_output", [True, False])
def test_tritons_client_gets_the_probabilities(
    client: Any, model: Path, binary_input: bool, binary_output: bool
) -> None:
    images = draw_images(5)
    result = client.infer(
        "cifar",
        [build_input(images, binary=binary_input)],
        outputs=[triton.InferRequestedOutput("probabilities", binary_data=binary_output)],
        request_id="mine",
    )
    np.testing.assert_allclose(result.as_numpy("probabilities"), load_predictor(model).predict(images), atol=1e-6)
    assert result.get_response()["id"] == "mine"


def test_tritons_client_gets_labels(client: Any, model: Path) -> None:
    images = draw_images(3)
    output = triton.InferRequestedOutput("probabilities", class_count=2)
    labels = client.infer("cifar", [build_input(images, binary=True)], outputs=[output]).as_numpy("probabilities")
    expected = load_predictor(model).predict(images)
    assert labels.shape == (3, 2)
    for row, shares in zip(labels, expected, strict=True):
        share, index, name = row[0].decode().split(":")
        assert int(index) == shares.argmax() and name == CLASSES[shares.argmax()]
        assert float(share) == pytest.approx(shares.max(), abs=1e-5)


def test_tritons_client_hears_why_not(client: Any) -> None:
    wrong = triton.InferInput("pictures", [1, 32, 32, 3], "UINT8")
    wrong.set_data_from_numpy(draw_images(1))
    with pytest.raises(InferenceServerException, match="inputs.0.name"):
        client.infer("cifar", [wrong])
    with pytest.raises(InferenceServerException, match="no such model"):
        client.get_model_metadata("other")


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (b"", {}),
        (b"[]", {}),
        (b"[" * 10_000, {}),
        (b'{"inputs": []}', {}),
        (b'{"inputs": [{"name": "images", "datatype": "FP32", "shape": [1, 32, 32, 3], "data": [1]}]}', {}),
        (b'{"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [1]}]}', {}),
        (b'{"inputs": [{"name": "images", "datatype": "UINT8", "shape": [-1, 32, 32, 3], "data": []}]}', {}),
        (b'{"inputs": [{"name": "images", "datatype": "UINT8", "shape": [true, 32, 32, 3], "data": []}]}', {}),
        (b'{"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [[1], [2, 3]]}]}', {}),
        (
            b'{"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": ['
            + b"256," * 3071
            + b"1]}]}",
            {},
        ),
        (
            b'{"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": ['
            + b"0.5," * 3071
            + b"1]}]}",
            {},
        ),
        (b'{"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": "x"}]}', {}),
        (b"{}", {"Inference-Header-Content-Length": "3"}),
        (b"{}", {"Inference-Header-Content-Length": "-1"}),
        (b"{}", {"Inference-Header-Content-Length": "nine"}),
        (
            b'{"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], '
            b'"parameters": {"binary_data_size": 3072}}]}',
            {},
        ),
        (
            b'{"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], '
            b'"parameters": {"shared_memory_region": "r"}}]}',
            {},
        ),
    ],
)
def test_inference_requests_that_are_none_are_refused(server: Running, content: bytes, headers: dict[str, str]) -> None:
    answer = httpx.post(f"{server.url}/v2/models/cifar/infer", content=content, headers=headers)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"].isprintable()


@pytest.mark.parametrize("is_behind_proxy", [False, True])
def test_the_server_is_what_it_says_it_is(server: Running, is_behind_proxy: bool, tmp_path: Path) -> None:
    """Schemathesis makes requests out of the description, right ones and wrong ones, and checks each answer."""
    url = server.url
    with ExitStack() as stack:
        if is_behind_proxy:
            ports = stack.enter_context(proxying(require_program("nginx"), server.port, server.port))
            url = f"http://127.0.0.1:{ports[1]}"
        check_description(url, tmp_path)


def check_description(url: str, folder: Path) -> None:
    """Check a server's answers against its description."""
    words = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--max-examples", "15"]
    words += ["--seed", "1", "--checks", "not_a_server_error,status_code_conformance,content_type_conformance"]
    words[-1] += ",response_schema_conformance,response_headers_conformance"
    result = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr


def test_callers_need_a_key_and_health_does_not(model: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"alice:{hashlib.sha256(KEY.encode()).hexdigest()}\n")
    with serving(model, tmp_path / "log", "--api_keys_file", keys) as server:
        body = draw_images(1).tobytes()
        good = {"authorization": f"Bearer {KEY}"}
        assert httpx.post(f"{server.url}/predict", content=body, headers=PIXELS | good).status_code == 200
        assert httpx.get(f"{server.url}/metrics", headers={"x-api-key": KEY}).status_code == 200
        for path in ("/health/live", "/health/ready", "/v2/health/live", "/", "/docs", "/openapi.json"):
            assert httpx.get(f"{server.url}{path}").status_code == 200, path
        for path in ("/metrics", "/model", "/v2", "/v2/models/image_classifier", "/nowhere"):
            assert httpx.get(f"{server.url}{path}").status_code == 401, path
        for headers in ({}, {"authorization": "Bearer other"}, {"authorization": f"Basic {KEY}"}):
            for kind in (PIXELS, {"content-type": "image/png"}):
                answer = httpx.post(f"{server.url}/predict", content=body, headers=kind | headers)
                assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
                assert answer.json()["type"].endswith(":unauthorized")
    log = server.log.read_text()
    assert KEY not in log and hashlib.sha256(KEY.encode()).hexdigest() not in log


def test_curl_asks_as_the_documents_say(server: Running, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(encode(draw_images(1)[0]))
    words = ["--fail", "--silent", "--header", "Content-Type: image/png", "--data-binary", "@image.png"]
    output = run_program(require_program("curl"), *words, f"{server.url}/predict", cwd=tmp_path)
    assert '"model_version"' in output


@pytest.mark.timeout(600)
def test_ten_thousand_images_at_once_get_the_trainers_own_classes(tmp_path: Path) -> None:
    """All test images, from sixteen connections, so that answers could be mixed up: the evaluation's classes."""
    dataset = require_real_data("IMAGE_CLASSIFIER_CIFAR10")
    words: list[str | Path] = ["--experiments_folder", tmp_path, "--experiment_name", "parity", "--run_name", "run"]
    words += ["--dataset_folder", dataset, "--recipe", "notebook", "--batch_size", "250", "--learning_rate", "0.05"]
    words += ["--num_epochs", "1", "--views", "one"]
    run_command("image_classifier.main", *words)
    run = tmp_path / "parity" / "run"
    run_command("image_classifier", "publish", run)
    from image_classifier.data.dataset import load_snapshot

    images, labels = load_snapshot(dataset).test
    expected = np.load(run / "predictions.npz")["probabilities"]
    classes = load_predictor(run / "published").model.classes
    assert len(images) == 10_000 and len(set(expected.argmax(axis=1).tolist())) > 3
    pixels = np.ascontiguousarray(np.asarray(images).transpose(0, 2, 3, 1))

    with serving(run / "published", tmp_path / "log", "--num_threads", "2") as server:

        def ask(part: int) -> dict[int, str]:
            with httpx.Client(timeout=60) as client:
                answers = {}
                for index in range(part, len(pixels), 16):
                    body, kind = pixels[index].tobytes(), "application/octet-stream"
                    if index % 10 == 0:
                        body, kind = encode(pixels[index]), "image/png"
                    answer = client.post(f"{server.url}/predict?top_k=1", content=body, headers={"content-type": kind})
                    assert answer.status_code == 200, answer.text
                    answers[index] = answer.json()["predictions"][0]["class"]
                return answers

        with ThreadPoolExecutor(16) as pool:
            answers = {index: name for part in pool.map(ask, range(16)) for index, name in part.items()}
        assert server.read_metric("image_classifier_batch_size_count") < 9_000  # they were batched
    sorted_shares = np.sort(expected, axis=1)
    is_clear = sorted_shares[:, -1] - sorted_shares[:, -2] > 1e-4  # else another order of adding decides
    differing = [index for index in range(10_000) if answers[index] != classes[expected[index].argmax()]]
    assert not [index for index in differing if is_clear[index]]
    assert is_clear.sum() > 9_900
