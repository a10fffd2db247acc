"""Where Ibis expressions run. DuckDB in memory over parquet, with a spill folder; never a .duckdb file of ours.

A DuckDB file locks out every other process, readers too, so the lake is parquet and DuckDB is scratch. Spark, for data
that outgrow one machine, is another engine with the same methods: see spark.py.
"""

import gc
import os
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq

from propensity_dagster.data.lake import publishing, scratch_folder
from propensity_dagster.errors import EngineError, SourceError, StorageError

_SQL_TYPES = {
    "int8": "TINYINT",
    "int16": "SMALLINT",
    "int32": "INTEGER",
    "int64": "BIGINT",
    "float64": "DOUBLE",
    "boolean": "BOOLEAN",
    "string": "VARCHAR",
    "date": "DATE",
    "timestamp(6)": "TIMESTAMP",
    "timestamp": "TIMESTAMP",
}
BATCH_ROWS = 65_536
BatchFunction = Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]
_ANY_DAY = 2_000_000_011  # no day of anybody's, and no number of a query


@dataclass(frozen=True)
class Engine:
    """An Ibis backend with the lake's conventions: UTC, exact types, atomic writes.

    Attributes:
        backend: of Ibis: DuckDB in memory.
        scratch: a folder that lives as long as the engine.
        databases: connections to sources, closed with the engine.
        files: source files that are read, with size and time.
        lacking: columns that not every file of the table opened last has, with the first file that lacks it.
    """

    backend: Any
    scratch: Path
    databases: dict[str, Any]
    files: dict[Path, tuple[int, int]]
    lacking: dict[str, Path]
    types: ClassVar[Mapping[str, str]] = _SQL_TYPES
    quote: ClassVar[str] = '"'

    @property
    def local(self) -> "Engine":
        """DuckDB in this process: what reads CSV files and databases."""
        return self

    def note_files(self, files: Sequence[Path]) -> None:
        """Remember what these source files look like now, before they are read."""
        self.files.update({file: _mark(file) for file in files})

    @contextmanager
    def unchanged_files(self) -> Generator[None]:
        """Source files that are read inside must not be written to meanwhile: their rows may be of two minds.

        Raises:
            SourceError: naming the file; another attempt reads it anew.
        """
        self.files.clear()
        yield
        for file, mark in self.files.items():
            if not file.exists() or _mark(file) != mark:
                raise SourceError(f"{file}: it changed while it was read")

    def database(self, connection: str, connect: Callable[[], Any]) -> Any:
        """The open connection of that name, made when it is asked for first."""
        if connection not in self.databases:
            self.databases[connection] = connect()
        return self.databases[connection]

    def read(self, files: Path | Sequence[Path]) -> ibis.Table:
        """A table over parquet files of one schema."""
        paths = [files] if isinstance(files, Path) else list(files)
        return self.backend.read_parquet([str(path) for path in paths], hive_partitioning=False)

    def read_csv(self, files: Sequence[Path], **options: Any) -> ibis.Table:
        """A table over CSV files, of the local engine."""
        return self.local.backend.read_csv([str(file) for file in files], **options)

    def adopt(self, table: ibis.Table) -> ibis.Table:
        """A table of the local engine as one of this engine."""
        return table

    def name(self, table: ibis.Table) -> str:
        """A name under which SQL finds a table."""
        return self.as_view(table).get_name()

    def as_view(self, table: ibis.Table) -> ibis.Table:
        """The same table, compiled once: else it is, anew, for each place of a query that reads it."""
        return self.backend.create_view(ibis.util.gen_name("named"), table)

    def sql(self, query: str) -> ibis.Table:
        """A table by a query in DuckDB's dialect, in which campaign files are written."""
        return self.backend.sql(query, dialect="duckdb")

    def view(self, name: str, file: Path) -> ibis.Table:
        """A table over one parquet file under a fixed name: bind it to another file and prepared queries follow."""
        self.backend.raw_sql(f"CREATE OR REPLACE TEMP VIEW \"{name}\" AS SELECT * FROM read_parquet('{_quoted(file)}')")
        return self.backend.table(name)

    def table(self, data: pa.Table) -> ibis.Table:
        """A table over Arrow data."""
        return self.backend.create_table(ibis.util.gen_name("arrow"), data, temp=True)

    def cache(self, expression: ibis.Table) -> ibis.Table:
        """Compute once, keep in the engine (spilling when large) for many queries."""
        name = ibis.util.gen_name("cached")
        self.backend.raw_sql(f'CREATE TEMP TABLE "{name}" AS {self.prepare(expression)}')
        return self.backend.table(name)

    def forget(self, cached: ibis.Table) -> None:
        """Give back the room of a cached table: else it is kept as long as the engine."""
        self.backend.drop_table(cached.get_name())

    def by_key(self, table: ibis.Table, key: str) -> ibis.Table:
        """A table laid out for many queries that group by `key`: here as it is, for the files of months are sorted."""
        return table

    def arrow(self, expression: ibis.Table) -> pa.Table:
        """The rows, with exactly the types the expression states."""
        return self.run_query(self.prepare(expression))

    def batches(self, expression: ibis.Table) -> pa.RecordBatchReader:
        """The rows as a stream of record batches."""
        return self.backend.raw_sql(self.prepare(expression)).to_arrow_reader(BATCH_ROWS)

    def publish(self, expression: ibis.Table, file: Path, notes: Mapping[str, str] | None = None) -> None:
        """Write the rows, in their stated order, as one parquet file. Notes are of the file, not of its rows."""
        self.publish_query(self.prepare(expression), file, notes)

    def prepare(self, expression: ibis.Table) -> str:
        """SQL with every column cast: DuckDB sums integers to HUGEINT, which parquet stores as DOUBLE.

        What runs for many days is compiled once: see `any_day`.
        """
        columns: list[str] = []
        for name, dtype in expression.schema().items():
            column, kind = f"{self.quote}{name}{self.quote}", str(dtype).lstrip("!")
            columns.append(f"CAST({column} AS {self.types[kind]}) AS {column}" if kind in self.types else column)
        return f"SELECT {', '.join(columns)} FROM ({self.backend.compile(expression)})"

    def publish_query(self, query: str, file: Path, notes: Mapping[str, str] | None = None) -> None:
        """Write the rows of a prepared query as one parquet file."""
        options = "FORMAT PARQUET, COMPRESSION zstd, ROW_GROUP_SIZE 122880"
        if notes:
            noted = ", ".join(f"{name}: '{_quoted(note)}'" for name, note in notes.items())
            options += f", KV_METADATA {{{noted}}}"
        with publishing(file) as temporary, _disk_errors(file):
            self.backend.raw_sql(f"COPY ({query}) TO '{_quoted(temporary)}' ({options})")

    def run_query(self, query: str) -> pa.Table:
        """The rows of a prepared query."""
        return self.backend.raw_sql(query).to_arrow_table()

    def map_batches(
        self, file: Path, columns: Sequence[str], schema: pa.Schema, function: BatchFunction
    ) -> pa.RecordBatchReader:
        """What a function makes of the rows of a parquet file, in their order.

        Args:
            file: in the lake.
            columns: what the function sees.
            schema: of what it yields.
            function: from an iterator of record batches to another; columns that it does not know it passes on.
        """
        batches = pq.ParquetFile(file).iter_batches(BATCH_ROWS, columns=list(columns))
        return pa.RecordBatchReader.from_batches(schema, (b.cast(schema) for b in function(batches)))


@contextmanager
def compiling() -> Generator[None]:
    """For making and preparing a large query: up to half of that time went to looking for garbage among its nodes."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def any_day() -> ir.IntegerValue:
    """A day that a prepared query leaves open, for `on_day` to fill in.

    Compiling the features of one snapshot takes as long as computing those of a small campaign. A variable of the
    session would do too, but DuckDB plans with its value unknown, and then takes twice as long.
    """
    return cast(ir.IntegerValue, ibis.literal(_ANY_DAY, "int32"))


def on_day(query: str, day_index: int) -> str:
    """A prepared query for one day."""
    return query.replace(str(_ANY_DAY), str(day_index))


@contextmanager
def open_engine(memory_gb: float = 4.0, threads: int | None = None) -> Generator[Engine]:
    """A DuckDB engine bounded to `memory_gb`; what does not fit is spilled to a temporary folder.

    Raises:
        EngineError: for what goes wrong inside the block with memory, with the disk, or with a file of the lake.
    """
    with scratch_folder("spill") as spill, _engine_errors(memory_gb):
        backend = ibis.duckdb.connect()
        databases: dict[str, Any] = {}
        try:
            backend.raw_sql(f"SET temp_directory = '{_quoted(spill)}'")
            backend.raw_sql(f"SET memory_limit = '{memory_gb}GB'")
            backend.raw_sql(f"SET threads = {threads or os.cpu_count() or 1}")
            backend.raw_sql("SET TimeZone = 'UTC'")
            backend.raw_sql("SET enable_progress_bar = false")
            yield Engine(backend, spill, databases, {}, {})
        finally:
            for database in databases.values():
                database.disconnect()
            backend.disconnect()


@contextmanager
def _engine_errors(memory_gb: float) -> Generator[None]:
    import duckdb

    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise EngineError(
            f"more memory is needed than PROPENSITY_MEMORY_GB={memory_gb:g} allows, though what can be is spilled to "
            f"{tempfile.gettempdir()}: {_one_line(error)}"
        ) from None
    except (duckdb.IOException, duckdb.InvalidInputException) as error:
        raise EngineError(_one_line(error)) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


@contextmanager
def _disk_errors(file: Path) -> Generator[None]:
    import duckdb

    try:
        yield
    except duckdb.IOException as error:
        raise StorageError(f"{file}: cannot be written: {error}") from None


def _mark(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def _quoted(path: Path | str) -> str:
    return str(path).replace("'", "''")
