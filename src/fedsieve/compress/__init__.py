"""Compressors, one file each: lossy codings of model updates that compose with every method."""
