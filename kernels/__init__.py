"""Triton kernels of fastvae, one file per op; torch and triton only, nothing from fastvae.

sparse_linear           first dense layer from CSR rows: L2 norm, dropout, gather-sum, bias, tanh
multinomial_nll         log-softmax x clicks from existing logits
linear_multinomial_nll  last dense layer and the same loss, logits never returned
nll_steps               the same for a range of the items, in steps between which ranges are summed
sample_latent           the encoder's output to z and kld, and back
adam                    the optimiser's update of all weights in one launch, with their bf16 copies
tiles                   launch configurations by chip and shape
"""

if __name__ != "fastvae.kernels":
    raise ImportError("kernels: this folder is part of fastvae; import fastvae.kernels")
