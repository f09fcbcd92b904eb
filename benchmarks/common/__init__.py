"""What the benchmarks share: result files, fair timing, texts, training, runs of recipes, processes of their own."""
