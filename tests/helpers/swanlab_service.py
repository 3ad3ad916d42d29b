"""A stand-in for the SwanLab service on loopback, as far as one run needs it."""

import gzip
import json
import re
import threading
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class SwanLabService:
    """Serves in a thread of this process, on a free port of 127.0.0.1.

    `mode`: "ok"; "refuse" the key (401); "hang": take every request and never answer; a number n:
    answer n requests, then hang or, with `dies`, refuse every connection. `runs` is {run id:
    {"name", "state", "scalars": {key: {step: value}}, "profile"}}; `requests` lists (method, path).
    """

    def __init__(self, mode: str | int = "ok", dies: bool = False):
        self.dies = dies
        self.mode, self.runs, self.projects, self.requests = mode, {}, {}, []
        self.released = threading.Event()
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                service.answer(self)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads, self.server.block_on_close = True, False
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self) -> "SwanLabService":
        return self

    def __exit__(self, *exception: object) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """What points SwanLab at this service."""
        url = f"http://127.0.0.1:{self.server.server_address[1]}"
        return {
            "SWANLAB_API_HOST": url,
            "SWANLAB_WEB_HOST": url,
            "SWANLAB_API_KEY": "a-key-for-tests",
        }

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer one request as `mode` says."""
        raw = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        raw = gzip.decompress(raw) if handler.headers.get("Content-Encoding") == "gzip" else raw
        path = handler.path.split("?")[0].removeprefix("/api")
        self.requests.append((handler.command, path))
        if self.mode == "hang" or (
            isinstance(self.mode, int) and len(self.requests) > self.mode
        ):
            self.server.socket.close() if self.dies else self.released.wait()
            handler.close_connection = True
            return
        code, body = (
            (401, {"message": "no such key"})
            if self.mode == "refuse"
            else self.route(handler.command, path, json.loads(raw) if raw else None)
        )
        text = json.dumps(body).encode()
        handler.send_response(code)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text)

    def route(self, method: str, path: str, body: dict | None) -> tuple[int, dict]:
        """(status, answer) of a service that works."""
        if path == "/login/api_key":
            until = datetime.now(timezone.utc) + timedelta(days=30)
            return 200, {
                "sid": "sid",
                "expiredAt": until.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
                "userInfo": {"username": "tester", "name": "tester"},
            }
        if method == "POST" and (found := re.fullmatch(r"/projects/(\w+)", path)):
            self.projects[found[1], body["name"]] = {
                "cuid": body["name"],
                "name": body["name"],
                "version": 1,
                "path": f"/{found[1]}/{body['name']}",
                "group": {"username": found[1]},
                "_count": {"experiments": len(self.runs)},
            }
            return 201, {}
        if method == "GET" and (found := re.fullmatch(r"/project/(\w+)/([^/]+)", path)):
            project = self.projects.get((found[1], found[2]))
            return (200, project) if project else (404, {"message": "no project"})
        if method == "POST" and re.fullmatch(r"/project/\w+/[^/]+/experiment", path):
            return self.open_run(body)
        if found := re.fullmatch(r"/project/\w+/[^/]+/runs/([^/]+)(/\w+)?", path):
            return self.change_run(found[1], found[2], method, body)
        if found := re.fullmatch(r"/house/metrics/summaries/[^/]+/([^/]+)", path):
            last = [
                {"key": key, "step": max(steps)}
                for key, steps in self.runs[found[1]]["scalars"].items()
            ]
            return 200, {"scalar": last, "media": [], "log": []}
        if path == "/house/metrics" and body["type"] == "scalar":
            scalars = self.runs[body["experimentId"]]["scalars"]
            for point in body["metrics"]:
                scalars.setdefault(point["key"], {})[int(point["index"])] = point["data"]
        return 200, {}

    def open_run(self, body: dict) -> tuple[int, dict]:
        """A new run, or one that goes on."""
        known = body["cuid"] in self.runs
        new = {
            "name": body.get("name"),
            "createdAt": body["createdAt"],
            "scalars": {},
            "profile": {},
        }
        run = self.runs.setdefault(body["cuid"], new)
        run["state"] = "RUNNING"
        return (200 if known else 201), {
            "cuid": body["cuid"],
            "slug": body["cuid"],
            "name": run["name"],
            "createdAt": run["createdAt"],
        }

    def change_run(
        self, name: str, part: str | None, method: str, body: dict | None
    ) -> tuple[int, dict]:
        """Read a run, or set its state or profile."""
        run = self.runs.get(name)
        if run is None:
            return 404, {"message": "no run"}
        if method == "PUT" and part == "/state":
            run["state"] = body["state"]
        elif method == "PUT" and part == "/profile":
            run["profile"].update(body)
        return 200, {
            "cuid": name,
            "slug": name,
            **{key: run[key] for key in ("name", "state", "createdAt")},
        }
