"""What the commands share about data: one reader, one splitter, one window cutter, one held-out loss."""
