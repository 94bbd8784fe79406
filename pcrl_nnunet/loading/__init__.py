"""Preprocessed cases, and a loader of their views with exact replay."""
