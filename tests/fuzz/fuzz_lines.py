"""Coverage-guided fuzzing of everything that takes lines apart in Python: `python tests/fuzz/fuzz_lines.py`.

Needs `pip install atheris`. An input is a letter that names a check, and what is checked. Inputs that reached new code
are added to `corpus.txt`, which `test_corpus.py` replays; an input that fails a check is left in a file `crash-...`.

    python tests/fuzz/fuzz_lines.py --seconds 180      fuzz, one thread; further options go to libFuzzer
    python tests/fuzz/fuzz_lines.py crash-1f3a...      one input again
"""

from __future__ import annotations

import argparse
import ast
import gzip
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

CORPUS = Path(__file__).with_name("corpus.txt")

SEPARATORS = (",", "\t", "::", "¦")
ENCODINGS = ("cp1252", "utf-16", "utf-16-le", "gb18030", "shift_jis", "utf-7", "utf-8-sig", "cp037")
QUOTES = ('"', "'", "", "”")


def check(data: bytes) -> None:
    """Raise unless the check that the first byte names holds of the rest."""
    if data:
        letters = sorted(CHECKS)
        letter = chr(data[0])
        CHECKS[letter if letter in CHECKS else letters[data[0] % len(letters)]](data[1:])


# ---- checks ----------------------------------------------------------------------------------------------------------


def check_delimited(data: bytes) -> None:
    """Rows are the same all at once, one by one and in several blocks, and every line is accounted for."""
    from cprec.data import delimited

    if not data:
        return
    with patch.object(delimited, "MAX_LINE", 24 if data[0] & 128 else delimited.MAX_LINE):
        _check_delimited(data)


def _check_delimited(data: bytes) -> None:
    from cprec.data import delimited

    form = delimited.Form(("x", "y")[: 1 + data[0] % 2], SEPARATORS[data[0] // 2 % 4], QUOTES[data[0] // 8 % 4])
    text = data[1:]
    size = 1 + len(text) // (2 + data[0] // 32)
    whole = delimited.parse_block(text, 1, form, is_last=True)
    with patch.object(delimited, "_parse_faultless", return_value=None):
        each = delimited.parse_block(text, 1, form, is_last=True)
    rest, line, rows, bad = b"", 1, [], []
    for start in range(0, len(text) or 1, size):
        rest += text[start : start + size]
        parsed = delimited.parse_block(rest, line, form, is_last=start + size >= len(text))
        rows += _rows(parsed)
        bad += parsed.bad
        rest, line = rest[parsed.num_bytes :], line + parsed.num_lines
    assert (_rows(whole), whole.bad) == (_rows(each), each.bad) == (rows, bad)
    assert whole.num_bytes == len(text) and not rest
    begins = sorted([*whole.lines.tolist(), *(row.line for row in bad)])
    assert len(set(begins)) == len(begins), "no line begins two rows"
    lines = text.decode("utf-8", "surrogateescape").split("\n")
    empty = [number for number, content in enumerate(lines, start=1) if content in ("", "\r")]
    if not form.quote:
        assert begins == sorted(set(range(1, len(lines) + 1)) - set(empty)), "each line is a row or empty"
    for row in bad:
        row.row.encode()  # can be written


def _rows(parsed: Any) -> list[tuple[Any, ...]]:
    return list(zip(parsed.lines.tolist(), *(column.to_pylist() for column in parsed.columns), strict=True))


def check_title(data: bytes) -> None:
    """A clean title is one line of plain text, and stays as it is when it is cleaned again."""
    from cprec.data.cleaning import clean_title, has_word

    title = clean_title(data.decode("utf-8", "replace"))
    assert clean_title(title) == title
    assert not set(title) & set('\n\r\t\0"\u2028\u201c\ufeff') and "  " not in title and title == title.strip()
    has_word(title)


def check_literal(data: bytes) -> None:
    """A line of Python is a dict or a ValueError; its values become text."""
    from cprec.data.sources.lines import as_text, python_literal

    line = data.decode("utf-8", "replace")
    try:
        record = python_literal(line)
    except ValueError:
        return
    for value in record.values():
        try:
            text = as_text(value)
        except (ValueError, RecursionError):  # the two that reading sets a line aside for
            continue
        assert text is None or isinstance(text, str)


def check_json(data: bytes) -> None:
    """A line of JSON is an object, or nothing."""
    from cprec.data.sources.table_files import json_object

    value = json_object(data.decode("utf-8", "replace"))
    assert value is None or isinstance(value, dict)


def check_header(data: bytes) -> None:
    """A line that stands alone is taken apart as the only row of a text is, or refused for its quotes."""
    from cprec.data.delimited import Form, split_line, split_rows

    if not data:
        return
    separator, quote = SEPARATORS[data[0] % 4], QUOTES[data[0] // 4 % 4]
    line = data[1:].decode("utf-8", "replace").replace("\n", "").replace("\r", "")
    names = split_line(line, separator, quote)
    if names is None:
        assert quote and quote in line
    elif line:
        (row,) = split_rows(line, Form(("x",) * len(names), separator, quote), is_last=True)
        assert row.fields == names


def check_file(data: bytes) -> None:
    """A file is read in full, whatever the size of blocks, or refused with its name and what to do."""
    from cprec.data import text_files
    from cprec.errors import DataError

    if not data:
        return
    content, name = data[1:], ("a.csv", "a.csv.gz", "a.txt.GZ")[data[0] % 3]
    if data[0] & 64:
        content = gzip.compress(content, mtime=0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        found = set()
        for size in (1 + data[0] % 7, 1 << 20):
            with patch.object(text_files, "BLOCK_BYTES", size):
                try:
                    found.add(b"".join(text_files.text_blocks(path)) if size > 7 else _joined(path, text_files))
                except DataError as error:
                    assert str(error).startswith(f"{path} ") or str(error).startswith(f"{path}:")
                    found.add(None)
        if data[0] & 64 == 0 and data[1:4] != b"\xef\xbb\xbf" and b"\r" not in content:
            assert len(found) == 1
        if found != {None}:
            assert len(text_files.first_lines(path, 3)) <= 3


def _joined(path: Path, text_files: Any) -> bytes:
    return b"".join(text_files.text_blocks(path))


def check_encoding(data: bytes) -> None:
    """A file of any encoding is the same text however its blocks are cut; what is no text in it is no UTF-8 either."""
    from cprec.data import text_files

    if not data:
        return
    encoding, content = ENCODINGS[data[0] % len(ENCODINGS)], data[1:]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.csv")
        path.write_bytes(content)
        try:
            with patch.object(text_files, "BLOCK_BYTES", 1 + data[0] % 7):
                found = b"".join(text_files.text_blocks(path, encoding))
        except ValueError as error:
            assert str(error).startswith(f"{path} "), "the only one is DataError, which names the file"
            return
    try:
        text = content.decode(encoding).encode()
    except UnicodeError:
        assert b"\xff" in found
    else:
        if b"\r" not in text:
            assert found == text.removeprefix(b"\xef\xbb\xbf")


CHECKS: dict[str, Callable[[bytes], None]] = {
    "d": check_delimited,
    "t": check_title,
    "l": check_literal,
    "j": check_json,
    "h": check_header,
    "f": check_file,
    "e": check_encoding,
}


# ---- the corpus, and the run -----------------------------------------------------------------------------------------


def corpus() -> Iterator[bytes]:
    """The inputs of `corpus.txt`: one a line, as Python writes bytes."""
    for line in CORPUS.read_text(encoding="utf-8").splitlines():
        yield ast.literal_eval(line)


def _needed(inputs: Iterable[bytes]) -> list[bytes]:
    """The shortest inputs that pass and reach together every step from line to line that all of them reach."""
    steps: set[tuple[str, int, int]] = set()
    before = [0]

    def trace(frame: FrameType, event: str, _: object) -> Any:
        name = frame.f_code.co_filename
        if "cprec" not in name:
            return None
        steps.add((name, before[0], frame.f_lineno))
        before[0] = frame.f_lineno
        return trace

    kept = []
    for data in sorted(inputs, key=lambda data: (len(data), data)):
        known = len(steps)
        sys.settrace(trace)
        try:
            check(data)
        except Exception:
            continue
        finally:
            sys.settrace(None)
        if len(steps) > known:
            kept.append(data)
    return kept


def fuzz(arguments: list[str]) -> None:
    """Hand over to libFuzzer, which ends the process; `arguments` are its own."""
    import atheris

    with atheris.instrument_imports(include=["cprec.data"]):
        import cprec.data.catalogue
        import cprec.data.delimited
        import cprec.data.sources.lines
        import cprec.data.sources.table_files
        import cprec.data.text_files  # noqa: F401
    atheris.Setup([sys.argv[0], *arguments], check)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=180)
    parser.add_argument("--run", action="store_true", help="the rest is for libFuzzer")
    parser.add_argument("inputs", nargs="*", type=Path, help="inputs to check once")
    told, rest = parser.parse_known_args()
    if told.run:
        fuzz([*rest, *map(str, told.inputs)])
    elif told.inputs:
        for path in told.inputs:
            check(path.read_bytes())
    else:
        with tempfile.TemporaryDirectory() as folder:
            for number, data in enumerate(corpus()):
                Path(folder, str(number)).write_bytes(data)
            options = [f"-max_total_time={told.seconds}", "-max_len=256", "-timeout=20", "-reduce_inputs=1", *rest]
            ended = subprocess.run([sys.executable, __file__, "--run", *options, folder], check=False)
            found = {path.read_bytes() for path in Path(folder).iterdir()}
        CORPUS.write_text("".join(f"{data!r}\n" for data in sorted(_needed(found))), encoding="utf-8")
        sys.exit(ended.returncode)


if __name__ == "__main__":
    main()
