"""The server behind nginx, which speaks TLS, with the configuration of docs/serving.md."""

from __future__ import annotations

import re
import shlex
import ssl
import subprocess
from contextlib import suppress
from pathlib import Path

import httpx

from tests.conftest import PROJECT, find_port, report_lack, run_program, wait_until
from tests.serving import PIXELS, draw_images, serving, write_published_model
from tests.smuggling import find_nginx

NAME = "images.example.org"


def read_block(pattern: str) -> str:
    """Read the code block of docs/serving.md that begins so."""
    found = re.search(rf"```\w*\n({pattern}.*?)```", (PROJECT / "docs" / "serving.md").read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def test_the_documented_proxy_gives_answers_links_and_addresses(tmp_path: Path) -> None:
    program = find_nginx() or report_lack("the program nginx is not installed")
    run_program(*shlex.split(read_block("openssl req").replace("\\\n", "")), cwd=tmp_path)
    images = draw_images(1)
    write_published_model(tmp_path / "published", images)
    options = read_block("image_classifier serve MODEL --root_path").split()[3:]
    port = find_port()
    with serving(tmp_path / "published", tmp_path / "log", *options) as server:
        block = read_block("server {").replace("listen 443", f"listen 127.0.0.1:{port}")
        block = block.replace("/etc/ssl/images.pem", f"{tmp_path}/images.pem")
        block = block.replace("/etc/ssl/images.key", f"{tmp_path}/images.key").replace(":8000/", f":{server.port}/")
        head = f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/errors; events {{}}\n"
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        places = "".join(f"{kind}_temp_path {tmp_path};\n" for kind in kinds)
        (tmp_path / "nginx.conf").write_text(f"{head}http {{ access_log off; {places}{block} }}\n")
        proxy = subprocess.Popen([program, "-c", str(tmp_path / "nginx.conf")], stderr=subprocess.DEVNULL)
        context = ssl.create_default_context(cafile=str(tmp_path / "images.pem"))
        hosts, names = {"Host": f"{NAME}:{port}"}, {"sni_hostname": NAME}
        with httpx.Client(base_url=f"https://127.0.0.1:{port}/classifier", headers=hosts, verify=context) as client:

            def ask(path: str) -> httpx.Response:
                return client.get(path, extensions=names)

            def is_ready() -> bool:
                with suppress(httpx.ConnectError):
                    return ask("/health/ready").status_code == 200
                return False

            try:
                wait_until(is_ready, proxy, 20)
                answer = client.post("/predict", content=images.tobytes(), headers=PIXELS, extensions=names)
                assert answer.status_code == 200 and len(answer.json()["predictions"]) == 1
                assert ask("/openapi.json").json()["servers"] == [{"url": "/classifier"}]
                assert ask("/nothing").status_code == 404
            finally:
                proxy.terminate()
                proxy.wait(20)
