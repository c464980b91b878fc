"""Downloads from a server that breaks off, lies, forgets ranges and comes back."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import random
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cprec.data.build import build_dataset
from cprec.data.config import PublicSource, Rules
from cprec.data.download import TRIES, download_files, verify_files
from cprec.data.sources import layouts
from cprec.errors import DataError

CONTENT = gzip.compress(random.Random(0).randbytes(1_000_000), mtime=0)
OTHER = gzip.compress(random.Random(1).randbytes(1_000_000), mtime=0)
Script = list[Callable[["Handler"], None]]


class Handler(BaseHTTPRequestHandler):
    """Answers each request with the next step of the server's script; the last step answers all that follow."""

    server: Server

    def do_GET(self) -> None:
        self.server.ranges.append(self.headers.get("Range"))
        self.server.conditions.append(self.headers.get("If-Range"))
        script = self.server.script
        (script.pop(0) if len(script) > 1 else script[0])(self)

    def log_message(self, format: str, *args: object) -> None:
        pass

    @property
    def start(self) -> int:
        return int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))

    def send(self, body: bytes, *, status: int = 200, length: int | str | None = None, **headers: str) -> None:
        """Answer; `length` is what is announced in place of the body's, and "" announces nothing."""
        self.send_response(status)
        if length != "":
            self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True


class Server(ThreadingHTTPServer):
    script: Script
    ranges: list[str | None]
    conditions: list[str | None]


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


def announces(length: int | str, body: bytes = CONTENT) -> Callable[[Handler], None]:
    return lambda handler: handler.send(body[handler.start :], length=length)


def of_version(tag: str, content: bytes, size: int | None = None) -> Callable[[Handler], None]:
    """Serves one version of a file as HTTP says: a range of it only to who asks for this version."""

    def answer(handler: Handler) -> None:
        is_rest = handler.start and handler.headers.get("If-Range") in (None, tag)
        start = handler.start if is_rest else 0
        where = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:][:size]
        handler.send(body, status=206 if is_rest else 200, length=len(content) - start, ETag=tag, Content_Range=where)

    return answer


def announces_more(handler: Handler) -> None:
    handler.send(CONTENT[handler.start :], length=len(CONTENT) + 5)


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server(("127.0.0.1", 0), Handler)
    running.script, running.ranges, running.conditions = [whole], [], []
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


@pytest.mark.parametrize(
    "lie",
    [announces(1000), announces("", CONTENT[:1000]), announces("", CONTENT[:0]), announces(40, b"<!DOCTYPE html>" * 9)],
    ids=["a length too short", "no length, and it breaks off", "nothing", "a web page"],
)
def test_a_file_that_only_seems_complete_is_fetched_again(
    server: Server, tmp_path: Path, lie: Callable[[Handler], None]
) -> None:
    fetch(server, tmp_path, lie, whole)
    assert server.ranges == [None, None], "nothing of it is kept"
    (tmp_path / "log.json.gz").unlink()
    with pytest.raises(
        DataError, match=r"what came is (no whole gzip file|a web page|empty).*, 2 times; nothing of it is"
    ):
        fetch(server, tmp_path, lie)
    assert [path.name for path in tmp_path.iterdir()] == ["downloads.json"]


@pytest.mark.parametrize("length", ["", "many", "-5"])
def test_a_length_that_is_none_is_not_needed_for_a_file_that_proves_itself(
    server: Server, tmp_path: Path, length: str
) -> None:
    fetch(server, tmp_path, announces(length))


def test_a_file_that_cannot_prove_itself_needs_a_length(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="log.csv: the server does not say how long the file is.* fetch it by hand"):
        fetch(server, tmp_path, announces(""), name="log.csv")
    assert [path.name for path in tmp_path.iterdir()] == []
    fetch(server, tmp_path, breaks_off, whole, name="log.csv")


def test_versions_of_a_file_are_not_mixed(server: Server, tmp_path: Path) -> None:
    fetch(server, tmp_path, of_version('"a"', OTHER, 300_000), of_version('"b"', CONTENT), name="log.csv")
    assert server.conditions == [None, '"a"']
    assert sorted(path.name for path in tmp_path.iterdir()) == ["downloads.json", "log.csv"]


def test_a_part_of_another_version_is_noticed_where_the_server_says_nothing(server: Server, tmp_path: Path) -> None:
    (tmp_path / "log.json.gz.part").write_bytes(OTHER[:400_000])
    fetch(server, tmp_path)
    assert server.ranges == ["bytes=400000-", None]


def test_a_server_that_always_breaks_off_does_not_keep_us_for_ever(server: Server, tmp_path: Path) -> None:
    def up_to(size: int) -> Callable[[Handler], None]:
        return lambda handler: handler.send(CONTENT[:size], length=len(CONTENT))

    server.script = [up_to(size) for _ in range(20) for size in (300_000, 200_000)]
    with pytest.raises(DataError, match=f"{TRIES} times without progress"):
        fetch(server, tmp_path, *server.script)
    assert len(server.ranges) == TRIES


def test_a_full_disk_is_told_at_once(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(DataError, match=r"log.json.gz.part cannot be written: No space left on device"):
        fetch(server, tmp_path)


def test_no_server_is_told_without_the_words_of_the_library(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r": .*refused, 5 times without progress"):
        download_files(["http://127.0.0.1:1/a.zip"], tmp_path, "x", wait=lambda _: None)


def test_another_file_than_the_first_is_refused(server: Server, tmp_path: Path) -> None:
    fetch(server, tmp_path)
    (tmp_path / "log.json.gz").unlink()
    with pytest.raises(DataError, match="is not the one first seen on .*kept as .*log.json.gz.unexpected"):
        fetch(server, tmp_path, lambda handler: handler.send(OTHER))
    assert not (tmp_path / "log.json.gz").exists()
    (tmp_path / "log.json.gz").write_bytes(b"edited")
    with pytest.raises(DataError, match="log.json.gz is not the file first seen on .*Delete it to fetch it again"):
        fetch(server, tmp_path)
    assert (tmp_path / "log.json.gz").read_bytes() == b"edited", "what a person wrote is left alone"


@pytest.mark.parametrize("text", ["{", "[]", '{"log.json.gz": {}}', '{"log.json.gz": 3}'])
def test_a_record_that_is_none_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "downloads.json").write_text(text)
    with pytest.raises(DataError, match="downloads.json is not a record of downloads: delete it"):
        verify_files(tmp_path, [tmp_path / "log.json.gz"] if text != "[]" else [])


def archive(*names: str) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as file:
        for name in names:
            file.writestr(name, b"1::1::5::978300760\n" if "ratings" in name else b"1::Toy Story (1995)::Comedy\n")
    return sink.getvalue()


@pytest.mark.parametrize("outside", ["../outside.txt", "ml-1m/../../outside.txt", "/outside.txt"])
def test_archives_are_unpacked_inside_the_folder_only(server: Server, tmp_path: Path, outside: str) -> None:
    server.script = [lambda handler: handler.send(archive("ml-1m/ratings.dat", outside))]
    with pytest.raises(DataError, match="holds '.*outside.txt', which would be written outside"):
        download_files([f"http://127.0.0.1:{server.server_port}/a.zip"], tmp_path / "raw", "x")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.zip", "downloads.json", "raw"], "nothing of it is"


def test_a_damaged_archive_is_not_taken(server: Server, tmp_path: Path) -> None:
    damaged = archive("ml-1m/ratings.dat").replace(b"978300760", b"978300761")
    for content in (b"no archive", damaged, archive("ml-1m/ratings.dat")[:-30]):
        server.script = [lambda handler, content=content: handler.send(content)]  # type: ignore[misc]
        with pytest.raises(
            DataError, match="what came is (no whole zip archive|a zip archive whose ml-1m/ratings.dat)"
        ):
            download_files([f"http://127.0.0.1:{server.server_port}/a.zip"], tmp_path, "x", wait=lambda _: None)
        assert [path.name for path in tmp_path.iterdir()] == []


def test_an_archive_half_unpacked_is_gone_on_with(server: Server, tmp_path: Path) -> None:
    server.script = [lambda handler: handler.send(archive("ml-1m/ratings.dat", "ml-1m/movies.dat"))]
    url = f"http://127.0.0.1:{server.server_port}/ml-1m.zip"
    download_files([url], tmp_path, "x")
    (tmp_path / "ml-1m" / "movies.dat").rename(tmp_path / "ml-1m" / "movies.dat.part")
    download_files([url], tmp_path, "x")
    assert len(server.ranges) == 1
    assert sorted(path.name for path in (tmp_path / "ml-1m").iterdir()) == ["movies.dat", "ratings.dat"]
    record = json.loads((tmp_path / "downloads.json").read_text())
    assert sorted(record) == ["ml-1m.zip", "ml-1m/movies.dat", "ml-1m/ratings.dat"]
    assert record["ml-1m/movies.dat"]["url"] == f"{url}#ml-1m/movies.dat"


@pytest.mark.slow
def test_prepare_downloads_by_name(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = layouts.LAYOUTS["movielens-1m"]
    url = f"http://127.0.0.1:{server.server_port}/ml-1m.zip"
    monkeypatch.setitem(layouts.LAYOUTS, "movielens-1m", type(layout)(**{**vars(layout), "urls": (url,)}))
    server.script = [lambda handler: handler.send(archive("ml-1m/ratings.dat", "ml-1m/movies.dat"))]
    source = PublicSource(format="movielens-1m", folder=str(tmp_path / "raw"), download=True)
    for name in ("first", "second"):
        build_dataset([source], tmp_path / name, Rules(k_core=0))
    assert len(server.ranges) == 1, "the files are there the second time"
    said = capsys.readouterr().err
    assert said.count("MovieLens (GroupLens, University of Minnesota): for research") == 1, "only where it downloads"
    (tmp_path / "raw" / "ml-1m" / "ratings.dat").write_bytes(b"1::1::4::978300760\n")
    with pytest.raises(DataError, match="ratings.dat is not the file first seen on "):
        build_dataset([source], tmp_path / "third", Rules(k_core=0))
