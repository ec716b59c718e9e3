"""catalog: a DuckDB file of views over all Parquet files, for any DuckDB client."""

from pathlib import Path

from rollway.runtime.specs import CatalogSpec


def run(spec: CatalogSpec, *, database: Path) -> None:
    """Writes the views over the folder that `database` lies in."""
    from rollway.store import catalog

    catalog.write_database(database.parent)
