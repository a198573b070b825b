"""python -m fastvae: the fastvae command."""

from .cli import main

main()
