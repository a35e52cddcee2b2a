"""Pages of other sites, other names, large bodies and missing tokens are refused, and every answer says so much."""

import pytest
from fastapi import FastAPI, Request
from starlette.testclient import TestClient

from whence.explorer.security import COOKIE, MOST_BYTES, Guard

HOSTS = ("127.0.0.1", "localhost", "::1")


def client(token=None, base="http://127.0.0.1:8765"):
    app = FastAPI()

    @app.get("/")
    async def page():
        return {"page": True}

    @app.post("/api/echo")
    async def echo(request: Request):
        return {"bytes": len(await request.body())}

    return TestClient(Guard(app, hosts=HOSTS, token=token), base_url=base, follow_redirects=False)


def test_its_own_page_is_answered():
    answer = client().get("/", headers={"origin": "http://127.0.0.1:8765", "sec-fetch-site": "same-origin"})
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert client(base="http://localhost:1").get("/").status_code == 200
    assert client(base="http://[::1]:8765").get("/").status_code == 200
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert client().get("/", headers=link).status_code == 200, "somebody was sent a link"


@pytest.mark.parametrize(("headers", "status"), [
    ({"host": "evil.example"}, 421),
    ({"host": "127.0.0.1.evil.example:8765"}, 421),
    ({"host": ""}, 421),
    ({"host": "[::1"}, 421),
    ({"origin": "http://evil.example"}, 403),
    ({"origin": "http://127.0.0.1:9999"}, 403),
    ({"origin": "null"}, 403),
    ({"origin": "http://["}, 403),
    ({"sec-fetch-site": "cross-site"}, 403),
    ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "cors"}, 403),
    ({"sec-fetch-site": "same-site"}, 403),
])  # fmt: skip
def test_pages_of_others_are_refused(headers, status):
    answer = client().get("/", headers=headers)
    assert answer.status_code == status
    assert answer.json()["error"]
    assert "content-security-policy" in answer.headers


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_form_of_another_page_cannot_ask(kind):
    assert client().post("/api/echo", content=b"{}", headers={"content-type": kind}).status_code == 415


def test_bodies_end():
    def pieces(size):
        yield b"x" * size

    json = {"content-type": "application/json"}
    assert client().post("/api/echo", content=b"x" * MOST_BYTES, headers=json).json() == {"bytes": MOST_BYTES}
    assert client().post("/api/echo", content=b"x" * (MOST_BYTES + 1), headers=json).status_code == 413
    assert client().post("/api/echo", content=pieces(MOST_BYTES + 1), headers=json).status_code == 413
    assert client().post("/api/echo", content=b"{}", headers=json | {"content-length": "many"}).status_code == 413


def test_a_token_is_shown_once_and_then_by_a_cookie():
    visitor = client(token="s3cret")
    assert visitor.get("/").status_code == 401
    assert visitor.get("/?token=wrong").status_code == 401
    assert visitor.post("/api/echo?token=s3cret", content=b"{}", headers={"content-type": "application/json"}
                        ).status_code == 401  # fmt: skip
    admitted = visitor.get("/?token=s3cret")
    assert (admitted.status_code, admitted.headers["location"]) == (303, "/")
    cookie = admitted.headers["set-cookie"]
    assert cookie.startswith(f"{COOKIE}=s3cret") and "HttpOnly" in cookie and "SameSite=Lax" in cookie
    assert visitor.get("/").json() == {"page": True}
    assert client(token="s3cret", base="http://192.0.2.7:8765").get("/?token=s3cret").status_code == 303, "any name"
    bearer = {"authorization": "Bearer s3cret"}
    assert client(token="s3cret").get("/", headers=bearer).status_code == 200
    assert client(token="s3cret").get("/", headers={"cookie": f"{COOKIE}=\x01; {COOKIE}="}).status_code == 401
