"""The parts that a file of histories is answered in: any process on any machine that sees their folder may write one.

A part is USERS_AT_ONCE rows of the input, which are read, ranked and written together, so its lists do not depend on
how many processes there are. Its file appears whole, in the folder OUTPUT.lists:

    job.json              what decides every part: the model's files, the input, the settings
    part-0000012.parquet  rows of the output with the key of their list; the rest of `Answered` as metadata
    earlier.sqlite        lists of an earlier run, before the input was mended
    hashes.json           hashes of the input, so that it is not read again for them
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cprec import __version__
from cprec.errors import ConfigError, DataError, InputChanged
from cprec.files import publish, write_whole
from cprec.provenance import ITEM_HEAD, TOKENIZER, WEIGHTS, FileHashes, model_hashes
from cprec.serve.config import RecommendConfig
from cprec.serve.engine import Baseline, Recommends
from cprec.serve.histories import HISTORY, ROWS_AT_ONCE, PartReader, count_rows
from cprec.serve.lists import LISTS, Answered, Answers, EarlierLists, gather_lists

USERS_AT_ONCE = ROWS_AT_ONCE
"""Users of a part, so that memory does not grow with the file. Their lists are what a kill may cost a process."""

JOB, EARLIER = "job.json", "earlier.sqlite"

ABOUT = b"cprec"
"""Key in the metadata of a part."""

PART = LISTS.append(pa.field(HISTORY, pa.binary()))

OpenModel = Callable[[str], tuple[Recommends, Baseline | None]]
"""Opens a model folder; the baseline answers for histories of which the model reads no event."""


# ---- the job ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every part of an output is made of."""

    model: str
    """Whole path, as `input`: a process on another machine has another working folder."""
    input: str
    domain: str | None
    k: int
    exclude_seen: bool
    strict: bool
    model_sha256: str
    input_sha256: str
    num_rows: int
    users_at_once: int
    finished: bool = False
    """Whether the parts were put together; they stay where something was left out."""

    @property
    def num_parts(self) -> int:
        return -(-self.num_rows // self.users_at_once)

    @property
    def sha256(self) -> str:
        """What the parts of this job are known by: the contents of model and input, wherever they are, and settings."""
        about = {name: value for name, value in asdict(self).items() if name not in ("model", "input", "finished")}
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def num_users(self, part: int) -> int:
        """Rows of the input in a part."""
        return min(self.users_at_once, self.num_rows - part * self.users_at_once)


def model_sha256(model: str) -> str:
    """A hash of everything but history and settings that decides a list: CPRec's version, and the model's files."""
    hashes = FileHashes(model)
    patterns = (*WEIGHTS, *TOKENIZER, *ITEM_HEAD, "cprec.json", "blend.json", "popularity.parquet", "items/*/*.parquet")
    of_trained_row = ("trained.json", "*/stage-*/best.safetensors")
    files = model_hashes(model, (*patterns, *of_trained_row), hashes)
    hashes.save()
    return hashlib.sha256(json.dumps([__version__, files], sort_keys=True).encode()).hexdigest()


def job_of(config: RecommendConfig, old: Job | None, hashes: FileHashes) -> Job:
    """The job of a configuration, with model and input as they are now. `old` knows the rows of an input that it had.

    Raises DataError where the input is no file of histories.
    """
    source = Path(config.input or "").resolve()
    if not source.is_file():
        raise DataError(f"{config.input} does not exist")
    input_sha256 = hashes.of(source)
    return Job(
        model=str(Path(config.model).resolve()) if Path(config.model).exists() else config.model,
        input=str(source),
        domain=config.domain,
        k=config.k,
        exclude_seen=config.exclude_seen,
        strict=config.strict,
        model_sha256=model_sha256(config.model),
        input_sha256=input_sha256,
        num_rows=old.num_rows if old and old.input_sha256 == input_sha256 else count_rows(source),
        users_at_once=USERS_AT_ONCE,
    )


def read_job(folder: Path) -> Job | None:
    """The job of a folder, None where none was begun."""
    try:
        return Job(**json.loads((folder / JOB).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise _unusable(folder / JOB, error) from None


def begin(config: RecommendConfig, folder: Path) -> Job:
    """Begin the job of a configuration in a folder, or go on with it.

    Where the folder is of a job with another input, its lists are kept for histories that are still there. Parts of
    another model or other settings count for nothing. With `partition` an unfinished job is not given up so: raises
    ConfigError where it has other settings or another model, InputChanged where it has another input.
    """
    old, hashes = read_job(folder), FileHashes(folder)
    job = job_of(config, old, hashes)
    if old is None or old.sha256 != job.sha256:
        if config.partition and old is not None and not old.finished:
            _refuse(old, job, folder)
        _keep_lists(old, job, folder)
    folder.mkdir(parents=True, exist_ok=True)
    hashes.save()
    _write_job(folder, job)
    return job


def require_unchanged(job: Job, config: RecommendConfig, folder: Path) -> None:
    """Raise InputChanged where the input or the model's files are no longer what the parts were made of."""
    now = job_of(config, job, FileHashes(folder))
    names = {"input_sha256": job.input, "model_sha256": job.model}
    if changed := [path for name, path in names.items() if getattr(now, name) != getattr(job, name)]:
        raise InputChanged(
            f"{' and '.join(changed)} changed while lists were made of it: run the command again, with files that stay"
        )


SETTINGS = ("domain", "k", "exclude_seen", "strict", "users_at_once")


def _refuse(old: Job, job: Job, folder: Path) -> None:
    changed = [f"{name}={getattr(old, name)}" for name in SETTINGS if getattr(old, name) != getattr(job, name)]
    if changed:
        raise ConfigError(
            f"{folder} was begun with {', '.join(changed)}: give every partition the same settings, or remove it to "
            "begin anew"
        )
    what = f"input than {job.input}" if old.model_sha256 == job.model_sha256 else f"model than {job.model}"
    raise InputChanged(
        f"{folder} was begun with another {what} as it is now: every partition must read the same. Remove it to begin "
        "anew"
    )


def _keep_lists(old: Job | None, job: Job, folder: Path) -> None:
    same = ("model_sha256", "domain", "k", "exclude_seen")
    if old is not None and all(getattr(old, name) == getattr(job, name) for name in same):
        written = (part for part in range(old.num_parts) if is_written(folder, old, part))
        gather_lists(folder / EARLIER, (_read(folder, part)[1] for part in written))
    else:
        (folder / EARLIER).unlink(missing_ok=True)
    for path in folder.glob("part-*"):
        path.unlink()


def _write_job(folder: Path, job: Job) -> None:
    write_whole(folder / JOB, json.dumps(asdict(job), indent=2) + "\n")


# ---- parts -----------------------------------------------------------------------------------------------------------


def unwritten_parts(folder: Path, job: Job, parts: Sequence[int] | None = None) -> list[int]:
    """Those of some parts, or of all, that no process has written yet."""
    return [part for part in (range(job.num_parts) if parts is None else parts) if not is_written(folder, job, part)]


def is_written(folder: Path, job: Job, part: int) -> bool:
    """Whether a part of this job is there."""
    path = _path(folder, part)
    try:
        return path.exists() and _about(pq.read_schema(path))["job"] == job.sha256
    except (OSError, ValueError, KeyError) as error:
        raise _unusable(path, error) from None


def write_part(folder: Path, part: int, open_model: OpenModel) -> None:
    """Rank the users of a part and write their lists; what another process has written stays.

    The model is opened for the first part of a process, and stays for the others.
    """
    job = read_job(folder)
    if job is None:
        raise DataError(f"{folder / JOB} is gone: another command put the parts together, or the folder was removed")
    if is_written(folder, job, part):
        return
    answers, reader = _opened(folder, job, open_model)
    made = answers.of(reader.part(part))
    if job.strict and made.rejected:
        line, user, item, reason = made.rejected[0]
        who, what = f", user {user!r}" if user else "", f": {item!r}" if item else ""
        raise DataError(f"{job.input}, line {line}{who}: {reason}{what} (strict stops at the first)")
    about = {name: value for name, value in vars(made).items() if name != "rows"} | {"job": job.sha256}
    table = pa.Table.from_pylist(made.rows, PART).replace_schema_metadata({ABOUT: json.dumps(about)})
    # A name of its own: a scheduler may run a part twice at the same time.
    unfinished = folder / f"{_path(folder, part).name}.{uuid.uuid4().hex}"
    try:
        pq.write_table(table, unfinished, compression="zstd")
        publish(unfinished, _path(folder, part))
    finally:
        unfinished.unlink(missing_ok=True)


@functools.lru_cache(maxsize=1)
def _opened(folder: Path, job: Job, open_model: OpenModel) -> tuple[Answers, PartReader]:
    recommender, popular = open_model(job.model)
    domain = job.domain or recommender.domain
    if domain is None or domain not in recommender.catalogue.domains:
        raise ConfigError(f"domain={domain!r}: name one of {', '.join(recommender.catalogue.domains)}")
    answers = Answers(
        recommender,
        popular,
        EarlierLists(folder / EARLIER),
        domain=domain,
        k=job.k,
        exclude_seen=job.exclude_seen,
    )
    return answers, PartReader(Path(job.input), job.users_at_once)


def read_parts(folder: Path, job: Job) -> Iterator[tuple[Answered, pa.Table]]:
    """What the parts came to, without their rows, and their rows with LISTS, in the order of the input."""
    for part in range(job.num_parts):
        about, table = _read(folder, part)
        if about.pop("job") != job.sha256:
            raise DataError(f"{_path(folder, part)} is of another job: run the command again, and no other beside it")
        answered = Answered(**about | {"counts": Counter(about["counts"])})
        yield answered, table.select(LISTS.names).replace_schema_metadata()


def _read(folder: Path, part: int) -> tuple[dict[str, Any], pa.Table]:
    """The record and the rows of a part."""
    path = _path(folder, part)
    try:
        table = pq.read_table(path)
        return _about(table.schema), table
    except (OSError, ValueError, KeyError) as error:
        raise _unusable(path, error) from None


def finish(folder: Path, job: Job, *, keep: bool) -> None:
    """Keep the parts of a job that is finished, or remove them with their folder."""
    _opened.cache_clear()  # the model
    if keep:
        _write_job(folder, replace(job, finished=True))
    else:
        shutil.rmtree(folder)


def _path(folder: Path, part: int) -> Path:
    return folder / f"part-{part:07}.parquet"


def _about(schema: pa.Schema) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(schema.metadata[ABOUT])
    return found


def _unusable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} cannot be used ({error}): remove it, and run the command again")
