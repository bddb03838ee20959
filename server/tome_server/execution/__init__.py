"""Runs one batch on a device."""
