"""CUDA graphs, torch.compile and the host's memory allocator."""
