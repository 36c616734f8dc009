"""Operations of SEA attention: one folder each, a PyTorch reference and (where it exists) Triton kernels behind one function."""
