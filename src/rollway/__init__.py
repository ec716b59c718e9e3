"""rollway: post-training of policies by policy optimisation, as a Snakemake workflow over Parquet files."""

__version__ = "0.1.0"
