"""Opens the table engine, which runs every step that concerns all rows: the only file that knows which engine it is.

Everything above speaks Ibis, so that the same expressions run on each engine. `duckdb` is the default: embedded, out of
core, nothing to install or start.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import sys
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import ibis
import pyarrow as pa
import pyarrow.parquet as pq
from ibis.expr.operations import DatabaseTable, Namespace

from cprec import errors
from cprec.data import text_files
from cprec.data.delimited import Form
from cprec.data.text_files import LINE
from cprec.errors import ConfigError, CPRecError, DataError
from cprec.machine import free_memory, num_cores
from cprec.progress import track

MEMORY_SHARE = 0.6
"""Share of the memory free at its start that the engine uses unless a limit is given; the rest is for Python."""

BATCH_ROWS = 1 << 17
"""Rows of a batch."""

MOST_TASKS = 10_000
"""Tasks of a Spark job; its driver keeps a record of each."""

SECONDS_BETWEEN_LOOKS = 1.0
"""How often progress of a Spark job is asked for."""


class _Engine(ABC):
    """What both engines have, while they are open. Tables are Ibis expressions of the `backend`."""

    backend: Any
    """The Ibis connection."""
    spill: Path
    """A folder for temporary files, empty at the start and deleted at the end."""

    @abstractmethod
    def to_arrow(self, expression: Any) -> pa.Table:
        """The rows of an expression, in memory."""

    def row(self, expression: Any) -> dict[str, Any]:
        """The one row of an expression, as an aggregate has."""
        return dict(self.to_arrow(expression).to_pylist()[0])

    def value(self, scalar: Any) -> Any:
        """A single value."""
        return self.to_arrow(scalar.as_table())[0][0].as_py()


class DuckDBEngine(_Engine):
    """DuckDB in this process."""

    def __init__(self, spill: Path, memory_limit: str | None) -> None:
        self.spill = spill
        self.backend = ibis.duckdb.connect()
        self._run(f"SET temp_directory = {text_files.quoted(spill / 'duckdb')}")
        self._run(f"SET threads = {num_cores()}")
        limit = memory_limit or f"{int(free_memory() * MEMORY_SHARE)}B"
        try:
            self._run(f"SET memory_limit = {text_files.quoted(limit)}")
        except duckdb.Error:
            raise ConfigError(f"memory_limit={memory_limit!r}: write a size, as 8GB or 500MB") from None

    @contextmanager
    def translated_errors(self, what: str) -> Iterator[None]:
        """Turn the engine's errors, of a file, memory or the disk, into DataError; `what` begins the message."""
        try:
            yield
        except duckdb.OutOfMemoryException as error:
            raise DataError(f"{what}: not enough memory or disk ({_first_line(error)}); raise memory_limit") from None
        except duckdb.Error as error:
            raise DataError(f"{what}: {_first_line(error)}; fetch or write a damaged file again") from None

    def read_parquet(self, path: str | Path) -> Any:
        """A Parquet file with its row numbers (`LINE`)."""
        with self.translated_errors(str(path)):
            table = self.backend.read_parquet(str(path), table_name=text_files.new_name(), file_row_number=True)
        return table.mutate((ibis._.file_row_number + 1).name(LINE)).drop("file_row_number")

    def read_delimited(self, path: Path, form: Form) -> tuple[Any, Any | None]:
        """A delimited text file, every column as text: (rows, malformed rows).

        Rows with too few or too many fields, open quotes or bytes of another encoding are set aside: the second table
        has columns `line_in_file`, `reason` and `row`; it is None where there are none.
        """
        with self.translated_errors(str(path)):
            rows, malformed = text_files.read_delimited(self.backend.con, path, form)
        return self.backend.table(rows), None if malformed is None else self.backend.table(malformed)

    def read_json_lines(self, path: Path, columns: Sequence[str], *, encoding: str = "utf-8") -> tuple[Any, Any | None]:
        """One JSON object per line, the given keys as text (lists joined by a comma): (rows, malformed rows)."""
        with self.translated_errors(str(path)):
            rows, malformed = text_files.read_json_lines(self.backend.con, path, columns, encoding=encoding)
        return self.backend.table(rows), self.backend.table(malformed)

    def from_arrow(self, table: pa.Table) -> Any:
        """An Arrow table that is in memory already."""
        name = text_files.new_name()
        self.backend.con.register(name, table)
        return self.backend.table(name)

    def from_batches(self, batches: pa.RecordBatchReader) -> Any:
        """Rows that come one Arrow batch at a time; they go to disk, and memory holds one batch."""
        return self.backend.read_parquet(str(_stage(self.spill, batches)), table_name=text_files.new_name())

    def close(self) -> None:
        self.backend.disconnect()

    def microsecond(self, moment: Any) -> Any:
        """The microseconds beyond whole seconds of a column of times."""
        return moment.cast("timestamp").microsecond()  # of times with a zone DuckDB gives none

    def to_arrow(self, expression: Any) -> pa.Table:
        return self.backend.to_pyarrow(expression)

    def batches(self, expression: Any) -> Iterator[pa.RecordBatch]:
        """The rows of an expression, one Arrow batch at a time; ask the engine nothing else until they are read."""
        # Ibis asks the connection for them in a way that DuckDB 2 no longer has.
        yield from self.backend.con.sql(self.backend.compile(expression)).to_arrow_reader(BATCH_ROWS)

    def materialise(self, expression: Any) -> Any:
        """Compute an expression once; the result is a table that spills to disk where memory is short."""
        # As `create_table` of Ibis, which spends half of its time on asking DuckDB for names and types known here.
        name, schema, types = text_files.new_name(), expression.schema(), self.backend.compiler.type_mapper
        columns = (f"{text_files.identifier(column)} {types.to_string(kind)}" for column, kind in schema.items())
        self._run(f"CREATE TEMP TABLE {name} ({', '.join(columns)})")
        self._run(f"INSERT INTO {name} {self.backend.compile(expression)}")
        return DatabaseTable(name, schema, self.backend, Namespace("temp", "main")).to_expr()

    def discard(self, table: Any) -> None:
        """Drop a table that `materialise` made."""
        self._run(f"DROP TABLE {table.get_name()}")

    def write_parquet(self, expression: Any, path: Path) -> None:
        """Write an expression to one Parquet file, in its order of rows."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.backend.to_parquet(expression, str(path), compression="zstd")

    def write_parts(self, expression: Any, folder: Path, column: str) -> None:
        """Write the rows of each value n of an int column to `folder/part-n.parquet`, in any order, without it."""
        folder.mkdir(parents=True, exist_ok=True)
        aside = self.spill / text_files.new_name()
        self._run("SET preserve_insertion_order = false")
        try:
            self.backend.to_parquet(
                expression, str(aside), compression="zstd", partition_by=column, filename_pattern="part-{i}"
            )
        finally:
            self._run("SET preserve_insertion_order = true")
        for part in sorted(aside.glob(f"{column}=*")):
            _join_files(sorted(part.iterdir()), folder / f"part-{part.name.partition('=')[2]}.parquet")

    def _run(self, sql: str) -> None:
        self.backend.con.execute(sql)


class SparkEngine(_Engine):
    """Spark: a local session, or a cluster whose executors see the files and the spill folder.

    DuckDB takes text files apart in this process, as it does without Spark, and hands them over as Parquet. Spark reads
    Parquet itself.
    """

    def __init__(self, spill: Path, memory_limit: str | None, master: str) -> None:
        try:
            from pyspark.errors import PySparkException
            from pyspark.sql import SparkSession

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about versions of pandas; the part of Spark that needs it is not used
                connect_to_spark = ibis.pyspark.connect
        except ImportError as error:
            raise ConfigError(f"engine=spark needs more packages ({error}): pip install 'cprec[spark]'") from None
        self.spill = spill.resolve()
        self._text = DuckDBEngine(spill, None)
        active = SparkSession.getActiveSession()
        self._is_own_session = active is None
        try:
            self.session = active or self._start(SparkSession.builder, master, memory_limit)
        except PySparkException as error:
            raise ConfigError(
                f"engine=spark: Spark does not start ({_first_line(error)}). It needs Java 17: is JAVA_HOME its folder?"
            ) from None
        self.session.sparkContext.setLogLevel("OFF")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from Ibis, about settings that it changes in the session
            self.backend = connect_to_spark(self.session)

    def _start(self, builder: Any, master: str, memory_limit: str | None) -> Any:
        settings = {
            "spark.sql.session.timeZone": "UTC",
            "spark.sql.ansi.enabled": "false",  # a value that cannot be read is null, as in DuckDB's TRY_CAST
            "spark.sql.shuffle.partitions": str(4 * num_cores()),
            "spark.sql.parquet.compression.codec": "zstd",
            "spark.sql.warehouse.dir": str(self.spill / "warehouse"),
            "spark.ui.enabled": "false",
            "spark.ui.showConsoleProgress": "false",
        }
        if not master or master.startswith("local"):
            settings |= {"spark.local.dir": str(self.spill), "spark.driver.bindAddress": "127.0.0.1"}
            settings |= {"spark.driver.host": "127.0.0.1"}
            os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
            quiet = self.spill / "log4j2.properties"
            quiet.write_text("rootLogger.level = off\n", encoding="utf-8")
            settings["spark.driver.extraJavaOptions"] = f"-Dlog4j2.configurationFile=file:{quiet}"
        if memory_limit is not None:
            settings["spark.driver.memory"] = memory_limit.lower().removesuffix("b").replace(" ", "")
        builder = builder.appName("cprec").master(
            master if master.startswith("local") else f"spark://{master}" if master else "local[*]"
        )
        for name, value in settings.items():
            builder = builder.config(name, value)
        return builder.getOrCreate()

    def microsecond(self, moment: Any) -> Any:
        seconds = moment.cast("timestamp('UTC')").cast("float64")
        return ((seconds - seconds.floor()) * 1_000_000).round()

    def close(self) -> None:
        self._text.close()
        if self._is_own_session:
            self.session.stop()

    @contextmanager
    def translated_errors(self, what: str) -> Iterator[None]:
        from py4j.protocol import Py4JError
        from pyspark.errors import PySparkException

        try:
            with self._text.translated_errors(what):
                yield
        except (PySparkException, Py4JError) as error:
            raise DataError(f"{what}: {_first_line(error)}") from None

    def read_parquet(self, path: str | Path) -> Any:
        with self.translated_errors(str(path)):
            frame = self.session.read.parquet(str(Path(path).resolve()))
            return self._view(frame.selectExpr("*", f"_metadata.row_index + 1 AS {LINE}"))

    def read_delimited(self, path: Path, form: Form) -> tuple[Any, Any | None]:
        rows, malformed = self._text.read_delimited(path, form)
        return self._handed_over(rows), None if malformed is None else self._handed_over(malformed)

    def read_json_lines(self, path: Path, columns: Sequence[str], *, encoding: str = "utf-8") -> tuple[Any, Any | None]:
        rows, malformed = self._text.read_json_lines(path, columns, encoding=encoding)
        return self._handed_over(rows), None if malformed is None else self._handed_over(malformed)

    def _handed_over(self, table: Any) -> Any:
        path = self.spill / f"{text_files.new_name()}.parquet"
        self._text.write_parquet(table, path)
        return self._view(self.session.read.parquet(str(path)))

    def from_arrow(self, table: pa.Table) -> Any:
        return self.from_batches(table.to_reader())

    def from_batches(self, batches: pa.RecordBatchReader) -> Any:
        return self._view(self.session.read.parquet(str(_stage(self.spill, batches))))

    def materialise(self, expression: Any) -> Any:
        return self._view(self.session.read.parquet(str(self._written(expression))))

    def discard(self, table: Any) -> None:
        self.session.catalog.dropTempView(table.get_name())

    def write_parquet(self, expression: Any, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _join_files(_files(self._written(expression)), path)

    def write_parts(self, expression: Any, folder: Path, column: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        written = self._written(expression, column)
        for part in sorted(written.glob(f"{column}=*")):
            _join_files(_files(part), folder / f"part-{part.name.partition('=')[2]}.parquet")

    def to_arrow(self, expression: Any) -> pa.Table:
        return self._frame(expression).toArrow()

    def batches(self, expression: Any) -> Iterator[pa.RecordBatch]:
        written = self._written(expression)
        for path in _files(written):
            yield from pq.ParquetFile(path).iter_batches(BATCH_ROWS)
        shutil.rmtree(written)

    def run_parts(self, function: str, folder: Path, parts: Sequence[int], description: str) -> None:
        """Call `function` ("module:name") on the executors, which see the folder, with it and with each part.

        Tasks are stretches of neighbouring parts. Spark calls a function again for parts of a task that was lost. An
        error of CPRec keeps its type and ends the job.
        """
        from py4j.protocol import Py4JError
        from pyspark.errors import PySparkException

        context = self.session.sparkContext
        done = context.accumulator(0)  # of tasks that have ended
        places = self.session.range(len(parts), numPartitions=min(len(parts), MOST_TASKS))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about versions of pandas; the part of Spark that needs it is not used
            calls = places.mapInArrow(_caller(function, folder, parts, done), "part long")
        with track(len(parts), description, "parts") as progress, ThreadPoolExecutor(1) as thread:
            job = thread.submit(calls.count)
            try:
                while wait([job], SECONDS_BETWEEN_LOOKS).not_done:
                    progress.advance(done.value - progress.completed)
                job.result()
            except (PySparkException, Py4JError) as error:
                raise _of_executor(error) from None
            except KeyboardInterrupt:
                context.cancelAllJobs()  # the thread waits for its job
                raise
            progress.advance(len(parts) - progress.completed)

    def _frame(self, expression: Any) -> Any:
        return self.session.sql(self.backend.compile(expression))

    def _written(self, expression: Any, partition_by: str | None = None) -> Path:
        """A folder of Parquet files, in the order of rows where the expression has one."""
        folder = self.spill / text_files.new_name()
        writer = self._frame(expression).write
        (writer.partitionBy(partition_by) if partition_by else writer).parquet(str(folder))
        return folder

    def _view(self, frame: Any) -> Any:
        name = text_files.new_name()
        frame.createOrReplaceTempView(name)
        return self.backend.table(name)


def _caller(
    function: str, folder: Path, parts: Sequence[int], done: Any
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """What `mapInArrow` runs on an executor: Spark sends it there with all that it refers to."""

    def call(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        module, _, name = function.partition(":")
        called = getattr(importlib.import_module(module), name)
        for batch in batches:
            for place in batch.column(0).to_pylist():
                called(folder, parts[place])
                done.add(1)
                yield pa.RecordBatch.from_pydict({"part": pa.array([parts[place]], pa.int64())})

    return call


def _of_executor(error: Exception) -> CPRecError:
    """The error of a function that Spark called: that of CPRec where its trace has one."""
    for kind, message in re.findall(r"^cprec\.errors\.(\w+): (.*)$", str(error), re.MULTILINE):
        if isinstance(found := getattr(errors, kind, None), type) and issubclass(found, CPRecError):
            return found(message)
    lines = [line.strip(" :") for line in str(error).splitlines()]
    told = next((line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)), lines[0])
    return DataError(f"Spark: {told}: the same command goes on from what is written")


TableEngine = DuckDBEngine | SparkEngine
"""The engines have the same methods: see `DuckDBEngine`."""


@contextmanager
def connect(
    engine: str = "duckdb", *, memory_limit: str | None = None, spill: str | Path | None = None
) -> Iterator[TableEngine]:
    """The table engine while the block runs.

    `engine` is duckdb, spark (the active session of this process, or a local one) or spark://MASTER, where MASTER is
    local[4] or host:port. `memory_limit` is as '8GB', None a share of the memory that is free (Spark: its own default);
    what exceeds it goes to temporary files in a new folder inside `spill` (None: the system's), which all executors of
    a Spark cluster must see. Errors of the engine leave the block as DataError.
    """
    if engine != "duckdb" and engine.partition("://")[0] != "spark":
        raise ConfigError(f"engine={engine!r}: expected duckdb, spark or spark://MASTER, as spark://local[4]")
    if spill is not None:
        Path(spill).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="cprec-", dir=spill))
    try:
        with warnings.catch_warnings():
            # Ibis calls a method of DuckDB that DuckDB has renamed; nothing that a user could act on.
            warnings.filterwarnings(
                "ignore", message=r"fetch_arrow_table\(\) is deprecated", category=DeprecationWarning
            )
            opened = (
                DuckDBEngine(folder, memory_limit)
                if engine == "duckdb"
                else SparkEngine(folder, memory_limit, engine.partition("://")[2])
            )
            try:
                with opened.translated_errors("the table engine"):
                    yield opened
            finally:
                opened.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def _stage(folder: Path, batches: pa.RecordBatchReader) -> Path:
    """Write batches to a Parquet file of a folder, one at a time."""
    path = folder / f"{text_files.new_name()}.parquet"
    with pq.ParquetWriter(path, batches.schema, compression="zstd") as writer:
        for batch in batches:
            writer.write_batch(batch)
    return path


def _join_files(paths: Sequence[Path], target: Path) -> None:
    """The rows of some Parquet files in one, a row group at a time; a single file is moved."""
    if len(paths) == 1:
        shutil.move(paths[0], target)
        return
    with pq.ParquetWriter(target, pq.read_schema(paths[0]), compression="zstd") as writer:
        for path in paths:
            source = pq.ParquetFile(path)
            for group in range(source.num_row_groups):
                writer.write_table(source.read_row_group(group))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
