"""Decides what runs next. Pure Python, no clock, no threads."""
