"""Preprocessed cases, and the loading of views from them, with exact replay."""
