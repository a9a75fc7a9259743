"""Latency of an architecture before it is measured. Nothing is imported here: the modules need torch and BoTorch."""
