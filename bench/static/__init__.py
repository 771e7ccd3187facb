"""What the compiled Triton kernels are worth on GPUs that are not there: `python -m bench.static`."""
