"""Images that a server answered, kept as Parquet files by hour, and computed again. Free of torch."""
