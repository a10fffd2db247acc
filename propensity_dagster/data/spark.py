"""The same engine on Spark, for data that outgrow one machine: on this machine, on a cluster, or by Spark Connect.

Executors read the lake and write to the scratch folder, so the home folder must be at the same place for all of them.
What is published is collected from there in order and becomes the one file that every other reader of the lake knows.
CSV files and databases are read by DuckDB here and handed over as parquet: text and types are then the same.
"""

import atexit
import contextlib
import hashlib
import logging
import os
import re
import shutil
import socket
import sys
import zipfile
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, cast

import ibis
import pyarrow as pa
import pyarrow.parquet as pq

from propensity_dagster.data.engine import BATCH_ROWS, BatchFunction, Engine, open_engine
from propensity_dagster.data.lake import ROW_GROUP, publishing, scratch_folder
from propensity_dagster.errors import ConfigError, EngineError

logger = logging.getLogger(__name__)

_SQL_TYPES = {
    "int8": "TINYINT",
    "int16": "SMALLINT",
    "int32": "INT",
    "int64": "BIGINT",
    "float64": "DOUBLE",
    "boolean": "BOOLEAN",
    "string": "STRING",
    "date": "DATE",
    "timestamp(6)": "TIMESTAMP_NTZ",
    "timestamp": "TIMESTAMP_NTZ",
}
_SETTINGS = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    "spark.sql.parquet.compression.codec": "zstd",
    # The files of a table are named one by one: looking them up needs no job of its own.
    "spark.sql.sources.parallelPartitionDiscovery.threshold": "100000",
}
_LOCAL_SETTINGS = {
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
}
_QUIET = "ERROR"
_ROW = "row_in_file"
_ANSWER_SECONDS = 10.0


@dataclass(frozen=True)
class SparkEngine(Engine):
    """Ibis on a Spark session.

    Attributes:
        session: the session.
        duckdb: what reads CSV files and databases.
        kept: data frames that the executors hold as long as the engine lives.
    """

    session: Any
    duckdb: Engine
    kept: list[Any]
    types: ClassVar[Mapping[str, str]] = _SQL_TYPES
    quote: ClassVar[str] = "`"

    @property
    def local(self) -> Engine:
        """DuckDB in this process."""
        return self.duckdb

    def read(self, files: Path | Sequence[Path]) -> ibis.Table:
        """A table over parquet files of one schema, or over a folder of them."""
        paths = [files] if isinstance(files, Path) else list(files)
        return self._table(ibis.util.gen_name("parquet"), self._frame(paths))

    def view(self, name: str, file: Path) -> ibis.Table:
        """A table over one parquet file under a fixed name: bind it to another file and prepared queries follow."""
        return self._table(name, self._frame([file]))

    def table(self, data: pa.Table) -> ibis.Table:
        """A table over Arrow data."""
        file = self._scratch_path()
        pq.write_table(data, file)
        return self.read(file)

    def adopt(self, table: ibis.Table) -> ibis.Table:
        """A table of the local engine as one of this engine."""
        file = self._scratch_path()
        self.duckdb.publish(table, file)
        return self.read(file)

    def cache(self, expression: ibis.Table) -> ibis.Table:
        """Compute once, keep in the scratch folder: an executor that dies takes nothing with it."""
        return self.read(self._written(self.prepare(expression)))

    def forget(self, cached: ibis.Table) -> None:
        """Nothing: it lies in the scratch folder."""

    def by_key(self, table: ibis.Table, key: str) -> ibis.Table:
        """A table cut by `key` and kept by the executors: to group and join by it moves nothing between them."""
        parts = int(self.session.conf.get("spark.sql.shuffle.partitions"))
        frame = self.session.sql(self.prepare(table)).repartition(parts, key).persist()
        self.kept.append(frame)
        return self._table(ibis.util.gen_name("by_key"), frame)

    def arrow(self, expression: ibis.Table) -> pa.Table:
        """The rows, with exactly the types the expression states."""
        if expression.get_backend() is self.duckdb.backend:
            return self.duckdb.arrow(expression)
        return super().arrow(expression)

    def batches(self, expression: ibis.Table) -> pa.RecordBatchReader:
        """The rows as a stream of record batches, in their stated order."""
        return _collect(self._written(self.prepare(expression)))

    def publish_query(self, query: str, file: Path, notes: Mapping[str, str] | None = None) -> None:
        """Write the rows of a prepared query as one parquet file."""
        folder = self._written(query)
        reader = _collect(folder)
        with publishing(file) as temporary:
            schema = reader.schema.with_metadata(dict(notes)) if notes else reader.schema
            writer = pq.ParquetWriter(temporary, schema, compression="zstd")
            for group in _groups(reader):
                writer.write_table(group, row_group_size=ROW_GROUP)
            writer.close()
        shutil.rmtree(folder)

    def run_query(self, query: str) -> pa.Table:
        """The rows of a prepared query."""
        with _spark_errors():
            table = self.session.sql(query).toArrow()
        return table.cast(_without_zones(table.schema))

    def map_batches(
        self, file: Path, columns: Sequence[str], schema: pa.Schema, function: BatchFunction
    ) -> pa.RecordBatchReader:
        """What a function, which is sent to the executors, makes of the rows of a parquet file, in their order."""
        from pyspark.sql import functions
        from pyspark.sql.pandas.types import from_arrow_schema

        numbered = pa.schema([pa.field(_ROW, pa.int64()), *schema])
        rows = self._frame([file]).select(functions.col("_metadata.row_index").alias(_ROW), *columns)
        _send_package(self.session)
        return _collect(self._written(rows.mapInArrow(function, from_arrow_schema(numbered)).orderBy(_ROW).drop(_ROW)))

    def _written(self, rows: Any) -> Path:
        """A scratch folder of what the executors wrote: the rows of a query, or of a data frame."""
        folder = self._scratch_path()
        with _spark_errors():
            frame = self.session.sql(rows) if isinstance(rows, str) else rows
            frame.write.parquet(_uri(folder))
        return folder

    def _frame(self, paths: Sequence[Path]) -> Any:
        with _spark_errors():
            return self.session.read.parquet(*[_uri(path) for path in paths])

    def _table(self, name: str, frame: Any) -> ibis.Table:
        frame.createOrReplaceTempView(name)
        return self.backend.table(name)

    def _scratch_path(self) -> Path:
        return self.scratch / f"{ibis.util.gen_name('rows')}.parquet"


@contextmanager
def open_spark(master: str, root: Path, memory_gb: float = 4.0, threads: int | None = None) -> Generator[SparkEngine]:
    """An engine on Spark.

    Args:
        master: "spark" for this machine, `local[N]`, `spark://HOST:PORT` for a cluster, `sc://HOST:PORT` for Connect.
        root: the home folder, in which a scratch folder is made.
        memory_gb: of a session on this machine; a cluster has its own configuration.
        threads: of a session on this machine.

    Raises:
        ConfigError: when pyspark, Java or the cluster is not there.
    """
    session = _session(master, memory_gb, threads)
    kept: list[Any] = []
    try:
        # The scratch folder is in the home folder, for executors must reach it.
        with open_engine(memory_gb, threads) as duckdb, scratch_folder("spark", root / "scratch") as scratch:
            backend = ibis.pyspark.connect(session)
            shared = duckdb.databases, duckdb.files, duckdb.lacking
            yield SparkEngine(backend, scratch, *shared, session, duckdb, kept)
    finally:
        for frame in kept:
            frame.unpersist()


@lru_cache
def _session(master: str, memory_gb: float, threads: int | None) -> Any:
    try:
        from pyspark.sql import SparkSession
    except ImportError:
        raise ConfigError(
            f"PROPENSITY_ENGINE={master}: Spark is not installed; pip install 'propensity_dagster[spark]'"
        ) from None
    _require_answer(master)
    logging.getLogger("py4j").setLevel(logging.WARNING)  # it says that it closes, in words of an error
    logger.info("starting Spark: %s", master)
    builder: Any = SparkSession.builder
    settings = dict(_SETTINGS)
    if master.startswith("sc://"):
        builder = builder.remote(master)
    elif master.startswith("spark://"):
        builder = builder.master(master)
    else:
        _require_java(master)
        cores = threads or os.cpu_count() or 1
        builder = builder.master(f"local[{cores}]" if master == "spark" else master)
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        settings |= _LOCAL_SETTINGS | {
            "spark.driver.memory": f"{max(int(memory_gb * 1024), 1024)}m",
            "spark.sql.shuffle.partitions": str(4 * cores),
        }
    for name, value in settings.items():
        builder = builder.config(name, value)
    try:
        session = builder.appName("propensity").getOrCreate()
    except Exception as error:  # of Py4J, of gRPC, of Spark: they share no base
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ConfigError(f"PROPENSITY_ENGINE={master}: Spark does not start: {reason}; is it Java 17?") from None
    if not master.startswith("sc://"):
        session.sparkContext.setLogLevel(_QUIET)
    atexit.register(session.stop)
    return session


def _require_java(master: str) -> None:
    home = os.environ.get("JAVA_HOME")
    if not shutil.which("java") and not (home and (Path(home) / "bin" / "java").exists()):
        raise ConfigError(
            f"PROPENSITY_ENGINE={master}: Spark needs Java 17 on this machine: there is no java on PATH, and JAVA_HOME "
            f"{'is ' + repr(home) if home else 'is not set'}"
        )


def _require_answer(master: str) -> None:
    """Somebody listens at the address: Spark itself would try for a minute, and Connect for ten."""
    places = re.findall(r"([\w.-]+):(\d+)", master)
    for host, port in places:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS):
            return
    if places:
        raise ConfigError(f"PROPENSITY_ENGINE={master}: nobody answers there; is Spark running, and the port right?")


@lru_cache
def _send_package(session: Any) -> None:
    """Our own modules to the executors, once: there functions that they run look for them."""
    package = Path(__file__).parents[1]
    files = sorted(package.rglob("*.py"))
    content = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
    opened = contextlib.ExitStack()
    folder = opened.enter_context(scratch_folder("package"))
    atexit.register(opened.close)  # executors fetch it whenever one is new
    archive = folder / f"{package.name}-{content}.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for file in files:
            packed.write(file, file.relative_to(package.parent))
    session.addArtifacts(str(archive), pyfile=True)


@contextmanager
def _spark_errors() -> Generator[None]:
    """What Spark says, without the stack traces of its machines."""
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        yield
    except (PySparkException, Py4JError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("\tat ")]
        causes = [
            line for line in lines if line.startswith("Caused by:") or re.match(r"[\w.]*(Error|Exception)\b", line)
        ]
        raise EngineError(
            f"Spark could not finish: {' / '.join(dict.fromkeys([lines[0], *causes[-1:]]))[:600]}"
        ) from None


def _collect(folder: Path) -> pa.RecordBatchReader:
    """The rows that executors wrote, part after part: Spark numbers the parts in order."""
    parts = sorted(folder.glob("part-*.parquet"))
    schema = _without_zones(pq.read_schema(parts[0]))

    def rows() -> Iterator[pa.RecordBatch]:
        for part in parts:
            for batch in pq.ParquetFile(part).iter_batches(BATCH_ROWS):
                yield batch.cast(schema)

    return pa.RecordBatchReader.from_batches(schema, rows())


def _groups(reader: pa.RecordBatchReader) -> Iterator[pa.Table]:
    """Tables of a row group each, however small the batches are."""
    pending: list[pa.RecordBatch] = []
    for batch in cast(Iterable[pa.RecordBatch], reader):
        pending.append(batch)
        if sum(b.num_rows for b in pending) >= ROW_GROUP:
            yield pa.Table.from_batches(pending)
            pending = []
    if pending:
        yield pa.Table.from_batches(pending)


def _without_zones(schema: pa.Schema) -> pa.Schema:
    """The lake's times are UTC without saying so, and its columns have no other metadata."""
    return pa.schema([(f.name, pa.timestamp("us") if pa.types.is_timestamp(f.type) else f.type) for f in schema])


def _uri(path: Path) -> str:
    return f"file://{path}"
