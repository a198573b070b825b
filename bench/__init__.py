"""Measurements of fastvae, one module per command: python -m bench COMMAND."""
