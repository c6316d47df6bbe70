"""Data: bytes on disk to uint8 batches. Read sources.py, then pipeline.py."""
