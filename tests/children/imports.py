"""Import the modules that are named, and print the names of all that were imported for it."""

import importlib
import sys

for name in sys.argv[1:]:
    importlib.import_module(name)
print(*sys.modules)
