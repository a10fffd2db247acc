"""Reading files of a source: parquet, and CSV of any dialect. Belongs here: nothing about campaigns."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa
import pyarrow.parquet as pq

from propensity_dagster.campaign_sections import Csv
from propensity_dagster.data.engine import Engine
from propensity_dagster.errors import DataContractError

_SAMPLE_BYTES = 1 << 20


def read_files(files: list[Path], options: Csv, engine: Engine) -> ibis.Table:
    """Parquet or CSV files of one table; the columns of CSV files are text.

    Of parquet files the columns that all have; where their types differ, of the type that holds every value.

    Raises:
        DataContractError: when two of its columns differ only in case, or a file is not parquet.
    """
    engine.note_files(files)
    empty = [file for file in files if file.stat().st_size == 0]
    if empty:
        raise DataContractError(f"{empty[0]}: the file is empty")
    require_distinct_names(str(files[0]), _header(files[0], options))
    if files[0].suffix == ".csv":
        return read_csv(files, options, engine)
    return _read_parquet(files, engine)


def _read_parquet(files: list[Path], engine: Engine) -> ibis.Table:
    """The engine would take the first file's types, and round what later files hold to fit them, without a word."""
    types: dict[str, set[str]] = {}
    present: list[set[str]] = []
    engine.lacking.clear()
    for file in files:
        try:
            schema = pq.read_schema(file)
        except pa.ArrowInvalid as error:
            raise DataContractError(f"{file}: is not a parquet file, or cut short: {error}") from None
        present.append(set(schema.names))
        for field in schema:
            types.setdefault(field.name, set()).add(str(field.type))
    for name in types:
        lacking = [file for file, names in zip(files, present, strict=True) if name not in names]
        if lacking:
            engine.lacking[name] = lacking[0]
    common = [name for name in types if all(name in names for names in present)]
    if all(len(types[name]) == 1 for name in common):
        return engine.read(files).select(*common)
    local = engine.local.backend.read_parquet([str(f) for f in files], hive_partitioning=False, union_by_name=True)
    return local.select(*common)


def files_in(path: Path) -> list[Path]:
    """The data files of a folder, or the file itself."""
    if path.is_file():
        return [path]
    return [f for f in sorted(path.rglob("*")) if f.suffix in (".parquet", ".csv") and not f.name.startswith(".")]


def table_of(folder: Path, file: Path) -> str:
    """The table a file of the source folder belongs to: its own name, or its first folder's."""
    relative = file.relative_to(folder) if file.is_relative_to(folder) else file
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def read_csv(files: list[Path], options: Csv, engine: Engine) -> ibis.Table:
    """Every column as text. DuckDB would read the key 00123 as 123, and lose the zone of a time without a word."""
    stated: dict[str, Any] = {"encoding": options.encoding or _encoding(files[0]), "hive_partitioning": False}
    if options.separator:
        stated["delim"] = options.separator
    if options.quote:
        stated["quote"] = options.quote
    return engine.read_csv(files, all_varchar=True, **stated)


def _encoding(file: Path) -> str:
    """UTF-8 unless the beginning of the file cannot be; then Latin-1, in which every byte is a letter."""
    with file.open("rb") as handle:
        sample = handle.read(_SAMPLE_BYTES)
    if sample[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    try:
        sample.decode("utf-8")
    except UnicodeDecodeError as error:
        return "utf-8" if error.start > len(sample) - 4 else "latin-1"  # the sample may end within a letter
    return "utf-8"


def _header(file: Path, options: Csv) -> list[str]:
    """Column names as they are written, before the engine makes equal ones different."""
    if file.suffix == ".parquet":
        return pq.read_schema(file).names
    encoding = options.encoding or _encoding(file)
    try:
        with file.open(encoding={"utf-8": "utf-8-sig"}.get(encoding, encoding), newline="") as handle:
            line = handle.readline()
    except UnicodeError:
        raise DataContractError(f"{file}: is not {encoding}: csv.encoding may be utf-8, latin-1 or utf-16") from None
    separator = options.separator or max(",;\t|", key=line.count)
    names = next(csv.reader([line], delimiter=separator, quotechar=options.quote or '"'), [])
    if len(names) == 1 and options.separator:
        others = [repr(other) for other in ",;\t|" if other in line and other != options.separator]
        if others:
            raise DataContractError(
                f"{file}: one column only: csv.separator is {options.separator!r}, but the first line holds "
                f"{', '.join(others)}"
            )
    return names


def require_distinct_names(what: str, names: Sequence[str]) -> None:
    """Raise when two names are one to the engine, which does not look at case.

    Raises:
        DataContractError: naming both.
    """
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.lower(), name)
        if other is not name:
            raise DataContractError(
                f"{what}: the columns {other!r} and {name!r} have one name, but for case; rename one of them"
            )
