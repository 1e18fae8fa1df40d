"""CUDA graphs, torch.compile and the device's memory."""
