"""Measurements, run by `make bench` and `make reproduce`; nothing here is timed in a test."""
