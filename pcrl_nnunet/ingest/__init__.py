"""From raw files to preprocessed cases: finding, reading and checking scans, with or without masks."""
