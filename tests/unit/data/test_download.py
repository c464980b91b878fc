"""Downloads from a server that breaks off, lies, forgets ranges and comes back."""

from __future__ import annotations

import hashlib
import io
import json
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cprec.data.build import build_dataset
from cprec.data.download import TRIES, download_files
from cprec.data.sources import public
from cprec.data.sources.public import PublicSource
from cprec.errors import DataError

CONTENT = bytes(range(256)) * 4000
Script = list[Callable[["Handler"], None]]


class Handler(BaseHTTPRequestHandler):
    """Answers each request with the next step of the server's script; the last step answers all that follow."""

    server: Server

    def do_GET(self) -> None:
        self.server.ranges.append(self.headers.get("Range"))
        script = self.server.script
        (script.pop(0) if len(script) > 1 else script[0])(self)

    def log_message(self, format: str, *args: object) -> None:
        pass

    @property
    def start(self) -> int:
        return int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))

    def send(self, body: bytes, *, status: int = 200, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True


class Server(ThreadingHTTPServer):
    script: Script
    ranges: list[str | None]


def whole(handler: Handler) -> None:
    rest = CONTENT[handler.start :]
    if handler.start >= len(CONTENT):
        handler.send(b"", status=416, Content_Range=f"bytes */{len(CONTENT)}")
    elif handler.start:
        where = f"bytes {handler.start}-{len(CONTENT) - 1}/{len(CONTENT)}"
        handler.send(rest, status=206, Content_Range=where)
    else:
        handler.send(rest)


def breaks_off(handler: Handler) -> None:
    rest = CONTENT[handler.start :]
    where = f"bytes {handler.start}-{len(CONTENT) - 1}/{len(CONTENT)}"
    status = 206 if handler.start else 200
    handler.send(rest[:300_000], status=status, length=len(rest), Content_Range=where)


def forgets_ranges(handler: Handler) -> None:
    handler.send(CONTENT)


def goes_on_elsewhere(handler: Handler) -> None:
    handler.send(CONTENT[7:], status=206, Content_Range=f"bytes 7-{len(CONTENT) - 1}/{len(CONTENT)}")


def status(code: int) -> Callable[[Handler], None]:
    return lambda handler: handler.send(b"no", status=code)


def announces_more(handler: Handler) -> None:
    handler.send(CONTENT[handler.start :], length=len(CONTENT) + 5)


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server(("127.0.0.1", 0), Handler)
    running.script, running.ranges = [whole], []
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def fetch(server: Server, folder: Path, *script: Callable[[Handler], None], name: str = "log.json.gz") -> list[float]:
    """Download one file under a script; returns the seconds that would have been waited."""
    server.script = list(script) or [whole]
    waits: list[float] = []
    download_files([f"http://127.0.0.1:{server.server_port}/{name}"], folder, "a licence", wait=waits.append)
    assert (folder / name).read_bytes() == CONTENT
    assert not (folder / f"{name}.part").exists()
    return waits


def test_a_file_comes_once_and_is_recorded(server: Server, tmp_path: Path) -> None:
    assert fetch(server, tmp_path) == []
    record = json.loads((tmp_path / "downloads.json").read_text())["log.json.gz"]
    assert record["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    assert record["bytes"] == len(CONTENT)
    fetch(server, tmp_path)
    assert server.ranges == [None], "what is there is not fetched again"


def test_a_broken_download_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    assert fetch(server, tmp_path, breaks_off, breaks_off, whole) == [1.0, 1.0]
    assert server.ranges == [None, "bytes=300000-", "bytes=600000-"]


def test_a_server_that_forgets_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    fetch(server, tmp_path, breaks_off, forgets_ranges)


def test_a_server_that_goes_on_elsewhere_is_not_believed(server: Server, tmp_path: Path) -> None:
    fetch(server, tmp_path, breaks_off, goes_on_elsewhere, whole)
    assert server.ranges[-1] is None, "from the start again"


def test_errors_that_pass_are_waited_for(server: Server, tmp_path: Path) -> None:
    assert fetch(server, tmp_path, status(503), status(500), status(429), whole) == [1.0, 2.0, 4.0]


def test_errors_that_stay_are_told(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the server answers 404 .*is the address right"):
        fetch(server, tmp_path, status(404))
    with pytest.raises(DataError, match=f"the server answers 503 .*{TRIES} times without progress"):
        fetch(server, tmp_path, status(503))
    assert sorted(path.name for path in tmp_path.iterdir()) == []


def test_a_length_that_is_never_reached_is_told_and_nothing_looks_complete(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="without progress; .* bytes are kept in .*log.json.gz.part"):
        fetch(server, tmp_path, announces_more, status(503))
    assert [path.name for path in tmp_path.iterdir()] == ["log.json.gz.part"]


def test_a_part_that_was_whole_already_is_taken(server: Server, tmp_path: Path) -> None:
    (tmp_path / "log.json.gz.part").write_bytes(CONTENT)
    fetch(server, tmp_path)
    assert server.ranges == [f"bytes={len(CONTENT)}-"]


def test_a_part_longer_than_the_file_is_thrown_away(server: Server, tmp_path: Path) -> None:
    (tmp_path / "log.json.gz.part").write_bytes(CONTENT + b"more")
    fetch(server, tmp_path)


def test_another_file_than_the_first_is_refused(server: Server, tmp_path: Path) -> None:
    fetch(server, tmp_path)
    (tmp_path / "log.json.gz").unlink()
    with pytest.raises(DataError, match="is not the one first seen on .*kept as .*log.json.gz.unexpected"):
        fetch(server, tmp_path, lambda handler: handler.send(CONTENT[::-1]))
    assert not (tmp_path / "log.json.gz").exists()
    (tmp_path / "log.json.gz").write_bytes(b"edited")
    with pytest.raises(DataError, match="is not the one first seen"):
        fetch(server, tmp_path)


def archive(*names: str) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as file:
        for name in names:
            file.writestr(name, b"1::1::5::978300760\n" if "ratings" in name else b"1::Toy Story (1995)::Comedy\n")
    return sink.getvalue()


def test_archives_are_unpacked_inside_the_folder_only(server: Server, tmp_path: Path) -> None:
    server.script = [lambda handler: handler.send(archive("ml-1m/ratings.dat", "../outside.txt"))]
    with pytest.raises(DataError, match=r"holds '../outside.txt', which would be written outside"):
        download_files([f"http://127.0.0.1:{server.server_port}/a.zip"], tmp_path / "raw", "x")
    assert not (tmp_path / "outside.txt").exists()
    server.script = [lambda handler: handler.send(b"no archive")]
    with pytest.raises(DataError, match="is no zip archive"):
        download_files([f"http://127.0.0.1:{server.server_port}/b.zip"], tmp_path / "raw", "x")


def test_prepare_downloads_by_name(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = public.FORMATS["movielens-1m"]
    url = f"http://127.0.0.1:{server.server_port}/ml-1m.zip"
    monkeypatch.setitem(public.FORMATS, "movielens-1m", type(layout)(**{**vars(layout), "urls": (url,)}))
    server.script = [lambda handler: handler.send(archive("ml-1m/ratings.dat", "ml-1m/movies.dat"))]
    source = PublicSource(format="movielens-1m", folder=str(tmp_path / "raw"), download=True)
    for name in ("first", "second"):
        build_dataset([source], tmp_path / name, min_user_events=0, min_item_events=0)
    assert len(server.ranges) == 1, "the files are there the second time"
    assert "MovieLens (GroupLens, University of Minnesota): for research" in capsys.readouterr().err
