"""The console scripts, one in a file."""
