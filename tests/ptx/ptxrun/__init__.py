"""nvcc's own PTX, run on the CPU: see tests/ptx/README.md."""
