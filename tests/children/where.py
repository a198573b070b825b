"""Prints the files that fastvae and its kernels are imported from."""

import fastvae
import fastvae.kernels.sparse_linear

print(fastvae.__file__)
print(fastvae.kernels.sparse_linear.__file__)
