"""Sources, the parquet lake, ingestion and quarantine."""
