"""Fuzz targets, run by hand or by a nightly job; what they find becomes a test."""
