"""Measures every loss beside torch, torch.compile and a copy of its input: `python -m bench --help`."""
