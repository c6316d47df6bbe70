"""The networks: encoder (vit.py), predictor (predictor.py) and both together (hjepa.py)."""
