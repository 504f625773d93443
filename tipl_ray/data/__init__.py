"""The data set: whole files in a folder or a bucket, and trials as Parquet parts that commit records make count."""
